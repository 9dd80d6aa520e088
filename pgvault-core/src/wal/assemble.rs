//! Turning a stream of WAL into segments.
//!
//! Messages of the replication protocol begin and end anywhere; here they are cut at segment ends (R3). The open segment
//! is kept from its first byte on, because what is in it can only be read together with what precedes.
//!
//! A quiet server's segment is open for hours and stored in thousands of parts, which a restore to the last moment would have to
//! fetch one by one. So every 64th part repeats the 63 before it, and every 4096th everything: no PUT more, each byte stored at most
//! three times, and a restore never needs more than 63 parts of each kind and the large ones.
//!
//! A segment that is too large for one object is stored in chunks, which are given out as they fill.

use bytes::Bytes;

use crate::postgres::{Lsn, SegmentName, SegmentScan, SegmentScanner, SegmentSize, TimelineId, WalSegNo};
use crate::{Error, ErrorKind, Result};

/// Parts that one larger part repeats.
const GROUP: u32 = 64;

/// The most of a segment that one object holds.
const MAX_PIECE: usize = 32 << 20;
const _: () = assert!(MAX_PIECE as u64 == super::object::MAX_RAW);

/// The least of a segment that says whose it is: its first page's header.
const HEADER: usize = 40;

/// WAL that can be stored.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The segment.
    pub segment: SegmentName,
    /// Offset of the first byte in the segment.
    pub from: u32,
    /// The bytes.
    pub bytes: Bytes,
    /// What they are of the segment.
    pub share: Share,
    /// Position behind the last byte.
    pub end: Lsn,
}

/// What a piece is of its segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Share {
    /// All of it.
    Whole,
    /// One of the objects that a large segment is stored as.
    Chunk {
        /// What is in the segment up to the piece's end.
        scan: SegmentScan,
        /// The last one.
        last: bool,
    },
    /// What was written since the part before, and perhaps more.
    Part {
        /// What is in the segment up to the piece's end.
        scan: SegmentScan,
    },
}

impl Piece {
    /// True when nothing of the segment is missing once this and what went before are stored.
    pub fn completes_segment(&self) -> bool {
        matches!(self.share, Share::Whole | Share::Chunk { last: true, .. })
    }
}

/// Collects one timeline's WAL from a segment start on.
#[derive(Debug)]
pub struct Assembler {
    timeline: TimelineId,
    size: SegmentSize,
    number: WalSegNo,
    bytes: Vec<u8>,
    /// Bytes at the open segment's start that were given out as parts, or stored before.
    stored: usize,
    /// What an earlier stream has stored of the first segment.
    known: Vec<u8>,
    scanner: SegmentScanner,
    /// Parts given out of the open segment.
    parts: u32,
    /// Where the current group of parts begins.
    group: usize,
    /// Where the next chunk of a large segment begins.
    chunk: usize,
}

impl Assembler {
    /// Begins at the start of the segment that holds `from`; returns that start as the position to stream from.
    ///
    /// What lies before `from` is stored already and only received again.
    pub fn new(timeline: TimelineId, size: SegmentSize, from: Lsn) -> (Self, Lsn) {
        let number = WalSegNo::containing(from, size);
        let start = number.start(size);
        let stored = usize::try_from(from.0 - start.0).unwrap_or(usize::MAX);
        let scanner = SegmentScanner::new(start, size);
        let chunk = stored - stored % MAX_PIECE;
        (
            Self { timeline, size, number, bytes: Vec::new(), stored, known: Vec::new(), scanner, parts: 0, group: stored, chunk },
            start,
        )
    }

    /// What is stored of the first segment. It is received again, and must be the same.
    #[must_use]
    pub fn expecting(mut self, known: Vec<u8>) -> Self {
        self.known = known;
        self
    }

    /// The position of the next byte.
    pub fn position(&self) -> Lsn {
        self.number.start(self.size).advance(self.bytes.len() as u64)
    }

    /// True when there is something that [`Assembler::flush`] would give out.
    pub fn has_news(&self) -> bool {
        self.bytes.len() > self.stored.max(HEADER)
    }

