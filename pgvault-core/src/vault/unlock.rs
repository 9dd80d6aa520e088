//! Opening a cluster: its slots, and the one that the configured key fits.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::layout::{self, ClusterName};
use super::{Cluster, Vault, init};
use crate::crypto::keys::{ClusterDocument, ClusterKeys, EpochDocument, MasterKey};
use crate::crypto::slot::{SlotDocument, Unlock};
use crate::format::document;
use crate::{Error, ErrorKind, Result};

/// Documents read at once.
const PARALLEL: usize = 8;

impl Vault {
    /// The key slots of a cluster: those that name its master key, in the order of their ids.
    ///
    /// # Errors
    /// When the store fails, a slot was changed, or there is no such cluster.
    pub async fn slots(&self, cluster: &ClusterName) -> Result<Vec<SlotDocument>> {
        let document = self.cluster_document(cluster).await?.ok_or_else(|| init::unfinished(cluster))?;
        let (slots, mut damaged) = self.readable_slots(cluster, &document).await?;
        if let Some(error) = damaged.pop() {
            return Err(error);
        }
        // Under another's name, a revocation would remove the wrong one.
        let misplaced = slots.iter().find(|(name, slot)| *name != layout::key_slot(cluster, slot.key_id));
        match misplaced {
            Some((name, slot)) => {
                Err(Error::new(ErrorKind::Corrupt, "slot.misplaced", format!("{name} holds the slot of {}", slot.key_id)))
            }
            None => Ok(slots.into_iter().map(|(_, slot)| slot).collect()),
        }
    }

    /// The slots that name the cluster's master key, with their objects' names, and what is wrong with those that cannot be
    /// read: one bad object must not keep everybody out.
    ///
    /// Slots that name another key were left by an `init` that died or came second. Whoever wrote one has no right to delete
    /// it, so it is passed over here, for everybody.
    async fn readable_slots(
        &self,
        cluster: &ClusterName,
        document: &ClusterDocument,
    ) -> Result<(Vec<(String, SlotDocument)>, Vec<Error>)> {
        Ok(sort_slots(self.documents(&layout::keys(cluster)).await?, document))
    }

