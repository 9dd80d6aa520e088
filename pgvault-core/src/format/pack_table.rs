//! The packs a snapshot needs, with the sizes and hashes that let a keyless scrub and a restore trust them.

use super::map::PackId;
use super::{Cursor, FormatError, put_varint};

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

/// The table's bytes.
pub fn encode(packs: &[PackRef]) -> Vec<u8> {
    let mut out = Vec::with_capacity(packs.len() * 56 + 4);
    put_varint(&mut out, packs.len() as u64);
    for pack in packs {
        out.extend_from_slice(&pack.id);
        put_varint(&mut out, pack.size);
        put_varint(&mut out, u64::from(pack.footer_len));
        out.extend_from_slice(&pack.sha256);
    }
    out
}

/// Reads a table.
///
/// # Errors
/// When it is cut short, has bytes left over, or is not sorted by id without repetition.
pub fn parse(bytes: &[u8]) -> Result<Vec<PackRef>, FormatError> {
    let mut cursor = Cursor::new("pack table", bytes);
    let count = cursor.count(50)?;
    let mut packs: Vec<PackRef> = Vec::with_capacity(count);
    for _ in 0..count {
        let pack = PackRef { id: cursor.array()?, size: cursor.varint()?, footer_len: cursor.number()?, sha256: cursor.array()? };
        if packs.last().is_some_and(|last| last.id >= pack.id) {
            return Err(cursor.error("is not sorted"));
        }
        packs.push(pack);
    }
    cursor.finish()?;
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
            prop_assert_eq!(parse(&encode(&packs)).unwrap(), packs);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
