//! `pgvault doctor`: does the store keep what a vault relies on, and does retention do what it is for?

use std::collections::BTreeMap;

use pgvault_core::Result;
use pgvault_core::config::Job;
use pgvault_core::env::Env;
use pgvault_core::inspect::doctor::examine_store;
use pgvault_core::retention::lint::{Remark, lint};
use pgvault_core::store::probe::Outcome;
use serde_json::json;

use crate::args::{Cli, DoctorArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &DoctorArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let report = examine_store(&context.store_of_vault().await?, &Env::default(), args.read_only).await?;
    printer.line(report.to_string().trim_end());
    let immutability = context.config.vault.store_settings(Job::Other)?.immutability;
    let mut retention = BTreeMap::new();
    for (name, cluster) in &context.config.cluster {
        let remarks = lint(&cluster.retention, immutability);
        for Remark { outcome, what, fix, .. } in &remarks {
            let outcome = if *outcome == Outcome::Failed { "FAILED " } else { "warning" };
            printer.line(format_args!("{outcome} retention of {name}: {what}; {fix}"));
        }
        let _ = retention.insert(name, remarks);
    }
    let is_ok = report.is_ok() && !retention.values().flatten().any(|remark| remark.outcome == Outcome::Failed);
    let result = if is_ok { "passed" } else { "failed" };
    printer.summary(&json!({ "result": result, "store": report.location, "checks": report.checks, "retention": retention }));
    Ok(if is_ok { Status::Done } else { Status::VerificationFailed })
}
