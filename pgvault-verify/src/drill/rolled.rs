//! Rolling forward: the copy of a drill becomes a base backup of the point that it reached.
//!
//! Production is not asked for anything. The copy still is in recovery, on the original's timeline and with its system identifier, so
//! that the original's later WAL goes on applying to what is captured: it is what a backup of a standby is. The capture is committed
//! when the drill has passed, so that the new backup is proven from the start.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use pgvault_core::Result;
use pgvault_core::backup::{BackupOptions, CensusOptions, Prepared, prepare};
use pgvault_core::restore::plan::Plan;
use pgvault_core::vault::drill::Verdict;
use serde_json::json;

use super::{Over, Run, is_verdict};
use crate::checks::Found;
use crate::runner::{Running, Site};

/// Times of commits are not in the order of their records. What ended up to so much later counts to the point as well.
const SKEW: SignedDuration = SignedDuration::from_secs(1);

impl Run<'_> {
    /// Stores the copy as a base backup, up to its commit.
    pub(super) async fn capture(&mut self, plan: &Plan, running: &dyn Running, site: &Site) -> Result<Result<Prepared, Over>> {
        let began = Instant::now();
        self.options.progress.phase("capture", None);
        let manifest = &plan.snapshot.manifest;
        let reached = self.receipt.reached.as_ref().and_then(|point| point.time);
        let last = reached.map_or(manifest.finished_at, |time| time.max(manifest.finished_at));
        let options = BackupOptions {
            connection: running.connection(),
            pgdata: Some(site.pgdata.clone()),
            level: self.options.level,
            workers: self.options.workers,
            labels: BTreeMap::from([("pgvault.drill".to_owned(), self.receipt.id.to_string())]),
            // A page that is bad here was bad in the backup, or came from the drill: neither is worth keeping.
            strict: true,
            spread_checkpoint: false,
            // The vault has it all: it came from there.
            archive_patience: Some(Duration::ZERO),
            as_of: Some(last.checked_add(SKEW).unwrap_or(last).min(self.cluster.env().now())),
            full: false,
            census: Some(CensusOptions::default()),
            progress: self.options.progress.clone(),
        };
        match prepare(self.cluster, &options).await {
            Ok(prepared) => {
                let made = prepared.manifest();
                let message =
                    format!("captured {} as it is at {}, to be committed when the drill has passed", made.id, made.stop_lsn);
                let evidence = json!({ "backup": made.id, "start_lsn": made.start_lsn, "stop_lsn": made.stop_lsn, "as_of": made.finished_at, "stored_bytes": made.stored_bytes });
                self.add("capture", began.elapsed(), Found::passed(message, evidence));
                Ok(Ok(prepared))
            }
            Err(error) if is_verdict(&error) => Ok(self.fail("capture", began, error.to_string(), json!({ "code": error.code() }))),
            Err(error) => Err(error.context("make a base backup of the copy")),
        }
    }

    /// Commits the capture if everything has passed so far.
    pub(super) async fn commit(&mut self, prepared: Prepared) -> Result<()> {
        let began = Instant::now();
        let id = prepared.manifest().id;
        let failed = self.receipt.checks.iter().any(|check| check.verdict == Verdict::Failed);
        if failed || self.incomplete {
            let message = "not committed: only what has passed every check becomes a backup".to_owned();
            self.add("roll-forward", began.elapsed(), Found::skipped(message));
            return Ok(());
        }
        let manifest = prepared.commit().await?;
        self.receipt.promoted_to = Some(id);
        let message = format!(
            "backup {id} starts {} MiB of WAL later than {}",
            manifest.start_lsn.0.saturating_sub(self.start_of_base) >> 20,
            self.receipt.backup_id.map(|id| id.to_string()).unwrap_or_default()
        );
        self.add("roll-forward", began.elapsed(), Found::passed(message, json!({ "backup": id })));
        Ok(())
    }
}
