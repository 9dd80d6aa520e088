//! Reading file maps, wherever the file table says that they lie.
//!
//! A manifest may have been made by somebody hostile who has the key, and frames of zeroes seal to next to nothing: a pack of
//! 64 MiB can hold a terabyte of them. So memory is bounded by what is known before a frame is fetched.

use super::{Cluster, StoredObject, layout, lost};
use crate::Result;
use crate::format::file_table::MapPlace;
use crate::format::map::{FileMap, PackId};
use crate::format::object::Kind;

/// Reads file maps; consecutive ones lie in the same pack, so the open one is kept.
///
/// What it allocates for one map: its bytes, at most [`FileMap::max_len`] of the file's length (35 bytes for each block of
/// 8 KiB, 0.43 %), and not more than the frames that are really there decode to; one sealed frame of at most 4 MiB; and the
/// parsed map, at most 44 bytes for each block. That is 10 MiB for PostgreSQL's files of 1 GiB and 320 MiB for the largest file
/// of the format. Besides, the frame table of one meta pack, about twice
/// the pack's own footer.
#[derive(Debug)]
pub struct MapReader<'a> {
    cluster: &'a Cluster,
    open: Option<(PackId, StoredObject)>,
}

impl<'a> MapReader<'a> {
    /// A reader of a cluster's maps.
    pub fn new(cluster: &'a Cluster) -> Self {
        Self { cluster, open: None }
    }

    /// The cluster.
    pub fn cluster(&self) -> &'a Cluster {
        self.cluster
    }

    /// Reads the map of a file of `len` bytes.
    ///
    /// # Errors
    /// When the store fails, the pack is missing or was changed, or the map is not one of such a file.
    pub async fn read(&mut self, place: &MapPlace, len: u64) -> Result<FileMap> {
        match place {
            MapPlace::Inline(bytes) => Ok(FileMap::parse(bytes, len)?),
            MapPlace::Frames { pack, first, count } => {
                let limit = FileMap::max_len(len)?;
                let bytes = self.open(*pack).await?.frames(*first, *count, limit).await?;
                Ok(FileMap::parse(&bytes, len)?)
            }
        }
    }

    async fn open(&mut self, pack: PackId) -> Result<&StoredObject> {
        let object = match self.open.take() {
            Some((open, object)) if open == pack => object,
            _ => {
                let name = layout::pack(ulid::Ulid::from_bytes(pack));
                let opened = self.cluster.open(Kind::Meta, &name, None).await;
                opened.map_err(|e| lost(&self.cluster.path(&name), e))?
            }
        };
        Ok(&self.open.insert((pack, object)).1)
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
    use crate::format::map::Extent;
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
        let mut maps = MapReader::new(&cluster);
        let cases = [
            // The frames are there, but no file of this length has such a map.
            (1 << 20, 0, 64, "object.frames"),
            (1 << 30, 0, 64, "object.frames"),
            (1 << 30, 0, 2, "object.frames"),
            // More frames than the pack has, as many as can be said.
            (MAX_FILE, 0, 65, "object.frame"),
            (MAX_FILE, 1, u32::MAX, "object.frame"),
            (MAX_FILE, u32::MAX, u32::MAX, "object.frame"),
        ];
        for (len, first, count, code) in cases {
            let error = maps.read(&MapPlace::Frames { pack, first, count }, len).await.unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Corrupt, code), "{len} {first} {count}: {error:?}");
        }
        // A file that is said to be longer than any file.
        for len in [MAX_FILE + 1, u64::MAX] {
            let error = maps.read(&MapPlace::Frames { pack, first: 0, count: 64 }, len).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
        }
        // The pack's header and footer came with its first reading; no frame was asked for.
        let calls = faulty.calls();
        assert!(calls.len() <= 2, "{calls:?}");
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
            let place = MapPlace::Frames { pack, first: 0, count: 1 };
            let error = MapReader::new(&cluster).read(&place, len).await.unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("for 1024 blocks"), "{error:?}");
        }
    }

    /// The longest map that a file can have is read.
    #[tokio::test]
    async fn the_largest_map_of_a_file_is_read() {
        let blocks = 300_000_u32;
        let stored = |pack: u32| Extent::Stored { blocks: 1, pack, frame: u32::MAX, slot: 31 };
        let map = FileMap {
            packs: (0..blocks).map(|n| u128::from(n).to_le_bytes()).collect(),
            extents: (0..blocks).map(stored).collect(),
            digests: vec![[7; 8]; blocks as usize],
        };
        let (bytes, len) = (map.encode(), u64::from(blocks) * BLOCK as u64);
        assert!(bytes.len() as u64 <= FileMap::max_len(len).unwrap());
        let frames: Vec<Vec<u8>> = bytes.chunks(MAX_FRAME).map(<[u8]>::to_vec).collect();
        let (_, cluster, pack, _) = cluster(&frames).await;
        let place = MapPlace::Frames { pack, first: 0, count: u32::try_from(frames.len()).unwrap() };
        assert!(MapReader::new(&cluster).read(&place, len).await.unwrap() == map);
    }
}
