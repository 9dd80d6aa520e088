//! A second place for WAL while the store is down: a bounded directory of raw segments on this machine.
//!
//! Without one, what the store does not take stays on the database's disk, held by the slot. With one it is also here, fsynced, so
//! that it survives the loss of that disk; it is told to the server as *written*, and as durable only when it was chosen to count as
//! that. Files are named as segments and grow from their first byte on. One is deleted when its WAL is durable in the vault.
//!
//! After a crash whatever is in the directory is stored before streaming begins, so nothing else has to know of it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::assemble::{Piece, Share};
use crate::postgres::{Lsn, SegmentHeader, SegmentName, SegmentSize, TimelineId, WalSegNo, scan_segment};
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// Where to spool, and what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolOptions {
    /// The directory; each cluster gets one of its own in it.
    pub directory: PathBuf,
    /// Bytes that it may hold.
    pub limit: u64,
    /// Report as durable what is here.
    pub durable: bool,
}

/// An open spool directory, locked against others.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    limit: u64,
    /// Sizes of the files there are.
    files: BTreeMap<SegmentName, u64>,
    open: Option<(SegmentName, File)>,
    /// Files with bytes that may not be on the disk yet.
    dirty: Vec<File>,
    _lock: File,
}

impl Spool {
    /// Opens the cluster's directory, and makes it when it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] when another process uses it; when it cannot be made or read.
    pub fn open(options: &SpoolOptions, cluster: &Cluster) -> Result<Self> {
        let directory = options.directory.join(cluster.name().to_string());
        let io = |e| Error::io("open the spool", &directory, e);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(io)?;
        File::open(&options.directory).and_then(|parent| parent.sync_all()).map_err(io)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join("lock"));
        let lock = lock.map_err(io)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::new(ErrorKind::Locked, "spool.locked", format!("another process uses the spool {}", directory.display()))
                .with_hint("one `wal stream` for each cluster is enough")
        })?;
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(io)? {
            let entry = entry.map_err(io)?;
            let Some(segment) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let _ = files.insert(segment, entry.metadata().map_err(io)?.size());
        }
        Ok(Self { directory, limit: options.limit, files, open: None, dirty: Vec::new(), _lock: lock })
    }

    /// Where a segment's file is.
    pub fn path(&self, segment: SegmentName) -> PathBuf {
        self.directory.join(segment.to_string())
    }

    /// Bytes that it holds.
    pub fn used(&self) -> u64 {
        self.files.values().sum()
    }

    /// True when it must not grow.
    pub fn is_full(&self) -> bool {
        self.used() >= self.limit
    }

    /// Adds bytes at their place. What is there already is written again.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn write(&mut self, timeline: TimelineId, size: SegmentSize, start: Lsn, mut bytes: &[u8]) -> Result<()> {
        let mut at = start;
        while !bytes.is_empty() {
            let number = WalSegNo::containing(at, size);
            let segment = SegmentName::new(timeline, number, size);
            let offset = at.0 - number.start(size).0;
            let here = usize::try_from(size.bytes() - offset).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(here);
            self.write_file(segment, offset, now).map_err(|e| Error::io("write the spool file", &self.path(segment), e))?;
            (at, bytes) = (at.advance(here as u64), later);
        }
        Ok(())
    }

    fn write_file(&mut self, segment: SegmentName, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            let path = self.path(segment);
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
            // The name has to survive as well.
            File::open(&self.directory)?.sync_all()?;
            if let Some((_, before)) = self.open.replace((segment, file)) {
                self.dirty.push(before);
            }
        }
        if let Some((_, file)) = &self.open {
            file.write_all_at(bytes, offset)?;
        }
        let end = offset + bytes.len() as u64;
        let known = self.files.entry(segment).or_default();
        *known = end.max(*known);
        Ok(())
    }

    /// The files that have to be fsynced for what was written so far to be durable; for another thread.
    ///
    /// # Errors
    /// When the system has no file descriptor to give.
    pub fn unsynced(&mut self) -> Result<Vec<File>> {
        let mut files = std::mem::take(&mut self.dirty);
        if let Some((_, file)) = &self.open {
            files.push(file.try_clone().map_err(|e| Error::io("use the spool", &self.directory, e))?);
        }
        Ok(files)
    }

    /// Deletes what is durable in the vault: the files of `segment` and of those before it on its timeline.
    ///
    /// # Errors
    /// When a file cannot be deleted.
    pub fn release(&mut self, segment: SegmentName) -> Result<()> {
        if self.open.as_ref().is_some_and(|(open, _)| *open == segment) {
            self.open = None;
        }
        let done = |name: &SegmentName| name.timeline == segment.timeline && *name <= segment;
        let gone: Vec<_> = self.files.keys().copied().filter(done).collect();
        for segment in gone {
            let path = self.path(segment);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("delete", &path, e)),
                _ => drop(self.files.remove(&segment)),
            }
        }
        Ok(())
    }

    /// Renames a file that is not WAL, so that a person can look at it.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn set_aside(&mut self, segment: SegmentName) -> Result<()> {
        let path = self.path(segment);
        tracing::warn!(path = %path.display(), "this file of the spool is not WAL of this cluster; renamed to `.bad`");
        fs::rename(&path, path.with_extension("bad")).map_err(|e| Error::io("rename", &path, e))?;
        let _ = self.files.remove(&segment);
        Ok(())
    }

    /// Deletes everything, because the vault has it all.
    ///
    /// # Errors
    /// When a file cannot be deleted.
    pub fn clear(&mut self) -> Result<()> {
        (self.open, self.dirty) = (None, Vec::new());
        for segment in self.segments() {
            self.release(segment)?;
        }
        Ok(())
    }

    /// The segments of which something is there, in order.
    pub fn segments(&self) -> Vec<SegmentName> {
        self.files.keys().copied().collect()
    }

    /// What an earlier process has left of a segment, as far as it is WAL; `None` when none of it is.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn left(&self, segment: SegmentName) -> Result<Option<Piece>> {
        left_piece(segment, &self.path(segment))
    }
}

fn left_piece(segment: SegmentName, path: &Path) -> Result<Option<Piece>> {
    let mut bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let Ok(header) = SegmentHeader::parse(&bytes) else { return Ok(None) };
    let size = header.segment_size;
    let start = super::object::segment_start(segment, size)?;
    let Ok(scan) = scan_segment(&bytes, start, size) else { return Ok(None) };
    if bytes.len() as u64 == size.bytes() && scan.is_complete() {
        return Ok(Some(Piece { segment, from: 0, bytes: bytes.into(), share: Share::Whole, end: start.advance(size.bytes()) }));
    }
    // What is torn may be so because the machine went down: only what a checksum vouches for counts. The server has the rest.
    let end = if scan.last_whole_record == scan.last_record { scan.end_of_valid } else { scan.last_record.unwrap_or(start) };
    let length = end.0.saturating_sub(start.0);
    bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
    if bytes.is_empty() {
        return Ok(None);
    }
    let scan = scan_segment(&bytes, start, size)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", format!("{}: {e}", path.display())))?;
    let end = start.advance(bytes.len() as u64);
    Ok(Some(Piece { segment, from: 0, bytes: bytes.into(), share: Share::Part { scan }, end }))
}
