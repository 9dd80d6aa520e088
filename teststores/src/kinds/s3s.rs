//! s3s-fs, an S3 server over a directory, from crates.io: it checks signatures and refuses the second of two PUTs, though not of two at
//! once; it has neither versions nor locks, and takes the headers of a lock without a word.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use pgvault_provision::registry::S3S_FS;

use crate::client::{Client, Key};
use crate::guard::{Work, free_port};
use crate::server::{Info, Kind, Running};

pub(crate) fn install() -> Result<PathBuf> {
    S3S_FS.built()
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let program = install()?;
    let work = Work::new("s3s-fs")?;
    let port = free_port()?;
    let owner = Key { id: "pgvault-owner".to_owned(), secret: "the-secret-of-the-owner".to_owned() };
    let mut server = Command::new(program);
    server.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
    server.args(["--access-key", &owner.id, "--secret-key", &owner.secret]).arg(work.folder("data")?);
    let process = work.start("s3s-fs", &server)?;
    let endpoint = format!("http://127.0.0.1:{port}");
    Client::anonymous(&endpoint)?.wait_until_up(Duration::from_secs(30), || process.ensure_running())?;
    Ok((Info::new(Kind::S3sFs, endpoint, owner), Running { processes: vec![process], work: Some(work) }))
}
