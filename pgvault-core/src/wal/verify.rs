//! Is the archive whole, by what is in it and not by its names?
//!
//! Each timeline's WAL is read from its first object to its last, parts in the place of segments that are not there whole, and given
//! to a [`WalChecker`]: every page and every record of it, over the joints of objects and segments. A timeline that began as a
//! copy of another goes on where that one was when it was left.
//!
//! What is missing is a [gap](TimedGap). What is there and is not what a server writes at its place is [damage](Damage).

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;

use super::catalog::{Catalog, Gap, TimelineObjects};
use super::fetch;
use super::gap::{self, TimedGap};
use super::object::{self, WalName};
use crate::postgres::wal::{PassedEnd, PassedEnds, WalChecker};
use crate::postgres::{Lsn, SegmentName, TimelineHistory, TimelineId, WalFileName, WalSegNo};
use crate::progress::SharedProgress;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// Objects that are fetched and decoded at once, at most: with the one that is checked, what bounds memory.
const PARALLEL: usize = 4;

/// Findings of one object that are listed one by one; in recycled or overwritten bytes nothing is right.
const LISTED: usize = 4;

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// Begin with the segment of this position.
    pub from: Option<Lsn>,
    /// Only this timeline.
    pub timeline: Option<TimelineId>,
    /// Also compare what is stored twice: parts with the segment that is there whole, or with other parts.
    pub deep: bool,
    /// Told about progress.
    pub progress: SharedProgress,
}

/// What was verified of a timeline.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct VerifiedTimeline {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where its own WAL begins.
    pub from: Lsn,
    /// Where its valid WAL ends.
    pub to: Lsn,
    /// Segments of which anything is there.
    pub segments: u64,
    /// Records that are whole and right.
    pub records: u64,
    /// When its first transaction ended.
    pub first_time: Option<Timestamp>,
    /// When its last transaction ended.
    pub last_time: Option<Timestamp>,
}

/// Something that is there and is not right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object, by its full name.
    pub object: String,
    /// Where in the WAL.
    pub lsn: Option<Lsn>,
    /// What is wrong.
    pub what: String,
}

/// The outcome.
#[derive(Debug, Clone, Default, Serialize)]
pub struct WalReport {
    /// What was read.
    pub timelines: Vec<VerifiedTimeline>,
    /// What is missing.
    pub gaps: Vec<TimedGap>,
    /// What is wrong.
    pub damage: Vec<Damage>,
    /// Bytes of WAL that were read.
    pub bytes: u64,
}

impl WalReport {
    /// True when nothing is missing and nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.gaps.is_empty() && self.damage.is_empty()
    }
}

/// Verifies the archive of a cluster.
///
/// # Errors
/// When the store fails, or there is no WAL as chosen. Gaps and damage are no errors; they are in the report.
pub async fn verify(cluster: &Cluster, options: &VerifyOptions) -> Result<WalReport> {
    let none = |what: String| Error::new(ErrorKind::NotFound, "wal.none", format!("the vault holds no WAL{what}"));
    let Some(size) = fetch::segment_size(cluster).await? else { return Err(none(format!(" of {}", cluster.name()))) };
    options.progress.phase("wal check", None);
    let catalog = Catalog::load(cluster, size, options.from.unwrap_or_default()).await?;
    let mut walk = Walk {
        cluster,
        options,
        gaps: gap::open(cluster, &catalog).await?,
        catalog: &catalog,
        report: WalReport::default(),
        joints: joints(&catalog),
        states: BTreeMap::new(),
        last_ends: BTreeMap::new(),
        listed: BTreeMap::new(),
    };
    for timeline in catalog.timelines.keys().filter(|timeline| options.timeline.is_none_or(|only| only == **timeline)) {
        walk.timeline(*timeline).await?;
    }
    if walk.report.timelines.is_empty() && walk.report.damage.is_empty() {
        let timeline = options.timeline.map_or(String::new(), |timeline| format!(" of timeline {timeline}"));
        return Err(none(timeline + &options.from.map_or(String::new(), |from| format!(" from {from} on"))));
    }
    Ok(walk.report)
}

