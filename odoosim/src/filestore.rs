//! The directory of one database's attachments: `<data_dir>/filestore/<dbname>`, and what Odoo does in it.
//!
//! Each function here is what one or two system calls do; the order in which they happen, with others in between, is in
//! [`Worker`](crate::Worker) and [`gc`](crate::gc). Nothing is ever synced to the disk. Whatever changes a file of content looks at it
//! afterwards and takes down in the [`Ledger`] whether it is whole.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use pgvault_core::{Error, Result};
use walkdir::WalkDir;

use crate::content::{Content, sha1_hex};
use crate::ledger::Ledger;
use crate::series::Series;

/// What the 20 series writes to before it renames.
pub const WRITE_SUFFIX: &str = ".__new";
/// What the garbage collection of the 20 series renames to before it unlinks.
pub const GC_SUFFIX: &str = ".__gc";

/// What is there under the name of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// The content itself.
    Same,
    /// Something else: a part that a killed writer left, or one that is being written.
    Other,
}

/// How [`Filestore::damage`] spoils a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Removes it.
    Remove,
    /// Halves it.
    Truncate,
    /// Changes a bit and keeps the size.
    Flip,
}

/// An entry of the checklist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// What it names: the last two parts of its path.
    pub store_fname: String,
    /// Where it lies.
    pub path: PathBuf,
    /// When it was made or, in the 20 series, touched.
    pub touched: SystemTime,
}

/// See the [module documentation](self).
#[derive(Debug, Clone)]
pub struct Filestore {
    root: PathBuf,
    series: Series,
    ledger: Ledger,
}

/// `Ok(None)` for what is not there.
fn found<T>(result: io::Result<T>, doing: &str, path: &Path) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(doing, path, error)),
    }
}

pub(crate) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Filestore {
    /// The filestore in this directory, which appears with the first file.
    pub fn new(root: PathBuf, series: Series, ledger: Ledger) -> Self {
        Self { root, series, ledger }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the file of a `store_fname` lies.
    pub fn path(&self, store_fname: &str) -> PathBuf {
        self.root.join(self.series.path_of(store_fname))
    }

    /// Where the mark of a `store_fname` lies.
    pub fn mark_path(&self, store_fname: &str) -> PathBuf {
        self.root.join("checklist").join(self.series.path_of(store_fname))
    }

    /// Compares what is there with a content, as Odoo does before it writes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn look(&self, store_fname: &str, content: &Content) -> Result<Found> {
        let path = self.path(store_fname);
        Ok(match found(fs::read(&path), "read", &path)? {
            None => Found::Absent,
            Some(bytes) if bytes == content.bytes() => Found::Same,
            Some(_) => Found::Other,
        })
    }

    /// Takes down whether the file is whole.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn observe(&self, store_fname: &str) -> Result<()> {
        let path = self.path(store_fname);
        let sha1 = found(fs::read(&path), "read", &path)?.map(|bytes| sha1_hex(&bytes));
        self.ledger.observe(store_fname, sha1.as_deref());
        Ok(())
    }

    /// Opens a file for writing, empty, and makes its folder.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn create(&self, path: &Path) -> Result<File> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| Error::io("create", folder, error))?;
        }
        File::create(path).map_err(|error| Error::io("create", path, error))
    }

    /// Writes on.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> Result<()> {
        file.write_all(bytes).map_err(|error| Error::io("write", path, error))
    }

    /// Gives a written file its name, read-only, as the 20 series does.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn publish(&self, written: &Path, store_fname: &str) -> Result<()> {
        fs::set_permissions(written, Permissions::from_mode(0o444))
            .map_err(|error| Error::io("set the permissions of", written, error))?;
        let path = self.path(store_fname);
        fs::rename(written, &path).map_err(|error| Error::io("rename to", &path, error))?;
        self.observe(store_fname)
    }

    /// Puts a name on the checklist. Until 19 a mark that is there stays as it is; the 20 series gives it the time.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn mark(&self, store_fname: &str, now: Timestamp) -> Result<()> {
        let path = self.mark_path(store_fname);
        if self.series.locks_for_gc() && path.exists() {
            return Ok(());
        }
        let file = self.create(&path)?;
        file.set_modified(now.into()).map_err(|error| Error::io("set the time of", &path, error))
    }

    /// All marks, by folder and name: of a deeper path the last two parts count. A folder that vanishes meanwhile has none.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn marks(&self) -> Result<Vec<Mark>> {
        let root = self.root.join("checklist");
        let mut marks = Vec::new();
        for entry in WalkDir::new(&root).sort_by_file_name() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) => continue,
                Err(error) => return Err(Error::io("list", &root, error.into())),
            };
            if entry.file_type().is_dir() {
                continue;
            }
            let path = entry.into_path();
            let name = |path: Option<&Path>| path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
            let store_fname = format!("{}/{}", name(path.parent()), name(Some(&path)));
            let Some(meta) = found(fs::metadata(&path), "read", &path)? else { continue };
            let touched = meta.modified().map_err(|error| Error::io("read the time of", &path, error))?;
            marks.push(Mark { store_fname, path, touched });
        }
        Ok(marks)
    }

    /// Unlinks a file of content; false when there was none.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn unlink(&self, store_fname: &str) -> Result<bool> {
        let path = self.path(store_fname);
        let removed = found(fs::remove_file(&path), "unlink", &path)?.is_some();
        self.observe(store_fname)?;
        Ok(removed)
    }

    /// Puts a file there behind Odoo's back, under any name, without a mark: what an import or an older series left.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn plant(&self, store_fname: &str, content: &Content) -> Result<()> {
        let path = self.path(store_fname);
        let mut file = self.create(&path)?;
        self.append(&mut file, &path, content.bytes())?;
        self.ledger.expect(store_fname, content.sha1());
        self.observe(store_fname)
    }

    /// Spoils a file behind Odoo's back.
    ///
    /// # Errors
    /// When there is none, or it cannot be changed.
    pub fn damage(&self, store_fname: &str, how: Damage) -> Result<()> {
        let path = self.path(store_fname);
        let change = || -> io::Result<()> {
            if how == Damage::Remove {
                return fs::remove_file(&path);
            }
            let mut bytes = fs::read(&path)?;
            if how == Damage::Truncate {
                bytes.truncate(bytes.len() / 2);
            } else if let Some(byte) = bytes.first_mut() {
                *byte ^= 1;
            }
            // Files of the 20 series are read-only.
            fs::remove_file(&path)?;
            fs::write(&path, bytes)
        };
        change().map_err(|error| Error::io("damage", &path, error))?;
        self.observe(store_fname)
    }

    /// Takes down every file that is there.
    ///
    /// # Errors
    /// When a folder or file cannot be read.
    pub(crate) fn observe_all(&self) -> Result<()> {
        let checklist = self.root.join("checklist");
        for entry in WalkDir::new(&self.root).into_iter().filter_entry(|entry| entry.path() != checklist) {
            let Ok(entry) = entry else { continue };
            if let (true, Ok(below)) = (entry.file_type().is_file(), entry.path().strip_prefix(&self.root)) {
                self.observe(&below.to_string_lossy())?;
            }
        }
        Ok(())
    }

    /// Removes everything, as the manager does with a dropped database, and takes that down.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn remove(&self) -> Result<()> {
        let _ = found(fs::remove_dir_all(&self.root), "remove", &self.root)?;
        self.ledger.names().iter().try_for_each(|name| self.observe(name))
    }
}
