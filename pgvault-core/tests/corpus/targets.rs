//! What must hold of every parser for any input: the bodies of the fuzz targets.
//!
//! `fuzz/` runs them on generated inputs, `tests/fuzz_corpus.rs` on the stored ones. They panic when a property does not hold.
//! A parser may refuse whatever it likes. What it accepts must mean one thing: writing it again gives the same bytes, or, where
//! there is no writer, reading it again gives the same value; and nothing it returns may be larger than its input could fill.

use pgvault_core::crypto::keys::EpochDocument;
use pgvault_core::crypto::kms::KeyName;
use pgvault_core::crypto::sealed;
use pgvault_core::crypto::slot::SlotDocument;
use pgvault_core::format::file_run::{self, RunEncoder, RunHead};
use pgvault_core::format::file_table::{self, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap};
use pgvault_core::format::object::{Codec, Footer, HEADER_LEN, Header, TAIL_LEN, Tail};
use pgvault_core::format::pack_table::{PackKind, PackRef};
use pgvault_core::format::table_index::TableIndex;
use pgvault_core::format::{BLOCK, MAX_FRAME, MAX_OBJECT, REGION_BLOCKS, document, pack_table};
use pgvault_core::postgres::wal::{self, Records, Touch, Touched, WalChecker, WalPageHeader};
use pgvault_core::postgres::{
    BackupLabel, ControlFile, EntryKind, Lsn, SegmentHeader, SegmentName, SegmentSize, SystemId, TablespaceMap, TarDecoder,
    TarEvent, TimelineHistory, TimelineId, WalFileName, invalidate_checkpoint, scan_segment,
};
use pgvault_core::restore::target::Target;
use pgvault_core::vault::VaultDocument;
use pgvault_core::vault::layout::{self, ClusterName};
use pgvault_core::vault::snapshot::Manifest;
use pgvault_core::wal::object::{WalInfo, WalName};

/// A target: its name, which is also the name of its corpus, and its body.
pub type NamedTarget = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[NamedTarget] = &[
    ("object_header", object_header),
    ("footer", footer),
    ("manifest", manifest),
    ("file_map", file_map),
    ("document", json_document),
    ("wal_page", wal_page),
    ("wal_check", wal_check),
    ("backup_label", backup_label),
    ("pg_control", pg_control),
    ("wal_object_name", wal_object_name),
    ("base_backup", base_backup),
    ("kms_name", kms_name),
    ("filestore_run", filestore_run),
];

/// The runs of a filestore's catalog: a chunk, its head, and what a pass has of both.
pub fn filestore_run(data: &[u8]) {
    if let Ok(head) = RunHead::parse(data) {
        assert_eq!(head.encode(), data);
        assert!(head.firsts.len() <= data.len());
        let _ = head.chunk_of("ab/c");
        let _ = head.filter.may_have("ab/c");
    }
    if let Ok(runs) = file_run::parse_runs(data) {
        assert_eq!(file_run::encode_runs(&runs), data);
    }
    let pack =
        |id: u8| PackRef { id: [id; 16], kind: PackKind::Data, size: 1, footer_len: 1, frames: 8, live: 0, sha256: [id; 32] };
    let packs: Vec<PackRef> = (0..4).map(pack).collect();
    if let Ok(entries) = file_run::parse_chunk(data, &packs) {
        let size: usize =
            entries.iter().map(|entry| entry.name.len() + entry.state.content().map_or(0, |content| content.pieces.len())).sum();
        assert!(size <= data.len());
        let mut encoder = RunEncoder::default();
        let mut chunks: Vec<Vec<u8>> = entries.iter().filter_map(|entry| encoder.push(entry)).map(|chunk| chunk.bytes).collect();
        chunks.extend(encoder.take().map(|chunk| chunk.bytes));
        let used = encoder.finish().1.into_iter().map(|id| pack(id[0])).collect::<Vec<_>>();
        let again: Vec<_> = chunks.iter().flat_map(|chunk| file_run::parse_chunk(chunk, &used).unwrap()).collect();
        assert_eq!(again, entries);
    }
    if let Ok(packs) = file_run::parse_packs(data) {
        assert_eq!(file_run::encode_packs(&packs), data);
    }
}

