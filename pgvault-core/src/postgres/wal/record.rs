//! Walking the records of a segment.

use std::borrow::Cow;

use jiff::Timestamp;

use super::super::bytes::{i32_at, i64_at, u32_at, u64_at};
use super::super::{Lsn, ParseError, SegmentSize, TimelineId};
use super::blocks::main_data_place;
use super::{SegmentHeader, WalPageHeader, timestamp_from_pg};

/// Bytes of `XLogRecord`.
pub(super) const RECORD_HEADER: usize = 24;

/// Where `xl_crc` stands in it.
pub(super) const CRC_OFFSET: usize = 20;

/// `XLogRecordMaxSize`: 1020 MiB.
pub(super) const MAX_RECORD: u32 = 1020 << 20;

pub(super) const RM_XLOG: u8 = 0;
pub(super) const RM_XACT: u8 = 1;

/// The bits of `xl_info` that the resource manager owns.
pub(super) const RMGR_INFO: u8 = 0xF0;

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
pub(super) const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;
pub(super) const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

pub(super) const XACT_OPERATION: u8 = 0x70;
pub(super) const XACT_HAS_INFO: u8 = 0x80;
pub(super) const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
pub(super) const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;

/// From this magic on (PostgreSQL 18), a dropped statistics entry is named by 64 bits instead of 32.
const MAGIC_OF_WIDE_STATISTICS: u16 = 0xD118;

/// Why a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The segment, or what was given of it, ended.
    EndOfInput,
    /// A switch record: the rest of the segment is empty on purpose.
    Switch,
    /// Zeroes where a record would begin: nothing was written from here on.
    Zeroes,
    /// Bytes that are not a record or a page of this position: recycled content behind the end of WAL, or damage.
    Invalid(&'static str),
}

/// Where and why a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanEnd {
    /// The first byte that is not known to be valid WAL.
    pub lsn: Lsn,
    /// Why the walk did not go on.
    pub reason: StopReason,
}

/// A record that begins in the segment.
#[derive(Debug, Clone, Copy)]
pub struct WalRecord<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next record can begin: its end, aligned to 8. Past the input when `is_whole` is false.
    pub end: Lsn,
    /// Where the record before it begins.
    pub previous: Lsn,
    /// The transaction that wrote it; 0 when none did.
    pub xid: u32,
    /// `xl_rmid`, the resource manager.
    pub resource_manager: u8,
    /// `xl_info`.
    pub info: u8,
    /// Bytes of the record, header included, page headers not.
    pub length: u32,
    /// True when all of it was there and its CRC is right. False for a record that continues past the input: its header is
    /// plausible, and what its accessors return is unproven.
    pub is_whole: bool,
    walk: Walk<'a>,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionEnd {
    /// Where the record begins. Recovery with `recovery_target_inclusive = off` stops here.
    pub lsn: Lsn,
    /// Where the next record can begin. Everything up to here is needed to have this transaction.
    pub end: Lsn,
    /// The transaction; for a prepared one, the transaction that was prepared.
    pub xid: u32,
    /// The time in the record, which `recovery_target_time` is compared with.
    pub time: Timestamp,
    /// Commit or abort.
    pub is_commit: bool,
}

/// A name that `pg_create_restore_point` gave to a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePoint {
    /// The name, as much of it as is UTF-8.
    pub name: String,
    /// Where the record begins.
    pub lsn: Lsn,
    /// Where the next record can begin; everything up to here is needed to recover to the name.
    pub end: Lsn,
    /// When it was made.
    pub time: Timestamp,
}

