//! A vault with features that this version does not know.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use std::sync::Arc;

use object_store::memory::InMemory;
use pgvault_core::crypto::keys::{ClusterDocument, EpochDocument, Identity, MasterKey, cluster_id};
use pgvault_core::crypto::slot::{SlotDocument, Unlock, Wrap};
use pgvault_core::format::document;
use pgvault_core::inspect::{CheckOptions, check, scrub};
use pgvault_core::postgres::{SystemId, WalFileName};
use pgvault_core::progress::Silent;
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::objects_of;
use pgvault_core::vault::features::Purpose;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault, VaultDocument, audit, keyring, layout, snapshot};
use pgvault_core::wal::fetch::contents;
use pgvault_core::wal::object::{self, seal_file};
use pgvault_core::{Error, ErrorKind};
use sha2::{Digest, Sha256};
use ulid::Ulid;

const HISTORY: &[u8] = b"1\t0/F0000000\tno recovery target specified\n";

fn name() -> ClusterName {
    ClusterName::new("main", SystemId(7)).unwrap()
}

fn key() -> Unlock {
    Unlock::Passphrase("correct horse".into())
}

/// A vault that a later version made, with a feature `x` in `list` and a cluster.
async fn vault_with(list: &str) -> (Arc<InMemory>, Store) {
    let (memory, env) = (Arc::new(InMemory::new()), fixed::env("features"));
    let store = Store::new(memory.clone(), "memory:///", StoreOptions::default());
    let (vault, _) = Vault::create(store.clone(), env.clone()).await.unwrap();
    let mut written: VaultDocument = vault.document().clone();
    written.features.entry(list.into()).or_default().push("x".into());
    let bytes = document::encode(&written).unwrap();
    let identity = Identity {
        vault_id: written.vault_id.to_bytes(),
        cluster_id: cluster_id("main", 7),
        vault_document: Sha256::digest(&bytes).into(),
    };
    let master = MasterKey::generate(&env).unwrap();
    let slot = SlotDocument::create(&env, &identity, &master, &Wrap::Passphrase("correct horse".into()), "init").await.unwrap();
    let epoch = EpochDocument::create(&env, &identity, &master).unwrap();
    let cluster = ClusterDocument::create(&env, &identity, &master);
    store.delete(layout::VAULT_DOCUMENT).await.unwrap();
    for (object, bytes) in [
        (layout::VAULT_DOCUMENT.to_owned(), bytes),
        (layout::key_slot(&name(), slot.key_id), document::encode(&slot).unwrap()),
        (layout::epoch(&name(), epoch.epoch_id), document::encode(&epoch).unwrap()),
        (layout::cluster_document(&name()), document::encode(&cluster).unwrap()),
    ] {
        store.put_once(&object, bytes.into()).await.unwrap();
    }
    (memory, store)
}

fn refused<T: std::fmt::Debug>(what: Result<T, Error>) {
    let error = what.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Unsupported, "vault.feature"), "{error:?}");
    assert!(error.to_string().contains("`x`") && error.hint().is_some(), "{error:?}");
}

/// Everything that creates or deletes.
async fn assert_writes_refused(cluster: &Cluster, memory: &Arc<InMemory>, store: &Store) {
    let before = objects_of(&**memory).await;
    let (vault, wrap) = (cluster.vault(), Wrap::Passphrase("another".into()));
    refused(Vault::create(store.clone(), fixed::env("again")).await);
    refused(vault.create_cluster(&ClusterName::new("other", SystemId(8)).unwrap(), std::slice::from_ref(&wrap)).await);
    refused(keyring::record_creation(cluster).await);
    refused(keyring::add(cluster, &wrap, "new").await);
    refused(keyring::start_epoch(cluster).await);
    refused(audit::record(cluster, audit::Event::BackupExpired { backup_id: Ulid(1), committed: None }).await);
    let history = &seal_file(cluster, "00000003.history".parse().unwrap(), HISTORY).unwrap()[0];
    refused(cluster.put(history).await);
    refused(object::put(cluster, history, HISTORY).await);
    refused(cluster.store().delete(&layout::cluster_document(cluster.name())).await);
    assert_eq!(objects_of(&**memory).await, before);
}

#[tokio::test(flavor = "current_thread")]
async fn an_unknown_feature_for_readers_refuses_everything() {
    for list in ["read", "a list of a later version"] {
        let (memory, store) = vault_with(list).await;
        let before = objects_of(&*memory).await;
        refused(Vault::open(store.clone(), fixed::env("later")).await);
        refused(Vault::create(store, fixed::env("later")).await);
        assert_eq!(objects_of(&*memory).await, before);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_unknown_feature_for_writers_lets_everything_be_read() {
    let (memory, store) = vault_with("write").await;
    let vault = Vault::open(store.clone(), fixed::env("later")).await.unwrap();
    refused(vault.ensure_may(Purpose::Write));
    refused(vault.ensure_may(Purpose::CollectGarbage));
    let cluster = vault.unlock(&name(), &key()).await.unwrap();
    // As the later version would: past this vault.
    let history: WalFileName = "00000002.history".parse().unwrap();
    let sealed = &seal_file(&cluster, history, HISTORY).unwrap()[0];
    store.put_once(&cluster.path(&sealed.name), sealed.bytes.clone()).await.unwrap();

    assert_eq!(vault.clusters().await.unwrap(), [name()]);
    assert_eq!(vault.slots(&name()).await.unwrap().len(), 1);
    assert!(snapshot::list(&cluster).await.unwrap().snapshots.is_empty());
    assert_eq!(contents(&cluster, history).await.unwrap().unwrap(), HISTORY);
    let options = CheckOptions { sizes_only: false, progress: Arc::new(Silent) };
    assert!(check(&cluster, &options).await.unwrap().findings.is_empty());
    assert!(scrub(&vault, None, &options.progress).await.unwrap().findings.is_empty());
    assert_writes_refused(&cluster, &memory, &store).await;
}

#[tokio::test(flavor = "current_thread")]
async fn an_unknown_feature_for_collectors_refuses_only_to_collect() {
    let (_, store) = vault_with("gc").await;
    let (vault, created) = Vault::create(store, fixed::env("later")).await.unwrap();
    assert!(!created);
    refused(vault.ensure_may(Purpose::CollectGarbage));
    vault.ensure_may(Purpose::Write).unwrap();
    let cluster = vault.unlock(&name(), &key()).await.unwrap();
    assert!(keyring::record_creation(&cluster).await.unwrap());
    let added = keyring::add(&cluster, &Wrap::Passphrase("another".into()), "new").await.unwrap();
    keyring::revoke(&cluster, added.key_id).await.unwrap();
    let other = ClusterName::new("other", SystemId(8)).unwrap();
    assert!(vault.create_cluster(&other, &[Wrap::Passphrase("another".into())]).await.unwrap());
}