    /// Adds bytes that continue at [`Assembler::position`]; gives the segments, or chunks of large ones, that became whole.
    ///
    /// # Errors
    /// `wal.not_contiguous` when they begin elsewhere: what is archived must be what was written, without a hole;
    /// `wal.not_a_segment` when they are not the WAL of their place.
    pub fn add(&mut self, start: Lsn, mut bytes: &[u8]) -> Result<Vec<Piece>> {
        if start != self.position() {
            return Err(Error::new(
                ErrorKind::Source,
                "wal.not_contiguous",
                format!("the server sent WAL of {start} where {} was expected", self.position()),
            ));
        }
        let size = usize::try_from(self.size.bytes()).unwrap_or(usize::MAX);
        let mut whole = Vec::new();
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(size - self.bytes.len()));
            let known = self.known.get(self.bytes.len()..).unwrap_or_default();
            let shared = known.len().min(now.len());
            if known.get(..shared) != now.get(..shared) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "wal.diverged",
                    format!("the server's {} is not what the vault has of it", self.segment()),
                )
                .with_hint("the server was set back to an earlier state and went on differently; restore it and promote it, so that it gets a timeline of its own"));
            }
            self.bytes.reserve_exact((size - self.bytes.len()).min(size));
            self.bytes.extend_from_slice(now);
            bytes = later;
            while size > MAX_PIECE && self.bytes.len() - self.chunk >= MAX_PIECE {
                let (from, to) = (self.chunk, self.chunk + MAX_PIECE);
                let share = Share::Chunk { scan: self.scan(to)?, last: to == size };
                whole.push(self.piece(from, to, share));
                (self.chunk, self.stored) = (to, self.stored.max(to));
            }
            if self.bytes.len() == size {
                if size <= MAX_PIECE {
                    let (segment, end) = (self.segment(), self.position());
                    let bytes = std::mem::take(&mut self.bytes).into();
                    whole.push(Piece { segment, from: 0, bytes, share: Share::Whole, end });
                }
                (*self, _) = Self::new(self.timeline, self.size, self.number.next().start(self.size));
            }
        }
        Ok(whole)
    }

    /// The part of the open segment that was not given out yet; the caller stores it. One object's worth: there may be more.
    ///
    /// # Errors
    /// `wal.not_a_segment` when the bytes are not the WAL of their place.
    pub fn flush(&mut self) -> Result<Option<Piece>> {
        if !self.has_news() {
            return Ok(None);
        }
        let to = self.bytes.len().min(self.stored + MAX_PIECE);
        let scan = self.scan(to)?;
        self.parts += 1;
        let wide = match self.parts {
            n if n.is_multiple_of(GROUP * GROUP) => 0,
            n if n.is_multiple_of(GROUP) => self.group,
            _ => self.stored,
        };
        let from = if to - wide <= MAX_PIECE { wide } else { self.stored };
        let piece = self.piece(from, to, Share::Part { scan });
        self.stored = to;
        if self.parts.is_multiple_of(GROUP) {
            self.group = to;
        }
        Ok(Some(piece))
    }

    /// What is in the open segment up to offset `to`.
    fn scan(&mut self, to: usize) -> Result<SegmentScan> {
        let known = self.bytes.get(..to).unwrap_or_default();
        self.scanner.scan(known).map_err(|e| {
            Error::new(ErrorKind::Source, "wal.not_a_segment", format!("{} as the server sends it: {e}", self.segment()))
        })
    }

    fn piece(&self, from: usize, to: usize, share: Share) -> Piece {
        Piece {
            segment: self.segment(),
            from: u32::try_from(from).unwrap_or(u32::MAX),
            bytes: Bytes::copy_from_slice(self.bytes.get(from..to).unwrap_or_default()),
            share,
            end: self.number.start(self.size).advance(to as u64),
        }
    }

    fn segment(&self) -> SegmentName {
        SegmentName::new(self.timeline, self.number, self.size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// R3: messages that cross segment ends, in any sizes, give back exactly the bytes that were written.
        #[test]
        fn r3_any_cut_of_the_stream_gives_the_same_segments(cuts in prop::collection::vec(1usize..900_000, 1..12)) {
            let size = SegmentSize::try_from(1 << 20).unwrap();
            let wal: Vec<u8> = (0..cuts.iter().sum::<usize>()).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let (mut assembler, start) = Assembler::new(TimelineId(3), size, Lsn((5 << 20) + 77));
            prop_assert_eq!(start, Lsn(5 << 20));
            let (mut at, mut segments) = (0, Vec::new());
            for cut in cuts {
                segments.extend(assembler.add(start.advance(at as u64), &wal[at..at + cut]).unwrap());
                at += cut;
            }
            let joined: Vec<u8> = segments.iter().flat_map(|s| s.bytes.to_vec()).collect();
            prop_assert_eq!(&wal[..joined.len()], &joined[..]);
            prop_assert!(wal.len() - joined.len() < 1 << 20);
            prop_assert_eq!(assembler.position(), start.advance(wal.len() as u64));
            for (n, segment) in segments.iter().enumerate() {
                prop_assert_eq!(segment.segment.segment_number(size).unwrap(), WalSegNo(5 + n as u64));
            }
        }
    }

    /// Parts join up, name what is in them as one scan would, and few are needed however many there were.
    #[test]
    fn parts_of_a_quiet_segment_join_up_and_few_are_needed() {
        let packed = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/postgres/000000010000000000000008.zst");
        let bytes = zstd::stream::decode_all(std::fs::File::open(packed).unwrap()).unwrap();
        let size = SegmentSize::try_from(1 << 20).unwrap();
        for (stored, step) in [(0, 128), (77_000, 4096)] {
            let (mut assembler, start) = Assembler::new(TimelineId(1), size, Lsn(0x80_0000 + stored));
            let mut catalog = crate::wal::catalog::TimelineObjects::default();
            let segment: SegmentName = "000000010000000000000008".parse().unwrap();
            let first = (stored > 0).then(|| (0, u32::try_from(stored).unwrap()));
            let mut ranges: std::collections::BTreeSet<_> = first.into_iter().collect();
            let mut at = 0;
            while at + step < bytes.len() {
                assert!(assembler.add(start.advance(at as u64), &bytes[at..at + step]).unwrap().is_empty());
                at += step;
                let Some(part) = assembler.flush().unwrap() else { continue };
                assert_eq!(part.end, start.advance(at as u64));
                assert_eq!(part.bytes, bytes[part.from as usize..at]);
                if ranges.len() % 97 == 0 {
                    let scan = crate::postgres::scan_segment(&bytes[..at], start, size).unwrap();
                    assert_eq!(part.share, Share::Part { scan });
                }
                assert!(ranges.insert((part.from, u32::try_from(at).unwrap())));
            }
            let stored: u64 = ranges.iter().map(|(from, to)| u64::from(to - from)).sum();
            assert!(stored <= 3 * at as u64, "{stored} bytes of {at}");
            let count = ranges.len();
            let _ = catalog.parts.insert(segment, ranges);
            assert_eq!(catalog.covered(segment, size), at as u64);
            let chain = catalog.chain(segment);
            assert!(chain.len() <= 130, "{} of {count}", chain.len());
            assert!(chain.windows(2).all(|pair| pair[1].0 <= pair[0].1));
        }
    }

    #[test]
    fn what_was_stored_before_must_be_what_comes_again() {
        let size = SegmentSize::try_from(1 << 20).unwrap();
        let begin = || Assembler::new(TimelineId(1), size, Lsn((5 << 20) + 300)).0.expecting(vec![7; 300]);
        let start = Lsn(5 << 20);
        let mut good = begin();
        assert!(good.add(start, &[7; 200]).unwrap().is_empty());
        assert!(good.add(start.advance(200), &[7; 100]).unwrap().is_empty());
        assert!(good.add(start.advance(300), &[8; 100]).unwrap().is_empty());
        let mut bad = begin();
        assert!(bad.add(start, &[7; 200]).unwrap().is_empty());
        assert_eq!(bad.add(start.advance(200), &[8; 200]).unwrap_err().code(), "wal.diverged");
    }

    /// H14: skipping exactly one segment is a hole like any other.
    #[test]
    fn h14_a_skipped_segment_is_refused() {
        let size = SegmentSize::try_from(1 << 20).unwrap();
        let (mut assembler, start) = Assembler::new(TimelineId(1), size, Lsn(0));
        assert_eq!(assembler.add(start, &vec![1; 1 << 20]).unwrap().len(), 1);
        assert!(assembler.add(Lsn(2 << 20), &[1]).is_err());
        assert!(assembler.add(Lsn(0), &[1]).is_err());
    }
}
