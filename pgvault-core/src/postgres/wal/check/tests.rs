//! The checker against real segments, written ones and damaged ones.

use proptest::prelude::*;

use super::super::super::ControlFile;
use super::super::testdata::{BLOCK, SIZE, Writer, segment, size};
use super::super::{SegmentHeader, scan_segment};
use super::*;

/// Five segments in a row, with a record that runs over three of them, and what two of them are alone.
const ROW: [&str; 5] = [
    "000000010000000000000008",
    "000000010000000000000009",
    "00000001000000000000000A",
    "00000001000000000000000B",
    "00000001000000000000000C",
];
const FIRST: TimelineId = TimelineId(1);

fn row() -> Vec<u8> {
    ROW.iter().flat_map(|name| segment(name)).collect()
}

fn real(start: u64) -> WalChecker {
    let control = ControlFile::parse(include_bytes!("../../../../../testdata/postgres/pg_control.15")).unwrap();
    WalChecker::new(control.system_identifier, size(), FIRST, Some(TimelineHistory::root(FIRST)), Lsn(start))
}

fn written(start: Lsn) -> WalChecker {
    WalChecker::new(SystemId(0x1234), size(), FIRST, Some(TimelineHistory::root(FIRST)), start)
}

fn faults(mut checker: WalChecker, bytes: &[u8]) -> Vec<WalFault> {
    checker.feed(bytes);
    checker.settle(true);
    checker.take_faults()
}

#[test]
fn a_row_of_real_segments_is_right_however_it_is_cut() {
    let bytes = row();
    let scans: Vec<_> = ROW
        .iter()
        .map(|name| {
            let bytes = segment(name);
            scan_segment(&bytes, SegmentHeader::parse(&bytes).unwrap().start, size()).unwrap()
        })
        .collect();
    let ends: Vec<_> = scans.iter().filter_map(|scan| scan.transactions).collect();
    for step in [1, 7, 24, 4099, 8192, 1 << 20, 5 << 20] {
        let mut checker = real(0x80_0000);
        for piece in bytes.chunks(step) {
            checker.feed(piece);
        }
        assert_eq!(checker.take_faults(), [], "{step}");
        assert_eq!((checker.position(), checker.end()), (Lsn(0xD0_0000), Lsn(0xD0_0000)));
        assert_eq!(checker.records(), scans.iter().map(|scan| scan.records).sum::<u64>());
        assert_eq!(checker.last_record(), scans[4].last_record);
        let PassedEnds { first, last, .. } = checker.take_ends().unwrap();
        assert_eq!((first.time, last.time), (ends[0].first_time, ends[ends.len() - 1].last_time));
        assert_eq!(last.lsn, ends[ends.len() - 1].last_lsn);
    }
}

#[test]
fn a_check_may_begin_and_go_on_anywhere() {
    let bytes = row();
    for from in [1usize, 8191, 0x2_0000, 0x10_0000, 0x21_0000, 0x25_1234] {
        assert_eq!(faults(real(0x80_0000 + from as u64), &bytes[from..]), [], "{from:X}");
        let mut checker = real(0x80_0000);
        checker.feed(&bytes[..5000]);
        checker.skip_to(Lsn(0x80_0000 + from as u64));
        assert_eq!(faults(checker, &bytes[from..]), [], "{from:X}");
    }
}

/// H14: without one of them the others do not fit, unless the checker is told that it is not there.
#[test]
fn h14_a_segment_that_is_left_out_is_noticed() {
    for missing in 1..4 {
        let mut checker = real(0x80_0000);
        let mut told = real(0x80_0000);
        for (n, name) in ROW.iter().enumerate().filter(|(n, _)| *n != missing) {
            checker.feed(&segment(name));
            if n == missing + 1 {
                told.skip_to(Lsn(0x80_0000 + (n as u64) * u64::from(SIZE)));
            }
            told.feed(&segment(name));
        }
        checker.settle(true);
        assert_ne!(checker.take_faults(), [], "{missing}");
        assert_eq!(told.take_faults(), [], "{missing}");
    }
}

