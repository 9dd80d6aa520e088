//! Garbage collection: deleting packs that no backup refers to, beside writers that nobody stops.
//!
//! There is no lock. A pack is deleted in two steps with days in between:
//!
//! ```text
//! plan    snapshots, then packs: what no snapshot refers to is written down         gc/<ulid>.plan
//! sweep   72 h later or more: sessions, snapshots, sessions again, then packs:      what is in such a plan and still
//!         not referred to is deleted
//! ```
//!
//! Why that is enough, by the store's clock throughout:
//!
//! 1. A writer ends 48 h after it began, so whoever was there when the plan was written is gone or has committed when it is swept. A
//!    session that is alive and began before the plan stops the sweep of that plan all the same; so does a restore, which may read
//!    packs of a backup that expired meanwhile.
//! 2. A writer that began later refers to packs of snapshots that it listed after it began, and to none of the plan's, unless one of
//!    them was referred to again in between: by a backup that was committed after the plan *and has expired since*, or it would be
//!    listed now. The audit log has every expiry, written before the manifest goes. When there is such a one and somebody is at work, a
//!    restore included, the plan waits.
//! 3. A writer may also go on with packs of one that was interrupted less than 24 h before it began. No pack is deleted that is
//!    younger than 24 h before the beginning of a writer that is alive.
//!
//! Packs of filestores are judged by the same rules: a capture pass refers to packs of passes that it listed after its session began, or
//! that it made itself. What it drops from its catalog was not needed by any backup that there is.
//!
//! Losing any of these races keeps garbage for another run. None loses data.
//!
//! A vault of ten million packs is looked through in 256 pieces. What is held in memory are the names of the packs that snapshots
//! refer to, and of those in plans, sixteen bytes each.

mod plans;
mod tidy;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use ulid::Ulid;

use super::audit::{self, Event, event};
use super::features::Purpose as May;
use super::past::Past;
use super::prune::{Pruner, Tally};
use super::session::{Live, MAX_HOURS, Purpose, RESUME_HOURS, Session, Watch};
use super::{Cluster, layout, snapshot};
use crate::filestore::space;
use crate::format::map::PackId;
use crate::store::{ObjectInfo, Pruned};
use crate::{Error, ErrorKind, Result};
use plans::{PlanWriter, Planned};

/// Hours between a plan and its sweep, at least.
pub const GRACE_HOURS: i64 = 72;

// An interrupted writer's packs are used again by one that began so much later and lasts so long.
const _: () =
    assert!(RESUME_HOURS + MAX_HOURS <= GRACE_HOURS, "a sweep could come before the end of a writer that goes on with packs");

/// How to collect.
#[derive(Debug, Clone, Copy)]
pub struct GcOptions {
    /// Time between a plan and its sweep; at least [`GRACE_HOURS`].
    pub grace: SignedDuration,
    /// Write no plan and delete nothing.
    pub dry_run: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { grace: SignedDuration::from_hours(GRACE_HOURS), dry_run: false }
    }
}

/// What was done.
#[derive(Debug, Clone, Serialize)]
pub struct Collected {
    /// The time, by the store's clock.
    pub now: Timestamp,
    /// Snapshots that were read.
    pub snapshots: u64,
    /// Packs that are there.
    pub packs: u64,
    /// Packs that no snapshot refers to, and that were written into a plan by this run.
    pub planned: u64,
    /// Their bytes.
    pub planned_bytes: u64,
    /// Packs in plans that are too young, or whose time has not come.
    pub waiting: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Packs that were deleted, and those that are locked.
    pub swept: Tally,
    /// Other objects: sessions that are over, plans that are done, probes, holds that were removed.
    pub tidied: Tally,
    /// Why plans that are old enough were not swept.
    pub postponed: Vec<String>,
}

impl Collected {
    /// True when something that should have gone is still there and may go when this is run again.
    pub fn is_incomplete(&self) -> bool {
        self.swept.failed + self.tidied.failed > 0
    }
}