/// The places at which a timeline's own WAL goes on with what another one wrote.
fn joints(catalog: &Catalog) -> BTreeSet<(TimelineId, Lsn)> {
    let joints = catalog.timelines.keys().filter_map(|timeline| joint(catalog, *timeline));
    joints.collect()
}

/// The timeline that wrote what lies right before another's own WAL, and where that begins.
fn joint(catalog: &Catalog, timeline: TimelineId) -> Option<(TimelineId, Lsn)> {
    let first = catalog.timelines.get(&timeline)?.present().first().copied()?;
    let start = object::segment_start(first, catalog.segment_size).ok()?;
    let before = catalog.histories.get(&timeline)?.timeline_at(Lsn(start.0.checked_sub(1)?));
    (before != timeline).then_some((before, start))
}

/// An object with WAL in it.
#[derive(Debug, Clone, Copy)]
struct Item {
    name: WalName,
    start: Lsn,
    len: u64,
}

impl Item {
    fn end(self) -> Lsn {
        self.start.advance(self.len)
    }
}

struct Walk<'a> {
    cluster: &'a Cluster,
    options: &'a VerifyOptions,
    catalog: &'a Catalog,
    gaps: Vec<TimedGap>,
    report: WalReport,
    joints: BTreeSet<(TimelineId, Lsn)>,
    /// How the checker stood at the joints.
    states: BTreeMap<(TimelineId, Lsn), WalChecker>,
    /// The last transaction of each timeline.
    last_ends: BTreeMap<TimelineId, PassedEnd>,
    /// Findings by object.
    listed: BTreeMap<WalName, usize>,
}

/// What was seen of one timeline's transactions.
struct Ends {
    first: Option<PassedEnd>,
    last: Option<PassedEnd>,
    /// The last one before the timeline's own WAL.
    before: Option<PassedEnd>,
    gaps: Vec<TimedGap>,
}

impl Ends {
    /// Notes what ended in a piece that begins at `start`.
    fn add(&mut self, start: Lsn, ends: Option<PassedEnds>) {
        self.begin(start);
        let Some(PassedEnds { first, last, .. }) = ends else { return };
        for gap in self.gaps.iter_mut().filter(|gap| gap.to_time.is_none() && first.lsn >= gap.to) {
            gap.to_time = Some(first.time);
        }
        self.first = self.first.or(Some(first));
        self.last = Some(last);
    }

    /// What ended so far ended before the gaps that lie before `start`.
    fn begin(&mut self, start: Lsn) {
        let last = self.last.or(self.before);
        for gap in self.gaps.iter_mut().filter(|gap| gap.from_time.is_none() && gap.from < start) {
            gap.from_time = last.filter(|last| last.lsn < gap.from).map(|last| last.time);
        }
    }
}

