//! `pgvault filestore sync`

use std::collections::BTreeMap;
use std::time::Duration;

use pgvault_core::config::{Blackout, ClusterConfig, OdooMode};
use pgvault_core::filestore::capture::{Capture, CaptureOptions, Depth};
use pgvault_core::filestore::dropped;
use pgvault_core::filestore::find::Instance;
use pgvault_core::filestore::guard::Guard;
use pgvault_core::filestore::pass::{Pass, PassKind};
use pgvault_core::postgres::ConnInfo;
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, SyncArgs};
use crate::context::{Context, system_id_of};
use crate::exit::Status;
use crate::output::{self, Printer};

/// After a failure the next try comes after a tenth of the interval at first, and never later than this.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

pub(super) async fn run(cli: &Cli, printer: &Printer, args: &SyncArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let blackout = config.odoo.blackout()?;
    let (finder, connection) = super::finder(config)?;
    let cluster = context.open(&args.cluster, config.pgdata.as_deref().and_then(system_id_of)).await?;
    let instances = if args.database.is_empty() {
        finder.find(&connection, cluster.name().system_id).await?
    } else {
        let named = |database: &String| Ok(Instance { folder: finder.folder(database)?, database: database.clone() });
        args.database.iter().map(named).collect::<Result<Vec<_>>>()?
    };
    for database in dropped::note(&cluster, &connection).await? {
        printer.warn(format_args!(
            "database {} ({}) is gone from the server; its documents are kept as long as a backup has it",
            database.name, database.uuid
        ));
    }
    if instances.is_empty() {
        return Err(Error::new(ErrorKind::Source, "odoo.none", "no Odoo database was found on this server")
            .with_hint("name them in [cluster.NAME.odoo] databases, and check that the role may read them"));
    }
    let sync = Sync { cluster, config: config.clone(), connection, blackout, args, printer };
    if args.watch { sync.watch(instances).await } else { sync.once(&instances).await }
}

struct Sync<'a> {
    cluster: Cluster,
    config: ClusterConfig,
    connection: ConnInfo,
    blackout: Blackout,
    args: &'a SyncArgs,
    printer: &'a Printer,
}

