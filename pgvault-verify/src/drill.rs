//! Restore drills: a backup is proven by being used.
//!
//! ```text
//! plan -> folder -> files -> server in a runner -> replay -> paused at the target
//!                              [a new base backup of it]  -> promoted -> checks -> stopped -> pages -> removed -> receipt
//! ```
//!
//! A drill takes the way that a disaster would take, on a copy that is cut off from the world (see [`runner`](crate::runner)), and
//! writes down what it saw in a receipt that is signed and kept in the vault. It fails for everything that would have gone wrong in
//! earnest; what keeps it from being held at all (no disk, no programs, a store that does not answer) is an error, and no receipt.
//!
//! Order matters. Recovery pauses at its target, so that the point it reached can be looked at, and a new base backup be taken while
//! the copy is still in recovery and on the original's timeline. Only then it is promoted: checks install extensions, and applications
//! write. Page checksums come last, when the server has stopped and every file is whole.

mod facts;
mod folder;
mod options;
mod promise;
mod rolled;
mod room;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgvault_core::postgres::Connection;
use pgvault_core::restore::plan::{Plan, PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::vault::drill::{self as receipts, Check, Outcome, Phase, Receipt, SignedReceipt, Verdict};
use pgvault_core::vault::{Cluster, audit};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

pub use options::{DrillOptions, Wish};

pub use crate::checks::{Assertion, Question};

use crate::checks::{self, Found, Recovered, Restored};
use crate::owner::{Owner, own};
use crate::recovery;
use crate::recovery::feed::Feed;
use crate::runner::{Needs, Runner, Running, Site, why};
use crate::task::blocking;
use folder::Folder;
use room::Room;

/// How long the copy may take to promote, and to stop.
const PATIENCE: Duration = Duration::from_secs(600);

/// A drill that was held.
#[derive(Debug)]
pub struct Held {
    /// What it has found.
    pub signed: SignedReceipt,
    /// Whether the vault has its receipt: credentials may lack the right to create it.
    pub recorded: Result<()>,
}

/// Holds a drill and records it.
///
/// # Errors
/// When it could not be held: the store fails, a program is missing, there is no room. What is wrong with the backup is no error: the
/// receipt says so.
pub async fn drill(cluster: &Cluster, runner: &mut dyn Runner, options: &DrillOptions) -> Result<Held> {
    let mut run = Run::new(cluster, options)?;
    let swept = blocking({
        let base = options.base.clone();
        move || folder::sweep(&base)
    })
    .await?;
    if !swept.is_empty() {
        let names: Vec<String> = swept.iter().map(|path| path.display().to_string()).collect();
        run.note("leftovers", Found::warned(format!("removed what {} killed drills had left", names.len()), json!(names)));
    }
    if let Some(plan) = run.plan().await? {
        run.hold(plan, runner).await?;
    }
    run.receipt.runner = runner.describe();
    run.finish().await
}

/// A drill that is being held.
struct Run<'a> {
    cluster: &'a Cluster,
    options: &'a DrillOptions,
    receipt: Receipt,
    /// Something that makes a pass a proof was not done.
    incomplete: bool,
    /// Where recovery from the backup begins, in bytes.
    start_of_base: u64,
}

/// Why a drill ended before its end. The check that failed has been noted.
struct Over;

