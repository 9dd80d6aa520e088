//! The packs a snapshot needs, with the sizes and hashes that let a check and a restore trust them.
//!
//! A petabyte has thirty million of them, so the table is cut into chunks of at most one frame, like the file table.

use super::map::PackId;
use super::{Cursor, FormatError, MAX_FRAME, put_varint};

/// A pack as a snapshot knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PackRef {
    /// The pack's ULID.
    pub id: PackId,
    /// Its stored size in bytes.
    pub size: u64,
    /// Length of its sealed footer, so that one range read fetches it.
    pub footer_len: u32,
    /// The hash in its tail.
    pub sha256: [u8; 32],
}

impl PackRef {
    /// The fewest bytes that an entry takes.
    pub(super) const MIN_LEN: usize = 16 + 1 + 1 + 32;
    /// The most: both numbers at their longest.
    const MAX_LEN: usize = 16 + 10 + 5 + 32;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id);
        put_varint(out, self.size);
        put_varint(out, u64::from(self.footer_len));
        out.extend_from_slice(&self.sha256);
    }

    pub(super) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, FormatError> {
        Ok(Self { id: cursor.array()?, size: cursor.varint()?, footer_len: cursor.number()?, sha256: cursor.array()? })
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
        fn tables_round_trip(ids in prop::collection::btree_set(any::<[u8; 16]>(), 0..40), size: u64, footer_len: u32) {
            let packs: Vec<_> = ids.into_iter().map(|id| PackRef { id, size, footer_len, sha256: [8; 32] }).collect();
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
        let pack = |n: u128| PackRef { id: n.to_be_bytes(), size: u64::MAX, footer_len: u32::MAX, sha256: [1; 32] };
        let packs: Vec<_> = (0..70_000).map(pack).collect();
        let chunks = encode(&packs);
        assert_eq!(chunks.len(), 2);
        assert!(chunks.iter().all(|chunk| chunk.len() <= MAX_FRAME));
        assert_eq!(chunks.iter().flat_map(|chunk| parse_chunk(chunk).unwrap()).collect::<Vec<_>>(), packs);
    }
}
