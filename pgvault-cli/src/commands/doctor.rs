//! `pgvault doctor`: does the store keep what a vault relies on?

use pgvault_core::Result;
use pgvault_core::env::Env;
use pgvault_core::inspect::doctor::examine_store;
use serde_json::json;

use crate::args::{Cli, DoctorArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &DoctorArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let report = examine_store(&context.store_of_vault().await?, &Env::default(), args.read_only).await?;
    printer.line(report.to_string().trim_end());
    let result = if report.is_ok() { "passed" } else { "failed" };
    printer.summary(&json!({ "result": result, "store": report.location, "checks": report.checks }));
    Ok(if report.is_ok() { Status::Done } else { Status::VerificationFailed })
}
