//! The backup before: what it knows of each file, so that only what changed is stored.
//!
//! Any committed backup can be the parent, whatever its timeline or source: blocks are compared by their keyed digests, never by
//! names, sizes or times (T5, T11). It is listed after this backup's session was announced, so nothing it refers to is collected
//! before this backup's deadline.

use std::collections::{HashMap, HashSet};

use ulid::Ulid;

use super::entries::Entries;
use super::usage;
use crate::format::BLOCK;
use crate::format::file_table::{MapPlace, Node};
use crate::format::map::{self, BLOCK_DIGEST, Extent, FileMap, PackId};
use crate::format::pack_table::PackRef;
use crate::postgres::Lsn;
use crate::vault::maps::MapReader;
use crate::vault::snapshot::{self, OpenSnapshot};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// One block of a file, as the parent has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KnownBlock {
    /// Zeroes.
    Zero,
    /// A block of a frame.
    Stored {
        /// Which of [`Known::packs`].
        pack: u32,
        frame: u32,
        slot: u8,
        digest: [u8; BLOCK_DIGEST],
    },
    /// It is there, and shall be stored anew.
    Behind,
}

/// What the parent knows of a file.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) packs: Vec<PackId>,
    pub(super) blocks: Vec<KnownBlock>,
    /// Where each section of the map is, when it may be referred to again.
    pub(super) sections: Vec<Option<(PackId, u32)>>,
}

/// The parent of a backup.
#[derive(Debug)]
pub(super) struct Parent {
    pub(super) id: Ulid,
    /// Where it began, and whether its pages carried checksums; nothing when some of them were bad.
    judged: Option<(Lsn, bool)>,
    /// Its packs, of which each is in the vault.
    packs: HashMap<PackId, PackRef>,
    behind: HashSet<PackId>,
    files: Entries,
    maps: MapReader,
    warnings: Vec<String>,
}

