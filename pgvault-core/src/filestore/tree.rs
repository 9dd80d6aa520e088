//! The directory of a filestore: all of it, or the checklist.
//!
//! Odoo marks every file that it writes, and every one that nothing refers to any more, by an empty file below `checklist/`. Its garbage
//! collector empties that, so between two of its runs the checklist is a list of what is new. Whether it ran is shown by a **tripwire**:
//! a mark of a name that no attachment has, which only the collector removes. It tries to unlink the file of that name, logs that it
//! could not, and goes on. A tripwire has a name of its own, which the pass that it was set for has written down: so another program, later, can
//! tell that nothing was collected since that pass.
//!
//! pgvault makes no directory in a filestore: one that belongs to another account would keep Odoo from writing into it.

use std::fs::{self, File};
use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ulid::Ulid;

use super::contents::Root;
use super::names::{CHECKLIST, is_content};
use crate::{Error, ErrorKind, Result};

/// How the name of a mark begins that no attachment has. What follows says who set it.
const TRIPWIRE: &str = "pgvault-tripwire-";

/// Depth below which no file is looked for; Odoo uses two levels.
const DEEPEST: usize = 16;

/// The directory of one filestore.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    root: Arc<Root>,
}

/// A file of content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its path below the filestore.
    pub(crate) name: String,
    /// Bytes.
    pub(crate) size: u64,
}

/// Whether a tripwire was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Armed {
    Set,
    /// There is no checklist yet.
    Nowhere,
    /// This account may not.
    Refused,
}

/// Something at the top of a filestore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Top {
    Folder(String),
    File(String),
}

impl Tree {
    /// Opens a filestore.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when it is not there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let root = Root::open(path).map_err(|error| {
            Error::new(ErrorKind::Source, "filestore.none", format!("the filestore cannot be read: {error}"))
                .with_hint("is its volume mounted? otherwise check data_dir of odoo.conf, or [cluster.NAME.odoo]")
                .with_source(error)
        })?;
        Ok(Self { root: Arc::new(root) })
    }

    pub(crate) fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// Makes sure that the directory is still the one that was opened.
    pub(crate) fn ensure_same(&self) -> Result<()> {
        let now = Self::open(self.root.path())?;
        if now.root.identity()? == self.root.identity()? {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Source,
            "filestore.replaced",
            format!("{} was replaced, mounted or unmounted while it was read", self.root.path().display()),
        )
        .with_hint("the pass was not recorded; the next one begins anew"))
    }

    /// What lies at the top and may have content, in the order in which the names of its files sort.
    pub(crate) fn tops(&self) -> Result<Vec<Top>> {
        let mut tops = Vec::new();
        for (name, is_folder) in list(self.root.path())? {
            if is_folder && is_content(&format!("{name}/")) {
                tops.push(Top::Folder(name));
            } else if !is_folder && is_content(&name) {
                tops.push(Top::File(name));
            }
        }
        Ok(tops)
    }

    /// The files of content at or below something at the top, sorted.
    pub(crate) fn files(&self, top: &Top) -> Result<Vec<Found>> {
        let root = self.root.path();
        let mut files = Vec::new();
        let mut add = |name: String| {
            if !is_content(&name) {
                return Ok(());
            }
            let path = root.join(&name);
            match fs::symlink_metadata(&path) {
                Ok(meta) => files.push(Found { name, size: meta.len() }),
                Err(error) if error.kind() == Io::NotFound => {}
                Err(error) => return Err(Error::io("look at", &path, error)),
            }
            Ok(())
        };
        match top {
            Top::File(name) => add(name.clone())?,
            Top::Folder(folder) => walk(root, folder, 1, &mut add)?,
        }
        Ok(files)
    }

    /// The names that are marked, sorted.
    pub(crate) fn checklist(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let checklist = self.root.path().join(CHECKLIST);
        for (folder, is_folder) in list_if_exists(&checklist)? {
            if !is_folder {
                continue;
            }
            walk(&checklist, &folder, 1, &mut |name| {
                if is_content(&name) && !is_tripwire(&name) {
                    names.push(name);
                }
                Ok(())
            })?;
        }
        Ok(names)
    }

    /// Sets a tripwire in place of any other.
    pub(crate) fn arm(&self, id: Ulid) -> Armed {
        self.disarm();
        let checklist = self.root.path().join(CHECKLIST);
        let Ok(folders) = list_if_exists(&checklist) else { return Armed::Refused };
        let Some((folder, _)) = folders.into_iter().find(|(_, is_folder)| *is_folder) else { return Armed::Nowhere };
        match File::create(checklist.join(folder).join(format!("{TRIPWIRE}{id}"))) {
            Ok(_) => Armed::Set,
            Err(_) => Armed::Refused,
        }
    }

    /// True while this tripwire is where it was set.
    pub(crate) fn is_armed(&self, id: Ulid) -> bool {
        let name = format!("{TRIPWIRE}{id}");
        self.folders_of_marks().iter().any(|folder| folder.join(&name).exists())
    }

    /// Removes every tripwire: who uses another way to notice the collector leaves nothing behind.
    pub(crate) fn disarm(&self) {
        for folder in self.folders_of_marks() {
            for (name, _) in list(&folder).unwrap_or_default() {
                if name.starts_with(TRIPWIRE) {
                    let _ = fs::remove_file(folder.join(name));
                }
            }
        }
    }

    fn folders_of_marks(&self) -> Vec<PathBuf> {
        let checklist = self.root.path().join(CHECKLIST);
        let listed = list_if_exists(&checklist).unwrap_or_default();
        listed.into_iter().filter(|(_, is_folder)| *is_folder).map(|(folder, _)| checklist.join(folder)).collect()
    }
}

