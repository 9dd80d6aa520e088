//! `restore_command`: one file out of the vault, or the proof that there is none.
//!
//! PostgreSQL takes "not available" for the end of the archive and promotes. So "not available" is said only when the
//! catalog proves that nothing the server could still need exists; everything else is an error, and an error must stop
//! the server (facts: exit codes 1 to 125 promote, 126 and above are fatal).

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::Semaphore;

use super::catalog::{self, Catalog, TimelineObjects};
use super::object::{self, WalName};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Parts of one segment that are read at the same time. A segment that was streamed has one for every flush: thousands.
const PARTS_AT_ONCE: usize = 16;

/// KiB of parts that may be in memory before they are put together.
const PARTS_KIB: u32 = 64 << 10;

/// The code of a segment that is missing while later ones are there.
pub const GAP: &str = "wal.gap";

/// What a fetch found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// The file was written.
    Written,
    /// There is no such file, and nothing after it either.
    EndOfArchive,
}

/// Writes the file that PostgreSQL asked for to `destination`, whole or not at all.
///
/// Recovery needs nothing behind `until`, when that is known, but PostgreSQL 15 and later read ahead of what they replay
/// (`recovery_prefetch`): a gap behind `until` must not stop a server that would never come to it.
///
/// # Errors
/// In every case but proven absence; see the [module documentation](self).
pub async fn fetch(cluster: &Cluster, file: WalFileName, destination: &Path, until: Option<Lsn>) -> Result<Fetched> {
    let bytes = match contents(cluster, file).await {
        Err(error) if error.code() == GAP && is_behind(cluster, file, until).await? => return Ok(Fetched::EndOfArchive),
        contents => contents?,
    };
    let Some(bytes) = bytes else { return Ok(Fetched::EndOfArchive) };
    let to = destination.to_path_buf();
    let placed = tokio::task::spawn_blocking(move || place(&to, &bytes).map_err(|e| Error::io("write", &to, e)));
    placed.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
    Ok(Fetched::Written)
}

/// True for a segment that begins at `until` or behind it.
async fn is_behind(cluster: &Cluster, file: WalFileName, until: Option<Lsn>) -> Result<bool> {
    let (WalFileName::Segment(segment), Some(until)) = (file, until) else { return Ok(false) };
    let size = segment_size(cluster).await?;
    let start = size.map(|size| object::segment_start(segment, size)).transpose()?;
    Ok(start.is_some_and(|start| start >= until))
}

/// Writes a file whole or not at all, also when somebody else writes the same one.
///
/// # Errors
/// When it cannot be written.
pub fn place(destination: &Path, bytes: &[u8]) -> io::Result<()> {
    // Always the same name, so that a program that was killed leaves one file at most, which the next one takes over.
    let temporary = destination.with_extension("pgvault-tmp");
    let mut file = loop {
        let file = File::options().write(true).create(true).truncate(false).open(&temporary)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        // Who held the lock has moved the file to its place: that one is not ours to write to.
        let found = std::fs::symlink_metadata(&temporary);
        if found.is_ok_and(|found| file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (found.dev(), found.ino()))) {
            break file;
        }
    };
    let written = file.set_len(0).and_then(|()| file.write_all(bytes)).and_then(|()| std::fs::rename(&temporary, destination));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// The file's bytes, or `None` when the catalog proves that nothing later exists.
