//! WAL for a copy that has no network, no key and no configuration.
//!
//! ```text
//! PostgreSQL -> restore_command (a shell script) -> want/NAME
//!                                                      |  we see it, and fetch from the vault
//!               PostgreSQL <- script <- have/NAME  <---'  or none/NAME: the archive ends; fail/NAME: trouble
//! ```
//!
//! All of it happens in one folder that both sides see, so it works through a mount as well as in the same file system, and what runs
//! beside the copy needs nothing but a shell. Segments are fetched ahead, several at once. The answers are those of `wal fetch`:
//! "there is none" is only said when the vault proves it (see [`pgvault_core::wal::fetch`]), everything else stops the server.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgvault_core::postgres::{Lsn, SegmentName, SegmentSize, WalFileName, WalSegNo};
use pgvault_core::vault::Cluster;
use pgvault_core::wal::fetch;
use pgvault_core::{Error, ErrorKind, Result};
use tokio::task::{JoinHandle, JoinSet};

use crate::owner::{Owner, own};

/// How often it is looked for requests.
const POLL: Duration = Duration::from_millis(5);

/// Bytes of segments that are fetched ahead, at most.
const AHEAD: u64 = 256 << 20;

/// Segments that are fetched ahead, at most.
const AHEAD_SEGMENTS: u64 = 8;

/// What PostgreSQL runs. Exit code 1 is the end of the archive, anything above 125 stops the server.
const SCRIPT: &str = r#"#!/bin/sh
# Hands PostgreSQL one file of WAL ($1, to be written to $2). Asks by an empty file in `want`, waits for the answer.
d="${0%/*}"
if [ ! -f "$d/have/$1" ]; then
    : > "$d/want/$1" || exit 255
    while [ ! -f "$d/have/$1" ]; do
        if [ -f "$d/none/$1" ]; then rm -f "$d/none/$1"; exit 1; fi
        if [ -f "$d/fail/$1" ] || [ ! -f "$d/open" ]; then exit 255; fi
        sleep 0.02
    done
fi
cp "$d/have/$1" "$2" && rm -f "$d/have/$1" || exit 255
"#;

/// What was handed out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Served {
    /// Segments that PostgreSQL was given, each counted once.
    pub(crate) segments: BTreeSet<SegmentName>,
    /// Why a file could not be had.
    pub(crate) trouble: Option<String>,
}

/// Hands out WAL until it is dropped.
#[derive(Debug)]
pub(crate) struct Feed {
    folder: PathBuf,
    served: Arc<Mutex<Served>>,
    task: JoinHandle<()>,
}

impl Feed {
    /// Begins to answer requests in `folder`, which is made. Nothing behind `until` is fetched ahead, and a gap behind it is the end.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub(crate) fn start(cluster: &Cluster, folder: PathBuf, size: SegmentSize, until: Lsn, owner: Owner) -> Result<Self> {
        for name in ["", "want", "have", "none", "fail"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, e))?;
        }
        let script = folder.join("fetch.sh");
        fs::write(&script, SCRIPT).map_err(|e| Error::io("write", &script, e))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).map_err(|e| Error::io("set the mode of", &script, e))?;
        let open = folder.join("open");
        fs::write(&open, "").map_err(|e| Error::io("write", &open, e))?;
        own(&folder, owner)?;
        let served = Arc::new(Mutex::new(Served::default()));
        let server = Server {
            cluster: cluster.clone(),
            folder: folder.clone(),
            size,
            until,
            owner,
            served: served.clone(),
            known: BTreeSet::new(),
            wanted: BTreeSet::new(),
            running: JoinSet::new(),
        };
        Ok(Self { folder, served, task: tokio::spawn(server.run()) })
    }

    /// The value of `restore_command`.
    pub(crate) fn command(&self) -> String {
        let script = self.folder.join("fetch.sh").to_string_lossy().replace('\'', r"'\''").replace('%', "%%");
        format!(r#"sh '{script}' "%f" "%p""#)
    }

    /// What was handed out so far.
    pub(crate) fn served(&self) -> Served {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
        // Whoever still waits is told that nobody answers.
        let _ = fs::remove_file(self.folder.join("open"));
    }
}

struct Server {
    cluster: Cluster,
    folder: PathBuf,
    size: SegmentSize,
    until: Lsn,
    owner: Owner,
    served: Arc<Mutex<Served>>,
    /// Files that were fetched ahead, or are on their way.
    known: BTreeSet<String>,
    /// Files that the server waits for.
    wanted: BTreeSet<String>,
    running: JoinSet<(String, Result<Option<Vec<u8>>>)>,
}