/// Takes an 8-byte number off the front; inputs shorter than that are read as if zeroes followed.
fn number(data: &[u8]) -> (u64, &[u8]) {
    let (head, rest) = data.split_at(data.len().min(8));
    let mut bytes = [0; 8];
    bytes[..head.len()].copy_from_slice(head);
    (u64::from_le_bytes(bytes), rest)
}

/// The clear ends of a sealed object: header and tail.
pub fn object_header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        let mut expected = header.encode();
        // Any minor version is read; everything else is spelled one way.
        expected[5] = data[5];
        assert_eq!(data[..HEADER_LEN], expected);
        assert_eq!(Header::parse(&header.encode()).unwrap(), header);
    }
    let end = &data[data.len().saturating_sub(TAIL_LEN)..];
    for object_len in [data.len() as u64, number(data).0] {
        let Ok(tail) = Tail::parse(end, object_len) else { continue };
        assert!(object_len <= MAX_OBJECT);
        assert!(tail.footer_offset >= HEADER_LEN as u64);
        assert_eq!(tail.footer_offset + u64::from(tail.footer_len) + TAIL_LEN as u64, object_len);
        assert_eq!(Tail::encode_prefix(tail.footer_offset, tail.footer_len), end[..TAIL_LEN - 32]);
        assert_eq!(tail.sha256, end[TAIL_LEN - 32..]);
    }
    if let Ok((header, _)) = sealed::verify_keyless(data) {
        assert_eq!(Header::parse(data).unwrap(), header);
        assert!(data.len() >= HEADER_LEN + TAIL_LEN);
    }
}

/// A decrypted footer: first where the frames end, then the footer.
pub fn footer(data: &[u8]) {
    let (frames_end, bytes) = number(data);
    let Ok(footer) = Footer::parse(bytes, frames_end) else { return };
    let mut offset = HEADER_LEN as u64;
    for frame in &footer.frames {
        assert_eq!(frame.offset, offset, "frames lie back to back");
        assert!(frame.raw_len as usize <= MAX_FRAME && frame.sealed_len as usize <= MAX_FRAME + 16 && frame.sealed_len >= 16);
        assert!(frame.codec == Codec::Zstd || frame.sealed_len == frame.raw_len + 16);
        offset += u64::from(frame.sealed_len);
    }
    assert_eq!(offset, frames_end);
    assert!(footer.extra.len() <= bytes.len() && footer.frames.len() * 19 <= bytes.len());
    assert_eq!(footer.encode(), bytes);
}

/// The frames of a manifest object: chunks of its tables, its JSON, its index. The first byte chooses.
pub fn manifest(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 4 {
        0 => {
            let Ok(packs) = pack_table::parse_chunk(bytes) else { return };
            assert!(packs.len() * 50 <= bytes.len());
            assert!(packs.is_sorted_by(|a, b| a.id < b.id));
            assert_eq!(pack_table::encode_chunk(&packs), bytes);
        }
        1 => {
            let Ok(entries) = file_table::parse_chunk(bytes) else { return };
            assert!(entries.is_sorted_by(|a, b| a.path < b.path));
            let mut writer = TableWriter::default();
            for entry in &entries {
                assert!(stays_inside(&entry.path), "{:?}", entry.path);
                assert!(entry.mode <= 0o7777);
                if let Node::File { map: MapPlace::Inline(map), .. } = &entry.node {
                    assert!(map.len() <= bytes.len());
                }
                writer.push(entry);
            }
            assert_eq!(writer.finish().concat(), bytes);
        }
        2 => {
            let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
            let json = serde_json::to_vec(&manifest).unwrap();
            let again: Manifest = serde_json::from_slice(&json).unwrap();
            assert_eq!(serde_json::to_vec(&again).unwrap(), json);
        }
        _ => {
            let Ok(index) = TableIndex::parse(bytes) else { return };
            let held: usize = index.packs.iter().map(|pack| pack.digests.len()).sum();
            assert!(index.packs.len() * 67 <= bytes.len() && held * 16 <= bytes.len());
            assert!(index.packs.is_sorted_by(|a, b| a.pack.id < b.pack.id));
            let chunks = u64::from(index.pack_chunks) + u64::from(index.file_chunks);
            assert!(index.packs.is_empty() || held as u64 == chunks, "every chunk has a place");
            let places: Vec<_> = (0..).map_while(|chunk| index.locate(chunk)).collect();
            assert_eq!(places.len(), held);
            assert!(places.iter().all(|(pack, frame)| (*frame as usize) < pack.digests.len()));
            assert_eq!(index.encode(), bytes);
        }
    }
}

