//! Turning a stream of WAL into segments.
//!
//! Messages of the replication protocol begin and end anywhere; here they are cut at segment ends (R3). The open segment
//! is kept from its first byte on, because a part of it can only be scanned for transactions together with what precedes.

use bytes::Bytes;

use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId, WalSegNo};
use crate::{Error, ErrorKind, Result};

/// WAL that can be stored.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The segment.
    pub segment: SegmentName,
    /// Everything known of the segment, from its first byte on.
    pub bytes: Bytes,
    /// Bytes at its start that are already stored as parts.
    pub stored: usize,
    /// True when the segment is whole.
    pub whole: bool,
    /// Position behind the last byte.
    pub end: Lsn,
}

/// Collects one timeline's WAL from a segment start on.
#[derive(Debug)]
pub struct Assembler {
    timeline: TimelineId,
    size: SegmentSize,
    number: WalSegNo,
    bytes: Vec<u8>,
    stored: usize,
}

impl Assembler {
    /// Begins at the start of the segment that holds `from`; returns that start as the position to stream from.
    pub fn new(timeline: TimelineId, size: SegmentSize, from: Lsn) -> (Self, Lsn) {
        let number = WalSegNo::containing(from, size);
        (Self { timeline, size, number, bytes: Vec::new(), stored: 0 }, number.start(size))
    }

    /// As [`Assembler::new`], but what lies before `from` is stored already and only received again.
    pub fn resume(timeline: TimelineId, size: SegmentSize, from: Lsn) -> (Self, Lsn) {
        let (mut this, start) = Self::new(timeline, size, from);
        this.stored = usize::try_from(from.0 - start.0).unwrap_or(usize::MAX);
        (this, start)
    }

    /// True when there is something that [`Assembler::flush`] would give out.
    pub fn has_news(&self) -> bool {
        self.bytes.len() > self.stored
    }

    /// The position of the next byte.
    pub fn position(&self) -> Lsn {
        self.number.start(self.size).advance(self.bytes.len() as u64)
    }

    /// Adds bytes that continue at [`Assembler::position`]; gives the segments that became whole.
    ///
    /// # Errors
    /// `wal.not_contiguous` when they begin elsewhere: what is archived must be what was written, without a hole.
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
            self.bytes.reserve_exact((size - self.bytes.len()).min(size));
            self.bytes.extend_from_slice(now);
            bytes = later;
            if self.bytes.len() == size {
                whole.push(Piece {
                    segment: self.segment(),
                    bytes: std::mem::take(&mut self.bytes).into(),
                    stored: std::mem::take(&mut self.stored),
                    whole: true,
                    end: self.number.next().start(self.size),
                });
                self.number = self.number.next();
            }
        }
        Ok(whole)
    }

    /// The part of the open segment that was not given out yet; the caller stores it.
    pub fn flush(&mut self) -> Option<Piece> {
        if !self.has_news() {
            return None;
        }
        let piece = Piece {
            segment: self.segment(),
            bytes: Bytes::copy_from_slice(&self.bytes),
            stored: self.stored,
            whole: false,
            end: self.position(),
        };
        self.stored = self.bytes.len();
        Some(piece)
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
        fn r3_any_cut_of_the_stream_gives_the_same_segments(cuts in prop::collection::vec(1usize..900_000, 1..12), flush: bool) {
            let size = SegmentSize::try_from(1 << 20).unwrap();
            let wal: Vec<u8> = (0..cuts.iter().sum::<usize>()).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let (mut assembler, start) = Assembler::new(TimelineId(3), size, Lsn((5 << 20) + 77));
            prop_assert_eq!(start, Lsn(5 << 20));
            let (mut at, mut segments) = (0, Vec::new());
            for cut in cuts {
                segments.extend(assembler.add(start.advance(at as u64), &wal[at..at + cut]).unwrap());
                at += cut;
                if flush
                    && let Some(part) = assembler.flush() {
                        prop_assert_eq!(part.end, start.advance(at as u64));
                    }
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
