//! How much WAL the server keeps for the slot, and how long that can go on.
//!
//! While the store is down the slot holds WAL back: on the server's disk, until `max_slot_wal_keep_size` is reached, or the disk is
//! full. The first loses WAL, the second stops the server. Both are told long before.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::monitor::{Monitor, StreamEvent};
use crate::Result;
use crate::postgres::{ConnInfo, Connection, Mode, quote_literal};

/// How often the server is asked.
const EVERY: Duration = Duration::from_secs(10);

/// How often the same warning is repeated.
const REPEAT: Duration = Duration::from_secs(300);

/// What the server keeps for the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Retention {
    /// Bytes of WAL between the slot's position and the server's.
    pub retained: u64,
    /// `max_slot_wal_keep_size` in bytes, when there is a limit.
    pub limit: Option<u64>,
    /// Bytes that can still be written before the slot may lose WAL (`safe_wal_size`), when there is a limit.
    pub safe: Option<u64>,
    /// Free bytes of the disk of `pg_wal`, when that is on this machine.
    pub disk_free: Option<u64>,
    /// False when the server has given the slot's WAL up.
    pub held: bool,
}

/// How serious a [`Retention`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pressure {
    /// No cause for concern.
    Low,
    /// Half of what the limit or the disk allows is used.
    Warning,
    /// Four fifths of it are.
    Critical,
    /// The server has given WAL up that is not in the vault.
    Lost,
}

impl Retention {
    /// How serious it is.
    pub fn pressure(&self) -> Pressure {
        if !self.held {
            return Pressure::Lost;
        }
        let used = |free: u64| self.retained.saturating_mul(100) / self.retained.saturating_add(free).max(1);
        let room = self.safe.into_iter().chain(self.disk_free).min();
        match room.map_or(0, used) {
            80.. => Pressure::Critical,
            50.. => Pressure::Warning,
            _ => Pressure::Low,
        }
    }
}

/// Asks the server for ever; what cannot be asked is left out, and no reason to stop archiving.
pub(super) async fn watch(connection: ConnInfo, slot: String, pg_wal: Option<PathBuf>, monitor: Monitor) {
    let mut told = (Pressure::Low, tokio::time::Instant::now());
    let mut session = None;
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned = false;
    loop {
        let _ = every.tick().await;
        let asked = match session.take() {
            Some(session) => Ok(session),
            None => Connection::connect(&connection, Mode::Sql).await,
        };
        let asked = match asked {
            Ok(mut connected) => ask(&mut connected, &slot).await.map(|retention| (connected, retention)),
            Err(error) => Err(error),
        };
        let retention = match asked {
            Ok((connected, retention)) => {
                session = Some(connected);
                retention
            }
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(%error, "what the slot keeps is not known: asking needs a connection to the database as well");
                }
                monitor.update(|state| state.retention = None);
                continue;
            }
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_limit_are_told_long_before() {
        let of = |retained, safe, disk_free| Retention { retained, limit: safe, safe, disk_free, held: true }.pressure();
        assert_eq!(of(1 << 40, None, None), Pressure::Low);
        assert_eq!(of(49, Some(51), None), Pressure::Low);
        assert_eq!(of(50, Some(50), Some(1000)), Pressure::Warning);
        assert_eq!(of(50, Some(1000), Some(50)), Pressure::Warning);
        assert_eq!(of(80, Some(20), None), Pressure::Critical);
        assert_eq!(of(80, Some(0), None), Pressure::Critical);
        assert_eq!(of(0, Some(0), Some(0)), Pressure::Low);
        let lost = Retention { retained: 0, limit: None, safe: None, disk_free: None, held: false };
        assert_eq!(lost.pressure(), Pressure::Lost);
    }
}
