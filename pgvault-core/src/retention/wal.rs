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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Lsn;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn need(timeline: u32, from: u64, to: Option<u64>) -> Need {
        let lsn = |segment: u64| Lsn(segment << 24);
        Need { timeline: TimelineId(timeline), stop: Lsn((from << 24) + 10), from: lsn(from), to: to.map(|to| Lsn((to << 24) + 1)) }
    }

    fn lines() -> BTreeMap<TimelineId, Line> {
        let history = |timeline, text: &str| {
            let history = Some(TimelineHistory::parse(TimelineId(timeline), text).unwrap());
            (TimelineId(timeline), Line { history, newest: None })
        };
        // 2 left 1 in segment 16, 3 left 1 in segment 8, 10 left 2 in segment 32.
        let ten = "1\t0/10000000\tx\n2\t0/20000000\tx";
        [history(1, ""), history(2, "1\t0/10000000\tx"), history(3, "1\t0/8000000\tx"), history(10, ten)].into()
    }

    fn on(timeline: u32, needs: &[Need]) -> Vec<(u64, u64)> {
        Needed::on(TimelineId(timeline), needs, &lines(), SIZE).0
    }

    /// T18: WAL is needed from a backup on along every timeline that goes on from it, and on no other.
    #[test]
    fn t18_wal_is_needed_along_the_ancestry() {
        const ALL: u64 = u64::MAX;
        let before_all = [need(1, 4, None)];
        for timeline in [1, 2, 3, 10] {
            assert_eq!(on(timeline, &before_all), [(4, ALL)]);
        }
        let after_three = [need(1, 12, None)];
        assert_eq!((on(1, &after_three), on(2, &after_three), on(3, &after_three)), (vec![(12, ALL)], vec![(12, ALL)], vec![]));
        // The segment in which a timeline began may be asked of the one it left.
        let begun = [need(2, 16, Some(17))];
        assert_eq!(
            (on(2, &begun), on(10, &begun), on(1, &begun), on(3, &begun)),
            (vec![(16, 17)], vec![(16, 17)], vec![(16, 17)], vec![])
        );
        // Nobody knows where timeline 11 comes from.
        assert_eq!(on(11, &begun), [(16, 17)]);
    }

    #[test]
    fn ranges_are_joined_and_what_lies_between_is_told() {
        let needed = Needed::on(TimelineId(1), &[need(1, 20, None), need(1, 5, Some(6)), need(1, 7, Some(8))], &lines(), SIZE);
        assert_eq!(needed.0, [(5, 8), (20, u64::MAX)]);
        let has: Vec<u64> = (0..30).filter(|n| needed.has(WalSegNo(*n))).collect();
        assert_eq!(has, (5..=8).chain(20..30).collect::<Vec<_>>());
        let gaps = |first, last| {
            needed.gaps(WalSegNo(first), WalSegNo(last)).into_iter().map(|(from, to)| (from.0, to.0)).collect::<Vec<_>>()
        };
        assert_eq!(gaps(0, 100), [(0, 4), (9, 19)]);
        assert_eq!((gaps(6, 12), gaps(5, 8)), (vec![(9, 12)], vec![]));
        assert_eq!(Needed::default().gaps(WalSegNo(3), WalSegNo(4)), [(WalSegNo(3), WalSegNo(4))]);
    }
}
