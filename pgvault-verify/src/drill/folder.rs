//! The folder of a drill: everything a drill writes lies below it, and it goes with the drill.
//!
//! ```text
//! pgvault-drill-<ulid>/   lock       held by the drill as long as it lives
//!                         data/      the data directory
//!                         ts/<oid>/  its tablespaces
//!                         wal/       WAL on its way to the server
//! ```
//!
//! A drill that was killed leaves its folder, and perhaps a running server. The next one finds both by the lock that nobody holds, ends
//! the server and removes the folder. It never touches a folder whose lock is held, nor a process that does not run on such a folder.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgvault_core::{Error, ErrorKind, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use ulid::Ulid;

/// Names of folders begin with this.
const PREFIX: &str = "pgvault-drill-";

/// How long a server that was left behind may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// The folder of a living drill; removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
    removed: bool,
}

impl Folder {
    /// Makes the folder of a drill in `base`. Others may pass through it, to their own files, and see nothing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn create(base: &Path, drill: Ulid) -> Result<Self> {
        let path = base.join(format!("{PREFIX}{}", drill.to_string().to_lowercase()));
        DirBuilder::new().mode(0o711).create(&path).map_err(|e| {
            Error::io("create", &path, e)
                .with_hint("name a folder with room for a copy of the database: --folder, or `drill.folder`")
        })?;
        let lock = path.join("lock");
        let locked = File::create(&lock).and_then(|file| {
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(file)
        });
        match locked {
            Ok(file) => Ok(Self { path, _lock: file, removed: false }),
            Err(e) => {
                let _ = fs::remove_dir_all(&path);
                Err(Error::io("lock", &lock, e))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The data directory.
    pub(crate) fn pgdata(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Where a tablespace goes.
    pub(crate) fn tablespace(&self, oid: u32) -> PathBuf {
        self.path.join("ts").join(oid.to_string())
    }

    /// Removes it with everything in it.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.removed = true;
        fs::remove_dir_all(&self.path).map_err(|e| Error::io("remove", &self.path, e))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(folder = %self.path.display(), %error, "the copy of a drill could not be removed");
        }
    }
}

/// Free bytes where `path` is.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::io("ask for the free space of", path, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Ends and removes what drills that were killed left in `base`; gives the folders that are gone.
///
/// # Errors
/// When a folder of this user's cannot be removed.
pub(crate) fn sweep(base: &Path) -> Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    let Ok(entries) = fs::read_dir(base) else { return Ok(swept) };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_drill = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .is_some_and(|id| Ulid::from_string(&id.to_uppercase()).is_ok());
        // Of another user's folder, in a directory that is everybody's, nothing is known.
        let is_ours =
            fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw());
        if !is_drill || !is_ours {
            continue;
        }
        match File::open(path.join("lock")) {
            Ok(lock) if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() => continue,
            // Held until the folder is gone, against another sweep.
            Ok(_lock) => {
                end_server(&path)?;
                fs::remove_dir_all(&path).map_err(|e| Error::io("remove", &path, e))?;
            }
            // Between the folder and its lock a drill takes microseconds.
            Err(_) if is_young(&path) => continue,
            Err(_) => fs::remove_dir_all(&path).map_err(|e| Error::io("remove", &path, e))?,
        }
        tracing::warn!(folder = %path.display(), "removed what a drill that was killed had left");
        swept.push(path);
    }
    Ok(swept)
}

fn is_young(path: &Path) -> bool {
    let changed = fs::metadata(path).and_then(|meta| meta.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < Duration::from_secs(60)))
}

/// Ends the server that runs on a folder's data directory, if one does.
fn end_server(folder: &Path) -> Result<()> {
    let pgdata = folder.join("data");
    let pid = fs::read_to_string(pgdata.join("postmaster.pid")).ok().and_then(|text| text.lines().next()?.trim().parse().ok());
    let Some(pid) = pid.and_then(Pid::from_raw) else { return Ok(()) };
    // The number may be another process's by now: the one that is meant names the folder on its command line.
    let runs_here = || {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == pgdata.as_os_str().as_encoded_bytes())
    };
    let end = Instant::now() + PATIENCE;
    for signal in [Signal::QUIT, Signal::KILL] {
        if !runs_here() {
            return Ok(());
        }
        let _ = kill_process(pid, signal);
        let wait = if signal == Signal::QUIT { Instant::now() + PATIENCE / 2 } else { end };
        while runs_here() && Instant::now() < wait {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    if runs_here() {
        let why = format!("the server {} that a killed drill left on {} does not end", pid.as_raw_nonzero(), pgdata.display());
        return Err(Error::new(ErrorKind::Failed, "drill.leftover", why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_drill_left_goes_and_what_a_living_one_has_stays() {
        let base = tempfile::tempdir().unwrap();
        let living = Folder::create(base.path(), Ulid(1)).unwrap();
        let dead = base.path().join(format!("{PREFIX}{}", Ulid(2).to_string().to_lowercase()));
        fs::create_dir_all(dead.join("data/base")).unwrap();
        fs::write(dead.join("lock"), "").unwrap();
        // The number of a process that has nothing to do with it.
        fs::write(dead.join("data/postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        let other = base.path().join("pgvault-drill-notes");
        fs::create_dir(&other).unwrap();
        assert_eq!(sweep(base.path()).unwrap(), [dead.as_path()]);
        assert!(!dead.exists() && other.exists() && living.path().exists());
        let path = living.path().to_path_buf();
        living.remove().unwrap();
        assert!(!path.exists());
        assert_eq!(sweep(&base.path().join("missing")).unwrap(), Vec::<PathBuf>::new());
    }
}
