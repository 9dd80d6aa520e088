//! Checking WAL as a stream: every page, every record, and that each follows the one before, over segment ends.
//!
//! [`super::Records`] reads one segment and ends quietly wherever valid WAL ends, because behind that place anything may stand. Where
//! more WAL follows, that place is damage. So the checker does not end there: it notes a doubt, looks for the next page of its
//! own position, and goes on with the record that begins there. A doubt that valid WAL follows is a fault; one that nothing follows is
//! where the WAL ends.
//!
//! What is seen of a single changed byte: everything but bit 2 of a page's `xlp_info` (`XLP_BKP_REMOVABLE`, which servers set on any
//! page they liked), and the rest of a record whose beginning was not given.

mod kept;

use jiff::Timestamp;

use self::kept::Kept;
use super::super::bytes::{i64_at, u32_at, u64_at};
use super::super::{Lsn, SegmentSize, SystemId, TimelineHistory, TimelineId};
use super::blocks::main_data_place;
use super::record::{
    CRC_OFFSET, MAX_RECORD, RECORD_HEADER, RM_XACT, RM_XLOG, RMGR_INFO, XLOG_OVERWRITE_CONTRECORD, XLOG_SWITCH,
    timed_transaction_end,
};
use super::witness::Witness;
use super::{IS_LONG, LONG_HEADER, SHORT_HEADER, WalPageHeader, timestamp_from_pg};

/// `XLOG_BLCKSZ` of nearly every server; the first segment header that is seen says how it is.
const USUAL_BLOCK: u64 = 8192;

/// Bytes of a record that are kept: its header, and what leads to the time of a transaction's end.
const KEPT: usize = 96;

/// WAL that is not what a server writes at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFault {
    /// The page or the record.
    pub lsn: Lsn,
    /// What is wrong with it.
    pub what: &'static str,
}

/// A transaction that ended, as the checker passed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassedEnd {
    /// Where its record begins.
    pub lsn: Lsn,
    /// The time in the record.
    pub time: Timestamp,
}

/// Transactions that ended in a stretch of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassedEnds {
    /// The first.
    pub first: PassedEnd,
    /// The last.
    pub last: PassedEnd,
    /// The one with the latest time, the later one of equals. Times are nearly but not quite in the order of records.
    pub latest: PassedEnd,
}

/// Checks the WAL of one timeline's lineage, given in order and in pieces of any size.
#[derive(Debug, Clone)]
pub struct WalChecker<W = ()> {
    system_identifier: SystemId,
    segment_size: SegmentSize,
    block_size: u64,
    /// The magic of every page, once one was seen.
    magic: Option<u16>,
    history: Option<TimelineHistory>,
    /// The highest timeline that may occur.
    newest: TimelineId,
    /// The timeline of the last page.
    timeline: TimelineId,
    /// The next byte.
    at: Lsn,
    /// The header of the page that begins here, as far as it was given.
    header: Kept<LONG_HEADER>,
    in_header: bool,
    /// What was given of the page since its header.
    given: Vec<u8>,
    place: Place,
    previous: Option<Lsn>,
    /// Set by a page that gives up a record: the next one must say so, and which.
    gave_up: Option<GaveUp>,
    /// Where valid WAL may have ended.
    doubt: Option<Doubt>,
    /// True from a fault on until something is right again: what is wrong meanwhile follows from it.
    reeling: bool,
    faults: Vec<WalFault>,
    records: u64,
    last_record: Option<Lsn>,
    /// Transaction ends since the last [`WalChecker::take_ends`].
    ends: Option<PassedEnds>,
    witness: W,
}

#[derive(Debug, Clone, Copy)]
struct Doubt {
    fault: WalFault,
    /// Nothing but zeroes: that is how WAL ends that was never written.
    is_zeroes: bool,
}

#[derive(Debug, Clone, Copy)]
struct GaveUp {
    /// The record that was given up, when its beginning is known.
    record: Option<Lsn>,
}

/// What the next byte of a page's body belongs to.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// Nobody knows until the next page.
    Unknown,
    /// Padding, or the next record.
    Between,
    /// A record.
    Record(Open),
    /// The rest of a record that began before what was given.
    Rest(u64),
    /// Behind a switch record, up to the end of the segment.
    Switched,
}

/// A record of which something is missing.
#[derive(Debug, Clone, Copy)]
struct Open {
    lsn: Lsn,
    kept: Kept<KEPT>,
    /// Bytes that were given.
    have: u64,
    /// CRC over the data, without the header.
    crc: u32,
}

