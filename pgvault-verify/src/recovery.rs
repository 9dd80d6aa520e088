//! From the start of the server until it pauses at its target.

pub(crate) mod feed;

use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgvault_core::Error;
use pgvault_core::postgres::{Connection, Lsn, Mode};
use pgvault_core::restore::plan::{Plan, Stop};
use pgvault_core::vault::drill::Point;
use serde_json::{Value, json};

use self::feed::Feed;
use crate::checks::Found;
use crate::runner::Running;

const POLL: Duration = Duration::from_millis(20);

/// A server that is at its target.
pub(crate) struct Recovered {
    pub(crate) sql: Connection,
    pub(crate) point: Point,
    /// From the start until it could be read.
    pub(crate) consistent_after: Duration,
    pub(crate) found: Found,
}

/// A recovery that did not get there.
pub(crate) struct Failed {
    pub(crate) message: String,
    pub(crate) evidence: Value,
}

/// Waits for a server to reach the target of the plan.
pub(crate) async fn recover(running: &mut dyn Running, plan: &Plan, feed: &Feed, limit: Duration) -> Result<Recovered, Failed> {
    let began = Instant::now();
    let mut sql: Option<(Connection, Duration)> = None;
    loop {
        if let Some(ended) = running.ended().await {
            let log = running.log_tail().await;
            return Err(explain(&ended.how, ended.out_of_memory, &log, feed, plan));
        }
        if sql.is_none()
            && let Ok(connection) = Connection::connect(&running.connection(), Mode::Sql).await
        {
            sql = Some((connection, began.elapsed()));
        }
        if let Some((mut connection, consistent_after)) = sql.take() {
            match state(&mut connection).await {
                Ok(state) if state.is_paused || !state.in_recovery => {
                    let log = running.log_tail().await;
                    if state.is_paused && log.contains("insufficient parameter settings") {
                        return Err(Failed {
                            message: "recovery paused because the copy is configured smaller than its original was".into(),
                            evidence: json!({ "log": log }),
                        });
                    }
                    return judge(connection, &state, plan, feed, consistent_after);
                }
                Ok(_) => sql = Some((connection, consistent_after)),
                // It ends, or restarts; the next round sees which.
                Err(error) => tracing::debug!(%error, "the copy does not answer"),
            }
        }
        if began.elapsed() >= limit {
            return Err(Failed {
                message: format!("recovery took longer than {} s", limit.as_secs()),
                evidence: json!({ "log": running.log_tail().await }),
            });
        }
        tokio::time::sleep(POLL).await;
    }
}

struct State {
    in_recovery: bool,
    is_paused: bool,
    replayed: Option<Lsn>,
    last_transaction: Option<Timestamp>,
}

async fn state(sql: &mut Connection) -> Result<State, Error> {
    let row = sql
        .query_one(
            "SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() END, \
             pg_last_wal_replay_lsn(), extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000",
        )
        .await?;
    let micros = row.text(3)?.and_then(|text| text.split('.').next()?.parse::<i64>().ok());
    Ok(State {
        in_recovery: row.required(0)? == "t",
        is_paused: row.text(1)? == Some("paused"),
        replayed: row.text(2)?.and_then(|lsn| lsn.parse().ok()),
        last_transaction: micros.and_then(|micros| Timestamp::from_microsecond(micros).ok()),
    })
}

/// Compares where the server is with where it should be.
fn judge(sql: Connection, state: &State, plan: &Plan, feed: &Feed, consistent_after: Duration) -> Result<Recovered, Failed> {
    let lsn = state.replayed.unwrap_or_default();
    let manifest = &plan.snapshot.manifest;
    let point = Point { lsn, timeline: plan.timeline, time: state.last_transaction };
    let gap = match &plan.stop {
        Stop::Time { time } => state.last_transaction.map(|last| time.duration_since(last).as_millis()),
        _ => None,
    };
    let evidence = json!({
        "stop": plan.stop,
        "reached": point,
        "target_minus_last_transaction_ms": gap,
        "segments": feed.served().segments.len(),
    });
    let is_there = match &plan.stop {
        Stop::Lsn { lsn: wanted, .. } => lsn >= *wanted,
        Stop::Time { time } => state.last_transaction.is_none_or(|last| last <= *time),
        Stop::Consistent | Stop::End => true,
    };
    if !state.in_recovery && plan.stop != Stop::End {
        return Err(Failed { message: format!("recovery ended at {lsn} without stopping at its target"), evidence });
    }
    if !is_there || lsn < manifest.stop_lsn {
        return Err(Failed { message: format!("the target was not reached: recovery stopped at {lsn}"), evidence });
    }
    let when = match (state.last_transaction, gap) {
        (Some(last), Some(gap)) => format!(", the last transaction at {last}, {gap} ms before the target"),
        (Some(last), None) => format!(", the last transaction at {last}"),
        (None, _) => ", no transaction ended after the backup".to_owned(),
    };
    let message = format!("reached {} at {lsn} on timeline {}{when}", plan.target, plan.timeline);
    Ok(Recovered { sql, point, consistent_after, found: Found::passed(message, evidence) })
}

/// Turns the end of a server into words.
fn explain(how: &str, out_of_memory: bool, log: &str, feed: &Feed, plan: &Plan) -> Failed {
    let trouble = feed.served().trouble;
    let message = if out_of_memory {
        format!(
            "the server ran out of memory during recovery: {how}; give the drill more (`drill.memory`), or smaller `shared_buffers`"
        )
    } else if let Some(trouble) = &trouble {
        format!("recovery needs WAL that cannot be had: {trouble}")
    } else if log.contains("recovery ended before configured recovery target was reached") {
        format!("the target {} was not reached: the WAL in the vault ends before it", plan.target)
    } else if log.contains("invalid pages") || log.contains("invalid page in block") {
        format!("recovery met a page that is damaged: {how}")
    } else {
        let last = log.lines().rev().find(|line| ["FATAL", "PANIC", "ERROR"].iter().any(|word| line.contains(word)));
        format!("the server ended during recovery: {how}{}", last.map(|line| format!("; {}", line.trim())).unwrap_or_default())
    };
    Failed { message, evidence: json!({ "ended": how, "out_of_memory": out_of_memory, "wal": trouble, "log": log }) }
}
