//! From a source's files to packs in the vault.
//!
//! ```text
//! source --jobs--> workers (one per core) --packs--> uploader (a few PUTs at a time) --> store
//!                     \--> file table entries, page findings
//! ```
//!
//! What the backup before has is asked for file by file, and compared block by block: workers refer to what is the same.
//!
//! Both channels are bounded, so memory is bounded by the number of workers and PUTs in flight, not by the database.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ulid::Ulid;

use super::entries::Entries;
use super::file::FileTask;
use super::leftovers::Leftovers;
use super::parent::{Known, Parent};
use super::usage::Usage;
use super::worker::{self, Job, PageRules, Shared};
use crate::crypto::sealed::FrameEncoder;
use crate::format::MAX_FILE;
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::{PackKind, PackRef};
use crate::pack::{Failure, META_TARGET, PACK_TARGET, PackPlace, Packer, SessionNames, UPLOADS, upload};
use crate::progress::SharedProgress;
use crate::vault::snapshot::BadPage;
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Regions handed to a worker at once, when it reads for itself (16 MiB).
const READ_RUN: u32 = 64;

/// Jobs waiting for a worker, at most. Each may hold a file open, and 1024 is a usual limit of those.
const MAX_QUEUE: usize = 256;

/// Packs in memory: one open, one being hashed, one waiting, [`UPLOADS`] in flight. About 250 MiB, and maps up to 50 MiB.
const DATA_PACKS: usize = UPLOADS + 3;
const META_PACKS: usize = 3;

/// What a backup can refer to instead of storing it.
#[derive(Debug, Default)]
pub(super) struct Before {
    pub(super) parent: Option<Parent>,
    pub(super) leftovers: Leftovers,
}

/// How a pipeline works.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) rules: PageRules,
    pub(super) level: i32,
    pub(super) workers: usize,
    pub(super) progress: SharedProgress,
    /// Names the packs.
    pub(super) session: Ulid,
}

/// What the pipeline made.
#[derive(Debug)]
pub(super) struct Output {
    /// Files; directories and links are not among them.
    pub(super) entries: Entries,
    pub(super) files: u64,
    /// Bytes of the files.
    pub(super) bytes: u64,
    /// The packs that the files need, sorted by id, new ones and others.
    pub(super) packs: Vec<PackRef>,
    /// Those that were stored.
    pub(super) new_packs: u64,
    pub(super) stored_bytes: u64,
    pub(super) parent: Option<Ulid>,
    pub(super) restore_amplification: f64,
    pub(super) changed_bytes: u64,
    pub(super) bad_pages: Vec<BadPage>,
    pub(super) bad_page_count: u64,
    pub(super) warnings: Vec<String>,
}

/// A running pipeline.
#[derive(Debug)]
pub(super) struct Pipeline {
    /// Asked by one at a time: its memory is one reader's.
    parent: tokio::sync::Mutex<Option<Parent>>,
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    jobs: async_channel::Sender<Job>,
    workers: Vec<JoinHandle<()>>,
    uploader: tokio::task::JoinHandle<Result<Vec<PackRef>>>,
}

impl Pipeline {
    pub(super) fn start(cluster: &Cluster, setting: Setting, before: Before) -> Result<Self> {
        let Setting { rules, level, workers, progress, session } = setting;
        let (uploads, finished) = tokio::sync::mpsc::channel(1);
        let failure = Arc::new(Failure::default());
        let names = Arc::new(SessionNames::new(session));
        let packer = |sealed, kind, target, packs| {
            let place = PackPlace { sealed, kind, path: layout::pack };
            Packer::new(cluster.clone(), place, names.clone(), target, packs, uploads.clone())
        };
        let shared = Arc::new(Shared {
            rules,
            judged: before.parent.as_ref().and_then(|parent| parent.judged(rules.checksums)),
            digest: cluster.keys().digest().clone(),
            level,
            data: packer(Kind::Data, PackKind::Data, PACK_TARGET, DATA_PACKS),
            meta: packer(Kind::Meta, PackKind::Meta, META_TARGET, META_PACKS),
            leftovers: before.leftovers,
            progress,
            failure: failure.clone(),
            pending: 0.into(),
            made: Mutex::default(),
            bad_pages: Mutex::default(),
            bad_page_count: 0.into(),
            changed_bytes: 0.into(),
        });
        drop(uploads);
        let (jobs, queue) = async_channel::bounded((workers.max(1) * 16).min(MAX_QUEUE));
        let threads = (0..workers.max(1))
            .map(|n| {
                let (shared, queue) = (shared.clone(), queue.clone());
                let spawned = std::thread::Builder::new().name(format!("pgvault-{n}")).spawn(move || worker::run(&shared, &queue));
                spawned.map_err(|e| Error::new(ErrorKind::Failed, "thread", format!("start a worker thread: {e}")))
            })
            .collect::<Result<Vec<_>>>()?;
        let uploader = tokio::spawn(upload(cluster.clone(), failure.clone(), finished));
        Ok(Self { parent: before.parent.into(), shared, failure, jobs, workers: threads, uploader })
    }