///
/// # Errors
/// As [`fetch`].
pub async fn contents(cluster: &Cluster, file: WalFileName) -> Result<Option<Vec<u8>>> {
    match object::read(cluster, WalName::File(file)).await {
        Ok((_, bytes)) => {
            if let WalFileName::Segment(segment) = file {
                let _ = object::check_segment(cluster, segment, &bytes)?;
            }
            return Ok(Some(bytes));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let missing = match file {
        WalFileName::Segment(segment) => missing_segment(cluster, segment).await,
        WalFileName::History(timeline) => prove_no_timeline(cluster, timeline).await.map(|()| None),
        // PostgreSQL does not ask for these during recovery; nothing follows from their absence.
        WalFileName::Partial(_) | WalFileName::BackupHistory(..) => Ok(None),
    };
    // A listing takes time. What was stored meanwhile is neither missing nor a gap.
    match object::read(cluster, WalName::File(file)).await {
        Ok((_, bytes)) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => missing,
        Err(error) => Err(error),
    }
}

/// Assembles a segment from parts, or proves that the archive ends before it.
async fn missing_segment(cluster: &Cluster, segment: SegmentName) -> Result<Option<Vec<u8>>> {
    let Some(size) = segment_size(cluster).await? else { return Ok(None) };
    let start = object::segment_start(segment, size)?;
    // What lies before says nothing about what follows, and may be a million parts.
    let catalog = Catalog::load(cluster, size, start).await?;
    let own = catalog.timelines.get(&segment.timeline).cloned().unwrap_or_default();
    let later = later_wal(&catalog, segment, start);
    let covered = own.covered(segment, size);
    if own.segments.contains(&segment) {
        // Stored since it was asked for.
        return object::read(cluster, WalName::File(WalFileName::Segment(segment))).await.map(|(_, bytes)| Some(bytes));
    }
    if covered > 0 && (later.is_none() || covered == size.bytes()) {
        let mut bytes = assemble(cluster, segment, own.chain(segment)).await?;
        // Zeroes are what PostgreSQL finds behind the end of WAL.
        bytes.resize(usize::try_from(size.bytes()).unwrap_or(usize::MAX), 0);
        let _ = object::check_segment(cluster, segment, &bytes)?;
        return Ok(Some(bytes));
    }
    if own.partials.contains(&segment) {
        return Ok(Some(object::read(cluster, WalName::File(WalFileName::Partial(segment))).await?.1));
    }
    match later {
        None => Ok(None),
        Some(later) => {
            Err(Error::new(ErrorKind::Corrupt, GAP, format!("{segment} is not in the vault, but {later} is: there is a gap"))
                .with_hint("recovery cannot cross the gap; restore to a point before it, or from a backup taken after it"))
        }
    }
}

/// The bytes of a segment that is not there whole, as far as its parts reach without a hole.
///
/// # Errors
/// When the store fails, a part was changed, or parts differ where they overlap.
pub(super) async fn stored_start(cluster: &Cluster, objects: &TimelineObjects, segment: SegmentName) -> Result<Vec<u8>> {
    assemble(cluster, segment, objects.chain(segment)).await
}

/// Reads parts, several at once, and puts them together in their order.
async fn assemble(cluster: &Cluster, segment: SegmentName, chain: Vec<(u32, u32)>) -> Result<Vec<u8>> {
    let memory = Arc::new(Semaphore::new(PARTS_KIB as usize));
    let read = |(from, to): (u32, u32)| {
        let memory = memory.clone();
        async move {
            let closed = |e: tokio::sync::AcquireError| Error::new(ErrorKind::Failed, "task", e.to_string());
            let kib = (to.saturating_sub(from) / 1024).clamp(1, PARTS_KIB);
            // Given back when the part has been taken over.
            let held = memory.acquire_many_owned(kib).await.map_err(closed)?;
            let (_, part) = object::read(cluster, WalName::Part { segment, from, to }).await?;
            Ok::<_, Error>((from, part, held))
        }
    };
    let mut parts = futures::stream::iter(chain.into_iter().map(read)).buffered(PARTS_AT_ONCE);
    let mut bytes = Vec::new();
    while let Some(part) = parts.next().await {
        let (from, part, _held) = part?;
        splice(&mut bytes, from, &part).map_err(|why| {
            Error::new(ErrorKind::Corrupt, "wal.diverged", format!("{segment}: the part from {from:#X} on {why}"))
                .with_hint("two servers have written this segment; `pgvault check` names the objects")
        })?;
    }
    Ok(bytes)
}

/// Appends a part, which may overlap with what is there but must not differ from it.
fn splice(bytes: &mut Vec<u8>, from: u32, part: &[u8]) -> std::result::Result<(), &'static str> {
    let known = bytes.get(from as usize..).ok_or("leaves a hole")?;
    let shared = known.len().min(part.len());
    if known.get(..shared) != part.get(..shared) {
        return Err("differs from the part before it where they overlap");
    }
    bytes.extend_from_slice(part.get(shared..).unwrap_or_default());
    Ok(())
}

/// WAL that recovery would reach through `segment`, if there is any.
fn later_wal(catalog: &Catalog, segment: SegmentName, start: Lsn) -> Option<String> {
    let size = catalog.segment_size;
    // Before the timeline began, PostgreSQL asks for its name only to try; the bytes are the ancestor's.
    let begins = catalog.histories.get(&segment.timeline).map_or(Lsn::INVALID, crate::postgres::TimelineHistory::begin);
    let end = start.advance(size.bytes());
    if end <= begins {
        return None;
    }
    let own = catalog.timelines.get(&segment.timeline);
    if let Some(later) = own.and_then(|objects| objects.present().range(segment..).find(|s| **s != segment).copied()) {
        return Some(later.to_string());
    }
    // A timeline that left this one after the segment needs the segment too.
    catalog
        .histories
        .values()
        .find(|history| history.switch_point_of(segment.timeline).is_some_and(|switch| switch > end))
        .map(|history| format!("timeline {}, which continues behind it,", history.timeline()))
}

/// A missing history file means "no such timeline" only when nothing of it, or through it, exists (H7).
async fn prove_no_timeline(cluster: &Cluster, timeline: TimelineId) -> Result<()> {
    // The first timeline never has one. PostgreSQL asks for it all the same, when it leaves that timeline.
    if timeline == TimelineId(1) {
        return Ok(());
    }
    let missing = |why: String| {
        Error::new(ErrorKind::Corrupt, "wal.no_history", format!("{}.history is not in the vault, but {why}", timeline.hex()))
            .with_hint("push the history file from the server's pg_wal directory with `pgvault wal push`; without it recovery would silently stay on the old timeline")
    };
    for directory in cluster.store().list_directories(&cluster.path(layout::dir::WAL)).await? {
        let Ok(other) = TimelineId::from_hex(&directory) else { continue };
        if other == timeline {
            return Err(missing("WAL of that timeline is".into()));
        }
        if other > timeline {
            let history = catalog::read_history(cluster, other).await?;
            if history.is_some_and(|h| h.ancestors().iter().any(|a| a.timeline == timeline)) {
                return Err(missing(format!("timeline {other} descends from it")));
            }
        }
    }
    Ok(())
}

/// The cluster's segment size, from any segment or part that can be read; `None` when there is none.
///
/// A damaged object tells nothing, and says nothing against the others: it may be one that nobody needs.
///
/// # Errors
/// When the store fails, or all of them were changed.
pub async fn segment_size(cluster: &Cluster) -> Result<Option<SegmentSize>> {
    let mut damaged = None;
    for directory in cluster.store().list_directories(&cluster.path(layout::dir::WAL)).await? {
        let Ok(timeline) = TimelineId::from_hex(&directory) else { continue };
        let listed = cluster.store().list(&cluster.path(&layout::wal_timeline(timeline))).await?;
        for object in listed {
            let name = WalName::parse(&object.name);
            let Some(name @ (WalName::File(WalFileName::Segment(_)) | WalName::Part { .. })) = name else { continue };
            match object::open(cluster, name, Some(object.size)).await {
                Ok(opened) => return Ok(opened.info.segment_size),
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                    let _ = damaged.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
    }
    damaged.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::postgres::{SegmentHeader, scan_segment};
    use crate::store::Store;
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;
    use crate::wal::push;

    #[test]
    fn parts_may_overlap_but_not_differ() {
        let mut bytes = b"abcd".to_vec();
        splice(&mut bytes, 2, b"cdef").unwrap();
        splice(&mut bytes, 4, b"e").unwrap();
        assert_eq!(bytes, b"abcdef");
        assert!(splice(&mut bytes, 5, b"Fg").unwrap_err().contains("differs"));
        assert!(splice(&mut bytes, 7, b"h").unwrap_err().contains("hole"));
        assert_eq!(bytes, b"abcdef");
    }

    fn unpacked(name: &str) -> Vec<u8> {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(format!("{name}.zst"));
        zstd::stream::decode_all(File::open(packed).unwrap()).unwrap()
    }

    async fn cluster_of(bytes: &[u8]) -> Cluster {
        let header = SegmentHeader::parse(bytes).unwrap();
        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", header.system_identifier).unwrap();
        assert!(vault.create_cluster(&name, &[Wrap::Passphrase("test".into())]).await.unwrap());
        vault.unlock(&name, &Unlock::Passphrase("test".into())).await.unwrap()
    }

    /// A segment that was streamed and never completed has a part for every flush.
    #[tokio::test]
    async fn the_last_segment_is_put_together_from_hundreds_of_parts() {
        let bytes = unpacked("000000010000000000000008");
        let (cluster, header) = (cluster_of(&bytes).await, SegmentHeader::parse(&bytes).unwrap());
        let segment = "000000010000000000000008".parse().unwrap();
        let (step, end) = (700, 200_000_usize);
        for from in (0..end).step_by(step) {
            // Overlaps, as after a reconnect.
            let start = u32::try_from(from.saturating_sub(from % 3 * 100)).unwrap();
            let prefix = &bytes[..(from + step).min(end)];
            let scan = scan_segment(prefix, header.start, header.segment_size).unwrap();
            let part = object::seal_part(&cluster, segment, start, &prefix[start as usize..], &scan).unwrap();
            let _ = cluster.put(&part).await.unwrap();
        }
        let got = contents(&cluster, WalFileName::Segment(segment)).await.unwrap().unwrap();
        assert!(got[..end] == bytes[..end] && got[end..].iter().all(|byte| *byte == 0) && got.len() == bytes.len());
    }

    #[test]
    fn a_file_is_placed_whole_by_several_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let destination = folder.path().join("RECOVERYXLOG");
        // What a killed one has left is longer than what is written now.
        std::fs::write(destination.with_extension("pgvault-tmp"), vec![9; 3 << 20]).unwrap();
        let bytes = vec![7; 1 << 20];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                let _ = scope.spawn(|| {
                    place(&destination, &bytes).unwrap();
                    assert!(std::fs::read(&destination).unwrap() == bytes);
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// A promotion from timeline 1 asks for `00000001.history`; taken for damage, it would stop the server.
    #[tokio::test]
    async fn the_first_timeline_has_no_history_and_any_other_with_wal_must() {
        let folder = tempfile::tempdir().unwrap();
        let segment = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, unpacked(name)).unwrap();
            path
        };
        let (first, second) = (segment("000000010000000000000008"), segment("000000020000000000000011"));
        let cluster = cluster_of(&std::fs::read(&first).unwrap()).await;
        let history = |timeline| WalFileName::History(TimelineId(timeline));
        for path in [first, second] {
            let _ = push::push(&cluster, &path).await.unwrap();
        }
        assert_eq!(contents(&cluster, history(1)).await.unwrap(), None);
        assert_eq!(contents(&cluster, history(2)).await.unwrap_err().code(), "wal.no_history");
        assert_eq!(contents(&cluster, history(3)).await.unwrap(), None);
    }
}
