//! Who did what: one sealed record per event, written after the event.
//!
//! The records also let `check` notice a manifest that vanished: a commit that is recorded, with no record of its expiry.

use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::{Result, vault::store::ObjectInfo};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A cluster was created, with these key slots. Until this is recorded, an `init` has not finished.
    ClusterCreated {
        /// Every slot that there is.
        key_ids: Vec<Ulid>,
    },
    /// A base backup was committed.
    BackupCommitted {
        /// The backup.
        backup_id: Ulid,
    },
    /// A base backup was expired.
    BackupExpired {
        /// The backup.
        backup_id: Ulid,
    },
    /// A key slot was added.
    KeyAdded {
        /// The slot.
        key_id: Ulid,
    },
    /// A key slot was removed.
    KeyRevoked {
        /// The slot.
        key_id: Ulid,
    },
    /// A data key epoch was started.
    EpochStarted {
        /// The epoch.
        epoch_id: Ulid,
    },
    /// A restore was made.
    Restored {
        /// The backup it started from.
        backup_id: Ulid,
        /// The target, as given.
        target: String,
        /// The directory it was written to.
        pgdata: String,
    },
}

/// One record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// When, by the writer's clock.
    pub at: jiff::Timestamp,
    /// User and host, as far as the program can tell.
    pub by: String,
}

/// Writes a record.
///
/// # Errors
/// When the store fails.
pub async fn record(cluster: &Cluster, event: Event) -> Result<()> {
    let id = cluster.env().new_id()?;
    let user = std::env::var("USER")
        .or_else(|_| std::env::var("LOGNAME"))
        .unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()));
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    cluster
        .put_json(Kind::Audit, &layout::audit(id), &Record { event, at: cluster.env().now(), by: format!("{user}@{host}") })
        .await
}

/// Every record, in the order of writing.
///
/// # Errors
/// When the store fails or a record was changed.
pub async fn all(cluster: &Cluster) -> Result<Vec<Record>> {
    let listed: Vec<ObjectInfo> = cluster.store().list(&cluster.path(layout::dir::AUDIT)).await?;
    let mut records = Vec::with_capacity(listed.len());
    for object in listed {
        let Some(id) = layout::id_of(&object.name) else { continue };
        records.push(cluster.get_json(Kind::Audit, &layout::audit(id)).await?);
    }
    Ok(records)
}
