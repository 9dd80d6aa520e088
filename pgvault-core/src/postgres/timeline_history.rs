//! Timeline history files: which branch of a cluster's past a position lies on.
//!
//! A promotion starts a timeline and writes its `.history` file: one line for each ancestor, oldest first, with the position at
//! which it was left. Everything on an ancestor past that position belongs to an abandoned branch; a backup that ends there cannot be
//! recovered to the new timeline (T16).
//!
//! Source: `readTimeLineHistory` and `tliOfPointInHistory` in `src/backend/access/transam/timeline.c`. One thing is easily missed:
//! switch points need *not* increase. Recovering along timeline 2 to a point before 2 began starts a timeline 3 whose file still
//! lists 2, with a switch point before the one of timeline 1. Timeline 2 then contributes nothing, and 1 only up to the earlier point.

use super::{Lsn, ParseError, TimelineId};

/// A line of a history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it was left, as the file says. Where it stops to count can be earlier, see [`TimelineHistory::switch_point_of`].
    pub switch_point: Lsn,
    /// Why, in the words of the server that was promoted.
    pub reason: String,
}

/// The ancestry of a timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<Ancestor>,
}

impl TimelineHistory {
    /// The history of a timeline that has no file: the first one.
    pub fn root(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Reads the history file of `timeline`. Blank lines and lines that begin with `#` do not count.
    ///
    /// # Errors
    /// When a line is not a timeline and a position, when the timelines do not increase, or do not stay below `timeline`.
    pub fn parse(timeline: TimelineId, text: &str) -> Result<Self, ParseError> {
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text.lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let ancestor = Self::ancestor(line)?;
            if ancestors.last().is_some_and(|last| last.timeline >= ancestor.timeline) {
                return Err(bad(format!("timeline {} does not follow a smaller one", ancestor.timeline)));
            }
            if ancestor.timeline >= timeline {
                return Err(bad(format!("timeline {} cannot be an ancestor of {timeline}", ancestor.timeline)));
            }
            ancestors.push(ancestor);
        }
        Ok(Self { timeline, ancestors })
    }

    fn ancestor(line: &str) -> Result<Ancestor, ParseError> {
        let malformed = || bad(format!("`{line}` is not a timeline and a position"));
        // T15: decimal here, hexadecimal in the file's name.
        let (number, rest) = line.split_once(|c: char| c.is_ascii_whitespace()).ok_or_else(malformed)?;
        let number = Some(number).filter(|n| n.bytes().all(|b| b.is_ascii_digit())).and_then(|n| n.parse().ok());
        let timeline = TimelineId(number.filter(|n| *n > 0).ok_or_else(malformed)?);
        let rest = rest.trim_start();
        let (lsn, reason) = rest.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((rest, ""));
        Ok(Ancestor { timeline, switch_point: lsn.parse().map_err(|_| malformed())?, reason: reason.trim().to_owned() })
    }

    /// The timeline whose history this is.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The lines of the file, oldest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    /// Where the timeline itself begins; [`Lsn::INVALID`] without ancestors.
    pub fn begin(&self) -> Lsn {
        self.ancestors.last().map_or(Lsn::INVALID, |last| last.switch_point)
    }

    /// The timeline that wrote the byte at `lsn`, as this history has it. (`tliOfPointInHistory`.)
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.ranges()
            .find(|range| range.begin <= lsn && range.end.is_none_or(|end| lsn < end))
            .map_or(self.timeline, |r| r.timeline)
    }

    /// Where `timeline` stops to be part of this history; `None` for the timeline itself and for those it does not descend from.
    pub fn switch_point_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ranges().find(|range| range.timeline == timeline)?.end
    }

    /// True when a server that stood at position `lsn` on `timeline` had nothing but WAL of this history: what it takes for a
    /// backup that ended there to be recovered to this timeline (T16).
    ///
    /// A position is a boundary between bytes, so both ends of a timeline's range belong to it: the position at which a timeline was
    /// left lies on the old one and on the new one.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.ranges().any(|range| range.timeline == timeline && range.begin <= lsn && range.end.is_none_or(|end| lsn <= end))
    }

    /// What each timeline contributes, newest first. Of a range whose end lies before its begin, nothing counts.
    fn ranges(&self) -> impl Iterator<Item = Range> {
        let begins = self.ancestors.iter().rev().skip(1).map(|a| a.switch_point).chain([Lsn::INVALID]);
        let mut end = self.begin();
        let ancestors = self.ancestors.iter().rev().zip(begins).map(move |(ancestor, begin)| {
            end = end.min(ancestor.switch_point);
            Range { timeline: ancestor.timeline, begin, end: Some(end) }
        });
        [Range { timeline: self.timeline, begin: self.begin(), end: None }].into_iter().chain(ancestors)
    }
}

/// From where to where a timeline is part of a history.
struct Range {
    timeline: TimelineId,
    begin: Lsn,
    end: Option<Lsn>,
}

