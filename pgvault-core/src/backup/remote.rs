//! Reading a server through `BASE_BACKUP`: one stream, no file access.

use std::sync::Arc;

use super::exclude;
use super::file::{FileTask, REGION};
use super::pipeline::Pipeline;
use crate::format::file_table::{FileEntry, Node};
use crate::postgres::{BackupEvent, BaseBackup, EntryKind, Lsn, TimelineId};
use crate::vault::snapshot::Tablespace;
use crate::{Error, ErrorKind, Result};

/// What the stream told besides the files.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) entries: Vec<FileEntry>,
    pub(super) tablespaces: Vec<Tablespace>,
    pub(super) backup_label: String,
    pub(super) stop: Lsn,
    pub(super) stop_timeline: Option<TimelineId>,
    pub(super) checksum_failures: bool,
}

/// The longest `backup_label`; the server's own are under 500 bytes.
const MAX_LABEL: u64 = 64 << 10;

/// A member of an archive on its way.
enum Current {
    /// Nothing to do with its content.
    Ignored,
    /// `backup_label`, which belongs into the manifest.
    Label(Vec<u8>),
    /// A file for the pipeline.
    File { task: Arc<FileTask>, region: u32, buffer: Vec<u8> },
}

/// The first events, before any archive: where the backup starts and what will come.
pub(super) struct Begun {
    pub(super) start: Lsn,
    pub(super) timeline: TimelineId,
    pub(super) tablespaces: Vec<Tablespace>,
    /// The server's estimate of the size, in bytes.
    pub(super) estimate: u64,
}

/// Reads up to the list of tablespaces.
pub(super) async fn begin(stream: &mut BaseBackup<'_>) -> Result<Begun> {
    let mut started = None;
    loop {
        match stream.next().await? {
            Some(BackupEvent::Start { lsn, timeline }) => started = Some((lsn, timeline)),
            Some(BackupEvent::Tablespaces(all)) => {
                let (start, timeline) = started.ok_or_else(|| {
                    Error::new(ErrorKind::Source, "source.protocol", "the server did not say where the backup starts")
                })?;
                let estimate = all.iter().filter_map(|t| t.size_kb).sum::<u64>() * 1024;
                let tablespaces = all.into_iter().filter_map(|t| Some(Tablespace { oid: t.oid?, location: t.location })).collect();
                return Ok(Begun { start, timeline, tablespaces, estimate });
            }
            other => {
                return Err(Error::new(
                    ErrorKind::Source,
                    "source.protocol",
                    format!("the server began its backup with {other:?}"),
                ));
            }
        }
    }
}

/// Receives all archives.
pub(super) async fn copy(pipeline: &Pipeline, stream: &mut BaseBackup<'_>, begun: &Begun) -> Result<Received> {
    let mut received = Received { tablespaces: begun.tablespaces.clone(), ..Received::default() };
    for space in &begun.tablespaces {
        let node = Node::Tablespace { location: space.location.clone() };
        received.entries.push(FileEntry { path: format!("pg_tblspc/{}", space.oid), mode: 0o777, node });
    }
    let mut prefix = String::new();
    let mut current = Current::Ignored;
    while let Some(event) = stream.next().await? {
        match event {
            BackupEvent::ArchiveBegin { name, .. } => {
                let oid = name.strip_suffix(".tar").filter(|oid| *oid != "base");
                prefix = oid.map_or_else(String::new, |oid| format!("pg_tblspc/{oid}/"));
            }
            BackupEvent::Entry(entry) => {
                let path = format!("{prefix}{}", entry.path);
                current = match entry.kind {
                    EntryKind::Dir => {
                        received.entries.push(FileEntry { path, mode: entry.mode & 0o7777, node: Node::Directory });
                        Current::Ignored
                    }
                    EntryKind::File if path == "backup_label" && entry.size <= MAX_LABEL => Current::Label(Vec::new()),
                    EntryKind::File if !exclude::is_excluded(&path) => {
                        let task = pipeline.file(path, entry.mode & 0o7777, entry.size, None).await?;
                        let buffer = Vec::with_capacity(task.region_len(0));
                        Current::File { task, region: 0, buffer }
                    }
                    // Links to tablespaces are known from the list before.
                    EntryKind::File | EntryKind::Symlink { .. } => Current::Ignored,
                };
            }
            BackupEvent::Data(bytes) => match &mut current {
                Current::Ignored => {}
                Current::Label(label) => label.extend_from_slice(&bytes),
                Current::File { task, region, buffer } => fill(pipeline, task, region, buffer, &bytes).await?,
            },
            BackupEvent::EntryEnd => {
                if let Current::Label(label) = std::mem::replace(&mut current, Current::Ignored) {
                    received.backup_label = String::from_utf8(label).map_err(|_| {
                        Error::new(ErrorKind::Source, "source.label", "the server sent a backup_label that is not UTF-8")
                    })?;
                }
            }
            BackupEvent::End { lsn, timeline, checksum_failures } => {
                received.stop = lsn;
                received.stop_timeline = Some(timeline);
                received.checksum_failures = checksum_failures;
            }
            BackupEvent::Progress(_) | BackupEvent::ArchiveEnd | BackupEvent::Start { .. } | BackupEvent::Tablespaces(_) => {}
        }
    }
    if received.stop_timeline.is_none() || received.backup_label.is_empty() {
        return Err(Error::new(ErrorKind::Source, "source.incomplete", "the server ended the base backup early"));
    }
    Ok(received)
}

/// Cuts a file's bytes into regions.
async fn fill(pipeline: &Pipeline, task: &Arc<FileTask>, region: &mut u32, buffer: &mut Vec<u8>, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let wanted = task.region_len(*region);
        if wanted == 0 {
            return Err(Error::new(
                ErrorKind::Source,
                "source.protocol",
                format!("the server sent more of {} than it announced", task.path),
            ));
        }
        let (now, later) = bytes.split_at(bytes.len().min(wanted - buffer.len()));
        buffer.extend_from_slice(now);
        bytes = later;
        if buffer.len() == wanted {
            let next = task.region_len(*region + 1).min(REGION);
            pipeline.region(task, *region, std::mem::replace(buffer, Vec::with_capacity(next))).await?;
            *region += 1;
        }
    }
    Ok(())
}
