//! Doing something once, whoever comes first: folders that are made by one process while others wait for it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// Written last: a folder without it is the rest of an interrupted run. It holds what was installed.
pub const COMPLETE: &str = ".complete";

/// Held by one process at a time, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "closing the file gives the lock back")] fs::File);

/// Waits until nobody else works on this folder, which need not exist; its parent is made.
pub fn lock(folder: &Path) -> Result<Lock> {
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else { bail!("{} has no parent", folder.display()) };
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let path = parent.join(format!(".{}.lock", name.to_string_lossy()));
    let file = fs::File::create(&path).with_context(|| format!("open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        println!("waiting for another process that installs {}", folder.display());
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(Lock(file))
}

/// Fills `folder` with `what`, unless it holds exactly that already. A folder with something else, or with half of it, is
/// removed first.
pub fn once(folder: &Path, what: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let complete = folder.join(COMPLETE);
    let is_complete = || fs::read_to_string(&complete).is_ok_and(|found| found.trim() == what);
    if is_complete() {
        return Ok(());
    }
    let _lock = lock(folder)?;
    if is_complete() {
        return Ok(());
    }
    fresh(folder)?;
    fill(folder)?;
    fs::write(&complete, what).with_context(|| format!("write {}", complete.display()))
}

/// An empty folder at `path`.
pub fn fresh(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_filled_once_and_again_after_an_interruption_or_for_another_version() {
        let place = std::env::temp_dir().join(format!("pgvault-once-{}", std::process::id()));
        fresh(&place).unwrap();
        let folder = place.join("thing");
        let filled = std::cell::Cell::new(0);
        let fill = |what: &str, works: bool| {
            once(&folder, what, |folder| {
                filled.set(filled.get() + 1);
                assert_eq!(fs::read_dir(folder)?.count(), 0, "nothing of an earlier attempt is left");
                fs::write(folder.join("half"), "")?;
                if works { Ok(()) } else { anyhow::bail!("interrupted") }
            })
        };
        assert!(fill("1", false).is_err());
        for (what, times) in [("1", 2), ("1", 2), ("2", 3), ("2", 3)] {
            fill(what, true).unwrap();
            assert_eq!(filled.get(), times, "{what}");
        }
        // Two at once: the second finds it done.
        fresh(&folder).unwrap();
        let count = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let _ = scope.spawn(|| {
                    once(&folder, "3", |_| {
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        let _ = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(count.into_inner(), 1);
        fs::remove_dir_all(&place).unwrap();
    }
}
