//! WAL streaming in the background.

use std::time::Duration;

use pgvault_core::postgres::{ConnInfo, Lsn};
use pgvault_core::vault::Cluster;
use pgvault_core::wal::stream::{StreamEvent, StreamOptions, stream};
use pgvault_core::{Error, ErrorKind, Result};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What is known of the stream.
#[derive(Debug, Clone, Default)]
struct Progress {
    durable: Lsn,
    trouble: Option<String>,
}

/// A running `wal stream`.
pub(super) struct Archiver {
    stop: watch::Sender<bool>,
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

impl Archiver {
    pub(super) fn start(cluster: &Cluster, connection: &ConnInfo) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (told, progress) = watch::channel(Progress::default());
        let (options, mut happened) = StreamOptions::new(connection.clone(), "pgvault");
        let cluster = cluster.clone();
        let task = tokio::spawn(async move {
            let streaming = stream(&cluster, &options, stopped);
            tokio::pin!(streaming);
            loop {
                tokio::select! {
                    ended = &mut streaming => {
                        let trouble = ended.err().map(|error| error.to_string());
                        told.send_modify(|progress| progress.trouble = trouble);
                        return;
                    }
                    Some(event) = happened.recv() => told.send_modify(|progress| match event {
                        StreamEvent::Durable { to, .. } => progress.durable = to,
                        StreamEvent::Interrupted { reason } | StreamEvent::StoreTrouble { reason } => progress.trouble = Some(reason),
                        _ => {}
                    }),
                }
            }
        });
        Self { stop, progress, task }
    }

    /// Returns once the vault has everything before `end`.
    pub(super) async fn wait_until_durable(&self, end: Lsn, patience: Duration) -> Result<()> {
        let mut progress = self.progress.clone();
        let reached = tokio::time::timeout(patience, progress.wait_for(|progress| progress.durable >= end)).await;
        if let Ok(Ok(_)) = reached {
            return Ok(());
        }
        let Progress { durable, trouble } = self.progress.borrow().clone();
        let why = trouble.map_or(String::new(), |trouble| format!(": {trouble}"));
        let message = format!("WAL up to {end} was to be in the vault, which ends at {durable}{why}");
        Err(Error::new(ErrorKind::Failed, "demo.not_durable", message))
    }

    /// Stores what was received and ends.
    pub(super) async fn end(self) {
        let _ = self.stop.send(true);
        let abort = self.task.abort_handle();
        if tokio::time::timeout(Duration::from_secs(5), self.task).await.is_err() {
            abort.abort();
        }
    }
}
