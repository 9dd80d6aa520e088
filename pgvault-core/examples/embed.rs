//! A backup program of one's own: opens a vault, backs a server up, lists what there is and restores it.
//!
//! ```text
//! PASSPHRASE=... embed 'host=/run/postgresql user=postgres' /var/lib/postgresql/15/main /srv/vault /srv/restored
//! ```
//!
//! PostgreSQL on the restored directory calls this same program back for its WAL.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to a terminal")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use pgvault_core::backup::{BackupOptions, CensusOptions, backup};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, Connection, Mode, ParseError, SystemId};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::{Settings, Store};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault, snapshot};
use pgvault_core::wal::fetch::{Fetched, fetch};
use pgvault_core::{Error, ErrorKind, Result};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        [conninfo, pgdata, vault, target] => back_up_and_restore(conninfo, pgdata, vault, target).await.map(|()| ExitCode::SUCCESS),
        [vault, "wal", "fetch", system_id, file, destination] => {
            // From 1 to 125 PostgreSQL takes a failure for the end of the archive, and opens the database there.
            let fetched = wal_fetch(vault, system_id, file, Path::new(destination)).await;
            return match fetched {
                Ok(Fetched::Written) => ExitCode::SUCCESS,
                Ok(Fetched::EndOfArchive) => ExitCode::from(1),
                Err(error) => {
                    eprintln!("{error}");
                    ExitCode::from(255)
                }
            };
        }
        _ => Err(Error::new(ErrorKind::Usage, "usage", "expected CONNINFO PGDATA VAULT TARGET")),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error} [{}]", error.code());
        ExitCode::FAILURE
    })
}

async fn back_up_and_restore(conninfo: &str, pgdata: &str, vault: &str, target: &str) -> Result<()> {
    let connection = ConnInfo::parse(conninfo, &|name| std::env::var(name).ok())?;

    // A cluster is a name and the identifier that initdb gave it.
    let mut server = Connection::connect(&connection, Mode::Replication).await?;
    let name = ClusterName::new("main", server.identify_system().await?.system_id)?;
    server.close().await;

    // Both are left alone when they exist.
    let (opened, _) = Vault::create(Store::open(&url(vault)?, Settings::default())?, Env::default()).await?;
    let _ = opened.create_cluster(&name, &[Wrap::Passphrase(passphrase()?)]).await?;
    let cluster = opened.unlock(&name, &Unlock::Passphrase(passphrase()?)).await?;

    let options = BackupOptions {
        connection,
        pgdata: Some(pgdata.into()),
        level: 1,
        workers: 2,
        labels: BTreeMap::new(),
        strict: true,
        spread_checkpoint: false,
        archive_patience: None,
        as_of: None,
        full: false,
        census: Some(CensusOptions::default()),
        progress: Arc::new(Silent),
    };
    let manifest = backup(&cluster, &options).await?;
    println!("took {}: {} bytes, {} stored", manifest.id, manifest.source_bytes, manifest.stored_bytes);

    for snapshot in snapshot::list(&cluster).await?.snapshots {
        println!("there is {} of {}", snapshot.manifest.id, snapshot.manifest.finished_at);
    }

    let plan = plan(&cluster, &Target::Latest, PlanOptions::default()).await?;
    let restored = restore(
        &cluster,
        &plan,
        &RestoreOptions {
            pgdata: target.into(),
            delta: false,
            tablespace_mapping: BTreeMap::new(),
            restore_command: restore_command(&cluster, vault)?,
            action: TargetAction::Promote,
            archive_off: true,
            workers: 2,
            progress: Arc::new(Silent),
        },
    )
    .await?;
    println!("restored {} bytes to {target}; start PostgreSQL on it", restored.bytes_written);
    Ok(())
}

/// `EXAMPLE VAULT wal fetch SYSTEM_ID %f %p`
fn restore_command(cluster: &Cluster, vault: &str) -> Result<RestoreCommand> {
    let program = std::env::current_exe().map_err(|e| Error::io("find", Path::new("this program"), e))?;
    let vault = absolute(vault)?.to_string_lossy().into_owned();
    Ok(RestoreCommand { program, global_arguments: vec![vault], arguments: vec![cluster.name().system_id.to_string()] })
}

async fn wal_fetch(vault: &str, system_id: &str, file: &str, destination: &Path) -> Result<Fetched> {
    let usage = |e: ParseError| Error::new(ErrorKind::Usage, "usage", e.to_string());
    let system_id: SystemId = system_id.parse().map_err(usage)?;
    let vault = Vault::open(Store::open(&url(vault)?, Settings::default())?, Env::default()).await?;
    let name = vault.find_cluster("main", Some(system_id)).await?;
    let cluster = vault.unlock(&name, &Unlock::Passphrase(passphrase()?)).await?;
    fetch(&cluster, file.parse().map_err(usage)?, destination, None).await
}

fn absolute(path: &str) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("resolve", Path::new(path), e))
}

fn url(vault: &str) -> Result<String> {
    Ok(format!("file://{}", absolute(vault)?.display()))
}

fn passphrase() -> Result<secrecy::SecretString> {
    let found = std::env::var("PASSPHRASE").map(secrecy::SecretString::from);
    found.map_err(|_| Error::new(ErrorKind::Usage, "usage", "PASSPHRASE is not set"))
}
