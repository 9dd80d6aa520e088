//! Files into packs.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

use sha1::{Digest, Sha1};

use super::{BUNDLE, PLACE, Root};
use crate::crypto::sealed::FrameEncoder;
use crate::format::MAX_FRAME;
use crate::format::file_run::{Content, Piece, promised_sha1};
use crate::format::pack_table::PackRef;
use crate::pack::{Failure, FreshNames, PACK_TARGET, Packer, UPLOADS, upload};
use crate::progress::SharedProgress;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// Packs in memory: one open, one being hashed, the others on their way.
const PACKS: usize = UPLOADS + 2;

/// A file that is to be stored.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    /// Opened already, because it may be deleted before its turn comes.
    pub(crate) file: Option<File>,
}

/// What became of a file.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is in a pack.
    Stored(Content),
    /// Its content is not what its name says.
    Wrong,
    /// There is no such file any more.
    Vanished,
    /// It cannot be read.
    Unreadable(String),
}

/// How files are stored.
#[derive(Debug, Clone)]
pub(crate) struct Stow {
    pub(crate) workers: usize,
    /// zstd level.
    pub(crate) level: i32,
    pub(crate) progress: SharedProgress,
}

/// What was stored.
#[derive(Debug, Default)]
pub(crate) struct Stowed {
    /// By name.
    pub(crate) outcomes: Vec<(String, Outcome)>,
    /// New packs, all of them in the store.
    pub(crate) packs: Vec<PackRef>,
}

struct Shared {
    root: Arc<Root>,
    queue: Mutex<std::vec::IntoIter<Wanted>>,
    packer: Packer,
    digest: crate::crypto::digest::DigestKey,
    level: i32,
    failure: Arc<Failure>,
    outcomes: Mutex<Vec<(String, Outcome)>>,
    progress: SharedProgress,
}

/// Stores the contents of files below `root`.
///
/// # Errors
/// When the store fails. What is wrong with a file is its outcome.
pub(crate) async fn store(cluster: &Cluster, root: &Arc<Root>, wanted: Vec<Wanted>, how: &Stow) -> Result<Stowed> {
    if wanted.is_empty() {
        return Ok(Stowed::default());
    }
    let (uploads, finished) = tokio::sync::mpsc::channel(1);
    let failure = Arc::new(Failure::default());
    let names = Arc::new(FreshNames(cluster.env().clone()));
    let workers = how.workers.clamp(1, wanted.len());
    let shared = Arc::new(Shared {
        root: root.clone(),
        queue: Mutex::new(wanted.into_iter()),
        packer: Packer::new(cluster.clone(), PLACE, names, PACK_TARGET, PACKS, uploads),
        digest: cluster.keys().digest().clone(),
        level: how.level,
        failure: failure.clone(),
        outcomes: Mutex::default(),
        progress: how.progress.clone(),
    });
    let uploader = tokio::spawn(upload(cluster.clone(), failure.clone(), finished));
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let shared = shared.clone();
            tokio::task::spawn_blocking(move || work(&shared))
        })
        .collect();
    for thread in threads {
        thread.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
    }
    let finishing = tokio::task::spawn_blocking(move || {
        shared.packer.finish();
        Arc::into_inner(shared)
    });
    let shared = finishing.await.ok().flatten();
    let outcomes = shared.map(|shared| shared.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner));
    let packs = uploader.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
    if let Some(error) = failure.take() {
        return Err(error);
    }
    let outcomes = outcomes.ok_or_else(|| Error::new(ErrorKind::Failed, "task", "a thread that reads files did not end"))?;
    Ok(Stowed { outcomes, packs: packs? })
}

fn work(shared: &Shared) {
    let worked = Worker::new(shared).and_then(|mut worker| {
        while !shared.failure.happened() {
            let next = shared.queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(wanted) = next else { break };
            worker.file(wanted)?;
        }
        worker.flush()
    });
    if let Err(error) = worked {
        shared.failure.fail(error);
    }
}

/// A file in the bundle, or what became of it.
type Done = (String, Outcome);

