//! Creating a cluster: one master key, whoever else creates it at the same moment and whoever dies on the way.
//!
//! Slots and the first epoch come first, under names of their own. Then `cluster.json`, whose name is fixed and which is
//! created once: it names the master key, and with it the slots that count. Whoever comes second finds the name taken and
//! goes on with the key of the first; what they wrote names another key and is passed over. Whoever dies before the commit
//! leaves only such objects, so the next `init` begins anew.

use super::Vault;
use super::layout::{self, ClusterName};
use crate::crypto::keys::{ClusterDocument, EpochDocument, MasterKey};
use crate::crypto::slot::{SlotDocument, Wrap};
use crate::format::document;
use crate::store::Put;
use crate::{Error, ErrorKind, Result};

impl Vault {
    /// Creates a cluster with one slot for each of `wraps`, or leaves an existing one alone; tells which.
    ///
    /// All slots are there before the cluster is, so one that was created opens with each of `wraps`. One that was there
    /// already, or that somebody else created at the same moment, opens with their keys.
    ///
    /// # Errors
    /// When the store fails or a key is unusable; the same call may be repeated. [`ErrorKind::Corrupt`] when the cluster's
    /// document was deleted or damaged.
    pub async fn create_cluster(&self, cluster: &ClusterName, wraps: &[Wrap]) -> Result<bool> {
        if self.cluster_document(cluster).await?.is_some() {
            return Ok(false);
        }
        if wraps.is_empty() {
            return Err(Error::new(
                ErrorKind::Usage,
                "key.none",
                "a cluster needs at least one key: a passphrase, an X25519 recipient or a key in a key service",
            ));
        }
        if self.holds_sealed_objects(cluster).await? {
            // Nothing is sealed before the document is there. So either somebody created the cluster since we looked, or the
            // document was deleted; a new key would then make everything else unreadable for good.
            return match self.cluster_document(cluster).await? {
                Some(_) => Ok(false),
                None => Err(Error::new(
                    ErrorKind::Corrupt,
                    "cluster.document_missing",
                    format!("{} is missing, but the cluster has data", layout::cluster_document(cluster)),
                )
                .with_hint("restore it from the store's versions or a copy of the vault")),
            };
        }
        let identity = self.identity(cluster);
        let master = MasterKey::generate(&self.env)?;
        let epoch = EpochDocument::create(&self.env, &identity, &master)?;
        let mut slots = Vec::with_capacity(wraps.len());
        for wrap in wraps {
            slots.push(SlotDocument::create(&self.env, &identity, &master, wrap, "init").await?);
        }
        let commit = ClusterDocument::create(&self.env, &identity, &master);
        for slot in slots {
            self.store.put_once(&layout::key_slot(cluster, slot.key_id), document::encode(&slot)?.into()).await?;
        }
        self.store.put_once(&layout::epoch(cluster, epoch.epoch_id), document::encode(&epoch)?.into()).await?;
        match self.store.put_new(&layout::cluster_document(cluster), document::encode(&commit)?.into()).await? {
            Put::Created | Put::Same => Ok(true),
            Put::Different(_) => {
                tracing::info!(%cluster, "another `init` created the cluster at the same moment");
                Ok(false)
            }
        }
    }

    /// The cluster's document; `None` when its creation was never finished.
    ///
    /// # Errors
    /// When the store fails, or the document was changed or is of a newer version.
    pub async fn cluster_document(&self, cluster: &ClusterName) -> Result<Option<ClusterDocument>> {
        let name = layout::cluster_document(cluster);
        let Some(bytes) = self.store.get_agreed(&name).await? else { return Ok(None) };
        ClusterDocument::parse(&bytes)
            .map(Some)
            .map_err(|e| Error::from(e).context(&name).with_hint("restore it from the store's versions or a copy of the vault"))
    }

    async fn holds_sealed_objects(&self, cluster: &ClusterName) -> Result<bool> {
        let prefix = cluster.prefix();
        let listed = self.store.list(&prefix).await?;
        Ok(listed.iter().any(|object| object.name.strip_prefix(&prefix).is_some_and(|name| !layout::is_clear(name))))
    }
}

/// What to say of a cluster without a document.
pub(super) fn unfinished(cluster: &ClusterName) -> Error {
    let name = layout::cluster_document(cluster);
    Error::new(ErrorKind::NoVault, "cluster.unfinished", format!("the cluster {cluster} was never finished: there is no {name}"))
        .with_hint("run `pgvault init`; if it held backups, the object was deleted: restore it from the store's versions")
}
