//! The CPU work of a backup, on threads of its own: read, verify, digest, compress, seal.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::file::{FileTask, Placed, REGION, unreadable};
use super::packer::Packer;
use crate::crypto::digest::DigestKey;
use crate::crypto::sealed::FrameEncoder;
use crate::format::file_table::{FileEntry, MapPlace, Node};
use crate::format::map::FileMap;
use crate::format::{BLOCK, MAX_FRAME};
use crate::postgres::Lsn;
use crate::postgres::page::{self, PageHeader, PageState};
use crate::progress::SharedProgress;
use crate::vault::snapshot::BadPage;
use crate::{Error, ErrorKind, Result};

/// Reads of a page that fails its checksum before it is believed to be bad rather than torn by a concurrent write.
const TORN_READS: u32 = 12;
const TORN_WAIT: Duration = Duration::from_millis(25);

/// Bad pages that are listed one by one; a disk that lost a whole file would list millions.
const MAX_BAD_PAGES: usize = 10_000;

/// Work for any worker.
#[derive(Debug)]
pub(super) enum Job {
    /// Regions that the worker reads itself.
    Read { file: Arc<FileTask>, first: u32, count: u32 },
    /// A region that arrived over the network.
    Region { file: Arc<FileTask>, region: u32, bytes: Vec<u8> },
}

/// How pages of this cluster are verified.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageRules {
    pub(super) block_size: u32,
    pub(super) segment_blocks: u32,
    pub(super) checksums: bool,
    /// Pages newer than this are restored from WAL. A copy that was torn on the wire cannot be read again, so for a remote
    /// source such pages are not judged; a local source reads again instead.
    pub(super) trust_wal_from: Option<Lsn>,
}

/// What all workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rules: PageRules,
    pub(super) digest: DigestKey,
    pub(super) level: i32,
    pub(super) data: Packer,
    pub(super) meta: Packer,
    pub(super) progress: SharedProgress,
    pub(super) failure: Arc<Failure>,
    /// Jobs that were handed over and are not done.
    pub(super) pending: AtomicU64,
    pub(super) entries: Mutex<Vec<FileEntry>>,
    pub(super) bad_pages: Mutex<Vec<BadPage>>,
    pub(super) bad_page_count: AtomicU64,
    pub(super) changed_bytes: AtomicU64,
}

