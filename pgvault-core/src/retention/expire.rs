//! Carrying out a plan: a record first, then the manifests, then the WAL that nobody needs any more.
//!
//! Each step leaves a vault that is whole. A manifest is recorded as expired before it goes, so that its absence is never taken for
//! damage; the WAL goes last, and only what no manifest needs that is still there. Whoever stops in between, or is stopped, has
//! deleted less than it might have: the next run goes on.
//!
//! A restore announces itself, and looks afterwards whether its backup is still there. Sessions are listed right before the manifests
//! are deleted and once more before the WAL is: so either the restore is seen, or it sees that its backup is gone. The same for a backup:
//! either its session is seen, or, in one more look at the manifests after that, what it has committed.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use ulid::Ulid;

use super::plan::{Backup, Known, Line, Need, Plan, Reason, Verdict};
use super::policy::Policy;
use super::wal::Needed;
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName, WalSegNo};
use crate::store::{ObjectInfo, Pruned};
use crate::vault::audit::{self, Event};
use crate::vault::prune::{Pruner, Tally};
use crate::vault::session::{Live, MAX_HOURS, Purpose, Session, Watch};
use crate::vault::{Cluster, hold, layout, snapshot};
use crate::wal::catalog::read_history;
use crate::wal::object::WalName;
use crate::{Error, ErrorKind, Result};

/// WAL that is so much older than the session of a writer may be needed by what it commits: a standby lags behind.
const LAG_HOURS: i64 = MAX_HOURS;

/// How to expire.
#[derive(Debug, Clone)]
pub struct ExpireOptions {
    /// What to keep.
    pub policy: Policy,
    /// Delete nothing.
    pub dry_run: bool,
    /// Backups that have passed a restore drill.
    pub verified: BTreeSet<Ulid>,
}

/// A backup whose manifest cannot be read. It is not expired: nobody knows what it is.
#[derive(Debug, Clone, Serialize)]
pub struct Unreadable {
    /// The backup.
    pub backup_id: Ulid,
    /// What is wrong.
    pub problem: String,
    /// When the store says that it was written.
    pub stored_at: Timestamp,
}

/// What was done.
#[derive(Debug, Clone, Serialize)]
pub struct Expired {
    /// The time, by the store's clock.
    pub now: Timestamp,
    /// The beginning of the window, if there is one.
    pub window_begin: Option<Timestamp>,
    /// What was decided of each backup, oldest first.
    pub backups: Vec<Verdict>,
    /// Backups that are gone; with a dry run those that would be.
    pub expired: Vec<Ulid>,
    /// Backups that could not be judged.
    pub damaged: Vec<Unreadable>,
    /// Manifests.
    pub manifests: Tally,
    /// WAL.
    pub wal: Tally,
    /// What else somebody should know.
    pub notes: Vec<String>,
}

impl Expired {
    /// True when something that should have gone is still there and may go when this is run again.
    pub fn is_incomplete(&self) -> bool {
        self.manifests.failed + self.wal.failed > 0
    }
}

