//! File maps: where each block of a file lies.
//!
//! A map is complete for its part of a file, so a snapshot restores without reading any other snapshot. It names packs by their
//! own ids in a table of its own: where nothing changed, later snapshots refer to it as it is. So that little has to be
//! written anew where little changed, the map of a large file is cut into *sections* of 32 MiB of the file.

use super::{BLOCK, Cursor, FormatError, MAX_FILE, REGION_BLOCKS, put_varint};

/// A pack's identity: the bytes of its ULID.
pub type PackId = [u8; 16];

/// Length of the digest kept per block for change detection.
pub const BLOCK_DIGEST: usize = 8;

/// Blocks that one section of a file's map covers; the last one covers what is left.
pub const SECTION_BLOCKS: u32 = 4096;

/// Bytes of a file that one section covers.
pub const SECTION: u64 = SECTION_BLOCKS as u64 * BLOCK as u64;

/// Sections of the map of a file of `file_len` bytes.
pub fn sections(file_len: u64) -> u32 {
    u32::try_from(file_len.div_ceil(SECTION)).unwrap_or(u32::MAX)
}

/// Bytes of the file that section `number` covers.
pub fn section_len(file_len: u64, number: u32) -> u64 {
    file_len.saturating_sub(u64::from(number) * SECTION).min(SECTION)
}

/// Where a run of blocks lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Blocks that are all zero; nothing is stored for them.
    Zero {
        /// How many blocks.
        blocks: u32,
    },
    /// Blocks inside one frame.
    Stored {
        /// How many blocks.
        blocks: u32,
        /// Index into [`FileMap::packs`].
        pack: u32,
        /// Which frame of the pack.
        frame: u32,
        /// The first block's place in the frame, in blocks.
        slot: u32,
    },
}

impl Extent {
    /// How many blocks the extent covers.
    pub fn blocks(self) -> u32 {
        match self {
            Self::Zero { blocks } | Self::Stored { blocks, .. } => blocks,
        }
    }
}

/// The blocks of one section of a file, or of a small file, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileMap {
    /// Packs that the extents point into.
    pub packs: Vec<PackId>,
    /// Runs of blocks from the section's start to its end.
    pub extents: Vec<Extent>,
    /// One keyed digest per *stored* block, in order, for change detection by the next backup.
    pub digests: Vec<[u8; BLOCK_DIGEST]>,
}

impl FileMap {
    /// Blocks that a file of `bytes` bytes has.
    pub fn blocks_for(bytes: u64) -> u64 {
        bytes.div_ceil(BLOCK as u64)
    }

    /// The most bytes that the map of a file of `file_len` bytes has: two counts, and for each block a pack of its own (16), an
    /// extent of its own (11: numbers up to 32 blocks, 2^22 packs, 2^32 frames, 32 slots) and a digest (8).
    ///
    /// # Errors
    /// When no file is that long.
    pub fn max_len(file_len: u64) -> Result<u64, FormatError> {
        if file_len > MAX_FILE {
            return Err(FormatError::unsupported(
                "file map",
                format!("is of a file of {file_len} bytes; the format ends at {MAX_FILE}"),
            ));
        }
        Ok(10 + Self::blocks_for(file_len) * (16 + 11 + BLOCK_DIGEST as u64))
    }

    /// Blocks covered by the extents.
    pub fn blocks(&self) -> u64 {
        self.extents.iter().map(|e| u64::from(e.blocks())).sum()
    }