/// True when a restore that appends `path` to its target cannot leave it.
fn stays_inside(path: &str) -> bool {
    use std::path::{Component, Path};
    !path.is_empty() && !path.contains('\0') && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

/// A file map: first the file's length, then the map.
pub fn file_map(data: &[u8]) {
    let (len, bytes) = number(data);
    let Ok(map) = FileMap::parse(bytes, len) else { return };
    assert_eq!(map.blocks(), len.div_ceil(BLOCK as u64), "the extents cover the file");
    let mut stored = 0;
    for extent in &map.extents {
        assert!(extent.blocks() > 0);
        if let Extent::Stored { blocks, pack, slot, .. } = *extent {
            assert!((pack as usize) < map.packs.len());
            assert!(u64::from(slot) + u64::from(blocks) <= REGION_BLOCKS as u64);
            stored += blocks as usize;
        }
    }
    assert_eq!(map.digests.len(), stored);
    assert!(map.packs.len() * 16 + map.extents.len() + map.digests.len() * 8 <= bytes.len());
    assert_eq!(map.encode(), bytes);
}

/// The clear JSON documents. An object in another spelling, or without a hash, is written properly first: nobody guesses SHA-256.
pub fn json_document(data: &[u8]) {
    written_document(data);
    let Ok(serde_json::Value::Object(mut map)) = serde_json::from_slice(data) else { return };
    let _ = map.remove("sha256");
    let written = document::encode(&map).unwrap();
    if written.len() <= document::MAX_DOCUMENT {
        // No document has a fraction; reading one back may differ in the last digit.
        let whole = !written.contains(&b'.');
        assert!(!whole || document::verify("document", &written).unwrap() == map);
        written_document(&written);
    }
}

fn written_document(data: &[u8]) {
    let Ok(map) = document::verify("document", data) else { return };
    assert!(data.len() <= document::MAX_DOCUMENT);
    assert_eq!(document::encode(&map).unwrap(), data, "one spelling");
    if let Ok(vault) = document::parse::<VaultDocument>("vault.json", data) {
        same_when_read_again(&vault);
    }
    if let Ok(slot) = document::parse::<SlotDocument>("key slot", data) {
        same_when_read_again(&slot);
        assert!(!slot.describe().is_empty() || data.len() < document::MAX_DOCUMENT);
    }
    if let Ok(epoch) = document::parse::<EpochDocument>("epoch", data) {
        same_when_read_again(&epoch);
    }
}

/// The name of a key in a key service, as a configuration or a slot has it.
pub fn kms_name(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(name) = text.parse::<KeyName>() else { return };
    assert!(name.to_string().len() <= text.len() + 1);
    assert_eq!(name.to_string().parse::<KeyName>().unwrap(), name, "one spelling");
    // It becomes part of an address.
    assert!(name.key().bytes().all(|b| b.is_ascii_graphic() && !b"?#%\\\"@".contains(&b)), "{name}");
    assert!(name.key().split('/').all(|part| part != ".."), "{name}");
}

fn same_when_read_again<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) {
    let bytes = document::encode(value).unwrap();
    let again: T = document::parse("document", &bytes).unwrap();
    assert_eq!(document::encode(&again).unwrap(), bytes);
}

