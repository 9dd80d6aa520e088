//! A run on its way into the store.

use std::collections::HashMap;

use crate::crypto::sealed::{FrameEncoder, SealedWriter};
use crate::format::MAX_FRAME;
use crate::format::file_run::{Chunk, Entry, Filter, RunEncoder, RunHead, RunRef};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::{PackKind, PackRef};
use crate::pack::META_TARGET;
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

use super::Merged;

/// What became of entries.
#[derive(Debug)]
pub(crate) struct Written {
    /// None when no entry was kept.
    pub(crate) run: Option<RunRef>,
    pub(crate) bytes: u64,
}

/// Stores entries as a run: those that `keep` says, at most `expected`. Contents lie in the packs of `known`.
pub(crate) async fn write_run(
    cluster: &Cluster,
    mut entries: Merged,
    keep: impl Fn(&Entry) -> bool,
    expected: u64,
    known: &HashMap<PackId, PackRef>,
) -> Result<Written> {
    let mut writer = Writer::new(cluster)?;
    let mut encoder = RunEncoder::default();
    let mut head = RunHead { filter: Filter::for_names(expected), ..RunHead::default() };
    while let Some(entry) = entries.next().await? {
        if !keep(&entry) {
            continue;
        }
        head.filter.add(&entry.name);
        if let Some(chunk) = encoder.push(&entry) {
            writer.chunk(chunk, &mut head).await?;
        }
    }
    if let Some(chunk) = encoder.take() {
        writer.chunk(chunk, &mut head).await?;
    }
    let (count, used) = encoder.finish();
    if count == 0 {
        return Ok(Written { run: None, bytes: 0 });
    }
    for id in used {
        head.packs.push(*known.get(&id).ok_or_else(|| {
            let why = format!("the catalog refers to pack {}, which it does not know", ulid::Ulid::from_bytes(id));
            Error::new(ErrorKind::Failed, "filestore.pack", why)
        })?);
    }
    writer.finish(&head, count).await
}

struct Writer<'a> {
    cluster: &'a Cluster,
    encoder: FrameEncoder,
    open: Option<(ulid::Ulid, SealedWriter)>,
    bytes: u64,
}

impl<'a> Writer<'a> {
    fn new(cluster: &'a Cluster) -> Result<Self> {
        Ok(Self { cluster, encoder: FrameEncoder::new(1)?, open: None, bytes: 0 })
    }

    /// Appends a frame to the open pack; its number.
    fn frame(&mut self, raw: &[u8]) -> Result<u32> {
        let cluster = self.cluster;
        let (_, writer) = match &mut self.open {
            Some(open) => open,
            none => {
                let id = cluster.env().new_id()?;
                let name = layout::files_pack(id);
                none.insert((id, SealedWriter::new(cluster.env(), cluster.keys(), Kind::Meta, name, raw.len() + 1024)?))
            }
        };
        writer.push(&mut self.encoder, raw, cluster.keys().digest().frame(raw))
    }

    async fn chunk(&mut self, chunk: Chunk, head: &mut RunHead) -> Result<()> {
        let _ = self.frame(&chunk.bytes)?;
        head.firsts.push(chunk.first);
        if self.open.as_ref().is_some_and(|(_, writer)| writer.len() >= META_TARGET) {
            head.before.extend(self.store().await?);
        }
        Ok(())
    }

    async fn store(&mut self) -> Result<Option<PackRef>> {
        let Some((id, writer)) = self.open.take() else { return Ok(None) };
        let object = writer.finish(Vec::new());
        let pack = object.as_pack(id.to_bytes(), PackKind::Meta);
        self.cluster.put_once(&object).await?;
        self.bytes += pack.size;
        Ok(Some(pack))
    }

    async fn finish(mut self, head: &RunHead, entries: u64) -> Result<Written> {
        let mut first = None;
        for part in head.encode().chunks(MAX_FRAME) {
            let number = self.frame(part)?;
            let _ = first.get_or_insert(number);
        }
        let stored = self.store().await?;
        let run = stored.zip(first).map(|(pack, head)| RunRef { pack, head, entries });
        Ok(Written { run, bytes: self.bytes })
    }
}