fn bad(why: String) -> ParseError {
    ParseError::new("timeline history", why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: &str = include_str!("../../../testdata/postgres/00000002.history");

    fn t(number: u32) -> TimelineId {
        TimelineId(number)
    }

    #[test]
    fn a_real_history_is_read() {
        let history = TimelineHistory::parse(t(2), REAL).unwrap();
        let reason = "no recovery target specified".to_owned();
        assert_eq!(history.ancestors(), [Ancestor { timeline: t(1), switch_point: Lsn(0x110_00A0), reason }]);
        assert_eq!((history.timeline(), history.begin()), (t(2), Lsn(0x110_00A0)));
    }

    /// T16: a backup that ended past the fork is on another branch.
    #[test]
    fn t16_positions_past_the_fork_are_not_in_the_history() {
        let history =
            TimelineHistory::parse(t(5), "1\t0/5000000\tbefore\n\n# a remark\n3\t0/9000000\tafter 2026-01-01 00:00:00+00\n")
                .unwrap();
        for (timeline, lsn, expected) in [
            (1, 0x100_0000, true),
            (1, 0x500_0000, true), // everything up to the switch point is shared
            (1, 0x500_0001, false),
            (2, 0x400_0000, false), // a sister, not an ancestor
            (3, 0x4FF_FFFF, false), // before it began
            (3, 0x500_0000, true),
            (3, 0x900_0000, true),
            (3, 0x900_0001, false),
            (5, 0x900_0000, true),
            (5, 0x8FF_FFFF, false),
            (5, u64::MAX, true),
        ] {
            assert_eq!(history.contains(t(timeline), Lsn(lsn)), expected, "{timeline} at {lsn:X}");
        }
        for (lsn, timeline) in [(0, 1), (0x4FF_FFFF, 1), (0x500_0000, 3), (0x8FF_FFFF, 3), (0x900_0000, 5)] {
            assert_eq!(history.timeline_at(Lsn(lsn)), t(timeline), "{lsn:X}");
        }
        assert_eq!(history.switch_point_of(t(1)), Some(Lsn(0x500_0000)));
        assert_eq!((history.switch_point_of(t(2)), history.switch_point_of(t(5))), (None, None));
    }

    /// T16: 3 was made by recovering along 2 to a point before 2 began.
    #[test]
    fn t16_a_later_fork_may_lie_before_an_earlier_one() {
        let history = TimelineHistory::parse(t(3), "1\t0/5000000\tx\n2\t0/3000000\tx\n").unwrap();
        assert_eq!(history.switch_point_of(t(1)), Some(Lsn(0x300_0000)));
        assert!(history.contains(t(1), Lsn(0x300_0000)));
        assert!(!history.contains(t(1), Lsn(0x400_0000)), "that part of 1 was abandoned");
        assert!(!history.contains(t(2), Lsn(0x300_0000)) && !history.contains(t(2), Lsn(0x500_0000)));
        assert_eq!(history.timeline_at(Lsn(0x400_0000)), t(3));
        assert_eq!(history.timeline_at(Lsn(0x200_0000)), t(1));
    }

    #[test]
    fn the_first_timeline_has_no_file() {
        let history = TimelineHistory::root(t(1));
        assert!(history.contains(t(1), Lsn(7)) && !history.contains(t(2), Lsn(7)));
        assert_eq!((history.begin(), history.timeline_at(Lsn(7))), (Lsn::INVALID, t(1)));
        assert_eq!(TimelineHistory::parse(t(1), "# nothing\n").unwrap(), history);
    }

    /// T15: decimal in the contents.
    #[test]
    fn t15_timelines_are_decimal_in_a_history_file() {
        let history = TimelineHistory::parse(t(17), "16\tA/B\t\n").unwrap();
        assert_eq!(history.ancestors()[0].timeline, t(16));
        assert!(TimelineHistory::parse(t(17), "0000000A\tA/B\tx\n").is_err());
    }

    #[test]
    fn a_damaged_history_is_refused() {
        for text in
            ["x", "1", "1\t", "1\tx", "1\t0/x\tr", "0\t0/1\tr", "-1\t0/1\tr", "2\t0/1\tr", "3\t0/1\tr", "1\t0/1\tr\n1\t0/2\tr"]
        {
            assert!(TimelineHistory::parse(t(2), text).is_err(), "{text}");
        }
    }

    proptest! {
        /// Every byte belongs to exactly one timeline, and a position just past it on that timeline is in the history.
        #[test]
        fn ancestry_is_consistent(points in proptest::collection::vec(1u64..50, 0..6), lsn in 0u64..60) {
            let lines: Vec<_> = (1..).zip(&points).map(|(tli, at)| format!("{tli}\t0/{at:X}\tr")).collect();
            let text = lines.join("\n");
            let history = TimelineHistory::parse(t(u32::try_from(points.len()).unwrap() + 1), &text).unwrap();
            let owner = history.timeline_at(Lsn(lsn));
            prop_assert!(history.contains(owner, Lsn(lsn)) && history.contains(owner, Lsn(lsn + 1)));
            let strictly_inside = (1..=history.timeline().0).filter(|n| history.contains(t(*n), Lsn(lsn)) && history.contains(t(*n), Lsn(lsn + 1)));
            prop_assert_eq!(strictly_inside.collect::<Vec<_>>(), [owner.0]);
        }

        #[test]
        fn any_text_never_panics(text in "([0-9]{1,3}\t[0-9A-F]{1,3}/[0-9A-F]{1,3}\tr\n|.{0,10}\n){0,6}", tli in any::<u32>(), lsn in any::<u64>()) {
            if let Ok(history) = TimelineHistory::parse(t(tli), &text) {
                let _ = (history.timeline_at(Lsn(lsn)), history.contains(t(1), Lsn(lsn)), history.switch_point_of(t(1)));
            }
        }
    }
}
