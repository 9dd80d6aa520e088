//! `pgvault wal push | fetch | stream`

use std::path::Path;
use std::time::{Duration, Instant};

use pgvault_core::config::Durability;
use pgvault_core::postgres::{ParseError, SegmentHeader, SystemId, WalFileName};
use pgvault_core::wal::fetch::{self, Fetched};
use pgvault_core::wal::push::{self, Pushed};
use pgvault_core::wal::spool::SpoolOptions;
use pgvault_core::wal::stream::{Retention, StreamEvent, StreamOptions, stream as run_stream};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, FetchArgs, PushArgs, StreamArgs};
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

pub(crate) async fn stream(cli: &Cli, printer: &Printer, args: &StreamArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let cluster = context.open(&args.cluster, config.pgdata.as_deref().and_then(system_id_of)).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let wal = &config.wal;
    if wal.durability == Durability::Spool && wal.spool.is_none() {
        return Err(Error::new(ErrorKind::Usage, "config.spool", "`durability = \"spool\"` needs a `spool` directory"));
    }
    let (options, mut told) = StreamOptions::new(Context::connection(config)?, &wal.slot);
    let options = StreamOptions {
        flush_interval: wal.flush_interval,
        synchronous: wal.synchronous,
        any_timeline: args.any_timeline,
        receive_timeout: wal.receive_timeout,
        spool: wal.spool.clone().map(|directory| SpoolOptions {
            directory,
            limit: wal.spool_limit,
            durable: wal.durability == Durability::Spool,
        }),
        pg_wal: config.pgdata.as_deref().map(|pgdata| pgdata.join("pg_wal")),
        ..options
    };
    let failed = |e: std::io::Error| Error::new(ErrorKind::Failed, "signal", format!("listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let streaming = run_stream(&cluster, &options, stopped);
    tokio::pin!(streaming);
    loop {
        tokio::select! {
            ended = &mut streaming => return ended.map(|()| Status::Done),
            Some(event) = told.recv() => tell(printer, &event),
            _ = terminate.recv() => end(&stop)?,
            _ = interrupt.recv() => end(&stop)?,
        }
    }
}

/// The first signal lets the stream store and confirm what it has received; the second does not wait for the store.
fn end(stop: &tokio::sync::watch::Sender<bool>) -> Result<()> {
    if stop.send_replace(true) {
        return Err(Error::new(ErrorKind::Failed, "interrupted", "stopped before everything received was stored")
            .with_hint("nothing is lost: the replication slot keeps what was not confirmed"));
    }
    Ok(())
}

fn tell(printer: &Printer, event: &StreamEvent) {
    match event {
        StreamEvent::SlotFound { slot, restart_lsn } => {
            printer.line(format_args!("the replication slot {slot} keeps WAL from {restart_lsn} on"));
        }
        StreamEvent::SlotCreated { slot } => printer.line(format_args!("created the replication slot {slot}")),
        StreamEvent::Started { from, timeline } => printer.line(format_args!("streaming from {from} on timeline {timeline}")),
        StreamEvent::Durable { to, timeline, waited } => {
            tracing::debug!(%to, %timeline, ?waited, "durable");
        }
        StreamEvent::Switched { timeline } => printer.line(format_args!("the server is on timeline {timeline} now")),
        StreamEvent::Gap { timeline, from, to } => printer.warn(format_args!(
            "WAL of timeline {timeline} from {from} to {to} is lost: the server no longer has it. Take a new backup; no point in between \
             can be restored"
        )),
        StreamEvent::Interrupted { reason } => printer.warn(format_args!("interrupted, trying again: {reason}")),
        StreamEvent::StoreTrouble { reason } => {
            printer.warn(format_args!("the store does not take WAL, trying again; the server keeps it meanwhile: {reason}"));
        }
        StreamEvent::StoreRecovered => printer.line(format_args!("the store takes WAL again")),
        StreamEvent::Behind => printer.line(format_args!("the store is slower than the server; the server keeps what has not arrived")),
        StreamEvent::Retained(retention) => warn_of(printer, retention),
    }
}

fn warn_of(printer: &Printer, retention: &Retention) {
    let mib = |bytes: u64| bytes >> 20;
    let kept = mib(retention.retained);
    if !retention.held {
        return printer.warn(format_args!("the server has given up WAL of the slot that is not in the vault: there will be a gap"));
    }
    if let Some(safe) = retention.safe {
        printer.warn(format_args!(
            "the server keeps {kept} MiB of WAL for the slot; after {} MiB more it gives it up (max_slot_wal_keep_size)",
            mib(safe)
        ));
    }
    if let Some(free) = retention.disk_free {
        printer.warn(format_args!("the server keeps {kept} MiB of WAL for the slot; its disk has {} MiB left", mib(free)));
    }
}
