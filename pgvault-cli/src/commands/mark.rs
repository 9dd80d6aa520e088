//! `pgvault mark`: a named restore point before a change, and what was installed then.

use std::collections::BTreeMap;

use pgvault_core::Result;
use pgvault_core::config::ClusterConfig;
use pgvault_core::filestore::find::Finder;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::restore::mark::set::{MarkOptions, set};
use pgvault_core::vault::mark::{self, Mark};
use serde_json::{Value, json};

use crate::args::{Cli, MarkArgs};
use crate::context::{Context, system_id_of};
use crate::exit::Status;
use crate::output::{Printer, shell_word};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &MarkArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let cluster = context.open(&args.cluster, config.pgdata.as_deref().and_then(system_id_of)).await?;
    let (odoo, connection) = server(config)?;
    let options = MarkOptions {
        connection,
        name: args.name.clone(),
        labels: args.labels.iter().cloned().collect(),
        again: args.again,
        switch: args.switch,
        odoo,
    };
    let set = Box::pin(set(&cluster, &options)).await?;
    let mark = &set.mark;
    for warning in &set.warnings {
        printer.warn(warning);
    }
    printer
        .line(format_args!("restore point `{}` is set at {} on timeline {}, {:.3}", mark.name, mark.lsn, mark.timeline, mark.time));
    for odoo in &mark.odoo {
        printer.line(format_args!("`{}` has {} modules installed", odoo.database, odoo.modules.len()));
    }
    let wait = std::time::Duration::try_from(args.wait).unwrap_or_default();
    let unsafe_because = set.until_safe(&cluster, wait).await.err();
    match &unsafe_because {
        None => {
            printer.line(format_args!("it can be restored: pgvault restore --to {}", shell_word(&format!("name:{}", mark.name))));
        }
        Some(error) => {
            let hint = error.hint().map_or_else(String::new, |hint| format!("; {hint}"));
            printer.warn(format_args!("`{}` cannot be restored yet: {error}{hint}", mark.name));
        }
    }
    printer.summary(&json!({
        "cluster": cluster.name().name,
        "mark": describe(mark),
        "safe": unsafe_because.is_none(),
        "unsafe_because": unsafe_because.as_ref().map(|error| json!({ "code": error.code(), "message": error.to_string(), "hint": error.hint() })),
        "warnings": set.warnings,
    }));
    Ok(if unsafe_because.is_none() { Status::Done } else { Status::Incomplete })
}

/// Where databases of Odoo are looked for, when any are configured, and how to reach the server.
fn server(config: &ClusterConfig) -> Result<(Option<Finder>, ConnInfo)> {
    let (finder, connection) = super::filestore::finder(config)?;
    let looks = config.odoo.is_configured() || !config.odoo.databases.is_empty();
    Ok((looks.then_some(finder), connection))
}

/// A mark as JSON.
pub(crate) fn describe(mark: &Mark) -> Value {
    let mut value = json!(mark);
    if let Value::Object(fields) = &mut value {
        let id = fields.remove("id").unwrap_or_default();
        let _ = fields.insert("mark_id".into(), id);
        // Always there, whether or not anything is in it.
        let _ = fields.entry("labels").or_insert_with(|| json!({}));
        let _ = fields.entry("odoo").or_insert_with(|| json!([]));
    }
    value
}

/// Labels for people.
pub(crate) fn labels(labels: &BTreeMap<String, String>) -> String {
    labels.iter().fold(String::new(), |text, (key, value)| text + "  " + key + "=" + value)
}

/// What somebody asks `restore` for to get to a mark; nothing when its name was used again later.
pub(crate) fn target(marks: &mark::Marks, mark: &Mark) -> Option<String> {
    marks.is_newest(mark).then(|| format!("name:{}", mark.name))
}
