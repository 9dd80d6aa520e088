//! Fills packs: frames from all workers go into one open pack, full ones go to the uploader.
//!
//! Workers compress in parallel; only sealing and appending, a tenth of the work, happens under the lock. One open pack
//! instead of one per worker keeps a file's regions together, which is what a restore reads.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ulid::Ulid;

use super::names::NamePacks;
use crate::Result;
use crate::crypto::sealed::{EncodedFrame, SealedObject, SealedWriter};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::{PackKind, PackRef};
use crate::vault::Cluster;

/// A finished pack on its way to the store.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub(crate) pack: PackRef,
    pub(crate) object: SealedObject,
    /// Given back when the pack is in the store.
    pub(crate) memory: Permit,
}

/// How many packs may be in memory: open, waiting or on their way to the store.
///
/// Without it every worker of a machine with many cores could hold a full pack while the store is slow.
#[derive(Debug)]
struct Memory {
    free: Mutex<usize>,
    freed: Condvar,
}

/// The right to hold one pack.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Memory>);

impl Memory {
    fn wait(self: &Arc<Self>) -> Permit {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Permit(self.clone())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// Takes finished packs.
pub(crate) type Uploads = tokio::sync::mpsc::Sender<FinishedPack>;

type OpenPack = (Ulid, SealedWriter, Permit);

/// What packs of one sort are, and where they lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackPlace {
    /// As the key is bound to it.
    pub(crate) sealed: Kind,
    /// As tables have it.
    pub(crate) kind: PackKind,
    /// Name of the object, relative to the cluster.
    pub(crate) path: fn(Ulid) -> String,
}

/// The open pack of one kind.
#[derive(Debug)]
pub(crate) struct Packer {
    cluster: Cluster,
    place: PackPlace,
    names: Arc<dyn NamePacks>,
    target: usize,
    open: Mutex<Option<OpenPack>>,
    memory: Arc<Memory>,
    uploads: Uploads,
}

impl Packer {
    /// `packs` may be in memory at once, the open one included.
    pub(crate) fn new(
        cluster: Cluster,
        place: PackPlace,
        names: Arc<dyn NamePacks>,
        target: usize,
        packs: usize,
        uploads: Uploads,
    ) -> Self {
        let memory = Arc::new(Memory { free: Mutex::new(packs.max(2)), freed: Condvar::new() });
        Self { cluster, place, names, target, open: Mutex::new(None), memory, uploads }
    }

    /// Appends a frame; returns the pack and its number there.
    pub(crate) fn append(&self, frame: &EncodedFrame<'_>) -> Result<(PackId, u32)> {
        let full;
        let place = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let (id, writer, _) = match &mut *open {
                Some(open) => open,
                none => {
                    // Everybody waits here while the store is behind, which is what bounds memory.
                    let memory = self.memory.wait();
                    let id = self.names.next()?;
                    let capacity = self.target + self.target / 16;
                    let PackPlace { sealed, path, .. } = self.place;
                    let writer = SealedWriter::new(self.cluster.env(), self.cluster.keys(), sealed, path(id), capacity)?;
                    none.insert((id, writer, memory))
                }
            };
            let place = (id.to_bytes(), writer.append(frame));
            full = if writer.len() >= self.target { open.take() } else { None };
            place
        };
        // Hashing and waiting for the uploader happen outside the lock.
        if let Some(full) = full {
            self.send(full);
        }
        Ok(place)
    }

    /// Sends the last, partly filled pack.
    pub(crate) fn finish(&self) {
        let last = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(last) = last {
            self.send(last);
        }
    }

    fn send(&self, (id, writer, memory): OpenPack) {
        // The uploader is gone only after an error that it reports itself.
        let object = writer.finish(Vec::new());
        let pack = object.as_pack(id.to_bytes(), self.place.kind);
        let _ = self.uploads.blocking_send(FinishedPack { pack, object, memory });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::sealed::{FrameEncoder, ObjectReader};
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::format::{MAX_FRAME, MAX_OBJECT};
    use crate::pack::{META_TARGET, PACK_TARGET, SessionNames};
    use crate::postgres::SystemId;
    use crate::store::Store;
    use crate::vault::Vault;
    use crate::vault::layout::{self, ClusterName};

    /// T22: whatever the size of the database, an object is one PUT; there is no multipart limit to run into.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t22_packs_end_at_their_target_whatever_is_put_into_them() {
        // A file of the largest size has nine frames of map, which stay together.
        assert!((PACK_TARGET + (1 << 20)) as u64 <= MAX_OBJECT);
        assert!((META_TARGET + 10 * MAX_FRAME) as u64 <= MAX_OBJECT);

        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        let _ = vault.create_cluster(&name, &[Wrap::Passphrase("secret".into())]).await.unwrap();
        let cluster = vault.unlock(&name, &Unlock::Passphrase("secret".into())).await.unwrap();
        let (uploads, mut finished) = tokio::sync::mpsc::channel(64);
        let target = 1 << 20;
        let names = Arc::new(SessionNames::new(Ulid(7)));
        let place = PackPlace { sealed: Kind::Data, kind: PackKind::Data, path: layout::pack };
        let packer = Packer::new(cluster.clone(), place, names, target, 4, uploads);
        let keys = cluster.keys().clone();
        let frames = 41;
        let packing = tokio::task::spawn_blocking(move || {
            let mut encoder = FrameEncoder::new(1).unwrap();
            for _ in 0..frames {
                let raw: Vec<u8> = Env::default().random::<{ 256 << 10 }>().unwrap().to_vec();
                let frame = encoder.encode(&raw, keys.digest().frame(&raw)).unwrap();
                let _ = packer.append(&frame).unwrap();
            }
            packer.finish();
        });
        let mut seen = 0;
        // Each pack's memory is given back when it is dropped here.
        while let Some(pack) = finished.recv().await {
            assert!(pack.object.bytes.len() < target + (300 << 10), "{}", pack.object.bytes.len());
            let reader = ObjectReader::open_whole(cluster.keys(), Kind::Data, &pack.object.name, &pack.object.bytes).unwrap();
            seen += reader.frames().len();
        }
        packing.await.unwrap();
        assert_eq!(seen, frames);
    }
}
