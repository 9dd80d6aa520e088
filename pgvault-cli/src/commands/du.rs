//! `pgvault du`: what takes how much space.

use std::collections::BTreeMap;

use pgvault_core::Result;
use pgvault_core::inspect::usage::{Age, measure, saved};
use serde_json::json;

use crate::args::{Cli, DuArgs, DuBy};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{Printer, bytes};

/// What is summed up under one line.
type Key = (Option<String>, Option<&'static str>, Option<Age>);

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &DuArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let vault = context.vault().await?;
    // With a cluster's key it is known what its backups share; without a cluster all are measured by their names.
    let only = match context.cluster(&args.cluster) {
        Ok((name, _)) if args.cluster.cluster.is_some() => Some(vault.find_cluster(name, args.cluster.system_id).await?),
        _ => None,
    };
    let now = vault.store().now();
    let by = |wanted| args.by.contains(&wanted);
    let rows = measure(&vault, only.as_ref(), now).await?;
    let mut sums: BTreeMap<Key, (u64, u64)> = BTreeMap::new();
    for row in &rows {
        let key = (
            by(DuBy::Cluster).then(|| row.cluster.clone().unwrap_or_else(|| "(vault)".into())),
            by(DuBy::Kind).then_some(row.kind),
            by(DuBy::Age).then_some(row.age),
        );
        let sum = sums.entry(key).or_default();
        sum.0 += row.objects;
        sum.1 = sum.1.saturating_add(row.bytes);
    }
    let mut shown = Vec::new();
    for ((cluster, kind, age), (objects, size)) in &sums {
        let place = [cluster.as_deref(), *kind, age.map(Age::name)].into_iter().flatten().collect::<Vec<_>>().join("  ");
        printer.line(format_args!("{place}  {objects} objects  {}", bytes(*size)));
        shown.push(json!({ "cluster": cluster, "kind": kind, "age": age, "objects": objects, "bytes": size }));
    }
    let total: (u64, u64) = sums.values().fold((0, 0), |sum, row| (sum.0 + row.0, sum.1.saturating_add(row.1)));
    printer.line(format_args!("in all {} objects, {}", total.0, bytes(total.1)));
    let saving = match context.open(&args.cluster, None).await {
        Ok(cluster) => Some(saved(&cluster).await?),
        Err(error) if error.is_transient() => return Err(error),
        // Sums need no key.
        Err(_) => None,
    };
    if let Some(saving) = &saving {
        printer.line(format_args!(
            "{} backups of {} take {}; compression and what they share save the rest",
            saving.backups,
            bytes(saving.source_bytes),
            bytes(saving.needed_bytes)
        ));
        printer.line(format_args!(
            "{} wait for `pgvault gc`, {} are there for {} holds alone",
            bytes(saving.unneeded_bytes),
            bytes(saving.held_bytes),
            saving.holds
        ));
        match saving.locked {
            Some(locked) => printer.line(format_args!("{locked} of the manifests are locked")),
            None => printer.line("the store has no locks"),
        }
    }
    printer.line("requests per day are a matter of metrics: see `pgvault wal stream --metrics-listen` and the store's own");
    printer.summary(&json!({
        "usage": shown,
        "objects": total.0,
        "bytes": total.1,
        "saved": saving,
        "requests_per_day": null,
    }));
    Ok(Status::Done)
}
