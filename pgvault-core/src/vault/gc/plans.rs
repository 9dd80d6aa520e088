//! Plans: what a pass found that nothing refers to, written down with the store's time on it.
//!
//! ```text
//! frame 0     JSON: how many, and when it was looked
//! frame 1..   names of packs, 16 bytes each, sorted
//! ```

use serde::{Deserialize, Serialize};
use ulid::Ulid;

use crate::crypto::sealed::{FrameEncoder, SealedWriter};
use crate::format::MAX_FRAME;
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::store::ObjectInfo;
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Packs that one plan names at most: 16 MiB of names.
const MAX_PACKS: usize = 1 << 20;

/// Packs that are named before a plan is closed; small in tests only.
const FRAME_PACKS: usize = MAX_FRAME / 16;

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    packs: u64,
    /// When the pass began, by the store's clock: what was committed later it may not have seen.
    looked_at: jiff::Timestamp,
    version: String,
}

/// A plan that is in the vault.
#[derive(Debug)]
pub(super) struct StoredPlan {
    pub(super) id: Ulid,
    /// When it was looked what snapshots refer to.
    pub(super) looked_at: jiff::Timestamp,
    pub(super) stored_at: jiff::Timestamp,
    pub(super) object: ObjectInfo,
}

/// What all plans name.
#[derive(Debug, Default)]
pub(super) struct Planned {
    /// Oldest first.
    pub(super) plans: Vec<StoredPlan>,
    /// Packs with the number of their oldest plan, sorted.
    packs: Vec<(PackId, u32)>,
}

impl Planned {
    /// The number of the oldest plan that names a pack.
    pub(super) fn oldest_with(&self, pack: &PackId) -> Option<u32> {
        let at = self.packs.binary_search_by(|(id, _)| id.cmp(pack)).ok()?;
        self.packs.get(at).map(|(_, plan)| *plan)
    }
}

/// Reads every plan. One that cannot be read names nothing: what it named is planned again.
pub(super) async fn load(cluster: &Cluster) -> Result<Planned> {
    let mut planned = Planned::default();
    let mut listed = cluster.store().list(&cluster.path(layout::dir::GC)).await?;
    listed.sort_by(|a, b| (a.last_modified, &a.name).cmp(&(b.last_modified, &b.name)));
    for object in listed {
        let Some(id) = layout::id_of(&object.name).filter(|id| object.name == cluster.path(&layout::gc_plan(*id))) else {
            continue;
        };
        let number = u32::try_from(planned.plans.len()).unwrap_or(u32::MAX);
        let looked_at = match read(cluster, id, object.size).await {
            Ok((looked_at, packs)) => {
                planned.packs.extend(packs.into_iter().map(|pack| (pack, number)));
                looked_at
            }
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                tracing::warn!(plan = %id, %error, "a plan cannot be read; what it names is planned again");
                object.last_modified
            }
            Err(error) => return Err(error),
        };
        planned.plans.push(StoredPlan { id, looked_at, stored_at: object.last_modified, object });
    }
    planned.packs.sort_unstable();
    planned.packs.dedup_by_key(|(pack, _)| *pack);
    Ok(planned)
}

async fn read(cluster: &Cluster, id: Ulid, size: u64) -> Result<(jiff::Timestamp, Vec<PackId>)> {
    let name = layout::gc_plan(id);
    let object = cluster.open(Kind::GcPlan, &name, Some(size)).await?;
    let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, "gc.plan", format!("{name}: {why}"));
    let head: Head = serde_json::from_slice(&object.frame(0).await?).map_err(|e| corrupt(&e.to_string()))?;
    let mut packs = Vec::new();
    for number in 1..object.frame_count() {
        let frame = object.frame(number).await?;
        let (ids, rest) = frame.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(corrupt("ends within a name"));
        }
        packs.extend_from_slice(ids);
    }
    if packs.len() as u64 != head.packs {
        return Err(corrupt("does not name as many packs as it says"));
    }
    Ok((head.looked_at, packs))
}

/// Writes plans, as many as it takes.
#[derive(Debug)]
pub(super) struct PlanWriter<'a> {
    cluster: &'a Cluster,
    looked_at: jiff::Timestamp,
    packs: Vec<PackId>,
    dry_run: bool,
}

impl<'a> PlanWriter<'a> {
    pub(super) fn new(cluster: &'a Cluster, looked_at: jiff::Timestamp, dry_run: bool) -> Self {
        Self { cluster, looked_at, packs: Vec::new(), dry_run }
    }

    pub(super) async fn add(&mut self, pack: PackId) -> Result<()> {
        self.packs.push(pack);
        if self.packs.len() >= MAX_PACKS { self.close().await } else { Ok(()) }
    }

    /// Stores what was added since the last plan.
    pub(super) async fn close(&mut self) -> Result<()> {
        let mut packs = std::mem::take(&mut self.packs);
        if self.dry_run || packs.is_empty() {
            return Ok(());
        }
        packs.sort_unstable();
        let id = self.cluster.env().new_id()?;
        let keys = self.cluster.keys();
        let mut writer = SealedWriter::new(self.cluster.env(), keys, Kind::GcPlan, layout::gc_plan(id), packs.len() * 16 + 4096)?;
        // Names are random: there is nothing to compress.
        let mut encoder = FrameEncoder::new(1)?;
        let head = Head { packs: packs.len() as u64, looked_at: self.looked_at, version: env!("CARGO_PKG_VERSION").into() };
        let head = serde_json::to_vec(&head).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
        let _ = writer.push(&mut encoder, &head, keys.digest().frame(&head))?;
        for chunk in packs.chunks(FRAME_PACKS) {
            let frame = chunk.as_flattened();
            let _ = writer.push(&mut encoder, frame, keys.digest().frame(frame))?;
        }
        self.cluster.put_once(&writer.finish(Vec::new())).await
    }
}
