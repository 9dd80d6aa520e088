//! `pgvault doctor`: does the store keep what a vault relies on, does retention do what it is for, and are Odoo's documents where they are
//! captured?

use std::collections::BTreeMap;

use pgvault_core::Result;
use pgvault_core::config::{ClusterConfig, Job};
use pgvault_core::env::Env;
use pgvault_core::inspect::doctor::examine_store;
use pgvault_core::inspect::source::{DatabaseReport, examine_odoo, unasked};
use pgvault_core::retention::lint::{Remark, lint};
use pgvault_core::store::probe::Outcome;
use serde_json::json;

use crate::args::{Cli, ClusterArgs, DoctorArgs};
use crate::context::{Context, system_id_of};
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
    let odoo = odoo(&context, printer).await;
    let is_ok = report.is_ok()
        && odoo.values().flatten().all(DatabaseReport::is_ok)
        && !retention.values().flatten().any(|remark| remark.outcome == Outcome::Failed);
    let result = if is_ok { "passed" } else { "failed" };
    printer.summary(
        &json!({ "result": result, "store": report.location, "checks": report.checks, "retention": retention, "odoo": odoo }),
    );
    Ok(if is_ok { Status::Done } else { Status::VerificationFailed })
}

/// What the clusters' databases of Odoo say, where any are configured. Neither a server that is away nor a vault without its key
/// keeps anybody from looking at the store.
async fn odoo(context: &Context, printer: &Printer) -> BTreeMap<String, Vec<DatabaseReport>> {
    let mut all = BTreeMap::new();
    for (name, config) in &context.config.cluster {
        if !config.odoo.is_configured() && config.odoo.databases.is_empty() {
            continue;
        }
        let reports = match Box::pin(examine(context, name, config)).await {
            Ok(reports) => reports,
            Err(error) => vec![unasked(&error)],
        };
        for report in &reports {
            let of = if report.database.is_empty() { name.clone() } else { format!("{name}, `{}`", report.database) };
            printer.line(format_args!("Odoo of {of}"));
            for check in &report.checks {
                printer.line(check);
            }
        }
        let _ = all.insert(name.clone(), reports);
    }
    all
}

async fn examine(context: &Context, name: &str, config: &ClusterConfig) -> Result<Vec<DatabaseReport>> {
    let args = ClusterArgs { cluster: Some(name.to_owned()), system_id: None };
    let (finder, connection) = super::filestore::finder(config)?;
    let cluster = context.open(&args, config.pgdata.as_deref().and_then(system_id_of)).await?;
    examine_odoo(&cluster, &finder, &connection, config.odoo.full_every).await
}
