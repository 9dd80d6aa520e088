//! Reading a data directory on this machine, while the server runs.
//!
//! Names are collected first; a file that vanishes before it is opened was dropped, and its neighbours are copied all the
//! same (T8). A file is copied up to the length it had when it was opened; WAL brings the rest.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::exclude;
use super::file::unreadable;
use super::pipeline::Pipeline;
use crate::format::file_table::{FileEntry, Node};
use crate::postgres::ControlFile;
use crate::vault::snapshot::Tablespace;
use crate::{Error, ErrorKind, Result};

/// What a walk over the data directory found.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Directories and tablespace links.
    pub(super) entries: Vec<FileEntry>,
    /// Files: name in the backup, which is where it is below the data directory, and length at the time of the walk.
    pub(super) files: Vec<(String, u64)>,
    pub(super) tablespaces: Vec<Tablespace>,
    pub(super) warnings: Vec<String>,
}

impl Listing {
    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, len)| len).sum()
    }
}

const CONTROL: &str = "global/pg_control";

/// Walks the data directory and its tablespaces.
///
/// `version_directory` is the folder of this cluster's major and catalog version inside a tablespace: other versions may
/// share the location.
pub(super) fn list(pgdata: &Path, version_directory: &str) -> Result<Listing> {
    let mut listing = Listing::default();
    walk(pgdata, "", version_directory, &mut listing)?;
    listing.files.sort();
    Ok(listing)
}

fn walk(directory: &Path, relative: &str, version_directory: &str, listing: &mut Listing) -> Result<()> {
    // A directory may have a million files, so they go straight into the listing; those of unlogged relations leave it again.
    let begin = listing.files.len();
    let mut others: Vec<(String, String, fs::Metadata, PathBuf)> = Vec::new();
    let reading = match fs::read_dir(directory) {
        Ok(reading) => reading,
        // A dropped database.
        Err(e) if e.kind() == io::ErrorKind::NotFound && !relative.is_empty() => return Ok(()),
        Err(e) => return Err(unreadable("list", directory, e)),
    };
    for child in reading {
        let child = child.map_err(|e| unreadable("list", directory, e))?;
        let Some(name) = child.file_name().to_str().map(str::to_owned) else {
            listing.warnings.push(format!("{} is left out: its name is not UTF-8", child.path().display()));
            continue;
        };
        let path = if relative.is_empty() { name.clone() } else { format!("{relative}/{name}") };
        if exclude::is_excluded(&path) {
            continue;
        }
        match child.metadata() {
            Ok(metadata) if metadata.is_file() => {
                if path != CONTROL {
                    listing.files.push((path, metadata.len()));
                }
            }
            Ok(metadata) => others.push((path, name, metadata, child.path())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(unreadable("stat", &child.path(), e)),
        }
    }
    let unlogged = exclude::unlogged(listing.files.iter().skip(begin).map(|(path, _)| path.as_str()));
    if !unlogged.is_empty() {
        let files = listing.files.split_off(begin);
        listing.files.extend(files.into_iter().filter(|(path, _)| !exclude::is_unlogged_fork(path, &unlogged)));
    }
    for (path, name, metadata, place) in others {
        if metadata.is_symlink() {
            link(&path, &name, &place, relative, version_directory, listing)?;
        } else if metadata.is_dir() {
            push_directory(listing, &path, metadata.mode());
            if !exclude::is_emptied(&path) {
                walk(&place, &path, version_directory, listing)?;
            } else if path == "pg_wal" {
                push_directory(listing, "pg_wal/archive_status", 0o700);
            }
        }
    }
    Ok(())
}

fn push_directory(listing: &mut Listing, path: &str, mode: u32) {
    listing.entries.push(FileEntry { path: path.to_owned(), mode: mode & 0o7777, node: Node::Directory });
}

/// Tablespaces are followed, `pg_wal` is emptied, a link to a file is copied as the file, anything else is left out.
fn link(path: &str, name: &str, place: &Path, parent: &str, version_directory: &str, listing: &mut Listing) -> Result<()> {
    let target = match fs::read_link(place) {
        Ok(target) => target,
        // A tablespace that was dropped meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(unreadable("read the link", place, e)),
    };
    let followed = fs::metadata(place);
    if parent == "pg_tblspc" {
        let Ok(oid) = name.parse::<u32>() else { return Ok(()) };
        let Some(location) = target.to_str().map(str::to_owned) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "backup.tablespace",
                format!("the tablespace at {} has a path that is not UTF-8", target.display()),
            ));
        };
        listing.entries.push(FileEntry {
            path: path.to_owned(),
            mode: 0o777,
            node: Node::Tablespace { location: location.clone() },
        });
        listing.tablespaces.push(Tablespace { oid, location });
        let inner = place.join(version_directory);
        // A live tablespace always has this directory: one that cannot be seen from here must not be left out in silence.
        let metadata = fs::metadata(&inner).map_err(|e| unreadable("read the tablespace at", &inner, e))?;
        let inner_path = format!("{path}/{version_directory}");
        push_directory(listing, &inner_path, metadata.mode());
        return walk(&inner, &inner_path, version_directory, listing);
    }
    match followed {
        Ok(metadata) if metadata.is_dir() && exclude::is_emptied(path) => {
            push_directory(listing, path, metadata.mode());
            if path == "pg_wal" {
                push_directory(listing, "pg_wal/archive_status", 0o700);
            }
        }
        Ok(metadata) if metadata.is_file() => listing.files.push((path.to_owned(), metadata.len())),
        Ok(_) => listing.warnings.push(format!("{path} is left out: it is a link to {}", target.display())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            listing.warnings.push(format!("{path} is left out: it is a link to {}, which does not exist", target.display()));
        }
        Err(e) => return Err(unreadable("stat", place, e)),
    }
    Ok(())
}

/// Sends every file through the pipeline, `pg_control` last: on a standby it says how far the pages may already be.
pub(super) async fn copy(pipeline: &Pipeline, pgdata: &Path, listing: &Listing) -> Result<()> {
    for (path, _) in &listing.files {
        let place = &pgdata.join(path);
        let (file, metadata) = match fs::File::open(place).and_then(|file| file.metadata().map(|m| (file, m))) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(unreadable("open", place, e)),
        };
        let task = pipeline.file(path.clone(), metadata.mode() & 0o7777, metadata.len(), Some(file)).await?;
        pipeline.read(&task).await?;
    }
    // Only when every page was read does this say how far they may be.
    pipeline.drained().await?;
    let control = read_control(&pgdata.join(CONTROL)).await?;
    let task = pipeline.file(CONTROL.into(), 0o600, control.len() as u64, None).await?;
    pipeline.region(&task, 0, control).await
}

/// Reads `pg_control` until its checksum is right: the server rewrites it in place (T13).
pub(super) async fn read_control(path: &Path) -> Result<Vec<u8>> {
    let mut attempt = 0;
    loop {
        let bytes = fs::read(path).map_err(|e| unreadable("read", path, e))?;
        match ControlFile::parse(&bytes) {
            Ok(_) => return Ok(bytes),
            Err(error) if error.is_torn() && attempt < 20 => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => {
                return Err(Error::new(ErrorKind::Source, "source.control", format!("{}: {error}", path.display()))
                    .with_hint("is this the data directory of the server that the connection leads to?"));
            }
        }
    }
}
