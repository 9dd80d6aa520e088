//! The write-ahead log's own bytes: page headers, records, and what an archived segment contains.
//!
//! A segment is a row of pages. Each page begins with a header that names its own position; the first page of a segment has a
//! longer one that also names the cluster. Records follow each other at multiples of 8 and run over page and segment boundaries;
//! the page after a boundary says how much of the interrupted record it continues. Segment files are recycled, so behind the end
//! of valid WAL stands older WAL under older page positions, or zeroes.
//!
//! - [`SegmentHeader`] identifies a segment by its first bytes;
//! - [`Records`] walks the records that begin in a segment;
//! - [`WalChecker`] checks WAL of any length, over segment ends;
//! - [`Touched`] tells in which relations rows were added or deleted;
//! - [`scan_segment`] reduces a segment to what the catalog keeps: which times, transactions and restore points are in it.
//!
//! Sources: `src/include/access/xlog_internal.h`, `xlogrecord.h`, `xact.h`; `src/backend/access/transam/xlogreader.c`. The format
//! of pages and of record headers has been the same since 9.5.

mod blocks;
mod check;
mod record;
mod scan;
mod touched;
mod witness;

use jiff::Timestamp;

pub use check::{PassedEnd, PassedEnds, WalChecker, WalFault};
pub use record::{Records, RestorePoint, ScanEnd, StopReason, TransactionEnd, WalRecord};
pub use scan::{SegmentScan, SegmentScanner, TransactionSpan, find_transaction, record_begins_at, scan_segment, transactions_from};
pub use touched::{Touch, Touched};
pub use witness::Witness;

use super::bytes::{u16_at, u32_at, u64_at};
use super::{Lsn, ParseError, SegmentSize, SystemId, TimelineId};

/// Bytes of the header of a page that is not the first of its segment.
pub const SHORT_HEADER: usize = 24;

/// Bytes of the header of a segment's first page.
pub const LONG_HEADER: usize = 40;

/// `XLP_FIRST_IS_CONTRECORD`: the page continues a record.
const CONTINUES_RECORD: u16 = 0x0001;

/// `XLP_LONG_HEADER`.
const IS_LONG: u16 = 0x0002;

/// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: the record that the page before left unfinished was given up after a crash.
const GIVES_UP_RECORD: u16 = 0x0008;

/// `XLP_ALL_FLAGS`.
const ALL_FLAGS: u16 = 0x000F;

/// The header of any page of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPageHeader {
    /// `xlp_magic`, which changes with the WAL format; see [`SegmentHeader::major_version`].
    pub magic: u16,
    /// `xlp_info`.
    pub flags: u16,
    /// The timeline of the page's first record.
    pub timeline: TimelineId,
    /// The position of the page's first byte.
    pub address: Lsn,
    /// Bytes that are left of the record that the page continues, on it and on those that follow.
    pub remaining: u32,
}

impl WalPageHeader {
    /// Reads the header of a page; `None` when it is not one.
    pub fn parse(page: &[u8]) -> Option<Self> {
        page.get(..SHORT_HEADER)?;
        let header = Self {
            magic: u16_at(page, 0)?,
            flags: u16_at(page, 2)?,
            timeline: TimelineId(u32_at(page, 4)?),
            address: Lsn(u64_at(page, 8)?),
            remaining: u32_at(page, 16)?,
        };
        // Every magic so far is 0xD0xx or 0xD1xx. Betas and even minor releases of a beta raise the low byte.
        let plausible = header.magic >> 9 == 0xD0 >> 1 && header.flags & !ALL_FLAGS == 0 && header.timeline.0 > 0;
        plausible.then_some(header)
    }

    /// True when the page begins with the rest of a record.
    pub fn continues_record(self) -> bool {
        self.flags & CONTINUES_RECORD != 0
    }

    fn gives_up_record(self) -> bool {
        self.flags & GIVES_UP_RECORD != 0
    }

    /// Bytes of this header.
    fn length(self) -> usize {
        if self.flags & IS_LONG == 0 { SHORT_HEADER } else { LONG_HEADER }
    }
}

/// What the first bytes of a segment say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// `xlp_magic` of the first page.
    pub magic: u16,
    /// The timeline of the first page.
    ///
    /// *At most* the timeline in the file's name: the first segment of a timeline begins with a copy of its ancestor's pages.
    pub timeline: TimelineId,
    /// The position of the segment.
    pub start: Lsn,
    /// The cluster that wrote it.
    pub system_identifier: SystemId,
    /// The segment size of that cluster.
    pub segment_size: SegmentSize,
    /// The size of a page of WAL.
    pub block_size: u32,
}

