//! What a segment contains, reduced to what answers the questions of a restore.

use jiff::Timestamp;

use super::super::{Lsn, ParseError, SegmentSize, TimelineId};
use super::SegmentHeader;
use super::record::{Mark, Records, RestorePoint, ScanEnd, StopReason, TransactionEnd, WalRecord};

/// The transactions that end in a segment, commits and aborts alike: recovery can stop at both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionSpan {
    /// The earliest time. Times are taken before records are placed, so they are nearly but not quite in order.
    pub first_time: Timestamp,
    /// The latest time.
    pub last_time: Timestamp,
    /// The record with the latest time; the later one of equals.
    pub last_lsn: Lsn,
    /// The smallest transaction number. Compared as numbers: in the one segment in which they wrap around, the range is too wide.
    pub min_xid: u32,
    /// The largest transaction number.
    pub max_xid: u32,
    /// How many.
    pub count: u32,
}

impl TransactionSpan {
    fn of(end: TransactionEnd) -> Self {
        Self { first_time: end.time, last_time: end.time, last_lsn: end.lsn, min_xid: end.xid, max_xid: end.xid, count: 1 }
    }

    fn add(&mut self, end: TransactionEnd) {
        self.first_time = self.first_time.min(end.time);
        if end.time >= self.last_time {
            self.last_time = end.time;
            self.last_lsn = end.lsn;
        }
        self.min_xid = self.min_xid.min(end.xid);
        self.max_xid = self.max_xid.max(end.xid);
        self.count = self.count.saturating_add(1);
    }

    /// Counts a transaction whose record is not whole: it can be looked for, but recovery cannot stop at it yet.
    fn add_torn(&mut self, end: TransactionEnd) {
        self.min_xid = self.min_xid.min(end.xid);
        self.max_xid = self.max_xid.max(end.xid);
        self.count = self.count.saturating_add(1);
    }
}

/// What [`scan_segment`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentScan {
    /// What the segment says about itself.
    pub header: SegmentHeader,
    /// The timeline of the last page that was read: the one in the file's name, unless the segment was left before its switch.
    pub timeline: TimelineId,
    /// The first record that begins in the segment; none in the middle of a record longer than a segment.
    pub first_record: Option<Lsn>,
    /// The last record that begins in the segment, even if it ends in a later one.
    pub last_record: Option<Lsn>,
    /// The last record that begins and ends in the segment: the last that can be replayed while the next segment is not there.
    pub last_whole_record: Option<Lsn>,
    /// The end of valid WAL: the end of the segment when it is full or was switched away from.
    pub end_of_valid: Lsn,
    /// Why the scan ended there.
    pub stopped: StopReason,
    /// How many records begin in the segment.
    pub records: u64,
    /// The transactions that ended.
    pub transactions: Option<TransactionSpan>,
    /// The restore points that were set, in order.
    pub restore_points: Vec<RestorePoint>,
    /// True when a switch record ends the segment early.
    pub switched: bool,
}

impl SegmentScan {
    /// True when WAL continues with the next segment: nothing is missing at the end of this one.
    pub fn is_complete(&self) -> bool {
        self.end_of_valid == self.header.start.advance(self.header.segment_size.bytes())
    }

    fn add(&mut self, record: &WalRecord<'_>) {
        self.first_record = self.first_record.or(Some(record.lsn));
        self.last_record = Some(record.lsn);
        if record.is_whole {
            self.last_whole_record = Some(record.lsn);
        }
        self.records += 1;
        if let Some(end) = record.transaction_end() {
            match &mut self.transactions {
                Some(span) if !record.is_whole => span.add_torn(end),
                Some(span) => span.add(end),
                none => *none = Some(TransactionSpan::of(end)),
            }
        }
        self.restore_points.extend(record.restore_point());
    }
}

/// Reads all records that begin in a segment, or in its first part, that should begin at `start`.
///
/// The end of valid WAL is no error: the last segment of a timeline is only part full. What a record that continues in the next
/// segment says is counted here, where it begins, as far as it can be read.
///
/// # Errors
/// When `bytes` is not the segment at `start` of a cluster with segments of `size`.
pub fn scan_segment(bytes: &[u8], start: Lsn, size: SegmentSize) -> Result<SegmentScan, ParseError> {
    SegmentScanner::new(start, size).scan(bytes)
}

