//! Which segments a plan needs, timeline by timeline.

use std::collections::BTreeMap;

use super::plan::{Line, Need};
use crate::postgres::{SegmentSize, TimelineHistory, TimelineId, WalSegNo};

/// The segments of one timeline that are needed: ranges with both ends, sorted and joined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Needed(Vec<(u64, u64)>);

impl Needed {
    /// What `needs` ask of a timeline.
    pub(super) fn on(timeline: TimelineId, needs: &[Need], lines: &BTreeMap<TimelineId, Line>, size: SegmentSize) -> Self {
        let mut ranges: Vec<(u64, u64)> = needs
            .iter()
            .filter(|need| concerns(timeline, need, lines))
            .map(|need| {
                let last = need.to.map_or(u64::MAX, |to| WalSegNo::before(to, size).0);
                (WalSegNo::containing(need.from, size).0, last)
            })
            .collect();
        ranges.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (from, to) in ranges {
            match joined.last_mut().filter(|last| from <= last.1.saturating_add(1)) {
                Some(last) => last.1 = last.1.max(to),
                None => joined.push((from, to)),
            }
        }
        Self(joined)
    }

    /// True when nothing of the timeline is.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True for a segment that is needed.
    pub(super) fn has(&self, segment: WalSegNo) -> bool {
        let at = self.0.partition_point(|(from, _)| *from <= segment.0);
        at.checked_sub(1).and_then(|at| self.0.get(at)).is_some_and(|(_, to)| segment.0 <= *to)
    }

    /// The stretches between `first` and `last`, both included, that are not needed.
    pub(super) fn gaps(&self, first: WalSegNo, last: WalSegNo) -> Vec<(WalSegNo, WalSegNo)> {
        let mut gaps = Vec::new();
        let mut next = first.0;
        for (from, to) in &self.0 {
            if *from > next {
                gaps.push((next, (*from - 1).min(last.0)));
            }
            next = next.max(to.saturating_add(1));
            if next > last.0 {
                break;
            }
        }
        if next <= last.0 && self.0.last().is_none_or(|(_, to)| *to < u64::MAX) {
            gaps.push((next, last.0));
        }
        gaps.retain(|(from, to)| from <= to);
        gaps.into_iter().map(|(from, to)| (WalSegNo(from), WalSegNo(to))).collect()
    }
}

/// True when a recovery of what needs it may ask for WAL of `timeline`.
fn concerns(timeline: TimelineId, need: &Need, lines: &BTreeMap<TimelineId, Line>) -> bool {
    if timeline == need.timeline {
        return true;
    }
    let history = |of: TimelineId| lines.get(&of).and_then(|line| line.history.as_ref());
    match history(timeline) {
        // It may have come from there.
        None if timeline > need.timeline => return true,
        Some(own) if own.contains(need.timeline, need.stop) => return true,
        _ => {}
    }
    // The backup may begin in the segment where its timeline did: recovery then takes the ancestor's copy, if there is no other.
    let is_ancestor = |own: &TimelineHistory| own.ancestors().iter().any(|ancestor| ancestor.timeline == timeline);
    match history(need.timeline) {
        Some(own) => is_ancestor(own),
        None => timeline < need.timeline && need.timeline > TimelineId(1),
    }
}