impl Walk<'_> {
    async fn timeline(&mut self, timeline: TimelineId) -> Result<()> {
        let catalog = self.catalog;
        let Some(objects) = catalog.timelines.get(&timeline) else { return Ok(()) };
        let history = self.history(timeline, objects);
        let items = self.items(objects);
        let partial = self.partial(objects, &items);
        let Some(start) = items.first().or(partial.as_ref()).map(|item| item.start) else { return Ok(()) };
        let joint = joint(catalog, timeline);
        let mut ends = Ends {
            first: None,
            last: None,
            before: joint.and_then(|(before, _)| self.last_ends.get(&before).copied()).filter(|end| end.lsn < start),
            gaps: self.gaps(timeline, history.as_ref(), start),
        };
        let mut checker = if let Some(mut state) = joint.and_then(|joint| self.states.remove(&joint)) {
            state.follow(timeline, history.clone());
            state
        } else {
            let system_identifier = self.cluster.name().system_id;
            WalChecker::new(system_identifier, catalog.segment_size, timeline, history.clone(), start)
        };
        checker = self.row(timeline, &items, checker, &mut ends).await?;
        ends.begin(Lsn(u64::MAX));
        if let Some(partial) = partial {
            checker = self.tail(partial, checker, &mut ends).await?;
        }
        let segments: BTreeSet<WalSegNo> =
            items.iter().chain(&partial).map(|item| WalSegNo::containing(item.start, catalog.segment_size)).collect();
        self.report.timelines.push(VerifiedTimeline {
            timeline,
            from: start,
            to: checker.end(),
            segments: segments.len() as u64,
            records: checker.records(),
            first_time: ends.first.map(|end| end.time),
            last_time: ends.last.map(|end| end.time),
        });
        if let Some(last) = ends.last {
            let _ = self.last_ends.insert(timeline, last);
        }
        self.report.gaps.append(&mut ends.gaps);
        if let Some(history) = &history {
            self.repeats(history, objects).await?;
        }
        if self.options.deep {
            self.twice(objects).await?;
        }
        Ok(())
    }

    /// The history to check pages with. Its absence is damage, except where there is none.
    fn history(&mut self, timeline: TimelineId, objects: &TimelineObjects) -> Option<TimelineHistory> {
        let history = self.catalog.history(timeline).ok();
        if history.is_none() {
            let what = if objects.has_history { "cannot be used" } else { "is missing" };
            let name = WalName::File(WalFileName::History(timeline));
            self.damage(name, None, format!("{what}: nobody can tell where this timeline left its parent"));
        }
        history
    }

    /// The gaps of a timeline, as the names of its objects tell them, and as they were recorded.
    fn gaps(&self, timeline: TimelineId, history: Option<&TimelineHistory>, start: Lsn) -> Vec<TimedGap> {
        let begin = self.options.from.unwrap_or_default();
        let own = self.gaps.iter().copied().filter(|gap| gap.timeline == timeline && gap.to > begin);
        let mut gaps: Vec<_> = own.collect();
        // What was asked for, and lies before everything there is.
        let asked = self.options.from.filter(|from| history.is_none_or(|history| history.timeline_at(*from) == timeline));
        if let Some(from) = asked.filter(|from| *from < start && gaps.first().is_none_or(|gap| gap.to > start)) {
            gaps.insert(0, TimedGap::new(Gap { timeline, from, to: start }));
        }
        gaps
    }

    /// The objects that make up a timeline's WAL, in order.
    fn items(&self, objects: &TimelineObjects) -> Vec<Item> {
        objects.present().into_iter().flat_map(|segment| self.pieces(objects, segment)).collect()
    }

    /// The objects that make up what is there of a segment: all of it, or rows of parts with holes between them.
    fn pieces(&self, objects: &TimelineObjects, segment: SegmentName) -> Vec<Item> {
        let Ok(start) = object::segment_start(segment, self.catalog.segment_size) else { return Vec::new() };
        if objects.segments.contains(&segment) {
            let name = WalName::File(WalFileName::Segment(segment));
            return vec![Item { name, start, len: self.catalog.segment_size.bytes() }];
        }
        let mut items = Vec::new();
        let mut parts = objects.parts.get(&segment).cloned().unwrap_or_default();
        while let Some(first) = parts.iter().map(|(from, _)| *from).min() {
            let mut end = first;
            while let Some(next) = parts.iter().filter(|(from, to)| *from <= end && *to > end).max_by_key(|(_, to)| *to).copied() {
                items.push(Self::part(segment, start, next));
                end = next.1;
            }
            // Behind a hole, the next row begins with the first part that does.
            parts.retain(|(_, to)| *to > end);
        }
        items
    }

    fn part(segment: SegmentName, start: Lsn, (from, to): (u32, u32)) -> Item {
        let len = u64::from(to.saturating_sub(from));
        Item { name: WalName::Part { segment, from, to }, start: start.advance(from.into()), len }
    }

    /// What a promotion left of a segment of which nothing else is there.
    fn partial(&self, objects: &TimelineObjects, items: &[Item]) -> Option<Item> {
        let segment = objects.partials.last().copied()?;
        let start = object::segment_start(segment, self.catalog.segment_size).ok()?;
        let is_tail = items.last().is_none_or(|last| last.end() <= start);
        let name = WalName::File(WalFileName::Partial(segment));
        is_tail.then_some(Item { name, start, len: self.catalog.segment_size.bytes() })
    }

    /// Checks objects one after the other.
    async fn row(&mut self, timeline: TimelineId, items: &[Item], mut checker: WalChecker, ends: &mut Ends) -> Result<WalChecker> {
        let cluster = self.cluster;
        let parallel = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, PARALLEL);
        let mut loading =
            stream::iter(items.iter().copied())
                .map(|item| {
                    let cluster = cluster.clone();
                    async move {
                        (item, joined(tokio::spawn(async move { load(&cluster, item).await }).await).and_then(|loaded| loaded))
                    }
                })
                .buffered(parallel);
        let mut before: Option<(Lsn, Vec<u8>)> = None;
        while let Some((item, loaded)) = loading.next().await {
            let bytes = match loaded? {
                Ok(bytes) => bytes,
                Err(problem) => {
                    self.damage(item.name, Some(item.start), problem);
                    // It is there, so what lies before it has not ended.
                    checker.settle(false);
                    self.faults(items, item.name, &mut checker);
                    checker.skip_to(item.end());
                    before = None;
                    continue;
                }
            };
            self.report.bytes += bytes.len() as u64;
            self.options.progress.advance(bytes.len() as u64);
            if item.start > checker.position() {
                checker.settle(false);
                self.faults(items, item.name, &mut checker);
                checker.skip_to(item.start);
            }
            let known = usize::try_from(checker.position().0 - item.start.0).unwrap_or(usize::MAX).min(bytes.len());
            if let Some(at) = before.as_ref().and_then(|(start, before)| first_difference(*start, before, item.start, &bytes)) {
                self.damage(item.name, Some(at), "differs from the object before it where they overlap".to_owned());
            }
            let fed;
            (checker, fed) = joined(
                tokio::task::spawn_blocking(move || {
                    checker.feed(bytes.get(known..).unwrap_or_default());
                    (checker, bytes)
                })
                .await,
            )?;
            before = matches!(item.name, WalName::Part { .. }).then_some((item.start, fed));
            ends.add(item.start, checker.take_ends());
            self.faults(items, item.name, &mut checker);
            if self.joints.contains(&(timeline, checker.position())) {
                let _ = self.states.insert((timeline, checker.position()), checker.clone());
            }
        }
        // A part was sent by a server as it stands: it is all WAL, unless a whole segment was cut into parts, and ends in zeroes.
        if let Some(Item { name: name @ WalName::Part { .. }, .. }) = items.last() {
            checker.settle(true);
            self.faults(items, *name, &mut checker);
        }
        Ok(checker)
    }

    /// Checks what a promotion left of the last segment. It may end anywhere, and anything may stand behind its end.
    async fn tail(&mut self, partial: Item, mut checker: WalChecker, ends: &mut Ends) -> Result<WalChecker> {
        if partial.start > checker.position() {
            checker.settle(false);
            self.faults(&[partial], partial.name, &mut checker);
            checker.skip_to(partial.start);
        }
        let stored = match object::open(self.cluster, partial.name, None).await {
            Ok(stored) => stored,
            Err(error) => {
                self.damage(partial.name, Some(partial.start), finding(error)?);
                return Ok(checker);
            }
        };
        // It may be as large as a segment can be, in one object: frame by frame.
        for number in 0..stored.frame_count() {
            match stored.frame(number).await {
                Ok(bytes) => {
                    self.report.bytes += bytes.len() as u64;
                    checker.feed(&bytes);
                }
                Err(error) => {
                    self.damage(partial.name, Some(checker.position()), finding(error)?);
                    return Ok(checker);
                }
            }
        }
        ends.add(partial.start, checker.take_ends());
        self.faults(&[partial], partial.name, &mut checker);
        Ok(checker)
    }

    /// Takes over what a checker found, each under the object that holds the position.
    fn faults(&mut self, items: &[Item], current: WalName, checker: &mut WalChecker) {
        for fault in checker.take_faults() {
            let behind = items.partition_point(|item| item.start <= fault.lsn);
            let holder = behind.checked_sub(1).and_then(|at| items.get(at)).filter(|item| fault.lsn < item.end());
            self.damage(holder.map_or(current, |item| item.name), Some(fault.lsn), fault.what.to_owned());
        }
    }

    fn damage(&mut self, name: WalName, lsn: Option<Lsn>, what: String) {
        let count = self.listed.entry(name).or_default();
        *count += 1;
        let what = match (*count).cmp(&LISTED) {
            std::cmp::Ordering::Less => what,
            std::cmp::Ordering::Equal => format!("{what}; more of it is not listed"),
            std::cmp::Ordering::Greater => return,
        };
        self.report.damage.push(Damage { object: self.cluster.path(&name.object()), lsn, what });
    }

    /// Compares the beginning of a timeline's first segment with its ancestors' WAL that it repeats.
    async fn repeats(&mut self, history: &TimelineHistory, objects: &TimelineObjects) -> Result<()> {
        let (size, fork) = (self.catalog.segment_size, history.begin());
        let number = WalSegNo::containing(fork, size);
        let start = number.start(size);
        let own = self.pieces(objects, SegmentName::new(history.timeline(), number, size));
        for ancestor in history.ancestors() {
            let theirs = SegmentName::new(ancestor.timeline, number, size);
            let Some(objects) = self.catalog.timelines.get(&ancestor.timeline) else { continue };
            let mut pieces = self.pieces(objects, theirs);
            if pieces.is_empty() && objects.partials.contains(&theirs) {
                pieces.push(Item { name: WalName::File(WalFileName::Partial(theirs)), start, len: size.bytes() });
            }
            let until = history.switch_point_of(ancestor.timeline).unwrap_or(fork);
            if let Some((at, one, other)) = self.compare(&own, &pieces, until).await? {
                let what = format!("differs from {}, which it repeats up to {until}", other.object());
                self.damage(one, Some(at), what);
            }
        }
        Ok(())
    }

    /// Compares what is stored more than once.
    async fn twice(&mut self, objects: &TimelineObjects) -> Result<()> {
        for (segment, parts) in &objects.parts {
            let Ok(start) = object::segment_start(*segment, self.catalog.segment_size) else { continue };
            let pieces = self.pieces(objects, *segment);
            let used: BTreeSet<WalName> = pieces.iter().map(|item| item.name).collect();
            let parts: Vec<Item> = parts.iter().map(|range| Self::part(*segment, start, *range)).collect();
            for part in parts.into_iter().filter(|part| !used.contains(&part.name)) {
                if let Err(problem) = load(self.cluster, part).await? {
                    self.damage(
                        part.name,
                        Some(part.start),
                        format!("{problem} (nothing needs it: its bytes are in other objects)"),
                    );
                } else if let Some((at, one, other)) = self.compare(&[part], &pieces, part.end()).await? {
                    self.damage(one, Some(at), format!("differs from {}", other.object()));
                }
            }
        }
        for segment in &objects.partials {
            let pieces = self.pieces(objects, *segment);
            let name = WalName::File(WalFileName::Partial(*segment));
            let Ok(start) = object::segment_start(*segment, self.catalog.segment_size) else { continue };
            if pieces.is_empty() {
                continue;
            }
            match object::open(self.cluster, name, None).await {
                Ok(stored) => {
                    let item = Item { name, start, len: self.catalog.segment_size.bytes() };
                    if let Some((at, other, one)) = self.compare(&pieces, &[item], stored.info.end.unwrap_or(start)).await? {
                        self.damage(one, Some(at), format!("differs from {}", other.object()));
                    }
                }
                Err(error) => self.damage(name, Some(start), finding(error)?),
            }
        }
        Ok(())
    }

    /// The first place before `until` at which two rows of objects differ, and the two. What cannot be read is passed over: it is named
    /// where it is checked.
    async fn compare(&self, one: &[Item], other: &[Item], until: Lsn) -> Result<Option<(Lsn, WalName, WalName)>> {
        for left in one.iter().filter(|item| item.start < until) {
            let mut bytes = None;
            for right in other.iter().filter(|right| right.start < until && right.start < left.end() && left.start < right.end()) {
                if bytes.is_none() {
                    bytes = load(self.cluster, *left).await?.ok();
                }
                let Some(left_bytes) = &bytes else { break };
                let range = (left.start.max(right.start), left.end().min(right.end()).min(until));
                let Ok((start, right_bytes)) = load_range(self.cluster, *right, range).await? else { continue };
                let count = usize::try_from(range.1.0 - left.start.0).unwrap_or(usize::MAX).min(left_bytes.len());
                let left_bytes = left_bytes.get(..count).unwrap_or(left_bytes);
                if let Some(at) = first_difference(left.start, left_bytes, start, &right_bytes) {
                    return Ok(Some((at, left.name, right.name)));
                }
            }
        }
        Ok(None)
    }
}

