//! `pgvault wal push | fetch | stream | check`

use std::path::Path;
use std::time::{Duration, Instant};

use pgvault_core::postgres::{Lsn, ParseError, SegmentHeader, SystemId, TimelineId, WalFileName};
use pgvault_core::vault::{Cluster, snapshot};
use pgvault_core::wal::fetch::{self, Fetched};
use pgvault_core::wal::gap::TimedGap;
use pgvault_core::wal::push::{self, Pushed};
use pgvault_core::wal::stream::{StreamEvent, StreamOptions, stream as run_stream};
use pgvault_core::wal::verify::{VerifyOptions, WalReport, verify};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, FetchArgs, PushArgs, StreamArgs, WalCheckArgs};
use crate::context::{Context, parse_id, system_id_of};
use crate::exit::Status;
use crate::output::{self, Printer};

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
    let (events, mut told) = tokio::sync::mpsc::unbounded_channel();
    let options = StreamOptions {
        connection: Context::connection(config)?,
        slot: config.wal.slot.clone(),
        flush_interval: config.wal.flush_interval,
        synchronous: config.wal.synchronous,
        any_timeline: args.any_timeline,
        receive_timeout: config.wal.receive_timeout,
        events,
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
        StreamEvent::SlotCreated { slot } => printer.line(format_args!("created the replication slot {slot}")),
        StreamEvent::Started { from, timeline } => printer.line(format_args!("streaming from {from} on timeline {timeline}")),
        StreamEvent::Durable { to, timeline } => printer.line(format_args!("durable up to {to} on timeline {timeline}")),
        StreamEvent::Switched { timeline } => printer.line(format_args!("the server is on timeline {timeline} now")),
        StreamEvent::Gap { from, to } => printer.warn(format_args!(
            "WAL from {from} to {to} is lost: the server no longer has it. Take a new backup; no point in between can be restored"
        )),
        StreamEvent::Interrupted { reason } => printer.warn(format_args!("interrupted, trying again: {reason}")),
    }
}

pub(crate) async fn check(cli: &Cli, printer: &Printer, args: &WalCheckArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let from = match &args.from {
        Some(text) => Some(start(&cluster, text).await?),
        None => None,
    };
    let options = VerifyOptions { from, timeline: args.timeline.map(TimelineId), deep: args.deep, progress: printer.progress() };
    let report = verify(&cluster, &options).await?;
    drop(options);
    show(printer, &report);
    Ok(if report.is_clean() { Status::Done } else { Status::VerificationFailed })
}

/// A position, or where a backup begins.
async fn start(cluster: &Cluster, text: &str) -> Result<Lsn> {
    match text.parse() {
        Ok(lsn) => Ok(lsn),
        Err(_) => Ok(snapshot::open(cluster, parse_id(text)?, None).await?.manifest.start_lsn),
    }
}

fn show(printer: &Printer, report: &WalReport) {
    for timeline in &report.timelines {
        let times = match (timeline.first_time, timeline.last_time) {
            (Some(first), Some(last)) => format!(", transactions from {first} to {last}"),
            _ => String::new(),
        };
        printer.line(format_args!(
            "timeline {}: {} to {}, {} segments, {} records{times}",
            timeline.timeline, timeline.from, timeline.to, timeline.segments, timeline.records
        ));
    }
    for gap in &report.gaps {
        printer.line(format_args!("GAP {}", describe(gap)));
    }
    for damage in &report.damage {
        let at = damage.lsn.map_or(String::new(), |lsn| format!(" at {lsn}"));
        printer.line(format_args!("DAMAGE {}{at}: {}", damage.object, damage.what));
    }
    let read = output::bytes(report.bytes);
    if report.is_clean() {
        printer.line(format_args!("ok: no gap, no damage; {read} of WAL read"));
    } else {
        printer.line(format_args!(
            "FAILED: {} gaps, {} damaged places; {read} of WAL read",
            report.gaps.len(),
            report.damage.len()
        ));
    }
    let gaps: Vec<_> = report
        .gaps
        .iter()
        .map(|gap| {
            json!({
                "timeline": gap.timeline,
                "from_lsn": gap.from,
                "to_lsn": gap.to,
                "from_time": gap.from_time,
                "to_time": gap.to_time,
            })
        })
        .collect();
    printer.summary(&json!({
        "result": if report.is_clean() { "passed" } else { "failed" },
        "timelines": report.timelines,
        "gaps": gaps,
        "damage": report.damage,
        "bytes": report.bytes,
    }));
}

/// A gap, with the times around it.
pub(crate) fn describe(gap: &TimedGap) -> String {
    let times = match (gap.from_time, gap.to_time) {
        (Some(from), Some(to)) => format!("; the last transaction before it ended at {from}, the first behind it at {to}"),
        (Some(from), None) => format!("; the last transaction before it ended at {from}"),
        (None, Some(to)) => format!("; the first transaction behind it ended at {to}"),
        (None, None) => String::new(),
    };
    format!("timeline {}: WAL from {} to {} is missing{times}", gap.timeline, gap.from, gap.to)
}
