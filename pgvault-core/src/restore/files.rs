//! From packs to files.
//!
//! Files are taken in batches; within a batch the wanted frames are grouped by pack, what is needed of each pack is fetched
//! once, in pieces, and worker threads decode frames and write blocks to their places. Every frame is
//! authenticated and its digest compared before a byte of it is written.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::task::JoinSet;
use ulid::Ulid;

use crate::crypto::sealed::{ALIGNMENT, FrameDecoder, ObjectReader};
use crate::format::BLOCK;
use crate::format::map::{Extent, PackId};
use crate::format::object::{HEADER_LEN, Kind, TAIL_LEN};
use crate::format::pack_table::PackRef;
use crate::progress::SharedProgress;
use crate::store::Reading;
use crate::vault::{Cluster, layout, lost};
use crate::{Error, ErrorKind, Result};

/// Extents planned at once; bounds memory at about 50 MB whatever the database's size.
pub(super) const BATCH_EXTENTS: usize = 500_000;

/// Packs fetched at once.
const FETCHES: usize = 4;

/// The most that is read with one request. Decoding begins as soon as the first of a pack's pieces is there, and a piece is
/// freed when its frames are written, so memory does not depend on the size of packs.
const PIECE: u64 = 8 << 20;

/// Packs up to this size are read whole, whatever is wanted of them: three requests less are worth more than some megabytes.
const SMALL: u64 = 2 << 20;

/// Packs up to this size are read with one request, when a fair part of them is wanted.
const MEDIUM: u64 = 16 << 20;

/// A fair part: one of so many frames. The gaps between frames that are scattered so densely are seldom worth a request.
const FAIR: u32 = 6;

/// Gaps between wanted frames that are cheaper to read than to skip: a request takes as long as this at 50 MB/s.
const COALESCE: u64 = 1 << 20;

/// Threads for each core: while one waits for the disk, another decodes.
const THREADS_PER_WORKER: usize = 2;

/// Extents of files smaller than this go through the page cache, where they are put together to larger writes.
const DIRECT_FILE: u64 = 1 << 20;

/// So do extents smaller than this, of which a backup with many incrementals before it has thousands: each would wait for the disk.
const DIRECT_WRITE: usize = 64 << 10;

/// Frames given to a worker at once.
const FRAMES_PER_JOB: usize = 32;

/// A file being written.
#[derive(Debug)]
pub(super) struct TargetFile {
    /// Its path relative to the data directory, for messages.
    pub(super) name: String,
    /// Where it is written.
    pub(super) path: PathBuf,
    pub(super) len: u64,
}

/// One extent that has to be written.
#[derive(Debug, Clone, Copy)]
struct Want {
    frame: u32,
    slot: u32,
    blocks: u32,
    file: u32,
    block: u64,
}

/// A batch of files and what they want from which pack.
#[derive(Debug, Default)]
pub(super) struct Batch {
    files: Vec<TargetFile>,
    wants: BTreeMap<PackId, Vec<Want>>,
    extents: usize,
}

impl Batch {
    /// Extents planned so far.
    pub(super) fn len(&self) -> usize {
        self.extents
    }

    /// Adds a file; returns its number for [`Batch::want`].
    pub(super) fn add_file(&mut self, file: TargetFile) -> u32 {
        self.files.push(file);
        self.extents += 1;
        u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX)
    }

    /// Adds a stored extent that begins at `block` of `file`.
    pub(super) fn want(&mut self, file: u32, block: u64, packs: &[PackId], extent: Extent) -> Result<()> {
        let Extent::Stored { blocks, pack, frame, slot } = extent else { return Ok(()) };
        let pack = packs
            .get(pack as usize)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "map.pack", "a file map names a pack it does not list"))?;
        self.wants.entry(*pack).or_default().push(Want { frame, slot, blocks, file, block });
        self.extents += 1;
        Ok(())
    }
}

/// Frames of one pack, ready to be decoded.
struct Job {
    reader: Arc<ObjectReader>,
    /// Where in the pack `bytes` begin.
    start: u64,
    bytes: Bytes,
    pack: Ulid,
    wants: Vec<Want>,
    files: Arc<Vec<TargetFile>>,
}

/// Writes batches.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) packs: &'a BTreeMap<PackId, PackRef>,
    pub(super) workers: usize,
    pub(super) progress: SharedProgress,
    pub(super) written: Arc<AtomicU64>,
}

