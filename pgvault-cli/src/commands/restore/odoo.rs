//! Databases of Odoo in a restored cluster: what is said of them, and how they become harmless.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pgvault_core::env::Env;
use pgvault_core::postgres::Lsn;
use pgvault_core::restore::mark::{self, Mark};
use pgvault_core::restore::plan::{Plan, Stop};
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::neutralise::{Neutralised, neutralise};
use pgvault_verify::side::{OdooDatabase, Promoted};
use serde_json::{Value, json};

use crate::output::Printer;

/// The statements that modules bring for their own neutralisation.
#[derive(Debug, Default)]
pub(in crate::commands) struct ModuleSql {
    /// By database; without one, for the only database of Odoo.
    by_database: BTreeMap<Option<String>, String>,
}

impl ModuleSql {
    /// Reads `FILE` or `DATABASE=FILE`, before anything is restored.
    ///
    /// # Errors
    /// When a file cannot be read, or two are for the same database.
    pub(in crate::commands) fn read(given: &[String]) -> Result<Self> {
        let mut by_database = BTreeMap::new();
        for text in given {
            // A file whose name has `=` in it is one of its own; a database may be called anything.
            let (database, path) = match text.rsplit_once('=') {
                Some((database, path)) if !PathBuf::from(text).exists() => (Some(database.to_owned()), PathBuf::from(path)),
                _ => (None, PathBuf::from(text)),
            };
            let sql = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
            if by_database.insert(database, sql).is_some() {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "usage.neutralise_sql",
                    format!("`{text}`: a database has one such file"),
                )
                .with_hint("with several databases, name each: --neutralise-sql DATABASE=FILE"));
            }
        }
        Ok(Self { by_database })
    }

    /// Makes sure that each is for one of these, and that it is plain for which.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when it is not.
    pub(in crate::commands) fn ensure_fits(&self, databases: &[OdooDatabase]) -> Result<()> {
        let names = || databases.iter().map(|database| format!("`{}`", database.name)).collect::<Vec<_>>().join(", ");
        for key in self.by_database.keys() {
            let why = match key {
                Some(name) if !databases.iter().any(|database| database.name == *name) => {
                    format!("--neutralise-sql is for `{name}`, and the databases of Odoo are {}", names())
                }
                None if databases.len() > 1 => format!("--neutralise-sql does not say for which of {}", names()),
                _ => continue,
            };
            return Err(Error::new(ErrorKind::Usage, "usage.neutralise_sql", why).with_hint("use --neutralise-sql DATABASE=FILE"));
        }
        Ok(())
    }

    fn of(&self, database: &str) -> Option<&str> {
        self.by_database.get(&Some(database.to_owned())).or_else(|| self.by_database.get(&None)).map(String::as_str)
    }
}

/// Makes each of them harmless.
///
/// # Errors
/// Of the first that cannot be, with its name.
pub(in crate::commands) async fn neutralise_all(
    promoted: &Promoted,
    databases: &[OdooDatabase],
    modules: &ModuleSql,
) -> Result<BTreeMap<String, Neutralised>> {
    let mut done = BTreeMap::new();
    for database in databases {
        let mut sql = promoted.connect(&database.name).await?;
        let neutralised = Box::pin(neutralise(&mut sql, &Env::default(), modules.of(&database.name))).await;
        let _ = done.insert(database.name.clone(), neutralised.map_err(|e| e.context(format!("database `{}`", database.name)))?);
        sql.close().await;
    }
    Ok(done)
}

/// Says that the moment lies within an upgrade, and which restore point was set before it.
///
/// # Errors
/// When the vault fails.
pub(in crate::commands) async fn warn_of_upgrades(
    printer: &Printer,
    cluster: &Cluster,
    plan: &Plan,
    reached: Lsn,
    databases: &[OdooDatabase],
) -> Result<(Vec<String>, Option<Mark>)> {
    let mut warnings = Vec::new();
    let half: Vec<&OdooDatabase> = databases.iter().filter(|database| !database.half_upgraded.is_empty()).collect();
    if half.is_empty() {
        return Ok((warnings, None));
    }
    // A restore point that is the target itself lies within the upgrade, too.
    let limit = match plan.stop {
        Stop::Lsn { lsn, .. } => lsn.min(reached),
        _ => reached,
    };
    let before = mark::newest_before(cluster, plan, limit).await?;
    for database in half {
        let modules: Vec<String> =
            database.half_upgraded.iter().take(5).map(|module| format!("{} ({})", module.name, module.state)).collect();
        let advice = match &before {
            Some(mark) => format!("the restore point before it is `{}` of {:.0}: --to {}", mark.name, mark.time, mark.target),
            None => "no restore point was set before it; restore to a moment before the upgrade began".to_owned(),
        };
        let warning = format!(
            "the moment lies within a module upgrade of `{}`: {} of its modules are half done, {}; {advice}",
            database.name,
            database.half_upgraded.len(),
            modules.join(", ")
        );
        printer.warn(&warning);
        warnings.push(warning);
    }
    Ok((warnings, before))
}

/// The databases, for the summary.
pub(in crate::commands) fn describe(databases: &[OdooDatabase], neutralised: &BTreeMap<String, Neutralised>) -> Value {
    let describe = |database: &OdooDatabase| {
        let done = neutralised.get(&database.name);
        json!({
            "database": database.name,
            "uuid": done.map_or_else(|| database.uuid.clone(), |done| Some(done.uuid.clone())),
            "uuid_before": database.uuid,
            "version": database.version,
            "neutralised": done.is_some(),
            "found": done.map(|done| &done.found),
            "module_statements": done.map(|done| done.module_statements),
            "half_upgraded": database.half_upgraded,
        })
    };
    databases.iter().map(describe).collect()
}
