//! The whole directory, compared with the catalog name by name.

use std::os::unix::fs::MetadataExt;

use jiff::Timestamp;

use super::{BATCH, Capture, FEW, Step, Work, blocking, by_name, unmounted};
use crate::Result;
use crate::filestore::pass::{Counts, PassKind};
use crate::filestore::space;
use crate::filestore::tree::{Armed, Found};
use crate::format::file_run::{Entry, State, promised_sha1};

/// What a walk leaves behind, for the files to be compared with the rows.
#[derive(Default)]
struct Seen {
    /// To be stored.
    wanted: Vec<String>,
    /// There again.
    back: Vec<Entry>,
    /// There no more.
    gone: Vec<Entry>,
}

impl Capture {
    /// A full pass.
    pub(super) async fn full(&mut self, work: &mut Work, why: &str) -> Result<PassKind> {
        tracing::info!(database = %self.odoo.database.name, why, "all of the filestore is looked at");
        work.horizon = space::horizon(&self.cluster).await?.map(Timestamp::as_millisecond);
        // Set before the walk: when the collector runs meanwhile, the next pass knows.
        let collector = self.odoo.collector_ran().await;
        let (tree, grace, id) = (work.tree.clone(), self.has_grace(), self.cluster.env().new_id()?);
        let (armed, marks) = blocking(move || {
            if grace {
                tree.disarm();
                return Ok((Armed::Nowhere, Vec::new()));
            }
            let armed = tree.arm(id);
            Ok((armed, tree.checklist()?))
        })
        .await?;
        // Without a tripwire Odoo's own word has to do, which comes when the collector has ended.
        self.collector = collector.filter(|_| armed != Armed::Nowhere);
        self.armed = (armed == Armed::Set).then_some(id);
        self.marks = marks;
        self.highest = self.odoo.highest_id().await?;
        let gone = self.walk(work).await?;
        self.compare(work, gone).await?;
        // What is doubtful is looked at again.
        let doubtful = &work.doubtful;
        self.marks.retain(|mark| !doubtful.contains_key(mark));
        Ok(PassKind::Full)
    }

    /// Stores what is unknown; gives what the catalog has and the directory has not.
    async fn walk(&mut self, work: &mut Work) -> Result<Vec<Entry>> {
        let tree = work.tree.clone();
        let tops = blocking(move || tree.tops()).await?;
        self.at(Step::Listed).await;
        let mut known = self.catalog.merged().await?;
        let mut next = known.next().await?;
        let mut seen = Seen::default();
        let before = self.last.as_ref().map_or(0, |last| last.counts.present);
        let limit = FEW.max(before / 2);
        work.counts = Counts::default();
        for top in tops {
            let tree = work.tree.clone();
            for file in blocking(move || tree.files(&top)).await? {
                while let Some(entry) = next.take_if(|entry| entry.name < file.name) {
                    absent(entry, &mut work.counts, &mut seen.gone);
                    next = known.next().await?;
                }
                let entry = next.take_if(|entry| entry.name == file.name);
                if entry.is_some() {
                    next = known.next().await?;
                }
                self.meet(work, file, entry, &mut seen).await?;
                if seen.wanted.len() >= BATCH {
                    let _ = self.store(work, by_name(std::mem::take(&mut seen.wanted))).await?;
                }
                if seen.back.len() >= BATCH {
                    self.keep(work, std::mem::take(&mut seen.back), &[]).await?;
                }
            }
            if seen.gone.len() as u64 > limit && !self.options.accept_losses {
                return Err(unmounted(&self.options.folder, before));
            }
        }
        while let Some(entry) = next {
            absent(entry, &mut work.counts, &mut seen.gone);
            next = known.next().await?;
        }
        let Seen { wanted, back, gone } = seen;
        // That nothing at all is left is judged by the rows.
        if gone.len() as u64 > limit && !self.options.accept_losses {
            return Err(unmounted(&self.options.folder, before));
        }
        self.keep(work, back, &[]).await?;
        let _ = self.store(work, by_name(wanted)).await?;
        Ok(gone)
    }

    /// Compares a file with what the catalog knows of it.
    async fn meet(&self, work: &mut Work, file: Found, entry: Option<Entry>, seen: &mut Seen) -> Result<()> {
        let Some(Entry { name, since, state }) = entry else {
            seen.wanted.push(file.name);
            return Ok(());
        };
        let named_by_content = promised_sha1(&name).is_some();
        match state {
            State::Present(content) if named_by_content && content.size != file.size => {
                work.warn(format!(
                    "{name} has {} bytes, and {} when it was stored: the source is damaged",
                    file.size, content.size
                ));
                seen.back.push(Entry { name, since, state: State::Lost(content, work.position.at.as_millisecond()) });
            }
            State::Present(content) if named_by_content => work.counts.present(content.size),
            State::Gone(content, _) | State::Lost(content, _) if named_by_content && content.size == file.size => {
                work.counts.present(content.size);
                seen.back.push(Entry { name, since, state: State::Present(content) });
            }
            // Still not the content that was stored.
            State::Lost(..) if named_by_content => {}
            // The name says nothing of the content.
            State::Present(content) if self.is_unchanged(work, &name, content.size, since).await? => {
                work.counts.present(content.size);
            }
            _ => seen.wanted.push(name),
        }
        Ok(())
    }

    /// Whether a file that is not named by its content is as it was when it was stored.
    async fn is_unchanged(&self, work: &Work, name: &str, size: u64, since: i64) -> Result<bool> {
        let (tree, name) = (work.tree.clone(), name.to_owned());
        blocking(move || {
            let Ok(Some(file)) = tree.root().file(&name) else { return Ok(false) };
            let Ok(meta) = file.metadata() else { return Ok(false) };
            // The clocks of two machines may differ by a minute.
            Ok(meta.len() == size && meta.mtime().saturating_mul(1000) < since - 60_000)
        })
        .await
    }
}

/// Notes what is in the catalog and not in the directory.
fn absent(entry: Entry, counts: &mut Counts, gone: &mut Vec<Entry>) {
    match entry.state {
        State::Present(_) => gone.push(entry),
        State::Gone(..) => counts.gone += 1,
        // Whether rows still refer to them is found out later.
        State::Lost(..) | State::Missing(_) | State::Damaged(_) | State::Forgotten => {}
    }
}
