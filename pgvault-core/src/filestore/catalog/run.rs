//! One run, read from the store: a name by its chunk, or all of it in order.

use std::sync::Arc;

use crate::format::file_run::{self, Entry, RunHead, RunRef};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::PackRef;
use crate::vault::{Cluster, StoredObject, layout, lost};
use crate::{Error, ErrorKind, Result};

/// Chunks of a run that stay in memory for the next name.
const CACHED: usize = 4;

/// A stored run.
#[derive(Debug)]
pub(crate) struct Run {
    cluster: Cluster,
    reference: RunRef,
    head: Option<Arc<RunHead>>,
    opened: Vec<(PackId, StoredObject)>,
    /// The last used last.
    chunks: Vec<(usize, Vec<Entry>)>,
}

impl Run {
    pub(crate) fn new(cluster: &Cluster, reference: RunRef) -> Self {
        Self { cluster: cluster.clone(), reference, head: None, opened: Vec::new(), chunks: Vec::new() }
    }

    pub(crate) fn reference(&self) -> &RunRef {
        &self.reference
    }

    /// Opens the run.
    pub(crate) async fn head(&mut self) -> Result<Arc<RunHead>> {
        if let Some(head) = &self.head {
            return Ok(head.clone());
        }
        let pack = self.reference.pack;
        let object = open(&self.cluster, &pack).await?;
        let mut bytes = Vec::new();
        for frame in self.reference.head..object.frame_count() {
            bytes.extend_from_slice(&object.frame(frame).await?);
        }
        let head = RunHead::parse(&bytes).map_err(|e| self.corrupt(&e.to_string()))?;
        let chunks: u64 = head.before.iter().map(|pack| u64::from(pack.frames)).sum::<u64>() + u64::from(self.reference.head);
        if chunks != head.firsts.len() as u64 {
            return Err(self.corrupt("its head does not fit its chunks"));
        }
        let head = Arc::new(head);
        self.head = Some(head.clone());
        self.opened.push((pack.id, object));
        Ok(head)
    }

    fn corrupt(&self, why: &str) -> Error {
        let path = self.cluster.path(&layout::files_pack(ulid::Ulid::from_bytes(self.reference.pack.id)));
        Error::new(ErrorKind::Corrupt, "filestore.run", format!("{path}: {why}"))
    }

    /// The pack of contents of that id.
    pub(crate) async fn pack(&mut self, id: &PackId) -> Result<Option<PackRef>> {
        Ok(self.head().await?.packs.iter().find(|pack| pack.id == *id).copied())
    }

    /// What the run knows of a name.
    pub(crate) async fn entry(&mut self, name: &str) -> Result<Option<Entry>> {
        let head = self.head().await?;
        let Some(number) = head.chunk_of(name).filter(|_| head.filter.may_have(name)) else { return Ok(None) };
        let cached = self.chunks.iter().position(|(cached, _)| *cached == number);
        let entries = if let Some(at) = cached {
            self.chunks.remove(at).1
        } else {
            let (pack, frame) = place(&head, &self.reference, number).ok_or_else(|| self.corrupt("has no such chunk"))?;
            let object = self.object(&pack).await?;
            let bytes = object.frame(frame).await?;
            file_run::parse_chunk(&bytes, &head.packs).map_err(|e| self.corrupt(&e.to_string()))?
        };
        let found = entries.binary_search_by(|entry| entry.name.as_str().cmp(name)).ok();
        let found = found.and_then(|at| entries.get(at)).cloned();
        if self.chunks.len() >= CACHED {
            drop(self.chunks.remove(0));
        }
        self.chunks.push((number, entries));
        Ok(found)
    }

    async fn object(&mut self, pack: &PackRef) -> Result<StoredObject> {
        if let Some((_, object)) = self.opened.iter().find(|(id, _)| *id == pack.id) {
            return Ok(object.clone());
        }
        let object = open(&self.cluster, pack).await?;
        self.opened.push((pack.id, object.clone()));
        Ok(object)
    }

    /// All of the run, in order.
    pub(crate) async fn read(&mut self) -> Result<Reading> {
        let head = self.head().await?;
        let stored = Stored { cluster: self.cluster.clone(), reference: self.reference.clone(), head, next: 0, object: None };
        Ok(Reading { entries: Vec::new().into_iter(), stored: Some(stored) })
    }
}

async fn open(cluster: &Cluster, pack: &PackRef) -> Result<StoredObject> {
    let name = layout::files_pack(ulid::Ulid::from_bytes(pack.id));
    let object = cluster.open(Kind::Meta, &name, Some(pack.size)).await.map_err(|e| lost(&cluster.path(&name), e))?;
    if object.reader().tail().sha256 != pack.sha256 || object.frame_count() != pack.frames {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "filestore.run",
            format!("{}: is not the pack that is meant", cluster.path(&name)),
        ));
    }
    Ok(object)
}

/// The pack and the frame of a chunk.
fn place(head: &RunHead, reference: &RunRef, chunk: usize) -> Option<(PackRef, u32)> {
    let mut frame = u32::try_from(chunk).ok()?;
    for pack in &head.before {
        if frame < pack.frames {
            return Some((*pack, frame));
        }
        frame -= pack.frames;
    }
    (frame < reference.head).then_some((reference.pack, frame))
}

/// Entries in order, from a run or from memory.
#[derive(Debug)]
pub(crate) struct Reading {
    entries: std::vec::IntoIter<Entry>,
    stored: Option<Stored>,
}

#[derive(Debug)]
struct Stored {
    cluster: Cluster,
    reference: RunRef,
    head: Arc<RunHead>,
    next: usize,
    /// The pack that is being read, all of it in memory.
    object: Option<(PackId, StoredObject)>,
}

impl Reading {
    pub(crate) fn of_entries(entries: Vec<Entry>) -> Self {
        Self { entries: entries.into_iter(), stored: None }
    }

    /// The next entry.
    pub(crate) async fn next(&mut self) -> Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Ok(Some(entry));
            }
            let Some(stored) = &mut self.stored else { return Ok(None) };
            match stored.chunk().await? {
                Some(entries) => self.entries = entries.into_iter(),
                None => self.stored = None,
            }
        }
    }
}

impl Stored {
    async fn chunk(&mut self) -> Result<Option<Vec<Entry>>> {
        let Some((pack, frame)) = place(&self.head, &self.reference, self.next) else { return Ok(None) };
        self.next += 1;
        let object = match &self.object {
            Some((id, object)) if *id == pack.id => object,
            _ => {
                // The one before is let go first.
                self.object = None;
                let mut object = open(&self.cluster, &pack).await?;
                object.hold().await?;
                &self.object.insert((pack.id, object)).1
            }
        };
        let bytes = object.frame(frame).await?;
        let entries = file_run::parse_chunk(&bytes, &self.head.packs)
            .map_err(|e| Error::from(e).context(self.cluster.path(&layout::files_pack(ulid::Ulid::from_bytes(pack.id)))))?;
        Ok(Some(entries))
    }
}
