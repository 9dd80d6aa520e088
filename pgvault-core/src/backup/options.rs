//! What the operator asks of a backup.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;

use super::census::CensusOptions;
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
    /// The moment that the backup shows, when the server is a copy that stands still: [`Manifest::finished_at`] is this, and not the
    /// clock of the copy's host. No transaction of the copy may have ended later.
    ///
    /// [`Manifest::finished_at`]: crate::vault::snapshot::Manifest::finished_at
    pub as_of: Option<Timestamp>,
    /// Store everything, whatever the vault has already.
    pub full: bool,
    /// Count the rows of the tables meanwhile; `None` when that is not wanted.
    pub census: Option<CensusOptions>,
    /// Told about progress.
    pub progress: SharedProgress,
}
