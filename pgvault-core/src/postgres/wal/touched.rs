//! In which relations a stretch of WAL adds or deletes rows.
//!
//! Two counts of a table's rows at two moments can be compared only by who knows what happened between them. WAL knows: every row
//! that comes or goes leaves a record, which names the file of its relation.
//!
//! | record | what it does to the number of rows that a later snapshot sees |
//! |---|---|
//! | heap `INSERT`, heap2 `MULTI_INSERT` | may add: [`Touch::Grew`] |
//! | heap `UPDATE`, `HOT_UPDATE` | nothing: one version of a row takes the place of another, whether the transaction commits or not: [`Touch::Updated`] |
//! | heap `DELETE` | may take: [`Touch::Changed`]; only a speculative insertion that takes itself back (`XLH_DELETE_IS_SUPER`) has never been seen by anybody |
//! | heap `CONFIRM`, `LOCK`, `INPLACE`, heap2 `PRUNE`, `VACUUM`, `FREEZE`, `VISIBLE`, `LOCK_UPDATED`, `NEW_CID` | nothing |
//! | heap `TRUNCATE` | nothing: it is for logical decoding. `TRUNCATE` gives the table a new file, and so does everything that rewrites one; only in a file that the same transaction has made does it cut |
//! | storage `CREATE` of a main fork | anything: what is in a file that was made meanwhile came from elsewhere |
//! | storage `TRUNCATE` | nothing: `VACUUM` cuts off pages without rows |
//! | xlog `FPI` | anything: the page may come from elsewhere |
//! | xlog `FPI_FOR_HINT` | nothing |
//! | indexes, sequences and all else of PostgreSQL's own | nothing |
//! | generic records, and those of extensions | anything |
//!
//! Files are named by their number alone, without the tablespace: two of one number in one database count as one.
//!
//! Sources: `src/include/access/heapam_xlog.h`, `rmgrlist.h`, `xact.h`, `src/include/catalog/storage_xlog.h`, `pg_control.h`,
//! `src/include/commands/dbcommands_xlog.h`. From 15 to 19 the numbers of all these are the same; 17 has renamed heap2 `PRUNE`,
//! `VACUUM` and `FREEZE_PAGE` into three kinds of `PRUNE`, and 19 has no `VISIBLE` any more.

use std::collections::{HashMap, HashSet};

use super::super::bytes::{i32_at, u32_at};
use super::super::{Lsn, SegmentSize, SystemId, TimelineHistory, TimelineId, WalSegNo};
use super::LONG_HEADER;
use super::blocks::{LONGEST_HEADERS, Locator, MAIN_FORK, walk};
use super::check::{WalChecker, WalFault};
use super::record::{RECORD_HEADER, RM_XACT, RM_XLOG, RMGR_INFO, XACT_COMMIT, XACT_COMMIT_PREPARED, XACT_HAS_INFO, XACT_OPERATION};
use super::witness::Witness;

const RM_SMGR: u8 = 2;
const RM_DBASE: u8 = 4;
const RM_HEAP2: u8 = 9;
const RM_HEAP: u8 = 10;
/// `RM_GENERIC_ID`: pages of whatever an extension keeps in them.
const RM_GENERIC: u8 = 20;
/// The last one that all versions have.
const RM_LOGICALMSG: u8 = 21;

const XLOG_FPI: u8 = 0xB0;
const SMGR_CREATE: u8 = 0x10;
const DBASE_DROP: u8 = 0x20;

/// `XLOG_HEAP_OPMASK`: without the bit that says that the page is new.
const HEAP_OPERATION: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;

/// `XLH_DELETE_IS_SUPER`, and where `xl_heap_delete` has its flags.
const DELETE_IS_SUPER: u8 = 1 << 3;
const DELETE_FLAGS: usize = 7;

/// Of the record of a commit, which names the files that it removes, no more is kept than this.
const LONGEST_COMMIT: usize = 16 << 20;

/// Files that are told apart; with more of them, all count as changed.
const MOST_RELATIONS: usize = 1_000_000;

/// What WAL did to the number of a relation's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Touch {
    /// Nothing.
    Untouched,
    /// Nothing: versions of rows were replaced by others.
    Updated,
    /// Rows may have been added, and none were deleted.
    Grew,
    /// Anything.
    Changed,
}

/// Collects what a stretch of WAL did to the rows of each relation.
///
/// The WAL is given in order and in pieces of any size, from the start of the segment that holds the stretch's start, along the
/// timelines that recovery follows.
#[derive(Debug)]
pub struct Touched {
    checker: WalChecker<Collector>,
    until: Lsn,
    fault: Option<WalFault>,
}