/// Where two stretches of WAL first differ, of what both have.
fn first_difference(start: Lsn, bytes: &[u8], other_start: Lsn, other: &[u8]) -> Option<Lsn> {
    let from = start.max(other_start);
    let tail = |start: Lsn, bytes| -> Option<&[u8]> { <[u8]>::get(bytes, usize::try_from(from.0 - start.0).ok()?..) };
    let (one, other) = (tail(start, bytes)?, tail(other_start, other)?);
    let shared = one.len().min(other.len());
    if one.get(..shared) == other.get(..shared) {
        return None;
    }
    one.iter().zip(other).position(|(a, b)| a != b).map(|at| from.advance(at as u64))
}

/// Fetches and decodes an object; says what is wrong with it when it is that.
async fn load(cluster: &Cluster, item: Item) -> Result<std::result::Result<Vec<u8>, String>> {
    let bytes = match cluster.store().get(&cluster.path(&item.name.object())).await {
        Ok(bytes) => bytes,
        Err(error) => return finding(error).map(Err),
    };
    let cluster = cluster.clone();
    let decoded = joined(tokio::task::spawn_blocking(move || object::decode(&cluster, item.name, &bytes)).await)?;
    match decoded {
        Ok((_, bytes)) if bytes.len() as u64 == item.len => Ok(Ok(bytes)),
        Ok((_, bytes)) => Ok(Err(format!("holds {} bytes instead of {}", bytes.len(), item.len))),
        Err(error) => finding(error).map(Err),
    }
}

