//! Which backups are kept, each with its reasons, and which WAL that needs.
//!
//! Nothing here asks a store: what is known comes in, a decision comes out, so that every rule can be tried on a page of backups.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use ulid::Ulid;

use super::policy::{Period, Policy};
use crate::config::KeepWal;
use crate::postgres::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use crate::vault::hold::{Hold, Scope};
use crate::vault::session::{MAX_HOURS, Reads};
use crate::vault::snapshot::Manifest;

/// A backup as retention sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Backup {
    /// Its id.
    pub id: Ulid,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start: Lsn,
    /// Where it is consistent.
    pub stop: Lsn,
    /// When the store says that its manifest was written: its age. What the manifest itself says is its writer's word.
    pub stored_at: Timestamp,
    /// When it began, as its manifest says.
    #[serde(skip)]
    pub started_at: Timestamp,
    /// When it ended, as its manifest says: in a copy of a vault, to which it came later, the only word on how old its pages are.
    #[serde(skip)]
    pub finished_at: Timestamp,
    /// False when pages of it were bad at the source.
    pub whole: bool,
    /// Bytes of a WAL segment.
    pub segment_size: SegmentSize,
}

impl Backup {
    /// The backup of a manifest that the store wrote at `stored_at`.
    pub fn of(manifest: &Manifest, stored_at: Timestamp) -> Self {
        Self {
            id: manifest.id,
            timeline: manifest.timeline,
            start: manifest.start_lsn,
            stop: manifest.stop_lsn,
            stored_at,
            started_at: manifest.started_at,
            finished_at: manifest.finished_at,
            whole: manifest.bad_pages.is_empty(),
            segment_size: manifest.wal_segment_size,
        }
    }
}

/// A timeline as retention sees it.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its ancestry; `None` when the history file is not in the vault or damaged.
    pub history: Option<TimelineHistory>,
    /// When its newest WAL was stored; `None` when it has none.
    pub newest: Option<Timestamp>,
}

/// Everything that a plan is made of.
#[derive(Debug, Clone)]
pub struct Known {
    /// The time, by the store's clock.
    pub now: Timestamp,
    /// The backups that can be read, in any order.
    pub backups: Vec<Backup>,
    /// The timelines.
    pub lines: BTreeMap<TimelineId, Line>,
    /// The holds in force.
    pub holds: Vec<Hold>,
    /// What is read at the moment.
    pub reading: Vec<Reads>,
    /// Backups that have passed a restore drill.
    pub verified: BTreeSet<Ulid>,
    /// Backups whose manifests are locked, and until when, as far as the store tells.
    pub locked: BTreeMap<Ulid, Option<Timestamp>>,
}

/// Why a backup is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    /// It lies in the window.
    Window,
    /// The window's first moments on a timeline are restored from it.
    WindowBegin {
        /// The timeline.
        timeline: TimelineId,
    },
    /// Nothing newer is there.
    Newest,
    /// It is one of the last so many.
    Last,
    /// It is the newest of its day, week, month or year.
    Generation {
        /// Which of these.
        period: Period,
    },
    /// There would be too few without it.
    Minimum,
    /// Others that are kept have bad pages, and it has none.
    Whole,
    /// It is the last one that has passed a restore drill.
    Verified,
    /// A hold holds it.
    Held {
        /// The hold.
        hold_id: Ulid,
    },
    /// Somebody restores from it at the moment.
    Read,
    /// The store keeps it, until then as far as it tells.
    Locked {
        /// The end of the lock.
        until: Option<Timestamp>,
    },
}

impl Reason {
    /// True when it asks for the moments since the backup, and not for the backup alone.
    fn asks_for_what_follows(self, wal: KeepWal) -> bool {
        match self {
            Self::Held { .. } | Self::Locked { .. } => false,
            Self::Generation { .. } | Self::Last | Self::Minimum | Self::Whole | Self::Verified => wal == KeepWal::All,
            Self::Window | Self::WindowBegin { .. } | Self::Newest | Self::Read => true,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window => write!(f, "inside the window"),
            Self::WindowBegin { timeline } => write!(f, "the window on timeline {timeline} begins with it"),
            Self::Newest => write!(f, "the newest"),
            Self::Last => write!(f, "one of the last"),
            Self::Generation { period } => write!(f, "the newest of its {}", period.name()),
            Self::Minimum => write!(f, "there would be too few whole backups without it"),
            Self::Whole => write!(f, "it is whole, and what is kept after it has bad pages"),
            Self::Verified => write!(f, "the last that has passed a restore drill"),
            Self::Held { hold_id } => write!(f, "held by {hold_id}"),
            Self::Read => write!(f, "somebody restores from it"),
            Self::Locked { until: Some(until) } => write!(f, "locked until {until}"),
            Self::Locked { until: None } => write!(f, "locked by the store"),
        }
    }
}

/// WAL that is needed, on the backup's timeline and on all that go on from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The backup's timeline.
    pub timeline: TimelineId,
    /// Where the backup is consistent: which timelines go on from it.
    pub stop: Lsn,
    /// The first position.
    pub from: Lsn,
    /// The last position; `None` for everything that follows.
    pub to: Option<Lsn>,
}