/// Expires what the policy does not keep. `tell` hears of each WAL object that goes, by its full name.
///
/// # Errors
/// When the store fails, or a hold cannot be read. What was deleted until then was not needed; the call may be repeated.
pub async fn expire(cluster: &Cluster, options: &ExpireOptions, mut tell: impl FnMut(&ObjectInfo)) -> Result<Expired> {
    let session = begin(cluster, options.dry_run).await?;
    let now = session.as_ref().map_or_else(|| cluster.store().now(), |session| session.began);
    let Loaded { mut known, damaged, mut manifests } = load(cluster, now, options.verified.clone()).await?;
    let looked_at: BTreeSet<Ulid> = manifests.keys().copied().collect();
    let mut pruner = Pruner::new(cluster.store(), now, options.dry_run).await?;
    let mut watch = Watch::default();
    add_readers(&mut known, &watch.live(cluster, now).await?);
    // A backup that the store does not let go stays a backup, with the WAL that it needs.
    let first = Plan::new(&options.policy, &known);
    let doomed: Vec<ObjectInfo> = first.expiring().filter_map(|b| manifests.get(&b.id).cloned()).collect();
    if pruner.may_lock() && !doomed.is_empty() {
        let free: BTreeSet<String> = pruner.unlocked(doomed.clone()).await.into_iter().map(|object| object.name).collect();
        for object in doomed.iter().filter(|object| !free.contains(&object.name)) {
            let Some(id) = layout::id_of(&object.name) else { continue };
            let until = pruner.tally.left.iter().find(|left| left.name == object.name).and_then(|left| left.until);
            let _ = known.locked.insert(id, until);
        }
    }
    // Since the vault was read, hours may have passed. Whoever holds or reads by now is seen.
    known.holds = hold::active(cluster).await?;
    add_readers(&mut known, &watch.live(cluster, now).await?);
    let plan = Plan::new(&options.policy, &known);

    let mut report = Expired {
        now,
        window_begin: plan.window,
        backups: Vec::new(),
        expired: Vec::new(),
        damaged,
        manifests: Tally::default(),
        wal: Tally::default(),
        notes: Vec::new(),
    };
    let mut needs = plan.needs.clone();
    for backup in plan.expiring() {
        let Some(object) = manifests.remove(&backup.id) else { continue };
        ensure_live(cluster, session.as_ref(), options.dry_run).await?;
        let gone = match record(cluster, options.dry_run, expired_event(backup)).await {
            Ok(()) => {
                let done = pruner.delete(vec![object]).await?;
                done.iter().any(|(_, outcome)| matches!(outcome, Ok(Pruned::Deleted)))
            }
            Err(error) => {
                report.notes.push(format!("{} was not expired, because that could not be recorded: {error}", backup.id));
                pruner.tally.failed += 1;
                false
            }
        };
        if gone {
            report.expired.push(backup.id);
        } else {
            needs.push(own_need(backup));
        }
    }
    report.manifests = std::mem::take(&mut pruner.tally);
    report.backups = plan.verdicts.clone();

    let live = watch.live(cluster, now).await?;
    needs.extend(live.iter().filter_map(|live| live.reads).map(|reads| Need {
        timeline: reads.timeline,
        stop: reads.stop_lsn,
        from: reads.start_lsn,
        to: None,
    }));
    // Committed since the manifests were read: the session is over, and the plan knows nothing of what it stored.
    let late = backups(cluster, &looked_at).await?;
    needs.extend(late.known.iter().map(|(backup, _)| Need { to: None, ..own_need(backup) }));
    report.damaged.extend(late.damaged.into_iter().map(|(damaged, _)| damaged));
    match segment_size(&known.backups) {
        Ok(size) => {
            let kept = kept_timelines(&plan);
            let cutoff = cutoff(&plan, now, &live, &report.damaged);
            let (lines, dry_run) = (&known.lines, options.dry_run);
            let mut wal = Wal { cluster, session, lines, needs, kept, size, cutoff, dry_run, pruner };
            for timeline in known.lines.keys() {
                wal.expire(*timeline, &mut tell).await?;
            }
            report.wal = wal.pruner.tally;
        }
        Err(why) => report.notes.push(why),
    }
    Ok(report)
}

/// What would be kept, and why, without any policy's counts: for who wants to know what a hold or a lock is about.
///
/// # Errors
/// As [`expire`].
pub async fn known(cluster: &Cluster) -> Result<Known> {
    let now = begin(cluster, true).await?.map_or_else(|| cluster.store().now(), |session| session.began);
    Ok(load(cluster, now, BTreeSet::new()).await?.known)
}

