//! Every page of every relation carries the checksum of what it holds: what `pg_checksums --check` does, on the stopped copy.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use pgvault_core::postgres::page::{self, PageState};
use pgvault_core::postgres::{ControlFile, RelationFile};
use pgvault_core::vault::snapshot::OpenSnapshot;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use super::{Found, listed};
use crate::runner::Site;
use crate::task::blocking;

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// Threads that read.
const THREADS: usize = 4;

/// Reads every page of a stopped cluster.
pub(crate) async fn page_checksums(snapshot: &OpenSnapshot, site: &Site) -> Found {
    let known: Vec<String> = snapshot.manifest.bad_pages.iter().map(|page| format!("{} block {}", page.path, page.block)).collect();
    let layout = {
        let pgdata = site.pgdata.clone();
        blocking(move || layout(&pgdata)).await
    };
    match layout {
        Ok(layout) => judge(&known, layout, site.pgdata.clone()).await,
        Err(error) => Found::failed(format!("the pages cannot be read: {error}"), json!({ "code": error.code() })),
    }
}

/// The same of some files that were restored, and of which no server knows.
pub(crate) async fn page_checksums_of(snapshot: &OpenSnapshot, pgdata: PathBuf) -> Found {
    let manifest = &snapshot.manifest;
    let known: Vec<String> = manifest.bad_pages.iter().map(|page| format!("{} block {}", page.path, page.block)).collect();
    // Of 1 GiB, as every build has it that is not made to differ.
    let segment_blocks = (1 << 30) / manifest.block_size.max(1);
    judge(&known, Layout { checksums: manifest.data_checksums, block_size: manifest.block_size, segment_blocks }, pgdata).await
}

/// What a page is, in a cluster.
#[derive(Debug, Clone, Copy)]
struct Layout {
    checksums: bool,
    block_size: u32,
    segment_blocks: u32,
}

fn layout(pgdata: &Path) -> Result<Layout> {
    let path = pgdata.join("global/pg_control");
    let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let control = ControlFile::parse(&bytes).map_err(|e| Error::new(ErrorKind::Corrupt, "control", e.to_string()))?;
    Ok(Layout {
        checksums: control.has_checksums(),
        block_size: control.block_size,
        segment_blocks: control.relation_segment_blocks,
    })
}

async fn judge(known: &[String], layout: Layout, pgdata: PathBuf) -> Found {
    let threads = THREADS.min(std::thread::available_parallelism().map_or(2, usize::from));
    match blocking(move || read_all(&pgdata, layout, threads)).await {
        Err(error) => Found::failed(format!("the pages cannot be read: {error}"), json!({ "code": error.code() })),
        Ok(Pages { checksums: false, .. }) => Found::warned(
            "the cluster has no data checksums: damage by a disk goes unnoticed (`pg_checksums --enable`, while it is stopped)",
            json!({ "data_checksums": false }),
        ),
        Ok(Pages { bad, read: pages, .. }) => {
            let new: Vec<String> =
                bad.iter().filter(|page| !known.iter().any(|known| page.starts_with(known.as_str()))).cloned().collect();
            let evidence = json!({ "pages": pages, "bad": listed(&bad), "known_at_backup": known.len() });
            match (new.first(), bad.first()) {
                (Some(first), _) => Found::failed(format!("{} of {pages} pages fail their checksum: {first}", bad.len()), evidence),
                (None, Some(first)) => Found::failed(
                    format!("{} pages were damaged at the source when the backup was made, and are: {first}", bad.len()),
                    evidence,
                ),
                (None, None) => Found::passed(format!("{pages} pages, each with the right checksum"), evidence),
            }
        }
    }
}

struct Pages {
    checksums: bool,
    read: u64,
    /// As `base/5/16384 block 3: ...`.
    bad: Vec<String>,
}

fn read_all(pgdata: &Path, layout: Layout, threads: usize) -> Result<Pages> {
    if !layout.checksums {
        return Ok(Pages { checksums: false, read: 0, bad: Vec::new() });
    }
    let mut files = Vec::new();
    collect(pgdata, &PathBuf::new(), &mut files)?;
    let (next, pages) = (AtomicU64::new(0), AtomicU64::new(0));
    let (bad, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let _ = scope.spawn(|| {
                while let Some((path, relation)) =
                    files.get(usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX))
                {
                    match read_file(pgdata, path, *relation, layout) {
                        Ok((read, found)) => {
                            let _ = pages.fetch_add(read, Ordering::Relaxed);
                            lock(&bad).extend(found);
                        }
                        Err(error) => drop(lock(&failed).get_or_insert(error)),
                    }
                }
            });
        }
    });
    if let Some(error) = lock(&failed).take() {
        return Err(error);
    }
    let mut bad = std::mem::take(&mut *lock(&bad));
    bad.sort();
    Ok(Pages { checksums: true, read: pages.into_inner(), bad })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The files of relations below a data directory, tablespaces included.
fn collect(pgdata: &Path, below: &Path, files: &mut Vec<(PathBuf, RelationFile)>) -> Result<()> {
    let folder = pgdata.join(below);
    for entry in std::fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))? {
        let entry = entry.map_err(|e| Error::io("list", &folder, e))?;
        let path = below.join(entry.file_name());
        // Through the links of tablespaces, and no others: there are none in a restored cluster but `pg_wal`, which has no relations.
        let meta = std::fs::metadata(entry.path()).map_err(|e| Error::io("read", &entry.path(), e))?;
        if meta.is_dir() {
            collect(pgdata, &path, files)?;
        } else if let Some(relation) = path.to_str().and_then(RelationFile::parse).filter(|relation| !relation.is_temporary) {
            files.push((path, relation));
        }
    }
    Ok(())
}

fn read_file(pgdata: &Path, path: &Path, relation: RelationFile, layout: Layout) -> Result<(u64, Vec<String>)> {
    let full = pgdata.join(path);
    let size = layout.block_size as usize;
    let mut file = File::open(&full).map_err(|e| Error::io("open", &full, e))?;
    let mut buffer = vec![0; CHUNK.next_multiple_of(size.max(1))];
    let (mut index, mut bad) = (0_u32, Vec::new());
    loop {
        let filled = fill(&mut file, &mut buffer).map_err(|e| Error::io("read", &full, e))?;
        for page in buffer.get(..filled).unwrap_or_default().chunks(size.max(1)) {
            let Some(block) = relation.block_number(index, layout.segment_blocks) else { continue };
            index = index.saturating_add(1);
            let why = match page::verify(page, block, layout.block_size) {
                PageState::New | PageState::Good => continue,
                PageState::Incomplete => "the page is cut short".to_owned(),
                PageState::BadHeader => "the header is not one of a page".to_owned(),
                PageState::BadChecksum { stored, computed } => format!("checksum {stored:04X} instead of {computed:04X}"),
            };
            bad.push(format!("{} block {block}: {why}", path.display()));
        }
        if filled < buffer.len() {
            return Ok((index.into(), bad));
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == IoKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
