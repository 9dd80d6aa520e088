//! A capture pass: where the server is, then which names there are, then those that are unknown into packs, then the pass.
//!
//! The order is what makes it right. A file is written before its row commits, so whatever committed at or before the position that was
//! read *first* has its files in the directory when it is looked at. Only a pass that has looked at everything that may be new moves the
//! watermark:
//!
//! - A **full** pass walks the whole directory, and afterwards compares the catalog with all rows: a name that no walk has shown is
//!   looked for by its path, because a directory on a network may be shown as it was a minute ago.
//! - A **checklist** pass reads Odoo's own list of new files. When the garbage collector has run since the last pass, that list was
//!   emptied in between, and the pass becomes a full one.
//!
//! Some files stand on no list: those whose names are not of Odoo's making (imports, modules), and those that a killed worker had left and
//! another took up. Rows that are new are asked for them; a row that is *changed* to such a name is met by the next full pass.
//!
//! A file whose content is not what its name says is left for the next pass; after [`TRIES`] of them it is damaged, and an older, good
//! content stays what the vault has. Nothing is recorded at all of a filestore that looks unmounted.

mod compare;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use jiff::Timestamp;
use ulid::Ulid;

use super::catalog::Catalog;
use super::contents::{Outcome, Stow, Wanted, store};
use super::database::{Odoo, Position};
use super::guard::Guard;
use super::pass::{self, Counts, Pass, PassKind, Watermark};
use super::tree::Tree;
use crate::format::file_run::{Entry, State, promised_sha1};
use crate::postgres::ConnInfo;
use crate::progress::SharedProgress;
use crate::vault::Cluster;
use crate::vault::session::{Purpose, Session};
use crate::{Error, ErrorKind, Result};

/// Passes after which a file whose content is not what its name says is damaged, and not still being written.
pub const TRIES: u32 = 3;

/// Files that are handed to the workers at once. What was stored is recorded now and then, so that an interrupted first pass goes on.
const BATCH: usize = 20_000;

/// After so long in a first pass, what was stored is recorded.
const RECORD_EVERY: Duration = Duration::from_secs(300);

/// A session is begun anew after so long: by either of this machine's clocks, a quarter of what sessions last.
const SESSION: Duration = Duration::from_secs(12 * 3600);

/// Files that may vanish between two walks without anybody asking whether the volume is there.
const FEW: u64 = 1000;

/// Ids that a transaction may have taken so much earlier than others that have committed.
const LATE_IDS: i64 = 1000;

/// New rows after which everything is looked at: asking for each is slower.
const MANY_ROWS: i64 = 50_000;

/// Files that are open at once, at most; 1024 is a usual limit of a process.
const MOST_OPEN: usize = 512;

/// Warnings of one pass.
const MOST_WARNINGS: usize = 100;

/// Where tests look in, and let others do something meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The position was read; no name was.
    Positioned,
    /// The names were read; no content was.
    Listed,
    /// Contents are in the store.
    Stored,
    /// The pass is about to be stored.
    Committing,
}

/// Called at each step.
pub type Hook = Arc<dyn Fn(Step) -> BoxFuture<'static, ()> + Send + Sync>;

/// How much a pass looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The checklist where that is enough, otherwise everything.
    AsNeeded,
    /// Everything.
    Full,
    /// The checklist, whether or not it is enough: where it is not, what is new is stored and the watermark stays.
    ChecklistOnly,
}

/// What is captured, and how.
#[derive(Clone)]
pub struct CaptureOptions {
    /// How to reach the server; the database is named by [`CaptureOptions::database`].
    pub connection: ConnInfo,
    /// The database.
    pub database: String,
    /// Its filestore.
    pub folder: PathBuf,
    /// Threads that read, compress and seal.
    pub workers: usize,
    /// zstd level.
    pub level: i32,
    /// A full pass after so long without one.
    pub full_every: Duration,
    /// A [`Guard`] is held beside the passes; it is only said so.
    pub guarded: bool,
    /// Record that most files are gone, instead of taking the volume for unmounted.
    pub accept_losses: bool,
    /// Told of bytes that were read.
    pub progress: SharedProgress,
    /// For tests.
    pub hook: Option<Hook>,
}

