//! The records that a reader of the copy needs: gaps, which no listing shows when they are at the end.
//!
//! They keep their names, times and authors. What else the audit log says is about the source alone: its keys, its restores. So are
//! receipts of restore drills, which prove something of the vault that was restored from.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt, stream};

use super::object::{Route, is_damage};
use crate::Result;
use crate::format::object::Kind;
use crate::vault::audit::{self, event};

/// Records read at once.
const PARALLEL: usize = 8;

/// Ships the records of gaps that the target does not have; tells how many.
///
/// # Errors
/// When a store fails.
pub(super) async fn ship_gaps(route: &Route) -> Result<u64> {
    let there: BTreeSet<String> = audit::names(&route.target, &[event::WAL_GAP]).await?.into_iter().collect();
    let missing = audit::names(&route.source, &[event::WAL_GAP]).await?.into_iter().filter(|name| !there.contains(name));
    let shipping = stream::iter(missing).map(|name| async move {
        match route.ship(Kind::Audit, &name, None).await {
            Ok(_) => Ok(1),
            // `check` names it.
            Err(error) if is_damage(&error) => Ok(0),
            Err(error) => Err(error),
        }
    });
    shipping.buffer_unordered(PARALLEL).try_fold(0, |all, one| std::future::ready(Ok(all + one))).await
}
