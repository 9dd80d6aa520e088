//! WAL segments: sizes, numbers and the names of the files PostgreSQL archives.
//!
//! Source: `XLogFileName` and its neighbours in `src/include/access/xlog_internal.h`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::lsn::hex8;
use super::{Lsn, ParseError, TimelineId};

/// The cluster's `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// 16 MiB, what `initdb` chooses unless told otherwise.
    pub const DEFAULT: Self = Self(16 << 20);

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Segments that share the middle 8 digits of a file name.
    fn per_log(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = ParseError;

    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        if bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(ParseError::new("wal_segment_size", format!("{bytes} is not a power of two from 1 MiB to 1 GiB")))
        }
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> Self {
        size.0
    }
}

/// The number of a segment: its start position divided by the segment size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegNo(pub u64);

impl WalSegNo {
    /// The segment that holds the byte at `lsn`.
    pub fn containing(lsn: Lsn, size: SegmentSize) -> Self {
        Self(lsn.0 / size.bytes())
    }

    /// The segment that holds the last byte before `lsn`: the one needed to have everything *up to* `lsn`.
    pub fn before(lsn: Lsn, size: SegmentSize) -> Self {
        Self(lsn.0.saturating_sub(1) / size.bytes())
    }

    /// The position of the segment's first byte.
    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(size.bytes()))
    }

    /// The following segment.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A segment on a timeline, printed as the 24 hexadecimal digits of its file name.
///
/// The name alone does not give the position: that needs the segment size, see [`SegmentName::segment_number`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline the file was written on.
    pub timeline: TimelineId,
    log: u32,
    segment: u32,
}

impl SegmentName {
    /// The name of segment `number` on `timeline`.
    pub fn new(timeline: TimelineId, number: WalSegNo, size: SegmentSize) -> Self {
        // Positions are 64 bits wide, so the quotient fits 32 bits for every size from 1 MiB on.
        let log = u32::try_from(number.0 / size.per_log()).unwrap_or(u32::MAX);
        let segment = u32::try_from(number.0 % size.per_log()).unwrap_or(u32::MAX);
        Self { timeline, log, segment }
    }

    /// The segment's number in a cluster with segments of `size`.
    ///
    /// # Errors
    /// When the name cannot occur with that size (its last 8 digits are too large).
    pub fn segment_number(self, size: SegmentSize) -> Result<WalSegNo, ParseError> {
        if u64::from(self.segment) >= size.per_log() {
            return Err(ParseError::new("WAL segment name", format!("{self} cannot occur with {} byte segments", size.bytes())));
        }
        Ok(WalSegNo(u64::from(self.log) * size.per_log() + u64::from(self.segment)))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.log, self.segment)
    }
}

impl FromStr for SegmentName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseError::new("WAL segment name", format!("`{text}` is not 24 upper-case hexadecimal digits"));
        if text.len() != 24 {
            return Err(bad());
        }
        let part = |from: usize| text.get(from..from + 8).ok_or_else(bad);
        let number = |s: &str| hex8(s).ok_or_else(bad);
        Ok(Self { timeline: TimelineId::from_hex(part(0)?)?, log: number(part(8)?)?, segment: number(part(16)?)? })
    }
}

/// The four kinds of file that PostgreSQL hands to `archive_command` and asks of `restore_command`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// A whole segment.
    Segment(SegmentName),
    /// The last segment of a timeline that a promotion left: valid only up to the switch.
    Partial(SegmentName),
    /// The history of a timeline: where each ancestor was left.
    History(TimelineId),
    /// The history of a base backup, named after its start position.
    BackupHistory(SegmentName, u32),
}

impl WalFileName {
    /// The timeline in the name.
    pub fn timeline(self) -> TimelineId {
        match self {
            Self::Segment(s) | Self::Partial(s) | Self::BackupHistory(s, _) => s.timeline,
            Self::History(t) => t,
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(s) => write!(f, "{s}"),
            Self::Partial(s) => write!(f, "{s}.partial"),
            Self::History(t) => write!(f, "{}.history", t.hex()),
            Self::BackupHistory(s, offset) => write!(f, "{s}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for WalFileName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseError::new("WAL file name", format!("`{text}` is not a segment, .partial, .history or .backup file"));
        match text.split_once('.') {
            None => text.parse().map(Self::Segment).map_err(|_| bad()),
            Some((segment, "partial")) => segment.parse().map(Self::Partial).map_err(|_| bad()),
            Some((timeline, "history")) => TimelineId::from_hex(timeline).map(Self::History).map_err(|_| bad()),
            Some((segment, rest)) => {
                let offset = rest.strip_suffix(".backup").and_then(hex8).ok_or_else(bad)?;
                Ok(Self::BackupHistory(segment.parse().map_err(|_| bad())?, offset))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TimelineId = TimelineId(1);

    /// T15: the last 8 digits roll over at 0xFF with 16 MiB segments, elsewhere with other sizes.
    #[test]
    fn t15_segment_names_roll_over_at_every_size() {
        for size in [1u32 << 20, 16 << 20, 64 << 20, 1 << 30] {
            let size = SegmentSize::try_from(size).unwrap();
            for number in [0, 1, size.per_log() - 1, size.per_log(), size.per_log() + 1, 7 * size.per_log()] {
                let name = SegmentName::new(TimelineId(0xA), WalSegNo(number), size);
                assert_eq!(name.to_string().parse::<SegmentName>().unwrap(), name);
                assert_eq!(name.segment_number(size).unwrap(), WalSegNo(number));
            }
        }
        let last = SegmentName::new(T, WalSegNo(255), SegmentSize::DEFAULT);
        assert_eq!(last.to_string(), "0000000100000000000000FF");
        let next = SegmentName::new(T, WalSegNo(256), SegmentSize::DEFAULT);
        assert_eq!(next.to_string(), "000000010000000100000000");
        assert!("000000010000000000000100".parse::<SegmentName>().unwrap().segment_number(SegmentSize::DEFAULT).is_err());
    }

    #[test]
    fn the_segment_before_a_boundary_is_the_full_one() {
        let size = SegmentSize::DEFAULT;
        assert_eq!(WalSegNo::before(Lsn(0x0200_0000), size), WalSegNo(1));
        assert_eq!(WalSegNo::containing(Lsn(0x0200_0000), size), WalSegNo(2));
    }

    #[test]
    fn archived_file_names_round_trip() {
        for name in [
            "000000010000000000000005",
            "000000010000000000000005.partial",
            "0000000A.history",
            "000000010000000000000005.00000028.backup",
        ] {
            assert_eq!(name.parse::<WalFileName>().unwrap().to_string(), name);
        }
        for bad in [
            "",
            "x",
            "000000010000000000000005.gz",
            "00000001.history.tmp",
            "../00000001.history",
            "000000010000000000000005.28.backup",
            "00000001000000000000000a",
            "000000010000000000000005.0000000a.backup",
        ] {
            assert!(bad.parse::<WalFileName>().is_err(), "{bad}");
        }
    }
}
