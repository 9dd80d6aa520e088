//! Filestores: every content that a catalog leads to has to be there.

use std::collections::BTreeSet;

use ulid::Ulid;

use super::{Checker, finding};
use crate::ErrorKind;
use crate::Result;
use crate::filestore::pass;
use crate::format::file_run::Entry;
use crate::format::pack_table::PackRef;
use crate::vault::layout;

/// Entries of one filestore that are named when something is wrong with them.
const NAMED: usize = 10;

impl Checker<'_> {
    /// Reads every catalog and compares it with what is there.
    pub(super) async fn filestores(&mut self) -> Result<()> {
        let folder_of = |name: &String| Some(name.strip_prefix(layout::dir::PASS)?.split('/').next()?.to_owned());
        let folders: BTreeSet<String> = self.names(layout::dir::PASS).iter().filter_map(folder_of).collect();
        for folder in folders {
            match self.filestore(&folder).await {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound) => {
                    self.report.error(self.cluster.path(&layout::passes(&folder)), finding(error)?, Vec::new());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn filestore(&mut self, folder: &str) -> Result<()> {
        let Some(mut known) = pass::load(self.cluster, folder).await? else { return Ok(()) };
        let mut packs: Vec<PackRef> = known.catalog.recent_packs().copied().collect();
        for run in known.catalog.runs() {
            let first = run.reference().pack;
            packs.push(first);
            // There is no reading on without it.
            if self.lost(&first).is_none() {
                let head = run.head().await?;
                packs.extend(head.before.iter().chain(&head.packs));
            }
        }
        packs.sort();
        packs.dedup();
        let mut whole = true;
        for pack in &packs {
            if let Some(problem) = self.lost(pack) {
                whole = false;
                let name = self.cluster.path(&layout::files_pack(Ulid::from_bytes(pack.id)));
                let problem = format!("{problem}; documents of database {} are lost with it", known.pass.database.name);
                self.report.error(name, problem, Vec::new());
            }
        }
        if !whole {
            return Ok(());
        }
        let mut entries = known.catalog.merged().await?;
        let mut wrong = 0;
        while let Some(entry) = entries.next().await? {
            if !self.has(&entry) {
                wrong += 1;
                if wrong <= NAMED {
                    let why = format!("{}: its place lies behind the end of a frame", entry.name);
                    self.report.error(self.cluster.path(&layout::passes(folder)), why, Vec::new());
                }
            }
        }
        Ok(())
    }

    /// What is wrong with a pack of a filestore.
    fn lost(&self, pack: &PackRef) -> Option<String> {
        let name = layout::files_pack(Ulid::from_bytes(pack.id));
        match self.objects.get(&name) {
            None => Some("is missing".to_owned()),
            Some(object) if self.damaged.contains(&name) => Some(object.name.clone()),
            Some(object) if object.size != pack.size => Some(format!("has {} bytes; the catalog says {}", object.size, pack.size)),
            Some(_) => None,
        }
    }

    /// Whether the frames have what an entry says lies in them, as far as they were opened.
    fn has(&self, entry: &Entry) -> bool {
        let pieces = entry.state.content().map(|content| content.pieces.as_slice()).unwrap_or_default();
        pieces.iter().all(|piece| {
            let Some(frames) = self.frames.get(&piece.pack) else { return true };
            let end = u64::from(piece.offset) + piece.len;
            frames.get(piece.frame as usize).is_some_and(|len| end <= u64::from(*len))
        })
    }
}
