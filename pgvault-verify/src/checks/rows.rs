//! Tables have the rows that were counted when the backup was taken, or WAL that says why not.
//!
//! Damage that leaves every page whole is found only so: a write that the disk reported and never made, a file of last week.

use std::collections::BTreeMap;

use pgvault_core::postgres::wal::Touched;
use pgvault_core::postgres::{Connection, Lsn, TimelineId};
use pgvault_core::restore::changes::changes;
use pgvault_core::vault::Cluster;
use pgvault_core::vault::census::{Between, Census, CountedDatabase, CountedTable, Found as Counted, Verdict};
use pgvault_core::vault::snapshot::OpenSnapshot;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::{Found, Restored, ask, listed};

/// Tables that are counted with one statement.
const BATCH: usize = 64;

/// WAL up to this size is read again while the copy is promoted, which takes a second of waiting; more of it only when a number differs.
const AHEAD: u64 = 1 << 30;

/// The backup, and how far the copy was recovered from it.
#[derive(Debug)]
pub(crate) struct Recovered<'a> {
    cluster: &'a Cluster,
    pub(crate) snapshot: &'a OpenSnapshot,
    timeline: TimelineId,
    /// The end of the last record that was replayed.
    reached: Lsn,
    ahead: Mutex<Option<JoinHandle<Result<Touched>>>>,
}

impl<'a> Recovered<'a> {
    pub(crate) fn new(cluster: &'a Cluster, snapshot: &'a OpenSnapshot, timeline: TimelineId, reached: Lsn) -> Self {
        let ahead = (reached.0.saturating_sub(snapshot.manifest.start_lsn.0) <= AHEAD).then(|| {
            let (cluster, manifest) = (cluster.clone(), snapshot.manifest.clone());
            tokio::spawn(async move { changes(&cluster, &manifest, timeline, reached).await })
        });
        Self { cluster, snapshot, timeline, reached, ahead: Mutex::new(ahead) }
    }

    /// Where the copy's backup lies.
    pub(crate) fn cluster(&self) -> &Cluster {
        self.cluster
    }

    /// Where recovery ended.
    pub(crate) fn position(&self) -> (TimelineId, Lsn) {
        (self.timeline, self.reached)
    }

    async fn changes(&self) -> Result<Touched> {
        match self.ahead.lock().await.take() {
            Some(ahead) => ahead.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?,
            None => changes(self.cluster, &self.snapshot.manifest, self.timeline, self.reached).await,
        }
    }
}

/// Counts again, and reads the WAL between when a number differs.
///
/// # Errors
/// When the server or the store cannot be asked.
pub(super) async fn compare(restored: &Restored<'_>, recovered: &Recovered<'_>) -> Result<Found> {
    let Some(census) = recovered.snapshot.census().await?.filter(|census| census.tables() > 0) else {
        return Ok(Found::skipped("no rows were counted when the backup was taken"));
    };
    let counted = count_all(restored, &census).await?;
    let differs = census.databases.iter().any(|database| {
        let found = counted.get(&database.oid);
        database.tables.iter().any(|table| !is_same(table, found.and_then(|tables| tables.get(&table.oid))))
    });
    // Most of a quiet cluster is as it was: nothing has to be read for that.
    let touched = if differs { Some(recovered.changes().await?) } else { None };
    let mut tally = Tally::default();
    for database in &census.databases {
        for table in &database.tables {
            let found = counted.get(&database.oid).and_then(|tables| tables.get(&table.oid)).copied();
            tally.note(database, table, found, touched.as_ref(), recovered.reached);
        }
    }
    Ok(tally.judge(&census))
}

fn is_same(table: &CountedTable, found: Option<&Counted>) -> bool {
    found.is_some_and(|found| found.filenode == table.filenode && found.rows == table.rows)
}

#[derive(Debug, Default)]
struct Tally {
    same: u64,
    explained: u64,
    unsure: Vec<String>,
    wrong: Vec<String>,
}