impl Writer<'_> {
    /// Fetches, checks and writes everything a batch wants.
    pub(super) async fn write(&self, batch: Batch) -> Result<()> {
        let Batch { files, wants, .. } = batch;
        let files = Arc::new(files);
        let (send, receive) = async_channel::bounded::<Job>(self.workers * 2);
        let failure: Arc<Mutex<Option<Error>>> = Arc::default();
        let direct = Arc::new(AtomicBool::new(true));
        let threads: Vec<_> = (0..self.workers * THREADS_PER_WORKER)
            .map(|_| {
                let (receive, failure, direct) = (receive.clone(), failure.clone(), direct.clone());
                let (cluster, progress, written) = (self.cluster.clone(), self.progress.clone(), self.written.clone());
                tokio::task::spawn_blocking(move || {
                    let fail = |error| {
                        let _ = failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        let _ = receive.close();
                    };
                    let mut decoder = match FrameDecoder::new() {
                        Ok(decoder) => decoder,
                        Err(error) => return fail(error),
                    };
                    while let Ok(job) = receive.recv_blocking() {
                        if let Err(error) = work(&cluster, &job, &mut decoder, &direct, &progress, &written) {
                            fail(error);
                        }
                    }
                })
            })
            .collect();
        drop(receive);
        let fetched = self.fetch_all(wants, &files, &send).await;
        drop(send);
        for thread in threads {
            thread.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
        }
        let first = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map_or(fetched, Err)
    }

    async fn fetch_all(
        &self,
        wants: BTreeMap<PackId, Vec<Want>>,
        files: &Arc<Vec<TargetFile>>,
        send: &async_channel::Sender<Job>,
    ) -> Result<()> {
        let mut running: JoinSet<Result<()>> = JoinSet::new();
        for (pack, mut wants) in wants {
            while running.len() >= FETCHES {
                joined(running.join_next().await)?;
            }
            let Some(known) = self.packs.get(&pack).copied() else {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "map.pack",
                    format!("pack {} is not in the snapshot's pack table", Ulid::from_bytes(pack)),
                ));
            };
            let (cluster, files, send) = (self.cluster.clone(), files.clone(), send.clone());
            wants.sort_by_key(|w| (w.frame, w.file, w.block));
            let _ = running.spawn(async move {
                let (pack, mut body) = open_pack(&cluster, &known, &wants).await?;
                for (range, wants) in pieces(&pack, &wants)? {
                    let start = range.start;
                    let bytes = body.at(&cluster, &pack.path, range).await.map_err(|e| lost(&pack.path, e))?;
                    let mut rest = wants;
                    while !rest.is_empty() {
                        // Cut between frames, so that none is decoded twice.
                        let mut cut = FRAMES_PER_JOB.min(rest.len());
                        while cut < rest.len() && rest.get(cut).map(|w| w.frame) == rest.get(cut - 1).map(|w| w.frame) {
                            cut += 1;
                        }
                        let (now, later) = rest.split_at(cut);
                        rest = later;
                        let job = Job {
                            reader: pack.reader.clone(),
                            start,
                            bytes: bytes.clone(),
                            pack: Ulid::from_bytes(known.id),
                            wants: now.to_vec(),
                            files: files.clone(),
                        };
                        if send.send(job).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                Ok(())
            });
        }
        while !running.is_empty() {
            joined(running.join_next().await)?;
        }
        Ok(())
    }
}

fn joined(result: Option<Result<Result<()>, tokio::task::JoinError>>) -> Result<()> {
    match result {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(Error::new(ErrorKind::Failed, "task", error.to_string())),
        None => Ok(()),
    }
}

/// A pack whose frame table is known.
struct OpenPack {
    path: String,
    reader: Arc<ObjectReader>,
}

/// How the bytes of a pack come.
enum Body {
    /// They are there: a small pack is one request.
    Here(Bytes),
    /// From end to end with one request; `at` is where the reading is.
    Streamed { reading: Box<Reading>, at: u64 },
    /// Each piece with a request of its own.
    Pieces,
}

