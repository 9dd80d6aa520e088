//! Which names of a filestore are in the vault, and where.
//!
//! A catalog is a list of runs, the newest first, and the few entries that are newer than any run. All of it is found from one pass
//! (or from several, when writers did not know of each other); nothing of it is ever changed. A name is looked up in the newest first,
//! past the runs whose filter does not have it; all names are read by merging. Memory is that of a chunk or a pack for each run,
//! whatever the number of files.

mod merge;
mod run;
mod write;

use std::collections::{BTreeMap, HashMap};

pub use self::merge::Merged;
pub(crate) use self::run::Run;
pub(crate) use self::write::write_run;
use crate::Result;
use crate::format::file_run::{self, Entry, RunEncoder, RunRef, State};
use crate::format::map::PackId;
use crate::format::pack_table::PackRef;
use crate::format::{Cursor, FormatError, put_string};
use crate::vault::Cluster;

/// Entries that a pass holds itself. More become a run.
const MOST_RECENT: usize = 256;

/// The catalog of one filestore.
#[derive(Debug)]
pub struct Catalog {
    cluster: Cluster,
    /// Newer than any run.
    recent: BTreeMap<String, Entry>,
    /// The packs that those refer to.
    packs: HashMap<PackId, PackRef>,
    /// The newest first.
    runs: Vec<Run>,
}

impl Catalog {
    /// A catalog without names.
    pub fn empty(cluster: &Cluster) -> Self {
        Self { cluster: cluster.clone(), recent: BTreeMap::new(), packs: HashMap::new(), runs: Vec::new() }
    }

    /// The catalog that a pass has written down.
    pub(crate) fn parse(cluster: &Cluster, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new("filestore catalog", bytes);
        let runs = file_run::parse_runs(cursor.bytes()?)?;
        let packs = file_run::parse_packs(cursor.bytes()?)?;
        let recent = file_run::parse_chunk(cursor.bytes()?, &packs)?;
        cursor.finish()?;
        Ok(Self {
            cluster: cluster.clone(),
            recent: recent.into_iter().map(|entry| (entry.name.clone(), entry)).collect(),
            packs: packs.into_iter().map(|pack| (pack.id, pack)).collect(),
            runs: runs.into_iter().map(|run| Run::new(cluster, run)).collect(),
        })
    }

