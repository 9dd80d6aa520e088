//! `pgvault doctor`: does the store keep what a vault relies on?

use pgvault_core::Result;
use pgvault_core::env::Env;
use pgvault_core::inspect::doctor::{Outcome, examine_store};
use serde_json::json;

use crate::args::{Cli, DoctorArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &DoctorArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let checks = examine_store(&context.store()?, &Env::default(), args.read_only).await?;
    for check in &checks {
        let word = match check.outcome {
            Outcome::Passed => "ok",
            Outcome::Unknown => "unknown",
            Outcome::Warning => "warning",
            Outcome::Failed => "FAILED",
        };
        printer.line(format_args!("{word:8} {:14} {}", check.name, check.evidence));
        if let Some(advice) = &check.advice {
            printer.line(format_args!("{:24}-> {advice}", ""));
        }
    }
    let worst = checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Passed);
    printer.summary(&json!({ "result": worst, "checks": checks }));
    Ok(if worst == Outcome::Failed { Status::VerificationFailed } else { Status::Done })
}