impl Body {
    /// The bytes of a range that does not begin before the end of the one before.
    async fn at(&mut self, cluster: &Cluster, path: &str, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Here(bytes) => {
                let (start, end) = (usize::try_from(range.start), usize::try_from(range.end));
                let there = start.ok().zip(end.ok()).filter(|(start, end)| start <= end && *end <= bytes.len());
                let (start, end) = there.ok_or_else(|| {
                    Error::new(ErrorKind::Corrupt, "map.frame", format!("{path} ends before what is wanted of it"))
                })?;
                Ok(bytes.slice(start..end))
            }
            Self::Streamed { reading, at } => {
                // What lies between is not wanted, and costs less than another request.
                while *at < range.start {
                    let skip = (range.start - *at).min(PIECE);
                    let _ = reading.next(skip).await?;
                    *at += skip;
                }
                let bytes = reading.next(range.end - range.start).await?;
                *at = range.end;
                Ok(bytes)
            }
            Self::Pieces => cluster.store().get_range(path, range).await,
        }
    }
}

/// Reads a pack's frame table; when a fair part of the pack is wanted, also begins to read all of it.
async fn open_pack(cluster: &Cluster, pack: &PackRef, wants: &[Want]) -> Result<(OpenPack, Body)> {
    let relative = layout::pack(Ulid::from_bytes(pack.id));
    let path = cluster.path(&relative);
    let footer_start = pack.size.saturating_sub(TAIL_LEN as u64 + u64::from(pack.footer_len));
    let wants_some = frames(wants) * FAIR >= pack.frames;
    let corrupt = |e: crate::format::FormatError| Error::from(e).context(&path);
    if pack.size <= SMALL || (wants_some && pack.size <= MEDIUM) {
        let bytes = cluster.store().get_range(&path, 0..pack.size).await.map_err(|e| lost(&path, e))?;
        let reader = ObjectReader::open_whole(cluster.keys(), Kind::Data, &relative, &bytes).map_err(corrupt)?;
        return Ok((OpenPack { path, reader: Arc::new(reader) }, Body::Here(bytes)));
    }
    // Before the reading begins: one that waits for another request while it holds its own could wait for ever.
    let footer = cluster.store().get_range(&path, footer_start..pack.size).await.map_err(|e| lost(&path, e))?;
    // The header comes first in the pack, so a reading of all of it has it.
    let mut body = if wants_some && footer_start >= HEADER_LEN as u64 {
        Body::Streamed { reading: Box::new(cluster.store().read(&path, 0..footer_start)), at: 0 }
    } else {
        Body::Pieces
    };
    let head = body.at(cluster, &path, 0..HEADER_LEN as u64).await.map_err(|e| lost(&path, e))?;
    let reader = ObjectReader::open(cluster.keys(), Kind::Data, &relative, pack.size, &head, &footer).map_err(corrupt)?;
    Ok((OpenPack { path, reader: Arc::new(reader) }, body))
}

/// How many frames are wanted, sorted as they are.
fn frames(wants: &[Want]) -> u32 {
    let mut frames = 0;
    let mut last = None;
    for want in wants {
        if last.replace(want.frame) != Some(want.frame) {
            frames += 1;
        }
    }
    frames
}

/// Cuts what is wanted of a pack, sorted by frame, into ranges that are worth one request each.
fn pieces<'a>(pack: &OpenPack, wants: &'a [Want]) -> Result<Vec<(Range<u64>, &'a [Want])>> {
    let mut pieces: Vec<(Range<u64>, &[Want])> = Vec::new();
    let mut from = 0;
    for (number, want) in wants.iter().enumerate() {
        let entry = pack.reader.frames().get(want.frame as usize).ok_or_else(|| {
            let why = format!("{}: a file map points to a frame that the pack does not have", pack.path);
            Error::new(ErrorKind::Corrupt, "map.frame", why)
        })?;
        let end = entry.offset + u64::from(entry.sealed_len);
        let fits = |range: &Range<u64>| {
            let is_near = entry.offset.saturating_sub(range.end) <= COALESCE && end - range.start <= PIECE;
            is_near || end <= range.end
        };
        if let Some((range, _)) = pieces.last_mut().filter(|(range, _)| fits(range)) {
            range.end = range.end.max(end);
        } else {
            from = number;
            pieces.push((entry.offset..end, &[]));
        }
        if let Some((_, inside)) = pieces.last_mut() {
            *inside = wants.get(from..=number).unwrap_or(&[]);
        }
    }
    Ok(pieces)
}