impl Sync<'_> {
    fn options(&self, instance: &Instance) -> CaptureOptions {
        CaptureOptions {
            connection: self.connection.clone(),
            database: instance.database.clone(),
            folder: instance.folder.clone(),
            workers: self.config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
            level: self.config.compression_level,
            full_every: self.config.odoo.full_every,
            guarded: self.args.watch && self.config.odoo.mode == OdooMode::Guard,
            accept_losses: self.args.accept_losses,
            progress: self.printer.progress(),
            hook: None,
        }
    }

    fn depth(&self, full: bool) -> Depth {
        if full {
            Depth::Full
        } else if self.blackout.is_on(self.cluster.env().now()) {
            Depth::ChecklistOnly
        } else {
            Depth::AsNeeded
        }
    }

    /// One pass over each.
    async fn once(&self, instances: &[Instance]) -> Result<Status> {
        let (mut databases, mut first, mut doubts) = (Vec::new(), None, false);
        for instance in instances {
            let pass = async {
                let mut capture = Capture::open(&self.cluster, self.options(instance)).await?;
                let captured = Box::pin(capture.pass(self.depth(self.args.full))).await?;
                Ok::<_, Error>((captured.pass.or_else(|| capture.last().cloned()), captured.warnings))
            };
            match pass.await {
                Ok((Some(pass), warnings)) => {
                    doubts |= !self.tell(&pass, &warnings);
                    databases.push(describe(&pass, &warnings));
                }
                Ok((None, _)) => {}
                // The others are captured all the same.
                Err(error) => {
                    self.printer.warn(format_args!("{}: {error}", instance.database));
                    databases.push(
                        json!({ "database": instance.database, "error": { "code": error.code(), "message": error.to_string() } }),
                    );
                    let _ = first.get_or_insert(error);
                }
            }
        }
        self.printer.summary(&json!({ "cluster": self.cluster.name().name, "databases": databases }));
        match first {
            Some(error) => Err(error),
            None if doubts => Ok(Status::Incomplete),
            None => Ok(Status::Done),
        }
    }

    /// Says what a pass did; false when files are known to be bad or to lack.
    fn tell(&self, pass: &Pass, warnings: &[String]) -> bool {
        for warning in warnings {
            self.printer.warn(format_args!("{}: {warning}", pass.database.name));
        }
        let kind = match pass.kind {
            PassKind::Full => "all looked at",
            PassKind::Checklist => "checklist looked at",
            _ => "not all looked at yet",
        };
        self.printer.line(format_args!(
            "{} ({}): {kind}, {} new files of {}, {} in all; documents are safe up to {}",
            pass.database.name,
            pass.mode,
            pass.new_files,
            output::bytes(pass.new_bytes),
            pass.counts.present,
            pass.watermark().map_or_else(|| "nothing yet".to_owned(), |(_, mark)| format!("{} ({:.0})", mark.lsn, mark.at)),
        ));
        let counts = pass.counts;
        if counts.missing + counts.lost + counts.damaged > 0 {
            self.printer.warn(format_args!(
                "{}: rows refer to {} files that the source has lost before they were captured, {} that it has lost since (the vault has \
                 them), and {} that are damaged",
                pass.database.name, counts.missing, counts.lost, counts.damaged
            ));
        }
        matches!(pass.kind, PassKind::Full | PassKind::Checklist)
    }

    /// Passes, again and again, until somebody says that it is enough. What fails is tried again.
    async fn watch(&self, instances: Vec<Instance>) -> Result<Status> {
        let failed = |e: std::io::Error| Error::new(ErrorKind::Failed, "signal", format!("listen for signals: {e}"));
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let loops = instances.iter().map(|instance| Box::pin(self.follow(instance)));
        tokio::select! {
            _ = futures::future::join_all(loops) => {}
            // A pass on its way is dropped: what it has stored is gone on with.
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        self.printer.summary(&json!({ "cluster": self.cluster.name().name, "stopped": true }));
        Ok(Status::Done)
    }

    async fn follow(&self, instance: &Instance) {
        let interval = self.config.odoo.interval;
        let mut capture: Option<Capture> = None;
        let mut guard: Option<Guard> = None;
        let mut wait = interval / 10;
        let mut full = self.args.full;
        loop {
            let began = tokio::time::Instant::now();
            let passed = async {
                let capture = match &mut capture {
                    Some(capture) => capture,
                    none => none.insert(Capture::open(&self.cluster, self.options(instance)).await?),
                };
                Box::pin(capture.pass(self.depth(full))).await
            };
            match passed.await {
                Ok(captured) => {
                    full = false;
                    wait = interval / 10;
                    if let Some(pass) = captured.pass.filter(|pass| pass.new_files > 0 || pass.kind != PassKind::Checklist) {
                        let _ = self.tell(&pass, &captured.warnings);
                    }
                    let next = began + interval;
                    match &mut capture {
                        Some(capture) if self.is_guarded(capture) => self.stand_guard(instance, capture, &mut guard, next).await,
                        _ => tokio::time::sleep_until(next).await,
                    }
                }
                Err(error) => {
                    self.printer.warn(format_args!("{}: {error}; trying again in {} s", instance.database, wait.as_secs().max(1)));
                    // The connection may be broken, the database renamed.
                    capture = None;
                    guard = None;
                    tokio::time::sleep(wait.max(Duration::from_secs(1))).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
        }
    }
}

impl Sync<'_> {
    fn is_guarded(&self, capture: &Capture) -> bool {
        self.config.odoo.mode == OdooMode::Guard && !capture.has_grace()
    }

    /// Keeps Odoo's collector waiting until `next`; when it comes, what it may delete is stored first.
    async fn stand_guard(&self, instance: &Instance, capture: &mut Capture, guard: &mut Option<Guard>, next: tokio::time::Instant) {
        while tokio::time::Instant::now() < next {
            let Some(mut held) = guard.take() else {
                // While the collector runs, the lock has to wait for it.
                match tokio::time::timeout_at(next, Guard::arm(&self.connection, &instance.database)).await {
                    Ok(Ok(armed)) => *guard = Some(armed),
                    Ok(Err(error)) => {
                        self.printer.warn(format_args!("{}: {error}", instance.database));
                        return tokio::time::sleep_until(next).await;
                    }
                    Err(_) => return,
                }
                continue;
            };
            if !held.wanted_within(next - tokio::time::Instant::now()).await {
                *guard = Some(held);
                return;
            }
            match capture.before_collection(held).await {
                Ok(true) => {}
                Ok(false) => self.printer.warn(format_args!(
                    "{}: the guard was given up before all files were open: some that Odoo collects now may not be in the vault",
                    instance.database
                )),
                Err(error) => self.printer.warn(format_args!("{}: {error}", instance.database)),
            }
        }
    }
}

fn describe(pass: &Pass, warnings: &[String]) -> Value {
    let watermark = pass.watermark();
    let census: BTreeMap<&String, Value> =
        pass.census.iter().map(|(place, (rows, bytes))| (place, json!({ "rows": rows, "bytes": bytes }))).collect();
    json!({
        "database": pass.database.name,
        "uuid": pass.database.uuid,
        "pass_id": pass.id,
        "kind": pass.kind,
        "mode": pass.mode,
        "started_at": pass.started_at,
        "watermark_lsn": watermark.map(|(_, mark)| mark.lsn),
        "watermark_timeline": watermark.map(|(timeline, _)| timeline),
        "watermark_at": watermark.map(|(_, mark)| mark.at),
        "new_files": pass.new_files,
        "new_bytes": pass.new_bytes,
        "stored_bytes": pass.stored_bytes,
        "counts": pass.counts,
        "census": census,
        "warnings": warnings,
        "peak_rss_bytes": crate::commands::backup::peak_rss_bytes(),
    })
}
