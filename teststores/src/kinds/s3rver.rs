//! s3rver, an S3 server for tests, from npm: it answers 200 to a conditional PUT and overwrites.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use pgvault_provision::registry::{node, npm};

use crate::client::{Client, Key};
use crate::guard::{Work, free_port};
use crate::server::{Info, Kind, Running};

const PACKAGE: &str = "s3rver@3.7.1";

pub(crate) fn install() -> Result<(PathBuf, PathBuf)> {
    Ok((node()?, npm(PACKAGE)?.join("bin/s3rver.js")))
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let (node, script) = install()?;
    let work = Work::new("s3rver")?;
    let port = free_port()?;
    let mut server = Command::new(node);
    server.arg(script).args(["--address", "127.0.0.1", "--port", &port.to_string(), "--directory"]).arg(work.folder("data")?);
    let process = work.start("s3rver", &server)?;
    let endpoint = format!("http://127.0.0.1:{port}");
    // The only user it knows.
    let owner = Key { id: "S3RVER".to_owned(), secret: "S3RVER".to_owned() };
    Client::anonymous(&endpoint)?.wait_until_up(Duration::from_secs(60), || process.ensure_running())?;
    Ok((Info::new(Kind::S3rver, endpoint, owner), Running { processes: vec![process], work: Some(work) }))
}
