//! `pgvault wal stream`

use pgvault_core::config::Durability;
use pgvault_core::wal::spool::SpoolOptions;
use pgvault_core::wal::stream::{Retention, StreamEvent, StreamOptions, stream};
use pgvault_core::{Error, ErrorKind, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, StreamArgs};
use crate::context::{Context, system_id_of};
use crate::endpoint::Endpoint;
use crate::endpoint::metrics::StreamMetrics;
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &StreamArgs) -> Result<Status> {
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
    let metrics = StreamMetrics::new(cluster.name().to_string(), cluster.store().clone());
    let endpoint = match &args.metrics_listen {
        Some(address) => Some(Endpoint::open(address, &metrics, options.state.subscribe(), wal.flush_interval).await?),
        None => None,
    };
    if let Some(endpoint) = &endpoint {
        printer.line(format_args!("metrics and health on http://{}/", endpoint.address));
    }
    let streaming = stream(&cluster, &options, stopped);
    tokio::pin!(streaming);
    loop {
        tokio::select! {
            ended = &mut streaming => {
                while let Ok(event) = told.try_recv() {
                    tell(printer, &event);
                }
                return ended.map(|()| Status::Done);
            }
            Some(event) = told.recv() => {
                metrics.observe(&event);
                tell(printer, &event);
            }
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
