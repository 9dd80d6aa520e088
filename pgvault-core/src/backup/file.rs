//! One file on its way through the pipeline.
//!
//! Its regions are worked on by several threads in any order; the thread that finishes the last one assembles the map: from
//! sections of the parent's, where nothing changed, and new ones.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::parent::{Known, KnownBlock};
use crate::format::map::{self, BLOCK_DIGEST, Extent, FileMap, PackId};
use crate::format::{BLOCK, REGION_BLOCKS};
use crate::postgres::RelationFile;
use crate::{Error, ErrorKind};

/// Bytes of a full region.
pub(super) const REGION: usize = BLOCK * REGION_BLOCKS;

/// A part of the source cannot be read: trouble of the source, not of pgvault.
pub(super) fn unreadable(doing: &str, path: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Source, "source.file", format!("{doing} {}: {error}", path.display())).with_source(error)
}

/// Regions of a section.
const SECTION_REGIONS: usize = map::SECTION_BLOCKS as usize / REGION_BLOCKS;

/// A run of blocks within a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    Zero { blocks: u32 },
    Stored { pack: PackId, frame: u32, slot: u32, blocks: u32 },
}

/// What became of a region.
#[derive(Debug)]
pub(super) enum Placed {
    /// It is as the parent has it.
    Kept,
    /// Where its blocks are, and the digest of each that is stored.
    Made { pieces: Vec<Piece>, digests: Vec<[u8; BLOCK_DIGEST]> },
}

/// A section of a file's map.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Section {
    /// The parent's, as it is.
    Kept(PackId, u32),
    Made(FileMap),
}

/// A file being backed up.
#[derive(Debug)]
pub(super) struct FileTask {
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) len: u64,
    pub(super) relation: Option<RelationFile>,
    /// The open file, where workers read for themselves.
    pub(super) reader: Option<File>,
    /// What the parent has of it.
    pub(super) known: Known,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    placed: Vec<Option<Placed>>,
    missing: usize,
}

impl FileTask {
    pub(super) fn new(path: String, mode: u32, len: u64, reader: Option<File>, known: Known) -> Self {
        let regions = usize::try_from(len.div_ceil(REGION as u64)).unwrap_or(usize::MAX);
        let relation = RelationFile::parse(&path);
        let mut placed = Vec::new();
        placed.resize_with(regions, || None);
        Self { path, mode, len, relation, reader, known, state: Mutex::new(State { placed, missing: regions }) }
    }

    pub(super) fn regions(&self) -> u32 {
        u32::try_from(self.len.div_ceil(REGION as u64)).unwrap_or(u32::MAX)
    }

    /// Bytes of region `number`.
    pub(super) fn region_len(&self, number: u32) -> usize {
        let left = self.len.saturating_sub(u64::from(number) * REGION as u64);
        usize::try_from(left).map_or(REGION, |left| left.min(REGION))
    }

    /// What the parent has of region `number`: as many blocks as it had there.
    pub(super) fn known(&self, number: u32) -> &[KnownBlock] {
        let first = number as usize * REGION_BLOCKS;
        let blocks = &self.known.blocks;
        blocks.get(first..blocks.len().min(first + REGION_BLOCKS)).unwrap_or_default()
    }

    /// The piece that a block of the parent's is.
    pub(super) fn piece(&self, block: KnownBlock) -> Option<Piece> {
        match block {
            KnownBlock::Zero => Some(Piece::Zero { blocks: 1 }),
            KnownBlock::Stored { pack, frame, slot, .. } => {
                let pack = *self.known.packs.get(pack as usize)?;
                Some(Piece::Stored { pack, frame, slot: slot.into(), blocks: 1 })
            }
            KnownBlock::Behind => None,
        }
    }

