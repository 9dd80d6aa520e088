//! What WAL there is: which segments, how far they reach without a hole, and how the timelines hang together.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::object::{self, StoredWal, WalName};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, WalFileName, WalSegNo};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Timelines listed at once.
const PARALLEL: usize = 8;

/// The WAL objects of one timeline.
#[derive(Debug, Clone, Default)]
pub struct TimelineObjects {
    /// Whole segments.
    pub segments: BTreeSet<SegmentName>,
    /// Parts of segments: start offset to end offset.
    pub parts: BTreeMap<SegmentName, BTreeSet<(u32, u32)>>,
    /// Last segments of a timeline, as a promotion archives them.
    pub partials: BTreeSet<SegmentName>,
    /// True when the history file is there.
    pub has_history: bool,
    /// Objects with names that no pgvault wrote.
    pub strangers: Vec<String>,
}

impl TimelineObjects {
    /// Adds an object of this timeline.
    pub fn insert(&mut self, name: WalName) {
        match name {
            WalName::File(WalFileName::Segment(segment)) => drop(self.segments.insert(segment)),
            WalName::File(WalFileName::Partial(segment)) => drop(self.partials.insert(segment)),
            WalName::File(WalFileName::History(_)) => self.has_history = true,
            WalName::File(WalFileName::BackupHistory(..)) => {}
            WalName::Part { segment, from, to } => drop(self.parts.entry(segment).or_default().insert((from, to))),
        }
    }

    /// How many bytes of `segment` are there, from its start on without a hole.
    pub fn covered(&self, segment: SegmentName, size: SegmentSize) -> u64 {
        if self.segments.contains(&segment) {
            return size.bytes();
        }
        self.chain(segment).last().map_or(0, |(_, to)| u64::from(*to))
    }

    /// The parts that make up the longest unbroken start of `segment`.
    ///
    /// Several writers may have cut the same segment differently, so parts may overlap.
    pub fn chain(&self, segment: SegmentName) -> Vec<(u32, u32)> {
        let mut chain = Vec::new();
        let mut end = 0;
        // In the order of their starts. Of the parts that continue at `end`, the one that reaches furthest is taken.
        let mut parts = self.parts.get(&segment).into_iter().flatten().copied().peekable();
        loop {
            let mut best: Option<(u32, u32)> = None;
            while let Some(part) = parts.next_if(|(from, _)| *from <= end) {
                if part.1 > best.map_or(end, |(_, to)| to) {
                    best = Some(part);
                }
            }
            let Some(best) = best else { return chain };
            chain.push(best);
            end = best.1;
        }
    }

    /// Bytes of `segment` that are there behind a hole in it: where the hole begins and where it ends.
    pub fn hole(&self, segment: SegmentName) -> Option<(u32, u32)> {
        if self.segments.contains(&segment) {
            return None;
        }
        let end = self.chain(segment).last().map_or(0, |(_, to)| *to);
        let behind = self.parts.get(&segment)?.iter().map(|(from, _)| *from).filter(|from| *from > end).min()?;
        Some((end, behind))
    }

    /// Every segment of which anything is there, in order.
    pub fn present(&self) -> BTreeSet<SegmentName> {
        self.segments.iter().chain(self.parts.keys()).copied().collect()
    }

    /// The last segment of which anything is there.
    pub fn last(&self) -> Option<SegmentName> {
        self.segments.last().copied().max(self.parts.keys().next_back().copied())
    }
}

/// WAL that should be there and is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first missing position.
    pub from: Lsn,
    /// The first position that is there again.
    pub to: Lsn,
}

/// Lists the WAL of one timeline from a position on.
async fn list_timeline(cluster: &Cluster, segment_size: SegmentSize, timeline: TimelineId, from: Lsn) -> Result<TimelineObjects> {
    let dir = cluster.path(&layout::wal_timeline(timeline));
    let first = SegmentName::new(timeline, WalSegNo::containing(from, segment_size), segment_size);
    // Names sort by position. `.` sorts before every extension, so this starts right before the first segment.
    let after = format!("{dir}{first}");
    let mut objects = TimelineObjects::default();
    for object in cluster.store().list_after(&dir, (!from.is_invalid()).then_some(after.as_str())).await? {
        match WalName::parse(&object.name).filter(|name| name.timeline() == timeline) {
            Some(name) => objects.insert(name),
            None => objects.strangers.push(object.name),
        }
    }
    Ok(objects)
}

/// The history of a timeline, if it can be used. Who needs it is told that it is missing; others are not concerned.
async fn readable_history(cluster: &Cluster, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
    match read_history(cluster, timeline).await {
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
            tracing::warn!(%timeline, %error, "a history file cannot be used");
            Ok(None)
        }
        read => read,
    }
}