impl fmt::Debug for CaptureOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptureOptions").field("database", &self.database).field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// What a pass did.
#[derive(Debug, Clone)]
pub struct Captured {
    /// As it is stored; none when nothing has happened in the database since the last one, and nothing was stored.
    pub pass: Option<Pass>,
    /// What somebody should know.
    pub warnings: Vec<String>,
}

/// One filestore, captured again and again.
#[derive(Debug)]
pub struct Capture {
    cluster: Cluster,
    options: CaptureOptions,
    odoo: Odoo,
    session: Writing,
    catalog: Catalog,
    last: Option<Pass>,
    follows: Vec<Ulid>,
    seen: Option<Timestamp>,
    /// Marks of the last pass, all of which are in the catalog.
    marks: Vec<String>,
    /// The tripwire that is set.
    armed: Option<Ulid>,
    /// When Odoo said that its collector last began.
    collector: Option<i64>,
    /// A pass was begun and has not ended well.
    under_way: bool,
    /// The highest id of an attachment whose name was looked at.
    highest: i64,
    /// Names in the newest rows, all of which are in the catalog.
    known_names: BTreeSet<String>,
}

#[derive(Debug)]
struct Writing {
    session: Session,
    since: Instant,
    at: Timestamp,
}

impl Writing {
    async fn begin(cluster: &Cluster) -> Result<Self> {
        let (since, at) = (Instant::now(), cluster.env().now());
        let session = Session::begin(cluster, Purpose::Filestore, cluster.env().new_id()?).await?;
        Ok(Self { session, since, at })
    }

    fn is_old(&self, now: Timestamp) -> bool {
        let by_the_clock = now.duration_since(self.at);
        self.since.elapsed() >= SESSION || by_the_clock.unsigned_abs() >= SESSION
    }
}

/// What a pass gathers.
struct Work {
    tree: Tree,
    position: Position,
    began: Instant,
    recorded: Instant,
    new_files: u64,
    new_bytes: u64,
    stored_bytes: u64,
    counts: Counts,
    doubtful: BTreeMap<String, u32>,
    horizon: Option<i64>,
    warnings: Vec<String>,
}

impl Work {
    /// Adds a warning; the first few say what is the matter.
    fn warn(&mut self, warning: String) {
        if self.warnings.len() < MOST_WARNINGS {
            self.warnings.push(warning);
        }
    }
}

impl Capture {
    /// Connects, and reads what the vault has of this filestore.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the database cannot be reached or is not Odoo's; [`ErrorKind::Conflict`] when it is another cluster's, or a
    /// neutralised copy; otherwise when the store fails.
    pub async fn open(cluster: &Cluster, options: CaptureOptions) -> Result<Self> {
        let odoo = Odoo::expect(&options.connection, &options.database, cluster.name().system_id).await?;
        if odoo.neutralised {
            let why = format!("database {} is a neutralised copy: its documents are not production's", options.database);
            return Err(Error::new(ErrorKind::Conflict, "filestore.copy", why)
                .with_hint("leave it out of [cluster.NAME.odoo] databases, or give copies a vault of their own"));
        }
        let session = Writing::begin(cluster).await?;
        let mut capture = Self {
            cluster: cluster.clone(),
            catalog: Catalog::empty(cluster),
            options,
            odoo,
            session,
            last: None,
            follows: Vec::new(),
            seen: None,
            marks: Vec::new(),
            armed: None,
            collector: None,
            under_way: false,
            highest: 0,
            known_names: BTreeSet::new(),
        };
        capture.load().await?;
        Ok(capture)
    }

    /// What is captured.
    pub fn odoo(&mut self) -> &mut Odoo {
        &mut self.odoo
    }

    /// The newest pass that is known.
    pub fn last(&self) -> Option<&Pass> {
        self.last.as_ref()
    }

    async fn load(&mut self) -> Result<()> {
        let folder = self.odoo.database.folder(self.cluster.keys().digest());
        let known = pass::load(&self.cluster, &folder).await?;
        self.marks.clear();
        self.known_names.clear();
        match known {
            None => (self.last, self.catalog, self.follows, self.seen) = (None, Catalog::empty(&self.cluster), Vec::new(), None),
            Some(known) => {
                self.seen = known.heads.iter().map(|head| head.stored_at).max();
                // Those that are not old enough to stand behind by their age alone are named, too.
                let young =
                    known.superseded.iter().filter(|pass| self.seen.is_none_or(|seen| pass.stored_at >= seen - 2 * pass::SLACK));
                self.follows = known.heads.iter().chain(young).map(|pass| pass.id).collect();
                (self.armed, self.collector) = (known.pass.tripwire, known.pass.collector);
                self.highest = known.pass.highest_id;
                (self.last, self.catalog) = (Some(known.pass), known.catalog);
            }
        }
        Ok(())
    }

