//! What a drill has found, on the terminal and in files.

use std::path::Path;

use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill::{self, Outcome, Receipt, SignedReceipt, Verdict};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::report;
use serde_json::{Value, json};

use crate::args::{Cli, DrillReportArgs, ReceiptArgs, ReportArgs};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::{self, Printer};

/// Earlier drills that a report compares with.
const TREND: usize = 12;

/// Prints a drill and writes its reports.
pub(super) async fn tell(printer: &Printer, cluster: &Cluster, signed: &SignedReceipt, files: &ReportArgs) -> Result<()> {
    let receipt = &signed.receipt;
    for check in &receipt.checks {
        let verdict = match check.verdict {
            Verdict::Passed => "passed ",
            Verdict::Warned => "WARNED ",
            Verdict::Failed => "FAILED ",
            Verdict::Skipped => "skipped",
        };
        printer.line(format_args!("{verdict}  {:<18} {:>7} ms  {}", check.name, check.duration_ms, check.message));
    }
    for fact in &receipt.facts {
        printer.line(format_args!("         {:<18} {}: {}", fact.database, fact.label, fact.value));
    }
    let phases: Vec<String> = receipt.phases.iter().map(|phase| format!("{} {} ms", phase.name, phase.duration_ms)).collect();
    printer.line(format_args!("{}; {} restored", phases.join(", "), output::bytes(receipt.restored_bytes)));
    if let Some(backup) = receipt.promoted_to {
        printer.line(format_args!("the copy is backup {backup} now"));
    }
    for left_out in &receipt.left_out {
        printer.warn(format_args!("not a full proof, left out: {left_out}"));
    }
    printer.line(format_args!("drill {}: {} (seed {})", receipt.id, receipt.outcome.to_string().to_uppercase(), receipt.seed));
    write(cluster, signed, files).await?;
    printer.summary(&summary(signed));
    Ok(())
}

async fn write(cluster: &Cluster, signed: &SignedReceipt, files: &ReportArgs) -> Result<()> {
    let to = |path: &Path, text: String| std::fs::write(path, text).map_err(|e| Error::io("write", path, e));
    if let Some(path) = &files.json {
        let json = serde_json::to_string_pretty(signed).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
        to(path, json + "\n")?;
    }
    if let Some(path) = &files.junit {
        to(path, report::junit(&signed.receipt)?)?;
    }
    if let Some(path) = &files.html {
        to(path, report::html(signed, &before(cluster, &signed.receipt).await?))?;
    }
    Ok(())
}

/// The drills before this one, oldest first.
async fn before(cluster: &Cluster, receipt: &Receipt) -> Result<Vec<Receipt>> {
    let listed: Vec<_> = drill::list(cluster).await?.into_iter().filter(|drill| drill.id < receipt.id).collect();
    let newest = listed.get(listed.len().saturating_sub(TREND)..).unwrap_or_default();
    Ok(drill::read_all(cluster, newest).await?.into_iter().map(|signed| signed.receipt).collect())
}

/// The receipt as the last line of JSON output.
fn summary(signed: &SignedReceipt) -> Value {
    let mut value = serde_json::to_value(&signed.receipt).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        for (old, new) in [("id", "drill_id"), ("outcome", "result")] {
            if let Some(field) = fields.remove(old) {
                let _ = fields.insert(new.into(), field);
            }
        }
        let _ = fields.insert("signature".into(), json!(signed.signature));
        let _ = fields.insert("public_key".into(), json!(signed.public_key));
    }
    value
}

/// `pgvault verify report`
pub(super) async fn show(cli: &Cli, printer: &Printer, args: &DrillReportArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let wanted = args.drill.as_deref().map(parse_id).transpose()?;
    let found = drill::list(&cluster).await?.into_iter().rev().find(|drill| wanted.is_none_or(|id| id == drill.id));
    let Some(found) = found else {
        let why = wanted.map_or_else(|| "no drill was held yet".to_owned(), |id| format!("there is no drill {id}"));
        return Err(Error::new(ErrorKind::NotFound, "drill.unknown", why).with_hint("`pgvault verify` holds one"));
    };
    tell(printer, &cluster, &found.read(&cluster).await?, &args.reports).await?;
    Ok(Status::Done)
}

/// `pgvault verify receipt`
pub(super) fn verify(printer: &Printer, args: &ReceiptArgs) -> Result<Status> {
    let text = std::fs::read_to_string(&args.file).map_err(|e| Error::io("read", &args.file, e))?;
    let signed: SignedReceipt = serde_json::from_str(&text)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "drill.receipt", format!("{} is not a receipt: {e}", args.file.display())))?;
    signed.verify()?;
    if let Some(key) = args.public_key.as_ref().filter(|key| **key != signed.public_key) {
        let why = format!("the receipt {} was signed by {}, not by {key}", signed.receipt.id, signed.public_key);
        return Err(Error::new(ErrorKind::Corrupt, "drill.signature", why));
    }
    let receipt = &signed.receipt;
    let passed = if receipt.outcome == Outcome::Passed { "passed" } else { "did not pass" };
    printer.line(format_args!(
        "the signature holds: drill {} of {} {passed} at {:.0}; signed by {}",
        receipt.id, receipt.cluster, receipt.finished_at, signed.public_key
    ));
    if args.public_key.is_none() {
        printer.warn("anybody can sign with a key of their own: compare the key with one that you know (--public-key)");
    }
    printer.summary(&summary(&signed));
    Ok(Status::Done)
}