/// A listing of WAL.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// Segment size of the cluster.
    pub segment_size: SegmentSize,
    /// What there is, by timeline.
    pub timelines: BTreeMap<TimelineId, TimelineObjects>,
    /// Histories of the timelines that have one in the vault.
    pub histories: BTreeMap<TimelineId, TimelineHistory>,
}

impl Catalog {
    /// Lists the cluster's WAL, from the segment of `from` on, on every timeline.
    ///
    /// # Errors
    /// When the store fails or a history file was changed.
    pub async fn load(cluster: &Cluster, segment_size: SegmentSize, from: Lsn) -> Result<Self> {
        let directories = cluster.store().list_directories(&cluster.path(layout::dir::WAL)).await?;
        let loading = directories.iter().filter_map(|directory| TimelineId::from_hex(directory).ok()).map(async |timeline| {
            let (objects, history) =
                tokio::try_join!(list_timeline(cluster, segment_size, timeline, from), readable_history(cluster, timeline))?;
            Ok::<_, Error>((timeline, objects, history))
        });
        let mut loading = stream::iter(loading.collect::<Vec<_>>()).buffered(PARALLEL);
        let (mut timelines, mut histories) = (BTreeMap::new(), BTreeMap::new());
        while let Some((timeline, mut objects, history)) = loading.try_next().await? {
            // The history file's name is shorter than a segment's and may sort before the offset.
            objects.has_history |= history.is_some();
            histories.extend(history.map(|history| (timeline, history)));
            let _ = timelines.insert(timeline, objects);
        }
        Ok(Self { segment_size, timelines, histories })
    }

    /// The history of a timeline: its ancestors and where it left them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when a timeline other than the first has no history file in the vault (H7).
    pub fn history(&self, timeline: TimelineId) -> Result<TimelineHistory> {
        if let Some(history) = self.histories.get(&timeline) {
            return Ok(history.clone());
        }
        // The timeline that `initdb` made has no history; neither has one that a backup was first taken on.
        if timeline == TimelineId(1) {
            return Ok(TimelineHistory::root(timeline));
        }
        Err(Error::new(
            ErrorKind::NotFound,
            "wal.no_history",
            format!("the history file of timeline {timeline} is not in the vault"),
        )
        .with_hint(format!("push {}.history from the server's pg_wal directory with `pgvault wal push`", timeline.hex())))
    }

    /// The newest timeline of which there is anything.
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.timelines.keys().next_back().copied()
    }

    /// The end of the WAL that is there from `from` on without a hole, on the way to and along `history`'s timeline.
    ///
    /// `from` itself when not even its own byte is there.
    pub fn contiguous_end(&self, history: &TimelineHistory, from: Lsn) -> Lsn {
        let size = self.segment_size;
        let mut end = from;
        loop {
            let number = WalSegNo::containing(end, size);
            let start = number.start(size);
            // The first segment of a timeline begins with a copy of its ancestor's bytes, so either will do up to the switch.
            let covered = self
                .sources(history, number)
                .map(|(limit, objects, name)| start.advance(objects.covered(name, size)).min(limit))
                .max()
                .unwrap_or(start);
            if covered <= end {
                return end;
            }
            end = covered;
        }
    }

    /// Where the bytes of segment `number` can come from: end of what that timeline may contribute, its objects, the name.
    fn sources<'a>(
        &'a self,
        history: &'a TimelineHistory,
        number: WalSegNo,
    ) -> impl Iterator<Item = (Lsn, &'a TimelineObjects, SegmentName)> {
        let own = (history.timeline(), Lsn(u64::MAX));
        let ancestors = history.ancestors().iter().filter_map(|a| Some((a.timeline, history.switch_point_of(a.timeline)?)));
        ancestors.chain(std::iter::once(own)).filter_map(move |(timeline, limit)| {
            let objects = self.timelines.get(&timeline)?;
            Some((limit, objects, SegmentName::new(timeline, number, self.segment_size)))
        })
    }

    /// The holes between the first and the last WAL of each timeline, and before a timeline's own where its parent's is there.
    pub fn gaps(&self) -> Vec<Gap> {
        let size = self.segment_size;
        let mut gaps = Vec::new();
        for (timeline, objects) in &self.timelines {
            let mut expected: Option<Lsn> = self.parents_end(*timeline);
            for segment in objects.present() {
                let Ok(number) = segment.segment_number(size) else { continue };
                let start = number.start(size);
                if let Some(from) = expected.filter(|from| *from < start) {
                    gaps.push(Gap { timeline: *timeline, from, to: start });
                }
                expected = Some(start.advance(objects.covered(segment, size)));
                if let Some((from, to)) = objects.hole(segment) {
                    let (from, to) = (start.advance(from.into()), start.advance(to.into()));
                    // A gap that goes on into the next segment is told there, from the same place.
                    if objects.last() == Some(segment) {
                        gaps.push(Gap { timeline: *timeline, from, to });
                    }
                }
            }
        }
        gaps
    }

    /// Where a timeline's own WAL has to begin, when WAL of the timeline it left is in the vault.
    fn parents_end(&self, timeline: TimelineId) -> Option<Lsn> {
        let history = self.histories.get(&timeline)?;
        let parent = history.ancestors().last()?.timeline;
        let objects = self.timelines.get(&parent)?;
        let last = objects.last()?;
        let start = last.segment_number(self.segment_size).ok()?.start(self.segment_size);
        // The child's first segment begins with a copy of the parent's bytes.
        let branch = WalSegNo::containing(history.begin(), self.segment_size).start(self.segment_size);
        Some(start.advance(objects.covered(last, self.segment_size)).min(branch))
    }

    /// Opens the object that describes segment `number` best, on the way to `history`'s timeline.
    ///
    /// # Errors
    /// When the store fails or the object was changed.
    pub async fn describe(&self, cluster: &Cluster, history: &TimelineHistory, number: WalSegNo) -> Result<Option<StoredWal>> {
        let start = number.start(self.segment_size);
        // The timeline that owns the segment's last byte that matters: its copy includes the ancestor's bytes.
        let mut best = None;
        for (limit, objects, segment) in self.sources(history, number) {
            let end = start.advance(objects.covered(segment, self.segment_size)).min(limit);
            if end > start && best.as_ref().is_none_or(|(before, _, _)| end >= *before) {
                best = Some((end, objects, segment));
            }
        }
        let Some((_, objects, segment)) = best else { return Ok(None) };
        let name = if objects.segments.contains(&segment) {
            WalName::File(WalFileName::Segment(segment))
        } else {
            let Some((from, to)) = objects.chain(segment).last().copied() else { return Ok(None) };
            WalName::Part { segment, from, to }
        };
        object::open(cluster, name, None).await.map(Some)
    }
}