    async fn at(&self, step: Step) {
        if let Some(hook) = &self.options.hook {
            hook(step).await;
        }
    }

    /// Makes a pass.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the database or the filestore cannot be read, or looks unmounted; otherwise when the store fails. Nothing
    /// was recorded then but what was stored, for the next pass to go on with.
    pub async fn pass(&mut self, depth: Depth) -> Result<Captured> {
        let is_old = self.session.is_old(self.cluster.env().now());
        if is_old {
            self.session = Writing::begin(&self.cluster).await?;
        }
        // What a pass that failed has gathered is not to be recorded by the next.
        let failed = std::mem::replace(&mut self.under_way, true);
        if is_old || failed {
            self.load().await?;
        }
        let captured = self.attempt(depth).await?;
        self.under_way = false;
        Ok(captured)
    }

    async fn attempt(&mut self, depth: Depth) -> Result<Captured> {
        let position = self.odoo.position().await?;
        self.at(Step::Positioned).await;
        let tree = {
            let folder = self.options.folder.clone();
            blocking(move || Tree::open(&folder)).await
        };
        let tree = match tree {
            // Everything may be in the database.
            Err(error) if error.code() == "filestore.none" && self.odoo.references().await?.local == 0 => {
                return self.nothing(position).await;
            }
            tree => tree?,
        };
        let mut work = self.work(tree, position);
        let why = if depth == Depth::Full { Some("it was asked for".to_owned()) } else { self.why_full(&work) };
        let why = match why {
            Some(why) if depth != Depth::ChecklistOnly => Some(why),
            why => self.checklist(&mut work, depth == Depth::ChecklistOnly).await?.or(why),
        };
        let kind = match why {
            None => PassKind::Checklist,
            Some(_) if depth == Depth::ChecklistOnly => PassKind::Unfinished,
            Some(why) => self.full(&mut work, &why).await?,
        };
        {
            let tree = work.tree.clone();
            blocking(move || tree.ensure_same()).await?;
        }
        self.finish(work, kind).await
    }

    /// Why the checklist alone will not do.
    fn why_full(&self, work: &Work) -> Option<String> {
        let Some(last) = &self.last else { return Some("it is the first".into()) };
        let Some(full_at) = last.full_at else { return Some("there was none yet".into()) };
        if work.position.at.duration_since(full_at).unsigned_abs() >= self.options.full_every {
            return Some(format!("the last was begun at {full_at}"));
        }
        if last.timeline != work.position.timeline {
            return Some(format!("the server went on with timeline {}", work.position.timeline));
        }
        if self.has_grace() {
            return None;
        }
        if self.armed.is_none() && self.collector.is_none() {
            return Some("whether Odoo's garbage collector has run since the last pass is not known".into());
        }
        None
    }

    /// True of versions whose garbage collector leaves a mark alone for half an hour: no pass in time misses a file, and no guard is needed.
    pub fn has_grace(&self) -> bool {
        self.odoo.database.major().is_some_and(|major| major >= 20)
    }