/// A WAL segment, or the first part of one. Eight bytes in front: the segment size as a power of two above 1 MiB, whether to ask
/// for the position that the header gives, whether to make checksums right first, and a position otherwise.
pub fn wal_page(data: &[u8]) {
    let (options, bytes) = number(data);
    let mut bytes = bytes.to_vec();
    if options & 0x40 != 0 {
        make_records_right(&mut bytes);
    }
    let bytes = &bytes[..];
    let size = SegmentSize::try_from(1u32 << (20 + options % 11)).unwrap();
    let _ = WalPageHeader::parse(bytes);
    let header = SegmentHeader::parse(bytes);
    let (start, size) = match &header {
        Ok(header) if options & 0x80 == 0 => (header.start, header.segment_size),
        _ => (Lsn(options >> 8), size),
    };
    // The scanner is given at most a segment; the properties below hold for more, too.
    let Ok(mut records) = Records::new(bytes, start, size) else {
        assert!(scan_segment(bytes, start, size).is_err());
        return;
    };
    let header = header.unwrap();
    assert_eq!((header.start, header.segment_size), (start, size));
    let input_end = start.advance((bytes.len() as u64).min(size.bytes()));
    let mut last = None;
    let mut count = 0u64;
    for record in records.by_ref() {
        assert!(record.lsn >= start && record.lsn < input_end, "it begins in the segment");
        assert!(last.is_none_or(|last| last < record.lsn), "forwards only");
        assert!(record.end > record.lsn || record.lsn.0 > u64::MAX - (2 << 30));
        assert!(!record.is_whole || u64::from(record.length) <= bytes.len() as u64);
        if let Some(data) = record.main_data() {
            assert!(data.len() <= bytes.len());
        }
        if let Some(end) = record.transaction_end() {
            assert_eq!(end.lsn, record.lsn);
            assert!(wal::timestamp_from_pg(wal::timestamp_to_pg(end.time)) == Some(end.time));
        }
        if let Some(point) = record.restore_point() {
            assert!(point.name.len() <= 64 * 3);
        }
        last = Some(record.lsn);
        count += 1;
    }
    assert!(count <= bytes.len() as u64 / 24 + 1);
    let end = records.end().unwrap();
    let scan = scan_segment(bytes, start, size).unwrap();
    assert_eq!((scan.records, scan.last_record, scan.end_of_valid, scan.stopped), (count, last, end.lsn, end.reason));
    assert!(scan.end_of_valid >= start && scan.end_of_valid <= start.advance(size.bytes()));
    assert!(scan.switched || scan.end_of_valid <= input_end);
    if let Some(first) = scan.first_record {
        assert!(wal::record_begins_at(bytes, start, size, first).unwrap());
    }
    if let Some(span) = scan.transactions {
        assert!(span.min_xid <= span.max_xid && span.first_time <= span.last_time && u64::from(span.count) <= count);
        assert!(wal::find_transaction(bytes, start, size, span.max_xid).unwrap().is_some());
    }
}

/// WAL of any length, given in pieces: how it is cut must not matter, and what is right for a scan is right for the checker. The same
/// eight bytes in front as for `wal_page`; the bits above choose how long the pieces are and where the check begins.
pub fn wal_check(data: &[u8]) {
    let (options, bytes) = number(data);
    let mut bytes = bytes.to_vec();
    if options & 0x40 != 0 {
        make_records_right(&mut bytes);
    }
    let header = SegmentHeader::parse(&bytes);
    let (start, size, system) = match &header {
        Ok(header) => (header.start, header.segment_size, header.system_identifier),
        Err(_) => (Lsn(options >> 32), SegmentSize::try_from(1u32 << (20 + options % 11)).unwrap(), SystemId(1)),
    };
    let from = usize::try_from(options >> 24 & 0xFF).unwrap().min(bytes.len());
    let step = usize::try_from(options >> 8 & 0xFFFF).unwrap() + 1;
    let check = |from: usize, step: usize| {
        let start = start.advance(from as u64);
        let mut checker = WalChecker::new(system, size, TimelineId(u32::MAX), None, start);
        bytes[from..].chunks(step).for_each(|piece| checker.feed(piece));
        assert_eq!(checker.position(), start.advance((bytes.len() - from) as u64));
        assert!(checker.end() <= checker.position());
        assert!(checker.records() <= bytes.len() as u64 / 24 + 1);
        let (end, records, ends) = (checker.end(), checker.records(), checker.take_ends());
        checker.settle(false);
        (end, records, ends, checker.last_record(), checker.take_faults())
    };
    let whole = check(0, bytes.len().max(1));
    assert_eq!(check(0, step), whole);
    let _ = check(from, step);
    let Ok(header) = header else { return };
    let touched = |step: usize| {
        let (from, until) = (start.advance(0x28), start.advance(bytes.len() as u64));
        let mut touched = Touched::new(system, size, TimelineId(u32::MAX), None, from, until);
        for (piece, n) in bytes.chunks(step).zip(0u64..) {
            touched.feed(start.advance(n * step as u64), piece);
        }
        let kinds: Vec<Touch> = (0..64).map(|n| touched.kind(5, 16384 + n)).collect();
        (touched.position(), touched.is_complete(), kinds, (0..64).map(|n| touched.was_dropped(5, 16384 + n)).collect::<Vec<_>>())
    };
    assert_eq!(touched(step), touched(bytes.len().max(1)));
    // What a scan finds from the start on without a doubt, the checker finds too, and no more faults than pages and records.
    let scan = scan_segment(&bytes, header.start, header.segment_size).unwrap();
    let in_one = bytes.len() as u64 <= header.segment_size.bytes() && header.block_size == 8192;
    if in_one && whole.4.is_empty() && header.start.0 < u64::MAX - (4 << 30) {
        assert!(whole.1 <= scan.records, "{} records, a scan finds {}", whole.1, scan.records);
    }
    assert!(whole.4.len() <= bytes.len() / 8 + 2);
}

