//! Who did what: one sealed record per event, written after the event.
//!
//! The records also let `check` notice a manifest that vanished: a commit that is recorded, with no record of its expiry.
//!
//! A record's name ends with its event, so that who looks for some of them reads only those: a vault of years has thousands. The name is
//! sealed with the record, so it cannot lie.

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

/// Events as names of records have them.
pub mod event {
    /// [`Event::ClusterCreated`](super::Event::ClusterCreated)
    pub const CLUSTER_CREATED: &str = "cluster-created";
    /// [`Event::BackupExpired`](super::Event::BackupExpired)
    pub const BACKUP_EXPIRED: &str = "backup-expired";
    /// [`Event::WalExpired`](super::Event::WalExpired)
    pub const WAL_EXPIRED: &str = "wal-expired";
    /// [`Event::KeyRevoked`](super::Event::KeyRevoked)
    pub const KEY_REVOKED: &str = "key-revoked";
    /// [`Event::RevocationWithdrawn`](super::Event::RevocationWithdrawn)
    pub const REVOCATION_WITHDRAWN: &str = "revocation-withdrawn";
    /// [`Event::WalGap`](super::Event::WalGap)
    pub const WAL_GAP: &str = "wal-gap";
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
    let record = Record { event, at: cluster.env().now(), by: who() };
    let json = serde_json::to_value(&record).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
    cluster.put_json(Kind::Audit, &layout::audit(id, event_of(&json)), &json).await
}

/// User and host of this process, as far as it can tell.
pub fn who() -> String {
    let user = std::env::var("USER")
        .or_else(|_| std::env::var("LOGNAME"))
        .unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

fn event_of(record: &serde_json::Value) -> &str {
    record.get("event").and_then(serde_json::Value::as_str).unwrap_or_default()
}

/// Reads the record `name`, relative to the cluster.
///
/// # Errors
/// When the store fails or the record was changed; [`ErrorKind::Unsupported`] when its event is of a newer version.
pub async fn read(cluster: &Cluster, name: &str) -> Result<Record> {
    let json: serde_json::Value = cluster.get_json(Kind::Audit, name).await?;
    let event = event_of(&json).to_owned();
    let path = cluster.path(name);
    if layout::what_of(name) != Some(event.as_str()) {
        return Err(Error::new(ErrorKind::Corrupt, "audit.name", format!("{path} holds a record of the event `{event}`")));
    }
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

/// The records of some events that can be read, in the order of writing; `check` names the others.
///
/// # Errors
/// When the store fails.
pub async fn of(cluster: &Cluster, events: &[&str]) -> Result<Vec<Record>> {
    let mut reading = stream::iter(names(cluster, events).await?)
        .map(|name| async move {
            match read(cluster, &name).await {
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

/// The names of the records of some events, relative to the cluster, in the order of writing.
///
/// # Errors
/// When the store fails.
pub async fn names(cluster: &Cluster, events: &[&str]) -> Result<Vec<String>> {
    let listed = cluster.store().list(&cluster.path(layout::dir::AUDIT)).await?;
    let named = listed.iter().filter_map(|object| {
        let event = layout::what_of(&object.name).filter(|event| events.contains(event))?;
        Some(layout::audit(layout::id_of(&object.name)?, event))
    });
    Ok(named.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::postgres::Lsn;
    use crate::postgres::SystemId;
    use crate::store::Store;
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;

    #[tokio::test]
    async fn records_are_found_by_their_events_and_nothing_else_is_read() {
        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        let _ = vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap();
        let cluster = vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.unwrap();
        let (id, from) = (Ulid(7), Lsn(1));
        let events = [
            (event::CLUSTER_CREATED, Event::ClusterCreated { key_ids: vec![id] }),
            (event::BACKUP_EXPIRED, Event::BackupExpired { backup_id: id, committed: None }),
            (event::WAL_EXPIRED, Event::WalExpired { timeline: TimelineId(1), from, to: Lsn(2) }),
            (event::KEY_REVOKED, Event::KeyRevoked { key_id: id }),
            (event::REVOCATION_WITHDRAWN, Event::RevocationWithdrawn { key_id: id }),
            (event::WAL_GAP, Event::WalGap { timeline: TimelineId(1), from, to: Lsn(2) }),
        ];
        for (_, event) in &events {
            record(&cluster, event.clone()).await.unwrap();
        }
        for (name, event) in &events {
            let gets = cluster.store().requests().get;
            let found = of(&cluster, &[name]).await.unwrap();
            assert_eq!(found.iter().map(|record| &record.event).collect::<Vec<_>>(), [event], "{name}");
            assert_eq!(cluster.store().requests().get - gets, 1, "{name}");
        }
        // A record under the name of another event is not believed.
        let name = layout::audit(cluster.env().new_id().unwrap(), event::WAL_GAP);
        let record = Record { event: events[0].1.clone(), at: cluster.env().now(), by: "me@here".into() };
        cluster.put_json(Kind::Audit, &name, &record).await.unwrap();
        assert_eq!(read(&cluster, &name).await.unwrap_err().code(), "audit.name");
        assert_eq!(of(&cluster, &[event::WAL_GAP]).await.unwrap().len(), 1);
    }
}