    /// Announces a file whose regions will follow, or that workers will read.
    pub(super) async fn file(&self, path: String, mode: u32, len: u64, reader: Option<std::fs::File>) -> Result<Arc<FileTask>> {
        if len > MAX_FILE {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "backup.file_too_large",
                format!("{path} has {len} bytes; the format ends at {MAX_FILE}"),
            ));
        }
        let known = match &mut *self.parent.lock().await {
            Some(parent) => parent.file(&path, len).await?.unwrap_or_default(),
            None => Known::default(),
        };
        let file = Arc::new(FileTask::new(path, mode, len, reader, known));
        if len == 0 {
            self.shared.finish_file(&file, &[], &mut FrameEncoder::new(self.shared.level)?)?;
        }
        Ok(file)
    }

    /// Lets workers read the whole file.
    pub(super) async fn read(&self, file: &Arc<FileTask>) -> Result<()> {
        let regions = file.regions();
        let mut first = 0;
        while first < regions {
            let count = READ_RUN.min(regions - first);
            self.send(Job::Read { file: file.clone(), first, count }).await?;
            first += count;
        }
        Ok(())
    }

    /// Hands over one region.
    pub(super) async fn region(&self, file: &Arc<FileTask>, region: u32, bytes: Vec<u8>) -> Result<()> {
        self.send(Job::Region { file: file.clone(), region, bytes }).await
    }

    /// Waits until everything handed over so far was read and worked on.
    pub(super) async fn drained(&self) -> Result<()> {
        while self.shared.pending.load(Ordering::SeqCst) > 0 {
            if self.failure.happened() {
                return Err(self.stopped());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    fn stopped(&self) -> Error {
        let stopped = || Error::new(ErrorKind::Failed, "backup.stopped", "the backup was stopped by an earlier error");
        self.failure.take().unwrap_or_else(stopped)
    }

    async fn send(&self, job: Job) -> Result<()> {
        let _ = self.shared.pending.fetch_add(1, Ordering::SeqCst);
        if self.failure.happened() || self.jobs.send(job).await.is_err() {
            return Err(self.stopped());
        }
        Ok(())
    }

    /// Waits until everything handed over is durable in the vault.
    pub(super) async fn finish(self) -> Result<Output> {
        let Self { parent, shared, failure, jobs, workers, uploader } = self;
        drop(jobs);
        let finishing = tokio::task::spawn_blocking(move || {
            // Every one is joined, whatever the others did.
            let died = workers.into_iter().filter_map(|worker| worker.join().err()).count();
            shared.data.finish();
            shared.meta.finish();
            (died == 0, Arc::into_inner(shared))
        });
        let Ok((true, Some(shared))) = finishing.await else {
            return Err(failure.take().unwrap_or_else(|| Error::new(ErrorKind::Failed, "backup.worker", "a worker thread died")));
        };
        let Shared { data, meta, made, leftovers, bad_pages, bad_page_count, changed_bytes, .. } = shared;
        // The uploader ends when nobody can send it packs any more.
        drop((data, meta));
        let packs = uploader.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
        if let Some(error) = failure.take() {
            return Err(error);
        }
        let new = packs?;
        let worker::Made { entries, files, bytes, usage } = made.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (parent, before, warnings) = parent
            .into_inner()
            .map(Parent::into_parts)
            .map_or_else(Default::default, |(id, packs, warnings)| (Some(id), packs, warnings));
        let (new_packs, stored_bytes) = (new.len() as u64, new.iter().map(|pack| pack.size).sum());
        let known: HashMap<PackId, PackRef> =
            before.into_values().chain(leftovers.into_packs()).chain(new).map(|pack| (pack.id, pack)).collect();
        let packs = used(&usage, &known)?;
        let mut bad_pages = bad_pages.into_inner().unwrap_or_else(PoisonError::into_inner);
        bad_pages.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
        Ok(Output {
            entries,
            files,
            bytes,
            restore_amplification: usage.amplification(packs.iter()),
            packs,
            new_packs,
            stored_bytes,
            parent,
            warnings,
            changed_bytes: changed_bytes.into_inner(),
            bad_pages,
            bad_page_count: bad_page_count.into_inner(),
        })
    }
}

/// The packs that are used, sorted by id, each with how much of it is.
fn used(usage: &Usage, known: &HashMap<PackId, PackRef>) -> Result<Vec<PackRef>> {
    let mut packs = Vec::new();
    for id in usage.packs() {
        let pack = known.get(id).ok_or_else(|| {
            let why = format!("the backup refers to pack {}, which it does not know", Ulid::from_bytes(*id));
            Error::new(ErrorKind::Failed, "backup.pack", why)
        })?;
        packs.push(PackRef { live: usage.live(pack), ..*pack });
    }
    packs.sort();
    Ok(packs)
}