/// Chains the records of the first page and corrects their checksums, so that their contents are reached.
fn make_records_right(bytes: &mut [u8]) {
    let Ok(header) = SegmentHeader::parse(bytes) else { return };
    let page_end = bytes.len().min(header.block_size as usize);
    let (mut at, mut previous) = (wal::LONG_HEADER, None);
    while let Some(length) = bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()) as usize) {
        let Some(record) = bytes.get_mut(at..page_end.min(at.saturating_add(length))).filter(|r| r.len() == length && length >= 24)
        else {
            break;
        };
        if let Some(previous) = previous {
            record[8..16].copy_from_slice(&u64::to_le_bytes(previous));
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        previous = Some(header.start.advance(at as u64).0);
        at = (at + length).next_multiple_of(8);
    }
}

/// The small text files of a base backup and of a promotion; the first byte chooses.
pub fn backup_label(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 3 {
        0 => {
            let Ok(label) = BackupLabel::parse(bytes) else { return };
            assert_eq!(label.start_segment.timeline, label.timeline);
            // A byte that is not UTF-8 reads as a character of three.
            assert!(label.label.len() + label.method.len() + label.start_time.len() <= bytes.len() * 3);
            assert!(!label.method.contains('\n') && !label.start_time.contains('\n'));
            assert_eq!(BackupLabel::parse(bytes).unwrap(), label);
        }
        1 => {
            let Ok(map) = TablespaceMap::parse(bytes) else { return };
            let written = map.to_bytes();
            assert_eq!(TablespaceMap::parse(&written).unwrap(), map);
            for (index, entry) in map.entries.iter().enumerate() {
                assert!(entry.oid > 0 && !entry.path.as_os_str().is_empty());
                assert!(map.entries[..index].iter().all(|other| other.oid != entry.oid));
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            let timeline = TimelineId(text.len().try_into().unwrap_or(u32::MAX) | 0x100);
            let Ok(history) = TimelineHistory::parse(timeline, text) else { return };
            assert!(history.ancestors().len() <= bytes.len());
            assert!(history.ancestors().is_sorted_by(|a, b| a.timeline < b.timeline));
            let lines: Vec<_> =
                history.ancestors().iter().map(|a| format!("{}\t{}\t{}\n", a.timeline, a.switch_point, a.reason)).collect();
            assert_eq!(TimelineHistory::parse(timeline, &lines.concat()).unwrap(), history);
            for ancestor in history.ancestors() {
                assert!(ancestor.timeline < timeline && ancestor.timeline.0 > 0);
                let switch = history.switch_point_of(ancestor.timeline).unwrap();
                assert!(switch <= ancestor.switch_point);
                // Who wrote a byte has it in the history, on both of its sides.
                let at = Lsn(switch.0.saturating_sub(1));
                let owner = history.timeline_at(at);
                assert!(history.contains(owner, at));
            }
        }
    }
}

/// A control file. When the first byte is odd the CRC is made right first, so that the fields are reached.
pub fn pg_control(data: &[u8]) {
    let Some((seal, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if seal % 2 == 1 {
        let version = bytes.get(8..12).map(|v| u32::from_le_bytes(v.try_into().unwrap()));
        let at = match version {
            Some(1300 | 1700) => 288,
            Some(1800) => 292,
            Some(1902) => 304,
            _ => usize::MAX,
        };
        if at < bytes.len().saturating_sub(3) {
            let crc = crc32c::crc32c(&bytes[..at]);
            bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let parsed = ControlFile::parse(&bytes);
    let mut edited = bytes.clone();
    let outcome = invalidate_checkpoint(&mut edited);
    assert_eq!(edited.len(), bytes.len());
    match parsed {
        Err(error) => {
            assert_eq!(outcome, Err(error));
            assert_eq!(edited, bytes, "a refused file is left as it was");
        }
        Ok(control) => {
            outcome.unwrap();
            assert!(control.block_size.is_power_of_two() && control.wal_block_size.is_power_of_two());
            assert!(control.relation_segment_blocks > 0);
            assert_eq!(ControlFile::parse(&edited).unwrap(), ControlFile { checkpoint: Lsn(0xDEAD), ..control });
            let changed: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] != edited[*at]).collect();
            assert!(changed.iter().all(|at| (32..40).contains(at) || (288..308).contains(at)), "{changed:?}");
        }
    }
}

/// Names and what operators type.
pub fn wal_object_name(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(name) = WalName::parse(text) {
        let object = name.object();
        assert_eq!(WalName::parse(&object), Some(name));
        assert_eq!(object.rsplit('/').next(), text.rsplit('/').next(), "two names must not mean one object");
        assert!(stays_inside(&object));
    }
    if let Ok(file) = text.parse::<WalFileName>() {
        assert_eq!(file.to_string(), text);
    }
    if let Ok(segment) = text.parse::<SegmentName>() {
        assert_eq!(segment.to_string(), text);
        for shift in 20..=30 {
            let size = SegmentSize::try_from(1u32 << shift).unwrap();
            if let Ok(number) = segment.segment_number(size) {
                assert_eq!(SegmentName::new(segment.timeline, number, size), segment);
            }
        }
    }
    if let Some(cluster) = ClusterName::parse(text) {
        assert_eq!(cluster.to_string(), text, "two directories must not mean one cluster");
        assert!(stays_inside(text) && stays_inside(cluster.prefix().trim_end_matches('/')) && !text.contains('/'));
    }
    if let Some(id) = layout::id_of(text) {
        assert_eq!(layout::id_of(&layout::snapshot(id)), Some(id));
    }
    if let Ok(id) = text.parse::<SystemId>() {
        assert_eq!(id.to_string().parse::<SystemId>().unwrap(), id);
    }
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse::<Lsn>().unwrap(), lsn);
    }
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
    }
    if let Ok(info) = serde_json::from_str::<WalInfo>(text) {
        let json = serde_json::to_string(&info).unwrap();
        assert_eq!(serde_json::from_str::<WalInfo>(&json).unwrap(), info);
    }
}