impl<'a> Run<'a> {
    fn new(cluster: &'a Cluster, options: &'a DrillOptions) -> Result<Self> {
        let now = cluster.env().now();
        let opened = Phase { name: "open".into(), duration_ms: millis(options.began.elapsed()) };
        let receipt = Receipt {
            id: cluster.env().new_id()?,
            cluster: cluster.name().name.clone(),
            system_id: cluster.name().system_id,
            outcome: Outcome::Failed,
            left_out: Vec::new(),
            runner: String::new(),
            by: audit::who(),
            started_at: now,
            finished_at: now,
            backup_id: None,
            backup_finished_at: None,
            target: options.wish.to_string(),
            reached: None,
            seed: options.seed,
            phases: vec![opened],
            rto_ms: 0,
            rto_target_ms: options.rto.map(millis),
            restored_bytes: 0,
            replayed_bytes: 0,
            projection: None,
            checks: Vec::new(),
            facts: Vec::new(),
            promoted_to: None,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        Ok(Self { cluster, options, receipt, incomplete: false, start_of_base: 0 })
    }

    /// Notes a finding that took no time of its own.
    fn note(&mut self, name: &str, found: Found) {
        self.add(name, Duration::ZERO, found);
    }

    fn add(&mut self, name: &str, took: Duration, found: Found) {
        let Found { verdict, message, evidence, is_essential } = found;
        if verdict == Verdict::Failed {
            tracing::warn!(check = name, "failed: {message}");
        } else {
            tracing::info!(check = name, ?verdict, "{message}");
        }
        if verdict == Verdict::Skipped && is_essential {
            self.incomplete = true;
            self.receipt.left_out.push(format!("{name}: {message}"));
        }
        self.receipt.checks.push(Check { name: name.into(), verdict, message, duration_ms: millis(took), evidence });
    }

    fn phase(&mut self, name: &str, began: Instant) {
        self.receipt.phases.push(Phase { name: name.into(), duration_ms: millis(began.elapsed()) });
    }

    /// Notes that something of the backup is wrong, and ends the drill.
    fn fail<T>(&mut self, name: &str, began: Instant, message: String, evidence: Value) -> Result<T, Over> {
        self.add(name, began.elapsed(), Found::failed(message, evidence));
        Err(Over)
    }

    /// Chooses the backup; nothing when that failed, which is noted.
    async fn plan(&mut self) -> Result<Option<Plan>> {
        let began = Instant::now();
        let target = match &self.options.wish {
            Wish::Target(target) => target.clone(),
            Wish::Random => match options::random_target(self.cluster, self.options.seed).await? {
                Some(target) => target,
                None => Target::Latest,
            },
        };
        self.receipt.target = target.to_string();
        let choice = PlanOptions { backup: self.options.backup, timeline: self.options.timeline };
        let planned = plan(self.cluster, &target, choice).await;
        self.phase("plan", began);
        let mut plan = match planned {
            Ok(plan) => plan,
            Err(error) if is_verdict(&error) => {
                let _ = self.fail::<()>("plan", began, error.to_string(), json!({ "code": error.code() }));
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // At the end of WAL a server would open by itself; paused there it can be looked at first.
        plan.pin();
        let manifest = &plan.snapshot.manifest;
        self.start_of_base = manifest.start_lsn.0;
        self.receipt.backup_id = Some(manifest.id);
        self.receipt.backup_finished_at = Some(manifest.finished_at);
        let found = self.no_history_was_lost(&target, &plan).await?;
        let lost = found.verdict == Verdict::Failed;
        let evidence = json!({ "backup": manifest.id, "timeline": plan.timeline, "wal_end": plan.wal_end, "stop": plan.stop, "reasons": plan.reasons });
        let message = format!(
            "backup {} of {:.0}, then WAL from {} to {} along timeline {}",
            manifest.id, manifest.finished_at, manifest.start_lsn, plan.wal_end, plan.timeline
        );
        self.add("plan", began.elapsed(), Found::passed(message, evidence));
        self.note("history", found);
        Ok((!lost).then_some(plan))
    }

    /// WAL that an earlier drill replayed and that is not there any more was lost, though no gap shows.
    async fn no_history_was_lost(&self, target: &Target, plan: &Plan) -> Result<Found> {
        let Some(before) = receipts::last_passed(self.cluster).await?.map(|signed| signed.receipt) else {
            return Ok(Found::passed("no earlier drill to compare with", Value::Null));
        };
        let Some(point) = before.reached.filter(|point| point.timeline == plan.timeline && *target == Target::Latest) else {
            return Ok(Found::passed(
                "the last drill that passed was about another part of history",
                json!({ "drill": before.id }),
            ));
        };
        let evidence = json!({ "drill": before.id, "proven": point, "wal_end": plan.wal_end });
        Ok(if plan.wal_end < point.lsn {
            Found::failed(
                format!(
                    "drill {} of {:.0} has replayed WAL up to {}, but now the vault ends at {}: WAL at its end was lost",
                    before.id, before.finished_at, point.lsn, plan.wal_end
                ),
                evidence,
            )
        } else {
            Found::passed(format!("WAL reaches at least as far as in drill {} of {:.0}", before.id, before.finished_at), evidence)
        })
    }

    /// Restores, starts, checks, and removes the copy, whatever happened.
    async fn hold(&mut self, plan: Plan, runner: &mut dyn Runner) -> Result<()> {
        let manifest = &plan.snapshot.manifest;
        runner.prepare(&Needs { major: manifest.major, shared_buffers: self.options.shared_buffers() }).await?;
        let room = self.room(manifest.source_bytes)?;
        let folder = Folder::create(&self.options.base, self.receipt.id)?;
        if let Room::Sample(bytes) = room {
            let sampled = self.sample(&plan, &folder, bytes).await;
            let (began, path) = (Instant::now(), folder.path().to_path_buf());
            blocking(move || folder.remove()).await?;
            self.add("removal", began.elapsed(), Found::passed("what was restored is gone", json!({ "folder": path })));
            return sampled;
        }
        let mut running = None;
        let held = self.on_copy(&plan, runner, &folder, &mut running).await;
        // Whatever it was, nothing is left of the copy.
        let began = Instant::now();
        if let Some(mut running) = running {
            running.remove().await?;
        }
        let path = folder.path().to_path_buf();
        blocking(move || folder.remove()).await?;
        tracing::info!(folder = %path.display(), "the copy was removed");
        let held = held?;
        self.add("removal", began.elapsed(), Found::passed("the copy and its server are gone", json!({ "folder": path })));
        // Whether it came to its end or not, what was found has been noted.
        drop(held);
        Ok(())
    }

    async fn on_copy(
        &mut self,
        plan: &Plan,
        runner: &dyn Runner,
        folder: &Folder,
        slot: &mut Option<Box<dyn Running>>,
    ) -> Result<Result<(), Over>> {
        if let Err(over) = self.restore(plan, folder, runner.owner()).await? {
            return Ok(Err(over));
        }
        let manifest = &plan.snapshot.manifest;
        let feed = Feed::start(self.cluster, folder.path().join("wal"), manifest.wal_segment_size, plan.wal_end, runner.owner())?;
        let site = Site {
            folder: folder.path().to_path_buf(),
            pgdata: folder.pgdata(),
            tablespaces: manifest.tablespaces.iter().map(|space| folder.tablespace(space.oid)).collect(),
            name: self.receipt.id.to_string(),
            user: self.options.user.clone(),
        };
        let mut settings = vec![("restore_command".to_owned(), feed.command())];
        settings.extend(self.options.settings.iter().cloned());
        *slot = Some(runner.start(&site, &settings).await?);
        let Some(running) = slot.as_deref_mut() else { return Ok(Ok(())) };
        let mut sql = match self.recover(plan, running, &feed).await {
            Ok(sql) => sql,
            Err(over) => return Ok(Err(over)),
        };
        let capturing = Instant::now();
        let mut prepared = None;
        if self.options.promote_to_backup {
            // Before the copy leaves recovery and the original's timeline; committed when everything has passed.
            prepared = match self.capture(plan, running, &site).await? {
                Ok(prepared) => Some(prepared),
                Err(over) => return Ok(Err(over)),
            };
        }
        let captured = capturing.elapsed();
        let reached = self.receipt.reached.as_ref().map(|point| point.lsn).unwrap_or_default();
        let recovered = Recovered::new(self.cluster, &plan.snapshot, plan.timeline, reached);
        if let Err(over) = self.promote(&mut sql, running).await {
            return Ok(Err(over));
        }
        sql.close().await;
        self.receipt.rto_ms = millis(self.options.began.elapsed().saturating_sub(captured));
        self.project(plan);
        self.check(recovered, running, &site).await;
        if let Some(prepared) = prepared {
            self.commit(prepared).await?;
        }
        Ok(Ok(()))
    }

    /// Writes the files of the backup.
    async fn restore(&mut self, plan: &Plan, folder: &Folder, owner: Owner) -> Result<Result<(), Over>> {
        let began = Instant::now();
        let manifest = &plan.snapshot.manifest;
        let options = self.restore_options(plan, folder);
        let restored = match restore(self.cluster, plan, &options).await {
            Ok(restored) => restored,
            Err(error) if is_verdict(&error) => {
                self.phase("fetch", began);
                return Ok(self.fail("restore", began, error.to_string(), json!({ "code": error.code() })));
            }
            Err(error) => return Err(error),
        };
        let (data, spaces) = (folder.pgdata(), folder.path().join("ts"));
        blocking(move || {
            own(&data, owner)?;
            if spaces.exists() { own(&spaces, owner) } else { Ok(()) }
        })
        .await?;
        self.phase("fetch", began);
        self.receipt.restored_bytes = restored.bytes_written;
        let evidence = json!({ "files": manifest.files, "bytes": restored.bytes_written, "warnings": restored.warnings });
        let message = format!("{} files, {} MiB, every frame authentic", manifest.files, restored.bytes_written >> 20);
        self.add("restore", began.elapsed(), Found::passed(message, evidence));
        let began = Instant::now();
        let found = checks::base_files(&plan.snapshot, &folder.pgdata()).await?;
        self.add("base-files", began.elapsed(), found);
        Ok(Ok(()))
    }

    fn restore_options(&self, plan: &Plan, folder: &Folder) -> RestoreOptions {
        let spaces = &plan.snapshot.manifest.tablespaces;
        let mapping: BTreeMap<String, PathBuf> =
            spaces.iter().map(|space| (space.location.clone(), folder.tablespace(space.oid))).collect();
        RestoreOptions {
            pgdata: folder.pgdata(),
            delta: false,
            tablespace_mapping: mapping,
            // The server is given another on its command line, and has no use for this one.
            restore_command: RestoreCommand { program: "false".into(), global_arguments: Vec::new(), arguments: Vec::new() },
            action: TargetAction::Pause,
            archive_off: true,
            workers: self.options.workers,
            progress: self.options.progress.clone(),
        }
    }

    /// Waits for the copy to reach its target and notes how far it came.
    async fn recover(&mut self, plan: &Plan, running: &mut dyn Running, feed: &Feed) -> Result<Connection, Over> {
        let began = Instant::now();
        self.options.progress.phase("replay", None);
        let recovered = recovery::recover(running, plan, feed, self.options.timeout).await;
        let recovered = match recovered {
            Ok(recovered) => recovered,
            Err(failed) => {
                self.phase("replay", began);
                return self.fail("recovery", began, failed.message, failed.evidence);
            }
        };
        self.receipt.phases.push(Phase { name: "start".into(), duration_ms: millis(recovered.consistent_after) });
        let replay = began.elapsed().saturating_sub(recovered.consistent_after);
        self.receipt.phases.push(Phase { name: "replay".into(), duration_ms: millis(replay) });
        self.receipt.replayed_bytes = recovered.point.lsn.0.saturating_sub(plan.snapshot.manifest.start_lsn.0);
        self.receipt.reached = Some(recovered.point.clone());
        self.add("recovery", began.elapsed(), recovered.found);
        Ok(recovered.sql)
    }

    async fn promote(&mut self, sql: &mut Connection, running: &mut dyn Running) -> Result<(), Over> {
        let began = Instant::now();
        let promoted = sql.query_one(&format!("SELECT pg_promote(true, {})", PATIENCE.as_secs())).await;
        self.phase("promote", began);
        match promoted {
            Ok(row) if row.text(0).ok().flatten() == Some("t") => {
                self.add("promotion", began.elapsed(), Found::passed("the copy is open for writing", Value::Null));
                Ok(())
            }
            Ok(_) => self.fail("promotion", began, "the copy did not leave recovery in ten minutes".into(), Value::Null),
            Err(error) => {
                let why = why(running, &error).await;
                self.fail("promotion", began, why, Value::Null)
            }
        }
    }

    /// Runs the checks on the open copy, stops it, and checks its pages.
    async fn check(&mut self, recovered: Recovered<'_>, running: &mut dyn Running, site: &Site) {
        let began = Instant::now();
        self.options.progress.phase("checks", None);
        let snapshot = recovered.snapshot;
        let restored = Restored {
            connection: running.connection(),
            recovered,
            deep: self.options.deep,
            seed: self.options.seed,
            workers: self.options.workers,
            limit: self.options.timeout,
        };
        for (name, took, found) in checks::on_server(&restored, running, &self.options.assertions, &self.options.filestores).await {
            self.add(&name, took, found);
        }
        self.receipt.facts = facts::read(&restored).await;
        let stopping = Instant::now();
        if let Err(error) = running.stop(PATIENCE).await {
            let message = format!("the copy did not stop in an orderly way: {error}");
            let ended = running.ended().await.map(|ended| ended.how);
            self.add(
                "shutdown",
                stopping.elapsed(),
                Found::failed(message, json!({ "ended": ended, "log": running.log_tail().await })),
            );
        } else {
            let pages = Instant::now();
            let found = checks::page_checksums(snapshot, site).await;
            self.add("page-checksums", pages.elapsed(), found);
        }
        self.phase("checks", began);
    }

    /// Judges, compares with what was promised, signs and stores.
    async fn finish(mut self) -> Result<Held> {
        self.judge_time();
        let failed = self.receipt.failures().next().is_some();
        self.receipt.outcome = match (failed, self.incomplete) {
            (true, _) => Outcome::Failed,
            (false, true) => Outcome::Partial,
            (false, false) => Outcome::Passed,
        };
        self.receipt.finished_at = self.cluster.env().now();
        let signed = SignedReceipt::new(self.cluster, self.receipt)?;
        let recorded = receipts::record(self.cluster, &signed).await;
        Ok(Held { signed, recorded })
    }
}

/// True for what is the backup's fault, or that of whoever changed it; everything else keeps a drill from being held.
pub(crate) fn is_verdict(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutsideWindow | ErrorKind::Corrupt | ErrorKind::NotFound)
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
