//! Which backup, which timeline, where to stop, and why.

use jiff::Timestamp;
use serde::Serialize;
use ulid::Ulid;

use super::branch::{self, Branch};
use super::target::Target;
use super::window::{self, Reach};
use crate::postgres::wal::{find_transaction, record_begins_at};
use crate::postgres::{Lsn, TimelineHistory, TimelineId, WalSegNo};
use crate::vault::snapshot::{self, Listing, Manifest, OpenSnapshot};
use crate::vault::{Cluster, drill, layout};
use crate::wal::catalog::Catalog;
use crate::wal::gap::{self, TimedGap};
use crate::{Error, ErrorKind, Result};

/// Where recovery stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "stop", rename_all = "kebab-case")]
pub enum Stop {
    /// Before the first transaction that ended later.
    Time {
        /// The moment.
        time: Timestamp,
    },
    /// At a position.
    Lsn {
        /// The position.
        lsn: Lsn,
        /// True: after the record that begins there. False: before the first record that begins there or later.
        inclusive: bool,
    },
    /// As soon as the backup is consistent.
    Consistent,
    /// At the end of the WAL.
    End,
}

/// What a restore is going to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What was asked for.
    pub target: Target,
    /// The backup it starts from.
    pub snapshot: OpenSnapshot,
    /// The timeline it follows.
    pub timeline: TimelineId,
    /// Where it stops.
    pub stop: Stop,
    /// WAL that recovery will ask for: from the backup's start to here at most.
    pub wal_end: Lsn,
    /// Where the last record of that WAL begins, when any does after the backup's start.
    pub last_record: Option<Lsn>,
    /// Timelines with transactions that this one does not have; they had ended when this one began, or do not concern the target.
    pub left_out: Vec<Branch>,
    /// Why this backup, in sentences.
    pub reasons: Vec<String>,
}

impl Plan {
    /// Makes the end of WAL a position: without a target a server opens by itself where it finds no more, and replays what was archived
    /// meanwhile. At a position it pauses, and can be looked at first.
    pub fn pin(&mut self) {
        if self.stop == Stop::End {
            // A server that finds no record behind the end of its backup does not notice that it is consistent.
            self.stop = self.last_record.map_or(Stop::Consistent, |lsn| Stop::Lsn { lsn, inclusive: true });
        }
    }
}

/// Choices that narrow a plan.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlanOptions {
    /// Start from this backup.
    pub backup: Option<Ulid>,
    /// Follow this timeline. Without it the newest is followed, unless another one lived on beside it and would give something else.
    pub timeline: Option<TimelineId>,
}

/// Manifests that are read at first. One of the newest that are old enough is nearly always the one, and a vault may have hundreds.
const LIKELY: usize = 8;

/// Makes a plan.
///
/// # Errors
/// [`ErrorKind::OutsideWindow`] when the target cannot be reached, and the message names the nearest point that can; or when it means
/// different things on different timelines (`restore.branches`).
pub async fn plan(cluster: &Cluster, target: &Target, options: PlanOptions) -> Result<Plan> {
    if *target == Target::LastVerified {
        return plan_proven(cluster, options).await;
    }
    let mut names = snapshot::names(cluster).await?;
    if let Some(id) = options.backup {
        names.retain(|(name, _)| *name == id);
        if names.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "backup.unknown", format!("there is no backup {id}"))
                .with_hint("`pgvault list` shows the backups"));
        }
        if let Some(damaged) = snapshot::open_all(cluster, names.clone()).await?.damaged.pop() {
            return Err(damaged.error);
        }
    }
    if names.len() > LIKELY {
        // Of other timelines, WAL and backups matter that are older than all of these.
        let timelines = cluster.store().list_directories(&cluster.path(layout::dir::WAL)).await?;
        let likely: Vec<_> = names.iter().rev().filter(|(id, _)| may_be_before(*id, target)).take(LIKELY).copied().collect();
        if timelines.len() == 1 && !likely.is_empty() {
            match plan_with(cluster, target, options, snapshot::open_all(cluster, likely).await?).await {
                // Another may reach it.
                Err(error) if matches!(error.kind(), ErrorKind::OutsideWindow | ErrorKind::Corrupt) => {}
                planned => return planned,
            }
        }
    }
    plan_with(cluster, target, options, snapshot::open_all(cluster, names).await?).await
}

