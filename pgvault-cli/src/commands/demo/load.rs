//! Clients that place orders, and what they know of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use jiff::Timestamp;
use pgvault_core::postgres::{ConnInfo, Connection, Lsn, Mode, ServerError};
use pgvault_core::{Error, ErrorKind, Result};
use serde::Serialize;
use tokio::sync::{RwLock, RwLockWriteGuard};
use tokio::task::JoinSet;

/// SQLSTATE of a query on a table that is gone.
const UNDEFINED_TABLE: &str = "42P01";

/// Orders that are there before the first client comes, so that the backup has something to read.
const EXISTING: u64 = 100_000;

/// Makes the table; gives the number of orders in it.
pub(super) async fn create_table(sql: &mut Connection) -> Result<u64> {
    let _ = sql
        .simple_query(&format!(
            "CREATE TABLE orders (
                 id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                 customer text NOT NULL,
                 amount numeric(10, 2) NOT NULL,
                 placed_at timestamptz NOT NULL DEFAULT clock_timestamp()
             );
             INSERT INTO orders (customer, amount)
             SELECT 'customer ' || n % 1000, (random() * 1000)::numeric(10, 2) FROM generate_series(1, {EXISTING}) n"
        ))
        .await?;
    Ok(EXISTING)
}

/// Everything that is in the table, reduced to what is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Orders {
    pub(super) rows: u64,
    pub(super) last: u64,
    pub(super) newest: String,
    pub(super) md5: String,
}

impl Orders {
    pub(super) async fn read(sql: &mut Connection) -> Result<Self> {
        // Times are part of the rows' text: both servers have to write them alike.
        let _ = sql.simple_query("SET timezone = 'UTC'").await?;
        let row = sql
            .query_one("SELECT count(*), max(id), max(placed_at), md5(string_agg(o::text, E'\\n' ORDER BY id)) FROM orders o")
            .await?;
        Ok(Self {
            rows: number(row.required(0)?)?,
            last: number(row.required(1)?)?,
            newest: row.required(2)?.to_owned(),
            md5: row.required(3)?.to_owned(),
        })
    }
}

/// The server's clock.
pub(super) async fn server_time(sql: &mut Connection) -> Result<Timestamp> {
    let row = sql.query_one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").await?;
    let micros = i64::try_from(number(row.required(0)?)?).unwrap_or(i64::MAX);
    Timestamp::from_microsecond(micros).map_err(|e| Error::new(ErrorKind::Source, "source.protocol", e.to_string()))
}

/// Ends the current WAL segment; gives the end of what was in it.
pub(super) async fn switch_segment(sql: &mut Connection) -> Result<Lsn> {
    let row = sql.query_one("SELECT pg_switch_wal()").await?;
    row.required(0)?.parse().map_err(|e| Error::new(ErrorKind::Source, "source.protocol", format!("{e}")))
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::new(ErrorKind::Source, "source.protocol", format!("`{text}` is not a number")))
}

/// Running clients. Each order is a transaction of its own.
pub(super) struct Load {
    /// Held for reading during each transaction.
    gate: Arc<RwLock<()>>,
    confirmed: Arc<AtomicU64>,
    clients: JoinSet<Result<()>>,
    existing: u64,
    began: Instant,
}

impl Load {
    pub(super) fn start(connection: &ConnInfo, clients: usize, existing: u64) -> Self {
        let (gate, confirmed) = (Arc::new(RwLock::new(())), Arc::new(AtomicU64::new(existing)));
        let mut running = JoinSet::new();
        for number in 0..clients {
            let _ = running.spawn(place_orders(connection.clone(), number, gate.clone(), confirmed.clone()));
        }
        Self { gate, confirmed, clients: running, existing, began: Instant::now() }
    }

    /// Orders in the table that the server has confirmed.
    pub(super) fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::SeqCst)
    }

    /// Orders per second, so far.
    pub(super) fn rate(&self) -> f64 {
        let placed = u32::try_from(self.confirmed() - self.existing).unwrap_or(u32::MAX);
        f64::from(placed) / self.began.elapsed().as_secs_f64()
    }

    /// Waits until no order is under way, and lets none begin before the guard is dropped.
    pub(super) async fn hold(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().await
    }

    /// Waits until the clients have noticed that the table is gone; gives the orders confirmed until then.
    pub(super) async fn end(mut self) -> Result<u64> {
        while let Some(ended) = self.clients.join_next().await {
            ended.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        }
        Ok(self.confirmed())
    }
}

async fn place_orders(connection: ConnInfo, client: usize, gate: Arc<RwLock<()>>, confirmed: Arc<AtomicU64>) -> Result<()> {
    let mut sql = Connection::connect(&connection, Mode::Sql).await?;
    let insert = format!("INSERT INTO orders (customer, amount) VALUES ('client {client}', (random() * 1000)::numeric(10, 2))");
    loop {
        let _under_way = gate.read().await;
        match sql.simple_query(&insert).await {
            Ok(_) => drop(confirmed.fetch_add(1, Ordering::SeqCst)),
            Err(error) if ServerError::of(&error).is_some_and(|e| e.sqlstate == UNDEFINED_TABLE) => {
                sql.close().await;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
}
