//! Counting the rows of tables while a backup copies their files.
//!
//! A restored copy is later counted as well, and the WAL between explains the difference or does not (see [`crate::vault::census`]).
//! The backup must never pay for that: the counting runs beside the copying, on connections of its own, for a short time at most, and
//! ends when the copying does. Whatever goes wrong with it leaves tables out, and nothing else.
//!
//! What is made sure of for every count:
//!
//! - The snapshot comes first, then the server's WAL position: what the snapshot sees lies before it.
//! - The table is locked by the statement that counts, before its oid and its file are asked for: a count belongs to that file. The
//!   lock is given back at once, by a savepoint, so that nobody who wants to change the table waits for the other tables.
//! - The heap itself is read, not an index, and row security does not hide rows: tables where it would are left out.
//! - Names are looked up in `pg_catalog` alone: the owners of databases cannot slip in functions of their own.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::postgres::{ConnInfo, Connection, Lsn, Mode, Row, ServerError, SystemId, quote_identifier, quote_literal, sqlstate};
use crate::vault::census::{Census, CountedDatabase, CountedTable};
use crate::{Error, ErrorKind, Result};

/// How much of a backup's time, and of the server, counting may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CensusOptions {
    /// The longest that all of it may take. It ends with the copying when that is sooner.
    pub budget: Duration,
    /// Tables of more bytes are not counted.
    pub table_bytes: u64,
    /// Tables that are counted at most, in all databases together: 2000, or fewer. Each takes some dozen bytes of the manifest.
    pub tables: usize,
    /// Only tables that stand still since they were vacuumed. Who counts the rows of others is often the first to read them, and notes
    /// in their pages which transactions have committed: with data checksums that is written, and a page of WAL each. A backup must not
    /// do that to a server.
    pub still_only: bool,
}

impl Default for CensusOptions {
    fn default() -> Self {
        Self { budget: Duration::from_secs(2), table_bytes: 64 << 20, tables: MOST_TABLES, still_only: true }
    }
}

/// As the format has it.
const MOST_TABLES: usize = 2000;

/// Bytes of a census. The manifest has to fit into one frame, and names may be long.
const MOST_BYTES: usize = 1 << 20;

/// What a statement on its way gets after the end, so that the server need not log a client that is gone.
const GRACE: Duration = Duration::from_millis(60);

/// How often transactions are looked at that had begun before the backup. Most end within milliseconds.
const POLL: Duration = Duration::from_millis(20);

/// How long a table is waited for that somebody has locked.
const LOCK_TIMEOUT: Duration = Duration::from_millis(50);

/// Tables that are counted with one message, when they are small.
const BATCH: usize = 16;

/// Pages of all tables of a batch.
const BATCH_PAGES: u64 = 128;

/// `lock_not_available`: the lock timeout.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// `query_canceled`: the statement timeout.
const QUERY_CANCELED: &str = "57014";

/// True of a table whose pages were nearly all visible to everybody when it was vacuumed, and of which hardly a row was touched since. A few
/// pages more than are filled is what PostgreSQL 16 and later extend a table by.
const STILL: &str = "(c.relallvisible > 0 AND c.relpages - c.relallvisible <= greatest(8, c.relpages / 20) \
                     AND pg_stat_get_ins_since_vacuum(c.oid) + pg_stat_get_mod_since_analyze(c.oid) <= 100)";

/// A census on its way. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Counting {
    end: Option<watch::Sender<()>>,
    task: JoinSet<Census>,
}

impl Counting {
    /// Begins to count, in a backup of a cluster that recovery will begin at `start`; counts nothing without `options`.
    pub(super) fn start(connection: &ConnInfo, options: Option<CensusOptions>, system: SystemId, start: Lsn) -> Self {
        let mut task = JoinSet::new();
        let Some(options) = options.filter(|options| !options.budget.is_zero()) else { return Self { end: None, task } };
        let (end, over) = watch::channel(());
        let taker = Taker {
            connection: connection.clone(),
            options,
            system,
            start,
            deadline: Instant::now() + options.budget,
            over: over.clone(),
            next_xid: None,
            room: MOST_BYTES,
            census: Census::default(),
            ahead: Ahead::default(),
        };
        let _ = task.spawn(take(taker, over));
        Self { end: Some(end), task }
    }