/// The first error of any thread or task.
#[derive(Debug, Default)]
pub(super) struct Failure {
    happened: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Failure {
    /// Records the first error; everybody else stops at the next job.
    pub(super) fn fail(&self, error: Error) {
        if !self.happened.swap(true, Ordering::SeqCst) {
            *lock(&self.error) = Some(error);
        }
    }

    pub(super) fn happened(&self) -> bool {
        self.happened.load(Ordering::SeqCst)
    }

    /// The error, once.
    pub(super) fn take(&self) -> Option<Error> {
        lock(&self.error).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Adds a finished file to the table.
    pub(super) fn finish_file(&self, file: &FileTask, map: &FileMap, encoder: &mut FrameEncoder) -> Result<()> {
        let bytes = map.encode();
        let place = if file.regions() <= 1 {
            MapPlace::Inline(bytes)
        } else {
            // Pushed one at a time under the packer's lock would let another file's frames in between.
            let mut encoded = Vec::new();
            for part in bytes.chunks(MAX_FRAME) {
                encoded.push((part, self.digest.frame(part)));
            }
            let (pack, first) = match encoded.as_slice() {
                [(part, digest)] => self.meta.append(&[encoder.encode(part, *digest)?])?,
                several => {
                    let mut encoders = several.iter().map(|_| FrameEncoder::new(self.level)).collect::<Result<Vec<_>>>()?;
                    let frames = several.iter().zip(&mut encoders).map(|((part, digest), e)| e.encode(part, *digest));
                    self.meta.append(&frames.collect::<Result<Vec<_>>>()?)?
                }
            };
            MapPlace::Frames { pack, first, count: u32::try_from(encoded.len()).unwrap_or(u32::MAX) }
        };
        let entry = FileEntry { path: file.path.clone(), mode: file.mode, node: Node::File { len: file.len, map: place } };
        lock(&self.entries).push(entry);
        Ok(())
    }
}

/// One worker thread's state.
struct Worker {
    shared: Arc<Shared>,
    encoder: FrameEncoder,
    buffer: Vec<u8>,
    /// Parts of small files and tails of large ones, waiting to fill a frame.
    bundle: Vec<u8>,
    bundled: Vec<(Arc<FileTask>, u32, usize)>,
}

/// Works until the channel closes; the caller joins the thread.
pub(super) fn run(shared: &Arc<Shared>, jobs: &async_channel::Receiver<Job>) {
    let worker = FrameEncoder::new(shared.level).map(|encoder| Worker {
        shared: shared.clone(),
        encoder,
        buffer: Vec::new(),
        bundle: Vec::with_capacity(REGION),
        bundled: Vec::new(),
    });
    let result = worker.and_then(|mut worker| {
        while let Ok(job) = jobs.recv_blocking() {
            if shared.failure.happened() {
                break;
            }
            worker.work(job)?;
            let _ = shared.pending.fetch_sub(1, Ordering::SeqCst);
        }
        worker.flush_bundle()
    });
    if let Err(error) = result {
        shared.failure.fail(error);
        // A sender blocked on the full channel wakes up and sees the failure.
        jobs.close();
    }
}

impl Worker {
    fn work(&mut self, job: Job) -> Result<()> {
        match job {
            Job::Region { file, region, mut bytes } => {
                self.verify(&file, region, &mut bytes);
                self.store(&file, region, &bytes)
            }
            Job::Read { file, first, count } => {
                let mut buffer = std::mem::take(&mut self.buffer);
                for region in first..first.saturating_add(count) {
                    buffer.resize(file.region_len(region), 0);
                    read_region(&file, region, &mut buffer)?;
                    self.verify(&file, region, &mut buffer);
                    self.store(&file, region, &buffer)?;
                }
                self.buffer = buffer;
                Ok(())
            }
        }
    }

    fn store(&mut self, file: &Arc<FileTask>, region: u32, bytes: &[u8]) -> Result<()> {
        self.shared.progress.advance(bytes.len() as u64);
        if is_zero(bytes) {
            return self.placed(file, region, Placed::Zero);
        }
        let _ = self.shared.changed_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if bytes.len() == REGION {
            let mut digests = Vec::with_capacity(REGION / BLOCK);
            let digest = self.shared.digest.frame_with_blocks(bytes, |d| digests.push(d));
            let (pack, frame) = self.shared.data.append(&[self.encoder.encode(bytes, digest)?])?;
            return self.placed(file, region, Placed::Stored { pack, frame, slot: 0, digests });
        }
        let padded = bytes.len().next_multiple_of(BLOCK);
        if self.bundle.len() + padded > REGION {
            self.flush_bundle()?;
        }
        let slot = self.bundle.len() / BLOCK;
        self.bundle.extend_from_slice(bytes);
        self.bundle.resize((slot * BLOCK) + padded, 0);
        self.bundled.push((file.clone(), region, padded / BLOCK));
        Ok(())
    }

    fn flush_bundle(&mut self) -> Result<()> {
        if self.bundle.is_empty() {
            return Ok(());
        }
        let mut digests = Vec::with_capacity(REGION / BLOCK);
        let digest = self.shared.digest.frame_with_blocks(&self.bundle, |d| digests.push(d));
        let (pack, frame) = self.shared.data.append(&[self.encoder.encode(&self.bundle, digest)?])?;
        self.bundle.clear();
        let mut slot = 0;
        for (file, region, blocks) in std::mem::take(&mut self.bundled) {
            let own = digests.get(slot..slot + blocks).unwrap_or(&[]).to_vec();
            let placed = Placed::Stored { pack, frame, slot: u32::try_from(slot).unwrap_or(u32::MAX), digests: own };
            self.placed(&file, region, placed)?;
            slot += blocks;
        }
        Ok(())
    }

    fn placed(&mut self, file: &Arc<FileTask>, region: u32, placed: Placed) -> Result<()> {
        match file.place(region, placed) {
            Some(map) => self.shared.finish_file(file, &map, &mut self.encoder),
            None => Ok(()),
        }
    }

    /// Checks every page of a relation's region; a page that stays bad is recorded, and copied as it is.
    fn verify(&self, file: &FileTask, region: u32, bytes: &mut [u8]) {
        let Some(relation) = file.relation else { return };
        let rules = self.shared.rules;
        let size = rules.block_size as usize;
        if !REGION.is_multiple_of(size) {
            return;
        }
        let first = u64::from(region) * (REGION / size) as u64;
        for (index, page) in bytes.chunks_mut(size).enumerate() {
            let in_file = u32::try_from(first + index as u64).unwrap_or(u32::MAX);
            let Some(block) = relation.block_number(in_file, rules.segment_blocks) else { continue };
            let mut state = judge(page, block, rules);
            if state.is_acceptable() {
                continue;
            }
            // A page torn in two still has one whole header, the old or the new; garbage has none, whatever its LSN says.
            let newer = |page: &[u8]| {
                PageHeader::parse(page).is_some_and(|h| rules.trust_wal_from.is_some_and(|from| h.lsn >= from))
                    && page::verify_header(page, rules.block_size).is_acceptable()
            };
            if let Some(reader) = &file.reader {
                state = read_again(reader, u64::from(in_file) * size as u64, page, block, rules);
            } else if newer(page) {
                continue;
            }
            if let Some(reason) = reason(state) {
                self.report(file, block, reason);
            }
        }
    }

    fn report(&self, file: &FileTask, block: u32, reason: String) {
        let _ = self.shared.bad_page_count.fetch_add(1, Ordering::Relaxed);
        let mut pages = lock(&self.shared.bad_pages);
        if pages.len() < MAX_BAD_PAGES {
            pages.push(BadPage { path: file.path.clone(), block, reason });
        }
    }
}

fn judge(page: &[u8], block: u32, rules: PageRules) -> PageState {
    if rules.checksums { page::verify(page, block, rules.block_size) } else { page::verify_header(page, rules.block_size) }
}

fn reason(state: PageState) -> Option<String> {
    match state {
        // A file whose length is no multiple of the page size was caught while it grew; WAL brings the rest.
        PageState::New | PageState::Good | PageState::Incomplete => None,
        PageState::BadChecksum { stored, computed } => Some(format!("stored checksum {stored:04X}, computed {computed:04X}")),
        PageState::BadHeader => Some("invalid page header".into()),
    }
}

/// Reads a page until it is whole or has failed so often that it is not merely being written.
fn read_again(reader: &std::fs::File, offset: u64, page: &mut [u8], block: u32, rules: PageRules) -> PageState {
    let mut state = judge(page, block, rules);
    let mut again = vec![0; page.len()];
    for _ in 0..TORN_READS {
        std::thread::sleep(TORN_WAIT);
        match reader.read_exact_at(&mut again, offset) {
            Ok(()) => page.copy_from_slice(&again),
            // Truncated meanwhile: WAL replay will truncate it again.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                page.fill(0);
                return PageState::New;
            }
            // A disk that fails now has failed before: the page is bad, and what was read of it is kept.
            Err(_) => return state,
        }
        state = judge(page, block, rules);
        if state.is_acceptable() {
            break;
        }
    }
    state
}

/// Fills `buffer` from the file; what was cut off since the file was opened reads as zeroes, as PostgreSQL's own base
/// backup has it, and WAL replay repeats the truncation.
fn read_region(file: &FileTask, region: u32, buffer: &mut [u8]) -> Result<()> {
    let Some(reader) = &file.reader else {
        return Err(Error::new(ErrorKind::Failed, "backup.no_reader", format!("{} cannot be read by a worker", file.path)));
    };
    let offset = u64::from(region) * REGION as u64;
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read_at(rest, offset + filled as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unreadable("read", std::path::Path::new(&file.path), e)),
        }
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // Most blocks differ in their first bytes; only zero-headed ones are scanned.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk == &[0; 64]) && rest.iter().all(|b| *b == 0)
}
