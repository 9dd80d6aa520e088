//! The catalog, compared with all rows that refer to files.

use super::{BATCH, Capture, Work, blocking, by_name};
use crate::filestore::tree::Tree;
use crate::format::file_run::{Entry, State};
use crate::{Error, ErrorKind, Result};

/// What became known.
#[derive(Default)]
struct Known {
    /// Entries that change.
    changed: Vec<Entry>,
    /// Names that are in the directory, and not in the catalog.
    fresh: Vec<String>,
    /// Names that rows refer to and that are there.
    seen: u64,
}

/// A name that rows refer to, and what the catalog says of it.
type Asked = (String, Option<Entry>);

impl Capture {
    /// Looks for every file that a row refers to. `gone` is what the walk has not met again, sorted.
    pub(super) async fn compare(&mut self, work: &mut Work, gone: Vec<Entry>) -> Result<()> {
        let references = self.odoo.references().await?;
        let local = references.local;
        let (mut names, odd) = references.read()?;
        let now = work.position.at.as_millisecond();
        let mut gone = gone.into_iter().peekable();
        let mut catalog = self.catalog.merged().await?;
        let mut next = catalog.next().await?;
        let mut found = Known::default();
        let mut page: Vec<Asked> = Vec::new();
        loop {
            let name = names.next().transpose()?;
            // What lies before it in the catalog is referred to by no row; odd names come later.
            while let Some(entry) = next.take_if(|entry| name.as_ref().is_none_or(|name| entry.name < *name)) {
                let vanished = gone.next_if(|gone| gone.name == entry.name).is_some();
                if !odd.contains(&entry.name) {
                    unreferenced(entry, vanished, now, work, &mut found);
                }
                next = catalog.next().await?;
            }
            let Some(name) = name else { break };
            let entry = next.take_if(|entry| entry.name == name);
            if entry.is_some() {
                next = catalog.next().await?;
            }
            let vanished = gone.next_if(|gone| gone.name == name).is_some();
            match entry {
                Some(Entry { state: State::Present(_), .. }) if !vanished => found.seen += 1,
                entry => page.push((name, entry)),
            }
            if page.len() >= BATCH {
                self.look(work, std::mem::take(&mut page), now, &mut found).await?;
            }
            if found.changed.len() >= BATCH {
                self.keep(work, std::mem::take(&mut found.changed), &[]).await?;
            }
        }
        for name in odd {
            let entry = self.catalog.entry(&name).await?;
            page.push((name, entry));
        }
        self.look(work, page, now, &mut found).await?;
        if local > 0 && found.seen == 0 && found.fresh.is_empty() && work.doubtful.is_empty() && !self.options.accept_losses {
            return Err(Error::new(
                ErrorKind::Source,
                "filestore.empty",
                format!(
                    "none of the {local} files that {} refers to is in {}",
                    self.odoo.database.name,
                    self.options.folder.display()
                ),
            )
            .with_hint("is its volume mounted, and is it this database's? nothing was recorded"));
        }
        self.keep(work, found.changed, &[]).await?;
        let _ = self.store(work, by_name(found.fresh)).await?;
        Ok(())
    }

    /// Looks by their paths for files that rows refer to and that no walk has met.
    async fn look(&self, work: &mut Work, page: Vec<Asked>, now: i64, found: &mut Known) -> Result<()> {
        let tree = work.tree.clone();
        let look = move || Ok(page.into_iter().map(|(name, entry)| (exists(&tree, &name), name, entry)).collect::<Vec<_>>());
        for (exists, name, entry) in blocking(look).await? {
            let since = entry.as_ref().map_or(now, |entry| entry.since);
            let state = match (entry.map(|entry| entry.state), exists) {
                // Stored by the walk; or the walk did not show it.
                (Some(State::Present(_)), true) => {
                    found.seen += 1;
                    continue;
                }
                (Some(State::Gone(content, _)), true) => {
                    found.seen += 1;
                    work.counts.present(content.size);
                    State::Present(content)
                }
                (Some(State::Lost(..)), _) => {
                    work.counts.lost += 1;
                    continue;
                }
                // Its content is not what its name says.
                (Some(State::Damaged(_)), true) => {
                    work.counts.damaged += 1;
                    continue;
                }
                // It may still be being written.
                (_, true) if work.doubtful.contains_key(&name) => continue,
                (None | Some(State::Missing(_) | State::Forgotten), true) => {
                    found.fresh.push(name);
                    continue;
                }
                (Some(State::Present(content) | State::Gone(content, _)), false) => {
                    work.counts.lost += 1;
                    work.warn(format!("{name}: rows refer to it and it is gone from the filestore; the vault has it"));
                    State::Lost(content, now)
                }
                (Some(State::Missing(_)), false) => {
                    work.counts.missing += 1;
                    continue;
                }
                (None | Some(State::Damaged(_) | State::Forgotten), false) => {
                    work.counts.missing += 1;
                    State::Missing(now)
                }
            };
            found.changed.push(Entry { name, since, state });
        }
        Ok(())
    }
}

/// What becomes of an entry that no row refers to.
fn unreferenced(entry: Entry, vanished: bool, now: i64, work: &mut Work, found: &mut Known) {
    let Entry { name, since, state } = entry;
    let state = match state {
        State::Present(content) if vanished => {
            work.counts.gone += 1;
            State::Gone(content, now)
        }
        State::Lost(content, at) => {
            work.counts.gone += 1;
            State::Gone(content, at)
        }
        State::Missing(_) => State::Forgotten,
        State::Damaged(_) if !exists(&work.tree, &name) => State::Forgotten,
        State::Damaged(_) => {
            work.counts.damaged += 1;
            return;
        }
        State::Present(_) | State::Gone(..) | State::Forgotten => return,
    };
    found.changed.push(Entry { name, since, state });
}

fn exists(tree: &Tree, name: &str) -> bool {
    matches!(tree.root().file(name), Ok(Some(_)))
}
