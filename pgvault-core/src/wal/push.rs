//! `archive_command`: finished files into the vault.
//!
//! PostgreSQL names one file, and counts on that one alone. After an outage thousands wait, and one process for each, which
//! opens the vault and sends one object, is slow. So a [`batch`] sends others that wait as well. Its answer is about the file
//! that was named; the others PostgreSQL names later, and finds them stored: that is seen from the digests in the stored
//! object's footer, without sending or reading the segment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use super::catalog::TimelineObjects;
use super::object::{self, WalName};
use crate::postgres::{SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Files that are sent at the same time besides the one that was named.
const AT_ONCE: u64 = 3;

/// Bytes of them that may be in memory, not compressed.
const MEMORY: u64 = 128 << 20;

/// How long the answer about the named file may wait for the others.
const PATIENCE: Duration = Duration::from_secs(60);

/// What became of a pushed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the vault because of this call.
    Stored,
    /// It was there already, with the same contents.
    AlreadyThere,
}

/// What a [`batch`] did.
#[derive(Debug)]
pub struct Batch {
    /// What became of the file that was named.
    pub asked: Result<Pushed>,
    /// What became of the others. One that was not finished in time is not among them.
    pub others: Vec<(PathBuf, Result<Pushed>)>,
}

/// Puts the file at `path` into the vault; returns only when it is durable there.
///
/// # Errors
/// [`ErrorKind::Conflict`] when it belongs to another cluster or differs from what is stored under its name;
/// [`ErrorKind::Usage`] when its name is not one that PostgreSQL archives.
pub async fn push(cluster: &Cluster, path: &Path) -> Result<Pushed> {
    send(cluster, path, false).await
}

/// As [`push`], and sends up to `limit - 1` other files that PostgreSQL has marked as ready beside it, oldest first.
///
/// What goes wrong with the others is told, and changes nothing about the one that was named; nor is it kept back when that one
/// cannot be stored (T4).
pub async fn batch(cluster: &Cluster, path: &Path, limit: u32) -> Batch {
    let mut others = Vec::new();
    let asked = {
        let asking = send(cluster, path, true);
        let sending = async {
            match waiting(cluster, path, limit).await {
                Ok((histories, rest)) => {
                    // Nobody can use a timeline's segments without its history.
                    for history in histories {
                        let sent = send(cluster, &history, true).await;
                        others.push((history, sent));
                    }
                    let size = rest.first().and_then(|path| Some(std::fs::metadata(path).ok()?.len())).unwrap_or(1);
                    let at_once = usize::try_from((MEMORY / size.max(1)).clamp(1, AT_ONCE)).unwrap_or(1);
                    let sends = rest.into_iter().map(|path| async move {
                        let sent = send(cluster, &path, true).await;
                        (path, sent)
                    });
                    let mut sends = futures::stream::iter(sends).buffer_unordered(at_once);
                    while let Some(sent) = sends.next().await {
                        others.push(sent);
                    }
                }
                Err(error) => tracing::warn!(%error, "the other files that wait are left alone"),
            }
        };
        tokio::pin!(asking, sending);
        tokio::select! {
            asked = &mut asking => {
                let _ = tokio::time::timeout(PATIENCE, sending).await;
                asked
            }
            () = &mut sending => asking.await,
        }
    };
    Batch { asked, others }
}

/// The files that wait beside `path` and are not in the vault yet: histories first, then by name.
async fn waiting(cluster: &Cluster, path: &Path, limit: u32) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let none = || Ok((Vec::new(), Vec::new()));
    let Some(folder) = path.parent() else { return none() };
    let asked = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let status = folder.join("archive_status");
    let Ok(entries) = std::fs::read_dir(&status) else { return none() };
    let mut ready: Vec<(String, WalFileName)> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".ready")?.to_owned()))
        .filter(|name| name != asked)
        .filter_map(|name| Some((name.clone(), name.parse().ok()?)))
        .collect();
    ready.sort();
    let oldest =
        |timeline: TimelineId| ready.iter().map(|(_, file)| file).filter(move |file| file.timeline() == timeline).find_map(segment);
    let mut stored = BTreeMap::new();
    for timeline in ready.iter().filter(|(_, file)| segment(file).is_some()).map(|(_, file)| file.timeline()) {
        if let (false, Some(first)) = (stored.contains_key(&timeline), oldest(timeline)) {
            let _ = stored.insert(timeline, stored_from(cluster, first).await?);
        }
    }
    let is_stored = |name: &str, file: &WalFileName| {
        let Some(segment) = segment(file) else { return false };
        // Large segments are parts.
        let size = std::fs::metadata(folder.join(name)).ok().and_then(|file| u32::try_from(file.len()).ok());
        let size = size.and_then(|size| SegmentSize::try_from(size).ok());
        size.zip(stored.get(&file.timeline())).is_some_and(|(size, objects)| objects.covered(segment, size) == size.bytes())
    };
    let mut room = limit.saturating_sub(1) as usize;
    let (mut histories, mut rest) = (Vec::new(), Vec::new());
    let is_history = |file: &WalFileName| matches!(file, WalFileName::History(_));
    for (name, file) in ready.iter().filter(|(_, f)| is_history(f)).chain(ready.iter().filter(|(_, f)| !is_history(f))) {
        if room == 0 {
            break;
        }
        if folder.join(name).is_file() && !is_stored(name, file) {
            room -= 1;
            if is_history(file) { &mut histories } else { &mut rest }.push(folder.join(name));
        }
    }
    Ok((histories, rest))
}

fn segment(file: &WalFileName) -> Option<SegmentName> {
    if let WalFileName::Segment(segment) = file { Some(*segment) } else { None }
}

/// What the vault has of a timeline from a segment on.
async fn stored_from(cluster: &Cluster, first: SegmentName) -> Result<TimelineObjects> {
    let dir = cluster.path(&layout::wal_timeline(first.timeline));
    let mut objects = TimelineObjects::default();
    for object in cluster.store().list_after(&dir, Some(&format!("{dir}{first}"))).await? {
        match WalName::parse(&object.name) {
            Some(WalName::File(WalFileName::Segment(segment))) => drop(objects.segments.insert(segment)),
            Some(WalName::Part { segment, from, to }) => drop(objects.parts.entry(segment).or_default().insert((from, to))),
            _ => {}
        }
    }
    Ok(objects)
}

/// Stores one file. With `compare` it is looked for first: that costs a request where it is not there, and saves all the rest where
/// it is.
async fn send(cluster: &Cluster, path: &Path, compare: bool) -> Result<Pushed> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let file: WalFileName =
        name.parse().map_err(|e: crate::postgres::ParseError| Error::new(ErrorKind::Usage, "wal.name", e.to_string()))?;
    let raw = tokio::fs::read(path).await.map_err(|e| Error::io("read", path, e))?;
    let raw = Arc::new(raw);
    if compare && object::is_stored(cluster, WalName::File(file), &raw).await? {
        return Ok(Pushed::AlreadyThere);
    }
    let (owner, contents) = (cluster.clone(), raw.clone());
    let sealed = tokio::task::spawn_blocking(move || object::seal_file(&owner, file, &contents))
        .await
        .map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
    let mut stored = false;
    let mut chunks =
        raw.chunks(if sealed.len() > 1 { usize::try_from(object::MAX_RAW).unwrap_or(usize::MAX) } else { raw.len().max(1) });
    for sealed in &sealed {
        stored |= object::put(cluster, sealed, chunks.next().unwrap_or(&[])).await?;
    }
    Ok(if stored { Pushed::Stored } else { Pushed::AlreadyThere })
}
