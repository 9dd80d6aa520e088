//! What else gathers: sessions that are over, probes, holds that were taken back, marks and versions of artifacts that no restore
//! leads to.

use jiff::{SignedDuration, Timestamp};

use crate::Result;
use crate::store::ObjectInfo;
use crate::vault::past::Past;
use crate::vault::prune::Pruner;
use crate::vault::session::OLDEST_HOURS;
use crate::vault::{Cluster, artifact, hold, layout, mark};

/// Names below this are left by the test of a store.
const PROBES: &str = "probe/";

/// Removes what has meant nothing to anybody for a week. Without a `past` nobody knows what can be restored.
pub(super) async fn tidy(cluster: &Cluster, now: Timestamp, past: Option<Past>, pruner: &mut Pruner) -> Result<()> {
    let old = now.checked_sub(SignedDuration::from_hours(OLDEST_HOURS)).unwrap_or(Timestamp::MIN);
    for prefix in [cluster.path(layout::dir::SESSION), PROBES.to_owned()] {
        cluster
            .store()
            .each_page(&prefix, async |mut page| {
                page.retain(|object| object.last_modified < old);
                pruner.delete(page).await.map(drop)
            })
            .await?;
    }
    // A hold goes before its removal: alone it would be in force again.
    for (id, since) in hold::over(cluster).await?.into_iter().filter(|(_, since)| *since < old) {
        let object = ObjectInfo { name: cluster.path(&layout::hold(id)), size: 0, last_modified: since };
        let gone = pruner.delete(vec![object]).await?;
        if gone.iter().any(|(_, outcome)| !matches!(outcome, Ok(crate::store::Pruned::Deleted))) {
            break;
        }
    }
    if let Some(past) = past {
        let mut unneeded = mark::list(cluster).await?.unreachable(past.stop);
        unneeded.extend(artifact::list(cluster).await?.superseded(past.finished));
        unneeded.retain(|object| object.last_modified < old);
        let _ = pruner.delete(unneeded).await?;
    }
    Ok(())
}