impl<'a> WalRecord<'a> {
    /// The record's bytes, header included: up to `limit` of them, fewer when the input ends before.
    fn bytes(&self, limit: usize) -> Cow<'a, [u8]> {
        let wanted = usize::try_from(self.length).unwrap_or(usize::MAX).min(limit);
        let mut pieces = self.walk.pieces(self.lsn, wanted);
        match pieces.next() {
            None => Cow::Borrowed(&[]),
            Some(first) if first.len() == wanted => Cow::Borrowed(first),
            Some(first) => {
                let mut all = first.to_vec();
                pieces.for_each(|piece| all.extend_from_slice(piece));
                Cow::Owned(all)
            }
        }
    }

    /// The data that belongs to the record as a whole, not to a block: what the resource manager's structures describe.
    ///
    /// `None` when the record's inner headers do not add up. Shorter than it should be when `is_whole` is false.
    pub fn main_data(&self) -> Option<Cow<'a, [u8]>> {
        let bytes = self.bytes(usize::MAX);
        let (offset, length) = main_data_place(&bytes, usize::try_from(self.length).ok()?)?;
        let end = offset.checked_add(length)?.min(bytes.len());
        match bytes {
            Cow::Borrowed(all) => all.get(offset..end).map(Cow::Borrowed),
            Cow::Owned(all) => all.get(offset..end).map(|part| Cow::Owned(part.to_vec())),
        }
    }

    /// The transaction that this record commits or aborts, if it does.
    pub fn transaction_end(&self) -> Option<TransactionEnd> {
        if self.resource_manager != RM_XACT {
            return None;
        }
        let operation = self.info & XACT_OPERATION;
        let (is_commit, is_prepared) = match operation {
            XACT_COMMIT => (true, false),
            XACT_COMMIT_PREPARED => (true, true),
            XACT_ABORT => (false, false),
            XACT_ABORT_PREPARED => (false, true),
            _ => return None,
        };
        let data = self.main_data()?;
        let time = timestamp_from_pg(i64_at(&data, 0)?)?;
        // The record of a prepared transaction's end is written by another session, without a transaction of its own.
        let xid = if is_prepared { self.prepared_xid(&data, is_commit)? } else { self.xid };
        Some(TransactionEnd { lsn: self.lsn, end: self.end, xid, time, is_commit })
    }

    /// `xl_xact_twophase.xid`, behind the optional parts that `ParseCommitRecord` and `ParseAbortRecord` skip.
    fn prepared_xid(&self, data: &[u8], is_commit: bool) -> Option<u32> {
        if self.info & XACT_HAS_INFO == 0 {
            return None;
        }
        let xinfo = u32_at(data, 8)?;
        let has = |bit: u32| xinfo & (1 << bit) != 0;
        let statistics_item = if self.walk.magic >= MAGIC_OF_WIDE_STATISTICS { 16 } else { 12 };
        let mut at = 12usize;
        if has(0) {
            at = at.checked_add(8)?; // database and its tablespace
        }
        // Arrays, each behind its count: subtransactions, dropped relations, dropped statistics, invalidations (commits only).
        for (bit, item) in [(1, 4usize), (2, 12), (8, statistics_item), (3, 16)] {
            if has(bit) && (is_commit || bit != 3) {
                let count = usize::try_from(i32_at(data, at)?).ok()?;
                at = at.checked_add(4)?.checked_add(count.checked_mul(item)?)?;
            }
        }
        if has(4) { u32_at(data, at) } else { None }
    }

    /// The restore point that this record sets, if it does.
    pub fn restore_point(&self) -> Option<RestorePoint> {
        if self.resource_manager != RM_XLOG || self.info & RMGR_INFO != XLOG_RESTORE_POINT {
            return None;
        }
        let data = self.main_data()?;
        let time = timestamp_from_pg(i64_at(&data, 0)?)?;
        let name = data.get(8..72)?;
        let name = name.split(|b| *b == 0).next()?;
        Some(RestorePoint { name: String::from_utf8_lossy(name).into_owned(), lsn: self.lsn, end: self.end, time })
    }

    /// True for the checkpoint of a server that stops: recovery that was interrupted behind it goes on behind it, and does not read
    /// it again.
    pub fn is_shutdown_checkpoint(&self) -> bool {
        self.resource_manager == RM_XLOG && self.info & RMGR_INFO == XLOG_CHECKPOINT_SHUTDOWN
    }

    /// True for the record that ends a segment early.
    pub fn is_switch(&self) -> bool {
        self.resource_manager == RM_XLOG && self.info & RMGR_INFO == XLOG_SWITCH
    }
}

/// True when a record of the transaction manager with this `xl_info` ends a transaction, and begins with the time.
pub(super) fn timed_transaction_end(info: u8) -> bool {
    matches!(info & XACT_OPERATION, XACT_COMMIT | XACT_COMMIT_PREPARED | XACT_ABORT | XACT_ABORT_PREPARED)
}

/// Where a record can begin at or behind `lsn`; the last position of all when there is none.
fn aligned(lsn: Lsn) -> Lsn {
    Lsn(lsn.0.checked_next_multiple_of(8).unwrap_or(u64::MAX))
}

