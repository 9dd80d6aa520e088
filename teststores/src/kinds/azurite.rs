//! Azurite, Microsoft's emulator of Azure Blob, from npm.
//!
//! It does not look at signatures, keeps no versions, and takes headers of immutability without honouring them: only the wire is
//! tested against it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use pgvault_provision::registry::{node, npm};

use crate::client::{Client, Key};
use crate::guard::{Work, free_port};
use crate::server::{Info, Kind, Running};

/// The newest that runs on Node.js 20.
const PACKAGE: &str = "azurite@3.35.0";

/// The account that every emulator of Azure has, with the key that Microsoft has published for it.
pub(crate) const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

pub(crate) fn install() -> Result<(PathBuf, PathBuf)> {
    Ok((node()?, npm(PACKAGE)?.join("dist/src/blob/main.js")))
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let (node, script) = install()?;
    let work = Work::new("azurite")?;
    let port = free_port()?;
    let mut server = Command::new(node);
    server.arg(script).args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string(), "--location"]);
    server.arg(work.folder("data")?).args(["--disableTelemetry", "--silent", "--skipApiVersionCheck"]);
    let process = work.start("azurite", &server)?;
    let endpoint = format!("http://127.0.0.1:{port}/{ACCOUNT}");
    let owner = Key { id: ACCOUNT.to_owned(), secret: KEY.to_owned() };
    Client::anonymous(&endpoint)?.wait_until_up(Duration::from_secs(60), || process.ensure_running())?;
    Ok((Info::new(Kind::Azurite, endpoint, owner), Running { processes: vec![process], work: Some(work) }))
}