impl SegmentHeader {
    /// Reads the first [`LONG_HEADER`] bytes of a segment.
    ///
    /// # Errors
    /// When they do not begin a segment: too few, no long page header, an impossible size, or a position that is not a multiple of
    /// the segment size. An unknown magic of the right family is *not* an error: PostgreSQL 19 changed its magic between two betas,
    /// and a backup tool that stops archiving over that loses WAL. See [`SegmentHeader::major_version`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let bad = |why: &str| ParseError::new("WAL segment header", why);
        let page = WalPageHeader::parse(bytes).ok_or_else(|| bad("the first page does not begin with a WAL page header"))?;
        if page.flags & IS_LONG == 0 {
            return Err(bad("the first page is not the first of a segment"));
        }
        let short = || bad("fewer bytes than the header of a segment's first page has");
        let system_identifier = SystemId(u64_at(bytes, 24).ok_or_else(short)?);
        let segment_size = SegmentSize::try_from(u32_at(bytes, 32).ok_or_else(short)?)?;
        let block_size = u32_at(bytes, 36).ok_or_else(short)?;
        if !block_size.is_power_of_two() || !(1 << 10..=64 << 10).contains(&block_size) {
            return Err(bad("the WAL block size is not a power of two from 1 KiB to 64 KiB"));
        }
        if page.address.0 % segment_size.bytes() != 0 {
            return Err(bad("the position of the first page is not the start of a segment"));
        }
        Ok(Self { magic: page.magic, timeline: page.timeline, start: page.address, system_identifier, segment_size, block_size })
    }

    /// The major version of the server that wrote the segment; `None` for versions not known to pgvault.
    pub fn major_version(self) -> Option<u32> {
        Some(match self.magic {
            0xD10D => 14,
            0xD110 => 15,
            0xD113 => 16,
            0xD116 => 17,
            0xD118 => 18,
            // 0xD121 since 19 beta 3; those before belong to its alpha and beta releases.
            0xD119..=0xD121 => 19,
            _ => return None,
        })
    }
}

/// Seconds from 1970-01-01 to 2000-01-01, where PostgreSQL's timestamps begin.
const PG_EPOCH_SECONDS: i64 = 946_684_800;

/// Turns a `TimestampTz`, microseconds since 2000-01-01 UTC, into a point in time.
///
/// `None` for the years past 9999 and for PostgreSQL's infinities, none of which a server's clock shows.
pub fn timestamp_from_pg(microseconds: i64) -> Option<Timestamp> {
    Timestamp::from_microsecond(microseconds.checked_add(PG_EPOCH_SECONDS * 1_000_000)?).ok()
}

/// Turns a point in time into a `TimestampTz`, rounding down to the microsecond.
pub fn timestamp_to_pg(timestamp: Timestamp) -> i64 {
    // as_microsecond rounds towards zero, which is up before 1970.
    let rounded_up = timestamp.as_nanosecond().rem_euclid(1000) != 0 && timestamp.as_nanosecond() < 0;
    timestamp.as_microsecond() - i64::from(rounded_up) - PG_EPOCH_SECONDS * 1_000_000
}

#[cfg(test)]
mod testdata;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testdata::segment;
    use super::*;

    #[test]
    fn a_real_segment_names_its_cluster_and_position() {
        let bytes = segment("000000010000000000000009");
        let header = SegmentHeader::parse(&bytes[..LONG_HEADER]).unwrap();
        let control = super::super::ControlFile::parse(include_bytes!("../../../testdata/postgres/pg_control.15")).unwrap();
        assert_eq!(header.system_identifier, control.system_identifier);
        assert_eq!(header.segment_size, control.wal_segment_size);
        assert_eq!((header.major_version(), header.timeline, header.start), (Some(15), TimelineId(1), Lsn(0x90_0000)));
        assert_eq!(header.block_size, 8192);
        assert!(SegmentHeader::parse(&bytes[..LONG_HEADER - 1]).is_err());
        assert!(SegmentHeader::parse(&bytes[8192..]).is_err(), "a page from the middle");
    }

    /// The file is named 00000002..., its first page is a copy of timeline 1's.
    #[test]
    fn the_first_segment_of_a_timeline_begins_on_its_ancestor() {
        let header = SegmentHeader::parse(&segment("000000020000000000000011")).unwrap();
        assert_eq!(header.timeline, TimelineId(1));
    }

    #[test]
    fn an_unknown_magic_is_not_an_error() {
        let mut bytes = segment("000000010000000000000009");
        bytes[..2].copy_from_slice(&0xD1FFu16.to_le_bytes());
        assert_eq!(SegmentHeader::parse(&bytes).unwrap().major_version(), None);
        bytes[..2].copy_from_slice(&0x1234u16.to_le_bytes());
        assert!(SegmentHeader::parse(&bytes).is_err());
    }

    #[test]
    fn timestamps_count_from_the_year_2000() {
        let time: Timestamp = "2026-11-21T09:29:11.116870Z".parse().unwrap();
        assert_eq!(timestamp_from_pg(0).unwrap().to_string(), "2000-01-01T00:00:00Z");
        assert_eq!(timestamp_from_pg(timestamp_to_pg(time)), Some(time));
        assert_eq!(timestamp_from_pg(i64::MAX), None);
        assert_eq!(timestamp_from_pg(i64::MIN), None);
        let before: Timestamp = "1969-12-31T23:59:59.9999995Z".parse().unwrap();
        assert_eq!(timestamp_from_pg(timestamp_to_pg(before)).unwrap().to_string(), "1969-12-31T23:59:59.999999Z");
        assert!(timestamp_to_pg(Timestamp::MIN) < timestamp_to_pg(Timestamp::MAX));
    }

    proptest! {
        #[test]
        fn timestamps_round_trip(microseconds in -200_000_000_000_000_000i64..200_000_000_000_000_000) {
            prop_assert_eq!(timestamp_from_pg(microseconds).map(timestamp_to_pg), Some(microseconds));
        }

        #[test]
        fn any_header_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = SegmentHeader::parse(&bytes);
        }
    }
}