/// As [`load`], but of what may be large only the frames that hold the positions; also says where they begin.
async fn load_range(cluster: &Cluster, item: Item, (from, to): (Lsn, Lsn)) -> Result<std::result::Result<(Lsn, Vec<u8>), String>> {
    if !matches!(item.name, WalName::File(WalFileName::Partial(_))) {
        return Ok(load(cluster, item).await?.map(|bytes| (item.start, bytes)));
    }
    let stored = match object::open(cluster, item.name, None).await {
        Ok(stored) => stored,
        Err(error) => return finding(error).map(Err),
    };
    let mut bytes = Vec::new();
    let mut start = item.start;
    let mut at = item.start;
    for (number, length) in (0..).zip(stored.frame_lengths()) {
        let end = at.advance(length.into());
        if end > from && at < to {
            if bytes.is_empty() {
                start = at;
            }
            match stored.frame(number).await {
                Ok(frame) => bytes.extend_from_slice(&frame),
                Err(error) => return finding(error).map(Err),
            }
        }
        at = end;
    }
    Ok(Ok((start, bytes)))
}

/// What an error says of the object that it is about; an error of the store ends the check.
fn finding(error: Error) -> Result<String> {
    match error.kind() {
        ErrorKind::Unsupported => Ok(format!("cannot be judged by this version of pgvault: {error}")),
        ErrorKind::Corrupt | ErrorKind::NotFound => Ok(error.to_string()),
        _ => Err(error),
    }
}

