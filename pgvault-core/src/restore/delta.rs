//! Restoring over an existing directory: what is there already is kept where its content, not its age, is right (T27).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use crate::crypto::digest::DigestKey;
use crate::format::map::{Extent, FileMap};
use crate::format::{BLOCK, REGION_BLOCKS};
use crate::{Error, ErrorKind, Result};

/// Marks a directory that a restore has not finished.
pub(super) const UNFINISHED: &str = "pgvault.restore-unfinished";

/// Refuses directories that do not look like a data directory, or that a server is using.
pub(super) fn ensure_data_directory(path: &Path) -> Result<()> {
    let known = ["PG_VERSION", "global", UNFINISHED].iter().any(|name| path.join(name).exists());
    if !known {
        return Err(Error::new(
            ErrorKind::Usage,
            "restore.not_pgdata",
            format!("{} is not empty and does not look like a data directory", path.display()),
        )
        .with_hint(
            "choose an empty directory; --delta deletes what does not belong to the backup, so it only works on a data directory",
        ));
    }
    if path.join("postmaster.pid").exists() {
        return Err(Error::new(
            ErrorKind::Usage,
            "restore.server_running",
            format!("{} holds a postmaster.pid: a server may be running there", path.display()),
        )
        .with_hint("stop PostgreSQL first; if it crashed, remove postmaster.pid"));
    }
    Ok(())
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    File,
    Directory,
}

/// Removes everything below `directory` that is not in `wanted` (paths relative to it), and whatever else is in the place of
/// a wanted file or directory: links, and each of the two in the place of the other.
///
/// With `only_known` what lies beside the wanted folders at the top is left alone: the directory of a tablespace may be shared
/// with other versions and other clusters, or be a mistake of whoever typed it.
pub(super) fn remove_strangers(directory: &Path, wanted: &BTreeMap<String, Wanted>, only_known: bool) -> Result<()> {
    let walker = walkdir::WalkDir::new(directory).min_depth(1).contents_first(true).follow_links(false);
    for entry in walker {
        let entry = entry.map_err(|e| Error::new(ErrorKind::Failed, "io", format!("read {}: {e}", directory.display())))?;
        let relative = entry.path().strip_prefix(directory).ok().and_then(Path::to_str);
        let top = relative.and_then(|path| path.split('/').next()).unwrap_or_default();
        if top == "lost+found" || (only_known && !wanted.contains_key(top)) {
            continue;
        }
        let kind = entry.file_type();
        let found = if kind.is_dir() { Some(Wanted::Directory) } else { kind.is_file().then_some(Wanted::File) };
        if found.is_some() && found == relative.and_then(|path| wanted.get(path).copied()) {
            continue;
        }
        let removed = if kind.is_dir() { fs::remove_dir(entry.path()) } else { fs::remove_file(entry.path()) };
        removed.map_err(|e| Error::io("remove", entry.path(), e))?;
    }
    Ok(())
}

/// Gives an existing file its length and mode.
pub(super) fn prepare(path: &Path, len: u64, mode: u32) -> Result<()> {
    let failed = |e: io::Error| Error::io("prepare", path, e);
    let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
    file.set_len(len).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)
}

/// Puts zeroes where they belong into the part of a prepared file of `len` bytes that `map` covers from `first` on; returns
/// the extents that must be written, with the block each begins at: the map's own, where something differs.
pub(super) fn differing(path: &Path, len: u64, first: u64, map: &FileMap, digest: &DigestKey) -> Result<Vec<(u64, Extent)>> {
    let failed = |e: io::Error| Error::io("prepare", path, e);
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let mut digests = map.digests.iter();
    let mut differing = Vec::new();
    let mut buffer = vec![0; BLOCK * REGION_BLOCKS];
    let mut block = first;
    for extent in &map.extents {
        let first = block;
        block += u64::from(extent.blocks());
        match extent {
            Extent::Zero { .. } => {
                zero(&file, first * BLOCK as u64, (block * BLOCK as u64).min(len), &mut buffer).map_err(failed)?;
            }
            Extent::Stored { blocks, .. } => {
                let bytes = *blocks as usize * BLOCK;
                let Some(buffer) = buffer.get_mut(..bytes) else { continue };
                buffer.fill(0);
                read_up_to(&file, buffer, first * BLOCK as u64).map_err(failed)?;
                // Every digest is taken, so that the next extent compares with its own.
                let differ = buffer.chunks(BLOCK).filter(|b| digests.next() != Some(&digest.block(b))).count();
                if differ > 0 {
                    differing.push((first, *extent));
                }
            }
        }
    }
    Ok(differing)
}

/// Writes zeroes where something else is, leaving holes alone.
fn zero(file: &File, from: u64, to: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let len = usize::try_from(to - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        let Some(piece) = buffer.get_mut(..len) else { break };
        piece.fill(0);
        read_up_to(file, piece, at)?;
        if piece.iter().any(|b| *b != 0) {
            piece.fill(0);
            file.write_all_at(piece, at)?;
        }
        at += len as u64;
    }
    Ok(())
}

fn read_up_to(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset)? {
            0 => break,
            n => {
                buffer = buffer.get_mut(n..).unwrap_or_default();
                offset += n as u64;
            }
        }
    }
    Ok(())
}
