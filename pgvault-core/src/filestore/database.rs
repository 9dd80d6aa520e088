//! What the database of an Odoo instance says.
//!
//! A role needs `CONNECT` and `SELECT` on `ir_attachment`, `ir_config_parameter` and `ir_module_module`, and had better have it on
//! `ir_cron` and `ir_model_data`. Names are looked up in `pg_catalog` and `public` alone.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};

use jiff::Timestamp;

use super::instance::Database;
use super::names::{Place, place, resolve};
use crate::postgres::{ConnInfo, Connection, Lsn, Mode, SystemId, TimelineId, quote_literal};
use crate::{Error, ErrorKind, Result};

/// Rows that are fetched at once.
const PAGE: usize = 10_000;

/// A point in the server's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The timeline.
    pub timeline: TimelineId,
    /// What is durable (on a standby: replayed) lies before it.
    pub lsn: Lsn,
    /// The server's time.
    pub at: Timestamp,
}

/// A connection to an Odoo database.
#[derive(Debug)]
pub struct Odoo {
    sql: Connection,
    /// Which one it is.
    pub database: Database,
    /// True of a copy that must not do anything in the world.
    pub neutralised: bool,
    /// Where new attachments go: `file`, `db`, or a scheme.
    pub location: String,
}

fn not_odoo(name: &str) -> Error {
    Error::new(ErrorKind::Source, "odoo.none", format!("database {name} is not Odoo's: it has no public.ir_attachment"))
        .with_hint("check [cluster.NAME.odoo] databases, and that the role may read it")
}

impl Odoo {
    /// Connects to a database; `Ok(None)` when it is not Odoo's.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when it cannot be reached, or the role may not read what it must; [`ErrorKind::Conflict`] when it belongs to another cluster.
    pub async fn connect(connection: &ConnInfo, database: &str, system: SystemId) -> Result<Option<Self>> {
        let to = ConnInfo { dbname: Some(database.to_owned()), ..connection.clone() };
        let mut sql = Connection::connect(&to, Mode::Sql).await?;
        let _ = sql.simple_query("SET search_path = pg_catalog").await?;
        let row = sql
            .query_one(
                "SELECT (SELECT oid FROM pg_database WHERE datname = current_database()), \
                 to_regclass('public.ir_attachment') IS NOT NULL AND to_regclass('public.ir_module_module') IS NOT NULL, \
                 (SELECT system_identifier FROM pg_control_system())",
            )
            .await?;
        let (oid, is_odoo, found) = (row.required(0)?.to_owned(), row.required(1)? == "t", row.required(2)?.to_owned());
        if found != system.to_string() {
            return Err(Error::new(
                ErrorKind::Conflict,
                "source.foreign",
                format!("database {database} belongs to a server with system identifier {found}, not {system}"),
            )
            .with_hint("check the connection settings"));
        }
        if !is_odoo {
            sql.close().await;
            return Ok(None);
        }
        let parameters = parameters(&mut sql).await.map_err(|e| e.context(format!("database {database}")))?;
        let series = sql.query_one("SELECT max(latest_version) FROM public.ir_module_module WHERE name = 'base'").await;
        let series = series.ok().and_then(|row| row.text(0).ok().flatten().map(str::to_owned));
        let uuid = parameters.get("database.uuid").cloned().ok_or_else(|| {
            Error::new(ErrorKind::Source, "odoo.uuid", format!("database {database} has no database.uuid in ir_config_parameter"))
                .with_hint("let Odoo start on it once: it writes one")
        })?;
        let oid = oid.parse().map_err(|_| not_odoo(database))?;
        Ok(Some(Self {
            sql,
            database: Database { name: database.to_owned(), oid, uuid, series },
            neutralised: parameters.get("database.is_neutralized").is_some_and(|value| value.eq_ignore_ascii_case("true")),
            location: parameters.get("ir_attachment.location").cloned().unwrap_or_else(|| "file".into()),
        }))
    }

    /// As [`Odoo::connect`], of a database that must be Odoo's.
    ///
    /// # Errors
    /// As [`Odoo::connect`]; [`ErrorKind::Source`] when it is not.
    pub async fn expect(connection: &ConnInfo, database: &str, system: SystemId) -> Result<Self> {
        Self::connect(connection, database, system).await?.ok_or_else(|| not_odoo(database))
    }

