//! `restore_command`: one file out of the vault, or the proof that there is none.
//!
//! PostgreSQL takes "not available" for the end of the archive and promotes. So "not available" is said only when the
//! catalog proves that nothing the server could still need exists; everything else is an error, and an error must stop
//! the server (facts: exit codes 1 to 125 promote, 126 and above are fatal).

use std::path::Path;

use super::catalog::{self, Catalog};
use super::object::{self, WalName};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

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
/// # Errors
/// In every case but proven absence; see the [module documentation](self).
pub async fn fetch(cluster: &Cluster, file: WalFileName, destination: &Path) -> Result<Fetched> {
    let Some(bytes) = contents(cluster, file).await? else { return Ok(Fetched::EndOfArchive) };
    let temporary = destination.with_extension("pgvault-tmp");
    let written = async {
        tokio::fs::write(&temporary, &bytes).await?;
        tokio::fs::rename(&temporary, destination).await
    };
    if let Err(e) = written.await {
        let _ = tokio::fs::remove_file(&temporary).await;
        return Err(Error::io("write", destination, e));
    }
    Ok(Fetched::Written)
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
    let catalog = Catalog::load(cluster, size, Lsn::INVALID).await?;
    let own = catalog.timelines.get(&segment.timeline).cloned().unwrap_or_default();
    let later = later_wal(&catalog, segment, start);
    let covered = own.covered(segment, size);
    if own.segments.contains(&segment) {
        // Stored since it was asked for.
        return object::read(cluster, WalName::File(WalFileName::Segment(segment))).await.map(|(_, bytes)| Some(bytes));
    }
    if covered > 0 && (later.is_none() || covered == size.bytes()) {
        let mut bytes = Vec::new();
        for (from, to) in own.chain(segment) {
            let (_, part) = object::read(cluster, WalName::Part { segment, from, to }).await?;
            splice(&mut bytes, from, &part).map_err(|why| {
                Error::new(ErrorKind::Corrupt, "wal.diverged", format!("{segment}: the part from {from:#X} on {why}"))
                    .with_hint("two servers have written this segment; `pgvault check` names the objects")
            })?;
        }
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
            Err(Error::new(ErrorKind::Corrupt, "wal.gap", format!("{segment} is not in the vault, but {later} is: there is a gap"))
                .with_hint("recovery cannot cross the gap; restore to a point before it, or from a backup taken after it"))
        }
    }
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
    use crate::postgres::SegmentHeader;
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;
    use crate::vault::store::Store;
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

    /// A promotion from timeline 1 asks for `00000001.history`; taken for damage, it would stop the server.
    #[tokio::test]
    async fn the_first_timeline_has_no_history_and_any_other_with_wal_must() {
        let folder = tempfile::tempdir().unwrap();
        let segment = |name: &str| {
            let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(format!("{name}.zst"));
            let path = folder.path().join(name);
            std::fs::write(&path, zstd::stream::decode_all(std::fs::File::open(packed).unwrap()).unwrap()).unwrap();
            path
        };
        let (first, second) = (segment("000000010000000000000008"), segment("000000020000000000000011"));
        let header = SegmentHeader::parse(&std::fs::read(&first).unwrap()).unwrap();
        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", header.system_identifier).unwrap();
        assert!(vault.create_cluster(&name, &[Wrap::Passphrase("test".into())]).await.unwrap());
        let cluster = vault.unlock(&name, &Unlock::Passphrase("test".into())).await.unwrap();
        let history = |timeline| WalFileName::History(TimelineId(timeline));
        for path in [first, second] {
            let _ = push::push(&cluster, &path).await.unwrap();
        }
        assert_eq!(contents(&cluster, history(1)).await.unwrap(), None);
        assert_eq!(contents(&cluster, history(2)).await.unwrap_err().code(), "wal.no_history");
        assert_eq!(contents(&cluster, history(3)).await.unwrap(), None);
    }
}
