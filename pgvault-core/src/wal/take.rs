//! Making sure that a stretch of WAL is in the vault: waiting for whoever archives, else fetching it from the server.
//!
//! A base backup is worth nothing without the WAL written while it ran. Where nothing archives, the backup takes that
//! WAL itself, over the replication protocol, from the slot that it opened before it began.

use std::time::Duration;

use super::assemble::Assembler;
use super::catalog::{self, Catalog};
use super::{deposit, object};
use crate::postgres::{Connection, Lsn, SegmentSize, TimelineHistory, TimelineId, WalFileName, WalMessage, WalSegNo};
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// How often the vault is asked while waiting for an archiver.
const POLL: Duration = Duration::from_millis(250);

/// Time that the server gets to complete the last segment before it is stored as a part.
const COMPLETE: Duration = Duration::from_secs(2);

/// Returns once the WAL from `from` to `to` of `timeline` is in the vault.
///
/// Waits up to `patience` for others to archive it, then streams what is missing from `connection`.
///
/// # Errors
/// When the server no longer has the WAL, or the store fails.
pub async fn ensure(
    cluster: &Cluster,
    connection: &mut Connection,
    size: SegmentSize,
    timeline: TimelineId,
    from: Lsn,
    to: Lsn,
    patience: Duration,
) -> Result<()> {
    let history = ensure_history(cluster, connection, timeline).await?;
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let end = Catalog::load(cluster, size, from).await?.contiguous_end(&history, from);
        if end >= to {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            return stream(cluster, connection, size, timeline, end, to).await;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Makes sure that the timeline's history file is in the vault, and reads it.
///
/// # Errors
/// When the server does not have it, or the store fails.
pub async fn ensure_history(cluster: &Cluster, connection: &mut Connection, timeline: TimelineId) -> Result<TimelineHistory> {
    if timeline == TimelineId(1) {
        return Ok(TimelineHistory::root(timeline));
    }
    if let Some(history) = catalog::read_history(cluster, timeline).await? {
        return Ok(history);
    }
    let file = connection.timeline_history(timeline).await?.ok_or_else(|| {
        Error::new(ErrorKind::Source, "source.no_history", format!("the server has no history file of its timeline {timeline}"))
            .with_hint("restore the file into pg_wal, or take a new base backup after the next promotion")
    })?;
    put_history(cluster, timeline, &file.content).await?;
    let text = String::from_utf8_lossy(&file.content);
    TimelineHistory::parse(timeline, &text).map_err(|e| Error::new(ErrorKind::Source, "source.history", e.to_string()))
}

/// As [`ensure_history`], and the same for every timeline it descends from, as far as the server has their files.
///
/// A server that recovers to the newest timeline looks for one history after the other and stops at the first that is not there, so
/// one of a timeline that nothing was ever streamed on is needed as well (H7).
///
/// # Errors
/// As [`ensure_history`].
pub async fn ensure_histories(cluster: &Cluster, connection: &mut Connection, timeline: TimelineId) -> Result<TimelineHistory> {
    let history = ensure_history(cluster, connection, timeline).await?;
    for ancestor in history.ancestors() {
        match ensure_history(cluster, connection, ancestor.timeline).await {
            Err(error) if error.code() == "source.no_history" => {
                tracing::warn!(timeline = %ancestor.timeline, "neither the vault nor the server has this timeline's history file");
            }
            other => drop(other?),
        }
    }
    Ok(history)
}

/// Stores a history file.
///
/// # Errors
/// When the store fails or holds another one.
pub async fn put_history(cluster: &Cluster, timeline: TimelineId, content: &[u8]) -> Result<()> {
    for sealed in object::seal_file(cluster, WalFileName::History(timeline), content)? {
        let _ = object::put(cluster, &sealed, content).await?;
    }
    Ok(())
}

/// Streams from the segment of `from` until `to` is stored.
async fn stream(
    cluster: &Cluster,
    connection: &mut Connection,
    size: SegmentSize,
    timeline: TimelineId,
    from: Lsn,
    to: Lsn,
) -> Result<()> {
    let (mut assembler, start) = Assembler::new(timeline, size, WalSegNo::containing(from, size).start(size));
    let mut stream = connection.start_replication(None, start, timeline).await.map_err(|e| {
        e.context(format_args!("fetch WAL from {start} on")).with_hint(
            "the server has removed WAL that the backup needs; set up `wal push` or `wal stream`, or raise wal_keep_size",
        )
    })?;
    let mut stored = start;
    let mut complete_by = None;
    while stored < to {
        // Once everything needed has arrived, the server gets a moment to send the rest of the segment.
        let message = match complete_by {
            None => stream.next().await?,
            Some(deadline) => match tokio::time::timeout_at(deadline, stream.next()).await {
                Ok(message) => message?,
                Err(_) => break,
            },
        };
        match message {
            WalMessage::Data { start, bytes, .. } => {
                for piece in assembler.add(start, &bytes)? {
                    stored = piece.end;
                    deposit::store(cluster, piece).await?;
                }
            }
            WalMessage::Keepalive { .. } => {}
            WalMessage::EndOfTimeline { .. } => break,
        }
        if assembler.position() >= to {
            let _ = complete_by.get_or_insert_with(|| tokio::time::Instant::now() + COMPLETE);
        }
    }
    while stored < to
        && let Some(piece) = assembler.flush()?
    {
        stored = piece.end;
        deposit::store(cluster, piece).await?;
    }
    if stored < to {
        return Err(Error::new(ErrorKind::Source, "source.wal_ended", format!("the server's WAL ended at {stored}, before {to}")));
    }
    Ok(())
}