/// The newest point that a restore drill has proven, from the newest backup that reaches it.
async fn plan_proven(cluster: &Cluster, mut options: PlanOptions) -> Result<Plan> {
    let proven = drill::last_passed(cluster).await?.map(|signed| signed.receipt);
    let Some((receipt, point)) = proven.and_then(|receipt| receipt.reached.clone().map(|point| (receipt, point))) else {
        return Err(Error::new(ErrorKind::OutsideWindow, "restore.not_verified", "no backup has passed a restore drill yet")
            .with_hint("run `pgvault verify`, or choose another target, for example `--to latest`"));
    };
    // Every record that begins before the end of the last one that was replayed.
    let mut target = Target::Lsn(Lsn(point.lsn.0.saturating_sub(1)));
    if let Some(id) = receipt.backup_id.filter(|id| options.backup.is_none_or(|backup| backup == *id)) {
        match snapshot::open(cluster, id, None).await {
            // The end of the backup itself: no target behind it is as near.
            Ok(snapshot) if point.lsn <= snapshot.manifest.stop_lsn => {
                options.backup = Some(id);
                target = Target::Immediate;
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    options.timeline = options.timeline.or(Some(point.timeline));
    let mut plan = Box::pin(plan(cluster, &target, options)).await?;
    plan.target = Target::LastVerified;
    plan.reasons.push(format!(
        "drill {} of {:.0} has proven {} on timeline {}{}",
        receipt.id,
        receipt.finished_at,
        point.lsn,
        point.timeline,
        point.time.map(|time| format!(", transactions up to {time}")).unwrap_or_default()
    ));
    Ok(plan)
}

/// False for a backup that, by the clock of who made it, began after the moment that is wanted.
fn may_be_before(backup: Ulid, target: &Target) -> bool {
    let began = i64::try_from(backup.timestamp_ms()).unwrap_or(i64::MAX);
    !matches!(target, Target::Time(time) if began > time.as_millisecond())
}

/// Makes a plan that starts from one of these backups.
async fn plan_with(cluster: &Cluster, target: &Target, options: PlanOptions, listing: Listing) -> Result<Plan> {
    let candidates = listing.snapshots;
    let damaged: Vec<String> = listing.damaged.iter().map(|d| format!("{} cannot be used: {}", d.id, d.error)).collect();
    let Some(oldest) = candidates.iter().min_by_key(|s| s.manifest.start_lsn) else {
        if !damaged.is_empty() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "restore.damaged",
                format!("no backup can be used: {}", damaged.join("; ")),
            ));
        }
        return Err(Error::new(ErrorKind::OutsideWindow, "restore.no_backup", format!("{} has no backup", cluster.name()))
            .with_hint("nothing can be restored before the first `pgvault backup` has finished"));
    };
    let loading = Catalog::load(cluster, oldest.manifest.wal_segment_size, oldest.manifest.start_lsn);
    let (catalog, recorded) = tokio::try_join!(loading, gap::recorded(cluster))?;
    let gaps = gap::open_of(cluster, &catalog, recorded).await?;
    let planner = Planner { cluster, catalog, gaps, candidates, damaged, options, target };
    planner.plan().await
}

struct Planner<'a> {
    cluster: &'a Cluster,
    catalog: Catalog,
    gaps: Vec<TimedGap>,
    /// Oldest first.
    candidates: Vec<OpenSnapshot>,
    /// Why others are not among them.
    damaged: Vec<String>,
    options: PlanOptions,
    target: &'a Target,
}

