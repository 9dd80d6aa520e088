//! The records that a reader of the copy needs: gaps, which no listing shows when they are at the end, marks and artifacts.
//!
//! They keep their names, times and authors. What else the audit log says is about the source alone: its keys, its restores. So
//! are receipts of restore drills, which prove something of the vault that was restored from.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt, stream};

use super::object::{Route, is_damage};
use crate::Result;
use crate::format::object::Kind;
use crate::vault::audit::{self, event};
use crate::vault::past::{Past, past};
use crate::vault::{Cluster, artifact, layout, mark};

/// Records read at once.
const PARALLEL: usize = 8;

/// Ships the records of gaps that the target does not have; tells how many.
///
/// # Errors
/// When a store fails.
pub(super) async fn ship_gaps(route: &Route) -> Result<u64> {
    let there: BTreeSet<String> = audit::names(&route.target, &[event::WAL_GAP]).await?.into_iter().collect();
    let missing = audit::names(&route.source, &[event::WAL_GAP]).await?.into_iter().filter(|name| !there.contains(name));
    ship(route, Kind::Audit, missing.collect()).await
}

/// Ships the marks and the artifacts that the target does not have, and would not delete at once; tells how many of each.
///
/// # Errors
/// When a store fails.
pub(super) async fn ship_marks_and_artifacts(route: &Route) -> Result<(u64, u64)> {
    let (marks, artifacts) = (missing(route, layout::dir::MARK).await?, missing(route, layout::dir::ARTIFACT).await?);
    if marks.is_empty() && artifacts.is_empty() {
        return Ok((0, 0));
    }
    let past = past(&route.target).await?;
    let (marks, artifacts) = (wanted_marks(route, marks, past).await?, wanted_artifacts(route, artifacts, past).await?);
    Ok((ship(route, Kind::Mark, marks).await?, ship(route, Kind::Artifact, artifacts).await?))
}

/// The marks that a backup of the target leads to.
async fn wanted_marks(route: &Route, missing: BTreeSet<String>, past: Option<Past>) -> Result<Vec<String>> {
    let (false, Some(past)) = (missing.is_empty(), past) else { return Ok(Vec::new()) };
    let known = mark::list(&route.source).await?;
    let reachable = known.marks.iter().filter(|mark| mark.lsn >= past.stop).map(|mark| layout::mark(mark.id));
    Ok(reachable.filter(|name| missing.contains(name)).collect())
}

/// The versions of artifacts that no other stood in the place of before anything that the target can restore.
async fn wanted_artifacts(route: &Route, missing: BTreeSet<String>, past: Option<Past>) -> Result<Vec<String>> {
    let (false, Some(past)) = (missing.is_empty(), past) else { return Ok(missing.into_iter().collect()) };
    let known = artifact::list(&route.source).await?;
    let over: BTreeSet<String> = known.superseded(past.finished).into_iter().map(|object| object.name).collect();
    Ok(missing.into_iter().filter(|name| !over.contains(&route.source.path(name))).collect())
}

/// The names below `dir` that only the source has, relative to the cluster.
async fn missing(route: &Route, dir: &str) -> Result<BTreeSet<String>> {
    let there = names(&route.target, dir).await?;
    Ok(names(&route.source, dir).await?.into_iter().filter(|name| !there.contains(name)).collect())
}

async fn names(cluster: &Cluster, dir: &str) -> Result<BTreeSet<String>> {
    let prefix = cluster.name().prefix();
    let listed = cluster.store().list(&cluster.path(dir)).await?;
    Ok(listed.iter().filter_map(|object| object.name.strip_prefix(&prefix).map(ToOwned::to_owned)).collect())
}

async fn ship(route: &Route, kind: Kind, names: Vec<String>) -> Result<u64> {
    let shipping = stream::iter(names).map(|name| async move {
        match route.ship(kind, &name, None).await {
            Ok(_) => Ok(1),
            // `check` names it.
            Err(error) if is_damage(&error) => Ok(0),
            Err(error) => Err(error),
        }
    });
    shipping.buffer_unordered(PARALLEL).try_fold(0, |all, one| std::future::ready(Ok(all + one))).await
}
