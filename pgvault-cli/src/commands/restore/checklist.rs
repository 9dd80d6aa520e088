//! What belongs to a restored database and is no part of it: the artifacts of its moment, and how to get each.

use jiff::Timestamp;
use pgvault_core::restore::plan::Plan;
use pgvault_core::restore::target::Target;
use pgvault_core::vault::artifact;
use pgvault_core::vault::{Cluster, mark};
use pgvault_core::{Error, Result};
use serde_json::{Value, json};

use crate::context::Place;
use crate::output::{Printer, shell_word};

/// Names the newest version of each artifact at the moment that was restored. `reached` is the time of the last transaction in
/// it, when somebody has looked. What cannot be found out spoils no restore: it is said.
pub(super) async fn tell(
    printer: &Printer,
    cluster: &Cluster,
    place: Place<'_>,
    plan: &Plan,
    reached: Option<Timestamp>,
) -> Vec<Value> {
    match artifacts(printer, cluster, place, plan, reached).await {
        Ok(artifacts) => artifacts,
        Err(error) => {
            printer.warn(format_args!("which artifacts belong to this moment is not known: {error}"));
            Vec::new()
        }
    }
}

async fn artifacts(
    printer: &Printer,
    cluster: &Cluster,
    place: Place<'_>,
    plan: &Plan,
    reached: Option<Timestamp>,
) -> Result<Vec<Value>> {
    let known = artifact::list(cluster).await?;
    for (name, error) in &known.damaged {
        printer.warn(format_args!("{name} is an artifact that cannot be read: {error}"));
    }
    if known.versions.is_empty() {
        return Ok(Vec::new());
    }
    let moment = moment(cluster, plan, reached).await?;
    let newest = known.newest(moment);
    match moment {
        Some(moment) => printer.line(format_args!("configuration files as of {moment:.0}:")),
        None => printer.line("configuration files, the newest of each:"),
    }
    if newest.is_empty() {
        printer.line("  none was stored by then; `pgvault artifact list` shows later ones");
    }
    let from = place.map_or_else(String::new, |copy| format!(" --from {}", shell_word(copy)));
    let mut told = Vec::new();
    for version in newest {
        let own_name = version.name.rsplit('/').next().unwrap_or(&version.name);
        let out = shell_word(&format!("{own_name}.restored"));
        // By its version: another may be put before somebody reads this.
        let command = format!("pgvault artifact get --version {}{from} --out {out}", version.id);
        printer.line(format_args!("  {} of {:.0}: {command}", version.name, version.at));
        let mut value = crate::commands::artifact::describe(version);
        if let Value::Object(fields) = &mut value {
            let _ = fields.insert("command".into(), json!(command));
        }
        told.push(value);
    }
    Ok(told)
}

/// The time of what was restored, as far as it has one; the end of all WAL has none.
async fn moment(cluster: &Cluster, plan: &Plan, reached: Option<Timestamp>) -> Result<Option<Timestamp>, Error> {
    Ok(match &plan.target {
        Target::Time(time) => Some(*time),
        Target::Latest => None,
        Target::Immediate => Some(plan.snapshot.manifest.finished_at),
        // A database that was idle before has no later transaction.
        Target::Name(name) => mark::list(cluster).await?.newest(name).map(|mark| mark.time).or(reached),
        Target::Lsn(_) | Target::Xid(_) | Target::LastVerified => reached,
    })
}