impl Touched {
    /// For the records that begin at `start` or behind it, and before `until`: for what recovery from a backup's start position to
    /// the position that it reached replays.
    ///
    /// `timeline` is the one that recovery ended on; its `history` says where those before it end.
    pub fn new(
        system_identifier: SystemId,
        size: SegmentSize,
        timeline: TimelineId,
        history: Option<TimelineHistory>,
        start: Lsn,
        until: Lsn,
    ) -> Self {
        let begin = WalSegNo::containing(start, size).start(size);
        // A position in the header of a segment's first page is the end of the segment before, which is all there need be.
        let until = if until.0 % size.bytes() <= LONG_HEADER as u64 { Lsn(until.0 - until.0 % size.bytes()) } else { until };
        let collector = Collector { start, until, ..Collector::default() };
        let checker = WalChecker::with_witness(system_identifier, size, timeline, history, begin, collector);
        Self { checker, until, fault: None }
    }

    /// The position of the next byte to give; at first, the start of a segment.
    pub fn position(&self) -> Lsn {
        self.checker.position()
    }

    /// True when nothing more is needed.
    pub fn is_fed(&self) -> bool {
        self.position() >= self.until
    }

    /// Takes bytes of WAL that begin at `at`, which must be [`Touched::position`]; what lies behind the end is passed over.
    ///
    /// Bytes of another position are not taken, so that [`Touched::is_complete`] stays false.
    pub fn feed(&mut self, at: Lsn, bytes: &[u8]) {
        let position = self.position();
        if at != position || self.is_fed() {
            return;
        }
        let wanted = usize::try_from(self.until.0 - position.0).unwrap_or(usize::MAX);
        self.checker.feed(bytes.get(..wanted).unwrap_or(bytes));
        let fault = self.checker.take_faults().into_iter().next();
        self.fault = self.fault.or(fault);
    }

    /// The first place that could not be read as WAL.
    pub fn fault(&self) -> Option<WalFault> {
        self.fault
    }

    /// True when every record from the start to the end was read. Until then nothing follows from what was collected.
    pub fn is_complete(&self) -> bool {
        self.is_fed() && self.fault.is_none() && self.checker.end() >= self.until && !self.checker.witness().is_confused
    }

    /// What happened to the rows of the relation whose file has this number in this database.
    pub fn kind(&self, database: u32, filenode: u32) -> Touch {
        let seen = self.checker.witness();
        if seen.everything {
            return Touch::Changed;
        }
        seen.relations.get(&(database, filenode)).map_or(Touch::Untouched, |relation| relation.touch)
    }

    /// True when a transaction that committed has removed this file, because its relation was dropped or has got another file, or
    /// when the whole database was dropped.
    pub fn was_dropped(&self, database: u32, filenode: u32) -> bool {
        let seen = self.checker.witness();
        let relation = seen.relations.get(&(database, filenode));
        seen.everything || seen.databases.contains(&database) || relation.is_some_and(|relation| relation.is_dropped)
    }

    /// True when a database of this oid was dropped, or moved to another tablespace.
    pub fn was_database_dropped(&self, database: u32) -> bool {
        let seen = self.checker.witness();
        seen.everything || seen.databases.contains(&database)
    }
}

#[derive(Debug, Clone, Copy)]
struct Relation {
    touch: Touch,
    is_dropped: bool,
}

/// Keeps of each record what is needed of it, and what follows from it.
#[derive(Debug, Default)]
struct Collector {
    start: Lsn,
    until: Lsn,
    /// The record that is being read, up to `keep` bytes of it.
    record: Vec<u8>,
    keep: usize,
    relations: HashMap<(u32, u32), Relation>,
    databases: HashSet<u32>,
    /// There were too many to tell them apart.
    everything: bool,
    /// A record was whole and right, and does not say what it must.
    is_confused: bool,
}

impl Witness for Collector {
    fn begin(&mut self, lsn: Lsn) {
        self.record.clear();
        self.keep = if lsn < self.start || lsn >= self.until { 0 } else { RECORD_HEADER };
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.record.len() < RECORD_HEADER {
            bytes = self.take(bytes);
            if let [.., info, manager, _, _, _, _, _, _] = *self.record.as_slice()
                && self.record.len() == RECORD_HEADER
            {
                self.keep = RECORD_HEADER.max(wanted(manager, info));
            }
        }
        let _ = self.take(bytes);
    }

    fn whole(&mut self) {
        let record = std::mem::take(&mut self.record);
        if record.len() >= RECORD_HEADER && self.collect(&record).is_none() {
            self.is_confused = true;
        }
        self.record = record;
        self.record.clear();
    }
}

/// How much of a record is needed: nothing behind the header of one that does nothing.
fn wanted(manager: u8, info: u8) -> usize {
    match manager {
        RM_XACT if removes_files(info) => LONGEST_COMMIT,
        RM_HEAP | RM_HEAP2 | RM_SMGR | RM_DBASE | RM_GENERIC => LONGEST_HEADERS,
        RM_XLOG if info & RMGR_INFO == XLOG_FPI => LONGEST_HEADERS,
        _ if manager > RM_LOGICALMSG => LONGEST_HEADERS,
        _ => 0,
    }
}

/// True for a commit with optional parts, of which the removed files are one.
fn removes_files(info: u8) -> bool {
    info & XACT_HAS_INFO != 0 && matches!(info & XACT_OPERATION, XACT_COMMIT | XACT_COMMIT_PREPARED)
}

