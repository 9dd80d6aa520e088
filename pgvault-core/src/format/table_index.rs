//! Where the chunks of a snapshot's two tables lie.
//!
//! In the manifest's own object as long as they are small, which saves requests. A large cluster's tables outgrow an object;
//! then all of their chunks are the frames of meta packs, the *table packs*, and the index names those with the digest of
//! each chunk. The chunks of the pack table come first, those of the file table follow.

use super::pack_table::PackRef;
use super::{Cursor, FormatError, put_varint};

/// A meta pack that holds chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePack {
    /// The pack.
    pub pack: PackRef,
    /// The digest of each of its frames, all of which are chunks.
    pub digests: Vec<[u8; 16]>,
}

/// What a manifest says about its tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableIndex {
    /// Chunks of the pack table.
    pub pack_chunks: u32,
    /// Chunks of the file table.
    pub file_chunks: u32,
    /// The packs that hold them, in order; none when the manifest's object does.
    pub packs: Vec<TablePack>,
}

impl TableIndex {
    /// The index's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for number in [self.pack_chunks as usize, self.file_chunks as usize, self.packs.len()] {
            put_varint(&mut out, number as u64);
        }
        for TablePack { pack, digests } in &self.packs {
            pack.encode(&mut out);
            put_varint(&mut out, digests.len() as u64);
            out.extend_from_slice(digests.as_flattened());
        }
        out
    }

    /// Reads an index.
    ///
    /// # Errors
    /// When it is cut short, has bytes left over, names packs out of order, or its packs do not hold exactly its chunks.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new("table index", bytes);
        let (pack_chunks, file_chunks): (u32, u32) = (cursor.number()?, cursor.number()?);
        let count = cursor.count(PackRef::MIN_LEN + 1 + 16)?;
        let mut packs: Vec<TablePack> = Vec::with_capacity(count);
        let mut held = 0;
        for _ in 0..count {
            let pack = PackRef::parse(&mut cursor)?;
            if packs.last().is_some_and(|last| last.pack.id >= pack.id) {
                return Err(cursor.error("is not sorted"));
            }
            let frames = cursor.count(16)?;
            if frames == 0 {
                return Err(cursor.error("names a pack without chunks"));
            }
            held += frames as u64;
            packs.push(TablePack { pack, digests: cursor.take(frames * 16)?.as_chunks().0.to_vec() });
        }
        if count > 0 && held != u64::from(pack_chunks) + u64::from(file_chunks) {
            return Err(cursor.error("does not say where every chunk is"));
        }
        cursor.finish()?;
        Ok(Self { pack_chunks, file_chunks, packs })
    }

    /// The table pack that holds chunk `number`, and the frame it is; `None` when no table pack does.
    pub fn locate(&self, number: u32) -> Option<(&TablePack, u32)> {
        let mut frame = number as usize;
        for pack in &self.packs {
            if frame < pack.digests.len() {
                return Some((pack, u32::try_from(frame).ok()?));
            }
            frame -= pack.digests.len();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::pack_table::PackKind;

    fn table_pack(id: u8, frames: usize) -> TablePack {
        let frames_of = u32::try_from(frames).unwrap();
        let pack = PackRef {
            id: [id; 16],
            kind: PackKind::Meta,
            size: 20 << 20,
            footer_len: 200,
            frames: frames_of,
            live: frames_of,
            sha256: [id; 32],
        };
        TablePack { pack, digests: vec![[id; 16]; frames] }
    }

    proptest! {
        #[test]
        fn indexes_round_trip(lens in prop::collection::vec(1usize..9, 0..6), split: u32) {
            let packs: Vec<_> = (0..).zip(&lens).map(|(id, frames)| table_pack(id, *frames)).collect();
            let held = u32::try_from(lens.iter().sum::<usize>()).unwrap();
            let pack_chunks = split.min(if packs.is_empty() { u32::MAX } else { held });
            let index = TableIndex { pack_chunks, file_chunks: held.saturating_sub(pack_chunks), packs };
            prop_assert_eq!(TableIndex::parse(&index.encode()).unwrap(), index);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = TableIndex::parse(&bytes);
        }
    }

    #[test]
    fn every_chunk_has_one_place() {
        let index = TableIndex { pack_chunks: 1, file_chunks: 4, packs: vec![table_pack(1, 2), table_pack(2, 3)] };
        let places: Vec<_> = (0..6).map(|chunk| index.locate(chunk).map(|(pack, frame)| (pack.pack.id[0], frame))).collect();
        assert_eq!(places, [Some((1, 0)), Some((1, 1)), Some((2, 0)), Some((2, 1)), Some((2, 2)), None]);
        assert_eq!(TableIndex { pack_chunks: 1, ..TableIndex::default() }.locate(0), None);
    }

    #[test]
    fn an_index_that_does_not_add_up_is_refused() {
        let whole = TableIndex { pack_chunks: 1, file_chunks: 4, packs: vec![table_pack(1, 2), table_pack(2, 3)] };
        for wrong in [
            TableIndex { file_chunks: 3, ..whole.clone() },
            TableIndex { pack_chunks: u32::MAX, file_chunks: u32::MAX, ..whole.clone() },
            TableIndex { packs: vec![table_pack(1, 5), table_pack(2, 0)], ..whole.clone() },
            TableIndex { packs: vec![table_pack(2, 3), table_pack(1, 2)], ..whole.clone() },
            TableIndex { packs: vec![table_pack(1, 2), table_pack(1, 3)], ..whole.clone() },
        ] {
            assert!(TableIndex::parse(&wrong.encode()).is_err(), "{wrong:?}");
        }
        let bytes = whole.encode();
        assert!((0..bytes.len()).all(|len| TableIndex::parse(&bytes[..len]).is_err()));
        assert!(TableIndex::parse(&[&bytes[..], &[0]].concat()).is_err());
    }
}
