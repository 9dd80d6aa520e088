//! Where the past that can be restored begins.

use jiff::Timestamp;

use super::Cluster;
use super::snapshot::{self, Manifest};
use crate::Result;
use crate::postgres::Lsn;

/// The end of the backup that ended first: by position, and by the server's clock. Nothing before it can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Past {
    /// By position, on whatever timeline: positions only grow.
    pub(crate) stop: Lsn,
    /// By the server's clock.
    pub(crate) finished: Timestamp,
}

impl Past {
    /// With this backup alone.
    pub(crate) fn of(manifest: &Manifest) -> Self {
        Self { stop: manifest.stop_lsn, finished: manifest.finished_at }
    }

    /// With the backups of both.
    pub(crate) fn min(self, other: Self) -> Self {
        Self { stop: self.stop.min(other.stop), finished: self.finished.min(other.finished) }
    }
}

/// The past of a cluster; none while there is no backup, or one cannot be read: then nobody knows.
///
/// # Errors
/// When the store fails.
pub(crate) async fn past(cluster: &Cluster) -> Result<Option<Past>> {
    let listing = snapshot::list(cluster).await?;
    if !listing.damaged.is_empty() {
        return Ok(None);
    }
    Ok(listing.snapshots.iter().map(|snapshot| Past::of(&snapshot.manifest)).reduce(Past::min))
}
