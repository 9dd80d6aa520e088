//! Gaps: WAL that should be in the vault and is not.
//!
//! A hole between what is stored shows by itself ([`Catalog::gaps`]). Who learns that WAL is lost [records](record) it as well: the hole
//! at the end of an archive, behind which nothing was stored yet, is otherwise not to be told from the archive's end. A recorded gap is
//! closed when its WAL was stored after all.

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use super::catalog::{Catalog, Gap};
use crate::Result;
use crate::postgres::{Lsn, TimelineHistory, TimelineId, WalSegNo};
use crate::vault::Cluster;
use crate::vault::audit::{self, Event, event};

/// Segments that are opened to find the transactions around a gap, to either side.
const LOOK: u64 = 512;

/// A gap, and what is known of when it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TimedGap {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first missing position.
    pub from: Lsn,
    /// The first position that is there again.
    pub to: Lsn,
    /// When the last transaction before it ended.
    pub from_time: Option<Timestamp>,
    /// When the first transaction behind it ended.
    pub to_time: Option<Timestamp>,
    /// When it was recorded, if it was.
    pub recorded_at: Option<Timestamp>,
}

impl TimedGap {
    /// A gap of which nothing else is known yet.
    pub fn new(gap: Gap) -> Self {
        Self { timeline: gap.timeline, from: gap.from, to: gap.to, from_time: None, to_time: None, recorded_at: None }
    }

    fn overlaps(&self, gap: &Gap) -> bool {
        self.timeline == gap.timeline && self.from < gap.to && gap.from < self.to
    }
}

impl fmt::Display for TimedGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WAL from {} to {} of timeline {} is missing", self.from, self.to, self.timeline)?;
        match (self.from_time, self.to_time) {
            (Some(from), Some(to)) => write!(f, "; the last transaction before it ended at {from}, the first behind it at {to}"),
            (Some(from), None) => write!(f, "; the last transaction before it ended at {from}"),
            (None, Some(to)) => write!(f, "; the first transaction behind it ended at {to}"),
            (None, None) => Ok(()),
        }
    }
}

/// Records that WAL is lost, once: false when the gap was recorded before.
///
/// Two that record the same gap at the same moment may both do it, which does no harm.
///
/// # Errors
/// When the store fails.
pub async fn record(cluster: &Cluster, gap: Gap) -> Result<bool> {
    if recorded(cluster).await?.iter().any(|(known, _)| *known == gap) {
        return Ok(false);
    }
    let Gap { timeline, from, to } = gap;
    audit::record(cluster, Event::WalGap { timeline, from, to }).await?;
    Ok(true)
}

/// The gaps that were recorded, and when, in the order of recording; each once.
///
/// # Errors
/// When the store fails.
pub async fn recorded(cluster: &Cluster) -> Result<Vec<(Gap, Timestamp)>> {
    let mut gaps: Vec<(Gap, Timestamp)> = Vec::new();
    for record in audit::of(cluster, &[event::WAL_GAP]).await? {
        if let Event::WalGap { timeline, from, to } = record.event {
            let gap = Gap { timeline, from, to };
            if from < to && gaps.iter().all(|(known, _)| *known != gap) {
                gaps.push((gap, record.at));
            }
        }
    }
    Ok(gaps)
}

/// The holes of a catalog that nobody made on purpose: without what expired.
///
/// # Errors
/// When the store fails.
pub async fn holes(cluster: &Cluster, catalog: &Catalog) -> Result<Vec<Gap>> {
    let holes = catalog.gaps();
    if holes.is_empty() {
        return Ok(holes);
    }
    Ok(Expired::read(cluster).await?.without(holes))
}

/// What was deleted because nothing needed it, sorted and joined.
#[derive(Debug, Default)]
struct Expired(Vec<Gap>);

impl Expired {
    async fn read(cluster: &Cluster) -> Result<Self> {
        let mut expired: Vec<Gap> = Vec::new();
        for record in audit::of(cluster, &[event::WAL_EXPIRED]).await? {
            if let Event::WalExpired { timeline, from, to } = record.event {
                expired.push(Gap { timeline, from, to });
            }
        }
        // What touches is joined: of a hole, one run may have deleted one half and the next the other.
        expired.sort_by_key(|range| (range.timeline, range.from));
        let mut joined: Vec<Gap> = Vec::new();
        for range in expired {
            match joined.last_mut().filter(|last| last.timeline == range.timeline && range.from <= last.to) {
                Some(last) => last.to = last.to.max(range.to),
                None => joined.push(range),
            }
        }
        Ok(Self(joined))
    }

    fn covers(&self, hole: &Gap) -> bool {
        self.0.iter().any(|range| range.timeline == hole.timeline && range.from <= hole.from && hole.to <= range.to)
    }

    fn without(&self, mut holes: Vec<Gap>) -> Vec<Gap> {
        holes.retain(|hole| !self.covers(hole));
        holes
    }
}

/// The gaps that there are: the holes of the catalog, and what was recorded and is still not there. Without times.
///
/// # Errors
/// When the store fails.
pub async fn open(cluster: &Cluster, catalog: &Catalog) -> Result<Vec<TimedGap>> {
    open_of(cluster, catalog, recorded(cluster).await?).await
}

