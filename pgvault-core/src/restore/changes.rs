//! What the WAL between a backup and a moment did to the rows of its tables.

use futures::{StreamExt, stream};

use super::window;
use crate::Result;
use crate::postgres::wal::Touched;
use crate::postgres::{Lsn, TimelineId, WalSegNo};
use crate::vault::Cluster;
use crate::vault::snapshot::Manifest;
use crate::wal::catalog::Catalog;

/// Segments that are fetched at once.
const PARALLEL: usize = 4;

/// Reads the WAL from the start of `backup` up to `until` on `timeline`. When some of it is not there, the result is not complete.
///
/// # Errors
/// When the store fails, a WAL object was changed, or the timeline's history is missing.
pub async fn changes(cluster: &Cluster, backup: &Manifest, timeline: TimelineId, until: Lsn) -> Result<Touched> {
    let size = backup.wal_segment_size;
    let catalog = Catalog::load(cluster, size, backup.start_lsn).await?;
    let history = catalog.history(timeline)?;
    let mut touched = Touched::new(backup.system_id, size, timeline, Some(history.clone()), backup.start_lsn, until);
    let (first, last) = (WalSegNo::containing(touched.position(), size), WalSegNo::before(until, size));
    let (catalog, history) = (&catalog, &history);
    let fetching = (first.0..=last.0)
        .map(WalSegNo)
        .map(|number| async move { window::segment(cluster, catalog, history, number).await.map(|bytes| (number, bytes)) });
    let mut fetching = stream::iter(fetching).buffered(PARALLEL);
    while let Some(fetched) = fetching.next().await {
        let (number, Some(bytes)) = fetched? else { break };
        let read = move || {
            touched.feed(number.start(size), &bytes);
            touched
        };
        touched = tokio::task::spawn_blocking(read)
            .await
            .map_err(|e| crate::Error::new(crate::ErrorKind::Failed, "task", e.to_string()))?;
    }
    Ok(touched)
}