    /// Where the server is. What committed before it has its files in the filestore.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn position(&mut self) -> Result<Position> {
        let row = self
            .sql
            .query_one(
                "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END, \
                 CASE WHEN pg_is_in_recovery() THEN (SELECT greatest(min_recovery_end_timeline, \
                 (SELECT timeline_id FROM pg_control_checkpoint())) FROM pg_control_recovery())::text \
                 ELSE substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8) END, pg_is_in_recovery(), \
                 (extract(epoch FROM clock_timestamp()) * 1000)::bigint",
            )
            .await?;
        let standby = row.required(2)? == "t";
        let wrong = |what: &str| Error::new(ErrorKind::Source, "odoo.position", format!("the server does not say its {what}"));
        let timeline = u32::from_str_radix(row.required(1)?, if standby { 10 } else { 16 }).map_err(|_| wrong("timeline"))?;
        let at = row.required(3)?.parse().ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).ok_or_else(|| wrong("time"))?;
        let lsn = row.text(0)?.and_then(|lsn| lsn.parse().ok()).ok_or_else(|| wrong("position"))?;
        Ok(Position { timeline: TimelineId(timeline), lsn, at })
    }

    /// When Odoo's jobs of automatic vacuuming last began, in milliseconds of Unix time; the garbage collector of files is one of them, and
    /// this is written when all of them have ended. None when it is not known.
    pub async fn collector_ran(&mut self) -> Option<i64> {
        let sql = "SELECT (extract(epoch FROM c.lastcall) * 1000)::bigint FROM public.ir_cron c JOIN public.ir_model_data d \
                   ON d.model = 'ir.cron' AND d.res_id = c.id WHERE d.module = 'base' AND d.name = 'autovacuum_job'";
        let row = self.sql.query_one(sql).await.ok()?;
        row.text(0).ok().flatten()?.parse().ok()
    }

    /// The highest id of an attachment.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn highest_id(&mut self) -> Result<i64> {
        let row = self.sql.query_one("SELECT coalesce(max(id), 0) FROM public.ir_attachment").await?;
        Ok(row.required(0)?.parse().unwrap_or(0))
    }

    /// The files that rows with an id above `above` refer to.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn names_above(&mut self, above: i64) -> Result<Vec<String>> {
        let sql = format!("SELECT DISTINCT store_fname FROM public.ir_attachment WHERE id > {above} AND store_fname IS NOT NULL");
        let sets = self.sql.simple_query(&sql).await?;
        let rows = sets.last().map(|set| set.rows.as_slice()).unwrap_or_default();
        let names = rows.iter().map(|row| row.required(0)).collect::<Result<Vec<_>>>()?;
        Ok(names.into_iter().filter(|name| place(name) == Place::Local).filter_map(resolve).collect())
    }

    /// How many attachments lie where, and their bytes: `local`, a scheme, `other`, `db`, `url`, ...
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn census(&mut self) -> Result<BTreeMap<String, (u64, u64)>> {
        let sql = "SELECT CASE WHEN store_fname ~ '^[0-9a-f]{2,3}/[0-9a-f]{40}$' THEN 'local' \
                   WHEN store_fname ~ '^[A-Za-z0-9_.+-]+://' THEN split_part(store_fname, '://', 1) WHEN store_fname IS NOT NULL THEN 'other' \
                   WHEN db_datas IS NOT NULL THEN 'db' ELSE coalesce(type, 'none') END, count(*), coalesce(sum(file_size), 0) \
                   FROM public.ir_attachment GROUP BY 1";
        let sets = self.sql.simple_query(sql).await?;
        let mut census = BTreeMap::new();
        for row in sets.last().map(|set| set.rows.as_slice()).unwrap_or_default() {
            let number = |column| -> Result<u64> { Ok(row.required(column)?.parse().unwrap_or(0)) };
            let _ = census.insert(row.required(0)?.to_owned(), (number(1)?, number(2)?));
        }
        Ok(census)
    }

    /// The modules that are installed, those within an upgrade or about to be removed too, and the version of each that the database has.
    ///
    /// # Errors
    /// When the server cannot be asked, or the role may not read them.
    pub async fn modules(&mut self) -> Result<BTreeMap<String, String>> {
        // Odoo calls the version in the database `latest_version`, and the one in the code `installed_version`.
        let sql = "SELECT name, coalesce(latest_version, '') FROM public.ir_module_module \
                   WHERE state IN ('installed', 'to upgrade', 'to remove')";
        let sets = self.sql.simple_query(sql).await?;
        let rows = sets.last().map(|set| set.rows.as_slice()).unwrap_or_default();
        rows.iter().map(|row| Ok((row.required(0)?.to_owned(), row.required(1)?.to_owned()))).collect()
    }

    /// The files below the filestore that rows refer to; see [`references`].
    ///
    /// # Errors
    /// As [`references`].
    pub async fn references(&mut self) -> Result<References> {
        references(&mut self.sql).await
    }

    /// The connection itself.
    pub fn sql(&mut self) -> &mut Connection {
        &mut self.sql
    }
}

