//! Garage, a real S3 server, from crates.io: it answers 200 to a conditional PUT and overwrites, and ignores locks.
//!
//! Building it takes a quarter of an hour, so that only those install it who ask for it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use pgvault_provision::registry::Crate;
use pgvault_provision::run::run_quietly;

use crate::client::{Client, Key};
use crate::guard::{Work, free_port};
use crate::server::{Info, Kind, Running};

const GARAGE: Crate = Crate { name: "garage", version: "2.5.0", features: &[], takes: "a quarter of an hour" };

pub(crate) fn install() -> Result<PathBuf> {
    GARAGE.built()
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let program = install()?;
    let work = Work::new("garage")?;
    let (rpc, port) = (free_port()?, free_port()?);
    let config = work.write(
        "garage.toml",
        &format!(
            "metadata_dir = \"{meta}\"\ndata_dir = \"{data}\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
             rpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{secret}\"\n\
             [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\nroot_domain = \".s3.garage.localhost\"\n",
            meta = work.folder("meta")?.display(),
            data = work.folder("data")?.display(),
            secret = "17".repeat(32),
        ),
    )?;
    let garage = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("-c").arg(&config).args(arguments);
        command
    };
    let process = work.start("garage", &garage(&["server"]))?;
    let endpoint = format!("http://127.0.0.1:{port}");
    Client::anonymous(&endpoint)?.wait_until_up(Duration::from_secs(60), || process.ensure_running())?;
    let node = run_quietly(&mut garage(&["node", "id", "-q"]))?;
    let node = node.trim().split('@').next().unwrap_or_default().to_owned();
    let _ = run_quietly(&mut garage(&["layout", "assign", "-z", "dc1", "-c", "10G", &node]))?;
    let _ = run_quietly(&mut garage(&["layout", "apply", "--version", "1"]))?;
    let made = run_quietly(&mut garage(&["key", "create", "owner"]))?;
    let field = |name: &str| {
        let line = made.lines().find_map(|line| line.trim().strip_prefix(name)).with_context(|| format!("no {name} in {made}"));
        line.map(|value| value.trim_start_matches(':').trim().to_owned())
    };
    let owner = Key { id: field("Key ID")?, secret: field("Secret key")? };
    let _ = run_quietly(&mut garage(&["key", "allow", "--create-bucket", &owner.id]))?;
    let mut info = Info::new(Kind::Garage, endpoint, owner);
    "garage".clone_into(&mut info.region);
    Ok((info, Running { processes: vec![process], work: Some(work) }))
}