/// Decodes a job's frames and writes their blocks.
fn work(
    cluster: &Cluster,
    job: &Job,
    decoder: &mut FrameDecoder,
    direct: &AtomicBool,
    progress: &SharedProgress,
    written: &AtomicU64,
) -> Result<()> {
    let mut open: Option<(u32, Output)> = None;
    let mut rest = &job.wants[..];
    while let Some(frame) = rest.first().map(|want| want.frame) {
        let (wants, later) = rest.split_at(rest.iter().take_while(|want| want.frame == frame).count());
        rest = later;
        let raw = decode(cluster, job, frame, decoder)?;
        for want in wants {
            let Some(file) = job.files.get(want.file as usize) else { continue };
            let offset = want.block * BLOCK as u64;
            let start = want.slot as usize * BLOCK;
            let len = (u64::from(want.blocks) * BLOCK as u64).min(file.len.saturating_sub(offset));
            let bytes = usize::try_from(len).ok().and_then(|len| raw.get(start..start + len)).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, "map.slot", format!("{}: its map points behind the end of a frame", file.name))
            })?;
            if open.as_ref().is_none_or(|(number, _)| *number != want.file) {
                open = Some((want.file, Output::open(file, direct).map_err(|e| Error::io("open", &file.path, e))?));
            }
            if let Some((_, output)) = &open {
                output.write(bytes, offset, direct).map_err(|e| Error::io("write", &file.path, e))?;
            }
            let _ = written.fetch_add(len, Ordering::Relaxed);
            progress.advance(len);
        }
    }
    Ok(())
}

fn decode<'a>(cluster: &Cluster, job: &Job, frame: u32, decoder: &'a mut FrameDecoder) -> Result<&'a [u8]> {
    let lost = || Error::new(ErrorKind::Corrupt, "pack.frame", format!("pack {}: frame {frame} was not fetched", job.pack));
    let entry = job.reader.frames().get(frame as usize).ok_or_else(lost)?;
    let from = entry.offset.checked_sub(job.start).and_then(|from| usize::try_from(from).ok()).ok_or_else(lost)?;
    let sealed = job.bytes.get(from..from.saturating_add(entry.sealed_len as usize)).ok_or_else(lost)?;
    let path = || cluster.path(&layout::pack(job.pack));
    job.reader.decode_with(cluster.keys(), frame, sealed, decoder).map_err(|e| Error::from(e).context(path()))
}

/// An open file of the restored cluster.
///
/// Large files are written past the page cache: a restore writes each byte once and reads none again, and copying into
/// fresh cache pages took as long as decoding (docs/decisions/0005). Whatever cannot be written so (a file system without
/// it, the odd bytes at a file's end) goes through the cache.
struct Output {
    cached: File,
    direct: Option<File>,
}

impl Output {
    fn open(file: &TargetFile, direct: &AtomicBool) -> io::Result<Self> {
        let flags = |more: rustix::fs::OFlags| i32::try_from((rustix::fs::OFlags::NOFOLLOW | more).bits()).unwrap_or(0);
        let open = |flags| OpenOptions::new().write(true).custom_flags(flags).open(&file.path);
        let cached = open(flags(rustix::fs::OFlags::empty()))?;
        let wanted = file.len >= DIRECT_FILE && direct.load(Ordering::Relaxed);
        let direct = if wanted { open(flags(rustix::fs::OFlags::DIRECT)).ok() } else { None };
        Ok(Self { cached, direct })
    }

    fn write(&self, bytes: &[u8], offset: u64, allowed: &AtomicBool) -> io::Result<()> {
        let is_aligned = bytes.len() >= DIRECT_WRITE
            && bytes.as_ptr().align_offset(ALIGNMENT) == 0
            && bytes.len().is_multiple_of(ALIGNMENT)
            && offset.is_multiple_of(ALIGNMENT as u64);
        if let Some(direct) = self.direct.as_ref().filter(|_| is_aligned && allowed.load(Ordering::Relaxed)) {
            match direct.write_all_at(bytes, offset) {
                // A device with larger sectors, or a file system that only pretends.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                    allowed.store(false, Ordering::Relaxed);
                }
                written => return written,
            }
        }
        self.cached.write_all_at(bytes, offset)
    }
}

/// Creates a file of `len` zero bytes that must not exist yet.
pub(super) fn create(path: &Path, len: u64, mode: u32) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).custom_flags(no_follow()).open(path)?;
    if len > 0 {
        file.set_len(len)?;
    }
    Ok(())
}

/// A link in the target must not lead a write elsewhere.
fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}