fn joined<T>(ended: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    ended.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::testdata::{ROW, cluster, file, store, store_part};
    use super::*;
    use crate::progress::Silent;

    const MIB: u64 = 1 << 20;

    async fn checked(cluster: &Cluster, deep: bool) -> WalReport {
        let options = VerifyOptions { from: None, timeline: None, deep, progress: Arc::new(Silent) };
        verify(cluster, &options).await.unwrap()
    }

    fn gaps(report: &WalReport) -> Vec<(u64, u64)> {
        report.gaps.iter().map(|gap| (gap.from.0, gap.to.0)).collect()
    }

    /// Real segments in a row, one of them as parts.
    async fn row(without: Option<usize>, cut: Option<(usize, &[usize])>) -> Cluster {
        let cluster = cluster().await;
        for (n, name) in ROW.iter().enumerate().filter(|(n, _)| Some(*n) != without) {
            let bytes = file(name);
            match cut.filter(|(which, _)| *which == n) {
                None => store(&cluster, name, &bytes).await,
                Some((_, cuts)) => {
                    let mut from = 0;
                    for cut in cuts.iter().copied().chain([bytes.len()]) {
                        store_part(&cluster, name, &bytes[..cut], from).await;
                        from = cut;
                    }
                }
            }
        }
        cluster
    }

    #[tokio::test]
    async fn h14_any_segment_that_is_not_there_is_exactly_that_gap() {
        let clean = checked(&row(None, None).await, true).await;
        assert!(clean.is_clean(), "{clean:?}");
        let timeline = clean.timelines[0];
        assert_eq!((timeline.from, timeline.to, timeline.segments), (Lsn(0x80_0000), Lsn(0xD0_0000), 5));
        for missing in 1..4 {
            let report = checked(&row(Some(missing), None).await, false).await;
            let from = 0x80_0000 + (missing as u64) * MIB;
            assert_eq!(gaps(&report), [(from, from + MIB)]);
            assert_eq!(report.damage, []);
            // The long record in three of them has no transaction's end in it.
            let before: Timestamp =
                if missing == 1 { clean.timelines[0].first_time.unwrap() } else { "2026-11-21T09:29:11.184817Z".parse().unwrap() };
            assert!(report.gaps[0].from_time.is_some_and(|time| time >= before), "{report:?}");
            assert!(report.gaps[0].to_time > report.gaps[0].from_time, "{report:?}");
        }
        for edge in [0, 4] {
            let report = checked(&row(Some(edge), None).await, false).await;
            assert!(report.is_clean(), "what is at the edge is not known to have been there: {report:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5))]

        /// However a segment was cut into parts, it reads as if it were whole.
        #[test]
        fn parts_read_as_the_segment_that_they_make_up(which in 0usize..5, cuts in prop::collection::btree_set(40usize..(1 << 20), 1..5)) {
            let cuts: Vec<usize> = cuts.into_iter().collect();
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let (parts, whole) = runtime.block_on(async {
                (checked(&row(None, Some((which, &cuts))).await, true).await, checked(&row(None, None).await, false).await)
            });
            prop_assert!(parts.is_clean(), "{:?}", parts);
            prop_assert_eq!(parts.timelines[0].records, whole.timelines[0].records);
        }
    }

    #[tokio::test]
    async fn a_hole_between_parts_is_a_gap_and_what_lies_behind_it_is_read() {
        let cluster = row(Some(4), None).await;
        let bytes = file(ROW[4]);
        store_part(&cluster, ROW[4], &bytes[..100_000], 0).await;
        store_part(&cluster, ROW[4], &bytes[..300_000], 200_000).await;
        let report = checked(&cluster, false).await;
        assert_eq!((gaps(&report), &report.damage[..]), (vec![(0xC0_0000 + 100_000, 0xC0_0000 + 200_000)], &[][..]));
        let mut other = bytes.clone();
        other[250_000] ^= 1;
        store_part(&cluster, ROW[4], &other[..400_000], 240_000).await;
        let report = checked(&cluster, false).await;
        assert_eq!(report.damage[0].lsn, Some(Lsn(0xC0_0000 + 250_000)), "{report:?}");
        assert!(
            report.damage[0].object.ends_with("0003A980-00061A80.part") && report.damage[0].what.contains("overlap"),
            "{report:?}"
        );
    }

    #[tokio::test]
    async fn parts_that_nobody_needs_are_compared_when_asked() {
        let cluster = row(None, None).await;
        let mut bytes = file(ROW[1]);
        store_part(&cluster, ROW[1], &bytes[..30_000], 0).await;
        assert!(checked(&cluster, true).await.is_clean());
        bytes[29_000] ^= 1;
        store_part(&cluster, ROW[1], &bytes[..30_001], 0).await;
        assert!(checked(&cluster, false).await.is_clean());
        let report = checked(&cluster, true).await;
        assert_eq!(report.damage.len(), 1, "{report:?}");
        assert_eq!(report.damage[0].lsn, Some(Lsn(0x90_0000 + 29_000)));
        assert!(report.damage[0].what.contains("000000010000000000000009.wal"), "{report:?}");
    }

    #[tokio::test]
    async fn a_timeline_repeats_its_parent_up_to_the_fork() {
        let (cluster, other) = (cluster().await, cluster().await);
        let (partial, child) = ("000000010000000000000011.partial", "000000020000000000000011");
        let mut bytes = file(child);
        for cluster in [&cluster, &other] {
            let history = include_bytes!("../../../testdata/postgres/00000002.history");
            super::super::take::put_history(cluster, TimelineId(2), history).await.unwrap();
            store(cluster, partial, &file(partial)).await;
        }
        store(&cluster, child, &bytes).await;
        let report = checked(&cluster, true).await;
        assert!(report.is_clean(), "{report:?}");
        let ends: Vec<_> = report.timelines.iter().map(|t| (t.from, t.to, t.records)).collect();
        assert_eq!(ends[0], (Lsn(0x110_0000), Lsn(0x110_00A0), 1));
        assert!(ends[1].0 == Lsn(0x110_0000) && ends[1].1 > Lsn(0x110_01F0), "{ends:?}");
        bytes[0x90] ^= 1;
        store(&other, child, &bytes).await;
        let report = checked(&other, false).await;
        let found: Vec<_> = report.damage.iter().map(|d| (d.lsn.unwrap().0, d.object.contains("/00000002/"))).collect();
        assert_eq!(found, [(0x110_0028, true), (0x110_0090, true)], "{report:?}");
    }

    #[tokio::test]
    async fn what_is_asked_for_and_not_there_is_missing() {
        let cluster = row(Some(0), None).await;
        let from = |lsn| VerifyOptions { from: Some(Lsn(lsn)), timeline: None, deep: false, progress: Arc::new(Silent) };
        let report = verify(&cluster, &from(0x80_0028)).await.unwrap();
        assert_eq!(gaps(&report), [(0x80_0028, 0x90_0000)]);
        let report = verify(&cluster, &from(0xA0_0028)).await.unwrap();
        assert!(report.is_clean() && report.timelines[0].from == Lsn(0xA0_0000), "{report:?}");
        assert_eq!(verify(&cluster, &from(0x1000_0000)).await.unwrap_err().code(), "wal.none");
    }
}
