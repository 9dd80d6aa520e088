//! Reading file maps, wherever the file table says that they lie.
//!
//! A manifest may have been made by somebody hostile who has the key, and frames of zeroes seal to next to nothing: a pack of
//! 64 MiB can hold a terabyte of them. So memory is bounded by what is known before a frame is fetched.

use std::collections::{HashMap, VecDeque};

use futures::{StreamExt, stream};

use super::{Cluster, StoredObject, layout, lost};
use crate::format::FormatError;
use crate::format::file_table::MapPlace;
use crate::format::map::{self, FileMap, PackId};
use crate::format::object::Kind;
use crate::format::pack_table::{PackKind, PackRef};
use crate::{Error, Result};

/// Bytes of meta packs that are kept. The maps of 60 GiB of files fit; of a larger cluster neighbours lie in the same packs.
const KEPT: usize = 64 << 20;

/// A pack that is asked for this often is fetched whole.
const WHOLE_FROM: u32 = 3;

/// Packs fetched at once.
const PARALLEL: usize = 8;

/// Packs of which something is kept, at most.
const MAX_OPEN: usize = 1024;

/// Reads file maps, section by section.
///
/// The maps of a cluster that was backed up again and again are spread over the packs of many backups, so the packs used last are
/// kept, up to 64 MiB of their bytes and their frame tables. What is allocated for one section: its bytes, at most
/// [`FileMap::max_len`] of 32 MiB, one sealed frame, and the parsed map, at most 44 bytes for each block of 8 KiB.
#[derive(Debug)]
pub struct MapReader {
    cluster: Cluster,
    sizes: HashMap<PackId, u64>,
    /// The one used last is the last.
    open: VecDeque<Held>,
}

#[derive(Debug)]
struct Held {
    pack: PackId,
    object: StoredObject,
    asked: u32,
}