/// Reads a timeline's history file; `None` when it is not in the vault.
///
/// # Errors
/// When the store fails or the file was changed or is malformed.
pub async fn read_history(cluster: &Cluster, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
    let name = WalName::File(WalFileName::History(timeline));
    match object::read(cluster, name).await {
        Ok((_, bytes)) => {
            let corrupt = |why: String| Error::new(ErrorKind::Corrupt, "wal.history", format!("{}: {why}", name.object()));
            // The reason of a switch is free text of the server's encoding.
            TimelineHistory::parse(timeline, &String::from_utf8_lossy(&bytes)).map(Some).map_err(|e| corrupt(e.to_string()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(parts: &[(&str, &[(u32, u32)])], whole: &[&str]) -> Catalog {
        let mut objects = TimelineObjects::default();
        for (segment, ranges) in parts {
            let _ = objects.parts.insert(segment.parse().unwrap(), ranges.iter().copied().collect());
        }
        objects.segments = whole.iter().map(|segment| segment.parse().unwrap()).collect();
        let segment_size = (1u32 << 20).try_into().unwrap();
        Catalog { segment_size, timelines: [(TimelineId(1), objects)].into(), histories: BTreeMap::new() }
    }

    const EIGHT: &str = "000000010000000000000008";
    const NINE: &str = "000000010000000000000009";

    fn gaps(catalog: &Catalog) -> Vec<(u64, u64)> {
        catalog.gaps().iter().map(|gap| (gap.from.0, gap.to.0)).collect()
    }

    /// R4: what is missing inside the open segment is a gap like any other.
    #[test]
    fn r4_a_hole_between_parts_is_a_gap() {
        let whole = catalog(&[(NINE, &[(0, 100), (100, 300), (250, 400)])], &[EIGHT]);
        assert_eq!(gaps(&whole), []);
        let history = TimelineHistory::root(TimelineId(1));
        assert_eq!(whole.contiguous_end(&history, Lsn(0x80_0000)), Lsn(0x90_0000 + 400));

        let holed = catalog(&[(NINE, &[(0, 100), (200, 300)])], &[EIGHT]);
        assert_eq!(gaps(&holed), [(0x90_0000 + 100, 0x90_0000 + 200)]);
        assert_eq!(holed.contiguous_end(&history, Lsn(0x80_0000)), Lsn(0x90_0000 + 100));
        let headless = catalog(&[(NINE, &[(200, 300)])], &[EIGHT]);
        assert_eq!(gaps(&headless), [(0x90_0000, 0x90_0000 + 200)]);
        // One that the next segment follows is told once.
        let followed = catalog(&[(EIGHT, &[(0, 100), (200, 300)])], &[NINE]);
        assert_eq!(gaps(&followed), [(0x80_0000 + 100, 0x90_0000)]);
    }
}
