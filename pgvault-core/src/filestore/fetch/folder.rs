//! The directory that a filestore is restored into.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha1::{Digest, Sha1};

use crate::filestore::names::CHECKLIST;
use crate::format::file_run::Content;
use crate::{Error, ErrorKind, Result};

/// There while the directory is not complete.
const UNFINISHED: &str = ".pgvault.restore-unfinished";

/// Permissions of directories: Odoo's group may have to read.
const FOLDER_MODE: u32 = 0o750;

/// A directory that is being filled.
#[derive(Debug)]
pub(super) struct Folder {
    writer: Arc<Writer>,
    /// With `delta`: what belongs there.
    expected: Option<HashSet<Box<str>>>,
}

/// Writes files, from any thread.
#[derive(Debug)]
pub(super) struct Writer {
    root: PathBuf,
    owner: Option<(u32, u32)>,
    folders: Mutex<HashSet<PathBuf>>,
}

impl Folder {
    /// Makes the directory, or makes sure that nothing in it gets lost.
    pub(super) fn prepare(root: &Path, owner: Option<(u32, u32)>, delta: bool) -> Result<Self> {
        let marker = root.join(UNFINISHED);
        let filled = match fs::read_dir(root) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(Error::io("list", root, error)),
        };
        if filled && !delta && !marker.exists() {
            return Err(Error::new(ErrorKind::Usage, "filestore.not_empty", format!("{} is not empty", root.display()))
                .with_hint("name a directory that is empty or not there, or use --delta to replace what differs"));
        }
        let owner = match owner {
            Some(owner) => Some(owner),
            None if rustix::process::geteuid().is_root() => owner_above(root)?,
            None => None,
        };
        let writer = Writer { root: root.to_path_buf(), owner, folders: Mutex::default() };
        writer.folder(root)?;
        let _ = File::create(&marker).map_err(|e| Error::io("create", &marker, e))?;
        Ok(Self { writer: Arc::new(writer), expected: filled.then(HashSet::new) })
    }

    /// Makes the directory, which must not be there: what is there, or comes at the same moment, is somebody else's.
    pub(super) fn create(root: &Path) -> Result<Self> {
        let owner = if rustix::process::geteuid().is_root() { owner_above(root)? } else { None };
        let writer = Writer { root: root.to_path_buf(), owner, folders: Mutex::default() };
        if let Some(above) = root.parent() {
            writer.folder(above)?;
        }
        writer.make(root).map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(ErrorKind::Usage, "filestore.not_empty", format!("{} is there already", root.display()))
                    .with_hint("name a directory that is not there yet")
            }
            _ => Error::io("create", root, e),
        })?;
        Self::prepare(root, owner, false).inspect_err(|_| {
            let _ = fs::remove_dir(root);
        })
    }

    pub(super) fn writer(&self) -> Arc<Writer> {
        self.writer.clone()
    }

    /// Notes that a file belongs here.
    pub(super) fn expect(&mut self, name: &str) {
        if let Some(expected) = &mut self.expected {
            let _ = expected.insert(name.into());
        }
    }

    /// True when a file is there already, with this content.
    pub(super) fn has(&self, name: &str, content: &Content) -> Result<bool> {
        if self.expected.is_none() {
            return Ok(false);
        }
        let path = self.writer.root.join(name);
        let Ok(meta) = fs::symlink_metadata(&path) else { return Ok(false) };
        if !meta.is_file() || meta.len() != content.size || meta.nlink() != 1 {
            return Ok(false);
        }
        let mut file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let (mut hash, mut buffer) = (Sha1::new(), vec![0; 64 << 10]);
        loop {
            match file.read(&mut buffer).map_err(|e| Error::io("read", &path, e))? {
                0 => break,
                read => hash.update(buffer.get(..read).unwrap_or(&[])),
            }
        }
        Ok(<[u8; 20]>::from(hash.finalize()) == content.sha1)
    }

    /// Removes what does not belong here, makes everything durable, and takes the mark away. Gives the number of files that went.
    pub(super) fn finish(self) -> Result<u64> {
        let root = &self.writer.root;
        let mut removed = 0;
        if let Some(expected) = &self.expected {
            for entry in walkdir::WalkDir::new(root).min_depth(1) {
                let entry = entry.map_err(|e| Error::new(ErrorKind::Failed, "io", format!("list {}: {e}", root.display())))?;
                let name = entry.path().strip_prefix(root).ok().and_then(Path::to_str);
                let belongs = name.is_some_and(|name| name == UNFINISHED || expected.contains(name));
                if !entry.file_type().is_dir() && !belongs {
                    fs::remove_file(entry.path()).map_err(|e| Error::io("remove", entry.path(), e))?;
                    removed += 1;
                }
            }
        }
        self.writer.folder(&root.join(CHECKLIST))?;
        let folder = File::open(root).map_err(|e| Error::io("open", root, e))?;
        rustix::fs::syncfs(&folder).map_err(|e| Error::io("make durable", root, e.into()))?;
        let marker = root.join(UNFINISHED);
        fs::remove_file(&marker).map_err(|e| Error::io("remove", &marker, e))?;
        Ok(removed)
    }
}

