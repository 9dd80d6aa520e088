//! Asking the server, now and then, what it keeps for the slot.

use std::path::PathBuf;
use std::time::Duration;

use super::monitor::{Monitor, StreamEvent};
use super::retention::{Pressure, Retention};
use crate::postgres::{ConnInfo, Connection, Mode, quote_literal};
use crate::{Error, ErrorKind, Result};

/// How often the server is asked.
const EVERY: Duration = Duration::from_secs(10);

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often the same warning is repeated.
const REPEAT: Duration = Duration::from_secs(300);

/// Asks the server for ever; what cannot be asked is left out, and no reason to stop archiving.
pub(super) async fn watch(connection: ConnInfo, slot: String, pg_wal: Option<PathBuf>, monitor: Monitor) {
    let mut told = (Pressure::Low, tokio::time::Instant::now());
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned = false;
    loop {
        let _ = every.tick().await;
        // A session that stayed would keep a smart shutdown waiting for it.
        let asking = async {
            let mut session = Connection::connect(&connection, Mode::Sql).await?;
            let answer = ask(&mut session, &slot).await;
            session.close().await;
            answer
        };
        let asked = tokio::time::timeout(PATIENCE, asking).await;
        let asked = asked.unwrap_or_else(|_| Err(Error::new(ErrorKind::Source, "source.timeout", "PostgreSQL has not answered")));
        let retention = asked.unwrap_or_else(|error| {
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!(%error, "what the slot keeps is not known: asking needs a connection to the database as well");
            }
            None
        });
        if retention.is_none() {
            monitor.update(|state| state.retention = None);
        }
        let Some(mut retention) = retention else { continue };
        retention.disk_free = pg_wal.as_deref().and_then(free);
        monitor.update(|state| state.retention = Some(retention));
        let pressure = retention.pressure();
        if pressure > told.0 || (pressure > Pressure::Low && told.1.elapsed() >= REPEAT) {
            told.1 = tokio::time::Instant::now();
            monitor.tell(StreamEvent::Retained(retention));
        }
        told.0 = pressure;
    }
}

/// `None` when there is no such slot.
async fn ask(session: &mut Connection, slot: &str) -> Result<Option<Retention>> {
    let sql = format!(
        "SELECT pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, \
         restart_lsn)::bigint, safe_wal_size, wal_status IS DISTINCT FROM 'lost', \
         (SELECT setting::bigint * 1048576 FROM pg_settings WHERE name = 'max_slot_wal_keep_size') \
         FROM pg_replication_slots WHERE slot_name = {}",
        quote_literal(slot)
    );
    let answers = session.simple_query(&sql).await?;
    let Some(row) = answers.first().and_then(|answer| answer.rows.first()) else { return Ok(None) };
    let number = |column| Ok::<_, crate::Error>(row.text(column)?.and_then(|text| text.parse::<i64>().ok()));
    let bytes = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
    Ok(Some(Retention {
        retained: bytes(number(0)?).unwrap_or(0),
        limit: bytes(number(3)?),
        // Beyond the limit it is negative, or unknown.
        safe: bytes(number(3)?).map(|_| bytes(number(1).ok().flatten()).unwrap_or(0)),
        disk_free: None,
        held: row.text(2)? == Some("t"),
    }))
}

/// Free bytes of a directory's file system.
fn free(directory: &std::path::Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