    /// Looks at the files on the checklist; why that is not enough, when it is not. It is left at that then, unless it is `only` this
    /// that may be looked at.
    async fn checklist(&mut self, work: &mut Work, only: bool) -> Result<Option<String>> {
        let tree = work.tree.clone();
        let grace = self.has_grace();
        // The tripwire is looked at behind the list: the collector may run in between.
        let tripwire = self.armed;
        let (marks, armed) = blocking(move || {
            let marks = tree.checklist()?;
            Ok((marks, grace || tripwire.is_none_or(|id| tree.is_armed(id))))
        })
        .await?;
        self.at(Step::Listed).await;
        let mut why = (!armed).then(|| "Odoo's garbage collector has run".to_owned());
        if !grace && self.marks.iter().any(|mark| marks.binary_search(mark).is_err()) {
            why = why.or_else(|| Some("marks have gone from the checklist".into()));
        }
        let collector = self.odoo.collector_ran().await;
        if !grace && collector != self.collector {
            why = why.or_else(|| Some("Odoo's automatic vacuum has run".into()));
        }
        let highest = self.odoo.highest_id().await?;
        if highest.saturating_sub(self.highest) > MANY_ROWS {
            why = why.or_else(|| Some(format!("there are {} new rows", highest - self.highest)));
        }
        if why.is_some() {
            // However this pass ends, one that looks at everything has to follow.
            (self.armed, self.collector) = (None, None);
            if !only {
                return Ok(why);
            }
        }
        let known = &self.marks;
        let fresh: Vec<String> = marks.iter().filter(|mark| known.binary_search(mark).is_err()).cloned().collect();
        let mut wanted = Vec::new();
        let mut back = Vec::new();
        for (name, entry) in fresh.iter().zip(self.catalog.look_up(&fresh).await?) {
            match entry {
                Some(Entry { state: State::Present(_), .. }) => {}
                Some(Entry { state: State::Gone(content, _) | State::Lost(content, _), since, .. })
                    if promised_sha1(name).is_some() =>
                {
                    // It came back, with the content that its name says. When it is not there, a walk finds out.
                    back.push(Entry { name: name.clone(), since, state: State::Present(content) });
                }
                _ => wanted.push(name.clone()),
            }
        }
        if highest.saturating_sub(self.highest) <= MANY_ROWS {
            wanted.extend(self.unmarked(work, highest).await?);
        }
        wanted.extend(work.doubtful.keys().filter(|name| !wanted.contains(name)).cloned().collect::<Vec<_>>());
        wanted.sort_unstable();
        wanted.dedup();
        self.keep(work, back, &[]).await?;
        let left = self.store(work, by_name(wanted)).await?;
        self.marks = marks.into_iter().filter(|mark| !left.contains(mark)).collect();
        Ok(why)
    }

    /// Makes sure of what Odoo's collector may be about to delete: opens every file on the checklist that was not seen before, gives the
    /// guard back, and stores them then. False when the guard was lost, or given back before they were open.
    ///
    /// # Errors
    /// As [`Capture::pass`].
    pub async fn before_collection(&mut self, guard: Guard) -> Result<bool> {
        let position = self.odoo.position().await?;
        let (folder, marks) = (self.options.folder.clone(), std::mem::take(&mut self.marks));
        let open = move || {
            let tree = Tree::open(&folder)?;
            let fresh: Vec<String> = tree.checklist()?.into_iter().filter(|mark| marks.binary_search(mark).is_err()).collect();
            let file = |(number, name): (usize, String)| {
                let file = if number < MOST_OPEN { tree.root().file(&name).ok().flatten() } else { None };
                Wanted { name, file }
            };
            Ok((fresh.into_iter().enumerate().map(file).collect::<Vec<_>>(), tree, marks))
        };
        let opened = blocking(open).await;
        let held = guard.give_back().await;
        let (fresh, tree, marks) = opened?;
        self.marks = marks;
        let mut work = self.work(tree, position);
        let mut wanted = Vec::new();
        for file in fresh {
            if !matches!(self.catalog.entry(&file.name).await?, Some(Entry { state: State::Present(_), .. })) {
                wanted.push(file);
            }
        }
        let _ = self.store(&mut work, wanted).await?;
        if work.stored_bytes > 0 {
            let pass = self.make(&work, PassKind::Unfinished).await?;
            pass::commit(&self.cluster, &pass, &self.catalog).await?;
            self.last = Some(pass);
        }
        Ok(held)
    }

    fn work(&self, tree: Tree, position: Position) -> Work {
        Work {
            tree,
            position,
            began: Instant::now(),
            recorded: Instant::now(),
            new_files: 0,
            new_bytes: 0,
            stored_bytes: 0,
            counts: self.last.as_ref().map(|pass| pass.counts).unwrap_or_default(),
            doubtful: self.last.as_ref().map(|pass| pass.doubtful.clone()).unwrap_or_default(),
            horizon: None,
            warnings: Vec::new(),
        }
    }