/// Sweeps the plans that are old enough, and plans what was found since.
///
/// # Errors
/// [`ErrorKind::Usage`] when the grace is too short, [`ErrorKind::Unsupported`] when the vault has a feature that this version would
/// have to know. [`ErrorKind::Corrupt`] or [`ErrorKind::Unsupported`] when a snapshot cannot be read: what it refers to is not known,
/// so nothing is deleted. Otherwise when the store fails; the call may be repeated.
pub async fn collect(cluster: &Cluster, options: &GcOptions) -> Result<Collected> {
    cluster.vault().ensure_may(May::CollectGarbage)?;
    if options.grace < SignedDuration::from_hours(GRACE_HOURS) {
        return Err(Error::new(
            ErrorKind::Usage,
            "gc.grace",
            format!("a grace of {} h is too short: backups that are under way would lose packs", options.grace.as_hours()),
        )
        .with_hint(format!("leave it out, or give {GRACE_HOURS}h or more")));
    }
    let now = Session::begin(cluster, Purpose::Prune, cluster.env().new_id()?).await?.began;
    let mut watch = Watch::default();
    let before = writers_and_readers(&mut watch, cluster, now).await?;
    let plans = plans::load(cluster).await?;
    let referred = Referred::load(cluster, now).await?;
    // Those that came meanwhile, too: they have listed what this has.
    let mut live = before;
    live.extend(writers_and_readers(&mut watch, cluster, now).await?);
    let ripeness = Ripeness::of(cluster, &plans, options, now, &live).await?;

    let mut collector = Collector {
        cluster,
        options: *options,
        referred,
        plans,
        ripeness,
        youngest: youngest_that_may_go(&live),
        remaining: BTreeMap::new(),
        writer: PlanWriter::new(cluster, now, options.dry_run),
        pruner: Pruner::new(cluster.store(), now, options.dry_run).await?,
        report: Collected {
            now,
            snapshots: 0,
            packs: 0,
            planned: 0,
            planned_bytes: 0,
            waiting: 0,
            waiting_bytes: 0,
            swept: Tally::default(),
            tidied: Tally::default(),
            postponed: Vec::new(),
        },
    };
    collector.report.snapshots = collector.referred.snapshots;
    collector.report.postponed.clone_from(&collector.ripeness.postponed);
    for shard in 0..=u8::MAX {
        collector.shard(&layout::pack_shard(shard)).await?;
        collector.shard(&layout::files_shard(shard)).await?;
    }
    collector.finish().await
}

/// Sessions that stand in the way: all but those of collectors.
async fn writers_and_readers(watch: &mut Watch, cluster: &Cluster, now: Timestamp) -> Result<Vec<Live>> {
    let mut live = watch.live(cluster, now).await?;
    live.retain(|live| !matches!(live.purpose, Purpose::Prune | Purpose::WalStream));
    Ok(live)
}

/// Packs that were stored later may be gone on with by a writer that is alive.
fn youngest_that_may_go(live: &[Live]) -> Timestamp {
    let resumes = live.iter().filter(|live| live.may_commit()).map(|live| live.began);
    let earliest = resumes.min().unwrap_or(Timestamp::MAX);
    earliest.checked_sub(SignedDuration::from_hours(RESUME_HOURS)).unwrap_or(Timestamp::MIN)
}

/// The packs that snapshots and filestores refer to, sorted.
#[derive(Debug, Default)]
struct Referred {
    packs: Vec<PackId>,
    snapshots: u64,
    /// Capture passes that nobody needs any more.
    passes: Vec<ObjectInfo>,
    /// Where the recoverable past begins.
    past: Option<Past>,
}

