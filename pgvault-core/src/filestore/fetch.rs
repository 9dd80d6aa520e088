//! Exactly the files that a database refers to, out of the vault.
//!
//! The names are the restored database's own word; the catalog says where each content lies; each pack is fetched once and each file
//! compared with its SHA-1 before it counts. What cannot be had is named, with what is known of it: that it has been missing at the
//! source, or that no pass has seen it.

mod folder;
mod load;
mod packs;
mod receiver;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use self::folder::Folder;
use self::packs::Job;
use self::receiver::Exit;
use super::catalog::Catalog;
use super::database::References;
use crate::format::file_run::{Content, Entry, Piece, State};
use crate::format::map::PackId;
use crate::progress::SharedProgress;
use crate::{Error, ErrorKind, Result};

pub use self::load::Loading;
pub use self::receiver::{Receiver, SharedReceiver};

/// Files that are planned at once; each takes some hundred bytes.
const BATCH: usize = 500_000;

/// Names that are listed of what cannot be had.
const NAMED: usize = 1000;

/// Where files go.
#[derive(Debug, Clone)]
pub enum Sink {
    /// Into a directory.
    Folder {
        /// The filestore; `checklist` below it stays empty.
        path: PathBuf,
        /// User and group that own the files; those of the directory above when not given.
        owner: Option<(u32, u32)>,
        /// Keep what is there and right, and remove what nothing refers to.
        delta: bool,
    },
    /// Nowhere: they are read and compared. One of so many files; 1 for all.
    Nowhere {
        /// See above.
        one_in: u32,
    },
    /// To somebody who takes them one after the other, such as the writer of an archive.
    Receiver(SharedReceiver),
}

/// How files are fetched.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Where they go.
    pub sink: Sink,
    /// Packs that are on their way at once; each takes up to 64 MiB of memory.
    pub workers: usize,
    /// Told of bytes that were written.
    pub progress: SharedProgress,
}

/// How many packs are on their way at once when nobody says: as many as there are cores, and no more than memory is meant for.
pub fn packs_at_once(configured: Option<usize>) -> usize {
    configured.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)).clamp(1, 4)
}

/// Which files are wanted.
#[derive(Debug)]
pub enum Wish {
    /// Those that rows of a database refer to.
    Referenced(References),
    /// Those that were in the filestore at a time, as far as passes saw it: for a filestore without its database.
    At(Timestamp),
}

/// Why a file cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum Why {
    /// No pass has seen it.
    Unknown,
    /// It was missing at the source already.
    MissingAtSource {
        /// When that was first noticed.
        since: Timestamp,
    },
    /// Its content at the source was not what its name says.
    DamagedAtSource {
        /// When that was first noticed.
        since: Timestamp,
    },
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => write!(f, "was never captured"),
            Self::MissingAtSource { since } => write!(f, "has been missing at the source since {since:.0} or longer"),
            Self::DamagedAtSource { since } => write!(f, "has been damaged at the source since {since:.0} or longer"),
        }
    }
}

/// A file that rows refer to and that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// Its name.
    pub name: String,
    /// Why.
    #[serde(flatten)]
    pub why: Why,
}

/// What was fetched.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Fetched {
    /// Files that are there now.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of them, files that were there before.
    pub kept: u64,
    /// Files that were removed, because nothing refers to them.
    pub removed: u64,
    /// Files that no pass has seen: lost, unless they are still at the source.
    pub unknown: u64,
    /// Files that were missing or damaged at the source already.
    pub bad_at_source: u64,
    /// The first of both.
    pub missing: Vec<Missing>,
    /// Objects elsewhere that rows refer to, by scheme.
    pub remote: BTreeMap<String, u64>,
    /// How long it took.
    pub took: Duration,
}

/// A file on its way.
#[derive(Debug)]
struct Item {
    name: Box<str>,
    mode: u32,
    sha1: [u8; 20],
    place: Piece,
}

/// A file of several frames.
#[derive(Debug)]
struct Large {
    name: Box<str>,
    content: Content,
}

/// Fetches files.
///
/// # Errors
/// [`ErrorKind::Usage`] when the directory has something in it and `delta` was not asked for; [`ErrorKind::Corrupt`] when what is stored
/// was changed or is missing; otherwise when the store or the file system fails. An interrupted one goes on with `delta`.
pub async fn fetch(catalog: &mut Catalog, wish: Wish, options: &FetchOptions) -> Result<Fetched> {
    let began = Instant::now();
    let mut fetch = Fetch {
        folder: match &options.sink {
            Sink::Folder { path, owner, delta } => Some(Folder::prepare(path, *owner, *delta)?),
            Sink::Nowhere { .. } | Sink::Receiver(_) => None,
        },
        options: options.clone(),
        items: Vec::new(),
        large: Vec::new(),
        number: 0,
        fetched: Fetched::default(),
    };
    match wish {
        Wish::At(time) => fetch.at(catalog, time.as_millisecond()).await?,
        Wish::Referenced(references) => {
            fetch.fetched.remote.clone_from(&references.remote);
            fetch.referenced(catalog, references).await?;
        }
    }
    fetch.flush(catalog).await?;
    if let Some(folder) = fetch.folder.take() {
        fetch.fetched.removed = folder.finish()?;
    }
    Ok(Fetched { took: began.elapsed(), ..fetch.fetched })
}