/// The input and what its positions mean.
#[derive(Debug, Clone, Copy)]
struct Walk<'a> {
    bytes: &'a [u8],
    start: Lsn,
    block_size: usize,
    magic: u16,
}

/// What stands between one page and the next while a record crosses it.
enum Crossing {
    /// The page continues the record with these data.
    Continues(usize),
    /// The page gives the record up; the next one begins here.
    GivenUp(Lsn),
    /// There is no such page in the input.
    EndOfInput,
    /// The page does not continue the record.
    Broken(&'static str),
}

impl<'a> Walk<'a> {
    fn offset(&self, lsn: Lsn) -> Option<usize> {
        usize::try_from(lsn.0.checked_sub(self.start.0)?).ok()
    }

    fn lsn(&self, offset: usize) -> Lsn {
        self.start.advance(u64::try_from(offset).unwrap_or(u64::MAX))
    }

    fn end(&self) -> Lsn {
        self.lsn(self.bytes.len())
    }

    /// The header of the page at `offset`, if it is one of this segment.
    fn page(&self, offset: usize) -> Option<WalPageHeader> {
        let header = WalPageHeader::parse(self.bytes.get(offset..)?)?;
        (header.magic == self.magic && header.address == self.lsn(offset)).then_some(header)
    }

    /// The first byte of the page after the one that holds `offset`.
    fn next_page(&self, offset: usize) -> usize {
        (offset / self.block_size + 1).saturating_mul(self.block_size)
    }

    /// The pieces of a record of `length` bytes at `lsn`, without the page headers between them, for pages that were checked
    /// before. Ends early where the input does.
    fn pieces(self, lsn: Lsn, length: usize) -> impl Iterator<Item = &'a [u8]> {
        let mut left = length;
        let mut offset = self.offset(lsn);
        std::iter::from_fn(move || {
            let at = offset.filter(|_| left > 0)?;
            let page_end = self.next_page(at);
            let piece = self.bytes.get(at..page_end.min(at.saturating_add(left)).min(self.bytes.len()))?;
            left -= piece.len();
            offset = self.page(page_end).map(|header| page_end + header.length());
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// What the page at `offset` does with a record of which `remaining` bytes are missing.
    fn cross(&self, offset: usize, remaining: usize) -> Crossing {
        if offset >= self.bytes.len() {
            return Crossing::EndOfInput;
        }
        let Some(header) = self.page(offset) else {
            return Crossing::Broken("the page that a record continues on is not of this position");
        };
        if header.gives_up_record() {
            return Crossing::GivenUp(self.lsn(offset + header.length()));
        }
        if !header.continues_record() || usize::try_from(header.remaining) != Ok(remaining) {
            return Crossing::Broken("the page that a record continues on does not continue it");
        }
        Crossing::Continues(offset + header.length())
    }
}

/// The records that begin in a segment, in order.
///
/// The walk ends quietly wherever valid WAL ends; [`Records::end`] then says where and why. A record whose CRC does not match is not
/// yielded. The last record may continue past the input: it is yielded with [`WalRecord::is_whole`] false.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    walk: Walk<'a>,
    segment_size: SegmentSize,
    /// Where the next record is looked for.
    next: Lsn,
    previous: Option<Lsn>,
    timeline: TimelineId,
    end: Option<ScanEnd>,
}

/// A place between two records.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    next: Lsn,
    previous: Lsn,
    timeline: TimelineId,
}

/// What was found where a record is looked for.
enum Step<'a> {
    Record(WalRecord<'a>),
    /// Look there instead.
    Skip(Lsn),
    End(ScanEnd),
}

impl<'a> Records<'a> {
    /// The records of a segment, or of its first part, that should begin at `start`.
    ///
    /// # Errors
    /// When `bytes` is not the segment at `start` of a cluster with segments of `size`.
    pub fn new(bytes: &'a [u8], start: Lsn, size: SegmentSize) -> Result<Self, ParseError> {
        let bad = |why: String| ParseError::new("WAL segment", why);
        let header = SegmentHeader::parse(bytes)?;
        if header.start != start {
            return Err(bad(format!("it begins at {}, not at {start}", header.start)));
        }
        if header.segment_size != size {
            return Err(bad(format!("it is of {} byte segments, not {}", header.segment_size.bytes(), size.bytes())));
        }
        let segment_bytes = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
        let Some(bytes) = bytes.get(..bytes.len().min(segment_bytes)) else {
            return Err(bad("impossible length".to_owned()));
        };
        let block_size = usize::try_from(header.block_size).unwrap_or(usize::MAX);
        let walk = Walk { bytes, start, block_size, magic: header.magic };
        let mut records = Self { walk, segment_size: size, next: start, previous: None, timeline: header.timeline, end: None };
        records.skip_continuation();
        Ok(records)
    }

