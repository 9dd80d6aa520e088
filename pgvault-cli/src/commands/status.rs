//! `pgvault status`: could this cluster be restored now, and to when?

use pgvault_core::Result;
use serde_json::json;

use super::list::Contents;
use crate::args::{Cli, ReadArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &ReadArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let contents = Contents::read(&cluster).await?;
    let now = cluster.env().now();
    let age = |t: jiff::Timestamp| now.duration_since(t).as_secs().max(0);
    let newest = contents.windows.iter().max_by_key(|w| (w.timeline, w.last));
    let last_backup = contents.backups.last();
    printer.line(format_args!("cluster {}", cluster.name()));
    printer.line("last passed restore drill: never; no backup here has been proven by a restore");
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
        "last_passed_drill": null,
        "window": contents.windows,
        "recoverable_to": newest.map(|w| w.last),
        "recoverable_age_seconds": newest.map(|w| age(w.last)),
        "last_backup_id": last_backup.map(|b| b.id),
        "last_backup_age_seconds": last_backup.map(|b| age(b.finished_at)),
        "backups": contents.backups.len(),
        "gaps": contents.gaps,
        "branches": contents.branches,
        "damaged_backups": contents.damaged.iter().map(|d| d.id).collect::<Vec<_>>(),
    }));
    Ok(Status::Done)
}
