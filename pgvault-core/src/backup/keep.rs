//! What a backup needs stays locked as long as the backup itself: its packs, its WAL, and the keys.
//!
//! Its own packs were locked when they were stored, up to two days before. Keys and the vault's document are as old as the
//! vault: each backup makes their locks longer, so that they outlast the newest one.

use std::collections::BTreeSet;

use ulid::Ulid;

use crate::Result;
use crate::postgres::{SegmentName, TimelineId, WalFileName, WalSegNo};
use crate::vault::Cluster;
use crate::vault::layout::{self, VAULT_DOCUMENT};
use crate::vault::snapshot::Manifest;
use crate::wal::object::WalName;

/// Makes sure, right before the commit, that nothing that a backup needs can be deleted before it. Does nothing when no
/// immutability is asked for.
pub(crate) async fn ensure(cluster: &Cluster, manifest: &Manifest, packs: impl Iterator<Item = Ulid>) -> Result<()> {
    if cluster.store().immutability().is_none() {
        return Ok(());
    }
    let mut names = vec![VAULT_DOCUMENT.to_owned(), layout::cluster_document(cluster.name())];
    for folder in [layout::keys(cluster.name()), layout::epochs(cluster.name())] {
        names.extend(cluster.store().list(&folder).await?.into_iter().map(|object| object.name));
    }
    names.extend(packs.map(|id| cluster.path(&layout::pack(id))));
    names.extend(wal(cluster, manifest).await?);
    cluster.store().keep(&names).await
}

/// The WAL between a backup's start and its end, and the history of its timeline.
async fn wal(cluster: &Cluster, manifest: &Manifest) -> Result<Vec<String>> {
    let size = manifest.wal_segment_size;
    let segment = |lsn| SegmentName::new(manifest.timeline, WalSegNo::containing(lsn, size), size);
    let (first, last) = (segment(manifest.start_lsn), segment(manifest.stop_lsn));
    let folder = cluster.path(&layout::wal_timeline(manifest.timeline));
    // Names sort by position, and nothing sorts between a segment's name and its objects.
    let listed = cluster.store().list_after(&folder, Some(&format!("{folder}{first}"))).await?;
    let needed: Vec<(SegmentName, WalName, String)> = listed
        .into_iter()
        .filter_map(|object| match WalName::parse(&object.name)? {
            name @ (WalName::File(WalFileName::Segment(found)) | WalName::Part { segment: found, .. }) => {
                (first..=last).contains(&found).then_some((found, name, object.name))
            }
            WalName::File(_) => None,
        })
        .collect();
    let is_whole = |name: &WalName| matches!(name, WalName::File(_));
    let whole: BTreeSet<SegmentName> = needed.iter().filter(|(_, name, _)| is_whole(name)).map(|(found, ..)| *found).collect();
    // Parts of a segment that is whole by now are of no use.
    let used = needed.into_iter().filter(|(found, name, _)| is_whole(name) || !whole.contains(found));
    let history =
        (manifest.timeline > TimelineId(1)).then(|| cluster.path(&WalName::File(WalFileName::History(manifest.timeline)).object()));
    Ok(used.map(|(_, _, object)| object).chain(history).collect())
}