fn is_tripwire(name: &str) -> bool {
    name.rsplit('/').next().is_some_and(|last| last.starts_with(TRIPWIRE))
}

fn list_if_exists(path: &Path) -> Result<Vec<(String, bool)>> {
    if path.is_dir() { list(path) } else { Ok(Vec::new()) }
}

/// What is in a folder, sorted as whole paths sort: a folder as if its name ended with a slash. What is neither file nor folder is left
/// out, and so are names that are not UTF-8: `ir_attachment.store_fname` is text.
fn list(path: &Path) -> Result<Vec<(String, bool)>> {
    let failed = |e| Error::io("list", path, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = match entry.file_type() {
            Ok(kind) => kind,
            Err(error) if error.kind() == Io::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        if let Ok(name) = entry.file_name().into_string()
            && (kind.is_dir() || kind.is_file())
        {
            found.push((name, kind.is_dir()));
        }
    }
    found.sort_by(|(a, a_folder), (b, b_folder)| {
        let end = |is_folder: bool| if is_folder { "/" } else { "" };
        a.bytes().chain(end(*a_folder).bytes()).cmp(b.bytes().chain(end(*b_folder).bytes()))
    });
    Ok(found)
}

fn walk(root: &Path, folder: &str, depth: usize, visit: &mut dyn FnMut(String) -> Result<()>) -> Result<()> {
    let listed = match list(&root.join(folder)) {
        // Removed since it was listed.
        Err(_) if depth > 1 && !root.join(folder).exists() => return Ok(()),
        listed => listed?,
    };
    for (name, is_folder) in listed {
        let path = format!("{folder}/{name}");
        if !is_folder {
            visit(path)?;
        } else if depth < DEEPEST {
            walk(root, &path, depth + 1, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }

    #[test]
    fn files_are_listed_as_their_names_sort() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["ab/1", "ab/2", "ab-", "ab-/x", "ab0", "a", "checklist/ab/1", "b/c/d/e", "ab/3.__new", ".hidden/x", "ab/é"] {
            let path = folder.path().join(name);
            if !path.exists() && name != "ab-" {
                touch(&path);
            }
        }
        let tree = Tree::open(folder.path()).unwrap();
        let names: Vec<String> =
            tree.tops().unwrap().iter().flat_map(|top| tree.files(top).unwrap()).map(|file| file.name).collect();
        assert_eq!(names, ["a", "ab-/x", "ab/1", "ab/2", "ab/é", "ab0", "b/c/d/e"]);
        assert!(names.is_sorted());
        assert_eq!(tree.checklist().unwrap(), ["ab/1"]);
    }

    /// A9: a directory that is not there is an error of the source.
    #[test]
    fn a9_a_missing_directory_is_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tree::open(&folder.path().join("unmounted")).unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Source, "filestore.none"));
    }

    #[test]
    fn the_tripwire_makes_no_folder_and_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let tree = Tree::open(folder.path()).unwrap();
        let (id, other) = (Ulid(7), Ulid(8));
        assert_eq!((tree.arm(id), tree.is_armed(id)), (Armed::Nowhere, false));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        touch(&folder.path().join("checklist/ab/1"));
        assert_eq!((tree.arm(id), tree.is_armed(id), tree.is_armed(other)), (Armed::Set, true, false));
        assert_eq!(tree.checklist().unwrap(), ["ab/1"], "the tripwire is no mark");
        assert_eq!((tree.arm(other), tree.is_armed(other), tree.is_armed(id)), (Armed::Set, true, false), "one at a time");
        tree.disarm();
        assert!(!tree.is_armed(other));
    }

    #[test]
    fn another_directory_at_the_same_path_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("filestore");
        fs::create_dir(&path).unwrap();
        let tree = Tree::open(&path).unwrap();
        tree.ensure_same().unwrap();
        fs::rename(&path, folder.path().join("old")).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(tree.ensure_same().unwrap_err().code(), "filestore.replaced");
    }
}