    /// Records a region; gives the sections of the map once the last one is in.
    pub(super) fn place(&self, region: u32, placed: Placed) -> Option<Vec<Section>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = state.placed.get_mut(region as usize)?;
        if slot.replace(placed).is_none() {
            state.missing -= 1;
        }
        (state.missing == 0).then(|| self.assemble(&std::mem::take(&mut state.placed)))
    }

    fn assemble(&self, regions: &[Option<Placed>]) -> Vec<Section> {
        regions
            .chunks(SECTION_REGIONS)
            .enumerate()
            .map(|(number, regions)| {
                let first = u32::try_from(number * SECTION_REGIONS).unwrap_or(u32::MAX);
                let kept = self.known.sections.get(number).copied().flatten();
                match kept.filter(|_| regions.iter().all(|region| matches!(region, Some(Placed::Kept)))) {
                    Some((pack, frame)) => Section::Kept(pack, frame),
                    None => Section::Made(self.section(regions, first)),
                }
            })
            .collect()
    }

    /// The map of a section that begins with region `first`.
    fn section(&self, regions: &[Option<Placed>], first: u32) -> FileMap {
        let mut map = FileMap::default();
        for (region, number) in regions.iter().zip(first..) {
            match region {
                Some(Placed::Made { pieces, digests }) => {
                    for piece in pieces {
                        append(&mut map, *piece);
                    }
                    map.digests.extend_from_slice(digests);
                }
                Some(Placed::Kept) => {
                    for block in self.known(number) {
                        self.piece(*block).into_iter().for_each(|piece| append(&mut map, piece));
                        if let KnownBlock::Stored { digest, .. } = block {
                            map.digests.push(*digest);
                        }
                    }
                }
                None => {}
            }
        }
        map
    }

    /// The frames that the parent's section `number` refers to, and how many blocks of each.
    pub(super) fn kept_pieces(&self, number: u32) -> impl Iterator<Item = Piece> {
        let first = number as usize * map::SECTION_BLOCKS as usize;
        let blocks = &self.known.blocks;
        let blocks = blocks.get(first..blocks.len().min(first + map::SECTION_BLOCKS as usize)).unwrap_or_default();
        blocks.iter().filter_map(|block| self.piece(*block))
    }
}

/// Appends a piece to a map; what goes on where the last one ended becomes one extent with it.
fn append(map: &mut FileMap, piece: Piece) {
    match (piece, map.extents.last_mut()) {
        (Piece::Zero { blocks }, Some(Extent::Zero { blocks: before })) => *before += blocks,
        (Piece::Zero { blocks }, _) => map.extents.push(Extent::Zero { blocks }),
        (Piece::Stored { pack, frame, slot, blocks }, last) => {
            let index = map.packs.iter().rposition(|p| *p == pack);
            let index = index.unwrap_or_else(|| {
                map.packs.push(pack);
                map.packs.len() - 1
            });
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            match last {
                Some(Extent::Stored { blocks: before, pack, frame: of, slot: at })
                    if *pack == index && *of == frame && *at + *before == slot =>
                {
                    *before += blocks;
                }
                _ => map.extents.push(Extent::Stored { blocks, pack: index, frame, slot }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACK: PackId = [1; 16];
    const NEW: PackId = [2; 16];

    fn known(blocks: usize) -> Known {
        let block = |n: usize| KnownBlock::Stored {
            pack: 0,
            frame: u32::try_from(n / REGION_BLOCKS).unwrap(),
            slot: u8::try_from(n % REGION_BLOCKS).unwrap(),
            digest: [u8::try_from(n % 251).unwrap(); BLOCK_DIGEST],
        };
        let sections = (0..u32::try_from(blocks.div_ceil(4096)).unwrap()).map(|n| Some(([9; 16], n))).collect();
        Known { packs: vec![PACK], blocks: (0..blocks).map(block).collect(), sections }
    }

    /// T9: a section of which nothing changed is the parent's own; any other is whole, and says of each block where it is.
    #[test]
    fn t9_sections_are_kept_or_made_whole() {
        let blocks = 4096 + 40;
        let task = FileTask::new("base/1/2".into(), 0o600, blocks as u64 * BLOCK as u64, None, known(blocks));
        for region in 0..task.regions() - 1 {
            assert!(task.place(region, Placed::Kept).is_none());
        }
        let made = Placed::Made {
            pieces: vec![
                Piece::Zero { blocks: 1 },
                Piece::Stored { pack: NEW, frame: 3, slot: 4, blocks: 2 },
                Piece::Stored { pack: NEW, frame: 3, slot: 6, blocks: 1 },
                Piece::Zero { blocks: 4 },
            ],
            digests: vec![[7; BLOCK_DIGEST]; 3],
        };
        let sections = task.place(task.regions() - 1, made).unwrap();
        assert_eq!(sections[0], Section::Kept([9; 16], 0));
        let Section::Made(map) = &sections[1] else { panic!("{sections:?}") };
        let stored = |blocks, pack, frame, slot| Extent::Stored { blocks, pack, frame, slot };
        assert_eq!(map.packs, [PACK, NEW]);
        assert_eq!(
            map.extents,
            [stored(32, 0, 128, 0), Extent::Zero { blocks: 1 }, stored(3, 1, 3, 4), Extent::Zero { blocks: 4 }]
        );
        assert_eq!(map.digests.len(), 35);
        assert_eq!(FileMap::parse(&map.encode(), 40 * BLOCK as u64).unwrap(), *map);
        assert_eq!(task.kept_pieces(0).count(), 4096);
    }
}
