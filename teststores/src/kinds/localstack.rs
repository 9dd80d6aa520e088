//! `LocalStack`, an emulator of Amazon's services, from `PyPI`: S3 with versions and Object Lock, and KMS. It believes every signature.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use pgvault_provision::registry;

use crate::client::{Client, Key};
use crate::guard::{Work, free_port};
use crate::server::{Info, Kind, Running};

/// The newest that Python 3.11 runs. Without the bounds pip chooses newer releases of its dependencies, with which it does not start.
const PACKAGES: [&str; 6] = [
    "localstack-core[runtime]==4.9.2",
    "cryptography>=45.0.7,<46",
    "pyOpenSSL>=25,<26",
    "service_identity<25",
    "cbor2<5.8",
    "plux<1.15",
];

pub(crate) fn install() -> Result<PathBuf> {
    Ok(registry::python("localstack", &PACKAGES)?.join("python"))
}

/// The interpreter that it runs on, which has Amazon's own libraries.
pub fn python() -> Result<PathBuf> {
    install()
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let program = install()?;
    let work = Work::new("localstack")?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut server = Command::new(program);
    server.args(["-m", "localstack.runtime.main"]).current_dir(work.path()).env("HOME", work.path());
    // Its other web server, twisted, listens on every address, whatever it is told.
    server.env("GATEWAY_SERVER", "hypercorn").env("GATEWAY_LISTEN", &address).env("LOCALSTACK_HOST", &address);
    server.env("SERVICES", "s3,kms").env("STRICT_SERVICE_LOADING", "1").env("EAGER_SERVICE_LOADING", "1");
    // Nothing of it talks to the world.
    server.env("DISABLE_EVENTS", "1").env("SKIP_SSL_CERT_DOWNLOAD", "1").env("DNS_ADDRESS", "0");
    server
        .env("FILESYSTEM_ROOT", work.folder("data")?)
        .env("XDG_CACHE_HOME", work.folder("cache")?)
        .env("TMPDIR", work.folder("tmp")?);
    let process = work.start("localstack", &server)?;
    let endpoint = format!("http://{address}");
    let owner = Key { id: "test".to_owned(), secret: "test".to_owned() };
    Client::anonymous(&endpoint)?.wait_until_up(Duration::from_secs(90), || process.ensure_running())?;
    Ok((Info::new(Kind::Localstack, endpoint, owner), Running { processes: vec![process], work: Some(work) }))
}
