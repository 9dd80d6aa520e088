//! A file below a root, and nothing else: no link leads out of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::{Error, Result};

/// An open directory whose files are read.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

impl Root {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::io("open", path, e.into()))?;
        Ok(Self { directory, path: path.to_path_buf() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode: another directory at the same path has others.
    pub(crate) fn identity(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.directory).map_err(|e| Error::io("look at", &self.path, e.into()))?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Opens a regular file. `Ok(None)` when there is none.
    pub(crate) fn file(&self, name: &str) -> io::Result<Option<File>> {
        // Without NONBLOCK a pipe would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = match rustix::fs::openat2(&self.directory, name, flags, Mode::empty(), resolve) {
            // Before Linux 5.6, and in containers whose filter does not know it.
            Err(Errno::NOSYS | Errno::PERM | Errno::INVAL) => self.step_by_step(name, flags),
            opened => opened,
        };
        let file = match opened {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if file.metadata()?.is_file() { Ok(Some(file)) } else { Err(io::Error::other("is no regular file")) }
    }

    fn step_by_step(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (folders, last) = name.rsplit_once('/').map_or((None, name), |(folders, last)| (Some(folders), last));
        let mut inner: Option<OwnedFd> = None;
        for folder in folders.into_iter().flat_map(|folders| folders.split('/')) {
            if matches!(folder, "" | "." | "..") {
                return Err(Errno::NOENT);
            }
            let at = inner.as_ref().map_or_else(|| self.directory.as_fd(), AsFd::as_fd);
            let next = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            inner = Some(rustix::fs::openat(at, folder, next, Mode::empty())?);
        }
        let at = inner.as_ref().map_or_else(|| self.directory.as_fd(), AsFd::as_fd);
        rustix::fs::openat(at, last, flags, Mode::empty())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_outside_of_the_root_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("filestore");
        fs::create_dir_all(inside.join("ab")).unwrap();
        fs::write(inside.join("ab/file"), "content").unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        symlink("../../secret", inside.join("ab/link")).unwrap();
        symlink(folder.path(), inside.join("out")).unwrap();
        let root = Root::open(&inside).unwrap();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        for by_steps in [false, true] {
            let open = |name: &str| {
                if by_steps { root.step_by_step(name, flags).ok().map(File::from) } else { root.file(name).ok().flatten() }
            };
            let mut text = String::new();
            let _ = open("ab/file").unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "content");
            for outside in ["../secret", "ab/../../secret", "ab/link", "out/secret", "ab/missing", "missing/x"] {
                assert!(open(outside).is_none(), "{outside} by steps: {by_steps}");
            }
        }
        // A folder is no file.
        assert!(root.file("ab").is_err());
    }
}
