//! `pgvault list`: backups, the recoverable window, gaps.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pgvault_core::Result;
use pgvault_core::postgres::Lsn;
use pgvault_core::restore::branch::{Branch, beside};
use pgvault_core::restore::window::{Window, windows};
use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill;
use pgvault_core::vault::mark::{self, Mark};
use pgvault_core::vault::snapshot::{self, Damaged, Manifest};
use pgvault_core::wal::catalog::Catalog;
use pgvault_core::wal::fetch;
use pgvault_core::wal::gap::{self, TimedGap};
use serde_json::{Value, json};
use ulid::Ulid;

use crate::args::{Cli, ReadArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

/// What the vault holds of a cluster.
pub(crate) struct Contents {
    pub(crate) backups: Vec<Manifest>,
    pub(crate) damaged: Vec<Damaged>,
    pub(crate) windows: Vec<Window>,
    pub(crate) gaps: Vec<TimedGap>,
    /// Timelines that have something the newest one does not.
    pub(crate) branches: Vec<Branch>,
    /// Backups that a restore drill has proven, and when the last did.
    pub(crate) verified: BTreeMap<Ulid, Timestamp>,
}

impl Contents {
    pub(crate) async fn read(cluster: &Cluster) -> Result<Self> {
        let listing = snapshot::list(cluster).await?;
        let damaged = listing.damaged;
        let backups: Vec<Manifest> = listing.snapshots.into_iter().map(|s| s.manifest).collect();
        let size = match backups.first() {
            Some(backup) => Some(backup.wal_segment_size),
            None => fetch::segment_size(cluster).await?,
        };
        let verified = drill::verified(cluster).await?;
        let Some(size) = size else {
            return Ok(Self { backups, damaged, windows: Vec::new(), gaps: Vec::new(), branches: Vec::new(), verified });
        };
        let catalog = Catalog::load(cluster, size, Lsn::INVALID).await?;
        let windows = windows(cluster, &catalog, &backups).await?;
        let mut branches = Vec::new();
        if let Some(Ok(history)) = catalog.newest_timeline().map(|timeline| catalog.history(timeline)) {
            branches = beside(cluster, &catalog, &history, backups.iter()).await?;
        }
        let gaps = gap::all(cluster, &catalog).await?;
        Ok(Self { backups, damaged, windows, gaps, branches, verified })
    }

    /// True when a window has the mark: WAL leads to it from a backup.
    fn reaches(&self, mark: &Mark) -> bool {
        // The mark's record ends where it says, and so may a backup or the WAL that is there.
        let has = |window: &Window| window.timeline == mark.timeline && window.first_lsn < mark.lsn && mark.lsn <= window.last_lsn;
        self.windows.iter().any(has)
    }

    /// Says what the newest timeline leaves out.
    pub(crate) fn tell_branches(&self, printer: &Printer) {
        for branch in &self.branches {
            if branch.both_lived() {
                printer.warn(format_args!(
                    "two branches of this cluster lived on beside each other: {branch}; restores to a time after that need `--timeline`"
                ));
            } else {
                printer.line(format_args!("{branch}, was left; `restore --timeline {}` follows it", branch.timeline));
            }
        }
    }
}

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &ReadArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let contents = Contents::read(&cluster).await?;
    if contents.backups.is_empty() {
        printer.line("no backups");
    }
    for backup in &contents.backups {
        let verified = match contents.verified.get(&backup.id) {
            Some(at) => format!("verified {at:.0}"),
            None => "not verified".into(),
        };
        printer.line(format_args!(
            "{}  {:.0}  {}  {} -> {} stored  restores at {:.2}  timeline {}  {verified}{}",
            backup.id,
            backup.finished_at,
            kind(backup),
            output::bytes(backup.source_bytes),
            output::bytes(backup.stored_bytes),
            backup.restore_amplification,
            backup.timeline,
            if backup.bad_pages.is_empty() { String::new() } else { format!("  {} damaged pages", backup.bad_pages.len()) }
        ));
    }
    for damaged in &contents.damaged {
        printer.warn(format_args!("{} cannot be restored: {}", damaged.id, damaged.error));
    }
    for window in &contents.windows {
        printer.line(format_args!(
            "timeline {}: any moment from {} to {} ({} to {})",
            window.timeline, window.first, window.last, window.first_lsn, window.last_lsn
        ));
    }
    for gap in &contents.gaps {
        printer.line(gap);
    }
    contents.tell_branches(printer);
    let marks = mark::list(&cluster).await?;
    for mark in &marks.marks {
        let state = match (contents.reaches(mark), super::mark::target(&marks, mark)) {
            (false, _) => "  cannot be restored",
            (true, None) => "  its name was used again later",
            (true, Some(_)) => "",
        };
        let labels = super::mark::labels(&mark.labels);
        printer
            .line(format_args!("mark `{}`  {:.0}  {}  timeline {}{labels}{state}", mark.name, mark.time, mark.lsn, mark.timeline));
    }
    for (name, error) in &marks.damaged {
        printer.warn(format_args!("{name} is no mark that can be read: {error}"));
    }
    let described: Vec<Value> = marks
        .marks
        .iter()
        .map(|mark| describe_mark(mark, contents.reaches(mark), super::mark::target(&marks, mark).as_deref()))
        .collect();
    printer.summary(&json!({
        "cluster": cluster.name().name,
        "system_id": cluster.name().system_id,
        "backups": contents.backups.iter().map(|backup| describe(backup, contents.verified.get(&backup.id))).collect::<Vec<_>>(),
        "window": contents.windows,
        "gaps": contents.gaps,
        "branches": contents.branches,
        "marks": described,
        "damaged": contents.damaged.iter().map(|d| json!({ "backup_id": d.id, "problem": d.error.to_string() })).collect::<Vec<_>>(),
    }));
    Ok(if contents.damaged.is_empty() && marks.damaged.is_empty() { Status::Done } else { Status::VerificationFailed })
}

fn describe_mark(mark: &Mark, restorable: bool, target: Option<&str>) -> Value {
    let mut value = super::mark::describe(mark);
    if let Value::Object(fields) = &mut value {
        let _ = fields.insert("restorable".into(), restorable.into());
        let _ = fields.insert("target".into(), json!(target));
    }
    value
}

fn kind(backup: &Manifest) -> &'static str {
    match backup.kind {
        snapshot::BackupKind::Full => "full",
        snapshot::BackupKind::Incremental => "incremental",
    }
}

/// A backup as JSON, without the long texts that only a restore needs.
fn describe(backup: &Manifest, verified: Option<&Timestamp>) -> Value {
    let mut value = serde_json::to_value(backup).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        let id = fields.remove("id").unwrap_or_default();
        let _ = fields.insert("backup_id".into(), id);
        let _ = fields.remove("backup_label");
        let _ = fields.insert("verified".into(), Value::Bool(verified.is_some()));
        let _ = fields.insert("verified_at".into(), json!(verified));
    }
    value
}