impl Planner<'_> {
    async fn plan(self) -> Result<Plan> {
        if *self.target == Target::Immediate {
            return self.immediate().await;
        }
        let timeline = self.options.timeline.or(self.catalog.newest_timeline());
        let Some(timeline) = timeline else {
            return Err(Error::new(ErrorKind::OutsideWindow, "restore.no_wal", "the vault holds no WAL"));
        };
        let history = self.catalog.history(timeline)?;
        let mut reasons = self.damaged.clone();
        // Candidates are tried newest first: the last one that starts too late is the nearest point behind the target, the first whose
        // WAL ends too early the nearest before it.
        let (mut before, mut behind): (Option<String>, Option<String>) = (None, None);
        let resolved = self.resolve(&history).await?;
        let backups = self.candidates.iter().map(|s| &s.manifest);
        let left_out = branch::beside(self.cluster, &self.catalog, &history, backups).await?;
        if self.options.timeline.is_none() {
            branch::ensure_undisputed(&left_out, &history, self.target, resolved)?;
        }
        for snapshot in self.candidates.iter().rev() {
            let backup = &snapshot.manifest;
            if !window::is_on(&history, backup) {
                reasons.push(format!(
                    "{} ended at {} on timeline {}, which is not part of the history of timeline {timeline}",
                    backup.id, backup.stop_lsn, backup.timeline
                ));
                continue;
            }
            if let Some(why) = starts_too_late(backup, self.target, resolved) {
                behind = Some(format!(
                    "the first moment that {} reaches is {} (lsn:{})",
                    backup.id, backup.finished_at, backup.stop_lsn
                ));
                reasons.push(why);
                continue;
            }
            let contiguous = self.catalog.contiguous_end(&history, backup.start_lsn);
            if contiguous < backup.stop_lsn {
                reasons.push(format!(
                    "{} needs WAL from {} to {}, but the vault has it only up to {contiguous}",
                    backup.id, backup.start_lsn, backup.stop_lsn
                ));
                continue;
            }
            if let Some(missing) = self.missing_history(backup.timeline, timeline) {
                reasons.push(format!(
                    "{}: the history file of timeline {missing}, on the way from timeline {} to {timeline}, is not in the vault",
                    backup.id, backup.timeline
                ));
                continue;
            }
            let reach = window::reach(self.cluster, &self.catalog, &history, backup).await?;
            match self.stop(&history, backup, &reach, contiguous, resolved).await? {
                Ok(stop) => {
                    reasons.push(format!(
                        "{} finished at {} ({}) on timeline {}; WAL is whole from {} to {contiguous} on the way to timeline {timeline}",
                        backup.id, backup.finished_at, backup.stop_lsn, backup.timeline, backup.start_lsn
                    ));
                    return Ok(Plan {
                        target: self.target.clone(),
                        snapshot: snapshot.clone(),
                        timeline,
                        stop,
                        wal_end: contiguous,
                        last_record: reach.last_record,
                        left_out,
                        reasons,
                    });
                }
                Err((why, near)) => {
                    reasons.push(format!("{}: {why}", backup.id));
                    before = before.or(Some(near));
                }
            }
        }
        let mut error = Error::new(
            ErrorKind::OutsideWindow,
            "restore.outside_window",
            format!("{} cannot be restored: {}", self.target, reasons.join("; ")),
        );
        let nearest: Vec<String> = before.into_iter().chain(behind).collect();
        if !nearest.is_empty() {
            error = error.with_hint(format!("nearest: {}", nearest.join("; ")));
        }
        Err(error)
    }

    /// A timeline between two others that PostgreSQL will ask for the history of, and not get (H7).
    fn missing_history(&self, from: TimelineId, to: TimelineId) -> Option<TimelineId> {
        let between = self.catalog.timelines.keys().filter(|timeline| from < **timeline && **timeline < to);
        between.copied().find(|timeline| !self.catalog.histories.contains_key(timeline))
    }

    async fn immediate(self) -> Result<Plan> {
        let mut reasons = self.damaged.clone();
        for snapshot in self.candidates.iter().rev() {
            let backup = &snapshot.manifest;
            // T16: the backup's own timeline, whatever came after it.
            let history = self.catalog.history(backup.timeline).unwrap_or_else(|_| TimelineHistory::root(backup.timeline));
            let contiguous = self.catalog.contiguous_end(&history, backup.start_lsn);
            if contiguous >= backup.stop_lsn {
                reasons.push(format!("{} is the newest backup with all the WAL it needs", backup.id));
                let reach = window::reach(self.cluster, &self.catalog, &history, backup).await?;
                // PostgreSQL looks whether it is consistent before it replays the next record, and takes it for a failure when
                // there is none: so it is with a backup of a standby whose primary was idle.
                let stop = match reach.last_record {
                    Some(lsn) if lsn < backup.stop_lsn => Stop::Lsn { lsn, inclusive: true },
                    _ => Stop::Consistent,
                };
                return Ok(Plan {
                    target: self.target.clone(),
                    snapshot: snapshot.clone(),
                    timeline: backup.timeline,
                    stop,
                    wal_end: backup.stop_lsn,
                    last_record: reach.last_record,
                    left_out: Vec::new(),
                    reasons,
                });
            }
            reasons
                .push(format!("{} needs WAL up to {}, but the vault has it only up to {contiguous}", backup.id, backup.stop_lsn));
        }
        Err(Error::new(
            ErrorKind::OutsideWindow,
            "restore.outside_window",
            format!("no backup is complete: {}", reasons.join("; ")),
        ))
    }

    /// Turns names and transactions into the position of their record.
    async fn resolve(&self, history: &TimelineHistory) -> Result<Option<Lsn>> {
        let from = self.candidates.iter().map(|s| s.manifest.start_lsn).min().unwrap_or_default();
        let to =
            self.candidates.iter().map(|s| self.catalog.contiguous_end(history, s.manifest.start_lsn)).max().unwrap_or_default();
        let found = match self.target {
            Target::Name(name) => {
                let look = async |_, info: &crate::wal::object::WalInfo| Ok(window::named(info, name).map(|point| point.lsn));
                window::search(self.cluster, &self.catalog, history, from, to, look).await?
            }
            Target::Xid(xid) => {
                let look = async |number: WalSegNo, info: &crate::wal::object::WalInfo| {
                    if !window::may_hold(info.transactions, *xid) {
                        return Ok(None);
                    }
                    let Some(bytes) = window::segment(self.cluster, &self.catalog, history, number).await? else { return Ok(None) };
                    let size = self.catalog.segment_size;
                    let end = find_transaction(&bytes, number.start(size), size, *xid);
                    Ok(end.map_err(|e| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", e.to_string()))?.map(|end| end.lsn))
                };
                window::search(self.cluster, &self.catalog, history, from, to, look).await?
            }
            _ => return Ok(None),
        };
        if found.is_some() {
            return Ok(found);
        }
        Err(Error::new(
            ErrorKind::OutsideWindow,
            "restore.no_such_point",
            format!("{} does not occur in the WAL from {from} to {to} of timeline {}", self.target, history.timeline()),
        )
        .with_hint("nearest: `pgvault list` shows the window; restore by time or LSN instead"))
    }

    /// Where to stop, or why this backup does not reach the target and what it reaches instead.
    async fn stop(
        &self,
        history: &TimelineHistory,
        backup: &Manifest,
        reach: &Reach,
        contiguous: Lsn,
        resolved: Option<Lsn>,
    ) -> Result<Result<Stop, (String, String)>> {
        let latest = reach.last_transaction.map_or_else(
            || format!("lsn:{} (no transaction ended after the backup)", reach.end),
            |(time, _)| format!("{time} (lsn:{})", reach.end),
        );
        let gap = self.behind(history, contiguous);
        let ends = |at: &str| match &gap {
            Some(gap) => format!("the WAL ends too early, at {at}, and {gap}"),
            None => format!("the WAL ends too early, at {at}"),
        };
        Ok(match self.target {
            Target::Latest => match &gap {
                Some(gap) => {
                    Err((format!("WAL is whole only up to {contiguous}, and {gap}"), format!("lsn:{}, or {latest}", reach.end)))
                }
                // Of the segment in which it was left, the parent may have archived more than its heir took over. Until the heir has
                // archived a segment of its own, PostgreSQL would be given that and replay it.
                None if contiguous <= history.begin() => match reach.last_record {
                    Some(lsn) => Ok(Stop::Lsn { lsn, inclusive: true }),
                    None => Ok(Stop::Consistent),
                },
                None => Ok(Stop::End),
            },
            Target::Time(time) => match reach.last_transaction {
                Some((last, _)) if *time < last => Ok(Stop::Time { time: *time }),
                // The last transaction itself: PostgreSQL would look for a later one and fail. Nothing in this WAL ended later, so
                // its last record is the place; that of the latest time need not be, because records are not in order of time.
                Some((last, lsn)) if *time == last => {
                    Ok(Stop::Lsn { lsn: reach.last_record.unwrap_or(lsn).max(lsn), inclusive: true })
                }
                _ => Err((ends(&latest), format!("the last moment is {latest}"))),
            },
            Target::Lsn(lsn) => {
                if *lsn > reach.end {
                    Err((ends(&format!("lsn:{}", reach.end)), format!("the last position is lsn:{}", reach.end)))
                } else if let Some(last) = reach.last_record.filter(|last| last < lsn) {
                    // Every record there is begins before the target. More may be archived before the server asks for it, so the
                    // stop is pinned to what is there now.
                    Ok(Stop::Lsn { lsn: last, inclusive: true })
                } else if reach.last_record.is_none() {
                    Ok(Stop::End)
                } else {
                    Ok(Stop::Lsn { lsn: *lsn, inclusive: self.begins_at(history, *lsn).await? })
                }
            }
            Target::Xid(_) | Target::Name(_) => match resolved {
                Some(lsn) if lsn < contiguous => Ok(Stop::Lsn { lsn, inclusive: true }),
                _ => Err((ends(&format!("lsn:{}", reach.end)), format!("the last position is lsn:{}", reach.end))),
            },
            Target::Immediate | Target::LastVerified => {
                debug_assert!(false, "{} of {} is planned elsewhere", self.target, backup.id);
                Ok(Stop::Consistent)
            }
        })
    }

    /// What is known of WAL of this history behind a hole at `end`.
    fn behind(&self, history: &TimelineHistory, end: Lsn) -> Option<String> {
        let is_on = |gap: &&TimedGap| gap.timeline == history.timeline() || history.contains(gap.timeline, gap.from);
        if let Some(gap) = self.gaps.iter().filter(is_on).find(|gap| gap.from <= end && end < gap.to) {
            return Some(format!("behind it is a gap: {gap}"));
        }
        let objects = self.catalog.timelines.get(&history.timeline())?;
        let size = self.catalog.segment_size;
        let last = objects.last()?;
        let start = last.segment_number(size).ok()?.start(size);
        let again = match objects.hole(last) {
            Some((_, to)) => start.advance(to.into()),
            None => start,
        };
        (again > end).then(|| format!("there is WAL again at {again}, behind a gap"))
    }

    /// True when a record begins exactly at `lsn`.
    async fn begins_at(&self, history: &TimelineHistory, lsn: Lsn) -> Result<bool> {
        let size = self.catalog.segment_size;
        let number = WalSegNo::containing(lsn, size);
        let Some(bytes) = window::segment(self.cluster, &self.catalog, history, number).await? else { return Ok(false) };
        record_begins_at(&bytes, number.start(size), size, lsn)
            .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", e.to_string()))
    }
}

/// Says why a backup cannot reach back to the target.
fn starts_too_late(backup: &Manifest, target: &Target, resolved: Option<Lsn>) -> Option<String> {
    let position = match target {
        Target::Time(time) if backup.finished_at > *time => {
            return Some(format!("{} finished at {}, after the target", backup.id, backup.finished_at));
        }
        Target::Lsn(lsn) => Some(*lsn),
        _ => resolved,
    };
    let position = position.filter(|position| backup.stop_lsn > *position)?;
    Some(format!("{} is consistent from {} on, after {position}", backup.id, backup.stop_lsn))
}
