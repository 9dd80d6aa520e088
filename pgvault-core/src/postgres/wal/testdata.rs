//! Real segments, and a small writer of WAL for the cases that no server can be asked to produce.

use super::super::{Lsn, SegmentSize, WalSegNo};
use super::{CONTINUES_RECORD, GIVES_UP_RECORD, IS_LONG, LONG_HEADER, SHORT_HEADER};

/// A 1 MiB segment that PostgreSQL 15 archived, see testdata/postgres/README.md.
pub(super) fn segment(name: &str) -> Vec<u8> {
    let path = format!("{}/../testdata/postgres/{name}.zst", env!("CARGO_MANIFEST_DIR"));
    zstd::stream::decode_all(&std::fs::read(path).unwrap()[..]).unwrap()
}

pub(super) const SIZE: u32 = 1 << 20;
pub(super) const BLOCK: u64 = 8192;
const BLOCK_BYTES: usize = 8192;

pub(super) fn size() -> SegmentSize {
    SegmentSize::try_from(SIZE).unwrap()
}

/// Writes records one after the other from the start of segment 1 on.
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    previous: u64,
    magic: u16,
    give_up_next: bool,
}

impl Writer {
    pub(super) const START: u64 = SIZE as u64;

    pub(super) fn new(magic: u16) -> Self {
        Self { bytes: Vec::new(), previous: 8, magic, give_up_next: false }
    }

    pub(super) fn position(&self) -> Lsn {
        Lsn(Self::START + self.bytes.len() as u64)
    }

    fn page_header(&mut self, remaining: usize) {
        let address = self.position().0;
        let long = address.is_multiple_of(u64::from(SIZE));
        let mut flags = if long { IS_LONG } else { 0 };
        flags |= if remaining > 0 { CONTINUES_RECORD } else { 0 };
        if std::mem::take(&mut self.give_up_next) {
            flags |= GIVES_UP_RECORD;
        }
        let from = self.bytes.len();
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend(u32::try_from(remaining).unwrap().to_le_bytes());
        self.bytes.resize(from + SHORT_HEADER, 0);
        if long {
            self.bytes.extend(0x1234u64.to_le_bytes());
            self.bytes.extend(SIZE.to_le_bytes());
            self.bytes.extend(u32::try_from(BLOCK).unwrap().to_le_bytes());
            assert_eq!(self.bytes.len(), from + LONG_HEADER);
        }
    }

    /// Writes a record with `data` behind its header and answers its position.
    pub(super) fn record(&mut self, resource_manager: u8, info: u8, xid: u32, data: &[u8]) -> Lsn {
        if self.bytes.len().is_multiple_of(BLOCK_BYTES) {
            self.page_header(0);
        }
        let lsn = self.position();
        let mut record = Vec::new();
        record.extend(u32::try_from(24 + data.len()).unwrap().to_le_bytes());
        record.extend(xid.to_le_bytes());
        record.extend(self.previous.to_le_bytes());
        record.extend([info, resource_manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(data), &record);
        record.extend(crc.to_le_bytes());
        record.extend(data);
        self.previous = lsn.0;
        for (done, byte) in record.iter().enumerate() {
            if self.bytes.len().is_multiple_of(BLOCK_BYTES) {
                self.page_header(record.len() - done);
            }
            self.bytes.push(*byte);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        lsn
    }

    /// Begins a record as a crash leaves it: the first `written` bytes of it, up to the end of the page; the next page gives it up.
    pub(super) fn torn_record(&mut self, length: u32, written: usize) -> Lsn {
        let lsn = self.position();
        let from = self.bytes.len();
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(0u32.to_le_bytes());
        self.bytes.extend(self.previous.to_le_bytes());
        self.bytes.resize(from + written, 0x55);
        let page_end = self.bytes.len().next_multiple_of(BLOCK_BYTES);
        self.bytes.resize(page_end, 0);
        self.give_up_next = true;
        lsn
    }

    /// A record with `data` as main data.
    pub(super) fn with_main_data(&mut self, resource_manager: u8, info: u8, xid: u32, data: &[u8]) -> Lsn {
        let mut all = vec![255, u8::try_from(data.len()).unwrap()];
        all.extend(data);
        self.record(resource_manager, info, xid, &all)
    }

    /// The segments that were begun, the last one padded with zeroes, with their positions.
    pub(super) fn segments(&self) -> Vec<(Lsn, Vec<u8>)> {
        self.bytes
            .chunks(SIZE as usize)
            .zip(1..)
            .map(|(chunk, number)| {
                let mut bytes = chunk.to_vec();
                bytes.resize(SIZE as usize, 0);
                (WalSegNo(number).start(size()), bytes)
            })
            .collect()
    }
}
