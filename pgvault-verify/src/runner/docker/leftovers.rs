//! Containers that a drill left behind because it died.
//!
//! Every container carries what its drill is known by, in labels: its machine's boot, its process with the time that it was started at, the
//! process numbers it was counted in, and a folder with a lock that it holds as long as it lives. Whoever prepares a drill removes the
//! containers whose drill is dead:
//!
//! - of an earlier boot: dead;
//! - with a lock that somebody holds: alive, and with one that nobody holds: dead. The kernel gives a lock back however its holder ends, and
//!   it works between containers of one machine, where process numbers mean nothing;
//! - without its lock, which goes with the folder: dead when no such process is here;
//! - with the numbers of another container, or a lock that this user must not see, nothing is known, and it stays with a warning.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bollard::models::ContainerSummary;
use bollard::query_parameters::ListContainersOptionsBuilder;
use pgvault_core::{Error, Result};
use rustix::fs::{FlockOperation, flock};

use super::client::{Engine, is_between};
use super::container::{self, BETWEEN, POLL};
use super::text;

/// The label that says that a container is a drill's; its value is the drill's name.
pub(super) const LABEL: &str = "io.pgvault.drill";
const BOOT: &str = "io.pgvault.drill.boot";
const PROCESS: &str = "io.pgvault.drill.process";
const NUMBERS: &str = "io.pgvault.drill.pid-namespace";
const FOLDER: &str = "io.pgvault.drill.folder";

/// In the drill's folder, held by the living drill.
const LOCK: &str = "lock";

/// Held until it is dropped or its process ends.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "closing the file gives the lock back")] fs::File);

impl Lock {
    /// Nobody else can have it: the folder is new.
    pub(super) fn taken(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        let file = fs::File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| Error::io("lock", &path, e.into()))?;
        Ok(Self(file))
    }
}

/// What a container is marked with.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    /// A name for it that no other has.
    pub(super) container: String,
    pub(super) labels: HashMap<String, String>,
}

impl Mark {
    /// That of a drill of this process; `folder` has its lock.
    pub(super) fn of_this_process(drill: &str, folder: Option<&Path>) -> Result<Self> {
        let here = Here::seen().map_err(|e| Error::io("read who this process is in", Path::new("/proc"), e))?;
        let process = format!("{} {}", here.pid, started_at(here.pid).unwrap_or_default());
        let mut labels = HashMap::from([
            (LABEL.to_owned(), drill.to_owned()),
            (BOOT.to_owned(), here.boot),
            (PROCESS.to_owned(), process),
            (NUMBERS.to_owned(), here.numbers),
        ]);
        if let Some(folder) = folder {
            let _ = labels.insert(FOLDER.to_owned(), text(folder)?);
        }
        let unique = folder
            .and_then(Path::file_name)
            .map_or_else(|| format!("pgvault-{}", here.pid), |name| name.to_string_lossy().into_owned());
        Ok(Self { container: unique, labels })
    }
}

/// What this process can know about others.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Here {
    boot: String,
    /// The namespace that process numbers are counted in.
    numbers: String,
    pid: u32,
}

impl Here {
    fn seen() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let numbers = fs::read_link("/proc/self/ns/pid")?.to_string_lossy().into_owned();
        Ok(Self { boot, numbers, pid: std::process::id() })
    }
}

/// When a process was started, in ticks since the machine's start: with the number it is a process's alone.
fn started_at(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before is in parentheses and may contain anything. A zombie has ended, whoever has not asked for its status yet.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// What is known about the drill of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drill {
    Alive,
    Dead,
    Unknown,
}

fn judge(labels: &HashMap<String, String>, here: &Here) -> Drill {
    match labels.get(BOOT) {
        // Not ours, or of a pgvault that marks otherwise.
        None => return Drill::Unknown,
        Some(boot) if *boot != here.boot => return Drill::Dead,
        Some(_) => {}
    }
    match labels.get(FOLDER).map(|folder| fs::File::open(Path::new(folder).join(LOCK))) {
        // Shared: two that ask at the same moment do not take each other for the drill.
        Some(Ok(file)) => {
            return match flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => Drill::Dead,
                Err(rustix::io::Errno::WOULDBLOCK) => Drill::Alive,
                Err(_) => Drill::Unknown,
            };
        }
        // Somebody else's, whose processes may be hidden as well.
        Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Drill::Unknown,
        Some(Err(_)) | None => {}
    }
    if labels.get(NUMBERS) != Some(&here.numbers) {
        return Drill::Unknown;
    }
    let process = labels.get(PROCESS).and_then(|process| process.split_once(' '));
    let Some((Ok(pid), Ok(started))) = process.map(|(pid, started)| (pid.parse::<u32>(), started.parse::<u64>())) else {
        return Drill::Unknown;
    };
    if started_at(pid) == Some(started) { Drill::Alive } else { Drill::Dead }
}

