//! One file on its way through the pipeline.
//!
//! Its regions are worked on by several threads in any order; the thread that finishes the last one assembles the map.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::format::map::{BLOCK_DIGEST, Extent, FileMap, PackId};
use crate::format::{BLOCK, REGION_BLOCKS};
use crate::postgres::RelationFile;
use crate::{Error, ErrorKind};

/// Bytes of a full region.
pub(super) const REGION: usize = BLOCK * REGION_BLOCKS;

/// A part of the source cannot be read: trouble of the source, not of pgvault.
pub(super) fn unreadable(doing: &str, path: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Source, "source.file", format!("{doing} {}: {error}", path.display())).with_source(error)
}

/// What became of a region.
#[derive(Debug)]
pub(super) enum Placed {
    Zero,
    Stored { pack: PackId, frame: u32, slot: u32, digests: Vec<[u8; BLOCK_DIGEST]> },
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
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    placed: Vec<Option<Placed>>,
    missing: usize,
}

impl FileTask {
    pub(super) fn new(path: String, mode: u32, len: u64, reader: Option<File>) -> Self {
        let regions = usize::try_from(len.div_ceil(REGION as u64)).unwrap_or(usize::MAX);
        let relation = RelationFile::parse(&path);
        let mut placed = Vec::new();
        placed.resize_with(regions, || None);
        Self { path, mode, len, relation, reader, state: Mutex::new(State { placed, missing: regions }) }
    }

    pub(super) fn regions(&self) -> u32 {
        u32::try_from(self.len.div_ceil(REGION as u64)).unwrap_or(u32::MAX)
    }

    /// Bytes of region `number`.
    pub(super) fn region_len(&self, number: u32) -> usize {
        let left = self.len.saturating_sub(u64::from(number) * REGION as u64);
        usize::try_from(left).map_or(REGION, |left| left.min(REGION))
    }

    /// Records a region; gives the whole map once the last one is in.
    pub(super) fn place(&self, region: u32, placed: Placed) -> Option<FileMap> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = state.placed.get_mut(region as usize)?;
        if slot.replace(placed).is_none() {
            state.missing -= 1;
        }
        (state.missing == 0).then(|| self.assemble(std::mem::take(&mut state.placed)))
    }

    fn assemble(&self, regions: Vec<Option<Placed>>) -> FileMap {
        let mut map = FileMap::default();
        for (number, placed) in regions.into_iter().enumerate() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let blocks = u32::try_from(self.region_len(number).div_ceil(BLOCK)).unwrap_or(0);
            match placed {
                None | Some(Placed::Zero) => {
                    if let Some(Extent::Zero { blocks: before }) = map.extents.last_mut() {
                        *before += blocks;
                    } else {
                        map.extents.push(Extent::Zero { blocks });
                    }
                }
                Some(Placed::Stored { pack, frame, slot, digests }) => {
                    let index = map.packs.iter().rposition(|p| *p == pack).unwrap_or_else(|| {
                        map.packs.push(pack);
                        map.packs.len() - 1
                    });
                    map.extents.push(Extent::Stored { blocks, pack: u32::try_from(index).unwrap_or(u32::MAX), frame, slot });
                    map.digests.extend_from_slice(&digests);
                }
            }
        }
        map
    }
}
