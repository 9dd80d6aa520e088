//! An S3 server over a folder, for what is measured beside a directory.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::measure::cpu_time;

const BUCKET: &str = "bench";
const KEY: &str = "pgvault-bench";
const SECRET: &str = "pgvault-bench-secret";

/// Ends with its owner.
pub(super) struct Server {
    child: Child,
    address: SocketAddr,
    folder: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts s3s-fs with an empty bucket in a folder of `root`.
    pub(super) fn start(s3s_fs: &Path, root: &Path) -> Result<Self> {
        let folder = root.join("s3");
        fs::create_dir_all(folder.join(BUCKET))?;
        // A free port; nobody takes it in between on a machine that is measured on.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = fs::File::create(root.join("s3.log"))?;
        let mut command = Command::new(s3s_fs);
        command.args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--access-key", KEY, "--secret-key", SECRET]);
        let child = command.arg(&folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let server = Self { child: child.context("start the S3 server")?, address, folder };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("the S3 server does not answer; see {}", root.join("s3.log").display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The folder in which its objects are.
    pub(super) fn folder(&self, vault: &str) -> PathBuf {
        self.folder.join(BUCKET).join(vault)
    }

    /// What it has taken of the processors so far.
    pub(super) fn cpu_time(&self) -> Result<Duration> {
        cpu_time(i32::try_from(self.child.id()).context("the server's process id")?)
    }
}

/// The address of a vault with this name.
pub(super) fn url(vault: &str) -> String {
    format!("s3://{BUCKET}/{vault}")
}

/// What pgvault reads of its environment to reach the server at this address.
pub(super) fn variables(server: SocketAddr) -> Vec<(String, String)> {
    [
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ENDPOINT_URL", format!("http://{server}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