    /// The catalog as a pass writes it down.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut encoder = RunEncoder::default();
        let mut chunk = Vec::new();
        for entry in self.recent.values() {
            chunk.extend(encoder.push(entry).map(|full| full.bytes).unwrap_or_default());
        }
        chunk.extend(encoder.take().map(|last| last.bytes).unwrap_or_default());
        let (_, used) = encoder.finish();
        // In the order of their indices, which is not that of a pack table.
        let packs: Vec<PackRef> = used.iter().filter_map(|id| self.packs.get(id).copied()).collect();
        let runs: Vec<RunRef> = self.runs.iter().map(|run| run.reference().clone()).collect();
        let mut out = Vec::new();
        put_string(&mut out, &file_run::encode_runs(&runs));
        put_string(&mut out, &file_run::encode_packs(&packs));
        put_string(&mut out, &chunk);
        out
    }

    /// Adds what another catalog knows: of a writer that did not know of this one.
    ///
    /// What both have lies in the vault twice; either is right.
    pub(crate) fn absorb(&mut self, other: Self) {
        let known: Vec<RunRef> = self.runs.iter().map(|run| run.reference().clone()).collect();
        self.runs.extend(other.runs.into_iter().filter(|run| !known.contains(run.reference())));
        for (name, entry) in other.recent {
            let _ = self.recent.entry(name).or_insert(entry);
        }
        self.packs.extend(other.packs);
    }

    /// The runs, the newest first.
    pub(crate) fn runs(&mut self) -> &mut [Run] {
        &mut self.runs
    }

    /// The packs that the newest entries refer to.
    pub(crate) fn recent_packs(&self) -> impl Iterator<Item = &PackRef> {
        self.packs.values()
    }

    /// Entries in all runs, those included that newer ones stand in front of.
    pub fn entries(&self) -> u64 {
        self.runs.iter().map(|run| run.reference().entries).sum::<u64>() + self.recent.len() as u64
    }

    /// What is known of each of these names; in their order. Sorted names are found faster.
    ///
    /// # Errors
    /// When the store fails, or a run was changed.
    pub async fn look_up(&mut self, names: &[String]) -> Result<Vec<Option<Entry>>> {
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            found.push(self.entry(name).await?);
        }
        Ok(found)
    }

    /// What is known of a name.
    ///
    /// # Errors
    /// As [`Catalog::look_up`].
    pub async fn entry(&mut self, name: &str) -> Result<Option<Entry>> {
        let mut found = self.recent.get(name).cloned();
        if found.is_none() {
            for run in &mut self.runs {
                found = run.entry(name).await?;
                if found.is_some() {
                    break;
                }
            }
        }
        Ok(found.filter(|entry| entry.state != State::Forgotten))
    }

    /// The stored pack that an entry of this catalog refers to.
    ///
    /// # Errors
    /// When the store fails, or a run was changed.
    pub async fn pack(&mut self, id: &PackId) -> Result<Option<PackRef>> {
        if let Some(pack) = self.packs.get(id) {
            return Ok(Some(*pack));
        }
        for run in &mut self.runs {
            if let Some(pack) = run.pack(id).await? {
                return Ok(Some(pack));
            }
        }
        Ok(None)
    }

    /// All entries, sorted by name, each once.
    ///
    /// # Errors
    /// When the store fails, or a run was changed.
    pub async fn merged(&mut self) -> Result<Merged> {
        let mut sources = vec![run::Reading::of_entries(self.recent.values().cloned().collect())];
        for run in &mut self.runs {
            sources.push(run.read().await?);
        }
        Ok(Merged::new(sources))
    }

    /// Adds entries, sorted by name, that refer to `packs`, and merges runs that have become many. Entries of files that were gone
    /// before `horizon` (milliseconds of Unix time) need not be kept.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn add(&mut self, entries: Vec<Entry>, packs: &[PackRef], horizon: Option<i64>) -> Result<Added> {
        self.packs.extend(packs.iter().map(|pack| (pack.id, *pack)));
        for entry in entries {
            let _ = self.recent.insert(entry.name.clone(), entry);
        }
        if self.recent.len() <= MOST_RECENT {
            return Ok(Added::default());
        }
        // As many of the newest runs as are together not much smaller than the next: so there are never many, and no entry is written
        // again often.
        let mut sum = self.recent.len() as u64;
        let mut taken = 0;
        for run in &self.runs {
            let next = run.reference().entries;
            if next >= sum.saturating_mul(2) {
                break;
            }
            sum += next;
            taken += 1;
        }
        let whole = taken == self.runs.len();
        let mut known: HashMap<PackId, PackRef> = std::mem::take(&mut self.packs);
        let mut sources = vec![run::Reading::of_entries(std::mem::take(&mut self.recent).into_values().collect())];
        for run in self.runs.iter_mut().take(taken) {
            known.extend(run.head().await?.packs.iter().map(|pack| (pack.id, *pack)));
            sources.push(run.read().await?);
        }
        let keep = |entry: &Entry| {
            !whole
                || match entry.state {
                    State::Forgotten => false,
                    State::Gone(_, at) => horizon.is_none_or(|horizon| at >= horizon),
                    _ => true,
                }
        };
        let written = write_run(&self.cluster, Merged::with_forgotten(sources), keep, sum, &known).await?;
        drop(self.runs.drain(..taken));
        let added = Added { bytes: written.bytes };
        if let Some(run) = written.run {
            self.runs.insert(0, Run::new(&self.cluster, run));
        }
        Ok(added)
    }

    /// The cluster that it lies in.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }
}

/// What adding entries has stored.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Added {
    pub(crate) bytes: u64,
}