/// The archives of a `BASE_BACKUP` stream, which arrive in chunks of any size: how they are cut must not matter.
pub fn base_backup(data: &[u8]) {
    let (step, archive) = number(data);
    let whole = archive_events(archive, archive.len().max(1));
    let cut = archive_events(archive, usize::try_from(step % 1500).unwrap() + 1);
    assert_eq!(whole, cut);
    let (events, _) = whole;
    let mut content = 0u64;
    let mut announced = 0u64;
    for event in events {
        match event {
            TarEvent::Entry(entry) => {
                if entry.kind != EntryKind::File {
                    assert_eq!(entry.size, 0, "only files have content");
                }
                announced = announced.saturating_add(entry.size);
            }
            TarEvent::Data(bytes) => content += bytes.len() as u64,
            TarEvent::EntryEnd => assert_eq!(content, announced, "a member ended before its content did"),
        }
    }
    assert!(content <= archive.len() as u64);
}

/// What the decoder says when it is fed `step` bytes at a time: events, neighbouring pieces of content joined, and whether it failed.
fn archive_events(archive: &[u8], step: usize) -> (Vec<TarEvent>, bool) {
    let mut decoder = TarDecoder::new();
    let mut events: Vec<TarEvent> = Vec::new();
    for chunk in archive.chunks(step) {
        decoder.push(bytes::Bytes::copy_from_slice(chunk));
        loop {
            match decoder.next_event() {
                Ok(Some(TarEvent::Data(more))) => match events.last_mut() {
                    Some(TarEvent::Data(before)) => *before = [&before[..], &more[..]].concat().into(),
                    _ => events.push(TarEvent::Data(more)),
                },
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(_) => return (events, true),
            }
        }
    }
    let failed = decoder.finish().is_err();
    (events, failed)
}
