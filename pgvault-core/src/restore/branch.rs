//! What lies beside the way: WAL and backups of timelines that a restore leaves out.
//!
//! Whoever has the `archive_command` of a cluster can add a timeline to its vault: the standby that was promoted, the directory that was
//! recovered to before the mistake, and the copy that somebody started to look at. PostgreSQL's own default, the newest timeline, is
//! right for the first two and silently wrong for the third, because the original still takes orders. What tells them apart is time:
//! a branch that was given up has no transaction that ended after the first one of the branch that replaced it (R6, H8).

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::Serialize;

use super::target::Target;
use super::window;
use crate::postgres::{Lsn, TimelineHistory, TimelineId, WalSegNo};
use crate::vault::Cluster;
use crate::vault::snapshot::Manifest;
use crate::wal::catalog::Catalog;
use crate::{Error, ErrorKind, Result};

/// Segments that are opened to find a transaction, from either end; an idle server writes few records a segment, but some.
const LOOK: u64 = 4096;

/// What ended on a stretch of a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lived {
    /// When the first transaction ended, or the first backup was finished.
    pub first: Timestamp,
    /// When the last one did.
    pub last: Timestamp,
}

/// A timeline with transactions or backups that another history does not have.
#[derive(Debug, Clone, Serialize)]
pub struct Branch {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where the two part.
    pub parted: Lsn,
    /// Where the branch's WAL ends.
    pub end: Lsn,
    /// What ended on it since.
    #[serde(flatten)]
    pub lived: Lived,
    /// What ended on the other history since.
    pub other: Option<Lived>,
}

impl Branch {
    /// True when neither had been given up before the other began.
    pub fn both_lived(&self) -> bool {
        self.other.is_none_or(|other| self.lived.last >= other.first)
    }

    /// True when the target means one thing on the branch and another on the history.
    fn disputes(&self, target: &Target, resolved: Option<Lsn>) -> bool {
        match target {
            Target::Time(time) => {
                let has = |lived: Lived| lived.first <= *time;
                let others = self.other.is_some_and(has);
                if self.both_lived() { has(self.lived) || others } else { has(self.lived) && !others }
            }
            Target::Lsn(lsn) => *lsn > self.parted && (self.both_lived() || *lsn <= self.end),
            Target::Xid(_) | Target::Name(_) => self.both_lived() && resolved.is_some_and(|lsn| lsn >= self.parted),
            Target::Latest => self.both_lived(),
            Target::Immediate | Target::LastVerified => false,
        }
    }
}

/// The timelines on which something ended that `history` does not have.
///
/// # Errors
/// When the store fails or a WAL object was changed.
pub async fn beside(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    backups: impl Iterator<Item = &Manifest> + Clone,
) -> Result<Vec<Branch>> {
    let timelines: BTreeSet<TimelineId> = catalog.timelines.keys().copied().chain(backups.clone().map(|b| b.timeline)).collect();
    let mut branches = Vec::new();
    for timeline in timelines {
        if timeline == history.timeline() {
            continue;
        }
        // Without its history nothing is known of where it left; its backups alone speak for it.
        let own = catalog.history(timeline).ok();
        let parted = own.as_ref().map_or(Lsn::INVALID, |own| parting(history, own));
        let mut lived = None;
        let mut end = parted;
        if let Some(own) = &own {
            // What lies before its beginning belongs to a timeline that is looked at by itself.
            let from = parted.max(own.begin());
            end = end_of(catalog, timeline).unwrap_or(from).max(from);
            lived = lived_on(cluster, catalog, own, from, end).await?;
        }
        for backup in backups.clone().filter(|b| b.timeline == timeline && !window::is_on(history, b)) {
            let time = backup.finished_at;
            let before = lived.unwrap_or(Lived { first: time, last: time });
            lived = Some(Lived { first: before.first.min(time), last: before.last.max(time) });
        }
        let Some(lived) = lived else { continue };
        let other_end = end_of(catalog, history.timeline()).unwrap_or(parted);
        let other = lived_on(cluster, catalog, history, parted, other_end).await?;
        branches.push(Branch { timeline, parted, end, lived, other });
    }
    Ok(branches)
}