/// What is decided of a backup.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The backup.
    #[serde(flatten)]
    pub backup: Backup,
    /// Why it is kept; it expires without any.
    pub kept: Vec<Reason>,
}

/// A decision.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Of each backup, oldest first.
    pub verdicts: Vec<Verdict>,
    /// The beginning of the window, if there is one.
    pub window: Option<Timestamp>,
    /// WAL that is needed.
    pub needs: Vec<Need>,
}

impl Plan {
    /// Decides.
    pub fn new(policy: &Policy, known: &Known) -> Self {
        let mut backups = known.backups.clone();
        backups.sort_by_key(|backup| (backup.stored_at, backup.id));
        let window = policy.window.map(|window| known.now.checked_sub(window).unwrap_or(Timestamp::MIN));
        let mut planner = Planner { known, backups, kept: BTreeMap::new(), needs: Vec::new() };
        if let Some(begin) = window {
            planner.window(begin);
        }
        planner.counts(policy);
        planner.protect();
        planner.holds();
        planner.whole();
        planner.finish(policy, window)
    }

    /// The backups that expire, oldest first.
    pub fn expiring(&self) -> impl Iterator<Item = &Backup> {
        self.verdicts.iter().filter(|verdict| verdict.kept.is_empty()).map(|verdict| &verdict.backup)
    }
}

struct Planner<'a> {
    known: &'a Known,
    /// Oldest first.
    backups: Vec<Backup>,
    kept: BTreeMap<Ulid, BTreeSet<Reason>>,
    needs: Vec<Need>,
}

impl Planner<'_> {
    fn keep(&mut self, id: Ulid, reason: Reason) {
        let _ = self.kept.entry(id).or_default().insert(reason);
    }

    fn window(&mut self, begin: Timestamp) {
        let inside: Vec<Ulid> = self.backups.iter().filter(|b| b.stored_at > begin).map(|b| b.id).collect();
        for id in inside {
            self.keep(id, Reason::Window);
        }
        let newest = self.known.lines.keys().next_back().copied();
        let reached: BTreeSet<TimelineId> = self
            .known
            .lines
            .iter()
            .filter(|(timeline, line)| Some(**timeline) == newest || line.newest.is_some_and(|at| at > begin))
            .map(|(timeline, _)| *timeline)
            .chain(self.backups.iter().filter(|b| b.stored_at > begin).map(|b| b.timeline))
            // A vault without WAL of its own has backups all the same.
            .chain(self.backups.last().map(|b| b.timeline))
            .collect();
        for timeline in reached {
            for id in self.before(timeline, begin, |b| b.stored_at) {
                self.keep(id, Reason::WindowBegin { timeline });
            }
        }
    }

    /// The backups that `at` is restored from on a timeline: the newest before it, and the newest whole one when that is not (T29).
    /// `time` says when a backup was made.
    fn before(&self, timeline: TimelineId, at: Timestamp, time: impl Fn(&Backup) -> Timestamp) -> Vec<Ulid> {
        let history = self.known.lines.get(&timeline).and_then(|line| line.history.clone());
        let history = history.or_else(|| (timeline == TimelineId(1)).then(|| TimelineHistory::root(timeline)));
        let mut earlier: Vec<&Backup> = self.backups.iter().filter(|b| time(b) <= at).collect();
        earlier.sort_by_key(|b| std::cmp::Reverse((time(b), b.id)));
        let newest = |on: &dyn Fn(&Backup) -> bool| {
            let first = earlier.iter().find(|b| on(b));
            let whole = earlier.iter().find(|b| on(b) && b.whole);
            first.into_iter().chain(whole).map(|b| b.id).collect::<Vec<_>>()
        };
        if let Some(history) = history {
            return newest(&|b| history.contains(b.timeline, b.stop));
        }
        // It may have left any of them, anywhere.
        let parents: BTreeSet<TimelineId> = earlier.iter().map(|b| b.timeline).filter(|t| *t <= timeline).collect();
        parents.into_iter().flat_map(|parent| newest(&|b| b.timeline == parent)).collect()
    }

    fn counts(&mut self, policy: &Policy) {
        let newest: Vec<Backup> = self.backups.iter().rev().copied().collect();
        if let Some(last) = newest.first() {
            self.keep(last.id, Reason::Newest);
        }
        for backup in newest.iter().take(policy.keep_last as usize) {
            self.keep(backup.id, Reason::Last);
        }
        for backup in newest.iter().filter(|b| b.whole).take(policy.min_backups as usize) {
            self.keep(backup.id, Reason::Minimum);
        }
        for (period, count) in policy.generations {
            // Of each the newest, and rather one that is whole.
            let mut chosen: BTreeMap<(i16, i16), &Backup> = BTreeMap::new();
            for backup in &newest {
                let at = period.of(&backup.stored_at.to_zoned(policy.time_zone.clone()));
                let entry = chosen.entry(at).or_insert(backup);
                if !entry.whole && backup.whole {
                    *entry = backup;
                }
            }
            for backup in chosen.values().rev().take(count as usize) {
                self.keep(backup.id, Reason::Generation { period });
            }
        }
    }

    fn protect(&mut self) {
        let verified = self.backups.iter().rev().find(|b| self.known.verified.contains(&b.id)).map(|b| b.id);
        if let Some(id) = verified {
            self.keep(id, Reason::Verified);
        }
        for reads in &self.known.reading {
            self.keep(reads.backup_id, Reason::Read);
            let Reads { timeline, start_lsn, stop_lsn, .. } = *reads;
            // Whether or not its manifest is still there.
            self.needs.push(Need { timeline, stop: stop_lsn, from: start_lsn, to: None });
        }
        for (id, until) in &self.known.locked {
            self.keep(*id, Reason::Locked { until: *until });
        }
    }

    fn holds(&mut self) {
        for hold in &self.known.holds {
            let reason = Reason::Held { hold_id: hold.id };
            let (backups, needs) = held(self, hold);
            for id in backups {
                self.keep(id, reason);
            }
            self.needs.extend(needs);
        }
    }

    /// T29: what is left does not begin with a backup that has bad pages when there is a whole one before it.
    fn whole(&mut self) {
        let oldest = self.backups.iter().position(|b| self.kept.contains_key(&b.id));
        let Some((at, backup)) = oldest.and_then(|at| Some((at, self.backups.get(at)?))) else { return };
        if backup.whole {
            return;
        }
        let before = self.backups.iter().take(at).rev().find(|b| b.whole).map(|b| b.id);
        if let Some(id) = before {
            self.keep(id, Reason::Whole);
        }
    }

    fn finish(mut self, policy: &Policy, window: Option<Timestamp>) -> Plan {
        let wal = if window.is_some() { policy.wal } else { KeepWal::All };
        let mut verdicts = Vec::new();
        for backup in self.backups {
            let kept: Vec<Reason> = self.kept.remove(&backup.id).unwrap_or_default().into_iter().collect();
            if !kept.is_empty() {
                let follows = kept.iter().any(|reason| reason.asks_for_what_follows(wal));
                let to = (!follows).then_some(backup.stop);
                self.needs.push(Need { timeline: backup.timeline, stop: backup.stop, from: backup.start, to });
            }
            verdicts.push(Verdict { backup, kept });
        }
        Plan { verdicts, window, needs: self.needs }
    }
}

