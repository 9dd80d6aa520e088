//! Who did what: one sealed record per event, written after the event.
//!
//! The records also let `check` notice a manifest that vanished: a commit that is recorded, with no record of its expiry.

use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::postgres::{Lsn, TimelineId};
use crate::{Error, ErrorKind, Result};

/// Records read at once.
const PARALLEL: usize = 8;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A cluster was created, with these key slots.
    ClusterCreated {
        /// The slots that there are.
        key_ids: Vec<Ulid>,
    },
    /// A base backup was committed.
    BackupCommitted {
        /// The backup.
        backup_id: Ulid,
    },
    /// A base backup is going to be expired: written before it is.
    BackupExpired {
        /// The backup.
        backup_id: Ulid,
        /// When the store says it was committed; garbage collection wants to know. Absent in records of older versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        committed: Option<jiff::Timestamp>,
    },
    /// WAL that nothing needs any more is going to be deleted: written before it is, so that its absence is no gap.
    WalExpired {
        /// The timeline.
        timeline: TimelineId,
        /// The first position.
        from: Lsn,
        /// The first position behind it.
        to: Lsn,
    },
    /// A hold was placed.
    HoldPlaced {
        /// The hold.
        hold_id: Ulid,
    },
    /// A hold is going to be removed: written before it is.
    HoldRemoved {
        /// The hold.
        hold_id: Ulid,
    },
    /// A key slot was added.
    KeyAdded {
        /// The slot.
        key_id: Ulid,
    },
    /// A key slot is going to be removed: written before it is.
    KeyRevoked {
        /// The slot.
        key_id: Ulid,
    },
    /// A removal that was announced does not happen: others would have left no slot.
    RevocationWithdrawn {
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
    /// WAL that no server has any more was found missing from the vault.
    WalGap {
        /// The timeline.
        timeline: TimelineId,
        /// The first missing position.
        from: Lsn,
        /// The first position that is there again, or will be.
        to: Lsn,
    },
    /// An event of a newer version. [`read`] refuses it by name.
    #[serde(other, skip_serializing)]
    Unknown,
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

/// Reads the record `name`, relative to the cluster.
///
/// # Errors
/// When the store fails or the record was changed; [`ErrorKind::Unsupported`] when its event is of a newer version.
pub async fn read(cluster: &Cluster, name: &str) -> Result<Record> {
    let json: serde_json::Value = cluster.get_json(Kind::Audit, name).await?;
    let event = json.get("event").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    let path = cluster.path(name);
    let record: Record =
        serde_json::from_value(json).map_err(|e| Error::new(ErrorKind::Corrupt, "audit.record", format!("{path}: {e}")))?;
    match record.event {
        Event::Unknown => Err(Error::new(
            ErrorKind::Unsupported,
            "audit.event",
            format!("{path}: the event `{event}` is unknown to this version"),
        )),
        _ => Ok(record),
    }
}

/// Every record that can be read, in the order of writing; `check` names the others.
///
/// # Errors
/// When the store fails.
pub async fn all(cluster: &Cluster) -> Result<Vec<Record>> {
    let listed = cluster.store().list(&cluster.path(layout::dir::AUDIT)).await?;
    let ids: Vec<Ulid> = listed.iter().filter_map(|object| layout::id_of(&object.name)).collect();
    let mut reading = stream::iter(ids)
        .map(|id| async move {
            match read(cluster, &layout::audit(id)).await {
                Ok(record) => Ok(Some(record)),
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .buffered(PARALLEL);
    let mut records = Vec::new();
    while let Some(record) = reading.next().await {
        records.extend(record?);
    }
    Ok(records)
}