/// As [`open`], for who knows what was [`recorded`].
///
/// # Errors
/// As [`open`].
pub async fn open_of(cluster: &Cluster, catalog: &Catalog, recorded: Vec<(Gap, Timestamp)>) -> Result<Vec<TimedGap>> {
    let holes = catalog.gaps();
    if holes.is_empty() && recorded.is_empty() {
        return Ok(Vec::new());
    }
    let expired = Expired::read(cluster).await?;
    let mut gaps: Vec<TimedGap> = expired.without(holes).into_iter().map(TimedGap::new).collect();
    // Not those where everything around has expired since (H20).
    for (gap, at) in recorded.into_iter().filter(|(gap, _)| !expired.covers(gap)) {
        let mut is_hole = false;
        for hole in gaps.iter_mut().filter(|hole| hole.overlaps(&gap)) {
            hole.recorded_at = hole.recorded_at.or(Some(at));
            is_hole = true;
        }
        let end = catalog.contiguous_end(&history(catalog, gap.timeline), gap.from);
        if !is_hole && end < gap.to {
            // What was stored of it since is not missing.
            gaps.push(TimedGap { recorded_at: Some(at), ..TimedGap::new(Gap { from: end, ..gap }) });
        }
    }
    gaps.sort_by_key(|gap| (gap.timeline, gap.from, gap.to));
    Ok(gaps)
}

/// As [`open`], with the times around each.
///
/// # Errors
/// When the store fails or a WAL object's footer was changed.
pub async fn all(cluster: &Cluster, catalog: &Catalog) -> Result<Vec<TimedGap>> {
    let mut gaps = open(cluster, catalog).await?;
    for gap in &mut gaps {
        let history = history(catalog, gap.timeline);
        let ended = async |number| -> Result<_> {
            let stored = catalog.describe(cluster, &history, WalSegNo(number)).await?;
            Ok(stored.and_then(|stored| stored.info.transactions))
        };
        let before = WalSegNo::before(gap.from, catalog.segment_size).0;
        for number in (0..=before).rev().take(usize::try_from(LOOK).unwrap_or(usize::MAX)) {
            if let Some(transactions) = ended(number).await?.filter(|_| gap.from.0 > 0) {
                gap.from_time = Some(transactions.last_time);
                break;
            }
        }
        let behind = WalSegNo::containing(gap.to, catalog.segment_size).0;
        let last = catalog.timelines.get(&gap.timeline).and_then(super::catalog::TimelineObjects::last);
        let last = last.and_then(|last| last.segment_number(catalog.segment_size).ok()).map_or(0, |last| last.0);
        for number in behind..=last.min(behind.saturating_add(LOOK)) {
            if let Some(transactions) = ended(number).await? {
                gap.to_time = Some(transactions.first_time);
                break;
            }
        }
    }
    Ok(gaps)
}

fn history(catalog: &Catalog, timeline: TimelineId) -> TimelineHistory {
    catalog.history(timeline).unwrap_or_else(|_| TimelineHistory::root(timeline))
}

#[cfg(test)]
mod tests {
    use super::super::fetch;
    use super::super::testdata::{ROW, cluster, file, store, store_part};
    use super::*;

    const ONE: TimelineId = TimelineId(1);

    async fn gaps(cluster: &Cluster) -> Vec<TimedGap> {
        let size = fetch::segment_size(cluster).await.unwrap().unwrap();
        let catalog = Catalog::load(cluster, size, Lsn::INVALID).await.unwrap();
        all(cluster, &catalog).await.unwrap()
    }

    /// R4, R5: a gap stays until its WAL is there, however often it is recorded, and shows where no name could tell it.
    #[tokio::test]
    async fn r4_a_recorded_gap_stays_until_its_wal_is_stored() {
        let cluster = cluster().await;
        for name in [ROW[0], ROW[1]] {
            store(&cluster, name, &file(name)).await;
        }
        assert_eq!(gaps(&cluster).await, []);
        // At the end, where nothing follows yet.
        let lost = Gap { timeline: ONE, from: Lsn(0xA0_0000), to: Lsn(0xC0_0000) };
        assert!(record(&cluster, lost).await.unwrap());
        assert!(!record(&cluster, lost).await.unwrap());
        assert!(record(&cluster, Gap { timeline: ONE, from: Lsn(0x80_0000), to: Lsn(0x90_0000) }).await.unwrap(), "another one");
        let found = gaps(&cluster).await;
        assert_eq!(found.len(), 1, "what is there is no gap: {found:?}");
        assert_eq!((found[0].from, found[0].to), (lost.from, lost.to));
        assert!(found[0].recorded_at.is_some() && found[0].from_time.is_some() && found[0].to_time.is_none(), "{found:?}");
        // With WAL behind it, it is a hole like any other, told once, with the times around it.
        store(&cluster, ROW[4], &file(ROW[4])).await;
        let found = gaps(&cluster).await;
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].recorded_at.is_some() && found[0].from_time < found[0].to_time, "{found:?}");
        let text = found[0].to_string();
        assert!(
            text.starts_with("WAL from 0/A00000 to 0/C00000 of timeline 1 is missing; the last transaction before it ended at")
        );
        // Some of it came after all, then all of it.
        store_part(&cluster, ROW[2], &file(ROW[2])[..5000], 0).await;
        assert_eq!(gaps(&cluster).await[0].from, Lsn(0xA0_0000 + 5000));
        for name in [ROW[2], ROW[3]] {
            store(&cluster, name, &file(name)).await;
        }
        assert_eq!(gaps(&cluster).await, []);
        assert_eq!(recorded(&cluster).await.unwrap().len(), 2);
    }
}