    /// The map's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.packs.len() * 16 + self.extents.len() * 6 + self.digests.len() * BLOCK_DIGEST);
        put_varint(&mut out, self.packs.len() as u64);
        for pack in &self.packs {
            out.extend_from_slice(pack);
        }
        put_varint(&mut out, self.extents.len() as u64);
        for extent in &self.extents {
            match *extent {
                Extent::Zero { blocks } => put_varint(&mut out, u64::from(blocks) << 1),
                Extent::Stored { blocks, pack, frame, slot } => {
                    put_varint(&mut out, u64::from(blocks) << 1 | 1);
                    put_varint(&mut out, u64::from(pack));
                    put_varint(&mut out, u64::from(frame));
                    put_varint(&mut out, u64::from(slot));
                }
            }
        }
        for digest in &self.digests {
            out.extend_from_slice(digest);
        }
        out
    }

    /// Reads the map of a file of `file_len` bytes. What is returned takes at most 44 bytes for each block of the file, and at
    /// most 20 for each byte of the map.
    ///
    /// # Errors
    /// When the map is longer than [`FileMap::max_len`], the extents do not cover the file exactly, leave their frame, or a
    /// digest is missing.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new("file map", bytes);
        if bytes.len() as u64 > Self::max_len(file_len)? {
            return Err(cursor.error(format!("has {} bytes, too many for a file of {file_len} bytes", bytes.len())));
        }
        // Every pack is named for a block, and every extent covers one.
        let blocks = Self::blocks_for(file_len);
        let count = cursor.count(16)?;
        if count as u64 > blocks {
            return Err(cursor.error(format!("names {count} packs for {blocks} blocks")));
        }
        let mut packs = Vec::with_capacity(count);
        for _ in 0..count {
            packs.push(cursor.array()?);
        }
        let count = cursor.count(1)?;
        if count as u64 > blocks {
            return Err(cursor.error(format!("has {count} extents for {blocks} blocks")));
        }
        let mut extents = Vec::with_capacity(count);
        let (mut covered, mut stored) = (0u64, 0u64);
        for _ in 0..count {
            let head = cursor.varint()?;
            let blocks = u32::try_from(head >> 1).ok().filter(|&b| b > 0).ok_or_else(|| cursor.error("has an empty extent"))?;
            covered = covered.saturating_add(u64::from(blocks));
            if head & 1 == 0 {
                extents.push(Extent::Zero { blocks });
                continue;
            }
            let (pack, frame, slot): (u32, u32, u32) = (cursor.number()?, cursor.number()?, cursor.number()?);
            let in_frame = u64::from(slot) + u64::from(blocks) <= REGION_BLOCKS as u64;
            if pack as usize >= packs.len() || !in_frame {
                return Err(cursor.error("has an extent outside its pack or frame"));
            }
            stored += u64::from(blocks);
            extents.push(Extent::Stored { blocks, pack, frame, slot });
        }
        if covered != Self::blocks_for(file_len) {
            return Err(cursor.error(format!("covers {covered} blocks of a file of {file_len} bytes")));
        }
        if cursor.remaining() as u64 != stored.saturating_mul(BLOCK_DIGEST as u64) {
            return Err(cursor.error("does not hold one digest per stored block"));
        }
        let digests = cursor.take(cursor.remaining())?.as_chunks::<BLOCK_DIGEST>().0.to_vec();
        Ok(Self { packs, extents, digests })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent() -> impl Strategy<Value = Extent> {
        prop_oneof![
            (1u32..10_000).prop_map(|blocks| Extent::Zero { blocks }),
            (1u32..=32, 0u32..4, any::<u32>(), 0u32..32).prop_map(|(blocks, pack, frame, slot)| Extent::Stored {
                blocks: blocks.min(32 - slot),
                pack,
                frame,
                slot
            }),
        ]
    }

    proptest! {
        #[test]
        fn maps_round_trip(mut extents in prop::collection::vec(extent(), 0..100), short in 0u64..8192) {
            // As many blocks as packs.
            extents.push(Extent::Zero { blocks: 4 });
            let stored: usize = extents.iter().map(|e| match e { Extent::Stored { blocks, .. } => *blocks as usize, Extent::Zero { .. } => 0 }).sum();
            let map = FileMap { packs: vec![[9; 16]; 4], extents, digests: vec![[3; 8]; stored] };
            let len = (map.blocks() * BLOCK as u64).saturating_sub(short);
            prop_assert_eq!(FileMap::parse(&map.encode(), len).unwrap(), map);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>, len: u64) {
            let _ = FileMap::parse(&bytes, len);
        }
    }
}
