//! Adding and revoking ways into a cluster. Slots are rewritten, data never.

use ulid::Ulid;

use super::audit::{self, Event};
use super::{Cluster, layout};
use crate::crypto::keys::EpochDocument;
use crate::crypto::slot::{Method, SlotDocument, Unlock, Wrap};
use crate::format::document;
use crate::{Error, ErrorKind, Result};

/// Adds a slot for another passphrase or recipient.
///
/// # Errors
/// When the store fails or the key is unusable.
pub async fn add(cluster: &Cluster, wrap: &Wrap, label: &str) -> Result<SlotDocument> {
    let slot = SlotDocument::create(cluster.env(), cluster.keys().identity(), cluster.keys().master(), wrap, label)?;
    cluster.store().put_once(&layout::key_slot(cluster.name(), slot.key_id), document::encode(&slot)?.into()).await?;
    audit::record(cluster, Event::KeyAdded { key_id: slot.key_id }).await?;
    Ok(slot)
}

/// Finishes the creation of a cluster: adds the slots that an interrupted one did not get to, and records the creation.
///
/// Does nothing to a cluster whose creation is recorded, so that a key that was revoked later does not come back. Returns
/// the slots that were missing.
///
/// # Errors
/// When the store fails or a key is unusable.
pub async fn complete(cluster: &Cluster, wraps: &[Wrap]) -> Result<Vec<SlotDocument>> {
    let records = audit::all(cluster).await?;
    if records.iter().any(|record| matches!(record.event, Event::ClusterCreated { .. })) {
        return Ok(Vec::new());
    }
    let mut slots = cluster.vault().slots(cluster.name()).await?;
    let mut added = Vec::new();
    for wrap in wraps {
        if has_slot(cluster, &slots, wrap).await? {
            continue;
        }
        let slot = SlotDocument::create(cluster.env(), cluster.keys().identity(), cluster.keys().master(), wrap, "init")?;
        cluster.store().put_once(&layout::key_slot(cluster.name(), slot.key_id), document::encode(&slot)?.into()).await?;
        slots.push(slot.clone());
        added.push(slot);
    }
    audit::record(cluster, Event::ClusterCreated { key_ids: slots.iter().map(|slot| slot.key_id).collect() }).await?;
    Ok(added)
}

/// True when one of the slots was made for this key.
async fn has_slot(cluster: &Cluster, slots: &[SlotDocument], wrap: &Wrap) -> Result<bool> {
    let passphrase = match wrap {
        Wrap::Recipient(wanted) => {
            return Ok(slots.iter().any(|s| matches!(&s.method, Method::X25519 { recipient, .. } if recipient == wanted)));
        }
        Wrap::Passphrase(passphrase) => Unlock::Passphrase(passphrase.clone()),
    };
    for slot in slots {
        let (slot, unlock, identity) = (slot.clone(), passphrase.clone(), *cluster.keys().identity());
        let opened = tokio::task::spawn_blocking(move || slot.open(&identity, &unlock)).await;
        if opened.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes a slot. The last one cannot be removed: nothing could ever be read again.
///
/// This takes away a way in for the future. Whoever opened the slot before, or kept a copy of it, knows the master key.
///
/// # Errors
/// When there is no such slot, it is the last, or the store refuses to delete.
pub async fn revoke(cluster: &Cluster, key_id: Ulid) -> Result<()> {
    let slots = cluster.vault().slots(cluster.name()).await?;
    if !slots.iter().any(|s| s.key_id == key_id) {
        return Err(Error::new(ErrorKind::Usage, "key.unknown", format!("{} has no key slot {key_id}", cluster.name()))
            .with_hint("`pgvault key list` shows the slots"));
    }
    if slots.len() == 1 {
        return Err(Error::new(ErrorKind::Usage, "key.last", format!("{key_id} is the only key slot of {}", cluster.name()))
            .with_hint("add another key first with `pgvault key add`"));
    }
    audit::record(cluster, Event::KeyRevoked { key_id }).await?;
    cluster.store().delete(&layout::key_slot(cluster.name(), key_id)).await
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