    /// Ends the counting; what was counted by now.
    pub(super) async fn end(mut self) -> Option<Census> {
        drop(self.end.take());
        match self.task.join_next().await? {
            Ok(census) => Some(census),
            Err(error) => {
                tracing::debug!(%error, "the rows of the tables were not counted");
                None
            }
        }
    }
}

async fn take(mut taker: Taker, mut ended: watch::Receiver<()>) -> Census {
    let deadline = taker.deadline;
    let hard_end = async {
        tokio::select! {
            _ = ended.changed() => {}
            () = sleep_until(deadline) => {}
        }
        sleep(GRACE).await;
    };
    // What was counted stays with the taker, however it ends.
    tokio::select! {
        biased;
        () = taker.run() => {}
        () = hard_end => tracing::debug!("a statement that counts rows was left behind"),
    }
    let Taker { mut census, ahead, .. } = taker;
    census.leave_out("time", ahead.tables);
    census.leave_out("databases", ahead.databases);
    tracing::debug!(tables = census.tables(), left_out = ?census.left_out, "counted the rows of tables");
    census
}

/// What was listed and not counted yet.
#[derive(Debug, Default)]
struct Ahead {
    databases: u64,
    /// Of the database that is being counted.
    tables: u64,
}

/// A table to count.
#[derive(Debug, Clone)]
struct Listed {
    schema: String,
    name: String,
    oid: u32,
    pages: u64,
}

#[derive(Debug)]
struct Taker {
    connection: ConnInfo,
    options: CensusOptions,
    system: SystemId,
    start: Lsn,
    deadline: Instant,
    /// The sender is dropped when the copying is over.
    over: watch::Receiver<()>,
    /// The next transaction at the checkpoint that the backup starts from, when that is known.
    next_xid: Option<u64>,
    /// Bytes that the census may still grow by.
    room: usize,
    census: Census,
    ahead: Ahead,
}

impl Taker {
    async fn run(&mut self) {
        let databases = match self.databases().await {
            Ok(databases) => databases,
            Err(error) => {
                tracing::debug!(%error, "the databases cannot be listed, so no rows are counted");
                return;
            }
        };
        self.ahead.databases = databases.len() as u64;
        for (name, oid) in databases {
            if self.is_over(self.deadline) {
                return;
            }
            // What one leaves of its share, the others get.
            let parts = u32::try_from(self.ahead.databases).unwrap_or(u32::MAX).max(1);
            let until = Instant::now() + self.deadline.saturating_duration_since(Instant::now()) / parts;
            let before = self.census.databases.len();
            let counted = self.database(&name, oid, until).await;
            let reason = if counted.is_ok() { "time" } else { "failed" };
            self.census.leave_out(reason, std::mem::take(&mut self.ahead.tables));
            self.ahead.databases -= 1;
            if let Err(error) = counted {
                tracing::debug!(database = name, %error, "rows were not counted");
                self.census.leave_out("databases", u64::from(self.census.databases.len() == before));
            }
        }
    }

    /// True when nothing more is to be begun.
    fn is_over(&self, until: Instant) -> bool {
        self.over.has_changed().is_err() || Instant::now() >= until
    }

    async fn connect(&self, database: Option<&str>, until: Instant) -> Result<Connection> {
        let mut info = self.connection.clone();
        if let Some(database) = database {
            info.dbname = Some(database.to_owned());
        }
        let mut connection = Connection::connect(&info, Mode::Sql).await?;
        let left = until.saturating_duration_since(Instant::now()).max(POLL).as_millis();
        let lock = LOCK_TIMEOUT.as_millis();
        let _ = connection
            .simple_query(&format!(
                "SET search_path = pg_catalog; SET statement_timeout = {left}; SET lock_timeout = {lock}; SET row_security = off; \
                 SET max_parallel_workers_per_gather = 0; SET jit = off; \
                 SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off"
            ))
            .await?;
        Ok(connection)
    }