    /// Steps over the rest of a record that began in an earlier segment.
    fn skip_continuation(&mut self) {
        let mut at = 0;
        let Some(mut header) = self.walk.page(at) else { return };
        if !header.continues_record() {
            self.next = self.walk.lsn(at + header.length());
            return;
        }
        let mut remaining = usize::try_from(header.remaining).unwrap_or(usize::MAX);
        let mut data = at + header.length();
        loop {
            let page_end = self.walk.next_page(at);
            let here = page_end - data;
            if remaining <= here {
                self.next = aligned(self.walk.lsn(data + remaining));
                return;
            }
            remaining -= here;
            match self.walk.cross(page_end, remaining) {
                Crossing::Continues(next) => {
                    at = page_end;
                    data = next;
                    header = self.walk.page(at).unwrap_or(header);
                    self.timeline = header.timeline;
                }
                Crossing::GivenUp(next) => {
                    self.next = next;
                    return;
                }
                Crossing::EndOfInput => {
                    self.end = Some(ScanEnd { lsn: self.walk.end(), reason: StopReason::EndOfInput });
                    return;
                }
                Crossing::Broken(why) => {
                    self.end = Some(ScanEnd { lsn: self.walk.lsn(page_end), reason: StopReason::Invalid(why) });
                    return;
                }
            }
        }
    }

    /// Goes on where an earlier walk over a shorter start of the same segment was, behind a whole record.
    pub(super) fn resume(&mut self, at: Mark) {
        (self.next, self.previous, self.timeline, self.end) = (at.next, Some(at.previous), at.timeline, None);
    }

    /// The place behind `record`, the last one that was yielded.
    pub(super) fn mark(&self, record: &WalRecord<'_>) -> Mark {
        Mark { next: self.next, previous: record.lsn, timeline: self.timeline }
    }

    /// The position where the next record is looked for.
    pub fn position(&self) -> Lsn {
        self.next
    }

    /// The timeline of the last page that the walk saw.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Where and why the walk ended; `None` while it has not.
    pub fn end(&self) -> Option<ScanEnd> {
        self.end
    }

    fn step(&mut self) -> Step<'a> {
        let walk = self.walk;
        let stop = |reason| Step::End(ScanEnd { lsn: self.next, reason });
        let Some(offset) = walk.offset(self.next).filter(|o| *o < walk.bytes.len()) else {
            return Step::End(ScanEnd { lsn: Lsn(self.next.0.min(walk.end().0)), reason: StopReason::EndOfInput });
        };
        if offset % walk.block_size == 0 {
            // A record ended exactly with its page.
            return match walk.page(offset) {
                Some(header) if header.continues_record() => stop(StopReason::Invalid("a page continues a record that had ended")),
                Some(header) => {
                    self.timeline = header.timeline;
                    Step::Skip(walk.lsn(offset + header.length()))
                }
                None if walk.bytes.get(offset..).is_some_and(|rest| rest.iter().take(24).all(|b| *b == 0)) => {
                    stop(StopReason::Zeroes)
                }
                None => stop(StopReason::Invalid("a page is not of this position")),
            };
        }
        // Positions are multiples of 8 and so is the page size: the length is never split.
        let length = match u32_at(walk.bytes, offset) {
            None => return stop(StopReason::EndOfInput),
            Some(0) => return stop(StopReason::Zeroes),
            Some(length) if (24..=MAX_RECORD).contains(&length) => length,
            Some(_) => return stop(StopReason::Invalid("a record's length is impossible")),
        };
        let Ok(wanted) = usize::try_from(length) else { return stop(StopReason::Invalid("a record's length is impossible")) };

