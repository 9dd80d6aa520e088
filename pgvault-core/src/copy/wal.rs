//! The source's WAL, and what of it the target lacks.
//!
//! Segments, parts of the open one and history files keep their names, so what is missing is the difference of two listings. A
//! resealed object is as long as it was: one of another length under the same name was written by somebody else, and is
//! compared.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};

use super::object::{Route, is_damage};
use crate::format::object::Kind;
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName, WalSegNo};
use crate::vault::layout;
use crate::vault::snapshot::Manifest;
use crate::wal::catalog::{self, Catalog, TimelineObjects};
use crate::wal::object::WalName;
use crate::{Error, ErrorKind, Result};

/// What shipping a stretch came to.
#[derive(Debug, Default)]
pub(super) struct Shipped {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// Objects of the source that cannot be read, and why.
    pub(super) failed: Vec<(String, Error)>,
}

/// Segments of every timeline.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stretch {
    pub(super) first: WalSegNo,
    pub(super) last: WalSegNo,
}

impl Stretch {
    /// Everything from a position on.
    pub(super) fn from(start: Lsn, size: SegmentSize) -> Self {
        Self { first: WalSegNo::containing(start, size), last: WalSegNo(u64::MAX) }
    }

    /// What a backup needs to become consistent.
    fn of(manifest: &Manifest) -> Self {
        let size = manifest.wal_segment_size;
        Self { first: WalSegNo::containing(manifest.start_lsn, size), last: WalSegNo::containing(manifest.stop_lsn, size) }
    }

    fn holds(self, name: WalName, size: SegmentSize) -> bool {
        segment_of(name)
            .and_then(|segment| segment.segment_number(size).ok())
            .is_some_and(|n| (self.first.0..=self.last.0).contains(&n.0))
    }
}

fn segment_of(name: WalName) -> Option<SegmentName> {
    match name {
        WalName::File(WalFileName::Segment(s) | WalFileName::Partial(s) | WalFileName::BackupHistory(s, _)) => Some(s),
        WalName::Part { segment, .. } => Some(segment),
        WalName::File(WalFileName::History(_)) => None,
    }
}

/// The WAL of both vaults, as it was listed: relative name to size.
#[derive(Debug)]
pub(super) struct Archive {
    route: Route,
    source: BTreeMap<String, (WalName, u64)>,
    target: BTreeMap<String, (WalName, u64)>,
    /// What this copy has stored there: too young to be expired.
    own: BTreeSet<String>,
    histories: BTreeMap<TimelineId, TimelineHistory>,
}