    /// The databases that can be looked into; before, the checkpoint that the backup starts from.
    async fn databases(&mut self) -> Result<Vec<(String, u32)>> {
        let mut connection = self.connect(None, self.deadline).await?;
        match connection.query_one("SELECT redo_lsn, next_xid FROM pg_control_checkpoint()").await {
            Ok(row) if row.required(0)?.parse() == Ok(self.start) => self.next_xid = full_xid(row.required(1)?),
            // A later checkpoint has taken its place by now; what the one of the backup said is not known.
            Ok(_) => tracing::debug!("the checkpoint that the backup starts from is not the last one any more"),
            Err(error) => tracing::debug!(%error, "the checkpoint that the backup starts from cannot be asked for"),
        }
        self.wait_for_older(&mut connection).await?;
        let sets = connection
            .simple_query(
                "SELECT datname, oid, has_database_privilege(oid, 'CONNECT') FROM pg_database \
                 WHERE datallowconn AND datconnlimit <> -2 AND datname <> 'template0' ORDER BY oid",
            )
            .await?;
        let mut databases = Vec::new();
        for row in sets.iter().flat_map(|set| &set.rows) {
            match (row.required(0), row.required(2)) {
                (Ok(name), Ok("t")) => databases.push((name.to_owned(), number(row, 1)?)),
                _ => self.census.leave_out("databases", 1),
            }
        }
        connection.close().await;
        Ok(databases)
    }

