//! What takes how much space: by listing alone, without a key, and with the key also what is shared and what is kept for whom.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use ulid::Ulid;

use crate::format::map::PackId;
use crate::retention::expire;
use crate::retention::plan::held_by;
use crate::store::Pruned;
use crate::vault::layout::{self, CLUSTERS, ClusterName};
use crate::vault::{Cluster, Vault, snapshot};
use crate::{ErrorKind, Result};

/// How old objects are, by the store's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Age {
    /// Less than a day.
    Day,
    /// Less than a week.
    Week,
    /// Less than 30 days.
    Month,
    /// Less than 365 days.
    Year,
    /// More.
    Older,
}

impl Age {
    fn of(hours: i64) -> Self {
        match hours {
            ..24 => Self::Day,
            24..168 => Self::Week,
            168..720 => Self::Month,
            720..8760 => Self::Year,
            _ => Self::Older,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Day => "under a day",
            Self::Week => "under a week",
            Self::Month => "under 30 days",
            Self::Year => "under a year",
            Self::Older => "older",
        }
    }
}

/// A sum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The cluster, by the name of its prefix; `None` for what belongs to the vault.
    pub cluster: Option<String>,
    /// The folder of the objects: `pack`, `wal`, `snap` and so on.
    pub kind: &'static str,
    /// How old they are.
    pub age: Age,
    /// How many there are.
    pub objects: u64,
    /// Their bytes, as they are stored.
    pub bytes: u64,
}

const KINDS: [&str; 14] =
    ["pack", "files", "artifact", "mark", "wal", "snap", "keys", "epochs", "session", "audit", "drill", "gc", "hold", "probe"];

/// Sums up everything in the vault, or one cluster of it. Needs no key, and memory for the sums alone.
///
/// # Errors
/// When the store fails.
pub async fn measure(vault: &Vault, only: Option<&ClusterName>, now: Timestamp) -> Result<Vec<Row>> {
    let mut sums: BTreeMap<(Option<String>, &'static str, Age), (u64, u64)> = BTreeMap::new();
    let prefix = only.map_or_else(String::new, ClusterName::prefix);
    vault
        .store()
        .each_page(&prefix, async |page| {
            for object in page {
                let (cluster, relative) = match object.name.strip_prefix(CLUSTERS).and_then(|rest| rest.split_once('/')) {
                    Some((cluster, relative)) => (Some(cluster.to_owned()), relative),
                    None => (None, object.name.as_str()),
                };
                let folder = relative.split_once('/').map(|(folder, _)| folder);
                let kind = folder.and_then(|folder| KINDS.into_iter().find(|kind| *kind == folder)).unwrap_or("other");
                let age = Age::of(now.duration_since(object.last_modified).as_hours());
                let sum = sums.entry((cluster, kind, age)).or_default();
                sum.0 += 1;
                sum.1 = sum.1.saturating_add(object.size);
            }
            Ok(())
        })
        .await?;
    let row = |((cluster, kind, age), (objects, bytes))| Row { cluster, kind, age, objects, bytes };
    Ok(sums.into_iter().map(row).collect())
}

/// What the packs of a cluster are for.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Saved {
    /// Backups that can be read.
    pub backups: u64,
    /// Bytes of their files: what they would take each for itself.
    pub source_bytes: u64,
    /// Bytes of the packs that they need.
    pub needed_bytes: u64,
    /// Bytes of packs that none of them needs.
    pub unneeded_bytes: u64,
    /// Of [`Saved::needed_bytes`], those that only backups under a hold need.
    pub held_bytes: u64,
    /// Holds in force.
    pub holds: u64,
    /// Manifests that are locked at the moment; `None` for a store without locks.
    pub locked: Option<u64>,
}

/// Finds out what the packs of a cluster are for. Backups whose manifests cannot be read count for nothing.
///
/// # Errors
/// When the store fails or a hold cannot be read.
pub async fn saved(cluster: &Cluster) -> Result<Saved> {
    let known = expire::known(cluster).await?;
    let mut saved = Saved { holds: known.holds.len() as u64, ..Saved::default() };
    let held: Vec<Ulid> = known.holds.iter().flat_map(|hold| held_by(&known, hold).0).collect();
    // The size, and whether somebody needs it who is not held.
    let mut packs: BTreeMap<PackId, (u64, bool)> = BTreeMap::new();
    for backup in &known.backups {
        let snapshot = match snapshot::open(cluster, backup.id, None).await {
            Ok(snapshot) => snapshot,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => continue,
            Err(error) => return Err(error),
        };
        saved.backups += 1;
        saved.source_bytes = saved.source_bytes.saturating_add(snapshot.manifest.source_bytes);
        let free = !held.contains(&backup.id);
        let mut note = |id: PackId, size: u64| {
            let entry = packs.entry(id).or_insert((size, false));
            entry.1 |= free;
        };
        snapshot.table_packs().for_each(|pack| note(pack.id, pack.size));
        let mut table = snapshot.pack_table();
        while let Some(chunk) = table.next_chunk().await? {
            for pack in &chunk {
                note(pack.id, pack.size);
            }
        }
    }
    saved.needed_bytes = packs.values().map(|(size, _)| size).sum();
    saved.held_bytes = packs.values().filter(|(_, free)| !free).map(|(size, _)| size).sum();
    cluster
        .store()
        .each_page(&cluster.path(layout::dir::PACK), async |page| {
            let unneeded =
                page.iter().filter(|object| layout::id_of(&object.name).is_none_or(|id| !packs.contains_key(&id.to_bytes())));
            saved.unneeded_bytes = saved.unneeded_bytes.saturating_add(unneeded.map(|object| object.size).sum());
            Ok(())
        })
        .await?;
    if cluster.store().may_lock().await? {
        let mut locked = 0;
        for backup in &known.backups {
            let kept = cluster.store().kept_by(&cluster.path(&layout::snapshot(backup.id)), known.now).await?;
            locked += u64::from(matches!(kept, Some(Pruned::Locked(_))));
        }
        saved.locked = Some(locked);
    }
    Ok(saved)
}
