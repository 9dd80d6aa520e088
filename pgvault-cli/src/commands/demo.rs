//! `pgvault demo`: a database, a mistake and its undoing, on this machine and without a trace.
//!
//! ```text
//! throwaway cluster, vault, configuration -> load -> backup -> more load -> DROP TABLE -> restore -> compare
//! ```
//!
//! Every figure it shows was measured in this run. It uses the engine as any program would; pgvault itself is only called
//! by the restored server, as its `restore_command`.

mod archiver;
mod load;
mod workspace;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgvault_core::backup::{BackupOptions, CensusOptions, backup};
use pgvault_core::postgres::{ConnInfo, Connection, Mode};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreOptions, TargetAction, restore};
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::process::{self, Install, Outcome, Server};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::args::DemoArgs;
use crate::exit::Status;
use crate::output::{self, Printer};
use archiver::Archiver;
use load::{Load, Orders};
use workspace::{Workspace, blocking};

/// Time between the moment that is restored and the mistake.
const BEFORE_THE_MISTAKE: Duration = Duration::from_secs(1);

/// Longest wait for WAL to become durable, and for a recovery to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Clients that place orders at the same time.
const WRITERS: usize = 4;

pub(crate) async fn run(printer: &Printer, args: &DemoArgs) -> Result<Status> {
    let (stop, stopped) = watch::channel(false);
    let failed = |e: std::io::Error| Error::new(ErrorKind::Failed, "signal", format!("listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let install = blocking(|| Ok(Install::find(None, &[])?)).await?;
    let workspace = Workspace::create()?;
    let mut demo = Demo { printer, stopped, steps: Vec::new() };
    let result = {
        let running = demo.run(args, &install, &workspace);
        tokio::pin!(running);
        // Told to stop, it still runs to its end, which is then near: a server that is being made cannot be left alone.
        loop {
            tokio::select! {
                result = &mut running => break result,
                _ = terminate.recv() => drop(stop.send(true)),
                _ = interrupt.recv() => drop(stop.send(true)),
            }
        }
    };
    let kept = if args.keep { Some(workspace.keep()) } else { workspace.remove().map(|()| None)? };
    let found = match result {
        // Whatever failed after an interrupt failed because of it.
        _ if *stop.borrow() => {
            return Err(Error::new(
                ErrorKind::Failed,
                "demo.interrupted",
                if args.keep { "interrupted; everything was stopped" } else { "interrupted; everything was stopped and removed" },
            ));
        }
        result => result?,
    };
    demo.show(&found);
    if let Some(folder) = &kept {
        printer.line(format_args!("\nkept: {0}\ntry: pgvault --config {0}/pgvault.toml list", folder.display()));
    }
    let steps: Vec<Value> = demo.steps.iter().map(|(name, took)| json!({ "step": name, "ms": millis(*took) })).collect();
    printer.summary(&json!({
        "result": if found.is_right() { "passed" } else { "failed" },
        "postgres": install.version().to_string(),
        "target": found.target,
        "dropped_at": found.dropped_at,
        "confirmed_to_clients": found.confirmed,
        "committed": found.committed,
        "restored": found.restored,
        "placed_after_target": found.placed_after,
        "steps": steps,
        "directory": kept,
    }));
    Ok(if found.is_right() { Status::Done } else { Status::VerificationFailed })
}

/// What a run found out.
struct Found {
    /// The moment that was restored.
    target: Timestamp,
    /// When `DROP TABLE` was sent, by the server's clock.
    dropped_at: Timestamp,
    /// Orders that the clients knew to be committed at the target.
    confirmed: u64,
    /// The table at the target, as the original server saw it.
    committed: Orders,
    /// The table in the restored cluster.
    restored: Orders,
    /// Orders confirmed between the target and the mistake.
    placed_after: u64,
}

impl Found {
    fn is_right(&self) -> bool {
        self.committed == self.restored && self.committed.rows == self.confirmed
    }
}

/// A run: where it prints, what may end it, and how long its steps took.
struct Demo<'a> {
    printer: &'a Printer,
    stopped: watch::Receiver<bool>,
    steps: Vec<(&'static str, Duration)>,
}

impl Demo<'_> {
    async fn run(&mut self, args: &DemoArgs, install: &Install, workspace: &Workspace) -> Result<Found> {
        self.printer.line(format_args!(
            "PostgreSQL {} from {}, run by {}; all files in {}\n",
            install.version(),
            install.bin().display(),
            workspace.account().name(),
            workspace.path().display()
        ));
        self.row("step", "took", "");
        let began = Instant::now();
        let server = workspace.start_server(install).await?;
        self.done("start a new PostgreSQL cluster", began, "")?;

        let began = Instant::now();
        let connection = workspace::connection(&server)?;
        let cluster = workspace.init(&server).await?;
        let archiver = Archiver::start(&cluster, &connection);
        let outcome = match self.done("create an encrypted vault, stream WAL to it", began, "") {
            Ok(()) => Box::pin(self.lose_and_restore(args, install, workspace, &cluster, &connection, &archiver)).await,
            Err(error) => Err(error),
        };
        let began = Instant::now();
        archiver.end().await;
        workspace::end(server).await?;
        let found = outcome?;
        self.done("stop the original", began, "")?;
        let total = self.steps.iter().map(|(_, took)| *took).sum();
        self.row("everything", &seconds(total), "");
        Ok(found)
    }

    async fn lose_and_restore(
        &mut self,
        args: &DemoArgs,
        install: &Install,
        workspace: &Workspace,
        cluster: &Cluster,
        connection: &ConnInfo,
        archiver: &Archiver,
    ) -> Result<Found> {
        let began = Instant::now();
        let mut sql = self.unless_stopped(Connection::connect(connection, Mode::Sql)).await?;
        let existing = self.unless_stopped(load::create_table(&mut sql)).await?;
        let load = Load::start(connection, WRITERS, existing);
        self.unless_stopped(pause(Duration::from_secs(args.seconds) * 2 / 5)).await?;
        let orders = load.confirmed();
        self.done("put it under load", began, format_args!("{WRITERS} clients, {orders} orders so far"))?;

        let began = Instant::now();
        let options = BackupOptions {
            connection: connection.clone(),
            pgdata: Some(workspace.pgdata()),
            level: 1,
            workers: workers(),
            labels: BTreeMap::new(),
            strict: true,
            spread_checkpoint: false,
            archive_patience: None,
            as_of: None,
            full: false,
            census: Some(CensusOptions::default()),
            progress: Arc::new(Silent),
        };
        let manifest = self.unless_stopped(backup(cluster, &options)).await?;
        let sizes = format!("{} as {}", output::bytes(manifest.source_bytes), output::bytes(manifest.stored_bytes));
        self.done("take a base backup meanwhile", began, format_args!("{sizes} in {} objects", manifest.objects_put))?;

        let began = Instant::now();
        self.unless_stopped(pause(Duration::from_secs(args.seconds) * 3 / 5)).await?;
        // No transaction is open now: what is committed at this moment is beyond dispute.
        let still = load.hold().await;
        let confirmed = load.confirmed();
        let committed = Orders::read(&mut sql).await?;
        let target = load::server_time(&mut sql).await?;
        drop(still);
        let rate = load.rate();
        self.done("go on writing, note the time", began, format_args!("{} at {target}", count("order", confirmed)))?;

        let began = Instant::now();
        self.unless_stopped(pause(BEFORE_THE_MISTAKE)).await?;
        let dropped_at = load::server_time(&mut sql).await?;
        let _ = sql.simple_query("DROP TABLE orders").await?;
        let placed_after = load.end().await?.saturating_sub(confirmed);
        self.done("a second later: DROP TABLE orders", began, format_args!("{rate:.0} orders/s until then"))?;

        let began = Instant::now();
        let end = load::switch_segment(&mut sql).await?;
        self.unless_stopped(archiver.wait_until_durable(end, PATIENCE)).await?;
        self.done("wait until that is in the vault", began, format_args!("WAL up to {end}"))?;

        let began = Instant::now();
        let plan = self.unless_stopped(plan(cluster, &Target::Time(target), PlanOptions::default())).await?;
        let options = RestoreOptions {
            pgdata: workspace.restored(),
            delta: false,
            tablespace_mapping: BTreeMap::new(),
            restore_command: workspace.restore_command(cluster)?,
            action: TargetAction::Promote,
            archive_off: false,
            workers: workers(),
            progress: Arc::new(Silent),
        };
        let written = self.unless_stopped(restore(cluster, &plan, &options)).await?.bytes_written;
        self.done("restore to the noted time: files", began, output::bytes(written))?;

        let began = Instant::now();
        let server = self.recover(install, workspace).await?;
        self.done("restore to the noted time: replay WAL", began, format_args!("from {}", manifest.start_lsn))?;

        let began = Instant::now();
        let mut sql = Connection::connect(&workspace::connection(&server)?, Mode::Sql).await?;
        let restored = Orders::read(&mut sql).await?;
        sql.close().await;
        workspace::end(server).await?;
        self.done("compare every order, stop the copy", began, "")?;
        Ok(Found { target, dropped_at, confirmed, committed, restored, placed_after })
    }

    /// Starts the restored cluster and waits for the end of its recovery.
    async fn recover(&self, install: &Install, workspace: &Workspace) -> Result<Server> {
        workspace.hand_over_vault()?;
        let (install, pgdata, stopped) = (install.clone(), workspace.restored(), self.stopped.clone());
        blocking(move || {
            let mut server = Server::adopt(&install, pgdata).launch()?;
            let deadline = Instant::now() + PATIENCE;
            loop {
                // In short stretches, so that an interrupt does not have to wait.
                match server.wait_until_paused_or_promoted(Duration::from_millis(500)) {
                    Ok(Outcome::Promoted) => return Ok(server),
                    Ok(other) => {
                        return Err(Error::new(ErrorKind::Failed, "demo.recovery", format!("recovery ended with {other:?}")));
                    }
                    Err(process::Error::Timeout { .. }) if Instant::now() < deadline && !*stopped.borrow() => {}
                    Err(error) => return Err(error.into()),
                }
            }
        })
        .await
    }

    /// Waits for `work`, but not past an interrupt.
    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut stopped = self.stopped.clone();
        tokio::select! {
            result = work => result,
            Ok(_) = stopped.wait_for(|stop| *stop) => Err(interrupted()),
        }
    }

    /// Notes and prints a finished step.
    fn done(&mut self, name: &'static str, began: Instant, detail: impl Display) -> Result<()> {
        let took = began.elapsed();
        self.steps.push((name, took));
        self.row(name, &seconds(took), detail);
        if *self.stopped.borrow() { Err(interrupted()) } else { Ok(()) }
    }

    fn row(&self, name: &str, took: &str, detail: impl Display) {
        self.printer.line(format!("  {name:<44} {took:>8}   {detail}").trim_end());
    }

    fn show(&self, found: &Found) {
        let line = |name: &str, committed: &str, restored: &str| {
            self.printer.line(format_args!("  {name:<16} {committed:<34} {restored}"));
        };
        let (committed, restored) = (&found.committed, &found.restored);
        self.printer.line("");
        line("", "committed", "restored");
        line("orders", &committed.rows.to_string(), &restored.rows.to_string());
        line("last order", &committed.last.to_string(), &restored.last.to_string());
        line("placed at", &committed.newest, &restored.newest);
        line("md5 of all rows", &committed.md5, &restored.md5);
        let before = found.dropped_at.duration_since(found.target).as_secs_f64();
        self.printer.line(format_args!("\n  restored to {}, {before:.3} s before the table was dropped", found.target));
        if found.is_right() {
            let after = count("order", found.placed_after);
            self.printer.line(format_args!(
                "  right: all {} that were committed by then, and none of the {after} placed after it",
                count("order", restored.rows)
            ));
        } else {
            self.printer
                .line(format_args!("  WRONG: the clients were told of {} committed by then", count("order", found.confirmed)));
        }
    }
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Failed, "demo.interrupted", "interrupted")
}

async fn pause(time: Duration) -> Result<()> {
    tokio::time::sleep(time).await;
    Ok(())
}

fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

fn count(what: &str, number: u64) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