    /// Waits a moment for the transactions that had begun before the backup.
    async fn wait_for_older(&self, connection: &mut Connection) -> Result<()> {
        let Some(next_xid) = self.next_xid else { return Ok(()) };
        let until = Instant::now() + self.options.budget / 4;
        while !self.is_over(until) {
            let row = connection.query_one("SELECT pg_snapshot_xmin(pg_current_snapshot())").await?;
            if number::<u64>(&row, 0)? >= next_xid {
                break;
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Counts the tables of a database.
    async fn database(&mut self, name: &str, oid: u32, until: Instant) -> Result<()> {
        let mut connection = self.connect(Some(name), until).await?;
        let _ = connection.simple_query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        // The snapshot is there before the first function of the statement runs.
        let row = connection
            .query_one(
                "SELECT pg_snapshot_xmin(pg_current_snapshot()), pg_is_in_recovery(), \
                 CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END, \
                 (SELECT system_identifier FROM pg_control_system())",
            )
            .await?;
        if row.required(3)? != self.system.to_string() {
            return Err(protocol("another server answered than the one that is backed up"));
        }
        let xmin: u64 = number(&row, 0)?;
        let position: Lsn = number(&row, 2)?;
        // A standby shows a transaction a moment before it says that it has replayed its record, the one behind the position.
        let lsn = if row.required(1)? == "t" { position.advance(1) } else { position };
        let settled = self.next_xid.is_some_and(|next| xmin >= next);
        let tables = self.list(&mut connection).await?;
        self.ahead.tables = tables.len() as u64;
        let counted = CountedDatabase { name: name.to_owned(), oid, settled, lsn, tables: Vec::new() };
        if !self.takes_room_for(&counted) {
            return Err(protocol("there is no room for more databases"));
        }
        self.census.databases.push(counted);
        let _ = connection.simple_query("SAVEPOINT counted").await?;
        let mut rest = tables.as_slice();
        while !rest.is_empty() && !self.is_over(until) {
            let (now, later) = rest.split_at_checked(batch(rest)).unwrap_or((rest, &[]));
            rest = later;
            if self.count(&mut connection, now).await.is_err() {
                // One of them failed, and the answers of the others are lost with it.
                for table in now {
                    if self.is_over(until) {
                        break;
                    }
                    let _ = connection.simple_query("ROLLBACK TO SAVEPOINT counted").await?;
                    if let Err(error) = self.count(&mut connection, std::slice::from_ref(table)).await {
                        tracing::debug!(database = name, table = table.name, %error, "rows of a table were not counted");
                        self.ahead.tables -= 1;
                        self.census.leave_out(reason(&error), 1);
                    }
                }
                let _ = connection.simple_query("ROLLBACK TO SAVEPOINT counted").await?;
            }
        }
        connection.close().await;
        Ok(())
    }

    /// The tables to count, small ones first.
    async fn list(&mut self, connection: &mut Connection) -> Result<Vec<Listed>> {
        let left = self.options.tables.min(MOST_TABLES).saturating_sub(self.census.tables());
        let all = format!(
            "(SELECT n.nspname, c.relname, c.oid, c.relpages, \
              c.relpages::bigint * current_setting('block_size')::bigint <= {} AS fits, \
              {} AS still, \
              has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AND NOT row_security_active(c.oid) AS may \
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
              WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND c.relam = (SELECT oid FROM pg_am WHERE amname = 'heap') \
              AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')) AS t",
            self.options.table_bytes,
            if self.options.still_only { STILL } else { "true" }
        );
        let sets = connection
            .simple_query(&format!(
                "SELECT count(*) FILTER (WHERE NOT may), count(*) FILTER (WHERE may AND NOT fits), \
                 count(*) FILTER (WHERE may AND fits AND still), count(*) FILTER (WHERE may AND fits AND NOT still) FROM {all}; \
                 SELECT nspname, relname, oid, relpages FROM {all} WHERE may AND fits AND still ORDER BY relpages, oid LIMIT {left}"
            ))
            .await?;
        let [counts, listed] = sets.as_slice() else { return Err(protocol("two answers were expected")) };
        let counts = counts.rows.first().ok_or_else(|| protocol("a row was expected"))?;
        self.census.leave_out("right", number(counts, 0)?);
        self.census.leave_out("large", number(counts, 1)?);
        self.census.leave_out("many", number::<u64>(counts, 2)?.saturating_sub(listed.rows.len() as u64));
        self.census.leave_out("changing", number(counts, 3)?);
        let mut tables = Vec::with_capacity(listed.rows.len());
        for row in &listed.rows {
            match (row.required(0), row.required(1)) {
                (Ok(schema), Ok(name)) => {
                    let (schema, name) = (schema.to_owned(), name.to_owned());
                    tables.push(Listed { schema, name, oid: number(row, 2)?, pages: number(row, 3).unwrap_or(0) });
                }
                // A name that is not UTF-8 has no place in a manifest.
                _ => self.census.leave_out("failed", 1),
            }
        }
        Ok(tables)
    }

    /// Counts tables with one message; all of them or none.
    async fn count(&mut self, connection: &mut Connection, tables: &[Listed]) -> Result<()> {
        let sql: String = tables.iter().map(|table| statement(table, self.options.table_bytes)).collect();
        let sets = connection.simple_query(&sql).await?;
        let rows: Vec<&Row> = sets.iter().filter_map(|set| set.rows.first()).collect();
        if rows.len() != tables.len() {
            return Err(protocol("a row for each table was expected"));
        }
        let mut counted = Vec::with_capacity(tables.len());
        for (table, row) in tables.iter().zip(rows) {
            // Renamed meanwhile: what was counted is another table.
            let is_it = row.text(0)?.and_then(|oid| oid.parse().ok()) == Some(table.oid);
            counted.push(match (row.text(2)?, is_it) {
                (Some(rows), true) => Ok(CountedTable {
                    schema: table.schema.clone(),
                    name: table.name.clone(),
                    oid: table.oid,
                    filenode: number(row, 1)?,
                    rows: rows.parse().map_err(|_| protocol("a number of rows was expected"))?,
                }),
                (None, true) => Err("large"),
                (_, false) => Err("failed"),
            });
        }
        for counted in counted {
            self.ahead.tables -= 1;
            let counted = counted.and_then(|table| if self.takes_room_for(&table) { Ok(table) } else { Err("many") });
            match (counted, self.census.databases.last_mut()) {
                (Ok(table), Some(database)) => database.tables.push(table),
                (Err(reason), _) => self.census.leave_out(reason, 1),
                (Ok(_), None) => {}
            }
        }
        Ok(())
    }

    fn takes_room_for(&mut self, more: &impl serde::Serialize) -> bool {
        // With a comma.
        let bytes = serde_json::to_vec(more).map_or(usize::MAX, |json| json.len() + 1);
        let left = self.room.checked_sub(bytes);
        self.room = left.unwrap_or(self.room);
        left.is_some()
    }
}

/// How many of the first tables are counted with one message, one at least.
fn batch(tables: &[Listed]) -> usize {
    let mut pages = 0u64;
    let fits = |table: &&Listed| {
        pages = pages.saturating_add(table.pages);
        pages <= BATCH_PAGES
    };
    tables.iter().take(BATCH).take_while(fits).count().max(1)
}

/// Locks the table, asks for its oid and file, counts it when it is not too large (its size in the catalog may be old), and lets go.
fn statement(table: &Listed, most: u64) -> String {
    let name = format!("{}.{}", quote_identifier(&table.schema), quote_identifier(&table.name));
    format!(
        "SELECT r::oid, pg_relation_filenode(r), CASE WHEN pg_relation_size(r) <= {most} THEN (SELECT count(*) FROM ONLY {name}) END \
         FROM to_regclass({}) AS r; ROLLBACK TO SAVEPOINT counted;",
        quote_literal(&name)
    )
}

/// The word under which a table is counted that was not.
fn reason(error: &Error) -> &'static str {
    match ServerError::of(error).map(|error| error.sqlstate.as_str()) {
        Some(LOCK_NOT_AVAILABLE) => "locked",
        Some(QUERY_CANCELED) => "time",
        Some(sqlstate::INSUFFICIENT_PRIVILEGE) => "right",
        _ => "failed",
    }
}

/// `epoch:xid`, as `pg_control_checkpoint` prints it, as one number.
fn full_xid(text: &str) -> Option<u64> {
    let (epoch, xid) = text.split_once(':')?;
    Some(u64::from(epoch.parse::<u32>().ok()?) << 32 | u64::from(xid.parse::<u32>().ok()?))
}

fn number<T: std::str::FromStr>(row: &Row, column: usize) -> Result<T> {
    let text = row.required(column)?;
    text.parse().map_err(|_| protocol(&format!("`{text}` is not what was expected")))
}

fn protocol(why: &str) -> Error {
    Error::new(ErrorKind::Source, "source.protocol", format!("while rows were counted: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, pages: u64) -> Listed {
        Listed { schema: "a b".into(), name: name.into(), oid: 1, pages }
    }

    #[test]
    fn transactions_are_numbered_over_wraps() {
        assert_eq!(full_xid("0:745"), Some(745));
        assert_eq!(full_xid("3:4294967295"), Some((3 << 32) + u64::from(u32::MAX)));
        for broken in ["", "745", ":", "1:", "-1:5", "1:4294967296", "1:2:3"] {
            assert_eq!(full_xid(broken), None, "{broken}");
        }
    }

    #[test]
    fn batches_are_small() {
        let tables: Vec<Listed> = [1, 0, 100, 27, 1, 5000, 1].map(|pages| listed("t", pages)).into();
        assert_eq!(batch(&tables), 4);
        assert_eq!(batch(&tables[4..]), 1);
        assert_eq!(batch(&tables[5..]), 1, "a large one alone");
        assert_eq!(batch(&vec![listed("t", 0); 50]), BATCH);
    }

    #[test]
    fn hostile_names_stay_within_their_quotes() {
        let sql = statement(&listed("x\"; DROP TABLE 'y", 1), 7);
        assert!(sql.contains("FROM ONLY \"a b\".\"x\"\"; DROP TABLE 'y\")"), "{sql}");
        assert!(sql.contains("to_regclass('\"a b\".\"x\"\"; DROP TABLE ''y\"')"), "{sql}");
    }

    #[tokio::test]
    async fn nothing_is_counted_without_options_or_time() {
        let connection = ConnInfo::parse("host=/nonexistent user=x", &|_| None).unwrap();
        for options in [None, Some(CensusOptions { budget: Duration::ZERO, ..CensusOptions::default() })] {
            assert_eq!(Counting::start(&connection, options, SystemId(1), Lsn(0)).end().await, None);
        }
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_reached_is_no_error() {
        let connection = ConnInfo::parse("host=/nonexistent user=x", &|_| None).unwrap();
        let counting = Counting::start(&connection, Some(CensusOptions::default()), SystemId(1), Lsn(0));
        assert_eq!(counting.end().await, Some(Census::default()));
    }
}