/// The content of one file, by its path below the filestore.
///
/// # Errors
/// [`ErrorKind::NotFound`] when the vault does not have it; [`ErrorKind::Corrupt`] when what is stored was changed; otherwise when the store fails.
pub async fn get(catalog: &mut Catalog, name: &str, out: &mut (impl std::io::Write + Send)) -> Result<u64> {
    let entry = catalog.entry(name).await?;
    let Some(content) = entry.as_ref().and_then(|entry| entry.state.content()).cloned() else {
        return Err(Error::new(ErrorKind::NotFound, "filestore.unknown", format!("the vault has no file {name} of this database"))
            .with_hint("`pgvault filestore list` shows what passes saw"));
    };
    packs::write(catalog, name, &content, out).await?;
    Ok(content.size)
}

struct Fetch {
    folder: Option<Folder>,
    options: FetchOptions,
    items: Vec<Item>,
    large: Vec<Large>,
    /// Files so far, for the sample.
    number: u64,
    fetched: Fetched,
}

impl Fetch {
    async fn at(&mut self, catalog: &mut Catalog, time: i64) -> Result<()> {
        let mut entries = catalog.merged().await?;
        while let Some(entry) = entries.next().await? {
            let was_there = match entry.state {
                State::Present(_) | State::Lost(..) => true,
                State::Gone(_, at) => at > time,
                State::Missing(_) | State::Damaged(_) | State::Forgotten => false,
            };
            if was_there && entry.since <= time {
                self.add(&entry.name.clone(), Some(entry))?;
            }
            if self.items.len() >= BATCH {
                self.flush(catalog).await?;
            }
        }
        Ok(())
    }

    async fn referenced(&mut self, catalog: &mut Catalog, references: References) -> Result<()> {
        let (names, odd) = references.read()?;
        // Two names may lead to one path, and one file is enough for both.
        let mut odd: BTreeSet<String> = odd.into_iter().collect();
        let mut entries = catalog.merged().await?;
        let mut next = entries.next().await?;
        for name in names {
            let name = name?;
            let _ = odd.remove(&name);
            while next.as_ref().is_some_and(|entry| entry.name < name) {
                next = entries.next().await?;
            }
            let entry = next.take_if(|entry| entry.name == name);
            if entry.is_some() {
                next = entries.next().await?;
            }
            self.add(&name, entry)?;
            if self.items.len() >= BATCH {
                self.flush(catalog).await?;
            }
        }
        for name in odd {
            let entry = catalog.entry(&name).await?;
            self.add(&name, entry)?;
        }
        Ok(())
    }

    /// Plans a file.
    fn add(&mut self, name: &str, entry: Option<Entry>) -> Result<()> {
        let time = |at: i64| Timestamp::from_millisecond(at).unwrap_or(Timestamp::UNIX_EPOCH);
        let found = match entry.map(|entry| entry.state) {
            Some(State::Present(content) | State::Gone(content, _) | State::Lost(content, _)) => Ok(content),
            Some(State::Missing(at)) => Err(Why::MissingAtSource { since: time(at) }),
            Some(State::Damaged(at)) => Err(Why::DamagedAtSource { since: time(at) }),
            None | Some(State::Forgotten) => Err(Why::Unknown),
        };
        let content = match found {
            Ok(content) => content,
            Err(why) => {
                self.missing(name, why);
                return Ok(());
            }
        };
        self.number += 1;
        if let Sink::Nowhere { one_in } = self.options.sink
            && !self.number.is_multiple_of(u64::from(one_in.max(1)))
        {
            return Ok(());
        }
        self.fetched.files += 1;
        self.fetched.bytes += content.size;
        folder::ensure_inside(name)?;
        if let Some(folder) = &mut self.folder {
            folder.expect(name);
            if folder.has(name, &content)? {
                self.fetched.kept += 1;
                return Ok(());
            }
        }
        let name = Box::from(name);
        match content.pieces.as_slice() {
            [piece] => self.items.push(Item { name, mode: content.mode, sha1: content.sha1, place: *piece }),
            _ => self.large.push(Large { name, content }),
        }
        Ok(())
    }

    fn missing(&mut self, name: &str, why: Why) {
        match why {
            Why::Unknown => self.fetched.unknown += 1,
            Why::MissingAtSource { .. } | Why::DamagedAtSource { .. } => self.fetched.bad_at_source += 1,
        }
        if self.fetched.missing.len() < NAMED {
            self.fetched.missing.push(Missing { name: name.to_owned(), why });
        }
    }

    /// Fetches what was planned.
    async fn flush(&mut self, catalog: &mut Catalog) -> Result<()> {
        let mut by_pack: BTreeMap<PackId, Vec<Item>> = BTreeMap::new();
        for item in self.items.drain(..) {
            by_pack.entry(item.place.pack).or_default().push(item);
        }
        let mut jobs = Vec::with_capacity(by_pack.len());
        for (id, mut items) in by_pack {
            items.sort_by_key(|item| (item.place.frame, item.place.offset));
            let pack = catalog.pack(&id).await?.ok_or_else(|| {
                let why = format!("the catalog does not know pack {}, which it refers to", ulid::Ulid::from_bytes(id));
                Error::new(ErrorKind::Corrupt, "filestore.pack", why)
            })?;
            jobs.push(Job { pack, items });
        }
        let exit = match (&self.folder, &self.options.sink) {
            (Some(folder), _) => Exit::Folder(folder.writer()),
            (None, Sink::Receiver(receiver)) => Exit::Receiver(receiver.clone()),
            (None, _) => Exit::Nowhere,
        };
        packs::run(catalog.cluster(), jobs, &exit, &self.options).await?;
        // One after the other, and after all others: a receiver gets no piece of one file between pieces of another.
        for Large { name, content } in std::mem::take(&mut self.large) {
            let mut out = exit.begin(&name, content.size)?;
            packs::write(catalog, &name, &content, &mut out).await?;
            out.end(content.mode)?;
            self.options.progress.advance(content.size);
        }
        Ok(())
    }
}