impl Writer {
    /// Makes a folder and those above it.
    fn folder(&self, path: &Path) -> Result<()> {
        if self.folders.lock().unwrap_or_else(PoisonError::into_inner).contains(path) {
            return Ok(());
        }
        if !path.is_dir() {
            if let Some(above) = path.parent() {
                self.folder(above)?;
            }
            match self.make(path) {
                Ok(()) => {}
                // Another thread was faster.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
                Err(error) => return Err(Error::io("create", path, error)),
            }
        }
        let _ = self.folders.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_path_buf());
        Ok(())
    }

    /// Makes a folder that is not there, and gives it to its owner.
    fn make(&self, path: &Path) -> std::io::Result<()> {
        fs::create_dir(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(FOLDER_MODE))?;
        match self.owner {
            Some((user, group)) => std::os::unix::fs::chown(path, Some(user), Some(group)),
            None => Ok(()),
        }
    }

    /// A new file.
    pub(super) fn create(&self, name: &str) -> Result<File> {
        let path = self.root.join(name);
        if let Some(above) = path.parent() {
            self.folder(above)?;
        }
        let new = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        match new() {
            // What is there is not what it should be; a link is not followed.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path).map_err(|e| Error::io("replace", &path, e))?;
                new()
            }
            file => file,
        }
        .map_err(|e| Error::io("create", &path, e))
    }

    /// Gives a written file its owner and permissions.
    pub(super) fn finish(&self, file: &File, name: &str, mode: u32) -> Result<()> {
        let failed = |e| Error::io("set owner and permissions of", &self.root.join(name), e);
        if let Some((user, group)) = self.owner {
            fchown(file, Some(user), Some(group)).map_err(failed)?;
        }
        // No more than reading and writing: a document is no program.
        file.set_permissions(fs::Permissions::from_mode(mode & 0o666)).map_err(failed)
    }

    /// Writes a file.
    pub(super) fn write(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|e| Error::io("write", &self.root.join(name), e))?;
        self.finish(&file, name, mode)
    }
}

/// Makes sure that a name leads to a path below the filestore.
pub(super) fn ensure_inside(name: &str) -> Result<()> {
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::new(ErrorKind::Corrupt, "filestore.name", format!("`{name}` leads out of the filestore")));
    }
    Ok(())
}

/// Who owns the nearest directory that is there.
fn owner_above(root: &Path) -> Result<Option<(u32, u32)>> {
    let root = std::path::absolute(root).map_err(|e| Error::io("resolve", root, e))?;
    Ok(root.ancestors().find_map(|path| fs::metadata(path).ok()).map(|meta| (meta.uid(), meta.gid())))
}