    /// Files of new rows that nothing has marked.
    async fn unmarked(&mut self, work: &Work, highest: i64) -> Result<Vec<String>> {
        // Rows with smaller ids may commit later.
        let names = self.odoo.names_above(self.highest - LATE_IDS).await?;
        self.highest = highest;
        let mut unknown = Vec::new();
        for name in &names {
            if !self.known_names.contains(name)
                && self.catalog.entry(name).await?.is_none()
                && matches!(work.tree.root().file(name), Ok(Some(_)))
            {
                unknown.push(name.clone());
            }
        }
        self.known_names = names.into_iter().filter(|name| !unknown.contains(name)).collect();
        Ok(unknown)
    }

    /// Stores the contents of files; those that were not stored.
    async fn store(&mut self, work: &mut Work, wanted: Vec<Wanted>) -> Result<BTreeSet<String>> {
        let mut left = BTreeSet::new();
        let mut wanted = wanted.into_iter().peekable();
        let stow = Stow { workers: self.options.workers, level: self.options.level, progress: self.options.progress.clone() };
        while wanted.peek().is_some() {
            let batch: Vec<Wanted> = wanted.by_ref().take(BATCH).collect();
            let stowed = store(&self.cluster, work.tree.root(), batch, &stow).await?;
            self.at(Step::Stored).await;
            work.stored_bytes += stowed.packs.iter().map(|pack| pack.size).sum::<u64>();
            let now = work.position.at.as_millisecond();
            let mut entries = Vec::new();
            for (name, outcome) in stowed.outcomes {
                match outcome {
                    Outcome::Stored(content) => {
                        let _ = work.doubtful.remove(&name);
                        work.new_files += 1;
                        work.new_bytes += content.size;
                        work.counts.present(content.size);
                        entries.push(Entry { name, since: now, state: State::Present(content) });
                    }
                    Outcome::Wrong if self.is_damaged(&name).await? => drop(left.insert(name)),
                    Outcome::Wrong => {
                        let known = work.doubtful.entry(name.clone()).or_default();
                        *known += 1;
                        let tries = *known;
                        if tries == TRIES {
                            work.warn(format!("{name}: its content is not what its name says; the source is damaged"));
                            let older = self.catalog.entry(&name).await?.and_then(|entry| entry.state.content().cloned());
                            let state = older.map_or(State::Damaged(now), |content| State::Lost(content, now));
                            entries.push(Entry { name: name.clone(), since: now, state });
                        }
                        if tries >= TRIES {
                            let _ = work.doubtful.remove(&name);
                        }
                        let _ = left.insert(name);
                    }
                    Outcome::Vanished => {
                        let _ = (work.doubtful.remove(&name), left.insert(name));
                    }
                    Outcome::Unreadable(why) => {
                        return Err(Error::new(
                            ErrorKind::Source,
                            "filestore.read",
                            format!("{}/{name} cannot be read: {why}", work.tree.root().path().display()),
                        )
                        .with_hint("let the account that pgvault runs as read the filestore; the pass was not recorded"));
                    }
                }
            }
            self.keep(work, entries, &stowed.packs).await?;
            self.record(work).await?;
        }
        Ok(left)
    }

    async fn is_damaged(&mut self, name: &str) -> Result<bool> {
        Ok(matches!(self.catalog.entry(name).await?, Some(Entry { state: State::Damaged(_), .. })))
    }

    /// Adds entries to the catalog.
    async fn keep(&mut self, work: &mut Work, entries: Vec<Entry>, packs: &[crate::format::pack_table::PackRef]) -> Result<()> {
        if entries.is_empty() && packs.is_empty() {
            return Ok(());
        }
        let added = self.catalog.add(entries, packs, work.horizon).await?;
        work.stored_bytes += added.bytes;
        Ok(())
    }

    /// Records what was stored so far, when it has taken long.
    async fn record(&mut self, work: &mut Work) -> Result<()> {
        if work.recorded.elapsed() < RECORD_EVERY {
            return Ok(());
        }
        work.recorded = Instant::now();
        let pass = self.make(work, PassKind::Unfinished).await?;
        // The tripwire was set for a walk that is not over: whoever goes on has to begin that again.
        let pass = Pass { tripwire: None, collector: None, ..pass };
        pass::commit(&self.cluster, &pass, &self.catalog).await
    }