impl Tally {
    fn note(
        &mut self,
        database: &CountedDatabase,
        table: &CountedTable,
        found: Option<Counted>,
        touched: Option<&Touched>,
        reached: Lsn,
    ) {
        let Some(touched) = touched else {
            self.same += 1;
            return;
        };
        let gone = found.is_none() && touched.was_database_dropped(database.oid);
        let between: Between = database.between(table, touched, reached);
        match table.compare(found, between) {
            Verdict::Same => self.same += 1,
            Verdict::Explained(_) => self.explained += 1,
            _ if gone => self.explained += 1,
            Verdict::Unsure(why) => self.unsure.push(format!("{}: {why}", database.name)),
            Verdict::Wrong(why) => self.wrong.push(format!("{}: {why}", database.name)),
        }
    }

    fn judge(self, census: &Census) -> Found {
        let tables = census.tables();
        let evidence = json!({
            "counted": tables, "same": self.same, "explained": self.explained, "unsure": listed(&self.unsure), "wrong": listed(&self.wrong),
            "left_out": census.left_out,
        });
        match (self.wrong.first(), self.unsure.first()) {
            (Some(first), _) => Found::failed(
                format!("{} of {tables} tables have other rows than when the backup was taken: {first}", self.wrong.len()),
                evidence,
            ),
            (None, Some(first)) => Found::warned(
                format!("of {} of {tables} tables it cannot be told whether their rows are all there: {first}", self.unsure.len()),
                evidence,
            ),
            (None, None) => Found::passed(
                format!(
                    "{} of {tables} tables have the rows that were counted with the backup, the others those that WAL has given them",
                    self.same
                ),
                evidence,
            ),
        }
    }
}

type Tables = BTreeMap<u32, Counted>;

/// The tables of a census as they are now, by the oids of database and table.
async fn count_all(restored: &Restored<'_>, census: &Census) -> Result<BTreeMap<u32, Tables>> {
    let mut sql = restored.connect("postgres").await?;
    let rows = ask(&mut sql, "SELECT oid, datname FROM pg_database WHERE datallowconn AND datconnlimit <> -2").await?.rows;
    sql.close().await;
    let mut names = BTreeMap::new();
    for row in &rows {
        let _ = names.insert(row.required(0)?.parse::<u32>().unwrap_or_default(), row.required(1)?.to_owned());
    }
    let mut counted = BTreeMap::new();
    for database in &census.databases {
        let Some(name) = names.get(&database.oid) else { continue };
        let mut sql = restored.connect(name).await?;
        let _ = counted.insert(database.oid, count(&mut sql, &database.tables).await?);
        sql.close().await;
    }
    Ok(counted)
}

async fn count(sql: &mut Connection, tables: &[CountedTable]) -> Result<Tables> {
    let mut counted = Tables::new();
    for batch in tables.chunks(BATCH) {
        let oids: Vec<String> = batch.iter().map(|table| table.oid.to_string()).collect();
        let there = ask(
            sql,
            &format!(
                "SELECT c.oid, pg_relation_filenode(c.oid), format('%I.%I', n.nspname, c.relname) FROM pg_class c \
                 JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid IN ({}) AND c.relkind = 'r'",
                oids.join(", ")
            ),
        )
        .await?;
        // The heap itself: an index that is damaged would count what it has.
        let _ = sql.simple_query("SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off").await?;
        for row in &there.rows {
            let number = |column| row.text(column).map(|text| text.and_then(|text| text.parse::<u32>().ok()).unwrap_or_default());
            let rows = sql.query_one(&format!("SELECT count(*) FROM ONLY {}", row.required(2)?)).await?;
            let found = Counted { filenode: number(1)?, rows: rows.required(0)?.parse().unwrap_or_default() };
            let _ = counted.insert(number(0)?, found);
        }
    }
    Ok(counted)
}