/// Announces the run, which tells the store's time; nothing with credentials that may only read and a dry run, for which the dates of
/// the store's answers have to do.
async fn begin(cluster: &Cluster, dry_run: bool) -> Result<Option<Session>> {
    match Session::begin(cluster, Purpose::Prune, cluster.env().new_id()?).await {
        Ok(session) => Ok(Some(session)),
        Err(error) if dry_run && !error.is_transient() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes sure that a plan is not carried out days after it was made: holds were placed since, and others wait for this to be over.
async fn ensure_live(cluster: &Cluster, session: Option<&Session>, dry_run: bool) -> Result<()> {
    match session {
        Some(session) if !dry_run => session.ensure_live(cluster).await,
        _ => Ok(()),
    }
}

struct Loaded {
    known: Known,
    damaged: Vec<Unreadable>,
    manifests: BTreeMap<Ulid, ObjectInfo>,
}

/// Manifests, each with its object.
#[derive(Default)]
struct Backups {
    known: Vec<(Backup, ObjectInfo)>,
    damaged: Vec<(Unreadable, ObjectInfo)>,
}

/// Reads the manifests that are there, but for those that were looked at before.
async fn backups(cluster: &Cluster, before: &BTreeSet<Ulid>) -> Result<Backups> {
    let mut found = Backups::default();
    for object in cluster.store().list(&cluster.path(layout::dir::SNAP)).await? {
        let Some(id) = layout::id_of(&object.name).filter(|id| object.name == cluster.path(&layout::snapshot(*id))) else {
            continue;
        };
        if before.contains(&id) {
            continue;
        }
        match snapshot::open(cluster, id, Some(object.size)).await {
            Ok(opened) => found.known.push((Backup::of(&opened.manifest, object.last_modified), object)),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                let damaged = Unreadable { backup_id: id, problem: error.to_string(), stored_at: object.last_modified };
                found.damaged.push((damaged, object));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

async fn load(cluster: &Cluster, now: Timestamp, verified: BTreeSet<Ulid>) -> Result<Loaded> {
    let holds = hold::active(cluster).await?;
    let (mut backups, mut damaged, mut manifests) = (Vec::new(), Vec::new(), BTreeMap::new());
    let found = self::backups(cluster, &BTreeSet::new()).await?;
    for (backup, object) in found.known {
        let _ = manifests.insert(backup.id, object);
        backups.push(backup);
    }
    for (unreadable, object) in found.damaged {
        let _ = manifests.insert(unreadable.backup_id, object);
        damaged.push(unreadable);
    }
    let lines = lines(cluster).await?;
    let known = Known { now, backups, lines, holds, reading: Vec::new(), verified, locked: BTreeMap::new() };
    Ok(Loaded { known, damaged, manifests })
}

fn add_readers(known: &mut Known, live: &[Live]) {
    for reads in live.iter().filter_map(|live| live.reads) {
        if !known.reading.contains(&reads) {
            known.reading.push(reads);
        }
    }
}

async fn lines(cluster: &Cluster) -> Result<BTreeMap<TimelineId, Line>> {
    let mut lines = BTreeMap::new();
    for directory in cluster.store().list_directories(&cluster.path(layout::dir::WAL)).await? {
        let Ok(timeline) = TimelineId::from_hex(&directory) else { continue };
        let history = match read_history(cluster, timeline).await {
            Ok(Some(history)) => Some(history),
            Ok(None) => (timeline == TimelineId(1)).then(|| TimelineHistory::root(timeline)),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => None,
            Err(error) => return Err(error),
        };
        let mut newest: Option<Timestamp> = None;
        let folder = cluster.path(&layout::wal_timeline(timeline));
        cluster
            .store()
            .each_page(&folder, async |page| {
                newest = newest.max(page.iter().map(|object| object.last_modified).max());
                Ok(())
            })
            .await?;
        let _ = lines.insert(timeline, Line { history, newest });
    }
    Ok(lines)
}

fn expired_event(backup: &Backup) -> Event {
    Event::BackupExpired { backup_id: backup.id, committed: Some(backup.stored_at) }
}

fn own_need(backup: &Backup) -> Need {
    Need { timeline: backup.timeline, stop: backup.stop, from: backup.start, to: Some(backup.stop) }
}

async fn record(cluster: &Cluster, dry_run: bool, event: Event) -> Result<()> {
    if dry_run { Ok(()) } else { audit::record(cluster, event).await }
}

/// The segment size that all backups share; otherwise why no WAL can be judged.
fn segment_size(backups: &[Backup]) -> Result<SegmentSize, String> {
    let sizes: BTreeSet<u64> = backups.iter().map(|b| b.segment_size.bytes()).collect();
    match backups.first() {
        None => Err("there is no backup that can be read, so no WAL is deleted".into()),
        Some(backup) if sizes.len() == 1 => Ok(backup.segment_size),
        Some(_) => {
            Err("the backups have WAL segments of different sizes, so no WAL is deleted until the older ones expired".into())
        }
    }
}

/// WAL that was stored later than this is not deleted, needed or not.
fn cutoff(plan: &Plan, now: Timestamp, live: &[Live], damaged: &[Unreadable]) -> Timestamp {
    let before = |at: Timestamp, hours| at.checked_sub(SignedDuration::from_hours(hours)).unwrap_or(Timestamp::MIN);
    // What is going to be committed begins about then, and where is not known yet.
    let writing = live.iter().filter(|live| live.may_commit()).map(|live| before(live.began, LAG_HOURS));
    // Of what cannot be read it is known only that it was committed by a session.
    let unknown = damaged.iter().map(|damaged| before(damaged.stored_at, MAX_HOURS + LAG_HOURS));
    writing.chain(unknown).chain(plan.window).fold(now, Timestamp::min)
}

fn kept_timelines(plan: &Plan) -> BTreeSet<TimelineId> {
    plan.verdicts.iter().filter(|verdict| !verdict.kept.is_empty()).map(|verdict| verdict.backup.timeline).collect()
}

struct Wal<'a> {
    cluster: &'a Cluster,
    session: Option<Session>,
    lines: &'a BTreeMap<TimelineId, Line>,
    needs: Vec<Need>,
    /// Timelines of kept backups.
    kept: BTreeSet<TimelineId>,
    size: SegmentSize,
    cutoff: Timestamp,
    dry_run: bool,
    pruner: Pruner,
}

impl Wal<'_> {
    async fn expire(&mut self, timeline: TimelineId, tell: &mut impl FnMut(&ObjectInfo)) -> Result<()> {
        let needed = Needed::on(timeline, &self.needs, self.lines, self.size);
        let folder = self.cluster.path(&layout::wal_timeline(timeline));
        let (mut history, mut remain) = (None, false);
        let mut recorded: BTreeSet<(u64, u64)> = BTreeSet::new();
        let store = self.cluster.store();
        store
            .each_page(&folder, async |page| {
                let mut doomed = Vec::new();
                let mut segments = Vec::new();
                for object in page {
                    match self.segment(timeline, &object.name) {
                        Part::Of(segment) if object.last_modified < self.cutoff && !needed.has(segment) => {
                            segments.push((object.name.clone(), segment));
                            doomed.push(object);
                        }
                        Part::History => history = Some(object),
                        Part::Of(_) | Part::Strange => remain = true,
                    }
                }
                let free = self.pruner.unlocked(doomed).await;
                remain |= free.len() < segments.len();
                let going: BTreeSet<&str> = free.iter().map(|object| object.name.as_str()).collect();
                let numbers: Vec<WalSegNo> =
                    segments.iter().filter(|(name, _)| going.contains(name.as_str())).map(|(_, segment)| *segment).collect();
                if !free.is_empty() {
                    ensure_live(self.cluster, self.session.as_ref(), self.dry_run).await?;
                }
                self.announce(timeline, &needed, &numbers, &mut recorded).await?;
                for (object, outcome) in self.pruner.delete(free).await? {
                    match outcome {
                        Ok(Pruned::Deleted) => tell(&object),
                        _ => remain = true,
                    }
                }
                Ok(())
            })
            .await?;
        match history {
            Some(object) if !remain && needed.is_empty() && object.last_modified < self.cutoff && self.forgets(timeline) => {
                for (object, outcome) in self.pruner.delete(vec![object]).await? {
                    if matches!(outcome, Ok(Pruned::Deleted)) {
                        tell(&object);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn segment(&self, timeline: TimelineId, object: &str) -> Part {
        let named = WalName::parse(object).filter(|name| name.timeline() == timeline);
        let of = |segment: SegmentName| segment.segment_number(self.size).map_or(Part::Strange, Part::Of);
        match named {
            Some(
                WalName::Part { segment, .. }
                | WalName::File(
                    WalFileName::Segment(segment) | WalFileName::Partial(segment) | WalFileName::BackupHistory(segment, _),
                ),
            ) => of(segment),
            Some(WalName::File(WalFileName::History(_))) => Part::History,
            None => Part::Strange,
        }
    }

    /// Records what is about to be deleted: a hole in the archive that nobody made on purpose is a gap, and this is none.
    async fn announce(
        &self,
        timeline: TimelineId,
        needed: &Needed,
        segments: &[WalSegNo],
        recorded: &mut BTreeSet<(u64, u64)>,
    ) -> Result<()> {
        let Some(last) = segments.iter().max().copied() else { return Ok(()) };
        // Each from its very beginning, so that what page after page records is one range.
        for (from, to) in needed.gaps(WalSegNo(0), last) {
            let concerned = segments.iter().any(|segment| (from..=to).contains(segment));
            if !concerned || !recorded.insert((from.0, to.0)) {
                continue;
            }
            let (from, to): (Lsn, Lsn) = (from.start(self.size), to.next().start(self.size));
            record(self.cluster, self.dry_run, Event::WalExpired { timeline, from, to }).await?;
        }
        Ok(())
    }

    /// True for a timeline whose history nobody will ask for: no ancestor of another, and not in the middle of those that are left.
    ///
    /// A server looks for the newest timeline by asking for one history after the other, and ends at the first that is missing (H7).
    fn forgets(&self, timeline: TimelineId) -> bool {
        let is_ancestor = |line: &Line| {
            line.history.as_ref().is_none_or(|history| history.ancestors().iter().any(|ancestor| ancestor.timeline == timeline))
        };
        let others = || self.lines.iter().filter(|(other, _)| **other != timeline);
        let reached = |other: TimelineId| !Needed::on(other, &self.needs, self.lines, self.size).is_empty();
        let first = self.kept.first().is_some_and(|first| timeline < *first);
        let last = others().all(|(other, _)| *other < timeline || !reached(*other));
        !self.kept.contains(&timeline) && (first || last) && !others().any(|(_, line)| is_ancestor(line))
    }
}

/// What an object of WAL is.
enum Part {
    /// Of a segment.
    Of(WalSegNo),
    /// The history of the timeline.
    History,
    /// Not pgvault's.
    Strange,
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "backup {} cannot be judged, and is kept: {}", self.backup_id, self.problem)
    }
}

/// In a sentence, why a backup is kept.
pub fn reasons(kept: &[Reason]) -> String {
    kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Refuses what is no id of a backup that is there.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none of that id.
pub async fn ensure_backup(cluster: &Cluster, id: Ulid) -> Result<()> {
    match cluster.store().head(&cluster.path(&layout::snapshot(id))).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Error::new(ErrorKind::NotFound, "backup.unknown", format!("there is no backup {id}"))
                .with_hint("`pgvault list` shows the backups"))
        }
        Err(error) => Err(error),
    }
}