/// Refuses a target that two living branches answer differently.
///
/// # Errors
/// `restore.branches`, with what there is to choose from.
pub(super) fn ensure_undisputed(
    branches: &[Branch],
    history: &TimelineHistory,
    target: &Target,
    resolved: Option<Lsn>,
) -> Result<()> {
    let disputed: Vec<&Branch> = branches.iter().filter(|branch| branch.disputes(target, resolved)).collect();
    let Some(first) = disputed.first() else { return Ok(()) };
    let own = match first.other {
        Some(other) => format!("with transactions from {} to {}", other.first, other.last),
        None => format!("without any transaction after lsn:{}", first.parted),
    };
    let others: Vec<String> = disputed.iter().map(ToString::to_string).collect();
    let message = format!(
        "{target} means different things on the timelines of this vault: timeline {}, {own}; {}",
        history.timeline(),
        others.join("; ")
    );
    let choices: Vec<String> =
        disputed.iter().map(|b| b.timeline).chain([history.timeline()]).map(|t| format!("--timeline {t}")).collect();
    Err(Error::new(ErrorKind::OutsideWindow, "restore.branches", message)
        .with_hint(format!("say which one is meant: {}", choices.join(" or "))))
}

impl std::fmt::Display for Branch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Lived { first, last } = self.lived;
        write!(f, "timeline {}, parted at lsn:{}, with transactions from {first} to {last}", self.timeline, self.parted)
    }
}

/// The position up to which two histories are the same.
fn parting(one: &TimelineHistory, other: &TimelineHistory) -> Lsn {
    let left = |history: &TimelineHistory, timeline| {
        if history.timeline() == timeline { Some(Lsn(u64::MAX)) } else { history.switch_point_of(timeline) }
    };
    let timelines = one.ancestors().iter().map(|a| a.timeline).chain([one.timeline()]);
    let common = timelines.filter_map(|timeline| Some(left(one, timeline)?.min(left(other, timeline)?)));
    common.max().unwrap_or(Lsn::INVALID)
}

/// Where a timeline's WAL ends, whatever holes lie before.
fn end_of(catalog: &Catalog, timeline: TimelineId) -> Option<Lsn> {
    let objects = catalog.timelines.get(&timeline)?;
    let last = objects.last()?;
    let start = last.segment_number(catalog.segment_size).ok()?.start(catalog.segment_size);
    Some(start.advance(objects.covered(last, catalog.segment_size)))
}

/// When the first and the last transaction ended on a history between two positions.
async fn lived_on(cluster: &Cluster, catalog: &Catalog, history: &TimelineHistory, from: Lsn, to: Lsn) -> Result<Option<Lived>> {
    if to <= from {
        return Ok(None);
    }
    let size = catalog.segment_size;
    let (lowest, highest) = (WalSegNo::containing(from, size).0, WalSegNo::before(to, size).0);
    let mut first = None;
    for number in (lowest..=highest).take(usize::try_from(LOOK).unwrap_or(usize::MAX)) {
        first = ended_in(cluster, catalog, history, WalSegNo(number), from).await?;
        if first.is_some() {
            break;
        }
    }
    let Some(first) = first else { return Ok(None) };
    for number in (lowest..=highest).rev().take(usize::try_from(LOOK).unwrap_or(usize::MAX)) {
        if let Some(last) = ended_in(cluster, catalog, history, WalSegNo(number), from).await? {
            return Ok(Some(Lived { first: first.first, last: last.last.max(first.last) }));
        }
    }
    Ok(Some(first))
}

/// When transactions ended in one segment, from a position on.
async fn ended_in(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    number: WalSegNo,
    from: Lsn,
) -> Result<Option<Lived>> {
    let size = catalog.segment_size;
    let start = number.start(size);
    let Some(stored) = catalog.describe(cluster, history, number).await? else { return Ok(None) };
    let Some(transactions) = stored.info.transactions else { return Ok(None) };
    if start >= from {
        return Ok(Some(Lived { first: transactions.first_time, last: transactions.last_time }));
    }
    // The segment in which the branches part begins with what they share.
    let Some(bytes) = window::segment(cluster, catalog, history, number).await? else { return Ok(None) };
    let corrupt = |e: crate::postgres::ParseError| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", e.to_string());
    let ends = crate::postgres::wal::transactions_from(&bytes, start, size, from).map_err(corrupt)?;
    Ok(ends.map(|span| Lived { first: span.first_time, last: span.last_time }))
}
