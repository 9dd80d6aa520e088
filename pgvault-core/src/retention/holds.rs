//! Holds, as far as the store can help: legal holds on what a hold needs.
//!
//! The record alone keeps pgvault from deleting. Where the store has legal holds, they keep everybody else from it, too. They are laid
//! on what is there when the hold is placed; `lay` may be called again for a range that went on.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use serde::Serialize;
use ulid::Ulid;

use super::expire::known;
use super::plan::{Known, held_by};
use super::wal::Needed;
use crate::postgres::{SegmentSize, WalFileName};
use crate::vault::hold::{self, Hold};
use crate::vault::prune::Left;
use crate::vault::{Cluster, layout, snapshot};
use crate::wal::object::WalName;
use crate::{ErrorKind, Result};

/// Requests at once.
const AT_ONCE: usize = 16;

/// What became of the legal holds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Marked {
    /// False for a store that has none.
    pub supported: bool,
    /// Objects whose legal hold was laid or lifted.
    pub objects: u64,
    /// Objects where that failed.
    pub failed: Vec<Left>,
}

/// Lays legal holds on the manifests, the packs and the WAL that a hold needs, where the store has them.
///
/// # Errors
/// When the store cannot be read. The hold is in force all the same.
pub async fn lay(cluster: &Cluster, hold: &Hold) -> Result<Marked> {
    if !cluster.store().can_keep() {
        return Ok(Marked::default());
    }
    let known = known(cluster).await?;
    Ok(mark(cluster, objects(cluster, &known, hold).await?, true).await)
}

/// Lifts them from what no other hold needs.
///
/// # Errors
/// As [`lay`]. The hold is taken back all the same.
pub async fn lift(cluster: &Cluster, hold: &Hold) -> Result<Marked> {
    if !cluster.store().can_keep() {
        return Ok(Marked::default());
    }
    let known = known(cluster).await?;
    let mut names = objects(cluster, &known, hold).await?;
    for other in hold::active(cluster).await? {
        let needed = objects(cluster, &known, &other).await?;
        names.retain(|name| !needed.contains(name));
    }
    Ok(mark(cluster, names, false).await)
}

async fn mark(cluster: &Cluster, names: BTreeSet<String>, held: bool) -> Marked {
    let mut marking = stream::iter(names)
        .map(|name| async move {
            let done = cluster.store().set_hold(&name, held).await;
            (name, done)
        })
        .buffer_unordered(AT_ONCE);
    let mut marked = Marked { supported: true, ..Marked::default() };
    while let Some((name, done)) = marking.next().await {
        match done {
            Ok(()) => marked.objects += 1,
            Err(error) if error.kind() == ErrorKind::Unsupported => marked.supported = false,
            Err(error) => marked.failed.push(Left { name, why: error.to_string(), until: None }),
        }
    }
    marked
}

/// Everything that a hold needs, by full names.
async fn objects(cluster: &Cluster, known: &Known, hold: &Hold) -> Result<BTreeSet<String>> {
    let (backups, needs) = held_by(known, hold);
    let mut names = BTreeSet::new();
    for backup in known.backups.iter().filter(|backup| backups.contains(&backup.id)) {
        let snapshot = match snapshot::open(cluster, backup.id, None).await {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let _ = names.insert(cluster.path(&layout::snapshot(backup.id)));
        names.extend(snapshot.table_packs().map(|pack| cluster.path(&layout::pack(Ulid::from_bytes(pack.id)))));
        let mut table = snapshot.pack_table();
        while let Some(packs) = table.next_chunk().await? {
            names.extend(packs.iter().map(|pack| cluster.path(&layout::pack(Ulid::from_bytes(pack.id)))));
        }
    }
    let Some(size) = known.backups.iter().find(|backup| backups.contains(&backup.id)).map(|backup| backup.segment_size) else {
        return Ok(names);
    };
    for timeline in known.lines.keys() {
        let needed = Needed::on(*timeline, &needs, &known.lines, size);
        if needed.is_empty() {
            continue;
        }
        let folder = cluster.path(&layout::wal_timeline(*timeline));
        cluster
            .store()
            .each_page(&folder, async |page| {
                names.extend(page.into_iter().filter(|object| is_needed(&object.name, &needed, size)).map(|object| object.name));
                Ok(())
            })
            .await?;
    }
    Ok(names)
}

fn is_needed(object: &str, needed: &Needed, size: SegmentSize) -> bool {
    match WalName::parse(object) {
        Some(WalName::File(WalFileName::History(_))) => true,
        Some(WalName::Part { segment, .. } | WalName::File(WalFileName::Segment(segment) | WalFileName::Partial(segment))) => {
            segment.segment_number(size).is_ok_and(|number| needed.has(number))
        }
        _ => false,
    }
}
