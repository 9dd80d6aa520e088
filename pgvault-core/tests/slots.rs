//! Key slots that somebody without the master key wrote.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use pgvault_core::ErrorKind;
use pgvault_core::crypto::keys::{EpochDocument, MasterKey};
use pgvault_core::crypto::slot::{SlotDocument, Unlock, Wrap};
use pgvault_core::format::document;
use pgvault_core::inspect::{CheckOptions, Severity, check};
use pgvault_core::postgres::SystemId;
use pgvault_core::progress::Silent;
use pgvault_core::store::Store;
use pgvault_core::vault::Vault;
use pgvault_core::vault::layout::{self, ClusterName};
use secrecy::ExposeSecret;

/// The recipient of an X25519 slot is public: who can write to the store can wrap a master key of their own for it. Which key
/// is the cluster's stands in `cluster.json`.
#[tokio::test(flavor = "current_thread")]
async fn a_slot_with_a_foreign_master_key_is_passed_over() {
    let (store, env) = (Store::in_memory(), fixed::env("slots"));
    let (vault, _) = Vault::create(store.clone(), env.clone()).await.unwrap();
    let name = ClusterName::new("main", SystemId(7)).unwrap();
    let identity = age::x25519::Identity::generate();
    let recipient = Wrap::Recipient(identity.to_public().to_string());
    let unlock = Unlock::Identity(identity.to_string().expose_secret().into());
    let passphrase = Wrap::Passphrase("correct horse".into());
    let _ = vault.create_cluster(&name, &[recipient.clone(), passphrase]).await.unwrap();
    let cluster = vault.unlock(&name, &unlock).await.unwrap();

    let master = MasterKey::generate(&env).unwrap();
    let epoch = EpochDocument::create(&env, cluster.keys().identity(), &master).unwrap();
    let mut slot = SlotDocument::create(&env, cluster.keys().identity(), &master, &recipient, "init").await.unwrap();
    // The forger chooses the name, to be tried first.
    slot.key_id = ulid::Ulid(1);
    store.put_once(&layout::epoch(&name, epoch.epoch_id), document::encode(&epoch).unwrap().into()).await.unwrap();
    store.put_once(&layout::key_slot(&name, slot.key_id), document::encode(&slot).unwrap().into()).await.unwrap();
    // One that claims to hold the cluster's key: the claim is public.
    let mut claiming = SlotDocument::create(&env, cluster.keys().identity(), &master, &recipient, "init").await.unwrap();
    claiming.key_id = ulid::Ulid(2);
    claiming.commitment = cluster.keys().master().commitment(cluster.keys().identity());
    store.put_once(&layout::key_slot(&name, claiming.key_id), document::encode(&claiming).unwrap().into()).await.unwrap();
    for unlock in [&unlock, &Unlock::Passphrase("correct horse".into())] {
        let opened = vault.unlock(&name, unlock).await.unwrap();
        assert!(opened.keys().master().is(cluster.keys().master()));
    }
    let options = CheckOptions { sizes_only: false, progress: std::sync::Arc::new(Silent) };
    let report = check(&cluster, &options).await.unwrap();
    let about = |id| report.findings.iter().find(|f| f.object == layout::key_slot(&name, id)).map(|f| f.severity);
    assert_eq!(about(slot.key_id), Some(Severity::Warning), "it opens nothing");
    assert_eq!(about(claiming.key_id), Some(Severity::Error), "it pretends to open the cluster");

    // Without the genuine ones nothing opens: never the forger's key.
    for genuine in vault.slots(&name).await.unwrap() {
        if genuine.key_id != claiming.key_id {
            store.delete(&layout::key_slot(&name, genuine.key_id)).await.unwrap();
        }
    }
    let error = vault.unlock(&name, &unlock).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&claiming.key_id.to_string()), "{error:?}");
}

/// A slot is found under its own name only.
#[tokio::test(flavor = "current_thread")]
async fn a_copied_slot_is_refused() {
    let (store, env) = (Store::in_memory(), fixed::env("slots"));
    let (vault, _) = Vault::create(store.clone(), env.clone()).await.unwrap();
    let name = ClusterName::new("main", SystemId(7)).unwrap();
    let _ = vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap();
    let slot = vault.slots(&name).await.unwrap().remove(0);
    store.put_once(&layout::key_slot(&name, ulid::Ulid(1)), document::encode(&slot).unwrap().into()).await.unwrap();
    assert_eq!(vault.slots(&name).await.unwrap_err().code(), "slot.misplaced");
    assert!(vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.is_ok());
}