impl Parent {
    /// The newest committed backup that can be read, if there is one.
    pub(super) async fn find(cluster: &Cluster) -> Result<Option<Self>> {
        let mut warnings = Vec::new();
        // Names sort by the time when they were made.
        for object in cluster.store().list(&cluster.path(layout::dir::SNAP)).await?.into_iter().rev() {
            let Some(id) = layout::id_of(&object.name) else { continue };
            let opened = match snapshot::open(cluster, id, Some(object.size)).await {
                Ok(opened) => Self::read(cluster, opened).await,
                Err(error) => Err(error),
            };
            match opened {
                Ok(mut parent) => {
                    parent.warnings.extend(warnings);
                    return Ok(Some(parent));
                }
                // Expired since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if is_damage(&error) => warnings.push(format!("backup {id} cannot be compared with: {error}")),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn read(cluster: &Cluster, snapshot: OpenSnapshot) -> Result<Self> {
        let listed = cluster.store().list(&cluster.path(layout::dir::PACK)).await?;
        let there: HashMap<PackId, u64> =
            listed.iter().filter_map(|object| Some((layout::id_of(&object.name)?.to_bytes(), object.size))).collect();
        let (packs, lost): (Vec<PackRef>, Vec<PackRef>) =
            snapshot.packs().await?.into_iter().partition(|pack| there.get(&pack.id) == Some(&pack.size));
        let mut warnings = Vec::new();
        if !lost.is_empty() {
            // Damage is not inherited: what was in them is stored again, from a source that still has it.
            warnings.push(format!(
                "{} packs of backup {} are missing or cut short; what they held is stored again, run `pgvault check`",
                lost.len(),
                snapshot.manifest.id
            ));
        }
        let mut files = Entries::default();
        let mut table = snapshot.files();
        while let Some(entries) = table.next_chunk().await? {
            entries.iter().filter(|entry| matches!(entry.node, Node::File { .. })).for_each(|entry| files.push(entry));
        }
        files.sort();
        let behind = usage::left_behind(&packs);
        let maps = MapReader::ahead(cluster, &packs).await?;
        let packs = packs.into_iter().map(|pack| (pack.id, pack)).collect();
        let manifest = &snapshot.manifest;
        let judged = manifest.bad_pages.is_empty().then_some((manifest.start_lsn, manifest.data_checksums));
        Ok(Self { id: manifest.id, judged, packs, behind, files, maps, warnings })
    }

    /// Pages with an LSN before this one were found good, by their checksums if `checksums`.
    pub(super) fn judged(&self, checksums: bool) -> Option<Lsn> {
        self.judged.filter(|(_, had)| *had || !checksums).map(|(before, _)| before)
    }

    /// What is known of a file of `len` bytes; nothing when it is new.
    pub(super) async fn file(&mut self, path: &str, len: u64) -> Result<Option<Known>> {
        let Some(entry) = self.files.find(path)? else { return Ok(None) };
        let Node::File { len: was, map: place } = entry.node else { return Ok(None) };
        let mut known = Known::default();
        let mut numbers: HashMap<PackId, u32> = HashMap::new();
        for number in 0..map::sections(was.min(len)) {
            let covered = map::section_len(was, number).div_ceil(BLOCK as u64);
            match self.section(&place, was, number).await {
                Ok(section) => {
                    let place = place.locate(number).filter(|(pack, _)| self.is_kept(pack));
                    let behind = self.expand(&section, &mut known, &mut numbers);
                    // It is for as many blocks as it was.
                    let same = map::section_len(len, number).div_ceil(BLOCK as u64) == covered;
                    known.sections.push(place.filter(|_| same && !behind));
                }
                Err(error) if is_damage(&error) => {
                    self.warnings.push(format!("{path} is stored again: {error}"));
                    known.blocks.extend((0..covered).map(|_| KnownBlock::Behind));
                    known.sections.push(None);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(known))
    }

    async fn section(&mut self, place: &MapPlace, len: u64, number: u32) -> Result<FileMap> {
        if let Some((pack, _)) = place.locate(number).filter(|(pack, _)| !self.packs.contains_key(pack)) {
            let why = format!("its map was in pack {}, which is missing", Ulid::from_bytes(pack));
            return Err(Error::new(ErrorKind::Corrupt, "pack.missing", why));
        }
        self.maps.section(place, len, number).await
    }

    /// True for a pack that is there, and worth referring to.
    fn is_kept(&self, pack: &PackId) -> bool {
        self.packs.contains_key(pack) && !self.behind.contains(pack)
    }

    /// Appends the blocks of a section; true when some of them shall be stored anew.
    fn expand(&self, section: &FileMap, known: &mut Known, numbers: &mut HashMap<PackId, u32>) -> bool {
        let packs: Vec<Option<u32>> = section
            .packs
            .iter()
            .map(|pack| {
                self.is_kept(pack).then(|| {
                    *numbers.entry(*pack).or_insert_with(|| {
                        known.packs.push(*pack);
                        u32::try_from(known.packs.len() - 1).unwrap_or(u32::MAX)
                    })
                })
            })
            .collect();
        let mut digests = section.digests.iter();
        let mut behind = false;
        for extent in &section.extents {
            match *extent {
                Extent::Zero { blocks } => known.blocks.extend((0..blocks).map(|_| KnownBlock::Zero)),
                Extent::Stored { blocks, pack, frame, slot } => {
                    let pack = packs.get(pack as usize).copied().flatten();
                    behind |= pack.is_none();
                    for at in slot..slot + blocks {
                        // There is a digest for each stored block.
                        let digest = digests.next().copied().unwrap_or_default();
                        known.blocks.push(match pack {
                            Some(pack) => KnownBlock::Stored { pack, frame, slot: u8::try_from(at).unwrap_or(u8::MAX), digest },
                            None => KnownBlock::Behind,
                        });
                    }
                }
            }
        }
        behind
    }

    /// Its name, its packs, and what should be known of it.
    pub(super) fn into_parts(self) -> (Ulid, HashMap<PackId, PackRef>, Vec<String>) {
        (self.id, self.packs, self.warnings)
    }
}

fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported)
}