/// Removes the containers of dead drills.
///
/// # Errors
/// When the service fails. A container that cannot be removed is no reason not to drill; it is told.
pub(super) async fn sweep(engine: &Engine) -> Result<()> {
    let found = marked(engine).await?;
    let here = Here::seen().map_err(|e| Error::io("read who this process is in", Path::new("/proc"), e))?;
    for container in found {
        let (Some(id), Some(labels)) = (container.id, container.labels) else { continue };
        let drill = labels.get(LABEL).map_or("", String::as_str);
        match judge(&labels, &here) {
            Drill::Alive => {}
            Drill::Unknown => tracing::warn!(
                container = %id, drill,
                "a container of a drill is there whose pgvault cannot be seen from here, because it is another user's or in a container itself: \
                 remove it with `docker rm -f` when that has died"
            ),
            Drill::Dead => match container::remove(engine, &id).await {
                Ok(()) => {
                    remove_folder(&labels);
                    tracing::warn!(container = %id, drill, "removed the container that a dead drill left behind");
                }
                Err(error) => tracing::warn!(container = %id, drill, %error, "a container of a dead drill cannot be removed"),
            },
        }
    }
    Ok(())
}

/// Every container that is marked.
async fn marked(engine: &Engine) -> Result<Vec<ContainerSummary>> {
    let list = async |status: Option<&'static str>| {
        let mut filters = HashMap::from([("label", vec![LABEL])]);
        if let Some(status) = status {
            let _ = filters.insert("status", vec![status]);
        }
        engine.docker.list_containers(Some(ListContainersOptionsBuilder::new().all(true).filters(&filters).build())).await
    };
    for _ in 0..BETWEEN {
        match list(None).await {
            Ok(found) => return Ok(found),
            Err(error) if is_between(&error) => tokio::time::sleep(POLL).await,
            Err(error) => return Err(engine.error("list containers of drills", error)),
        }
    }
    tracing::warn!(service = %engine, "a container of a drill is `stopped` for long; remove it with `podman rm -f`");
    let mut found = Vec::new();
    for status in ["created", "running", "paused", "exited"] {
        found.extend(list(Some(status)).await.map_err(|e| engine.error("list containers of drills", e))?);
    }
    Ok(found)
}

/// A folder in the site's goes with the site's. One below `/tmp` is nobody's now.
fn remove_folder(labels: &HashMap<String, String>) {
    let Some(folder) = labels.get(FOLDER).map(PathBuf::from) else { return };
    let is_ours = folder.parent() == Some(Path::new("/tmp"))
        && folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgvault-"))
        && folder.join(LOCK).is_file();
    if is_ours && let Err(error) = fs::remove_dir_all(&folder) {
        tracing::warn!(folder = %folder.display(), %error, "the folder of a dead drill cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(changes: &[(&str, &str)]) -> Drill {
        let mut labels = Mark::of_this_process("test", None).unwrap().labels;
        labels.extend(changes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        judge(&labels, &Here::seen().unwrap())
    }

    #[test]
    fn a_drill_is_known_by_its_process_its_boot_and_its_lock() {
        let pid = std::process::id();
        assert_eq!(judged(&[]), Drill::Alive);
        assert_eq!(judged(&[(BOOT, "an earlier one")]), Drill::Dead);
        assert_eq!(judged(&[(PROCESS, &format!("{pid} 1"))]), Drill::Dead, "a number that was given out again");
        assert_eq!(judged(&[(PROCESS, "0 1")]), Drill::Dead);
        assert_eq!(judged(&[(PROCESS, "nonsense")]), Drill::Unknown);
        assert_eq!(judged(&[(NUMBERS, "pid:[1]")]), Drill::Unknown);
        assert_eq!(judged(&[(NUMBERS, "pid:[1]"), (BOOT, "an earlier one")]), Drill::Dead);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let lock = Lock::taken(folder.path()).unwrap();
        assert_eq!(
            judged(&[(FOLDER, path), (NUMBERS, "pid:[1]"), (PROCESS, "0 1")]),
            Drill::Alive,
            "the lock counts, not the number"
        );
        drop(lock);
        assert_eq!(judged(&[(FOLDER, path)]), Drill::Dead, "a process goes on after a drill");
        fs::remove_file(folder.path().join(LOCK)).unwrap();
        assert_eq!(judged(&[(FOLDER, path)]), Drill::Alive);
    }
}