/// What a hold keeps of these backups: for who lays legal holds on objects.
pub fn held_by(known: &Known, hold: &Hold) -> (BTreeSet<Ulid>, Vec<Need>) {
    let mut backups = known.backups.clone();
    backups.sort_by_key(|backup| (backup.stored_at, backup.id));
    held(&Planner { known, backups, kept: BTreeMap::new(), needs: Vec::new() }, hold)
}

fn held(planner: &Planner<'_>, hold: &Hold) -> (BTreeSet<Ulid>, Vec<Need>) {
    let (mut kept, mut needs) = (BTreeSet::new(), Vec::new());
    let (from, to) = match hold.scope {
        Scope::Backup { backup_id } => {
            if let Some(backup) = planner.backups.iter().find(|b| b.id == backup_id) {
                needs.push(Need { timeline: backup.timeline, stop: backup.stop, from: backup.start, to: Some(backup.stop) });
            }
            return ([backup_id].into(), needs);
        }
        Scope::Range { from, to } => (from, to),
    };
    // A backup that was stored so much later began later, too: its session would have ended before.
    let surely_after = to.checked_add(SignedDuration::from_hours(MAX_HOURS)).unwrap_or(Timestamp::MAX);
    let timelines: BTreeSet<TimelineId> =
        planner.known.lines.keys().copied().chain(planner.backups.iter().map(|b| b.timeline)).collect();
    for timeline in timelines {
        let history = planner.known.lines.get(&timeline).and_then(|line| line.history.as_ref());
        let is_on = |b: &Backup| match history {
            Some(history) => history.contains(b.timeline, b.stop),
            None => b.timeline == timeline,
        };
        // The store's time is nobody's word, and in a copy it is the time of the copy. What is held by either is held.
        let begins = planner.before(timeline, from, |b| b.stored_at).into_iter();
        let begins = begins.chain(planner.before(timeline, from, |b| b.finished_at));
        let lies_in = |b: &Backup| {
            (b.stored_at > from && b.stored_at <= surely_after) || (b.finished_at > from && b.finished_at <= surely_after)
        };
        let inside = planner.backups.iter().filter(|b| lies_in(b) && is_on(b));
        let end = planner.backups.iter().find(|b| b.stored_at > surely_after && b.started_at > to && is_on(b)).map(|b| b.stop);
        let ids: BTreeSet<Ulid> = begins.chain(inside.map(|b| b.id)).collect();
        for backup in planner.backups.iter().filter(|b| ids.contains(&b.id)) {
            let to = end.map(|end| end.max(backup.stop));
            needs.push(Need { timeline: backup.timeline, stop: backup.stop, from: backup.start, to });
        }
        kept.extend(ids);
    }
    (kept, needs)
}

#[cfg(test)]
mod tests;