/// Scans a segment again and again while it grows, each record once.
#[derive(Debug, Clone)]
pub struct SegmentScanner {
    start: Lsn,
    size: SegmentSize,
    /// What was found up to a place behind a whole record; what follows that place may read differently with more bytes.
    settled: Option<(SegmentScan, Mark)>,
}

impl SegmentScanner {
    /// For the segment at `start`.
    pub fn new(start: Lsn, size: SegmentSize) -> Self {
        Self { start, size, settled: None }
    }

    /// As [`scan_segment`]; `bytes` begins with what was scanned before.
    ///
    /// # Errors
    /// As [`scan_segment`].
    pub fn scan(&mut self, bytes: &[u8]) -> Result<SegmentScan, ParseError> {
        let mut records = Records::new(bytes, self.start, self.size)?;
        let mut scan = match &self.settled {
            Some((scan, mark)) => {
                records.resume(*mark);
                scan.clone()
            }
            None => SegmentScan {
                header: SegmentHeader::parse(bytes)?,
                timeline: records.timeline(),
                first_record: None,
                last_record: None,
                last_whole_record: None,
                end_of_valid: self.start,
                stopped: StopReason::EndOfInput,
                records: 0,
                transactions: None,
                restore_points: Vec::new(),
                switched: false,
            },
        };
        let mut mark = None;
        while let Some(record) = records.next() {
            if !record.is_whole || record.is_switch() {
                // The last one, and one that more bytes may make another.
                self.settle(&scan, mark.take());
            } else {
                mark = Some(records.mark(&record));
            }
            scan.add(&record);
        }
        self.settle(&scan, mark);
        let end = records.end().unwrap_or(ScanEnd { lsn: records.position(), reason: StopReason::EndOfInput });
        scan.timeline = records.timeline();
        scan.switched = end.reason == StopReason::Switch;
        scan.stopped = end.reason;
        scan.end_of_valid = end.lsn;
        Ok(scan)
    }

    fn settle(&mut self, scan: &SegmentScan, mark: Option<Mark>) {
        if let Some(mark) = mark {
            self.settled = Some((scan.clone(), mark));
        }
    }
}

/// The transactions whose records begin in the segment at `from` or later.
///
/// # Errors
/// As [`scan_segment`].
pub fn transactions_from(bytes: &[u8], start: Lsn, size: SegmentSize, from: Lsn) -> Result<Option<TransactionSpan>, ParseError> {
    let ends = Records::new(bytes, start, size)?.filter_map(|record| record.transaction_end()).filter(|end| end.lsn >= from);
    Ok(ends.fold(None, |span: Option<TransactionSpan>, end| match span {
        None => Some(TransactionSpan::of(end)),
        Some(mut span) => {
            span.add(end);
            Some(span)
        }
    }))
}

/// True when a record begins exactly at `lsn`, which is what the server asks of a `recovery_target_lsn` and of a checkpoint.
///
/// # Errors
/// As [`scan_segment`].
pub fn record_begins_at(bytes: &[u8], start: Lsn, size: SegmentSize, lsn: Lsn) -> Result<bool, ParseError> {
    Ok(Records::new(bytes, start, size)?.map(|record| record.lsn).find(|at| *at >= lsn) == Some(lsn))
}

