//! `pgvault wal check`

use pgvault_core::Result;
use pgvault_core::postgres::{Lsn, TimelineId};
use pgvault_core::vault::{Cluster, snapshot};
use pgvault_core::wal::verify::{VerifyOptions, WalReport, verify};
use serde_json::json;

use crate::args::{Cli, WalCheckArgs};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &WalCheckArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let from = match &args.from {
        Some(text) => Some(start(&cluster, text).await?),
        None => None,
    };
    let options = VerifyOptions { from, timeline: args.timeline.map(TimelineId), deep: args.deep, progress: printer.progress() };
    let report = verify(&cluster, &options).await?;
    drop(options);
    show(printer, &report);
    Ok(if report.is_clean() { Status::Done } else { Status::VerificationFailed })
}

/// A position, or where a backup begins.
async fn start(cluster: &Cluster, text: &str) -> Result<Lsn> {
    match text.parse() {
        Ok(lsn) => Ok(lsn),
        Err(_) => Ok(snapshot::open(cluster, parse_id(text)?, None).await?.manifest.start_lsn),
    }
}

fn show(printer: &Printer, report: &WalReport) {
    for timeline in &report.timelines {
        let times = match (timeline.first_time, timeline.last_time) {
            (Some(first), Some(last)) => format!(", transactions from {first} to {last}"),
            _ => String::new(),
        };
        printer.line(format_args!(
            "timeline {}: {} to {}, {} segments, {} records{times}",
            timeline.timeline, timeline.from, timeline.to, timeline.segments, timeline.records
        ));
    }
    for gap in &report.gaps {
        printer.line(format_args!("GAP {gap}"));
    }
    for damage in &report.damage {
        let at = damage.lsn.map_or(String::new(), |lsn| format!(" at {lsn}"));
        printer.line(format_args!("DAMAGE {}{at}: {}", damage.object, damage.what));
    }
    let read = output::bytes(report.bytes);
    if report.is_clean() {
        printer.line(format_args!("ok: no gap, no damage; {read} of WAL read"));
    } else {
        printer.line(format_args!(
            "FAILED: {} gaps, {} damaged places; {read} of WAL read",
            report.gaps.len(),
            report.damage.len()
        ));
    }
    let gaps: Vec<_> = report
        .gaps
        .iter()
        .map(|gap| {
            json!({
                "timeline": gap.timeline,
                "from_lsn": gap.from,
                "to_lsn": gap.to,
                "from_time": gap.from_time,
                "to_time": gap.to_time,
                "recorded_at": gap.recorded_at,
            })
        })
        .collect();
    printer.summary(&json!({
        "result": if report.is_clean() { "passed" } else { "failed" },
        "timelines": report.timelines,
        "gaps": gaps,
        "damage": report.damage,
        "bytes": report.bytes,
    }));
}
