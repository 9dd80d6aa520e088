//! What the operator asks of a backup.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::postgres::ConnInfo;
use crate::progress::SharedProgress;

/// How to take a backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The server.
    pub connection: ConnInfo,
    /// The data directory, for a local source; `None` for a remote one.
    pub pgdata: Option<PathBuf>,
    /// zstd level.
    pub level: i32,
    /// Threads for the CPU work.
    pub workers: usize,
    /// What the operator attaches to the backup.
    pub labels: BTreeMap<String, String>,
    /// Fail instead of finishing with a list of bad pages.
    pub strict: bool,
    /// Wait for a spread checkpoint instead of asking for one at once.
    pub spread_checkpoint: bool,
    /// How long others get to archive the WAL of the backup before it is fetched from the server.
    pub archive_patience: Option<Duration>,
    /// Store everything, whatever the vault has already.
    pub full: bool,
    /// Told about progress.
    pub progress: SharedProgress,
}
