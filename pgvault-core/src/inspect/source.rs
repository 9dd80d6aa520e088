//! What a cluster's databases of Odoo say of themselves: where their documents lie, and which of them the vault has.
//!
//! These are questions to the server, to the file system and to the vault's records. What the store keeps,
//! [`doctor`](super::doctor) asks.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use jiff::SignedDuration;
use serde::Serialize;

use crate::filestore::database::{Odoo, Position};
use crate::filestore::find::Finder;
use crate::filestore::pass;
use crate::postgres::ConnInfo;
use crate::store::probe::{Check, Outcome};
use crate::vault::Cluster;
use crate::{Error, Result};

/// Schemes of modules that delete an object at once, in the midst of the transaction.
const DELETE_AT_ONCE: [&str; 4] = ["s3", "azure", "swift", "gs"];

/// Places of the census that are no schemes.
const NO_SCHEMES: [&str; 6] = ["local", "other", "db", "url", "binary", "none"];

/// Attachments that lie in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Attachments {
    /// Rows.
    pub rows: u64,
    /// Bytes, as the rows have them.
    pub bytes: u64,
}

/// A database.
#[derive(Debug, Clone, Serialize)]
pub struct DatabaseReport {
    /// Its name.
    pub database: String,
    /// Its `database.uuid`.
    pub uuid: Option<String>,
    /// True for a copy that was made harmless.
    pub neutralised: bool,
    /// By place: `local`, a scheme, `db`, `url`, `other`.
    pub attachments: BTreeMap<String, Attachments>,
    /// How long ago the vault had all documents, in seconds of the server's clock; none when it never did.
    pub behind_seconds: Option<i64>,
    /// What was asked.
    pub checks: Vec<Check>,
}

impl DatabaseReport {
    fn new(database: &str) -> Self {
        let attachments = BTreeMap::new();
        Self { database: database.into(), uuid: None, neutralised: false, attachments, behind_seconds: None, checks: Vec::new() }
    }

    fn add(&mut self, name: &'static str, outcome: Outcome, evidence: impl Into<String>, fix: &'static str) {
        self.checks.push(Check::new(name, outcome, evidence, fix));
    }

    /// True when nothing has failed.
    pub fn is_ok(&self) -> bool {
        self.checks.iter().all(|check| check.outcome != Outcome::Failed)
    }
}

/// Examines the databases of Odoo that a cluster has. A watermark that is older than `patience` is warned of.
///
/// # Errors
/// When the server cannot be asked which databases there are. What is wrong with one of them is no error; it is in its report.
pub async fn examine_odoo(
    cluster: &Cluster,
    finder: &Finder,
    connection: &ConnInfo,
    patience: Duration,
) -> Result<Vec<DatabaseReport>> {
    let mut reports = Vec::new();
    for database in finder.databases(connection).await? {
        let mut report = DatabaseReport::new(&database);
        match Odoo::connect(connection, &database, cluster.name().system_id).await {
            Ok(Some(odoo)) => {
                if let Err(error) = examine(cluster, finder, odoo, patience, &mut report).await {
                    report.add("odoo_readable", Outcome::Failed, error.to_string(), "give the role what docs/operations.md lists");
                }
            }
            Ok(None) if finder.names(&database) => {
                let fix = "check [cluster.NAME.odoo] databases, and Odoo's db_name";
                report.add("odoo_readable", Outcome::Failed, "the database is not Odoo's", fix);
            }
            Ok(None) => continue,
            Err(error) => {
                // One that nobody names may be none of Odoo's business.
                let outcome = if finder.names(&database) { Outcome::Failed } else { Outcome::Skipped };
                report.add("odoo_readable", outcome, error.to_string(), "let the role connect and read it");
            }
        }
        reports.push(report);
    }
    Ok(reports)
}

async fn examine(
    cluster: &Cluster,
    finder: &Finder,
    mut odoo: Odoo,
    patience: Duration,
    report: &mut DatabaseReport,
) -> Result<()> {
    report.uuid = Some(odoo.database.uuid.clone());
    report.neutralised = odoo.neutralised;
    let census = odoo.census().await?;
    report.attachments = census.into_iter().map(|(place, (rows, bytes))| (place, Attachments { rows, bytes })).collect();
    attachments(report);
    if odoo.neutralised {
        let fix = "take it out of [cluster.NAME.odoo] databases: what a copy writes is no history of production";
        let outcome = if finder.names(&report.database) { Outcome::Warned } else { Outcome::Passed };
        report.add("odoo_neutralised", outcome, "it is a neutralised copy; its documents belong to nobody's history", fix);
        return Ok(());
    }
    let has = |place: &str| report.attachments.get(place).is_some_and(|found| found.rows > 0);
    if odoo.location != "file" && !has("local") && !has("other") {
        return Ok(());
    }
    match finder.folder(&report.database) {
        Ok(folder) => {
            let must = if has("local") { Outcome::Failed } else { Outcome::Warned };
            filestore(&folder, must, report);
        }
        Err(error) => report.add("odoo_filestore", Outcome::Failed, error.to_string(), "set [cluster.NAME.odoo] data_dir"),
    }
    let position = odoo.position().await?;
    watermark(cluster, &odoo, position, patience, report).await
}

