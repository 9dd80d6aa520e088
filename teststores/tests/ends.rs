//! A server ends with its owner, however that ends, and leaves nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgvault_teststores::Info;

#[test]
fn a_server_ends_when_its_owner_is_killed_and_its_folder_is_removed() {
    let place = tempfile::tempdir().unwrap();
    let mut owner = Command::new(env!("CARGO_BIN_EXE_pgvault-stores"))
        .args(["serve", "s3rver"])
        .env("TMPDIR", place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.starts_with("PGVAULT_TEST_STORE_S3RVER={")).expect("the server is described");
    assert_eq!(lines.next().as_deref(), Some("ready"));
    let info: Info = serde_json::from_str(line.split_once('=').unwrap().1).unwrap();
    let address = info.endpoint.strip_prefix("http://").unwrap();
    assert!(TcpStream::connect(address).is_ok());
    let folders = || fs::read_dir(place.path()).unwrap().count();
    assert_eq!(folders(), 1);

    owner.kill().unwrap();
    let _ = owner.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(address).is_ok() || folders() > 0 {
        assert!(Instant::now() < deadline, "still there: {address}, {} folders", folders());
        std::thread::sleep(Duration::from_millis(50));
    }
}