#[test]
fn a_timeline_goes_on_where_it_left_its_parent() {
    let history = include_str!("../../../../../testdata/postgres/00000002.history");
    let history = TimelineHistory::parse(TimelineId(2), history).unwrap();
    let mut parent = real(0x110_0000);
    let mut child = parent.clone();
    // What a promotion leaves of the old timeline ends somewhere, and nobody says where.
    parent.feed(&segment("000000010000000000000011.partial"));
    assert_eq!((parent.take_faults(), parent.end(), parent.records()), (vec![], Lsn(0x110_00A0), 1));
    parent.settle(true);
    assert_eq!(parent.take_faults(), []);
    child.follow(TimelineId(2), Some(history.clone()));
    child.feed(&segment("000000020000000000000011"));
    assert_eq!(child.take_faults(), []);
    assert_eq!(child.last_record(), Some(Lsn(0x110_01F0)));
    // Pages of another timeline than the one that had the position.
    let later = TimelineHistory::parse(TimelineId(2), "1\t0/1200000\tx\n").unwrap();
    let mut bytes = segment("000000020000000000000011");
    bytes[4] = 2;
    for (history, expected) in [(history, "a page is of another timeline than"), (later, "a page is of another timeline than")] {
        let mut checker = real(0x110_0000);
        checker.follow(TimelineId(2), Some(history));
        checker.feed(&bytes);
        checker.settle(false);
        assert!(checker.take_faults()[0].what.starts_with(expected));
    }
}

#[test]
fn a_record_given_up_after_a_crash_is_passed_over_when_the_next_says_so() {
    for (named, number_of_faults) in [(true, 0), (false, 1)] {
        let mut writer = Writer::new(0xD113);
        let _ = writer.record(10, 0, 3, &[1; 100]);
        let torn = writer.torn_record(20_000, 500);
        let overwritten = if named { torn.0 } else { torn.0 - 8 };
        let data = [&overwritten.to_le_bytes()[..], &[0; 8]].concat();
        let _ = writer.with_main_data(0, XLOG_OVERWRITE_CONTRECORD, 0, &data);
        let _ = writer.record(10, 0, 3, &[1; 100]);
        let (start, bytes) = writer.segments().remove(0);
        let mut checker = written(start);
        checker.feed(&bytes);
        assert_eq!(checker.take_faults().len(), number_of_faults);
        assert_eq!(checker.records(), 3);
    }
    // A page says so, and nothing was given up.
    let mut writer = Writer::new(0xD113);
    for _ in 0..3 {
        let _ = writer.record(10, 0, 3, &[1; 5000]);
    }
    let (start, mut bytes) = writer.segments().remove(0);
    bytes[8192 + 2] |= 8;
    assert_ne!(faults(written(start), &bytes), []);
}

#[test]
fn what_follows_zeroes_in_the_middle_makes_them_damage() {
    let mut bytes = row();
    bytes[0x10_4000..0x10_6000].fill(0);
    let mut checker = real(0x80_0000);
    checker.feed(&bytes[..0x10_6000]);
    assert_eq!(checker.take_faults(), [], "as far as anybody knows, it ends here");
    checker.feed(&bytes[0x10_6000..]);
    let faults = checker.take_faults();
    // The page, and the record that runs over it.
    assert_eq!(faults.iter().map(|fault| fault.lsn.0).collect::<Vec<_>>(), [0x90_4000, 0x90_2D28], "{faults:X?}");
}

#[test]
fn the_empty_rest_of_a_switched_segment_must_be_empty() {
    let mut bytes = row();
    bytes[0x1F_0000] = 1;
    let faults = faults(real(0x80_0000), &bytes);
    assert!(faults.len() == 1 && faults[0].what.contains("behind a switch"), "{faults:?}");
}

