//! `pgvault expire`: deletes what the retention policy does not keep.

use pgvault_core::Result;
use pgvault_core::retention::expire::reasons;
use pgvault_core::retention::{ExpireOptions, Policy, expire};
use pgvault_core::vault::drill;
use pgvault_core::vault::prune::Tally;
use serde_json::json;

use crate::args::{Cli, ExpireArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{Printer, bytes};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &ExpireArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let policy = Policy::of(&config.retention)?;
    let cluster = context.open(&args.cluster, None).await?;
    let verified = drill::verified(&cluster).await?.into_keys().collect();
    let options = ExpireOptions { policy, dry_run: args.dry_run, verified };
    let report = expire(&cluster, &options, |object| {
        if args.dry_run {
            printer.line(format_args!("delete   {}: nothing that is kept needs it", object.name));
        }
    })
    .await?;
    for verdict in &report.backups {
        let backup = &verdict.backup;
        if !verdict.kept.is_empty() {
            printer.line(format_args!("keep     {}  {:.0}: {}", backup.id, backup.stored_at, reasons(&verdict.kept)));
        } else if report.expired.contains(&backup.id) {
            let done = if args.dry_run { "expire " } else { "expired" };
            printer.line(format_args!("{done}  {}  {:.0}: no rule keeps it", backup.id, backup.stored_at));
        }
    }
    report.damaged.iter().for_each(|damaged| printer.warn(damaged));
    report.notes.iter().for_each(|note| printer.warn(note));
    for tally in [&report.manifests, &report.wal] {
        tell_left(printer, tally);
    }
    let done = if args.dry_run { "would go" } else { "are gone" };
    printer.line(format_args!(
        "{} backups and {} WAL objects ({}) {done}; `pgvault gc` frees the space of the backups",
        report.expired.len(),
        report.wal.deleted,
        bytes(report.wal.deleted_bytes)
    ));
    printer.summary(&json!({
        "dry_run": args.dry_run,
        "now": report.now,
        "window_begin": report.window_begin,
        "backups": report.backups,
        "expired": report.expired,
        "damaged": report.damaged,
        "manifests": report.manifests,
        "wal": report.wal,
        "notes": report.notes,
    }));
    Ok(if report.is_incomplete() { Status::Incomplete } else { Status::Done })
}

/// Says what was not deleted.
pub(super) fn tell_left(printer: &Printer, tally: &Tally) {
    for left in &tally.left {
        printer.line(format_args!("left     {}: {}", left.name, left.why));
    }
    let more = (tally.locked + tally.failed).saturating_sub(tally.left.len() as u64);
    if more > 0 {
        printer.line(format_args!("left     {more} more"));
    }
}
