//! `pgvault wal push | fetch`

pub(crate) mod check;
pub(crate) mod prefetch;
pub(crate) mod stream;

use std::path::Path;
use std::time::{Duration, Instant};

use pgvault_core::copy::either::{Answer, ask};
use pgvault_core::env::Env;
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
    let limit = context.cluster(&args.cluster)?.1.wal.push_batch;
    let (pushed, others) = if limit > 1 {
        let batch = push::batch(&cluster, &args.path, limit).await;
        // PostgreSQL names each of them later, and is told then.
        for (path, error) in batch.others.iter().filter_map(|(path, sent)| Some((path, sent.as_ref().err()?))) {
            tracing::warn!(path = %path.display(), %error, "not stored yet");
        }
        (batch.asked?, batch.others.iter().filter(|(_, sent)| matches!(sent, Ok(Pushed::Stored))).count())
    } else {
        (push::push(&cluster, &args.path).await?, 0)
    };
    if pushed == Pushed::AlreadyThere {
        tracing::info!(path = %args.path.display(), "already in the vault with the same contents");
    }
    printer.summary(&json!({ "path": args.path, "already_there": pushed == Pushed::AlreadyThere, "others_stored": others }));
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
        let answer = ask(context.places(), async |place| {
            let fetched = async {
                let cluster = context.open_at(place, &args.cluster, None).await?;
                fetch::fetch(&cluster, file, &args.destination, args.until).await
            };
            Ok(match fetched.await {
                Ok(Fetched::Written) => Answer::Present(place),
                Ok(Fetched::EndOfArchive) => Answer::Absent,
                Err(error) => Answer::Trouble(error),
            })
        });
        match answer.await? {
            Answer::Present(place) => {
                if let Some(copy) = place.filter(|_| context.place().is_none()) {
                    tracing::warn!(%file, copy, "the vault does not give it, taken from a copy");
                }
                if matches!(file, WalFileName::Segment(_)) {
                    prefetch::start(&context, args);
                }
                Ok::<_, Error>(Fetched::Written)
            }
            Answer::Absent => Ok(Fetched::EndOfArchive),
            Answer::Trouble(error) => Err(error),
        }
    };
    let mut failures = 0;
    loop {
        match attempt().await {
            Ok(Fetched::Written) => return Ok(Status::Done),
            Ok(Fetched::EndOfArchive) => {
                printer.line(format_args!("{file} is not in the vault, and nothing after it"));
                return Ok(Status::EndOfArchive);
            }
            Err(error) if error.is_transient() && began.elapsed() < FETCH_PATIENCE => {
                let pause = pause(failures).min(FETCH_PATIENCE.saturating_sub(began.elapsed()));
                failures += 1;
                tracing::warn!(%file, %error, ?pause, "fetch failed, trying again");
                tokio::time::sleep(pause).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Half a second, doubled with every failure up to eight, and each between half of that and all of it: many servers whose store was
/// away shall not all come back at the same moment.
fn pause(failures: u32) -> Duration {
    let longest = Duration::from_millis(500).saturating_mul(1 << failures.min(4));
    let random: [u8; 1] = Env::default().random().unwrap_or([128]);
    longest / 2 + longest.mul_f64(f64::from(random[0]) / 512.0)
}
