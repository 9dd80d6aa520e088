//! Fills packs: frames from all workers go into one open pack, full ones go to the uploader.
//!
//! Workers compress in parallel; only sealing and appending, a tenth of the work, happens under the lock. One open pack
//! instead of one per worker keeps a file's regions together, which is what a restore reads.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ulid::Ulid;

use crate::Result;
use crate::crypto::sealed::{EncodedFrame, SealedObject, SealedWriter};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::vault::{Cluster, layout};

/// A finished pack on its way to the store.
#[derive(Debug)]
pub(super) struct FinishedPack {
    pub(super) id: Ulid,
    pub(super) object: SealedObject,
    /// Given back when the pack is in the store.
    pub(super) memory: Permit,
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
pub(super) struct Permit(Arc<Memory>);

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
pub(super) type Uploads = tokio::sync::mpsc::Sender<FinishedPack>;

type OpenPack = (Ulid, SealedWriter, Permit);

/// The open pack of one kind.
#[derive(Debug)]
pub(super) struct Packer {
    cluster: Cluster,
    kind: Kind,
    target: usize,
    open: Mutex<Option<OpenPack>>,
    memory: Arc<Memory>,
    uploads: Uploads,
}

impl Packer {
    /// `packs` may be in memory at once, the open one included.
    pub(super) fn new(cluster: Cluster, kind: Kind, target: usize, packs: usize, uploads: Uploads) -> Self {
        let memory = Arc::new(Memory { free: Mutex::new(packs.max(2)), freed: Condvar::new() });
        Self { cluster, kind, target, open: Mutex::new(None), memory, uploads }
    }

    /// Appends frames that must stay together; returns the pack and the number of the first.
    pub(super) fn append(&self, frames: &[EncodedFrame<'_>]) -> Result<(PackId, u32)> {
        let full;
        let place = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let (id, writer, _) = match &mut *open {
                Some(open) => open,
                none => {
                    // Everybody waits here while the store is behind, which is what bounds memory.
                    let memory = self.memory.wait();
                    let id = self.cluster.env().new_id()?;
                    let capacity = self.target + self.target / 16;
                    let writer = SealedWriter::new(self.cluster.env(), self.cluster.keys(), self.kind, layout::pack(id), capacity)?;
                    none.insert((id, writer, memory))
                }
            };
            let mut first = None;
            for frame in frames {
                let number = writer.append(frame);
                let _ = first.get_or_insert(number);
            }
            let place = (id.to_bytes(), first.unwrap_or(0));
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
    pub(super) fn finish(&self) {
        let last = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(last) = last {
            self.send(last);
        }
    }

    fn send(&self, (id, writer, memory): OpenPack) {
        // The uploader is gone only after an error that it reports itself.
        let _ = self.uploads.blocking_send(FinishedPack { id, object: writer.finish(Vec::new()), memory });
    }
}