        // Find the pieces, check that each page continues the record, and let the CRC run over all but the header.
        let mut header = [0u8; RECORD_HEADER];
        let mut have = 0usize;
        let mut crc = 0u32;
        let mut at = offset;
        let mut timeline = self.timeline;
        let is_whole = loop {
            let page_end = walk.next_page(at);
            let until = page_end.min(at.saturating_add(wanted - have));
            let Some(piece) = walk.bytes.get(at..until.min(walk.bytes.len())) else { break false };
            let of_header = RECORD_HEADER.saturating_sub(have).min(piece.len());
            let (head, tail) = piece.split_at(of_header);
            if let Some(place) = header.get_mut(have..have + of_header) {
                place.copy_from_slice(head);
            }
            crc = crc32c::crc32c_append(crc, tail);
            have += piece.len();
            if have == wanted {
                at = until;
                break true;
            }
            if until > walk.bytes.len() {
                break false;
            }
            match walk.cross(page_end, wanted - have) {
                Crossing::Continues(next) => {
                    at = next;
                    timeline = walk.page(page_end).map_or(timeline, |page| page.timeline);
                }
                Crossing::GivenUp(next) => return Step::Skip(next),
                Crossing::EndOfInput => break false,
                Crossing::Broken(why) => return stop(StopReason::Invalid(why)),
            }
        };
        if have < 8 {
            // Less than records are aligned to: the input was cut off at an odd place.
            return stop(StopReason::EndOfInput);
        }
        // A header that the input cuts off reads as zeroes from there on, and is judged by what it has.
        let previous = if have >= 16 { u64_at(&header, 8).map(Lsn) } else { self.previous };
        let previous = previous.unwrap_or_default();
        if previous >= self.next || self.previous.is_some_and(|known| known != previous) {
            return stop(StopReason::Invalid("a record does not follow the one before it"));
        }
        if is_whole {
            let stored = u32_at(&header, CRC_OFFSET).unwrap_or_default();
            if crc32c::crc32c_append(crc, header.get(..CRC_OFFSET).unwrap_or_default()) != stored {
                return stop(StopReason::Invalid("a record's CRC does not match"));
            }
        }
        let end = if is_whole { aligned(walk.lsn(at)) } else { self.end_of_crossing(wanted - have) };
        self.timeline = timeline;
        let [.., info, resource_manager, _, _, _, _, _, _] = header;
        let mut record = WalRecord {
            lsn: self.next,
            end,
            previous,
            xid: u32_at(&header, 4).unwrap_or_default(),
            resource_manager,
            info,
            length,
            is_whole,
            walk,
        };
        if is_whole && record.is_switch() {
            // As the server's own reader has it, the record extends to the end of the segment.
            record.end = walk.start.advance(self.segment_size.bytes());
        }
        Step::Record(record)
    }

    /// Where a record ends of which `remaining` bytes lie past the input, given that the input ends with a page.
    fn end_of_crossing(&self, remaining: usize) -> Lsn {
        let from = self.walk.end();
        let (Ok(remaining), Ok(page)) = (u64::try_from(remaining), u64::try_from(self.walk.block_size)) else { return from };
        let in_page = from.0 % page;
        if in_page != 0 && page - in_page >= remaining {
            return aligned(from.advance(remaining));
        }
        // The bytes that fit the rest of the page, then pages with short headers; the first may begin a segment.
        let mut left = if in_page == 0 { remaining } else { remaining - (page - in_page) };
        let mut at = if in_page == 0 { from } else { from.advance(page - in_page) };
        loop {
            let header = if at.0 % self.segment_size.bytes() == 0 { super::LONG_HEADER } else { super::SHORT_HEADER };
            let header = u64::try_from(header).unwrap_or_default();
            if left <= page - header {
                return aligned(at.advance(header + left));
            }
            left -= page - header;
            at = at.advance(page);
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = WalRecord<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.end.is_none() {
            match self.step() {
                Step::Skip(to) => self.next = to,
                Step::End(end) => self.end = Some(end),
                Step::Record(record) => {
                    self.previous = Some(record.lsn);
                    self.next = record.end;
                    if !record.is_whole {
                        self.end = Some(ScanEnd { lsn: self.walk.end(), reason: StopReason::EndOfInput });
                    } else if record.is_switch() {
                        self.end = Some(ScanEnd { lsn: record.end, reason: StopReason::Switch });
                    }
                    return Some(record);
                }
            }
        }
        None
    }
}