    async fn make(&mut self, work: &Work, kind: PassKind) -> Result<Pass> {
        let Position { timeline, lsn, at } = work.position;
        let mut watermarks = self.last.as_ref().map(|last| last.watermarks.clone()).unwrap_or_default();
        if matches!(kind, PassKind::Full | PassKind::Checklist) {
            let _ = watermarks.insert(timeline, Watermark { lsn, at });
        }
        let took = jiff::SignedDuration::try_from(work.began.elapsed()).unwrap_or_default();
        Ok(Pass {
            id: self.cluster.env().new_id()?,
            session: self.session.session.id,
            database: self.odoo.database.clone(),
            kind,
            timeline,
            lsn,
            started_at: at,
            ended_at: at.checked_add(took).unwrap_or(at),
            watermarks,
            full_at: if kind == PassKind::Full { Some(at) } else { self.last.as_ref().and_then(|last| last.full_at) },
            counts: work.counts,
            census: if kind == PassKind::Full {
                self.odoo.census().await?
            } else {
                self.last.as_ref().map(|last| last.census.clone()).unwrap_or_default()
            },
            doubtful: work.doubtful.clone(),
            tripwire: self.armed,
            collector: self.collector,
            highest_id: self.highest,
            new_files: work.new_files,
            new_bytes: work.new_bytes,
            stored_bytes: work.stored_bytes,
            mode: if self.has_grace() {
                "grace"
            } else if self.options.guarded {
                "guard"
            } else {
                "poll"
            }
            .into(),
            follows: self.follows.clone(),
            seen: self.seen,
            version: env!("CARGO_PKG_VERSION").into(),
        })
    }

    async fn finish(&mut self, work: Work, kind: PassKind) -> Result<Captured> {
        let idle = kind == PassKind::Checklist
            && work.stored_bytes == 0
            && self.last.as_ref().is_some_and(|last| {
                last.watermarks.get(&work.position.timeline).is_some_and(|mark| mark.lsn == work.position.lsn)
                    && last.doubtful == work.doubtful
                    && last.counts == work.counts
            });
        let warnings = work.warnings.clone();
        if idle {
            return Ok(Captured { pass: None, warnings });
        }
        let pass = self.make(&work, kind).await?;
        self.at(Step::Committing).await;
        pass::commit(&self.cluster, &pass, &self.catalog).await?;
        self.last = Some(pass.clone());
        Ok(Captured { pass: Some(pass), warnings })
    }

    /// A pass over a filestore that is not there, of a database whose attachments are all in the database or elsewhere.
    async fn nothing(&mut self, position: Position) -> Result<Captured> {
        if let Some(last) = self.last.as_ref().filter(|last| last.counts.present > 0 && !self.options.accept_losses) {
            return Err(unmounted(&self.options.folder, last.counts.present));
        }
        let Position { timeline, lsn, at } = position;
        let mut pass = Pass {
            id: self.cluster.env().new_id()?,
            session: self.session.session.id,
            database: self.odoo.database.clone(),
            kind: PassKind::Full,
            timeline,
            lsn,
            started_at: at,
            ended_at: at,
            watermarks: self.last.as_ref().map(|last| last.watermarks.clone()).unwrap_or_default(),
            full_at: Some(at),
            counts: Counts::default(),
            census: self.odoo.census().await?,
            doubtful: BTreeMap::new(),
            tripwire: None,
            collector: None,
            highest_id: 0,
            new_files: 0,
            new_bytes: 0,
            stored_bytes: 0,
            mode: "database".into(),
            follows: self.follows.clone(),
            seen: self.seen,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let _ = pass.watermarks.insert(timeline, Watermark { lsn, at });
        pass::commit(&self.cluster, &pass, &self.catalog).await?;
        self.last = Some(pass.clone());
        Ok(Captured { pass: Some(pass), warnings: Vec::new() })
    }
}

fn by_name(names: Vec<String>) -> Vec<Wanted> {
    names.into_iter().map(|name| Wanted { name, file: None }).collect()
}

fn unmounted(folder: &std::path::Path, known: u64) -> Error {
    Error::new(
        ErrorKind::Source,
        "filestore.vanished",
        format!("{} has lost most of its files: the vault knows of {known} that were there", folder.display()),
    )
    .with_hint("is its volume mounted? nothing was recorded; if they were deleted on purpose, run it once with --accept-losses")
}

/// Runs file system calls where they do not hold up anything else.
async fn blocking<T: Send + 'static>(what: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(what).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}