impl Open {
    fn length(&self) -> Option<u32> {
        u32_at(self.kept.get(), 0)
    }

    fn has_possible_length(&self) -> bool {
        self.length().is_some_and(|length| (24..=MAX_RECORD).contains(&length))
    }

    /// How many bytes there must be before the record can be judged further.
    fn wanted(&self) -> u64 {
        match self.length() {
            None => 4,
            Some(length) if self.has_possible_length() => length.into(),
            Some(_) => RECORD_HEADER as u64,
        }
    }
}

impl WalChecker {
    /// A checker for WAL of `timeline` from `start` on. Nothing is known of what lies before.
    ///
    /// With the timeline's `history`, each page must be of the timeline that owned its position.
    pub fn new(
        system_identifier: SystemId,
        segment_size: SegmentSize,
        timeline: TimelineId,
        history: Option<TimelineHistory>,
        start: Lsn,
    ) -> Self {
        Self::with_witness(system_identifier, segment_size, timeline, history, start, ())
    }
}

impl<W: Witness> WalChecker<W> {
    /// As [`WalChecker::new`], with somebody who reads along.
    pub fn with_witness(
        system_identifier: SystemId,
        segment_size: SegmentSize,
        timeline: TimelineId,
        history: Option<TimelineHistory>,
        start: Lsn,
        witness: W,
    ) -> Self {
        Self {
            system_identifier,
            segment_size,
            block_size: USUAL_BLOCK,
            magic: None,
            history,
            newest: timeline,
            timeline: TimelineId(0),
            at: start,
            header: Kept::EMPTY,
            in_header: false,
            given: Vec::new(),
            place: Place::Unknown,
            previous: None,
            gave_up: None,
            doubt: None,
            reeling: false,
            faults: Vec::new(),
            records: 0,
            last_record: None,
            ends: None,
            witness,
        }
    }

    /// Who reads along.
    pub fn witness(&self) -> &W {
        &self.witness
    }

    /// Goes on along a timeline that begins with what was checked so far.
    pub fn follow(&mut self, timeline: TimelineId, history: Option<TimelineHistory>) {
        self.newest = timeline;
        self.history = history;
        self.records = 0;
        self.last_record = None;
        self.ends = None;
        self.faults.clear();
    }

    /// Goes on elsewhere: what lies between is not there. An open doubt is dropped; see [`WalChecker::settle`].
    pub fn skip_to(&mut self, lsn: Lsn) {
        self.at = lsn;
        self.in_header = false;
        self.given.clear();
        self.place = Place::Unknown;
        self.previous = None;
        self.gave_up = None;
        self.doubt = None;
        self.reeling = false;
    }

    /// The position of the next byte.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// How many records were found whole and right.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Where the last record begins that was whole and right.
    pub fn last_record(&self) -> Option<Lsn> {
        self.last_record
    }

    /// The end of valid WAL: what was given last, up to where nothing valid follows.
    pub fn end(&self) -> Lsn {
        match (self.doubt, self.place) {
            (Some(doubt), _) => doubt.fault.lsn,
            (None, Place::Record(open)) => open.lsn,
            _ => self.at,
        }
    }

    /// What was found wrong since the last call.
    pub fn take_faults(&mut self) -> Vec<WalFault> {
        std::mem::take(&mut self.faults)
    }

    /// The transactions that ended since the last call.
    pub fn take_ends(&mut self) -> Option<PassedEnds> {
        self.ends.take()
    }

    /// Makes a fault of an open doubt, because more WAL is known to follow what was given, or because what was given cannot have ended
    /// otherwise than whole. With `may_end_in_zeroes`, WAL that ends in nothing but zeroes has just ended.
    pub fn settle(&mut self, may_end_in_zeroes: bool) {
        if self.doubt.is_some_and(|doubt| !(may_end_in_zeroes && doubt.is_zeroes)) {
            self.confirm();
        }
    }