impl Archive {
    /// Lists both. To be called after the source's backups were listed: then their WAL is there.
    pub(super) async fn list(route: &Route) -> Result<Self> {
        let source = listed(&route.source).await?;
        let target = listed(&route.target).await?;
        let mut histories = BTreeMap::new();
        for (name, _) in source.values() {
            let WalName::File(WalFileName::History(timeline)) = *name else { continue };
            match catalog::read_history(&route.source, timeline).await {
                Ok(Some(history)) => drop(histories.insert(timeline, history)),
                Ok(None) => {}
                // Told when it is shipped.
                Err(error) if is_damage(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { route: route.clone(), source, target, own: BTreeSet::new(), histories })
    }

    /// Ships what the target lacks of a stretch, `workers` objects at a time, and every history file that it lacks: those first,
    /// since WAL of a timeline without its history is refused by a reader.
    ///
    /// # Errors
    /// When a store fails, or the target has other contents under a name. What is wrong with the source's objects is in the result.
    pub(super) async fn ship(&mut self, stretch: Stretch, size: SegmentSize, workers: usize) -> Result<Shipped> {
        let is_missing = |name: &String, len: u64| self.target.get(name).is_none_or(|(_, there)| *there != len);
        let missing = |wanted: &dyn Fn(WalName) -> bool| -> Vec<(String, WalName)> {
            let missing = self.source.iter().filter(|(name, (parsed, len))| wanted(*parsed) && is_missing(name, *len));
            missing.map(|(name, (parsed, _))| (name.clone(), *parsed)).collect()
        };
        let histories = missing(&|name| matches!(name, WalName::File(WalFileName::History(_))));
        // Parts of a segment that is whole by now are of no use.
        let rest = missing(&|name| stretch.holds(name, size) && !self.is_superseded(name));
        let mut shipped = Shipped::default();
        for group in [histories, rest] {
            let route = &self.route;
            let mut shipping = stream::iter(group)
                .map(|(name, parsed)| async move {
                    let done = route.ship(Kind::Wal, &name, None).await;
                    (name, parsed, done)
                })
                .buffered(workers.max(1));
            while let Some((name, parsed, done)) = shipping.next().await {
                match done {
                    Ok((held, created)) => {
                        if created {
                            shipped.objects += 1;
                            shipped.bytes += held.size;
                            let _ = self.own.insert(name.clone());
                        }
                        let _ = self.target.insert(name, (parsed, held.size));
                    }
                    // Expired since it was listed. Who needs it notices.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) if is_damage(&error) => shipped.failed.push((name, error)),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(shipped)
    }

    /// True for a part of a segment that the source has whole.
    fn is_superseded(&self, name: WalName) -> bool {
        let WalName::Part { segment, .. } = name else { return false };
        self.source.contains_key(&WalName::File(WalFileName::Segment(segment)).object())
    }

    /// Ships what a backup needs to become consistent.
    ///
    /// # Errors
    /// As [`Archive::ship`], and when not all of it is in the target then.
    pub(super) async fn ship_for(&mut self, manifest: &Manifest, workers: usize) -> Result<Shipped> {
        let stretch = Stretch::of(manifest);
        let mut shipped = self.ship(stretch, manifest.wal_segment_size, workers).await?;
        let end = self.contiguous_end(manifest, stretch);
        if end >= manifest.stop_lsn {
            // Whatever is damaged, this backup does not need it.
            shipped.failed.clear();
            return Ok(shipped);
        }
        match shipped.failed.pop() {
            Some((_, error)) => Err(error),
            None => Err(Error::new(
                ErrorKind::Corrupt,
                "copy.wal_missing",
                format!(
                    "backup {} needs WAL from {} to {}, and the source has it only up to {end}",
                    manifest.id, manifest.start_lsn, manifest.stop_lsn
                ),
            )
            .with_hint("run `pgvault check` on the source; without this WAL the backup cannot be restored there either")),
        }
    }

    /// Makes sure that the target still has what a backup needs to become consistent: an expiry there may have deleted what was listed,
    /// because no backup of the target needed it. Ships that anew.
    ///
    /// # Errors
    /// As [`Archive::ship_for`].
    pub(super) async fn confirm(&mut self, manifest: &Manifest, workers: usize) -> Result<Shipped> {
        let stretch = Stretch::of(manifest);
        let relied_on = |name: &String, parsed: WalName| {
            !self.own.contains(name) && (stretch.holds(parsed, manifest.wal_segment_size) || segment_of(parsed).is_none())
        };
        let relied_on = self.target.iter().filter(|(name, (parsed, _))| relied_on(name, *parsed)).map(|(name, _)| name.clone());
        let target = &self.route.target;
        let mut looking = stream::iter(relied_on.collect::<Vec<_>>())
            .map(|name| async move {
                let found = target.store().head(&target.path(&name)).await;
                (name, found)
            })
            .buffered(workers.max(1));
        let mut lost = Vec::new();
        while let Some((name, found)) = looking.next().await {
            match found {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => lost.push(name),
                Err(error) => return Err(error),
            }
        }
        drop(looking);
        if lost.is_empty() {
            return Ok(Shipped::default());
        }
        for name in lost {
            let _ = self.target.remove(&name);
        }
        self.ship_for(manifest, workers).await
    }

    /// Where the WAL that the target has of a stretch ends, on the way to the backup's timeline.
    fn contiguous_end(&self, manifest: &Manifest, stretch: Stretch) -> Lsn {
        let size = manifest.wal_segment_size;
        let mut timelines: BTreeMap<TimelineId, TimelineObjects> = BTreeMap::new();
        for (name, _) in self.target.values().filter(|(name, _)| stretch.holds(*name, size)) {
            timelines.entry(name.timeline()).or_default().insert(*name);
        }
        let catalog = Catalog { segment_size: size, timelines, histories: self.histories.clone() };
        // As everywhere: a timeline without a history is one that a backup was first taken on.
        let history = catalog.history(manifest.timeline).unwrap_or_else(|_| TimelineHistory::root(manifest.timeline));
        catalog.contiguous_end(&history, manifest.start_lsn)
    }
}

/// Every WAL object of a cluster.
async fn listed(cluster: &crate::vault::Cluster) -> Result<BTreeMap<String, (WalName, u64)>> {
    let prefix = cluster.name().prefix();
    let listed = cluster.store().list(&cluster.path(layout::dir::WAL)).await?;
    let parsed = listed.into_iter().filter_map(|object| {
        let relative = object.name.strip_prefix(&prefix)?.to_owned();
        // What lies elsewhere than its name says is nobody's.
        let name = WalName::parse(&relative).filter(|name| name.object() == relative)?;
        Some((relative, (name, object.size)))
    });
    Ok(parsed.collect())
}
