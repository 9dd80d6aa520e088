//! `pgvault gc`: deletes what no backup refers to.

use pgvault_core::Result;
use pgvault_core::vault::gc::{GcOptions, collect};
use serde_json::{Value, json};

use super::expire::tell_left;
use crate::args::{Cli, GcArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{Printer, bytes};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &GcArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let report = collect(&cluster, &GcOptions { grace: args.grace, dry_run: args.dry_run }).await?;
    let (planned, swept) = if args.dry_run { ("would be planned", "would go") } else { ("were planned", "are gone") };
    printer.line(format_args!(
        "{} packs, {} backups; {} packs ({}) {planned}, {} ({}) wait, {} ({}) {swept}, and {} small objects",
        report.packs,
        report.snapshots,
        report.planned,
        bytes(report.planned_bytes),
        report.waiting,
        bytes(report.waiting_bytes),
        report.swept.deleted,
        bytes(report.swept.deleted_bytes),
        report.tidied.deleted
    ));
    report.postponed.iter().for_each(|why| printer.line(why));
    for tally in [&report.swept, &report.tidied] {
        tell_left(printer, tally);
    }
    let mut summary = json!(report);
    if let Value::Object(fields) = &mut summary {
        let _ = fields.insert("dry_run".into(), args.dry_run.into());
    }
    printer.summary(&summary);
    Ok(if report.is_incomplete() { Status::Incomplete } else { Status::Done })
}
