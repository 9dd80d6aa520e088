//! The packs a snapshot needs, with the sizes and hashes that let a check and a restore trust them.
//!
//! A petabyte has thirty million of them, so the table is cut into chunks of at most one frame, like the file table.

use super::map::PackId;
use super::{Cursor, FormatError, MAX_FRAME, REGION_BLOCKS, put_varint};

/// What the frames of a pack are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PackKind {
    /// Blocks of files.
    Data,
    /// Sections of file maps, or chunks of tables.
    Meta,
}

/// A pack as a snapshot knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PackRef {
    /// The pack's ULID.
    pub id: PackId,
    /// What it holds.
    pub kind: PackKind,
    /// Its stored size in bytes.
    pub size: u64,
    /// Length of its sealed footer, so that one range read fetches it.
    pub footer_len: u32,
    /// How many frames it has.
    pub frames: u32,
    /// How much of it this snapshot refers to: blocks of a data pack, frames of a meta pack. The rest is needed by older
    /// snapshots, or by none.
    pub live: u32,
    /// The hash in its tail.
    pub sha256: [u8; 32],
}

impl PackRef {
    /// The fewest bytes that an entry takes.
    pub(super) const MIN_LEN: usize = 16 + 5 + 32;
    /// The most: all numbers at their longest.
    const MAX_LEN: usize = 16 + 1 + 10 + 5 + 5 + 5 + 32;

    /// What [`PackRef::live`] could be at most; the last frames of a data pack may be shorter.
    pub fn capacity(&self) -> u64 {
        let each = if self.kind == PackKind::Data { REGION_BLOCKS as u64 } else { 1 };
        u64::from(self.frames) * each
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id);
        out.push(if self.kind == PackKind::Data { 1 } else { 2 });
        put_varint(out, self.size);
        for number in [self.footer_len, self.frames, self.live] {
            put_varint(out, u64::from(number));
        }
        out.extend_from_slice(&self.sha256);
    }

    pub(super) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, FormatError> {
        let id = cursor.array()?;
        let kind = match cursor.u8()? {
            1 => PackKind::Data,
            2 => PackKind::Meta,
            other => return Err(FormatError::unsupported("pack table", format!("unknown kind {other} of pack"))),
        };
        let (size, footer_len, frames, live) = (cursor.varint()?, cursor.number()?, cursor.number()?, cursor.number()?);
        let pack = Self { id, kind, size, footer_len, frames, live, sha256: cursor.array()? };
        if u64::from(live) > pack.capacity() {
            return Err(cursor.error(format!("says that {live} of {} are used", pack.capacity())));
        }
        Ok(pack)
    }
}

/// The table's chunks, in order. `packs` are sorted by id.
pub fn encode(packs: &[PackRef]) -> Vec<Vec<u8>> {
    packs.chunks(MAX_FRAME / PackRef::MAX_LEN).map(encode_chunk).collect()
}

/// The bytes of one chunk.
pub fn encode_chunk(packs: &[PackRef]) -> Vec<u8> {
    let mut out = Vec::with_capacity(packs.len() * 56);
    for pack in packs {
        pack.encode(&mut out);
    }
    out
}

/// Reads packs that follow their number, in any order.
pub(super) fn parse_list(cursor: &mut Cursor<'_>) -> Result<Vec<PackRef>, FormatError> {
    let count = cursor.count(PackRef::MIN_LEN)?;
    (0..count).map(|_| PackRef::parse(cursor)).collect()
}

/// Reads one chunk of the table.
///
/// # Errors
/// When it is cut short within an entry, or is not sorted by id without repetition.
pub fn parse_chunk(bytes: &[u8]) -> Result<Vec<PackRef>, FormatError> {
    let mut cursor = Cursor::new("pack table", bytes);
    let mut packs: Vec<PackRef> = Vec::with_capacity(bytes.len() / PackRef::MIN_LEN);
    while cursor.remaining() > 0 {
        let pack = PackRef::parse(&mut cursor)?;
        if packs.last().is_some_and(|last| last.id >= pack.id) {
            return Err(cursor.error("is not sorted"));
        }
        packs.push(pack);
    }
    Ok(packs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tables_round_trip(ids in prop::collection::btree_set(any::<[u8; 16]>(), 0..40), size: u64, footer_len: u32, frames: u32) {
            let pack = |id: [u8; 16]| PackRef { id, kind: PackKind::Meta, size, footer_len, frames, live: frames / 2, sha256: [8; 32] };
            let packs: Vec<_> = ids.into_iter().map(pack).collect();
            let read: Vec<_> = encode(&packs).iter().flat_map(|chunk| parse_chunk(chunk).unwrap()).collect();
            prop_assert_eq!(read, packs);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = parse_chunk(&bytes);
        }
    }

    #[test]
    fn the_longest_entries_fit_their_chunk() {
        let most = u32::MAX;
        let pack = |n: u128| PackRef {
            id: n.to_be_bytes(),
            kind: PackKind::Data,
            size: u64::MAX,
            footer_len: most,
            frames: most,
            live: most,
            sha256: [1; 32],
        };
        let packs: Vec<_> = (0..70_000).map(pack).collect();
        let chunks = encode(&packs);
        assert_eq!(chunks.len(), 2);
        assert!(chunks.iter().all(|chunk| chunk.len() <= MAX_FRAME));
        assert_eq!(chunks.iter().flat_map(|chunk| parse_chunk(chunk).unwrap()).collect::<Vec<_>>(), packs);
    }
}
