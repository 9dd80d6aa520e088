//! `pgvault wal push | fetch`

use std::path::Path;
use std::time::{Duration, Instant};

use pgvault_core::postgres::{ParseError, SegmentHeader, SystemId, WalFileName};
use pgvault_core::wal::fetch::{self, Fetched};
use pgvault_core::wal::push::{self, Pushed};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{Cli, FetchArgs, PushArgs};
use crate::context::{Context, system_id_of};
use crate::exit::Status;
use crate::output::Printer;

/// How long `wal fetch` repeats what may succeed later, before it stops the server.
const FETCH_PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn push(cli: &Cli, printer: &Printer, args: &PushArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, archived_system_id(&args.path)).await.map_err(|error| foreign(error, &args.path))?;
    let pushed = push::push(&cluster, &args.path).await?;
    if pushed == Pushed::AlreadyThere {
        tracing::info!(path = %args.path.display(), "already in the vault with the same contents");
    }
    printer.summary(&json!({ "path": args.path, "already_there": pushed == Pushed::AlreadyThere }));
    Ok(Status::Done)
}

/// Whose file this is: a segment says so itself; any other lies in the data directory of its cluster.
fn archived_system_id(path: &Path) -> Option<SystemId> {
    use std::io::Read;
    let mut head = [0; 64];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head));
    let segment = read.ok().and_then(|()| SegmentHeader::parse(&head).ok()).map(|header| header.system_identifier);
    segment.or_else(|| system_id_of(path.parent()?.parent()?))
}

/// A segment of a cluster that the vault does not know is refused as foreign, not as a missing vault.
fn foreign(error: Error, path: &Path) -> Error {
    match archived_system_id(path) {
        Some(id) if error.code() == "cluster.none" => {
            Error::new(ErrorKind::Conflict, "wal.foreign", format!("{} belongs to system identifier {id}: {error}", path.display()))
                .with_hint("check that this configuration belongs to this server; for a new server run `pgvault init`")
        }
        _ => error,
    }
}

pub(crate) async fn fetch(cli: &Cli, printer: &Printer, args: &FetchArgs) -> Result<Status> {
    let began = Instant::now();
    let file: WalFileName = args.name.parse().map_err(|e: ParseError| Error::new(ErrorKind::Usage, "wal.name", e.to_string()))?;
    let attempt = async || {
        let context = Context::load(cli)?;
        let cluster = context.open(&args.cluster, None).await?;
        fetch::fetch(&cluster, file, &args.destination).await
    };
    loop {
        match attempt().await {
            Ok(Fetched::Written) => return Ok(Status::Done),
            Ok(Fetched::EndOfArchive) => {
                printer.line(format_args!("{file} is not in the vault, and nothing after it"));
                return Ok(Status::EndOfArchive);
            }
            Err(error) if error.is_transient() && began.elapsed() < FETCH_PATIENCE => {
                tracing::warn!(%file, %error, "fetch failed, trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
}
