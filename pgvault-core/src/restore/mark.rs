//! The restore point that was set before something went wrong.
//!
//! Whoever names a moment by the clock may hit the middle of a change that took minutes. A restore point that was set before the
//! change (`pg_create_restore_point`) is the moment that was meant. [`set`](mod@set) sets one.
//!
//! What is looked through here is WAL, not the marks in the vault: a restore point that anything else set is as good, and what is
//! found there can be restored.

pub mod set;

use jiff::Timestamp;
use serde::Serialize;

use super::plan::{Plan, PlanOptions, plan};
use super::target::Target;
use super::window;
use crate::postgres::Lsn;
use crate::vault::Cluster;
use crate::vault::snapshot;
use crate::wal::catalog::Catalog;
use crate::{ErrorKind, Result};

/// A named restore point that can be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// Its name.
    pub name: String,
    /// Where its record begins.
    pub lsn: Lsn,
    /// When it was set.
    pub time: Timestamp,
    /// What `--to` takes for it: `name:NAME`, or its position when the name was used again later.
    pub target: String,
}

/// The newest restore point before `limit` on the history of a plan, if it can be restored.
///
/// # Errors
/// When the store fails or a WAL object's footer was changed.
pub async fn newest_before(cluster: &Cluster, of: &Plan, limit: Lsn) -> Result<Option<Mark>> {
    let backups: Vec<_> = snapshot::list(cluster).await?.snapshots.into_iter().map(|snapshot| snapshot.manifest).collect();
    let size = of.snapshot.manifest.wal_segment_size;
    let oldest = backups.iter().map(|backup| backup.start_lsn).min().unwrap_or(of.snapshot.manifest.start_lsn);
    let catalog = Catalog::load(cluster, size, oldest).await?;
    let history = catalog.history(of.timeline)?;
    let look =
        async |_, info: &crate::wal::object::WalInfo| Ok(info.restore_points.iter().rev().find(|point| point.lsn < limit).cloned());
    let Some(point) = window::search(cluster, &catalog, &history, oldest, limit, look).await? else { return Ok(None) };
    // A name leads to the last point that was given it.
    let end = catalog.contiguous_end(&history, of.snapshot.manifest.start_lsn);
    let look = async |_, info: &crate::wal::object::WalInfo| Ok(window::named(info, &point.name).map(|point| point.lsn));
    let last = window::search(cluster, &catalog, &history, oldest, end, look).await?;
    let target = if last == Some(point.lsn) { Target::Name(point.name.clone()) } else { Target::Lsn(point.lsn) };
    let choice = PlanOptions { backup: None, timeline: Some(of.timeline) };
    match Box::pin(plan(cluster, &target, choice)).await {
        Ok(_) => Ok(Some(Mark { name: point.name, lsn: point.lsn, time: point.time, target: target.to_string() })),
        // What cannot be restored any more is no offer.
        Err(error) if matches!(error.kind(), ErrorKind::OutsideWindow | ErrorKind::Corrupt | ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