struct Worker<'a> {
    shared: &'a Shared,
    encoder: FrameEncoder,
    /// Small files, back to back.
    bundle: Vec<u8>,
    /// Which they are: name, mode, SHA-1, where it begins, length.
    bundled: Vec<(String, u32, [u8; 20], usize, usize)>,
    done: Vec<Done>,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared) -> Result<Self> {
        let encoder = FrameEncoder::new(shared.level)?;
        Ok(Self { shared, encoder, bundle: Vec::with_capacity(BUNDLE), bundled: Vec::new(), done: Vec::new() })
    }

    fn file(&mut self, wanted: Wanted) -> Result<()> {
        let Wanted { name, file } = wanted;
        let opened = match file {
            Some(file) => Ok(Some(file)),
            None => self.shared.root.file(&name),
        };
        let outcome = match opened {
            Ok(Some(file)) => match file.metadata() {
                Ok(meta) if meta.len() <= BUNDLE as u64 => return self.small(name, file, meta.mode() & 0o7777),
                Ok(meta) => self.large(&name, file, meta.mode() & 0o7777)?,
                Err(error) => Outcome::Unreadable(error.to_string()),
            },
            Ok(None) => Outcome::Vanished,
            Err(error) => Outcome::Unreadable(error.to_string()),
        };
        self.done.push((name, outcome));
        Ok(())
    }

    fn small(&mut self, name: String, mut file: File, mode: u32) -> Result<()> {
        if self.bundle.len() >= BUNDLE {
            self.flush()?;
        }
        let begin = self.bundle.len();
        // It may have grown since it was looked at.
        let read = (&mut file).take(BUNDLE as u64 + 1).read_to_end(&mut self.bundle);
        let content = self.bundle.get(begin..).unwrap_or(&[]);
        let outcome = match read {
            Err(error) => Some(Outcome::Unreadable(error.to_string())),
            Ok(len) if len > BUNDLE => Some(Outcome::Wrong),
            Ok(_) => None,
        };
        let sha1: [u8; 20] = Sha1::digest(content).into();
        let outcome = outcome.or_else(|| promised_sha1(&name).filter(|promised| *promised != sha1).map(|_| Outcome::Wrong));
        if let Some(outcome) = outcome {
            self.bundle.truncate(begin);
            self.done.push((name, outcome));
        } else {
            let len = self.bundle.len() - begin;
            self.shared.progress.advance(len as u64);
            self.bundled.push((name, mode, sha1, begin, len));
        }
        Ok(())
    }

    /// Stores the small files that wait. A frame ends with a whole file, so none is longer than twice the size of a bundle.
    fn flush(&mut self) -> Result<()> {
        const { assert!(2 * BUNDLE <= MAX_FRAME, "a bundle and a file behind it fit one frame") };
        let place = if self.bundle.is_empty() { None } else { Some(frame(self.shared, &mut self.encoder, &self.bundle)?) };
        for (name, mode, sha1, begin, len) in self.bundled.drain(..) {
            let offset = u32::try_from(begin).unwrap_or(u32::MAX);
            let piece = place.filter(|_| len > 0).map(|(pack, frame)| Piece { pack, frame, offset, len: len as u64 });
            let content = Content { size: len as u64, mode, sha1, pieces: piece.into_iter().collect() };
            self.done.push((name, Outcome::Stored(content)));
        }
        self.bundle.clear();
        self.shared.outcomes.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.done);
        Ok(())
    }

    fn large(&mut self, name: &str, mut file: File, mode: u32) -> Result<Outcome> {
        let (mut hash, mut pieces, mut size) = (Sha1::new(), Vec::new(), 0u64);
        let mut buffer = Vec::with_capacity(MAX_FRAME);
        loop {
            buffer.clear();
            match (&mut file).take(MAX_FRAME as u64).read_to_end(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Ok(Outcome::Unreadable(error.to_string())),
            }
            hash.update(&buffer);
            size += buffer.len() as u64;
            let (pack, frame) = frame(self.shared, &mut self.encoder, &buffer)?;
            pieces.push(Piece { pack, frame, offset: 0, len: buffer.len() as u64 });
            self.shared.progress.advance(buffer.len() as u64);
        }
        let sha1 = hash.finalize().into();
        match promised_sha1(name) {
            Some(promised) if promised != sha1 => Ok(Outcome::Wrong),
            _ => Ok(Outcome::Stored(Content { size, mode, sha1, pieces })),
        }
    }
}

fn frame(shared: &Shared, encoder: &mut FrameEncoder, raw: &[u8]) -> Result<([u8; 16], u32)> {
    shared.packer.append(&encoder.encode(raw, shared.digest.frame(raw))?)
}
