use proptest::prelude::*;

use super::super::testdata::{BLOCK, SIZE, Writer, size};
use super::*;

const DATABASE: u32 = 5;
const FILE: u32 = 16384;

/// What a record refers to: fork, filenode.
fn block(id: u8, fork: u8, filenode: u32) -> Vec<u8> {
    let mut bytes = vec![id, fork, 0, 0];
    for number in [1663, DATABASE, filenode, 7] {
        bytes.extend(number.to_le_bytes());
    }
    bytes
}

fn with_main(mut headers: Vec<u8>, main: &[u8]) -> Vec<u8> {
    headers.extend([255, u8::try_from(main.len()).unwrap()]);
    headers.extend(main);
    headers
}

fn delete(flags: u8) -> Vec<u8> {
    with_main(block(0, 0, FILE), &[0, 0, 0, 0, 1, 0, 0, flags])
}

fn numbers(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn touched(from: Lsn, until: Lsn) -> Touched {
    Touched::new(SystemId(0x1234), size(), TimelineId(1), None, from, until)
}

fn read(writer: &Writer, from: Lsn, until: Lsn, piece: usize) -> Touched {
    let mut read = touched(from, until);
    let all: Vec<u8> = writer.segments().concat_bytes();
    for (n, bytes) in all.chunks(piece).enumerate() {
        read.feed(Lsn(Writer::START + (n * piece) as u64), bytes);
    }
    read
}

trait Concat {
    fn concat_bytes(self) -> Vec<u8>;
}

impl Concat for Vec<(Lsn, Vec<u8>)> {
    fn concat_bytes(self) -> Vec<u8> {
        self.into_iter().flat_map(|(_, bytes)| bytes).collect()
    }
}

/// What one record does to the file.
fn one(manager: u8, info: u8, data: &[u8]) -> Touched {
    let mut writer = Writer::new(0xD110);
    let from = writer.record(0, 0x00, 0, &[]);
    let _ = writer.record(manager, info, 7, data);
    let until = writer.position();
    let read = read(&writer, from, until, 4096);
    assert!(read.is_complete(), "{:?}", read.fault());
    read
}

#[test]
fn records_are_told_apart() {
    let main = with_main(block(0, 0, FILE), &[0; 8]);
    let create = with_main(Vec::new(), &numbers(&[1663, DATABASE, FILE, 0]));
    let create_map = with_main(Vec::new(), &numbers(&[1663, DATABASE, FILE, 2]));
    let cases: [(u8, u8, &[u8], Touch); 23] = [
        (RM_HEAP, 0x00, &main, Touch::Grew),
        (RM_HEAP, 0x80, &main, Touch::Grew),
        (RM_HEAP, 0x10, &delete(0), Touch::Changed),
        (RM_HEAP, 0x10, &delete(DELETE_IS_SUPER), Touch::Untouched),
        (RM_HEAP, 0x10, &delete(!DELETE_IS_SUPER), Touch::Changed),
        (RM_HEAP, 0x20, &main, Touch::Updated),
        (RM_HEAP, 0xA0, &main, Touch::Updated),
        (RM_HEAP, 0x40, &main, Touch::Updated),
        (RM_HEAP, 0x30, &main, Touch::Untouched),
        (RM_HEAP, 0x50, &main, Touch::Untouched),
        (RM_HEAP, 0x60, &main, Touch::Untouched),
        (RM_HEAP, 0x70, &main, Touch::Untouched),
        (RM_HEAP2, 0x10, &main, Touch::Untouched),
        (RM_HEAP2, 0x40, &main, Touch::Untouched),
        (RM_HEAP2, 0x50, &main, Touch::Grew),
        (RM_HEAP2, 0xD0, &main, Touch::Grew),
        (RM_XLOG, 0xA0, &main, Touch::Untouched),
        (RM_XLOG, 0xB0, &main, Touch::Changed),
        (11, 0x00, &main, Touch::Untouched),
        (RM_GENERIC, 0x00, &main, Touch::Changed),
        (200, 0x00, &main, Touch::Changed),
        (RM_SMGR, 0x10, &create, Touch::Changed),
        (RM_SMGR, 0x10, &create_map, Touch::Untouched),
    ];
    for (manager, info, data, expected) in cases {
        assert_eq!(one(manager, info, data).kind(DATABASE, FILE), expected, "{manager} {info:02X}");
    }
    assert_eq!(one(RM_HEAP, 0x00, &main).kind(DATABASE + 1, FILE), Touch::Untouched);
    let map = with_main(block(0, 2, FILE), &[0; 8]);
    assert_eq!(one(RM_HEAP, 0x00, &map).kind(DATABASE, FILE), Touch::Untouched, "not the main fork");
    let mut update = block(0, 0, FILE);
    update.extend([1, 0x80, 0, 0, 9, 0, 0, 0]);
    assert_eq!(one(RM_HEAP, 0x20, &with_main(update, &[0; 14])).kind(DATABASE, FILE), Touch::Updated);
}

#[test]
fn the_strongest_counts() {
    let mut writer = Writer::new(0xD110);
    let from = writer.record(0, 0x00, 0, &[]);
    for (info, data) in [(0x10, delete(0)), (0x00, with_main(block(0, 0, FILE), &[0; 3])), (0x40, delete(0))] {
        let _ = writer.record(RM_HEAP, info, 7, &data);
    }
    assert_eq!(read(&writer, from, writer.position(), 1000).kind(DATABASE, FILE), Touch::Changed);
}

#[test]
fn removed_files_and_databases_are_known() {
    let mut data = vec![0; 8];
    data.extend(numbers(&[7, DATABASE, 1663, 2, 8, 9, 2, 1663, DATABASE, FILE, 1663, DATABASE, FILE + 4]));
    let commit = with_main(Vec::new(), &data);
    for info in [0x80, 0xB0] {
        let read = one(RM_XACT, info, &commit);
        assert!(read.was_dropped(DATABASE, FILE) && read.was_dropped(DATABASE, FILE + 4));
        assert!(!read.was_dropped(DATABASE, FILE + 1) && !read.was_dropped(DATABASE + 1, FILE));
        assert_eq!(read.kind(DATABASE, FILE), Touch::Untouched);
    }
    assert!(!one(RM_XACT, 0xA0, &commit).was_dropped(DATABASE, FILE), "an abort removes what nobody has seen");
    assert!(!one(RM_XACT, 0x00, &commit).was_dropped(DATABASE, FILE), "without optional parts");
    let read = one(RM_DBASE, 0x20, &with_main(Vec::new(), &numbers(&[DATABASE, 1, 1663])));
    assert!(read.was_database_dropped(DATABASE) && read.was_dropped(DATABASE, FILE) && !read.was_database_dropped(6));
}

#[test]
fn only_what_begins_between_start_and_end_counts() {
    let mut writer = Writer::new(0xD110);
    let insert = |file: u32| with_main(block(0, 0, file), &[0; 3]);
    let places: Vec<Lsn> = (1..=4).map(|file| writer.record(RM_HEAP, 0, 7, &insert(file))).collect();
    let read = read(&writer, places[1], places[3], 777);
    assert!(read.is_complete());
    let kinds: Vec<Touch> = (1..=4).map(|file| read.kind(DATABASE, file)).collect();
    assert_eq!(kinds, [Touch::Untouched, Touch::Grew, Touch::Grew, Touch::Untouched]);
}

#[test]
fn records_over_pages_and_segments_are_read() {
    let mut writer = Writer::new(0xD110);
    let from = writer.record(0, 0x00, 0, &[]);
    let mut files = Vec::new();
    for file in 1..400 {
        // An image, and data of odd lengths, so that headers fall across pages and segments.
        let image = vec![b'x'; 6000 + usize::try_from(file).unwrap() * 13 % 900];
        let mut headers = vec![0, 0x10, 0, 0];
        headers.extend(u16::try_from(image.len()).unwrap().to_le_bytes());
        headers.extend([0, 0, 0x02]);
        headers.extend(numbers(&[1663, DATABASE, file, 7]));
        headers.extend([255, 8]);
        headers.extend(&image);
        headers.extend([0; 8]);
        let _ = writer.record(RM_HEAP, if file % 2 == 0 { 0x00 } else { 0x10 }, 7, &headers);
        files.push(file);
    }
    let until = writer.position();
    assert!(until.0 > Writer::START + 2 * u64::from(SIZE));
    for piece in [13, 8192, 100_000, 10 << 20] {
        let read = read(&writer, from, until, piece);
        assert!(read.is_complete(), "{piece}: {:?}", read.fault());
        for file in &files {
            let expected = if file % 2 == 0 { Touch::Grew } else { Touch::Changed };
            assert_eq!(read.kind(DATABASE, *file), expected, "{piece}: {file}");
        }
    }
}

#[test]
fn nothing_follows_from_wal_that_is_not_whole() {
    let mut writer = Writer::new(0xD110);
    let from = writer.record(0, 0x00, 0, &[]);
    for _ in 0..2000 {
        let _ = writer.record(RM_HEAP, 0, 7, &delete(0));
    }
    let until = writer.position();
    let bytes = writer.segments().concat_bytes();
    let fed = |bytes: &[u8]| {
        let mut read = touched(from, until);
        read.feed(Lsn(Writer::START), bytes);
        read
    };
    assert!(fed(&bytes).is_complete());
    assert!(!touched(from, until).is_complete(), "nothing");
    let whole = usize::try_from(until.0 - Writer::START).unwrap();
    assert!(fed(&bytes[..whole]).is_complete(), "exactly what is needed");
    assert!(!fed(&bytes[..whole - 8]).is_complete(), "too little");
    let mut damaged = bytes.clone();
    damaged[usize::try_from(BLOCK).unwrap() * 3 + 500] ^= 1;
    assert!(!fed(&damaged).is_complete());
    let mut cut = bytes.clone();
    cut[whole - 200..].fill(0);
    assert!(!fed(&cut).is_complete(), "the WAL ends before");
    let mut read = touched(from, until);
    read.feed(Lsn(Writer::START), &bytes[..8192]);
    read.feed(Lsn(Writer::START + 16384), &bytes[16384..]);
    assert!(!read.is_complete() && read.position() == Lsn(Writer::START + 8192), "a hole");
    // A record that is whole and makes no sense.
    let mut writer = Writer::new(0xD110);
    let from = writer.record(0, 0x00, 0, &[]);
    let _ = writer.record(RM_HEAP, 0, 7, &[200, 1, 2, 3]);
    assert!(!read_all(&writer, from).is_complete());
}

fn read_all(writer: &Writer, from: Lsn) -> Touched {
    read(writer, from, writer.position(), 1 << 20)
}

#[test]
fn an_end_in_the_header_of_a_segment_is_the_end_of_the_one_before() {
    let mut writer = Writer::new(0xD110);
    let from = writer.record(RM_HEAP, 0, 7, &delete(0));
    let _ = writer.with_main_data(RM_XLOG, 0x40, 0, &[]);
    let next = Writer::START + u64::from(SIZE);
    let mut read = touched(from, Lsn(next + 40));
    read.feed(Lsn(Writer::START), &writer.segments().concat_bytes());
    assert!(read.is_complete(), "{:?}", read.fault());
    assert_eq!(read.kind(DATABASE, FILE), Touch::Grew);
}

#[test]
fn too_many_relations_are_all_taken_for_changed() {
    let mut seen = Collector::default();
    for filenode in 0..u32::try_from(MOST_RELATIONS).unwrap() {
        seen.touch(Locator { database: 1, filenode }, Touch::Grew);
    }
    assert!(!seen.everything);
    seen.touch(Locator { database: 1, filenode: 5 }, Touch::Grew);
    assert!(!seen.everything);
    seen.touch(Locator { database: 2, filenode: 5 }, Touch::Grew);
    assert!(seen.everything && seen.relations.len() == MOST_RELATIONS);
}

proptest! {
    /// Whatever a record with a right CRC holds.
    #[test]
    fn no_record_panics(manager in 0u8..24, info: u8, data in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut writer = Writer::new(0xD110);
        let from = writer.record(0, 0x00, 0, &[]);
        let _ = writer.record(manager, info & 0xF0, 7, &data);
        let _ = read_all(&writer, from).kind(DATABASE, FILE);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20_000)) {
        let mut read = Touched::new(SystemId(0x1234), size(), TimelineId(1), None, Lsn(Writer::START), Lsn(u64::MAX));
        read.feed(Lsn(Writer::START), &bytes);
        prop_assert!(!read.is_complete());
    }
}
