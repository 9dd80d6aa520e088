//! `pgvault status`: could this cluster be restored now, and to when?

use pgvault_core::Result;
use pgvault_core::filestore::pass::{self, Known, PassKind};
use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill::{self, Listed, Outcome, Receipt};
use serde_json::{Value, json};

use super::list::Contents;
use crate::args::{Cli, ReadArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

/// Drills that the trend of the RTO is shown of.
const TREND: usize = 12;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &ReadArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let contents = Contents::read(&cluster).await?;
    let now = cluster.env().now();
    let age = |t: jiff::Timestamp| now.duration_since(t).as_secs().max(0);
    let newest = contents.windows.iter().max_by_key(|w| (w.timeline, w.last));
    let last_backup = contents.backups.last();
    printer.line(format_args!("cluster {}", cluster.name()));
    let drills = drill::list(&cluster).await?;
    let passed: Vec<Listed> = drills.iter().filter(|drill| drill.outcome == Outcome::Passed).copied().collect();
    let trend = drill::read_all(&cluster, passed.get(passed.len().saturating_sub(TREND)..).unwrap_or_default()).await?;
    let proven = trend.last().map(|signed| &signed.receipt);
    match proven {
        Some(drill) => printer.line(format_args!(
            "last passed restore drill: {:.0}, {} s ago: backup {} to {}, open after {} ms",
            drill.finished_at,
            age(drill.finished_at),
            drill.backup_id.map(|id| id.to_string()).unwrap_or_default(),
            drill.reached.as_ref().map(|point| point.lsn.to_string()).unwrap_or_default(),
            drill.rto_ms
        )),
        None => printer.line("last passed restore drill: never; no backup here has been proven by a restore"),
    }
    let last = match drills.last().filter(|drill| drill.outcome != Outcome::Passed) {
        Some(drill) => drill::read_all(&cluster, std::slice::from_ref(drill)).await?.pop().map(|signed| signed.receipt),
        None => None,
    };
    if let Some(drill) = &last {
        let failed: Vec<&str> = drill.failures().map(|check| check.name.as_str()).collect();
        printer.warn(format_args!(
            "the last restore drill, {} of {:.0}, {}: {}",
            drill.id,
            drill.finished_at,
            drill.outcome,
            failed.join(", ")
        ));
    }
    match newest {
        Some(window) => printer.line(format_args!(
            "recoverable: any moment from {} to {} (timeline {}), the last {} s ago",
            window.first,
            window.last,
            window.timeline,
            age(window.last)
        )),
        None => printer.line("recoverable: nothing yet"),
    }
    match last_backup {
        Some(backup) => printer.line(format_args!(
            "last backup: {}, {} s ago, {} stored",
            backup.id,
            age(backup.finished_at),
            output::bytes(backup.stored_bytes)
        )),
        None => printer.line("last backup: none"),
    }
    let filestores = filestores(&cluster, printer, now).await?;
    for damaged in &contents.damaged {
        printer.warn(format_args!("{} cannot be restored: {}", damaged.id, damaged.error));
    }
    for gap in &contents.gaps {
        printer.line(format_args!("gap: {gap}"));
    }
    contents.tell_branches(printer);
    printer.summary(&json!({
        "cluster": cluster.name().name,
        "system_id": cluster.name().system_id,
        "last_passed_drill": proven.map(describe),
        "last_passed_drill_age_seconds": proven.map(|drill| age(drill.finished_at)),
        "last_drill": last.as_ref().or(proven).map(describe),
        "rto_trend_ms": trend.iter().map(|signed| signed.receipt.rto_ms).collect::<Vec<_>>(),
        "window": contents.windows,
        "recoverable_to": newest.map(|w| w.last),
        "recoverable_age_seconds": newest.map(|w| age(w.last)),
        "last_backup_id": last_backup.map(|b| b.id),
        "last_backup_age_seconds": last_backup.map(|b| age(b.finished_at)),
        "backups": contents.backups.len(),
        "filestores": filestores,
        "gaps": contents.gaps,
        "branches": contents.branches,
        "damaged_backups": contents.damaged.iter().map(|d| d.id).collect::<Vec<_>>(),
    }));
    Ok(Status::Done)
}

/// Up to when the documents of each Odoo database are safe: behind that they would be lost with their disk.
async fn filestores(cluster: &Cluster, printer: &Printer, now: jiff::Timestamp) -> Result<Vec<Value>> {
    let mut described = Vec::new();
    for folder in pass::instances(cluster).await? {
        let Some(Known { pass, .. }) = pass::load(cluster, &folder).await? else { continue };
        if pass.kind == PassKind::Dropped {
            continue;
        }
        let mark = pass.watermark().map(|(_, mark)| mark);
        let age = mark.map(|mark| now.duration_since(mark.at).as_secs().max(0));
        match mark.zip(age) {
            Some((mark, age)) => {
                printer.line(format_args!("documents of {}: safe up to {:.0}, {age} s ago", pass.database.name, mark.at));
            }
            None => printer.warn(format_args!("documents of {}: not all of them are in the vault yet", pass.database.name)),
        }
        described.push(json!({
            "database": pass.database.name,
            "uuid": pass.database.uuid,
            "watermark_lsn": mark.map(|mark| mark.lsn),
            "watermark_at": mark.map(|mark| mark.at),
            "watermark_age_seconds": age,
            "counts": pass.counts,
        }));
    }
    Ok(described)
}

/// A drill, without its checks.
fn describe(drill: &Receipt) -> Value {
    json!({
        "drill_id": drill.id,
        "outcome": drill.outcome,
        "finished_at": drill.finished_at,
        "backup_id": drill.backup_id,
        "reached": drill.reached,
        "rto_ms": drill.rto_ms,
        "rto_target_ms": drill.rto_target_ms,
        "projection": drill.projection,
        "failed": drill.failures().map(|check| &check.name).collect::<Vec<_>>(),
        "promoted_to": drill.promoted_to,
    })
}