impl MapReader {
    /// A reader of a cluster's maps. Knowing the snapshot's packs saves it a request for each.
    pub fn new<'a>(cluster: &Cluster, packs: impl IntoIterator<Item = &'a PackRef>) -> Self {
        let sizes = packs.into_iter().map(|pack| (pack.id, pack.size)).collect();
        Self { cluster: cluster.clone(), sizes, open: VecDeque::new() }
    }

    /// A reader that has fetched the snapshot's meta packs, as many as it keeps, several at once: one after the other, each would take
    /// as long as a store far away needs to answer.
    ///
    /// # Errors
    /// When the store fails. A pack that is missing or damaged is no error before it is asked for.
    pub async fn ahead(cluster: &Cluster, packs: &[PackRef]) -> Result<Self> {
        let mut reader = Self::new(cluster, packs);
        let mut room = KEPT as u64;
        let wanted = packs.iter().filter(|pack| pack.kind == PackKind::Meta).take_while(|pack| {
            let fits = pack.size <= room;
            room = room.saturating_sub(pack.size);
            fits
        });
        let opening = wanted.take(MAX_OPEN).map(|pack| async move {
            let name = layout::pack(ulid::Ulid::from_bytes(pack.id));
            (pack.id, cluster.open(Kind::Meta, &name, Some(pack.size)).await)
        });
        let mut opening = stream::iter(opening.collect::<Vec<_>>()).buffered(PARALLEL);
        while let Some((pack, opened)) = opening.next().await {
            match opened {
                Ok(object) => reader.open.push_back(Held { pack, object, asked: 0 }),
                Err(error) if error.is_transient() => return Err(error),
                // Who asks for it is told.
                Err(_) => {}
            }
        }
        Ok(reader)
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Reads one section of the map of a file of `len` bytes; there are [`map::sections`] of them.
    ///
    /// # Errors
    /// When the store fails, the pack is missing or was changed, or the map is not one of such a file.
    pub async fn section(&mut self, place: &MapPlace, len: u64, number: u32) -> Result<FileMap> {
        let covered = map::section_len(len, number);
        // A file longer than any is refused, whatever its parts are.
        let _ = FileMap::max_len(len)?;
        match (place, place.locate(number)) {
            (MapPlace::Inline(bytes), _) if number == 0 && len <= map::SECTION => Ok(FileMap::parse(bytes, len)?),
            (MapPlace::Sections(_), Some((pack, frame))) => {
                let bytes = self.object(pack).await?.frames(frame, 1, FileMap::max_len(covered)?).await?;
                Ok(FileMap::parse(&bytes, covered)?)
            }
            _ => Err(FormatError::new("file map", format!("has no section {number} for a file of {len} bytes")).into()),
        }
    }

    /// The pack, whole when it was asked for before.
    async fn object(&mut self, pack: PackId) -> Result<&StoredObject> {
        let held = self.open.iter().position(|held| held.pack == pack).and_then(|at| self.open.remove(at));
        let mut held = if let Some(held) = held {
            held
        } else {
            let name = layout::pack(ulid::Ulid::from_bytes(pack));
            let opened = self.cluster.open(Kind::Meta, &name, self.sizes.get(&pack).copied()).await;
            let object = opened.map_err(|e| lost(&self.cluster.path(&name), e))?;
            Held { pack, object, asked: 0 }
        };
        held.asked += 1;
        if held.asked == WHOLE_FROM {
            held.object.hold().await?;
        }
        self.open.push_back(held);
        while self.open.len() > 1 && (self.open.len() > MAX_OPEN || self.kept() > KEPT) {
            let _ = self.open.pop_front();
        }
        match self.open.back() {
            Some(held) => Ok(&held.object),
            None => Err(Error::new(crate::ErrorKind::Failed, "map.cache", "nothing is kept")),
        }
    }

    fn kept(&self) -> usize {
        self.open.iter().map(|held| held.object.held()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ErrorKind;
    use crate::crypto::sealed::{FrameEncoder, SealedWriter};
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::format::file_table::MapRun;
    use crate::format::map::{Extent, SECTION, SECTION_BLOCKS};
    use crate::format::{BLOCK, MAX_FILE, MAX_FRAME, put_varint};
    use crate::postgres::SystemId;
    use crate::store::{Store, StoreOptions};
    use crate::testing::{FaultyStore, Objects, from_objects};
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;

    /// A cluster with one meta pack of these frames, and the store that counts requests.
    async fn cluster(frames: &[Vec<u8>]) -> (FaultyStore, Cluster, PackId, usize) {
        let faulty = FaultyStore::new(from_objects(&Objects::new()).await);
        let store = Store::new(Arc::new(faulty.clone()), "memory:///", StoreOptions::default());
        let (vault, _) = Vault::create(store, Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        assert!(vault.create_cluster(&name, &[Wrap::Passphrase("test".into())]).await.unwrap());
        let cluster = vault.unlock(&name, &Unlock::Passphrase("test".into())).await.unwrap();
        let id = cluster.env().new_id().unwrap();
        let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Meta, layout::pack(id), 0).unwrap();
        let mut encoder = FrameEncoder::new(1).unwrap();
        for frame in frames {
            let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame)).unwrap();
        }
        let pack = writer.finish(Vec::new());
        cluster.put_once(&pack).await.unwrap();
        faulty.heal();
        (faulty, cluster, id.to_bytes(), pack.bytes.len())
    }

    /// What a hostile writer can make of nothing: frames that decode to a thousand times their size.
    #[tokio::test]
    async fn a_map_that_decodes_to_more_than_its_file_can_need_is_refused_before_it_is_fetched() {
        let frames = vec![vec![0; MAX_FRAME]; 64];
        let (faulty, cluster, pack, size) = cluster(&frames).await;
        assert!(size < 64 << 10, "{size} bytes hold a map of 256 MiB");
        let mut maps = MapReader::new(&cluster, []);
        let place = |first, count| MapPlace::Sections(vec![MapRun { pack, first, count }]);
        let cases = [
            // The frames are there, but no file of this length has such a map.
            (1 << 20, 0, 0, "object.frames"),
            (1 << 30, 0, 31, "object.frames"),
            // More frames than the pack has, as many as can be said.
            (MAX_FILE, 0, 64, "object.frame"),
            (MAX_FILE, u32::MAX - 1, 0, "object.frame"),
            // Sections that the table does not place, or the file does not have.
            (MAX_FILE, u32::MAX, 1, "format.invalid"),
            (MAX_FILE, 1, u32::MAX, "format.invalid"),
        ];
        for (len, first, number, code) in cases {
            let error = maps.section(&place(first, u32::MAX), len, number).await.unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Corrupt, code), "{len} {first} {number}: {error:?}");
        }
        // A file that is said to be longer than any file.
        for len in [MAX_FILE + 1, u64::MAX] {
            let error = maps.section(&place(0, 64), len, 0).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
        }
        // The pack's header and footer came with its first reading, and all of it, 64 KiB, with the third; no frame was asked for.
        let calls = faulty.calls();
        assert!(calls.len() <= 3, "{calls:?}");
    }

    /// A map whose numbers announce far more than the file has blocks, although its bytes are few enough.
    #[tokio::test]
    async fn a_map_cannot_make_its_reader_allocate_more_than_the_file_has_blocks() {
        let blocks = 1024_u64;
        let len = blocks * BLOCK as u64;
        let mut extents = Vec::new();
        put_varint(&mut extents, 0);
        put_varint(&mut extents, blocks + 1);
        extents.resize(extents.len() + 20_000, 2);
        let mut packs = Vec::new();
        put_varint(&mut packs, blocks + 1);
        packs.resize(packs.len() + 17_000, 0);
        for bytes in [extents, packs] {
            assert!((bytes.len() as u64) < FileMap::max_len(len).unwrap());
            let (_, cluster, pack, _) = cluster(std::slice::from_ref(&bytes)).await;
            let place = MapPlace::of_sections([(pack, 0)]);
            let error = MapReader::new(&cluster, []).section(&place, len, 0).await.unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("for 1024 blocks"), "{error:?}");
        }
    }

    /// The longest map that a section can have is read, and the reader forgets nothing that it is asked for again and again.
    #[tokio::test]
    async fn the_largest_map_of_a_section_is_read_and_a_pack_asked_for_often_is_fetched_once() {
        let blocks = SECTION_BLOCKS;
        let stored = |pack: u32| Extent::Stored { blocks: 1, pack, frame: u32::MAX, slot: 31 };
        let map = FileMap {
            packs: (0..blocks).map(|n| u128::from(n).to_le_bytes()).collect(),
            extents: (0..blocks).map(stored).collect(),
            digests: vec![[7; 8]; blocks as usize],
        };
        assert!(map.encode().len() as u64 <= FileMap::max_len(SECTION).unwrap());
        let (faulty, cluster, pack, _) = cluster(&vec![map.encode(); 20]).await;
        let mut maps = MapReader::new(&cluster, []);
        let place = MapPlace::of_sections((0..20).map(|frame| (pack, frame)));
        for number in 0..20 {
            assert!(maps.section(&place, 20 * SECTION, number).await.unwrap() == map);
        }
        assert!(faulty.calls().len() <= 7, "{:?}", faulty.calls());
    }
}