/// The end of valid WAL in a segment of the row.
fn valid_end(index: usize) -> usize {
    let end = scan_segment(&segment(ROW[index]), Lsn(0x80_0000 + (index as u64) * u64::from(SIZE)), size()).unwrap();
    let last = end.last_record.map_or(SIZE as usize, |lsn| usize::try_from(lsn.0).unwrap() % SIZE as usize + 24);
    if end.switched { last } else { SIZE as usize }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every byte counts: of pages, of records, of what pads them, of records that run over segments.
    #[test]
    fn every_changed_byte_is_noticed(index in 1usize..5, at in any::<prop::sample::Index>(), near in prop_oneof![3 => Just(false), 1 => Just(true)], change in 1u8..) {
        let bytes = row();
        let mut place = at.index(valid_end(index));
        if near {
            // Page headers are few among the bytes.
            place = place / 8192 * 8192 + place % 48;
        }
        prop_assume!(place < valid_end(index));
        prop_assume!(place % 8192 != 2 || change != 4);
        let place = index * SIZE as usize + place;
        let mut changed = bytes.clone();
        changed[place] ^= change;
        let found = faults(real(0x80_0000), &changed);
        prop_assert!(!found.is_empty(), "{:X} ^ {:X}", 0x80_0000 + place, change);
        prop_assert!(found.len() <= 3 || place % 8192 < 2, "{:X} ^ {:X}: {:X?}", 0x80_0000 + place, change, found);
        // Named where it is: the record that was changed, or the page.
        let named = found[0].lsn.0;
        let changed_at = 0x80_0000 + place as u64;
        prop_assert!(named <= changed_at.next_multiple_of(8192) && changed_at - named.min(changed_at) < 3 << 20, "{:X?}", found);
        // Also in the last segment there is, where the end of WAL is no fault.
        let last = (index + 1) * SIZE as usize;
        let mut checker = real(0x80_0000);
        checker.feed(&changed[..last]);
        let found = checker.take_faults();
        prop_assert!(!found.is_empty() || index == 2 || index == 3, "{:X} ^ {:X}, last", changed_at, change);
    }

    /// Whatever is written, in whatever pieces it is given.
    #[test]
    fn what_was_written_is_right_and_what_was_changed_is_not(
        lengths in proptest::collection::vec(prop_oneof![4 => 0usize..60, 3 => 7000usize..9000, 1 => 0usize..300_000], 1..120),
        step in 1usize..100_000,
        at in any::<prop::sample::Index>(),
        change in 1u8..,
    ) {
        let mut writer = Writer::new(0xD110);
        for (xid, length) in (1u32..).zip(&lengths) {
            if *length < 60 {
                let _ = writer.with_main_data(1, 0x00, xid, &i64::from(xid).to_le_bytes());
            } else {
                let _ = writer.record(10, 0, xid, &vec![xid.to_le_bytes()[0]; *length]);
            }
        }
        let bytes: Vec<u8> = writer.segments().into_iter().flat_map(|(_, bytes)| bytes).collect();
        let check = |bytes: &[u8]| {
            let mut checker = written(Lsn(Writer::START));
            bytes.chunks(step).for_each(|piece| checker.feed(piece));
            checker
        };
        let mut checker = check(&bytes);
        checker.settle(true);
        prop_assert_eq!(checker.take_faults(), vec![]);
        prop_assert_eq!(checker.records(), lengths.len() as u64);
        prop_assert!(checker.end() == writer.position() || writer.position().0.is_multiple_of(BLOCK));
        let ends = lengths.iter().filter(|length| **length < 60).count();
        prop_assert_eq!(checker.take_ends().is_some(), ends > 0);

        let place = at.index(writer.bytes.len());
        prop_assume!(place % 8192 != 2 || change != 4);
        // The first page says what all others must be like; with nothing else on it, nothing contradicts it.
        prop_assume!(place > 1 || writer.bytes.len() > 8192 + 24);
        let mut changed = bytes;
        changed[place] ^= change;
        let mut checker = check(&changed);
        checker.settle(true);
        prop_assert_ne!(checker.take_faults(), vec![], "{:X} ^ {:X}", place, change);
    }

    #[test]
    fn any_bytes_never_panic(edits in proptest::collection::vec((0usize..0xC000, any::<u8>()), 1..24), from in 0usize..0xC000, step in 1usize..9000) {
        let mut bytes = segment(ROW[1]);
        for (at, value) in edits {
            bytes[at] = value;
        }
        let mut checker = real(0x90_0000 + from as u64);
        bytes[from..0xC000].chunks(step).for_each(|piece| checker.feed(piece));
        prop_assert_eq!(checker.position(), Lsn(0x90_C000));
        prop_assert!(checker.end() <= checker.position());
    }
}