    /// The small clear documents under a prefix, with their names.
    async fn documents(&self, prefix: &str) -> Result<Vec<(String, Bytes)>> {
        let reading = self.store.list(prefix).await?.into_iter().map(|object| async move {
            match self.store.get(&object.name).await {
                Ok(bytes) => Ok(Some((object.name, bytes))),
                // Revoked since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        });
        let read: Vec<_> = stream::iter(reading.collect::<Vec<_>>()).buffered(PARALLEL).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }

    /// Opens a cluster with the first slot that `unlock` fits and that holds the cluster's master key.
    ///
    /// # Errors
    /// [`ErrorKind::NoVault`] when the cluster's creation was never finished. [`ErrorKind::WrongKey`] when no slot fits; the
    /// message names the keys that would open it. [`ErrorKind::Corrupt`] when none does and a slot is damaged: it may be the
    /// one. With a key service also [`ErrorKind::Storage`] when it does not answer, and [`ErrorKind::Usage`] when it refuses.
    pub async fn unlock(&self, cluster: &ClusterName, unlock: &Unlock) -> Result<Cluster> {
        let identity = self.identity(cluster);
        // All at once: each is small, and a store may be far away.
        let (slots, epochs) = (layout::keys(cluster), layout::epochs(cluster));
        let (document, slots, epoch_documents) =
            tokio::try_join!(self.cluster_document(cluster), self.documents(&slots), self.documents(&epochs))?;
        let document = document.ok_or_else(|| init::unfinished(cluster))?;
        let (slots, mut damaged) = sort_slots(slots, &document);
        for error in &damaged {
            tracing::warn!(%error, "a key slot cannot be used");
        }
        // A slot opens whatever it is called; `check` tells of one that was moved.
        let slots: Vec<SlotDocument> = slots.into_iter().map(|(_, slot)| slot).collect();
        let mut master: Option<MasterKey> = None;
        let (mut trouble, mut refusal) = (None, None);
        for slot in &slots {
            match slot.open(&identity, unlock).await {
                // A slot gives the key that it names and no other, and only slots that name the cluster's are asked: anybody
                // can wrap a key of their own for a recipient, whose public half stands in the clear.
                Ok(Some(opened)) => {
                    master = Some(opened);
                    break;
                }
                Ok(None) => {}
                // The key service is away. It would be so for the next slot, too, for as long again.
                Err(error) if error.is_transient() => {
                    trouble = Some(error);
                    break;
                }
                // About our own key, but not about this slot alone: a forged one must not keep the others from being tried.
                Err(error) if error.kind() == ErrorKind::Usage => drop(refusal.get_or_insert(error)),
                Err(error) => {
                    tracing::warn!(%error, "a key slot cannot be used");
                    damaged.push(error.context(layout::key_slot(cluster, slot.key_id)));
                }
            }
        }
        let Some(master) = master else {
            // While nobody can say whether the key is right, it is not called wrong.
            if let Some(error) = trouble.or(refusal) {
                return Err(error.context(format!("open {cluster}")));
            }
            if let Some(error) = damaged.pop() {
                let others: Vec<String> = slots.iter().map(|s| s.key_id.to_string()).collect();
                return Err(error.with_hint(format!(
                    "restore the slot from the store's versions or a copy of the vault{}",
                    if others.is_empty() { String::new() } else { format!(", or use the key of {}", others.join(", ")) }
                )));
            }
            if slots.is_empty() {
                return Err(Error::new(ErrorKind::Corrupt, "cluster.no_slots", format!("the cluster {cluster} has no key slot"))
                    .with_hint("its slots were deleted: restore them from the store's versions or a copy of the vault"));
            }
            let ids: Vec<String> = slots.iter().map(|s| format!("{} ({}, {})", s.key_id, s.label, s.describe())).collect();
            return Err(Error::new(ErrorKind::WrongKey, "key.wrong", format!("the configured key opens no slot of {cluster}"))
                .with_hint(format!("any of these keys would open it: {}", ids.join("; "))));
        };
        for error in slots.iter().filter_map(|slot| slot.verify(&identity, &master).err()) {
            tracing::warn!(%error, "a key slot is not the cluster's own; `pgvault check` names it");
        }
        let (mut epochs, mut unusable) = (Vec::new(), None);
        for (name, bytes) in epoch_documents {
            match document::parse::<EpochDocument>("epoch", &bytes) {
                Ok(epoch) if name == layout::epoch(cluster, epoch.epoch_id) => epochs.push(epoch),
                // What it sealed cannot be read; what other epochs sealed can.
                Ok(_) => {
                    let what = format!("{name} holds another epoch");
                    let _ = unusable.get_or_insert(Error::new(ErrorKind::Corrupt, "epoch.misplaced", what));
                }
                Err(error) => drop(unusable.get_or_insert(Error::from(error).context(&name))),
            }
        }
        if let Some(error) = &unusable {
            tracing::warn!(%error, "a data key epoch cannot be used");
        }
        let keys = ClusterKeys::open(identity, master, &epochs).map_err(|error| unusable.unwrap_or(error))?;
        Ok(Cluster { vault: self.clone(), name: cluster.clone(), keys: Arc::new(keys) })
    }
}

/// The slots that name the cluster's master key, and what is wrong with those that cannot be read.
fn sort_slots(documents: Vec<(String, Bytes)>, cluster: &ClusterDocument) -> (Vec<(String, SlotDocument)>, Vec<Error>) {
    let (mut slots, mut damaged) = (Vec::new(), Vec::new());
    for (name, bytes) in documents {
        match document::parse::<SlotDocument>("key slot", &bytes) {
            Ok(slot) if slot.commitment == cluster.commitment => slots.push((name, slot)),
            Ok(slot) => tracing::debug!(key = %slot.key_id, "a key slot of another master key is passed over"),
            Err(error) => damaged.push(Error::from(error).context(&name)),
        }
    }
    (slots, damaged)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;
    use crate::crypto::slot::{Method, Wrap};
    use crate::env::Env;
    use crate::inspect::{CheckOptions, check};
    use crate::postgres::SystemId;
    use crate::progress::Silent;
    use crate::store::Store;
    use crate::vault::keyring;

    /// What a later version adds is no damage: it is listed, checked and revoked, and opens nothing.
    #[tokio::test]
    async fn a_slot_of_a_later_kind_is_left_alone() {
        let store = Store::in_memory();
        let (vault, _) = Vault::create(store.clone(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        let unlock = Unlock::Passphrase("correct horse".into());
        let _ = vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap();
        let cluster = vault.unlock(&name, &unlock).await.unwrap();
        let slot = vault.slots(&name).await.unwrap().remove(0);
        let method = r#"{ "type": "tpm", "pcrs": [7, 1], "wrapped": { "b": "", "a": 1 } }"#;
        let method = Method::Other(serde_json::from_str(method).unwrap());
        // As the later version makes it. It sorts first.
        let mut later = SlotDocument { key_id: ulid::Ulid(1), method, ..slot };
        let sum = later.checksum(cluster.keys().identity(), cluster.keys().master()).unwrap();
        later.check = base64::engine::general_purpose::STANDARD.encode(sum);
        store.put_once(&layout::key_slot(&name, later.key_id), document::encode(&later).unwrap().into()).await.unwrap();

        let listed = vault.slots(&name).await.unwrap();
        assert!(listed[0].describe().contains("\"tpm\""), "{}", listed[0].describe());
        assert!(vault.unlock(&name, &unlock).await.is_ok());
        let report = check(&cluster, &CheckOptions { sizes_only: false, progress: Arc::new(Silent) }).await.unwrap();
        assert!(report.findings.iter().all(|finding| !finding.problem.contains("not made by a holder")), "{report:?}");
        assert!(!report.has_errors(), "{report:?}");
        keyring::revoke(&cluster, later.key_id).await.unwrap();
        assert_eq!(vault.slots(&name).await.unwrap().len(), 1);
        // A known kind with a field that it does not have is damage, as ever.
        let known = serde_json::json!({ "type": "x25519", "recipient": "", "wrapped": "", "more": 1 });
        assert!(serde_json::from_value::<Method>(known).is_err());
        assert!(serde_json::from_value::<Method>(serde_json::json!({ "wrapped": "" })).is_err());
    }
}