impl Referred {
    async fn load(cluster: &Cluster, now: Timestamp) -> Result<Self> {
        let mut referred = Self::default();
        for object in cluster.store().list(&cluster.path(layout::dir::SNAP)).await? {
            let Some(id) = layout::id_of(&object.name).filter(|id| object.name == cluster.path(&layout::snapshot(*id))) else {
                continue;
            };
            match referred.add(cluster, id, object.size).await {
                Ok(()) => referred.snapshots += 1,
                // Expired since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                    return Err(Error::new(
                        error.kind(),
                        "gc.unreadable",
                        format!("{}: {error}: what this backup refers to is not known, so no garbage is collected", object.name),
                    )
                    .with_hint("bring it back with `pgvault undelete` or from a copy, or use the pgvault version that wrote it")
                    .with_source(error));
                }
                Err(error) => return Err(error),
            }
        }
        let needed = match space::needed(cluster, now).await {
            Ok(needed) => needed,
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                let why = format!("{error}: what this filestore refers to is not known, so no garbage is collected");
                return Err(Error::new(error.kind(), "gc.unreadable", why)
                    .with_hint("bring it back with `pgvault undelete`, or use the pgvault version that wrote it")
                    .with_source(error));
            }
            Err(error) => return Err(error),
        };
        referred.passes = needed.passes;
        referred.packs.extend(needed.packs);
        referred.packs.sort_unstable();
        Ok(referred)
    }

    async fn add(&mut self, cluster: &Cluster, id: Ulid, size: u64) -> Result<()> {
        let snapshot = snapshot::open(cluster, id, Some(size)).await?;
        let past = Past::of(&snapshot.manifest);
        self.past = Some(self.past.map_or(past, |before| before.min(past)));
        let known = self.packs.len();
        self.packs.extend(snapshot.table_packs().map(|pack| pack.id));
        let mut table = snapshot.pack_table();
        while let Some(packs) = table.next_chunk().await? {
            for pack in packs {
                // Most are those of the backup before.
                if self.packs.get(..known).is_none_or(|known| known.binary_search(&pack.id).is_err()) {
                    self.packs.push(pack.id);
                }
            }
        }
        self.packs.sort_unstable();
        self.packs.dedup();
        Ok(())
    }

    fn has(&self, pack: &PackId) -> bool {
        self.packs.binary_search(pack).is_ok()
    }
}

/// Which plans may be swept now.
#[derive(Debug, Default)]
struct Ripeness {
    /// By the plan's number.
    ripe: Vec<bool>,
    postponed: Vec<String>,
}

impl Ripeness {
    async fn of(cluster: &Cluster, plans: &Planned, options: &GcOptions, now: Timestamp, live: &[Live]) -> Result<Self> {
        let mut ripeness = Self::default();
        let is_old = |stored_at: Timestamp| now.duration_since(stored_at) >= options.grace;
        let oldest = plans.plans.iter().filter(|plan| is_old(plan.stored_at)).map(|plan| seen_by(plan.looked_at)).min();
        // Only with somebody at work does it matter what has expired.
        let expired = match oldest {
            // Who captures filestores refers to no pack of a backup.
            Some(oldest) if live.iter().any(|live| live.purpose != Purpose::Filestore) => expired_since(cluster, oldest).await?,
            _ => Vec::new(),
        };
        for plan in &plans.plans {
            let mut ripe = is_old(plan.stored_at);
            if ripe && let Some(before) = live.iter().find(|live| live.began <= plan.stored_at) {
                let why = format!("plan {} waits for session {}, which began before it, at {}", plan.id, before.id, before.began);
                ripeness.postponed.push(why);
                ripe = false;
            } else if ripe
                && let Some(id) = expired.iter().find(|(_, at)| at.is_none_or(|at| at >= seen_by(plan.looked_at))).map(|(id, _)| id)
            {
                ripeness.postponed.push(format!(
                    "plan {} waits until no backup and no restore is under way: {id} was committed after it and has expired since, and \
                     they may need what it needed",
                    plan.id
                ));
                ripe = false;
            }
            ripeness.ripe.push(ripe);
        }
        Ok(ripeness)
    }

    fn is_ripe(&self, plan: u32) -> bool {
        self.ripe.get(plan as usize).copied().unwrap_or(false)
    }
}

/// What was committed before this was surely seen by who looked at `looked_at`. Some stores date an object when its upload begins.
fn seen_by(looked_at: Timestamp) -> Timestamp {
    looked_at.checked_sub(SignedDuration::from_hours(1)).unwrap_or(Timestamp::MIN)
}

