//! Pieces of WAL on their way into the vault: stored several at a time, confirmed strictly in order.
//!
//! They outlive the connection that brought them. A store in trouble is tried again for as long as it takes; what else
//! goes wrong (another content under the same name, bytes that are not WAL) ends the stream.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::monitor::Monitor;
use crate::postgres::{Lsn, SegmentName};
use crate::vault::Cluster;
use crate::wal::assemble::{Piece, Share};
use crate::wal::deposit::Deposit;
use crate::{Error, ErrorKind, Result};

/// Pieces being stored at once; with the open segment, what bounds memory.
const IN_FLIGHT: usize = 4;

/// Pauses between two attempts to store the same piece, each twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(8);

/// A piece that is durable in the vault, as is everything before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) segment: SegmentName,
    pub(super) end: Lsn,
    /// Nothing of the segment is missing now.
    pub(super) completes: bool,
    /// It is what a flush gave out.
    pub(super) is_part: bool,
}

struct Upload {
    stored: Stored,
    work: Work,
}

enum Work {
    Running(JoinHandle<Result<()>>),
    /// Lies in the spool file until it is its turn: where, and how many bytes. The piece itself is empty.
    Waiting(PathBuf, usize, Box<Piece>),
}

pub(super) struct Uploads {
    cluster: Cluster,
    monitor: Monitor,
    queue: VecDeque<Upload>,
}

impl Uploads {
    pub(super) fn new(cluster: &Cluster, monitor: &Monitor) -> Self {
        Self { cluster: cluster.clone(), monitor: monitor.clone(), queue: VecDeque::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// True when another piece would have to be kept in memory beside as many as are meant to be.
    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= IN_FLIGHT
    }

    /// True while a part is being stored.
    pub(super) fn has_part(&self) -> bool {
        self.queue.iter().any(|upload| upload.stored.is_part)
    }

    /// Adds the piece behind those that are there; `spooled` is a file that holds all of its segment up to its end.
    pub(super) fn add(&mut self, piece: Piece, spooled: Option<PathBuf>) {
        let (completes, is_part) = (piece.completes_segment(), matches!(piece.share, Share::Part { .. }));
        let stored = Stored { segment: piece.segment, end: piece.end, completes, is_part };
        let work = match spooled.filter(|_| !is_part && self.is_full()) {
            Some(path) => Work::Waiting(path, piece.bytes.len(), Box::new(Piece { bytes: Bytes::new(), ..piece })),
            None => self.run(piece),
        };
        self.queue.push_back(Upload { stored, work });
    }

    fn run(&self, piece: Piece) -> Work {
        Work::Running(tokio::spawn(deposit(self.cluster.clone(), self.monitor.clone(), piece)))
    }

    /// The oldest piece, once it is stored; waits for ever when there is none. Cancel-safe: a piece is taken off the queue in the same
    /// step in which it is given out.
    pub(super) async fn first(&mut self) -> Result<Stored> {
        self.start_waiting();
        let Some(Upload { stored, work: Work::Running(task) }) = self.queue.front_mut() else {
            return std::future::pending().await;
        };
        let stored = *stored;
        let outcome = task.await;
        let _ = self.queue.pop_front();
        outcome.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        if stored.completes {
            self.monitor.update(|state| state.segments += 1);
        } else if stored.is_part {
            self.monitor.update(|state| state.parts += 1);
        }
        Ok(stored)
    }

    /// Starts what waits in the spool, as far as there is room.
    fn start_waiting(&mut self) {
        for upload in self.queue.iter_mut().take(IN_FLIGHT) {
            let Work::Waiting(path, length, piece) = &upload.work else { continue };
            let (path, length, piece) = (path.clone(), *length, Piece::clone(piece));
            let (cluster, monitor) = (self.cluster.clone(), self.monitor.clone());
            // Read by the task that stores it: who waits for that task may stop waiting at any time.
            upload.work = Work::Running(tokio::spawn(async move {
                let bytes = read(&path, piece.from.into(), length).await?;
                deposit(cluster, monitor, Piece { bytes, ..piece }).await
            }));
        }
    }
}

async fn read(path: &Path, from: u64, length: usize) -> Result<Bytes> {
    let owned = path.to_path_buf();
    let reading = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; length];
        std::fs::File::open(owned)?.read_exact_at(&mut bytes, from)?;
        Ok(bytes.into())
    });
    reading.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?.map_err(|e| Error::io("read", path, e))
}

impl Drop for Uploads {
    fn drop(&mut self) {
        for upload in &self.queue {
            if let Work::Running(task) = &upload.work {
                task.abort();
            }
        }
    }
}

/// Stores one piece, however often it takes.
async fn deposit(cluster: Cluster, monitor: Monitor, piece: Piece) -> Result<()> {
    let deposit = Deposit::seal(&cluster, piece).await?;
    let mut pause = FIRST_PAUSE;
    loop {
        match deposit.put(&cluster).await {
            Ok(()) => {
                monitor.store_works();
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Storage => {
                monitor.store_failed(&error);
                // Several pieces and several streams should not come back at the same moment.
                let [dice] = cluster.env().random()?;
                tokio::time::sleep(pause / 2 + pause.mul_f64(f64::from(dice) / 512.0)).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
}
