//! The documents that belong to a restored database.

use std::path::{Path, PathBuf};

use pgvault_core::filestore::catalog::Catalog;
use pgvault_core::filestore::database::{References, references};
use pgvault_core::filestore::fetch::{FetchOptions, Fetched, Sink, Wish, fetch as fetch_files};
use pgvault_core::filestore::instance::Database;
use pgvault_core::filestore::pass::{self, Pass, Watermark};
use pgvault_core::postgres::Connection;
use pgvault_core::progress::SharedProgress;
use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill::Point;
use pgvault_core::wal::catalog::read_history;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::side::{OdooDatabase, Side};
use serde::Serialize;

use crate::output::{self, Printer};

/// Names of missing files that people are shown; the summary has more.
const SHOWN: usize = 10;

/// What is to be fetched.
pub(super) struct FilesWish<'a> {
    /// Where they are fetched from.
    pub(super) cluster: &'a Cluster,
    /// The database at the moment that is restored; it says what it refers to.
    pub(super) side: &'a Side,
    /// Whose documents.
    pub(super) databases: &'a [OdooDatabase],
    /// Where they go: a folder for each database, as in Odoo's `filestore`.
    pub(super) target: &'a Path,
    /// What the only one of them is going to be called, when that is another name.
    pub(super) called: Option<&'a str>,
    /// Missing ones are listed, and nothing to fail for.
    pub(super) allow_missing: bool,
    /// Keep what is right in the folders.
    pub(super) delta: bool,
    pub(super) workers: usize,
    pub(super) progress: SharedProgress,
}

/// What was fetched for one database.
#[derive(Debug, Serialize)]
pub(super) struct FilesOutcome {
    pub(super) database: String,
    pub(super) folder: PathBuf,
    /// Up to where the vault has all documents; the moment may lie behind it.
    pub(super) watermark: Option<Watermark>,
    /// Whether the moment lies at or before it.
    pub(super) complete: bool,
    #[serde(flatten)]
    pub(super) fetched: Fetched,
    /// Whether something lacks that somebody has not put up with.
    #[serde(skip)]
    pub(super) lacks: bool,
}

/// Fetches the documents that the databases refer to. A database without any needs no vault of documents.
///
/// # Errors
/// [`ErrorKind::NotFound`] when a database refers to documents and none of it were ever captured.
pub(super) async fn fetch(printer: &Printer, wish: FilesWish<'_>) -> Result<Vec<FilesOutcome>> {
    let mut outcomes = Vec::new();
    for database in wish.databases {
        let outcome = Box::pin(one(printer, &wish, database)).await;
        outcomes.push(outcome.map_err(|e| e.context(format!("documents of `{}`", database.name)))?);
    }
    Ok(outcomes)
}

async fn one(printer: &Printer, wish: &FilesWish<'_>, database: &OdooDatabase) -> Result<FilesOutcome> {
    let mut sql = wish.side.connect(&database.name).await?;
    let found = look_up(wish.cluster, &mut sql, database, wish.side.reached()).await?;
    sql.close().await;
    let name = wish.called.unwrap_or(&database.name);
    if name.contains('/') || matches!(name, "." | "..") {
        return Err(Error::new(ErrorKind::Usage, "filestore.folder", format!("`{name}` cannot name a folder"))
            .with_hint("restore the database alone, under another name: --database NAME --into ... --as OTHER"));
    }
    let folder = wish.target.join(name);
    let sink = Sink::Folder { path: folder.clone(), owner: None, delta: wish.delta };
    let options = FetchOptions { sink, workers: wish.workers, progress: wish.progress.clone() };
    let Found { mut catalog, references, watermark, complete } = found;
    let fetched = fetch_files(&mut catalog, Wish::Referenced(references), &options).await?;
    let lacks = fetched.unknown > 0 && !wish.allow_missing;
    let outcome = FilesOutcome { database: database.name.clone(), folder, watermark, complete, fetched, lacks };
    tell(printer, &outcome);
    Ok(outcome)
}

/// What the vault has of the documents that a database refers to.
pub(in crate::commands) struct Found {
    pub(in crate::commands) catalog: Catalog,
    pub(in crate::commands) references: References,
    /// Up to where the vault has all documents.
    pub(in crate::commands) watermark: Option<Watermark>,
    /// Whether the moment lies at or before it.
    pub(in crate::commands) complete: bool,
}

/// Asks a database at the moment `reached` what it refers to, and looks for the catalog that has it.
///
/// # Errors
/// [`ErrorKind::NotFound`] when it refers to documents and none of it were ever captured.
pub(in crate::commands) async fn look_up(
    cluster: &Cluster,
    sql: &mut Connection,
    database: &OdooDatabase,
    reached: &Point,
) -> Result<Found> {
    let row = sql.query_one("SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()").await?;
    let oid = row.required(0)?.parse().map_err(|_| Error::new(ErrorKind::Source, "odoo.oid", "the server does not say its oid"))?;
    let references = references(sql).await?;
    let uuid = database.uuid.clone().unwrap_or_default();
    let identity = Database { name: database.name.clone(), oid, uuid, series: database.version.clone() };
    let (catalog, pass) = match pass::load(cluster, &identity.folder(cluster.keys().digest())).await? {
        Some(known) => (known.catalog, Some(known.pass)),
        None if references.local == 0 => (Catalog::empty(cluster), None),
        None => {
            return Err(Error::new(
                ErrorKind::NotFound,
                "filestore.none_captured",
                format!("{} documents are referred to, and the vault has none of this database", references.local),
            )
            .with_hint(
                "they were never captured by `pgvault filestore sync`; `restore` without --filestore gives the database alone",
            ));
        }
    };
    let complete = match &pass {
        Some(pass) => covers(cluster, pass, reached).await?,
        None => true,
    };
    let watermark = pass.as_ref().and_then(Pass::watermark).map(|(_, mark)| mark);
    Ok(Found { catalog, references, watermark, complete })
}

/// Whether all documents of the moment are in the vault.
async fn covers(cluster: &Cluster, pass: &Pass, reached: &Point) -> Result<bool> {
    let history = read_history(cluster, reached.timeline).await?;
    Ok(pass.covers(reached.timeline, reached.lsn, history.as_ref()))
}

fn tell(printer: &Printer, outcome: &FilesOutcome) {
    let FilesOutcome { database, folder, watermark, complete, fetched, .. } = outcome;
    printer.line(format_args!(
        "{database}: {} documents of {} in {}, in {:.1} s",
        fetched.files,
        output::bytes(fetched.bytes),
        folder.display(),
        fetched.took.as_secs_f64()
    ));
    warn(printer, database, *watermark, *complete, fetched);
}

/// Says what lacks.
pub(in crate::commands) fn warn(
    printer: &Printer,
    database: &str,
    watermark: Option<Watermark>,
    complete: bool,
    fetched: &Fetched,
) {
    if !complete {
        let up_to = watermark.map_or_else(|| "nowhere".to_owned(), |mark| format!("{} ({:.0})", mark.lsn, mark.at));
        printer.warn(format_args!("{database}: documents are known to be whole up to {up_to}, and the moment lies behind that"));
    }
    if fetched.unknown > 0 {
        printer.warn(format_args!("{database}: {} documents were never captured", fetched.unknown));
    }
    if fetched.bad_at_source > 0 {
        printer.warn(format_args!("{database}: {} documents were missing or damaged at the source already", fetched.bad_at_source));
    }
    for missing in fetched.missing.iter().take(SHOWN) {
        printer.warn(format_args!("{database}: {}: {}", missing.name, missing.why));
    }
}