impl Server {
    async fn run(mut self) {
        loop {
            tokio::select! {
                Some(done) = self.running.join_next() => {
                    if let Ok((name, got)) = done {
                        let _ = self.known.remove(&name);
                        self.answer(&name, got);
                    }
                }
                () = tokio::time::sleep(POLL) => self.look(),
            }
        }
    }

    /// Takes up what was asked for.
    fn look(&mut self) {
        let Ok(entries) = fs::read_dir(self.folder.join("want")) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let _ = fs::remove_file(entry.path());
            if self.folder.join("have").join(&name).exists() {
                continue;
            }
            match name.parse::<WalFileName>() {
                Ok(file) => {
                    let _ = self.wanted.insert(name.clone());
                    self.fetch(name, file);
                    if let WalFileName::Segment(segment) = file {
                        self.fetch_ahead(segment);
                    }
                }
                Err(error) => self.fail(&name, &Error::new(ErrorKind::Usage, "wal.name", error.to_string())),
            }
        }
    }

    fn fetch(&mut self, name: String, file: WalFileName) {
        if !self.known.insert(name.clone()) {
            return;
        }
        let cluster = self.cluster.clone();
        let _ = self.running.spawn(async move {
            let got = fetch::contents(&cluster, file).await;
            (name, got)
        });
    }

    fn fetch_ahead(&mut self, segment: SegmentName) {
        let Ok(number) = segment.segment_number(self.size) else { return };
        let last = WalSegNo::before(self.until, self.size).0;
        let ahead = (AHEAD / self.size.bytes()).clamp(1, AHEAD_SEGMENTS);
        for next in (number.0 + 1..=number.0.saturating_add(ahead)).take_while(|next| *next <= last) {
            let segment = SegmentName::new(segment.timeline, WalSegNo(next), self.size);
            let name = segment.to_string();
            if !self.folder.join("have").join(&name).exists() {
                self.fetch(name, WalFileName::Segment(segment));
            }
        }
    }

    fn answer(&mut self, name: &str, got: Result<Option<Vec<u8>>>) {
        let asked = self.wanted.remove(name);
        let is_behind =
            |segment: SegmentName| segment.segment_number(self.size).is_ok_and(|number| number.start(self.size) >= self.until);
        let segment = match name.parse::<WalFileName>() {
            Ok(WalFileName::Segment(segment)) => Some(segment),
            _ => None,
        };
        match got {
            Ok(Some(bytes)) => match self.place(name, &bytes) {
                Ok(()) => {
                    if let Some(segment) = segment {
                        let _ = self.served.lock().unwrap_or_else(PoisonError::into_inner).segments.insert(segment);
                    }
                }
                Err(error) => self.fail(name, &error),
            },
            // What was fetched ahead and could not be had is asked for once more when it is wanted.
            Ok(None) | Err(_) if !asked => {}
            Ok(None) => self.tell("none", name),
            Err(error) if error.code() == fetch::GAP && segment.is_some_and(is_behind) => self.tell("none", name),
            Err(error) => self.fail(name, &error),
        }
    }

    fn fail(&self, name: &str, error: &Error) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = served.trouble.get_or_insert_with(|| format!("{name}: {error}"));
        drop(served);
        self.tell("fail", name);
    }

    fn tell(&self, answer: &str, name: &str) {
        let path = self.folder.join(answer).join(name);
        if let Err(error) = fs::write(&path, "").map_err(|e| Error::io("write", &path, e)).and_then(|()| own(&path, self.owner)) {
            tracing::warn!(%error, "a server that waits for WAL cannot be answered");
        }
    }

    /// Writes a file where the script finds it, whole or not at all.
    fn place(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let written = write_whole(&self.folder.join(name), bytes, self.owner);
        written.and_then(|path| {
            let to = self.folder.join("have").join(name);
            fs::rename(&path, &to).map_err(|e| Error::io("rename", &to, e))
        })
    }
}

fn write_whole(path: &Path, bytes: &[u8], owner: Owner) -> Result<PathBuf> {
    fs::write(path, bytes).map_err(|e| Error::io("write", path, e))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|e| Error::io("set the mode of", path, e))?;
    own(path, owner)?;
    Ok(path.to_path_buf())
}