/// The backups that expired at `since` or later, and when each was committed.
async fn expired_since(cluster: &Cluster, since: Timestamp) -> Result<Vec<(Ulid, Option<Timestamp>)>> {
    let mut expired = Vec::new();
    for object in cluster.store().list(&cluster.path(layout::dir::AUDIT)).await? {
        let is_one = layout::what_of(&object.name) == Some(event::BACKUP_EXPIRED) && object.last_modified >= since;
        let Some(id) = layout::id_of(&object.name).filter(|_| is_one) else { continue };
        match audit::read(cluster, &layout::audit(id, event::BACKUP_EXPIRED)).await {
            Ok(audit::Record { event: Event::BackupExpired { backup_id, committed }, .. }) => expired.push((backup_id, committed)),
            Ok(_) => {}
            // Of which backup it tells cannot be known.
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt) => expired.push((id, None)),
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(expired)
}

struct Collector<'a> {
    cluster: &'a Cluster,
    options: GcOptions,
    referred: Referred,
    plans: Planned,
    ripeness: Ripeness,
    youngest: Timestamp,
    /// Packs of each plan that are still there and may go later.
    remaining: BTreeMap<u32, u64>,
    writer: PlanWriter<'a>,
    pruner: Pruner,
    report: Collected,
}

impl Collector<'_> {
    async fn shard(&mut self, folder: &str) -> Result<()> {
        let prefix = self.cluster.path(folder);
        let store = self.cluster.store().clone();
        let mut found: Vec<(PackId, u64)> = Vec::new();
        store
            .each_page(&prefix, async |page| {
                let mut doomed = Vec::new();
                for object in page {
                    self.judge(object, &mut doomed, &mut found);
                }
                self.sweep(doomed).await
            })
            .await?;
        // A listing that broke off may have shown some of them twice.
        found.sort_unstable();
        found.dedup_by_key(|(id, _)| *id);
        for (id, size) in found {
            self.report.planned += 1;
            self.report.planned_bytes = self.report.planned_bytes.saturating_add(size);
            self.writer.add(id).await?;
        }
        Ok(())
    }

    fn judge(&mut self, object: ObjectInfo, doomed: &mut Vec<ObjectInfo>, found: &mut Vec<(PackId, u64)>) {
        // What has no name of a pack is not ours to delete.
        let is_pack =
            |id: &Ulid| [layout::pack(*id), layout::files_pack(*id)].iter().any(|name| self.cluster.path(name) == object.name);
        let Some(id) = layout::id_of(&object.name).filter(is_pack) else { return };
        self.report.packs += 1;
        let id = id.to_bytes();
        if self.referred.has(&id) {
            return;
        }
        let Some(plan) = self.plans.oldest_with(&id) else {
            found.push((id, object.size));
            return;
        };
        if self.ripeness.is_ripe(plan) && object.last_modified < self.youngest {
            doomed.push(object);
            return;
        }
        *self.remaining.entry(plan).or_default() += 1;
        self.report.waiting += 1;
        self.report.waiting_bytes = self.report.waiting_bytes.saturating_add(object.size);
    }

    async fn sweep(&mut self, doomed: Vec<ObjectInfo>) -> Result<()> {
        for (object, outcome) in self.pruner.delete(doomed).await? {
            if matches!(outcome, Ok(Pruned::Deleted)) && !self.options.dry_run {
                continue;
            }
            if let Some(plan) = layout::id_of(&object.name).and_then(|id| self.plans.oldest_with(&id.to_bytes())) {
                *self.remaining.entry(plan).or_default() += 1;
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Collected> {
        self.writer.close().await?;
        self.report.swept = std::mem::take(&mut self.pruner.tally);
        // What is left of such a plan is referred to again. It must not be believed when that ends.
        let done = self
            .plans
            .plans
            .iter()
            .zip(0u32..)
            .filter(|(_, number)| self.ripeness.is_ripe(*number) && self.remaining.get(number).is_none_or(|count| *count == 0));
        let done: Vec<ObjectInfo> = done.map(|(plan, _)| plan.object.clone()).collect();
        let _ = self.pruner.delete(done).await?;
        let passes = std::mem::take(&mut self.referred.passes);
        for some in passes.chunks(1000) {
            let _ = self.pruner.delete(some.to_vec()).await?;
        }
        tidy::tidy(self.cluster, self.report.now, self.referred.past, &mut self.pruner).await?;
        self.report.tidied = self.pruner.tally;
        Ok(self.report)
    }
}
