//! What filestores need to be kept, and what they do not need any more: for whoever deletes.

use jiff::{SignedDuration, Timestamp};

use super::pass::{self, Known, PassKind};
use crate::format::map::PackId;
use crate::store::ObjectInfo;
use crate::vault::{Cluster, layout, snapshot};
use crate::{ErrorKind, Result};

/// How long a pass stays that others stand behind: a reader may just have listed it.
const SUPERSEDED_STAYS: SignedDuration = SignedDuration::from_hours(24);

/// What filestores refer to.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    /// Packs of contents and of catalogs.
    pub(crate) packs: Vec<PackId>,
    /// Passes that nobody needs.
    pub(crate) passes: Vec<ObjectInfo>,
}

/// The moment before which nothing can be restored any more: the end of the oldest backup. None while there is no backup, or one cannot be
/// read: then nobody knows.
pub(crate) async fn horizon(cluster: &Cluster) -> Result<Option<Timestamp>> {
    let mut oldest: Option<Timestamp> = None;
    for object in cluster.store().list(&cluster.path(layout::dir::SNAP)).await? {
        let Some(id) = layout::id_of(&object.name) else { continue };
        let finished = match snapshot::open(cluster, id, Some(object.size)).await {
            Ok(snapshot) => snapshot.manifest.finished_at,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => return Ok(None),
            Err(error) => return Err(error),
        };
        oldest = Some(oldest.map_or(finished, |oldest| oldest.min(finished)));
    }
    Ok(oldest)
}

/// What all filestores of a cluster need at `now`, by the store's clock.
///
/// # Errors
/// When the store fails; [`ErrorKind::Corrupt`] when a pass or a run cannot be read: what it needs is not known.
pub(crate) async fn needed(cluster: &Cluster, now: Timestamp) -> Result<Needed> {
    let mut needed = Needed::default();
    let folders = pass::instances(cluster).await?;
    let horizon = if folders.is_empty() { None } else { horizon(cluster).await? };
    for folder in folders {
        let Some(known) = pass::load(cluster, &folder).await? else { continue };
        let Known { pass, mut catalog, heads, superseded } = known;
        let object = |listed: &pass::Listed| ObjectInfo {
            name: cluster.path(&layout::pass(&folder, listed.id, listed.session)),
            size: listed.size,
            last_modified: listed.stored_at,
        };
        let old = |listed: &&pass::Listed| now.duration_since(listed.stored_at) >= SUPERSEDED_STAYS;
        needed.passes.extend(superseded.iter().filter(old).map(object));
        // A database that was dropped before anything that can be restored.
        let forgotten = pass.kind == PassKind::Dropped && horizon.is_some_and(|horizon| pass.ended_at < horizon);
        if forgotten {
            needed.passes.extend(heads.iter().filter(old).map(object));
            continue;
        }
        needed.packs.extend(catalog.recent_packs().map(|pack| pack.id));
        for run in catalog.runs() {
            let head = run.head().await?;
            needed.packs.push(run.reference().pack.id);
            needed.packs.extend(head.before.iter().chain(&head.packs).map(|pack| pack.id));
        }
    }
    needed.packs.sort_unstable();
    needed.packs.dedup();
    Ok(needed)
}
