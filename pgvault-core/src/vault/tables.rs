//! The two tables of a manifest: which packs it needs, and which files it holds.
//!
//! Both grow with the database, and an object ends at 64 MiB: some two million packs, or a million files, would not fit into
//! the manifest's. So large tables are stored before the manifest, in meta packs of their own, and the manifest says where
//! each chunk is and what its digest must be ([`TableIndex`]). Either way a reader takes one chunk at a time.

use ulid::Ulid;

use super::{Cluster, StoredObject, layout, lost};
use crate::crypto::sealed::{FrameEncoder, SealedWriter};
use crate::format::file_table::{self, FileEntry};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::{self, PackKind, PackRef};
use crate::format::table_index::{TableIndex, TablePack};
use crate::format::{FormatError, MAX_FRAME};
use crate::{Error, ErrorKind, Result};

/// When tables leave the manifest's object, and how large the packs are that they go to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of both tables that stay in the manifest's object.
    pub inline: usize,
    /// The size at which a table pack is closed.
    pub pack: usize,
}

impl Default for Limits {
    /// What writers use. A manifest is half an object at most: its JSON and its index are no more than a frame each.
    fn default() -> Self {
        Self { inline: 32 << 20, pack: 16 << 20 }
    }
}

/// Frames of a manifest's object before the first chunk: the JSON and the index.
pub(super) const FIRST_CHUNK: u32 = 2;

/// zstd's default: a table is written once and read often.
pub(super) const LEVEL: i32 = 3;

/// Tables that a manifest can be written for.
#[derive(Debug)]
pub struct Tables {
    pub(super) index: TableIndex,
    /// The chunks, when they are to lie in the manifest's object.
    pub(super) chunks: Vec<Vec<u8>>,
}

impl Tables {
    /// Prepares the tables of a backup that needs `packs`, sorted by id, and has the chunks `files` of a file table.
    ///
    /// What is above the limits is in the vault when this returns.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn store(cluster: &Cluster, packs: &[PackRef], files: Vec<Vec<u8>>, limits: Limits) -> Result<Self> {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut chunks = pack_table::encode(packs);
        let mut index = TableIndex { pack_chunks: narrow(chunks.len()), file_chunks: narrow(files.len()), packs: Vec::new() };
        chunks.extend(files);
        if chunks.iter().map(Vec::len).sum::<usize>() > limits.inline {
            index.packs = spill(cluster, std::mem::take(&mut chunks), limits.pack).await?;
        }
        Ok(Self { index, chunks })
    }

    /// The packs that were stored.
    pub fn packs(&self) -> impl Iterator<Item = &PackRef> {
        self.index.packs.iter().map(|held| &held.pack)
    }
}

/// Stores chunks in packs of their own, one after the other.
async fn spill(cluster: &Cluster, chunks: Vec<Vec<u8>>, target: usize) -> Result<Vec<TablePack>> {
    let keys = cluster.keys();
    let mut encoder = FrameEncoder::new(LEVEL)?;
    let mut packs = Vec::new();
    let mut chunks = chunks.into_iter().peekable();
    while chunks.peek().is_some() {
        let id = cluster.env().new_id()?;
        let mut writer = SealedWriter::new(cluster.env(), keys, Kind::Meta, layout::pack(id), target + MAX_FRAME)?;
        let mut digests = Vec::new();
        while (writer.is_empty() || writer.len() < target)
            && let Some(chunk) = chunks.next()
        {
            let digest = keys.digest().frame(&chunk);
            let _ = writer.push(&mut encoder, &chunk, digest)?;
            digests.push(digest);
        }
        let object = writer.finish(Vec::new());
        cluster.put_once(&object).await?;
        let pack = PackRef { live: object.frames, ..object.as_pack(id.to_bytes(), PackKind::Meta) };
        packs.push(TablePack { pack, digests });
    }
    Ok(packs)
}

/// Reads chunks; neighbours lie in the same pack, so the open one is kept.
#[derive(Debug)]
struct Chunks<'a> {
    manifest: &'a StoredObject,
    index: &'a TableIndex,
    open: Option<(Ulid, StoredObject)>,
}