    /// Checks bytes that continue where the last ones ended.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let in_page = self.at.0 % self.block_size;
            if in_page == 0 && !self.in_header {
                self.in_header = true;
                self.header = Kept::EMPTY;
            }
            let used = if self.in_header {
                let wanted = self.header_length(self.page_start()).saturating_sub(self.header.len);
                let now = bytes.get(..wanted.min(bytes.len())).unwrap_or(bytes);
                self.header.add(now);
                self.at = self.at.advance(now.len() as u64);
                if now.len() == wanted {
                    self.in_header = false;
                    self.page();
                    self.given.clear();
                }
                now.len()
            } else {
                let here = usize::try_from(self.block_size - in_page).unwrap_or(usize::MAX).min(bytes.len());
                let used = self.body(bytes.get(..here).unwrap_or(bytes));
                self.given.extend_from_slice(bytes.get(..used).unwrap_or_default());
                self.at = self.at.advance(used as u64);
                // A record is judged once its last byte is counted.
                self.judge();
                used
            };
            bytes = bytes.get(used..).unwrap_or_default();
            if self.at.0 == u64::MAX {
                return;
            }
        }
    }

    fn page_start(&self) -> Lsn {
        Lsn(self.at.0 - self.header.len as u64)
    }

    fn header_length(&self, page: Lsn) -> usize {
        if page.0.is_multiple_of(self.segment_size.bytes()) { LONG_HEADER } else { SHORT_HEADER }
    }

    fn doubt(&mut self, lsn: Lsn, what: &'static str, is_zeroes: bool) {
        if self.doubt.is_none() && !self.reeling {
            self.doubt = Some(Doubt { fault: WalFault { lsn, what }, is_zeroes });
        }
    }

    fn confirm(&mut self) {
        if let Some(doubt) = self.doubt.take() {
            self.faults.push(doubt.fault);
        }
    }

    /// Notes what cannot be the end of WAL.
    fn fault(&mut self, lsn: Lsn, what: &'static str) {
        self.confirm();
        if !self.reeling {
            self.faults.push(WalFault { lsn, what });
            self.reeling = true;
        }
    }

    /// Judges the header of a page.
    fn page(&mut self) {
        let start = self.page_start();
        if start.0.is_multiple_of(self.segment_size.bytes()) && matches!(self.place, Place::Switched) {
            self.place = Place::Between;
        }
        if matches!(self.place, Place::Switched) {
            // Written as zeroes since 11, to compress well; as a page like any other before.
            if !self.header.is_zero() && self.page_header(start).is_err() {
                self.fault(start, "the rest of the segment behind a switch is not empty");
            }
            return;
        }
        match self.page_header(start) {
            Err(what) => {
                if let Place::Record(open) = self.place
                    && !open.has_possible_length()
                {
                    // Its header would go on here. Zeroes are where WAL ends.
                    let is_zeroes = open.kept.get().iter().all(|byte| *byte == 0);
                    self.doubt(open.lsn, "there is no record where one has to begin", is_zeroes);
                    self.lose();
                    return;
                }
                if let Place::Record(open) = self.place
                    && self.is_followed(&open, start)
                {
                    self.fault(open.lsn, "a record's length is damaged");
                    self.lose();
                    return;
                }
                // What belongs to the page is looked at all the same: if it is right, the header alone is damaged.
                let is_zeroes = self.header.is_zero() && !matches!(self.place, Place::Record(_) | Place::Rest(_));
                self.doubt(start, what, is_zeroes);
            }
            Ok(header) => {
                // Only WAL that goes on gets here.
                self.confirm();
                self.magic = Some(header.magic);
                self.timeline = header.timeline;
                self.continue_on(start, header);
            }
        }
    }

    /// True when behind the beginning of a record, on the page before `next`, stands one that follows it: what seems to run over the
    /// end of the page does not.
    fn is_followed(&self, open: &Open, next: Lsn) -> bool {
        let Some(behind) = next.0.checked_sub(open.lsn.0).and_then(|n| usize::try_from(n).ok()) else { return false };
        let rest = self.given.len().checked_sub(behind).and_then(|from| self.given.get(from..)).unwrap_or_default();
        // Its header, then the link in the header of another at a multiple of 8.
        rest.chunks_exact(8).skip(4).any(|word| u64_at(word, 0) == Some(open.lsn.0))
    }

    /// Goes on with what the page before left open, on a page that is right.
    fn continue_on(&mut self, start: Lsn, header: WalPageHeader) {
        let remaining = u64::from(header.remaining);
        if header.gives_up_record() {
            let record = match self.place {
                Place::Record(open) => Some(open.lsn),
                Place::Between => {
                    self.fault(start, "a page gives up a record, and there is none to give up");
                    None
                }
                _ => None,
            };
            self.gave_up = Some(GaveUp { record });
            self.place = Place::Between;
            return;
        }
        let fits = match self.place {
            Place::Record(open) => {
                let left = open.wanted().saturating_sub(open.have);
                let fits = open.has_possible_length() && header.continues_record() && remaining == left;
                if !fits {
                    self.fault(open.lsn, "a record is not continued by the page that follows it");
                }
                fits
            }
            Place::Rest(left) => {
                let fits = header.continues_record() && remaining == left;
                if !fits {
                    self.fault(start, "a page does not continue the record of the page before it");
                }
                fits
            }
            Place::Between => {
                if header.continues_record() {
                    self.fault(start, "a page continues a record that had ended");
                }
                !header.continues_record()
            }
            Place::Unknown => false,
            Place::Switched => true,
        };
        if !fits {
            self.place = if header.continues_record() { Place::Rest(remaining) } else { Place::Between };
            self.previous = None;
        }
    }

    /// Parses the header of the page at `start`, and says what is wrong with it.
    fn page_header(&mut self, start: Lsn) -> Result<WalPageHeader, &'static str> {
        let bytes = self.header.get();
        let header = WalPageHeader::parse(bytes).ok_or("a page has no header")?;
        let is_first = start.0.is_multiple_of(self.segment_size.bytes());
        if self.magic.is_some_and(|magic| magic != header.magic) {
            return Err("a page has another magic than those before it");
        }
        if header.address != start {
            return Err("a page is not of its position");
        }
        if (header.flags & IS_LONG != 0) != is_first {
            return Err("a page's header has not the length that its place demands");
        }
        if u32_at(bytes, 20) != Some(0) {
            return Err("a page's header is not padded with zeroes");
        }
        if !header.continues_record() && header.remaining != 0 {
            return Err("a page counts bytes of a record that it does not continue");
        }
        if header.timeline > self.newest || header.timeline < self.timeline {
            return Err("a page is of another timeline");
        }
        if self.history.as_ref().is_some_and(|history| history.timeline_at(start) != header.timeline) {
            return Err("a page is of another timeline than the one that owned its position");
        }
        if is_first {
            if u64_at(bytes, 24) != Some(self.system_identifier.0) {
                return Err("a segment was written by another cluster");
            }
            if u32_at(bytes, 32).map(u64::from) != Some(self.segment_size.bytes()) {
                return Err("a segment is of another size");
            }
            let block = u32_at(bytes, 36).unwrap_or_default();
            let is_possible = block.is_power_of_two() && (1 << 10..=64 << 10).contains(&block);
            if !is_possible || (self.magic.is_some() && u64::from(block) != self.block_size) {
                return Err("a segment has pages of another size");
            }
            self.block_size = block.into();
        }
        Ok(header)
    }

    /// Takes bytes of a page's body, at least one; says how many.
    fn body(&mut self, bytes: &[u8]) -> usize {
        match &mut self.place {
            Place::Unknown => bytes.len(),
            Place::Rest(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= n as u64;
                if *left == 0 {
                    self.place = Place::Between;
                }
                n
            }
            Place::Switched => {
                if bytes.iter().any(|byte| *byte != 0) {
                    self.fault(self.at, "the rest of the segment behind a switch is not empty");
                }
                bytes.len()
            }
            Place::Between if !self.at.0.is_multiple_of(8) => {
                let n = usize::try_from(8 - self.at.0 % 8).unwrap_or(8).min(bytes.len());
                if self.doubt.is_none() && bytes.iter().take(n).any(|byte| *byte != 0) {
                    self.fault(self.at, "a record is not padded with zeroes");
                }
                n
            }
            Place::Between => {
                self.place = Place::Record(Open { lsn: self.at, kept: Kept::EMPTY, have: 0, crc: 0 });
                self.witness.begin(self.at);
                self.body(bytes)
            }
            Place::Record(open) => {
                let n = usize::try_from(open.wanted() - open.have).unwrap_or(usize::MAX).min(bytes.len());
                let now = bytes.get(..n).unwrap_or(bytes);
                open.kept.add(now);
                self.witness.bytes(now);
                let of_header = usize::try_from((RECORD_HEADER as u64).saturating_sub(open.have)).unwrap_or(0);
                open.crc = crc32c::crc32c_append(open.crc, now.get(of_header..).unwrap_or_default());
                open.have += n as u64;
                n
            }
        }
    }

    /// Judges the record that ended with the last byte, if one did.
    fn judge(&mut self) {
        let Place::Record(open) = self.place else { return };
        if open.have < 4 || open.have < open.wanted() {
            return;
        }
        let bytes = open.kept.get();
        let previous = u64_at(bytes, 8).map(Lsn).unwrap_or_default();
        let is_linked = self.previous.map_or(previous < open.lsn, |known| known == previous);
        // A position of 64 bits is not where it belongs by chance. Where it is not known which that is: recycled WAL is older by a segment.
        let is_near = is_linked && open.lsn.0 - previous.0 < self.segment_size.bytes();
        let is_meant = self.doubt.is_none() && self.previous.map_or(is_near, |known| known == previous);
        if !open.has_possible_length() {
            if is_meant {
                self.fault(open.lsn, "a record's length is impossible");
            } else if bytes.iter().all(|byte| *byte == 0) {
                self.doubt(open.lsn, "there is no record where one has to begin", true);
            } else {
                self.doubt(open.lsn, "a record's length is impossible", false);
            }
            self.lose();
            return;
        }
        let stored = u32_at(bytes, CRC_OFFSET).unwrap_or_default();
        let header = bytes.get(..CRC_OFFSET).unwrap_or_default();
        if crc32c::crc32c_append(open.crc, header) == stored {
            if !is_linked {
                self.doubt(open.lsn, "a record does not follow the one before it", false);
                // It is whole. If the next one follows it, the fault is at the joint.
                self.previous = Some(open.lsn);
                self.place = Place::Between;
                return;
            }
            self.confirm();
            self.reeling = false;
            self.pass(&open);
            return;
        }
        let right_link = |known: Lsn| {
            let mut header = [0; CRC_OFFSET];
            header.copy_from_slice(bytes.get(..CRC_OFFSET).unwrap_or(&[0; CRC_OFFSET]));
            if let Some(place) = header.get_mut(8..16) {
                place.copy_from_slice(&known.0.to_le_bytes());
            }
            crc32c::crc32c_append(open.crc, &header) == stored
        };
        if self.previous.is_some_and(right_link) {
            self.fault(open.lsn, "a record's link to the one before it is damaged");
        } else if is_meant {
            self.fault(open.lsn, "a record's CRC does not match");
        } else {
            self.doubt(open.lsn, "a record's CRC does not match", false);
            self.lose();
            return;
        }
        self.previous = Some(open.lsn);
        self.place = Place::Between;
    }

    fn lose(&mut self) {
        self.place = Place::Unknown;
        self.previous = None;
        self.gave_up = None;
    }

    /// Goes past a record that is whole and right.
    fn pass(&mut self, open: &Open) {
        self.witness.whole();
        let bytes = open.kept.get();
        let [resource_manager, info] = [bytes.get(17), bytes.get(16)].map(|byte| byte.copied().unwrap_or_default());
        self.records += 1;
        self.last_record = Some(open.lsn);
        self.previous = Some(open.lsn);
        self.place = Place::Between;
        let operation = (resource_manager == RM_XLOG).then_some(info & RMGR_INFO);
        let length = usize::try_from(open.length().unwrap_or_default()).unwrap_or(usize::MAX);
        let main_data = || main_data_place(bytes, length).map(|(offset, _)| offset);
        let is_overwrite = operation == Some(XLOG_OVERWRITE_CONTRECORD);
        match self.gave_up.take() {
            Some(gave_up) => {
                let names = main_data().and_then(|offset| u64_at(bytes, offset)).map(Lsn);
                if !is_overwrite || gave_up.record.is_some_and(|record| names != Some(record)) {
                    self.fault(open.lsn, "a page gives up a record, and the next record does not say so");
                }
            }
            None if is_overwrite => self.fault(open.lsn, "a record says that another was given up, and its page does not"),
            None => {}
        }
        if operation == Some(XLOG_SWITCH) {
            self.place = Place::Switched;
        }
        if resource_manager == RM_XACT && timed_transaction_end(info) {
            let time = main_data().and_then(|offset| i64_at(bytes, offset)).and_then(timestamp_from_pg);
            if let Some(time) = time {
                let end = PassedEnd { lsn: open.lsn, time };
                let before = self.ends.unwrap_or(PassedEnds { first: end, last: end, latest: end });
                let latest = if end.time >= before.latest.time { end } else { before.latest };
                self.ends = Some(PassedEnds { last: end, latest, ..before });
            }
        }
    }
}

#[cfg(test)]
mod tests;
