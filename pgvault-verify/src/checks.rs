//! What a restored cluster is examined for.
//!
//! Each check is one unit with a name, a verdict, a sentence and its evidence; none knows of the others. Those on files look at the copy
//! while no server runs on it, all others ask the server. A check that cannot be done says so; one whose server is gone fails.
//!
//! ```text
//! files       the files of the backup are there          pages       every page carries its checksum
//! relations   tables read, heaps and B-trees are sound   catalog     the schema dumps, indexes, constraints, collations, extensions
//! rows        as many as were counted with the backup
//! sequences   none is behind its table                   odoo        what Odoo depends on
//! documents   attachments, from the vault                 user        the operator's own
//! filestore   attachments, in a folder
//! ```

mod catalog;
mod documents;
mod files;
mod filestore;
mod odoo;
mod pages;
mod relations;
mod rows;
mod sequences;
mod user;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgvault_core::postgres::{ConnInfo, Connection, Mode, ResultSet};
use pgvault_core::vault::drill::Verdict;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

pub(crate) use files::base_files;
pub(crate) use pages::{page_checksums, page_checksums_of};
pub(crate) use rows::Recovered;
pub use user::{Assertion, Question};

use crate::runner::{Running, why};

/// Names that evidence lists, at most: it is read by people and kept for ever.
const NAMED: usize = 20;

/// What a check has found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) verdict: Verdict,
    pub(crate) message: String,
    pub(crate) evidence: Value,
    /// Skipped, it leaves a drill without proof.
    pub(crate) is_essential: bool,
}

impl Found {
    fn new(verdict: Verdict, message: impl Into<String>, evidence: Value) -> Self {
        Self { verdict, message: message.into(), evidence, is_essential: false }
    }

    pub(crate) fn passed(message: impl Into<String>, evidence: Value) -> Self {
        Self::new(Verdict::Passed, message, evidence)
    }

    pub(crate) fn warned(message: impl Into<String>, evidence: Value) -> Self {
        Self::new(Verdict::Warned, message, evidence)
    }

    pub(crate) fn failed(message: impl Into<String>, evidence: Value) -> Self {
        Self::new(Verdict::Failed, message, evidence)
    }

    /// Not done, and not needed for a proof.
    pub(crate) fn skipped(message: impl Into<String>) -> Self {
        Self::new(Verdict::Skipped, message, Value::Null)
    }

    /// Not done, so that the drill proves less than it should.
    pub(crate) fn missing(message: impl Into<String>) -> Self {
        Self { is_essential: true, ..Self::skipped(message) }
    }
}

/// A restored cluster that can be asked.
#[derive(Debug)]
pub(crate) struct Restored<'a> {
    pub(crate) connection: ConnInfo,
    pub(crate) recovered: Recovered<'a>,
    pub(crate) deep: bool,
    pub(crate) seed: u64,
    pub(crate) workers: usize,
    /// Longest time of one check.
    pub(crate) limit: Duration,
}

/// How to connect to a database of the copy.
pub(crate) fn in_database(connection: &ConnInfo, database: &str) -> ConnInfo {
    ConnInfo { dbname: Some(database.to_owned()), ..connection.clone() }
}

impl Restored<'_> {
    /// A session in a database, without limits of its own: checks have theirs.
    async fn connect(&self, database: &str) -> Result<Connection> {
        let mut sql = Connection::connect(&in_database(&self.connection, database), Mode::Sql).await?;
        sql.set_idle_timeout(None);
        let _ = sql
            .simple_query("SET statement_timeout = 0; SET lock_timeout = 0; SET search_path = pg_catalog; SET row_security = off")
            .await?;
        Ok(sql)
    }
}

/// The databases that can be connected to, but for the templates.
///
/// # Errors
/// When the server cannot be asked.
pub(crate) async fn databases(restored: &Restored<'_>) -> Result<Vec<String>> {
    names(restored, "datallowconn AND datconnlimit <> -2 AND NOT datistemplate").await
}

/// Every database that can be connected to.
async fn all_databases(restored: &Restored<'_>) -> Result<Vec<String>> {
    names(restored, "datallowconn AND datconnlimit <> -2").await
}

async fn names(restored: &Restored<'_>, which: &str) -> Result<Vec<String>> {
    let mut sql = restored.connect("postgres").await?;
    let rows = ask(&mut sql, &format!("SELECT datname FROM pg_database WHERE {which} ORDER BY datname")).await?;
    sql.close().await;
    rows.rows.iter().map(|row| row.required(0).map(ToOwned::to_owned)).collect()
}

/// The answer to one statement.
async fn ask(sql: &mut Connection, statement: &str) -> Result<ResultSet> {
    let mut sets = sql.simple_query(statement).await?;
    sets.pop().ok_or_else(|| Error::new(ErrorKind::Source, "source.protocol", "the server answered nothing"))
}