async fn parameters(sql: &mut Connection) -> Result<BTreeMap<String, String>> {
    let keys = ["database.uuid", "database.create_date", "database.is_neutralized", "ir_attachment.location"];
    let list = keys.iter().map(|key| quote_literal(key)).collect::<Vec<_>>().join(", ");
    let mut sets = sql.simple_query(&format!("SELECT key, value FROM public.ir_config_parameter WHERE key IN ({list})")).await?;
    let rows = sets.pop().unwrap_or_default().rows;
    rows.iter().map(|row| Ok((row.required(0)?.to_owned(), row.text(1)?.unwrap_or_default().to_owned()))).collect()
}

/// The files below the filestore that rows refer to, as one snapshot sees them; written down beside, so that no transaction stays open
/// while files are read.
///
/// # Errors
/// When the server cannot be asked, or there is no room for the names.
pub async fn references(sql: &mut Connection) -> Result<References> {
    let mut references = References::new()?;
    let _ = sql
        .simple_query(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; DECLARE attachments NO SCROLL CURSOR FOR SELECT store_fname \
             FROM public.ir_attachment WHERE store_fname IS NOT NULL GROUP BY 1 ORDER BY store_fname COLLATE \"C\"",
        )
        .await?;
    loop {
        let mut sets = sql.simple_query(&format!("FETCH {PAGE} FROM attachments")).await?;
        let rows = sets.pop().unwrap_or_default().rows;
        if rows.is_empty() {
            break;
        }
        for row in &rows {
            references.add(row.required(0)?)?;
        }
    }
    let _ = sql.simple_query("ROLLBACK").await?;
    Ok(references)
}

/// The databases of a server that take connections, by name; templates are none of them.
///
/// # Errors
/// [`ErrorKind::Source`] when the server cannot be asked.
pub async fn databases(connection: &ConnInfo) -> Result<Vec<(String, u32)>> {
    let mut sql = Connection::connect(connection, Mode::Sql).await?;
    let found = sql
        .simple_query("SELECT datname, oid FROM pg_catalog.pg_database WHERE datallowconn AND datconnlimit <> -2 AND NOT datistemplate ORDER BY 1")
        .await?;
    let rows = found.last().map(|set| set.rows.as_slice()).unwrap_or_default();
    let names = rows.iter().map(|row| Ok((row.required(0)?.to_owned(), row.required(1)?.parse().unwrap_or(0)))).collect();
    sql.close().await;
    names
}

/// Names of files, sorted, in a temporary file.
#[derive(Debug)]
pub struct References {
    sorted: std::io::BufWriter<std::fs::File>,
    /// Names that lead to another path than they say; there are hardly any.
    odd: Vec<String>,
    /// Names of local files.
    pub local: u64,
    /// Names of objects elsewhere, by scheme.
    pub remote: BTreeMap<String, u64>,
    /// Names that lead nowhere.
    pub nowhere: u64,
    last: String,
}

impl References {
    fn new() -> Result<Self> {
        let file = tempfile::tempfile().map_err(|e| Error::io("make a file in", &std::env::temp_dir(), e))?;
        let sorted = std::io::BufWriter::new(file);
        Ok(Self { sorted, odd: Vec::new(), local: 0, remote: BTreeMap::new(), nowhere: 0, last: String::new() })
    }

    fn add(&mut self, name: &str) -> Result<()> {
        if let Place::Remote(scheme) = place(name) {
            *self.remote.entry(scheme.to_owned()).or_default() += 1;
            return Ok(());
        }
        let Some(path) = resolve(name) else {
            self.nowhere += 1;
            return Ok(());
        };
        self.local += 1;
        // The order is the server's word.
        if path != name || path.contains('\n') || path <= self.last {
            self.odd.push(path);
            return Ok(());
        }
        self.last.clone_from(&path);
        writeln!(self.sorted, "{path}").map_err(|e| Error::io("write to a file in", &std::env::temp_dir(), e))
    }

    /// The names in order, and after them the odd ones.
    ///
    /// # Errors
    /// When the file cannot be read again.
    pub fn read(self) -> Result<(impl Iterator<Item = Result<String>>, Vec<String>)> {
        use std::io::Seek;
        let failed = |e: std::io::Error| Error::io("read from a file in", &std::env::temp_dir(), e);
        let mut file = self.sorted.into_inner().map_err(|e| failed(e.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok((BufReader::new(file).lines().map(move |line| line.map_err(failed)), self.odd))
    }
}