/// Where they lie, and what has to be known of those that are not in the filestore.
fn attachments(report: &mut DatabaseReport) {
    let words: Vec<String> =
        report.attachments.iter().map(|(place, found)| format!("{place} {} ({} bytes)", found.rows, found.bytes)).collect();
    let evidence = if words.is_empty() { "none".to_owned() } else { words.join(", ") };
    report.add("odoo_attachments", Outcome::Passed, evidence, "");
    for (scheme, found) in report.attachments.clone() {
        if NO_SCHEMES.contains(&scheme.as_str()) {
            continue;
        }
        let fix = if DELETE_AT_ONCE.contains(&scheme.as_str()) {
            "keep versions and deleted objects there for as long as the retention window: modules of this kind delete objects in the midst of a \
             transaction, and a restore needs the version of its moment"
        } else {
            "keep versions and deleted files there for as long as the retention window: OCA's fs_attachment renames files, and its collector \
             (fs_file_gc) deletes what no row refers to now, whatever a restored database refers to"
        };
        let evidence = format!("{} attachments lie in {scheme}://, and no vault has them", found.rows);
        report.add("odoo_remote", Outcome::Warned, evidence, fix);
    }
}

/// Can the folder be read by whoever runs this?
fn filestore(folder: &Path, must: Outcome, report: &mut DatabaseReport) {
    match readable(folder) {
        Ok(()) => report.add("odoo_filestore", Outcome::Passed, format!("{} can be read", folder.display()), ""),
        Err(error) => {
            let fix = "mount it here, let this account read it, or say where it is: [cluster.NAME.odoo] data_dir";
            report.add("odoo_filestore", must, format!("{} cannot be read: {error}", folder.display()), fix);
        }
    }
}

/// The folder, one of the folders in it, and a file in that one.
fn readable(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // The checklist has empty files only.
        if !entry.file_type()?.is_dir() || entry.file_name() == "checklist" {
            continue;
        }
        for file in std::fs::read_dir(entry.path())? {
            let file = file?;
            if file.file_type()?.is_file() {
                return std::fs::File::open(file.path()).map(drop);
            }
        }
    }
    Ok(())
}

/// How long ago the vault had all documents.
async fn watermark(
    cluster: &Cluster,
    odoo: &Odoo,
    position: Position,
    patience: Duration,
    report: &mut DatabaseReport,
) -> Result<()> {
    let sync = "run `pgvault filestore sync --watch` as a service, or `filestore sync` often";
    let folder = odoo.database.folder(cluster.keys().digest());
    let known = match pass::load(cluster, &folder).await {
        Ok(known) => known,
        Err(error) => {
            report.add("odoo_watermark", Outcome::Failed, error.to_string(), "run `pgvault check`");
            return Ok(());
        }
    };
    let Some((timeline, mark)) = known.as_ref().and_then(|known| known.pass.watermark()) else {
        report.add("odoo_watermark", Outcome::Warned, "the vault does not have all documents of any moment", sync);
        return Ok(());
    };
    let behind = position.at.duration_since(mark.at).max(SignedDuration::ZERO);
    report.behind_seconds = Some(behind.as_secs());
    let bytes = (timeline == position.timeline).then(|| position.lsn.0.saturating_sub(mark.lsn.0));
    let written = bytes.map_or_else(|| format!("on timeline {timeline}"), |bytes| format!("{bytes} bytes of WAL ago"));
    let evidence = format!("all documents up to {} ({:.0}) are safe: {} s and {written}", mark.lsn, mark.at, behind.as_secs());
    let late = SignedDuration::try_from(patience).is_ok_and(|patience| behind > patience);
    report.add("odoo_watermark", if late { Outcome::Warned } else { Outcome::Passed }, evidence, if late { sync } else { "" });
    Ok(())
}

/// What a cluster that cannot be asked is told to do.
pub fn unasked(error: &Error) -> DatabaseReport {
    let mut report = DatabaseReport::new("");
    report.add("odoo_server", Outcome::Skipped, error.to_string(), "");
    report
}
