//! The CPU work of a backup, on threads of its own: read, verify, digest, compress, seal.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::entries::Entries;
use super::file::{FileTask, Piece, Placed, REGION, Section, unreadable};
use super::leftovers::Leftovers;
use super::parent::KnownBlock;
use super::usage::Usage;
use crate::crypto::digest::DigestKey;
use crate::crypto::sealed::FrameEncoder;
use crate::format::BLOCK;
use crate::format::file_table::{FileEntry, MapPlace, Node};
use crate::format::map::{BLOCK_DIGEST, Extent, FileMap};
use crate::pack::{Failure, Packer};
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
    /// Pages that the parent has, as they are, with an older LSN were found good then: they are not judged again.
    pub(super) judged: Option<Lsn>,
    pub(super) digest: DigestKey,
    pub(super) level: i32,
    pub(super) data: Packer,
    pub(super) meta: Packer,
    pub(super) leftovers: Leftovers,
    pub(super) progress: SharedProgress,
    pub(super) failure: Arc<Failure>,
    /// Jobs that were handed over and are not done.
    pub(super) pending: AtomicU64,
    pub(super) made: Mutex<Made>,
    pub(super) bad_pages: Mutex<Vec<BadPage>>,
    pub(super) bad_page_count: AtomicU64,
    pub(super) changed_bytes: AtomicU64,
}

/// What all files together have come to.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub(super) entries: Entries,
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) usage: Usage,
}