impl Chunks<'_> {
    async fn read(&mut self, number: u32) -> Result<Vec<u8>> {
        let Some((held, frame)) = self.index.locate(number) else {
            return self.manifest.frame(number.saturating_add(FIRST_CHUNK)).await;
        };
        let id = Ulid::from_bytes(held.pack.id);
        let open = match self.open.take().filter(|(open, _)| *open == id) {
            Some((_, open)) => open,
            None => open_pack(&self.manifest.cluster, id, held).await?,
        };
        let chunk = open.frame(frame).await;
        self.open = Some((id, open));
        chunk
    }
}

/// Opens a table pack, and makes sure that it holds what the manifest was written for.
async fn open_pack(cluster: &Cluster, id: Ulid, held: &TablePack) -> Result<StoredObject> {
    let name = layout::pack(id);
    let path = cluster.path(&name);
    let object = cluster.open(Kind::Meta, &name, Some(held.pack.size)).await.map_err(|e| lost(&path, e))?;
    // Who has the keys can write a pack that opens under this name; the digests tell it from the one that was committed.
    if !object.reader().frames().iter().map(|frame| frame.digest).eq(held.digests.iter().copied()) {
        return Err(Error::new(ErrorKind::Corrupt, "table.substituted", format!("{path} does not hold the manifest's tables")));
    }
    Ok(object)
}

fn unordered(table: &'static str) -> Error {
    FormatError::new(table, "has chunks that are not in order").into()
}

/// Reads the pack table, chunk by chunk.
#[derive(Debug)]
pub struct PackTable<'a> {
    chunks: Chunks<'a>,
    next: u32,
    last: Option<PackId>,
}

impl<'a> PackTable<'a> {
    pub(super) fn new(manifest: &'a StoredObject, index: &'a TableIndex) -> Self {
        Self { chunks: Chunks { manifest, index, open: None }, next: 0, last: None }
    }

    /// The next packs, in the order of their ids; `None` behind the last.
    ///
    /// # Errors
    /// When the store fails or the table was changed.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<PackRef>>> {
        if self.next >= self.chunks.index.pack_chunks {
            return Ok(None);
        }
        let packs = pack_table::parse_chunk(&self.chunks.read(self.next).await?)?;
        self.next += 1;
        if let (Some(last), Some(first)) = (self.last, packs.first())
            && last >= first.id
        {
            return Err(unordered("pack table"));
        }
        self.last = packs.last().map(|pack| pack.id).or(self.last);
        Ok(Some(packs))
    }
}

/// The chunks of the file table, as they are stored.
pub(super) async fn file_chunks(manifest: &StoredObject, index: &TableIndex) -> Result<Vec<Vec<u8>>> {
    let mut chunks = Chunks { manifest, index, open: None };
    let mut files = Vec::new();
    for number in 0..index.file_chunks {
        files.push(chunks.read(index.pack_chunks.saturating_add(number)).await?);
    }
    Ok(files)
}

/// Reads the file table, chunk by chunk.
#[derive(Debug)]
pub struct FileTable<'a> {
    chunks: Chunks<'a>,
    next: u32,
    last: String,
}

impl<'a> FileTable<'a> {
    pub(super) fn new(manifest: &'a StoredObject, index: &'a TableIndex) -> Self {
        Self { chunks: Chunks { manifest, index, open: None }, next: 0, last: String::new() }
    }

    /// The next files, in the order of their paths; `None` behind the last.
    ///
    /// # Errors
    /// When the store fails or the table was changed.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<FileEntry>>> {
        let index = self.chunks.index;
        if self.next >= index.file_chunks {
            return Ok(None);
        }
        let entries = file_table::parse_chunk(&self.chunks.read(index.pack_chunks.saturating_add(self.next)).await?)?;
        self.next += 1;
        // No path is empty, so the first chunk passes too.
        if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
            if first.path <= self.last {
                return Err(unordered("file table"));
            }
            self.last.clone_from(&last.path);
        }
        Ok(Some(entries))
    }
}