/// Lists at most [`NAMED`] of them, and how many there are.
fn listed(names: &[String]) -> Value {
    json!({ "count": names.len(), "first": names.iter().take(NAMED).collect::<Vec<_>>() })
}

/// Runs every check that asks the server; gives each with how long it took.
pub(crate) async fn on_server(
    restored: &Restored<'_>,
    running: &mut dyn Running,
    assertions: &[Assertion],
    filestores: &BTreeMap<String, PathBuf>,
) -> Vec<(String, Duration, Found)> {
    let mut done = Done { restored, list: Vec::new(), is_gone: false };
    let began = Instant::now();
    // Before anything that could change a table.
    let found = within(restored.limit, rows::compare(restored, &restored.recovered)).await;
    done.add("row-counts", began, found, running).await;
    let began = Instant::now();
    let found = catalog::dump(restored, running).await;
    done.add("catalog-dump", began, found, running).await;
    for unit in [Unit::Tables, Unit::Amcheck, Unit::Sequences, Unit::Indexes, Unit::Constraints, Unit::Collations, Unit::Extensions]
    {
        done.run(unit, running).await;
    }
    done.odoo(running).await;
    for (database, folder) in filestores {
        let began = Instant::now();
        let found = within(restored.limit, filestore::compare(restored, database, folder)).await;
        done.add(&format!("filestore:{database}"), began, found, running).await;
    }
    for assertion in assertions {
        for (database, began, found) in user::ask(restored, assertion).await {
            let name = match database {
                Some(database) => format!("user:{}:{database}", assertion.name),
                None => format!("user:{}", assertion.name),
            };
            done.add(&name, began, found, running).await;
        }
    }
    done.list
}

/// The checks of every cluster.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Tables,
    Amcheck,
    Sequences,
    Indexes,
    Constraints,
    Collations,
    Extensions,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Tables => "tables",
            Self::Amcheck => "amcheck",
            Self::Sequences => "sequences",
            Self::Indexes => "indexes",
            Self::Constraints => "constraints",
            Self::Collations => "collations",
            Self::Extensions => "extensions",
        }
    }

    async fn run(self, restored: &Restored<'_>) -> Result<Found> {
        match self {
            Self::Tables => relations::read(restored).await,
            Self::Amcheck => relations::amcheck(restored).await,
            Self::Sequences => sequences::compare(restored).await,
            Self::Indexes => catalog::indexes(restored).await,
            Self::Constraints => catalog::constraints(restored).await,
            Self::Collations => catalog::collations(restored).await,
            Self::Extensions => catalog::extensions(restored).await,
        }
    }
}

struct Done<'a> {
    restored: &'a Restored<'a>,
    list: Vec<(String, Duration, Found)>,
    /// The server has ended: nothing more can be asked, and this is said once.
    is_gone: bool,
}

impl Done<'_> {
    async fn run(&mut self, unit: Unit, running: &mut dyn Running) {
        let began = Instant::now();
        let found = within(self.restored.limit, unit.run(self.restored)).await;
        self.add(unit.name(), began, found, running).await;
    }

    async fn odoo(&mut self, running: &mut dyn Running) {
        let began = Instant::now();
        match odoo::databases(self.restored).await {
            Ok(databases) => {
                for database in databases {
                    let began = Instant::now();
                    match within(self.restored.limit, odoo::examine(self.restored, &database)).await {
                        Ok(found) => {
                            for (name, found) in found {
                                self.list.push((format!("{name}:{database}"), began.elapsed(), found));
                            }
                        }
                        Err(error) => self.add(&format!("odoo:{database}"), began, Err(error), running).await,
                    }
                    let began = Instant::now();
                    match within(self.restored.limit, Box::pin(documents::fetchable(self.restored, &database))).await.transpose() {
                        None => {}
                        Some(found) => self.add(&format!("documents:{database}"), began, found, running).await,
                    }
                }
            }
            Err(error) => self.add("odoo", began, Err(error), running).await,
        }
    }

    async fn add(&mut self, name: &str, began: Instant, found: Result<Found>, running: &mut dyn Running) {
        if self.is_gone {
            return;
        }
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let message = why(running, &error).await;
                self.is_gone = running.ended().await.is_some();
                let log = if self.is_gone { Value::String(running.log_tail().await) } else { Value::Null };
                Found::failed(message, json!({ "code": error.code(), "log": log }))
            }
        };
        self.list.push((name.to_owned(), began.elapsed(), found));
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let why = format!("it took longer than {} s", limit.as_secs());
        Err(Error::new(ErrorKind::Failed, "drill.timeout", why).with_hint("`--timeout` or `drill.timeout` gives more"))
    })
}