impl Made {
    fn piece(&mut self, piece: Piece) {
        if let Piece::Stored { pack, frame, blocks, .. } = piece {
            self.usage.add(pack, frame, blocks);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Adds a finished file to the table, and stores those sections of its map that are new.
    pub(super) fn finish_file(&self, file: &FileTask, sections: &[Section], encoder: &mut FrameEncoder) -> Result<()> {
        let map = match sections {
            [] => MapPlace::Inline(FileMap::default().encode()),
            [Section::Made(map)] if file.regions() == 1 => MapPlace::Inline(map.encode()),
            sections => {
                let mut places = Vec::with_capacity(sections.len());
                for section in sections {
                    places.push(match section {
                        Section::Kept(pack, frame) => (*pack, *frame),
                        Section::Made(map) => {
                            let bytes = map.encode();
                            self.meta.append(&encoder.encode(&bytes, self.digest.frame(&bytes))?)?
                        }
                    });
                }
                MapPlace::of_sections(places)
            }
        };
        let mut made = lock(&self.made);
        for (section, number) in sections.iter().zip(0..) {
            match section {
                Section::Kept(..) => file.kept_pieces(number).for_each(|piece| made.piece(piece)),
                Section::Made(map) => {
                    for extent in &map.extents {
                        if let Extent::Stored { blocks, pack, frame, .. } = *extent {
                            let pack = map.packs.get(pack as usize).copied().unwrap_or_default();
                            made.usage.add(pack, frame, blocks);
                        }
                    }
                }
            }
            if let Some((pack, frame)) = map.locate(number) {
                made.usage.add(pack, frame, 1);
            }
        }
        made.files += 1;
        made.bytes += file.len;
        made.entries.push(&FileEntry { path: file.path.clone(), mode: file.mode, node: Node::File { len: file.len, map } });
        Ok(())
    }
}

/// One worker thread's state.
struct Worker {
    shared: Arc<Shared>,
    encoder: FrameEncoder,
    buffer: Vec<u8>,
    padded: Vec<u8>,
    /// Small files, tails of large ones and single blocks that changed, waiting to fill a frame.
    bundle: Vec<u8>,
    bundled: Vec<Bundled>,
}

/// A region of which something waits in the bundle.
struct Bundled {
    file: Arc<FileTask>,
    region: u32,
    parts: Vec<Part>,
    digests: Vec<[u8; BLOCK_DIGEST]>,
}

/// Where blocks of a region are, or are going to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Known(Piece),
    /// In the bundle.
    Waiting {
        slot: u32,
        blocks: u32,
    },
}

/// Works until the channel closes; the caller joins the thread.
pub(super) fn run(shared: &Arc<Shared>, jobs: &async_channel::Receiver<Job>) {
    let worker = FrameEncoder::new(shared.level).map(|encoder| Worker {
        shared: shared.clone(),
        encoder,
        buffer: Vec::new(),
        padded: Vec::new(),
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
            Job::Region { file, region, mut bytes } => self.store(&file, region, &mut bytes),
            Job::Read { file, first, count } => {
                let mut buffer = std::mem::take(&mut self.buffer);
                for region in first..first.saturating_add(count) {
                    buffer.resize(file.region_len(region), 0);
                    read_region(&file, region, &mut buffer)?;
                    self.store(&file, region, &mut buffer)?;
                }
                self.buffer = buffer;
                Ok(())
            }
        }
    }

    fn store(&mut self, file: &Arc<FileTask>, region: u32, bytes: &mut [u8]) -> Result<()> {
        self.shared.progress.advance(bytes.len() as u64);
        let known = file.known(region);
        if known.is_empty() {
            let _ = self.verify(file, region, bytes, &[]);
        }
        if known.is_empty() && is_zero(bytes) {
            let blocks = u32::try_from(bytes.len().div_ceil(BLOCK)).unwrap_or(u32::MAX);
            return self.placed(file, region, Placed::Made { pieces: vec![Piece::Zero { blocks }], digests: Vec::new() });
        }
        let mut digests = Vec::with_capacity(REGION / BLOCK);
        let mut whole = self.digest(bytes, &mut digests);
        if known.is_empty() && bytes.len() == REGION {
            return self.store_whole(file, region, bytes, whole, digests);
        }
        let mut states = compare(bytes, &digests, known);
        if !known.is_empty() && self.verify(file, region, bytes, &states) {
            digests.clear();
            whole = self.digest(bytes, &mut digests);
            states = compare(bytes, &digests, known);
        }
        if known.len() == states.len() && states.iter().all(|state| *state == Block::Same) {
            return self.placed(file, region, Placed::Kept);
        }
        if bytes.len() == REGION && is_scattered(&states, known) {
            return self.store_whole(file, region, bytes, whole, digests);
        }
        self.store_blocks(file, region, bytes, &digests, &states)
    }

    /// The digests of each block, the last one filled up with zeroes, and of all of them.
    fn digest(&mut self, bytes: &[u8], digests: &mut Vec<[u8; BLOCK_DIGEST]>) -> [u8; 16] {
        if bytes.len().is_multiple_of(BLOCK) {
            return self.shared.digest.frame_with_blocks(bytes, |d| digests.push(d));
        }
        self.padded.clear();
        self.padded.extend_from_slice(bytes);
        self.padded.resize(bytes.len().next_multiple_of(BLOCK), 0);
        self.shared.digest.frame_with_blocks(&self.padded, |d| digests.push(d))
    }

    /// Stores a region in a frame of its own.
    fn store_whole(
        &mut self,
        file: &Arc<FileTask>,
        region: u32,
        bytes: &[u8],
        digest: [u8; 16],
        digests: Vec<[u8; BLOCK_DIGEST]>,
    ) -> Result<()> {
        let (pack, frame) = if let Some(place) = self.shared.leftovers.region(&digest) {
            place
        } else {
            let _ = self.shared.changed_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.shared.data.append(&self.encoder.encode(bytes, digest)?)?
        };
        let blocks = u32::try_from(REGION / BLOCK).unwrap_or(u32::MAX);
        self.placed(file, region, Placed::Made { pieces: vec![Piece::Stored { pack, frame, slot: 0, blocks }], digests })
    }

    /// Puts the blocks that changed into the bundle, and refers to the others where they are.
    fn store_blocks(
        &mut self,
        file: &Arc<FileTask>,
        region: u32,
        bytes: &[u8],
        digests: &[[u8; BLOCK_DIGEST]],
        states: &[Block],
    ) -> Result<()> {
        let changed = states.iter().filter(|state| **state == Block::Changed).count();
        if self.bundle.len() + changed * BLOCK > REGION {
            self.flush_bundle()?;
        }
        let (mut parts, mut stored) = (Vec::new(), Vec::new());
        for (((block, digest), state), known) in
            bytes.chunks(BLOCK).zip(digests).zip(states).zip(file.known(region).iter().map(Some).chain(std::iter::repeat(None)))
        {
            let piece = match state {
                Block::Zero => Some(Piece::Zero { blocks: 1 }),
                Block::Same => known.and_then(|known| file.piece(*known)),
                Block::Changed => None,
            };
            if let Some(piece) = piece {
                parts.push(Part::Known(piece));
                if matches!(piece, Piece::Stored { .. }) {
                    stored.push(*digest);
                }
                continue;
            }
            let slot = u32::try_from(self.bundle.len() / BLOCK).unwrap_or(u32::MAX);
            self.bundle.extend_from_slice(block);
            self.bundle.resize(self.bundle.len().next_multiple_of(BLOCK), 0);
            let _ = self.shared.changed_bytes.fetch_add(block.len() as u64, Ordering::Relaxed);
            parts.push(Part::Waiting { slot, blocks: 1 });
            stored.push(*digest);
        }
        self.bundled.push(Bundled { file: file.clone(), region, parts, digests: stored });
        // Nothing may wait for it: what was truncated or became zero needs no frame.
        if changed == 0 && self.bundle.is_empty() { self.flush_bundle() } else { Ok(()) }
    }

    fn flush_bundle(&mut self) -> Result<()> {
        if self.bundled.is_empty() {
            return Ok(());
        }
        let place = if self.bundle.is_empty() {
            None
        } else {
            let digest = self.shared.digest.frame(&self.bundle);
            Some(self.shared.data.append(&self.encoder.encode(&self.bundle, digest)?)?)
        };
        self.bundle.clear();
        for Bundled { file, region, parts, digests } in std::mem::take(&mut self.bundled) {
            let piece = |part| match (part, place) {
                (Part::Known(piece), _) => piece,
                (Part::Waiting { slot, blocks }, Some((pack, frame))) => Piece::Stored { pack, frame, slot, blocks },
                // There is a frame as soon as one block waits for it.
                (Part::Waiting { blocks, .. }, None) => Piece::Zero { blocks },
            };
            let pieces = parts.into_iter().map(piece).collect();
            self.placed(&file, region, Placed::Made { pieces, digests })?;
        }
        Ok(())
    }

    fn placed(&mut self, file: &Arc<FileTask>, region: u32, placed: Placed) -> Result<()> {
        match file.place(region, placed) {
            Some(sections) => self.shared.finish_file(file, &sections, &mut self.encoder),
            None => Ok(()),
        }
    }

    /// Checks the pages of a relation's region, but those that the parent has had and judged; a page that stays bad is
    /// recorded, and copied as it is. True when some were read again, and may be others now.
    fn verify(&self, file: &FileTask, region: u32, bytes: &mut [u8], states: &[Block]) -> bool {
        let Some(relation) = file.relation else { return false };
        let rules = self.shared.rules;
        let size = rules.block_size as usize;
        if !REGION.is_multiple_of(size) {
            return false;
        }
        let judged = |index: usize, page: &[u8]| {
            // Its block number is part of a checksum: it is the same, as the file and the region are.
            size == BLOCK
                && states.get(index) == Some(&Block::Same)
                && PageHeader::parse(page).is_some_and(|header| self.shared.judged.is_some_and(|before| header.lsn < before))
        };
        let mut again = false;
        let first = u64::from(region) * (REGION / size) as u64;
        for (index, page) in bytes.chunks_mut(size).enumerate() {
            if judged(index, page) {
                continue;
            }
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
                again = true;
            } else if newer(page) {
                continue;
            }
            if let Some(reason) = reason(state) {
                self.report(file, block, reason);
            }
        }
        again
    }

