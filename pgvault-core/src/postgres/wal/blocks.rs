//! What stands between the header of a record and its data: references to blocks, and how long everything behind them is.
//!
//! Sources: `src/include/access/xlogrecord.h`, and `DecodeXLogRecord` in `src/backend/access/transam/xlogreader.c`. The same since
//! 9.5 but for how an image names its compression, which 15 changed.

use super::super::bytes::{u16_at, u32_at};
use super::record::RECORD_HEADER;

/// `MAIN_FORKNUM`: the fork that holds a relation's rows.
pub(super) const MAIN_FORK: u8 = 0;

/// `XLR_MAX_BLOCK_ID`.
const MAX_BLOCK_ID: u8 = 32;

/// The longest header of a record with all that follows it up to the data: every block reference there can be, with an image each
/// and a relation of its own, then the origin, the transaction, and the length of the main data.
pub(super) const LONGEST_HEADERS: usize = RECORD_HEADER + (MAX_BLOCK_ID as usize + 1) * (4 + 7 + 12 + 4) + 3 + 5 + 5;

/// A block that a record changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockReference {
    /// The fork of the relation, as PostgreSQL numbers them.
    pub(super) fork: u8,
    pub(super) relation: Locator,
}

/// `RelFileLocator` (`RelFileNode` before 16): where a relation's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Locator {
    /// The database's oid; 0 for what all databases share.
    pub(super) database: u32,
    /// The number in the file's name.
    pub(super) filenode: u32,
}

impl Locator {
    /// Bytes of one.
    pub(super) const BYTES: usize = 12;

    /// Reads one: tablespace, database, number.
    pub(super) fn at(bytes: &[u8], offset: usize) -> Option<Self> {
        let database = u32_at(bytes, offset.checked_add(4)?)?;
        let filenode = u32_at(bytes, offset.checked_add(8)?)?;
        Some(Self { database, filenode })
    }
}

/// Offset and length of the main data of a record; see [`walk`].
pub(super) fn main_data_place(bytes: &[u8], length: usize) -> Option<(usize, usize)> {
    walk(bytes, length, |_| {})
}

/// Tells of every block that a record of `length` bytes refers to; returns offset and length of its main data, as
/// `DecodeXLogRecord` finds them: inner headers first, in them the lengths, then the data of the blocks, then the main data at the
/// very end. Of the record no more is needed than its headers. `None` when they do not add up.
pub(super) fn walk(bytes: &[u8], length: usize, mut on_block: impl FnMut(BlockReference)) -> Option<(usize, usize)> {
    const DATA_SHORT: u8 = 255;
    const DATA_LONG: u8 = 254;
    const ORIGIN: u8 = 253;
    const TOP_LEVEL_XID: u8 = 252;
    const FORK: u8 = 0x0F;
    const HAS_IMAGE: u8 = 0x10;
    const SAME_RELATION: u8 = 0x80;
    const IMAGE_HAS_HOLE: u8 = 0x01;
    const IMAGE_COMPRESSED: u8 = 0x04 | 0x08 | 0x10;

    let mut at = RECORD_HEADER;
    let mut block_data = 0usize;
    let mut relation = None;
    loop {
        // The headers end where the data that they announced fills the rest.
        if length.checked_sub(at)? == block_data {
            return Some((length, 0));
        }
        match *bytes.get(at)? {
            DATA_SHORT => {
                let main = usize::from(*bytes.get(at + 1)?);
                return Some((length.checked_sub(main).filter(|o| *o >= at + 2)?, main));
            }
            DATA_LONG => {
                let main = usize::try_from(u32_at(bytes, at + 1)?).ok()?;
                return Some((length.checked_sub(main).filter(|o| *o >= at + 5)?, main));
            }
            ORIGIN => at += 3,
            TOP_LEVEL_XID => at += 5,
            block if block <= MAX_BLOCK_ID => {
                let flags = *bytes.get(at + 1)?;
                block_data = block_data.checked_add(usize::from(u16_at(bytes, at + 2)?))?;
                at += 4;
                if flags & HAS_IMAGE != 0 {
                    block_data = block_data.checked_add(usize::from(u16_at(bytes, at)?))?;
                    let image = *bytes.get(at + 4)?;
                    at += if image & IMAGE_COMPRESSED != 0 && image & IMAGE_HAS_HOLE != 0 { 7 } else { 5 };
                }
                if flags & SAME_RELATION == 0 {
                    relation = Some(Locator::at(bytes, at)?);
                    at += Locator::BYTES;
                }
                at += 4;
                on_block(BlockReference { fork: flags & FORK, relation: relation? });
            }
            _ => return None,
        }
    }
}