impl Collector {
    /// Keeps the beginning of `bytes`, as much as is needed; returns the rest.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let n = self.keep.saturating_sub(self.record.len()).min(bytes.len());
        let (now, later) = bytes.split_at_checked(n).unwrap_or((bytes, &[]));
        self.record.extend_from_slice(now);
        later
    }

    /// Draws the conclusions from a record; `None` when its parts do not add up.
    fn collect(&mut self, record: &[u8]) -> Option<()> {
        let [info, manager] = [*record.get(16)?, *record.get(17)?];
        if wanted(manager, info) == 0 {
            return Some(());
        }
        let length = usize::try_from(u32_at(record, 0)?).ok()?;
        match manager {
            RM_XACT => self.commit(record, length),
            RM_SMGR if info & RMGR_INFO == SMGR_CREATE => {
                // xl_smgr_create: the file, then the fork.
                let (at, _) = walk(record, length, |_| {})?;
                let file = Locator::at(record, at)?;
                if i32_at(record, at.checked_add(Locator::BYTES)?)? == i32::from(MAIN_FORK) {
                    self.touch(file, Touch::Changed);
                }
                Some(())
            }
            RM_DBASE if info & RMGR_INFO == DBASE_DROP => {
                // xl_dbase_drop_rec: the database first.
                let (at, _) = walk(record, length, |_| {})?;
                self.everything |= self.databases.len() >= MOST_RELATIONS;
                if !self.everything {
                    let _ = self.databases.insert(u32_at(record, at)?);
                }
                Some(())
            }
            RM_HEAP => {
                let touch = match info & HEAP_OPERATION {
                    HEAP_INSERT => Touch::Grew,
                    HEAP_UPDATE | HEAP_HOT_UPDATE => Touch::Updated,
                    HEAP_DELETE if is_super(record, length) => return Some(()),
                    HEAP_DELETE => Touch::Changed,
                    _ => return Some(()),
                };
                self.blocks(record, length, touch)
            }
            RM_HEAP2 if info & HEAP_OPERATION == HEAP2_MULTI_INSERT => self.blocks(record, length, Touch::Grew),
            RM_HEAP2 | RM_SMGR | RM_DBASE => Some(()),
            _ => self.blocks(record, length, Touch::Changed),
        }
    }

    fn blocks(&mut self, record: &[u8], length: usize, touch: Touch) -> Option<()> {
        let mut last = None;
        walk(record, length, |block| {
            // The blocks of a record are nearly always of one relation.
            if block.fork == MAIN_FORK && last != Some(block.relation) {
                last = Some(block.relation);
                self.touch(block.relation, touch);
            }
        })?;
        Some(())
    }

    /// `xl_xact_commit` with its optional parts, as `ParseCommitRecord` finds them.
    fn commit(&mut self, record: &[u8], length: usize) -> Option<()> {
        if length > record.len() {
            // It is too long to be kept, so it may have removed any file.
            self.everything = true;
            return Some(());
        }
        let (at, _) = walk(record, length, |_| {})?;
        let data = record.get(at..)?;
        let parts = u32_at(data, 8)?;
        let mut at = 12usize;
        if parts & 1 != 0 {
            at = at.checked_add(8)?; // database and its tablespace
        }
        let count = |at: usize| usize::try_from(i32_at(data, at)?).ok();
        if parts & 2 != 0 {
            // Subtransactions.
            at = at.checked_add(4)?.checked_add(count(at)?.checked_mul(4)?)?;
        }
        if parts & 4 != 0 {
            let files = count(at)?;
            at = at.checked_add(4)?;
            // So that a wrong count is seen before it is counted to.
            let _ = data.get(at..at.checked_add(files.checked_mul(Locator::BYTES)?)?)?;
            for n in 0..files {
                let file = Locator::at(data, at + n * Locator::BYTES)?;
                if let Some(relation) = self.relation(file) {
                    relation.is_dropped = true;
                }
            }
        }
        Some(())
    }

    fn touch(&mut self, file: Locator, touch: Touch) {
        if let Some(relation) = self.relation(file) {
            relation.touch = relation.touch.max(touch);
        }
    }

    /// What is known of a file, unless there are too many.
    fn relation(&mut self, file: Locator) -> Option<&mut Relation> {
        let key = (file.database, file.filenode);
        if self.relations.len() >= MOST_RELATIONS && !self.relations.contains_key(&key) {
            self.everything = true;
            return None;
        }
        Some(self.relations.entry(key).or_insert(Relation { touch: Touch::Untouched, is_dropped: false }))
    }
}

/// True when a deletion takes back a speculative insertion. Where the record has too much before its data, it is not looked for.
fn is_super(record: &[u8], length: usize) -> bool {
    let flags = walk(record, length, |_| {}).and_then(|(at, _)| record.get(at.checked_add(DELETE_FLAGS)?).copied());
    flags.is_some_and(|flags| flags & DELETE_IS_SUPER != 0)
}

#[cfg(test)]
mod tests;