    fn report(&self, file: &FileTask, block: u32, reason: String) {
        let _ = self.shared.bad_page_count.fetch_add(1, Ordering::Relaxed);
        let mut pages = lock(&self.shared.bad_pages);
        if pages.len() < MAX_BAD_PAGES {
            pages.push(BadPage { path: file.path.clone(), block, reason });
        }
    }
}

/// What became of a block since the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    /// Nothing.
    Same,
    /// It is zero now, which needs no place.
    Zero,
    Changed,
}

/// Compares a region's blocks with what the parent has of them.
fn compare(bytes: &[u8], digests: &[[u8; BLOCK_DIGEST]], known: &[KnownBlock]) -> Vec<Block> {
    let known = known.iter().map(Some).chain(std::iter::repeat(None));
    bytes
        .chunks(BLOCK)
        .zip(digests)
        .zip(known)
        .map(|((block, digest), known)| match known {
            Some(KnownBlock::Stored { digest: was, .. }) if was == digest => Block::Same,
            Some(KnownBlock::Zero) if is_zero(block) => Block::Same,
            _ if is_zero(block) => Block::Zero,
            _ => Block::Changed,
        })
        .collect()
}

/// Blocks of a region outside the frame that holds most of them, from which on the region is stored anew as a whole.
const SCATTERED_FROM: usize = 12;

/// True when so many blocks of a region would be elsewhere than the others that it is better written anew: a restore reads a
/// whole frame for each place.
fn is_scattered(states: &[Block], known: &[KnownBlock]) -> bool {
    let mut frames: Vec<((u32, u32), usize)> = Vec::new();
    let mut placed = 0;
    for (state, known) in states.iter().zip(known.iter().map(Some).chain(std::iter::repeat(None))) {
        match (state, known) {
            (Block::Same, Some(KnownBlock::Stored { pack, frame, .. })) => {
                placed += 1;
                match frames.iter_mut().find(|(place, _)| *place == (*pack, *frame)) {
                    Some((_, count)) => *count += 1,
                    None => frames.push(((*pack, *frame), 1)),
                }
            }
            (Block::Changed, _) => placed += 1,
            _ => {}
        }
    }
    let together = frames.iter().map(|(_, count)| *count).max().unwrap_or(0);
    states.contains(&Block::Changed) && placed - together >= SCATTERED_FROM
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
