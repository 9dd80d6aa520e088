//! `pgvault check` and `pgvault scrub`

use pgvault_core::inspect::{self, CheckOptions, Report, Severity};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{CheckArgs, Cli, ScrubArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn check(cli: &Cli, printer: &Printer, args: &CheckArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let options = CheckOptions { sizes_only: args.sizes_only, progress: printer.progress() };
    let report = inspect::check(&cluster, &options).await?;
    drop(options);
    Ok(show(printer, &report))
}

pub(crate) async fn scrub(cli: &Cli, printer: &Printer, args: &ScrubArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let only = match &args.prefix {
        Some(text) => Some(ClusterName::parse(text).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "usage.prefix", format!("`{text}` is not a cluster's name in a vault (NAME-SYSTEMID)"))
        })?),
        None => None,
    };
    let vault = context.vault().await?;
    let progress = printer.progress();
    let report = inspect::scrub(&vault, only.as_ref(), &progress).await?;
    drop(progress);
    Ok(show(printer, &report))
}

fn show(printer: &Printer, report: &Report) -> Status {
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Error => "ERROR",
            Severity::Warning => "warning",
        };
        let hurts: Vec<String> = finding.hurts.iter().map(ToString::to_string).collect();
        let hurts = if hurts.is_empty() { String::new() } else { format!(" [hurts {}]", hurts.join(", ")) };
        printer.line(format_args!("{severity} {}: {}{hurts}", finding.object, finding.problem));
    }
    let failed = report.has_errors();
    printer.line(format_args!(
        "{}: {} objects, {} read",
        if failed { "FAILED" } else { "ok" },
        report.objects,
        output::bytes(report.bytes)
    ));
    printer.summary(&json!({
        "result": if failed { "failed" } else { "passed" },
        "objects": report.objects,
        "bytes": report.bytes,
        "findings": report.findings,
    }));
    if failed { Status::VerificationFailed } else { Status::Done }
}
