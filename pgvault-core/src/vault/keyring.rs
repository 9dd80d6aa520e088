//! Adding and revoking ways into a cluster. Slots are rewritten, data never.

use std::collections::{BTreeMap, BTreeSet};

use ulid::Ulid;

use super::audit::{self, Event, event};
use super::{Cluster, layout};
use crate::crypto::keys::EpochDocument;
use crate::crypto::slot::{SlotDocument, Wrap};
use crate::format::document;
use crate::{Error, ErrorKind, Result};

/// Adds a slot for another passphrase or recipient.
///
/// # Errors
/// When the store fails or the key is unusable.
pub async fn add(cluster: &Cluster, wrap: &Wrap, label: &str) -> Result<SlotDocument> {
    let slot = SlotDocument::create(cluster.env(), cluster.keys().identity(), cluster.keys().master(), wrap, label).await?;
    cluster.store().put_once(&layout::key_slot(cluster.name(), slot.key_id), document::encode(&slot)?.into()).await?;
    audit::record(cluster, Event::KeyAdded { key_id: slot.key_id }).await?;
    Ok(slot)
}

/// Records the creation of a cluster, unless that was done; tells which. An `init` that died right after its commit leaves it
/// to the next one. Of two at the same moment both may record it, which says nothing wrong.
///
/// # Errors
/// When the store fails.
pub async fn record_creation(cluster: &Cluster) -> Result<bool> {
    if !audit::of(cluster, &[event::CLUSTER_CREATED]).await?.is_empty() {
        return Ok(false);
    }
    let slots = own_slots(cluster).await?;
    audit::record(cluster, Event::ClusterCreated { key_ids: slots.iter().map(|slot| slot.key_id).collect() }).await?;
    Ok(true)
}

/// The slots that a holder of the cluster's master key made. That a slot names this key proves nothing: the name is public.
async fn own_slots(cluster: &Cluster) -> Result<Vec<SlotDocument>> {
    let mut slots = cluster.vault().slots(cluster.name()).await?;
    slots.retain(|slot| slot.verify(cluster.keys().identity(), cluster.keys().master()).is_ok());
    Ok(slots)
}

/// Removes a slot. The last one cannot be removed: nothing could ever be read again.
///
/// Two that remove different slots at the same moment must not leave none. So each first announces its own in the audit log
/// and then looks what the others announced: at least one of them sees the other.
///
/// This takes away a way in for the future. Whoever opened the slot before, or kept a copy of it, knows the master key.
///
/// # Errors
/// When there is no such slot, it is the last, or the store refuses to delete.
pub async fn revoke(cluster: &Cluster, key_id: Ulid) -> Result<()> {
    if !cluster.vault().slots(cluster.name()).await?.iter().any(|s| s.key_id == key_id) {
        return Err(Error::new(ErrorKind::Usage, "key.unknown", format!("{} has no key slot {key_id}", cluster.name()))
            .with_hint("`pgvault key list` shows the slots"));
    }
    // What somebody else wrote is no way in that could be left.
    if own_slots(cluster).await?.iter().all(|s| s.key_id == key_id) {
        return Err(Error::new(ErrorKind::Usage, "key.last", format!("{key_id} is the only key slot of {}", cluster.name()))
            .with_hint("add another key first with `pgvault key add`"));
    }
    audit::record(cluster, Event::KeyRevoked { key_id }).await?;
    let going = announced(cluster).await?;
    if own_slots(cluster).await?.iter().all(|s| s.key_id == key_id || going.contains(&s.key_id)) {
        audit::record(cluster, Event::RevocationWithdrawn { key_id }).await?;
        let others: Vec<String> = going.iter().filter(|id| **id != key_id).map(ToString::to_string).collect();
        return Err(Error::new(
            ErrorKind::Conflict,
            "key.revoked_elsewhere",
            format!("without {key_id}, {} would have no key slot: {} is being revoked too", cluster.name(), others.join(", ")),
        )
        .with_hint("see `pgvault key list`, add another key, or finish the other revocation"));
    }
    cluster.store().delete(&layout::key_slot(cluster.name(), key_id)).await
}

/// Slots whose removal was announced and not withdrawn.
async fn announced(cluster: &Cluster) -> Result<BTreeSet<Ulid>> {
    // Counted, because several may announce the same slot, and one of them withdraw.
    let mut counts: BTreeMap<Ulid, i64> = BTreeMap::new();
    for record in audit::of(cluster, &[event::KEY_REVOKED, event::REVOCATION_WITHDRAWN]).await? {
        match record.event {
            Event::KeyRevoked { key_id } => *counts.entry(key_id).or_default() += 1,
            Event::RevocationWithdrawn { key_id } => *counts.entry(key_id).or_default() -= 1,
            _ => {}
        }
    }
    Ok(counts.into_iter().filter(|(_, count)| *count > 0).map(|(id, _)| id).collect())
}

/// Replaces the slot `old` by a new one: the new slot is stored before the old is removed, so a crash between leaves both.
///
/// # Errors
/// As [`add`] and [`revoke`].
pub async fn rotate(cluster: &Cluster, old: Ulid, wrap: &Wrap, label: &str) -> Result<SlotDocument> {
    let slot = add(cluster, wrap, label).await?;
    revoke(cluster, old).await?;
    Ok(slot)
}

/// Starts a new data key epoch; what is written after the next open uses it.
///
/// # Errors
/// When the store fails.
pub async fn start_epoch(cluster: &Cluster) -> Result<Ulid> {
    let epoch = EpochDocument::create(cluster.env(), cluster.keys().identity(), cluster.keys().master())?;
    cluster.store().put_once(&layout::epoch(cluster.name(), epoch.epoch_id), document::encode(&epoch)?.into()).await?;
    audit::record(cluster, Event::EpochStarted { epoch_id: epoch.epoch_id }).await?;
    Ok(epoch.epoch_id)
}