/// The commit or abort of transaction `xid` in the segment.
///
/// # Errors
/// As [`scan_segment`].
pub fn find_transaction(bytes: &[u8], start: Lsn, size: SegmentSize, xid: u32) -> Result<Option<TransactionEnd>, ParseError> {
    Ok(Records::new(bytes, start, size)?.filter_map(|record| record.transaction_end()).find(|end| end.xid == xid))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testdata::{BLOCK, SIZE, Writer, segment, size};
    use super::super::timestamp_to_pg;
    use super::*;

    const NINE: &str = "000000010000000000000009";

    fn scan(name: &str) -> SegmentScan {
        let bytes = segment(name);
        let start = SegmentHeader::parse(&bytes).unwrap().start;
        scan_segment(&bytes, start, size()).unwrap()
    }

    fn time(text: &str) -> Timestamp {
        format!("2026-11-21T{text}Z").parse().unwrap()
    }

    /// Each number as `pg_waldump` 15 prints it.
    #[test]
    fn a_real_segment_scans_as_pg_waldump_reads_it() {
        let scan = scan(NINE);
        assert_eq!((scan.first_record, scan.last_record), (Some(Lsn(0x90_0028)), Some(Lsn(0x90_B958))));
        assert_eq!(scan.last_whole_record, scan.last_record);
        assert_eq!(scan.records, 156);
        assert!(scan.switched && scan.is_complete());
        assert_eq!(scan.end_of_valid, Lsn(0xA0_0000));
        let span = scan.transactions.unwrap();
        assert_eq!((span.first_time, span.last_time), (time("09:29:11.116870"), time("09:29:11.184817")));
        assert_eq!(span.last_lsn, Lsn(0x90_B930));
        assert_eq!((span.min_xid, span.max_xid, span.count), (726, 735, 9));
        let names: Vec<_> = scan.restore_points.iter().map(|p| (p.name.as_str(), p.lsn, p.end)).collect();
        assert_eq!(
            names,
            [("before the storm", Lsn(0x90_0278), Lsn(0x90_02E0)), ("zweiter Punkt ä", Lsn(0x90_2CC0), Lsn(0x90_2D28))]
        );
    }

    #[test]
    fn every_way_to_end_a_transaction_is_found_by_its_number() {
        let bytes = segment(NINE);
        let expected = [
            (726, 0x90_00D8, true),
            (727, 0x90_02E0, true),  // COMMIT PREPARED
            (728, 0x90_0390, true),  // with a subtransaction
            (730, 0x90_0440, false), // ABORT
            (731, 0x90_1728, true),  // COMMIT PREPARED behind invalidations
            (732, 0x90_2C70, false), // ROLLBACK PREPARED behind dropped relations and statistics
            (733, 0x90_B238, true),
            (734, 0x90_B6D8, true),
            (735, 0x90_B930, true),
        ];
        for (xid, lsn, is_commit) in expected {
            let end = find_transaction(&bytes, Lsn(0x90_0000), size(), xid).unwrap().unwrap();
            assert_eq!((end.xid, end.lsn, end.is_commit), (xid, Lsn(lsn), is_commit));
        }
        for absent in [0, 729, 736] {
            assert_eq!(find_transaction(&bytes, Lsn(0x90_0000), size(), absent).unwrap(), None, "{absent}");
        }
    }

    #[test]
    fn transactions_are_counted_from_a_position_on() {
        let bytes = segment(NINE);
        let from = |lsn| transactions_from(&bytes, Lsn(0x90_0000), size(), Lsn(lsn)).unwrap();
        assert_eq!(from(0), scan(NINE).transactions);
        assert_eq!(from(0x90_B6D8).map(|span| (span.min_xid, span.max_xid, span.count)), Some((734, 735, 2)));
        assert_eq!(from(0x90_B931), None);
    }

    #[test]
    fn a_record_begins_where_one_begins_and_nowhere_else() {
        let bytes = segment(NINE);
        for (lsn, expected) in [(0x90_0028, true), (0x90_0030, false), (0x90_0000, false), (0x90_B958, true), (0x90_B970, false)] {
            assert_eq!(record_begins_at(&bytes, Lsn(0x90_0000), size(), Lsn(lsn)).unwrap(), expected, "{lsn:X}");
        }
    }

    /// A record of 2.5 MB: one segment in which it begins, one in which nothing begins, one in which it ends.
    #[test]
    fn a_record_longer_than_a_segment() {
        let first = scan("00000001000000000000000A");
        assert_eq!((first.first_record, first.last_record, first.records), (Some(Lsn(0xA0_0028)), Some(Lsn(0xA0_0028)), 1));
        assert!(first.is_complete() && !first.switched);
        assert_eq!(first.last_whole_record, None);
        let second = scan("00000001000000000000000B");
        assert_eq!((second.first_record, second.records), (None, 0));
        assert!(second.is_complete());
        let third = scan("00000001000000000000000C");
        assert_eq!((third.first_record, third.last_record), (Some(Lsn(0xC6_42D0)), Some(Lsn(0xC6_4378))));
        let bytes = segment("00000001000000000000000A");
        let record = Records::new(&bytes, Lsn(0xA0_0000), size()).unwrap().next().unwrap();
        assert!(!record.is_whole);
        assert_eq!(record.end, third.first_record.unwrap());
    }

    #[test]
    fn a_promotion_leaves_a_partial_segment_and_continues_it() {
        let partial = scan("000000010000000000000011.partial");
        assert_eq!((partial.timeline, partial.records, partial.is_complete()), (TimelineId(1), 1, false));
        assert_eq!((partial.end_of_valid, partial.stopped), (Lsn(0x110_00A0), StopReason::Zeroes));
        let continued = scan("000000020000000000000011");
        assert_eq!((continued.first_record, continued.last_record), (Some(Lsn(0x110_0028)), Some(Lsn(0x110_01F0))));
        assert_eq!(continued.transactions.unwrap().max_xid, 740);
        let full = scan("000000010000000000000008");
        assert_eq!((full.last_record, full.switched), (Some(Lsn(0x86_0318)), true));
    }

    #[test]
    fn a_part_of_a_segment_is_read_as_far_as_it_goes() {
        let bytes = segment(NINE);
        let whole = scan(NINE);
        // The bytes up to a record's end, as a flush of an open segment has them.
        let scan = scan_segment(&bytes[..0x2E0], Lsn(0x90_0000), size()).unwrap();
        assert_eq!((scan.last_record, scan.end_of_valid), (Some(Lsn(0x90_0278)), Lsn(0x90_02E0)));
        assert_eq!(scan.stopped, StopReason::EndOfInput);
        assert_eq!(scan.restore_points, whole.restore_points[..1]);
        for length in 0..bytes.len().min(20_000) {
            if let Ok(scan) = scan_segment(&bytes[..length], Lsn(0x90_0000), size()) {
                assert!(scan.records <= whole.records && scan.end_of_valid.0 <= 0x90_0000 + length as u64);
            }
        }
    }

    proptest! {
        /// However often a growing segment is scanned, the last scan is that of the whole.
        #[test]
        fn scanning_again_while_it_grows_finds_the_same(mut cuts in prop::collection::vec(60usize..60_000, 0..12), nine: bool) {
            let bytes = segment(if nine { NINE } else { "00000001000000000000000C" });
            let start = SegmentHeader::parse(&bytes).unwrap().start;
            let mut scanner = SegmentScanner::new(start, size());
            cuts.sort_unstable();
            for cut in cuts.into_iter().chain([bytes.len()]) {
                prop_assert_eq!(scanner.scan(&bytes[..cut]).unwrap(), scan_segment(&bytes[..cut], start, size()).unwrap());
            }
        }
    }

    #[test]
    fn damage_ends_the_scan_where_it_is() {
        let mut bytes = segment(NINE);
        bytes[0x2C70 + 30] ^= 1;
        let scan = scan_segment(&bytes, Lsn(0x90_0000), size()).unwrap();
        assert_eq!(scan.end_of_valid, Lsn(0x90_2C70));
        assert_eq!(scan.stopped, StopReason::Invalid("a record's CRC does not match"));
        assert!(!scan.is_complete());
    }

    #[test]
    fn a_foreign_segment_is_refused() {
        let bytes = segment(NINE);
        assert!(scan_segment(&bytes, Lsn(0xA0_0000), size()).is_err());
        assert!(scan_segment(&bytes, Lsn(0x90_0000), SegmentSize::DEFAULT).is_err());
        assert!(scan_segment(&bytes[..39], Lsn(0x90_0000), size()).is_err());
        assert!(scan_segment(&bytes[8192..], Lsn(0x90_0000), size()).is_err());
    }

    /// After a crash in the middle of a record, the server begins a new one on the next page.
    #[test]
    fn a_record_given_up_after_a_crash_is_passed_over() {
        let mut writer = Writer::new(0xD113);
        let kept = writer.record(10, 0, 3, &[1; 100]);
        writer.torn_record(20_000, 500);
        let resumed = writer.record(0, 0xD0, 0, &[255, 4, 1, 2, 3, 4]);
        let last = writer.record(10, 0, 3, &[1; 100]);
        let (start, bytes) = writer.segments().remove(0);
        let found: Vec<_> = Records::new(&bytes, start, size()).unwrap().map(|r| r.lsn).collect();
        assert_eq!(found, [kept, resumed, last]);
    }

    /// 18 names dropped statistics with 64 bits; a reader with the old size would take another number for the transaction.
    #[test]
    fn the_prepared_transaction_is_found_behind_statistics_of_either_width() {
        for (magic, item) in [(0xD116, 12), (0xD118, 16)] {
            let mut data = 1_000_000i64.to_le_bytes().to_vec();
            data.extend((1u32 << 8 | 1 << 4).to_le_bytes());
            data.extend(2u32.to_le_bytes());
            data.extend(vec![0x77; 2 * item]);
            data.extend(4711u32.to_le_bytes());
            let mut writer = Writer::new(magic);
            let lsn = writer.with_main_data(1, 0xB0, 0, &data);
            let (start, bytes) = writer.segments().remove(0);
            let end = find_transaction(&bytes, start, size(), 4711).unwrap().unwrap();
            assert_eq!((end.lsn, end.is_commit), (lsn, true));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever the lengths, every record is found in the segment in which it begins, those split in their header included.
        #[test]
        fn every_record_is_found_where_it_begins(
            lengths in proptest::collection::vec(prop_oneof![4 => 0usize..60, 3 => 7000usize..9000, 1 => 0usize..300_000], 1..250),
        ) {
            let mut writer = Writer::new(0xD110);
            let mut expected = Vec::new();
            for (xid, length) in (1u32..).zip(lengths) {
                let lsn = if length < 60 {
                    let commit = i64::from(xid).to_le_bytes();
                    writer.with_main_data(1, 0x00, xid, &commit)
                } else {
                    writer.record(10, 0, xid, &vec![xid.to_le_bytes()[0]; length])
                };
                expected.push((lsn, xid, length < 60));
            }
            let mut found = Vec::new();
            let segments = writer.segments();
            for (index, (start, bytes)) in segments.iter().enumerate() {
                let mut records = Records::new(bytes, *start, size()).unwrap();
                for record in records.by_ref() {
                    // The header may be split at the end of the segment, and then the record can only be known to exist.
                    let crossing = !record.is_whole;
                    prop_assert!(!crossing || index + 1 < segments.len());
                    found.push((record.lsn, record.xid));
                    let (_, xid, is_commit) = expected[found.len() - 1];
                    if !crossing {
                        let end = record.transaction_end();
                        prop_assert_eq!(end.map(|e| e.xid), is_commit.then_some(xid));
                        prop_assert_eq!(end.map(|e| timestamp_to_pg(e.time)), is_commit.then_some(i64::from(xid)));
                    }
                }
                let end = records.end().unwrap();
                if index + 1 < segments.len() {
                    prop_assert_eq!(end, ScanEnd { lsn: start.advance(u64::from(SIZE)), reason: StopReason::EndOfInput });
                } else {
                    prop_assert!(end.lsn == writer.position() || writer.position().0.is_multiple_of(BLOCK));
                }
            }
            let expected: Vec<_> = expected.iter().map(|(lsn, xid, _)| (*lsn, *xid)).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn edited_segments_never_panic(edits in proptest::collection::vec((0usize..0xC000, any::<u8>()), 1..24), length in 0usize..0xC000) {
            let mut bytes = segment(NINE);
            for (at, value) in edits {
                bytes[at] = value;
            }
            let _ = scan_segment(&bytes, Lsn(0x90_0000), size());
            let _ = scan_segment(&bytes[..length], Lsn(0x90_0000), size());
        }

        /// With a correct CRC over senseless contents.
        #[test]
        fn any_record_contents_never_panic(rmgr in 0u8..3, info in any::<u8>(), data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut writer = Writer::new(0xD118);
            writer.record(rmgr, info, 5, &data);
            let short: Vec<u8> = data.iter().copied().take(200).collect();
            writer.with_main_data(rmgr, info, 5, &short);
            let (start, bytes) = writer.segments().remove(0);
            for record in Records::new(&bytes, start, size()).unwrap() {
                let _ = (record.main_data(), record.transaction_end(), record.restore_point());
            }
        }
    }

    /// `cargo test --release -p pgvault-core --lib wal::scan::tests::speed -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn speed() {
        let mut writer = Writer::new(0xD110);
        let mut xid = 0u32;
        while writer.bytes.len() < (SIZE - 20_000) as usize {
            xid += 1;
            writer.record(10, 0, xid, &[7; 120]);
            writer.record(10, 0, xid, &[7; 4000]);
            writer.with_main_data(1, 0, xid, &[1; 8]);
        }
        let (start, bytes) = writer.segments().remove(0);
        let begin = std::time::Instant::now();
        for _ in 0..160 {
            std::hint::black_box(scan_segment(std::hint::black_box(&bytes), start, size()).unwrap());
        }
        println!("{:.2} ms for 16 MiB, {xid} transactions a MiB", begin.elapsed().as_secs_f64() * 100.0);
    }
}
