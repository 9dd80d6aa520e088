//! Key slots that somebody without the master key wrote.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pgvault_core::crypto::aead::KEY_LEN;
use pgvault_core::crypto::keys::{EpochDocument, MasterKey};
use pgvault_core::crypto::kms::{Binding, KeyName, Kms, Wrapped};
use pgvault_core::crypto::slot::{SlotDocument, Unlock, Wrap};
use pgvault_core::format::document;
use pgvault_core::inspect::{CheckOptions, Severity, check};
use pgvault_core::postgres::SystemId;
use pgvault_core::progress::Silent;
use pgvault_core::store::Store;
use pgvault_core::vault::Vault;
use pgvault_core::vault::layout::{self, ClusterName};
use pgvault_core::{Error, ErrorKind, Result};
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

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

/// A key service of this process: it hands back what it was given, as long as the slot is the same.
#[derive(Debug)]
struct Service {
    name: KeyName,
    kept: Mutex<Vec<(Vec<u8>, [u8; KEY_LEN])>>,
    trouble: Mutex<Option<ErrorKind>>,
    asked: AtomicUsize,
}

impl Service {
    fn new(key: &str) -> Arc<Self> {
        let name = format!("vault-transit:transit/{key}").parse().unwrap();
        Arc::new(Self { name, kept: Mutex::default(), trouble: Mutex::default(), asked: AtomicUsize::new(0) })
    }

    fn fail(&self, kind: Option<ErrorKind>) {
        *self.trouble.lock().unwrap() = kind;
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

#[async_trait::async_trait]
impl Kms for Service {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], binding: &Binding) -> Result<Wrapped> {
        let mut kept = self.kept.lock().unwrap();
        kept.push((binding.bytes(), *key));
        Ok(Wrapped { version: String::new(), text: (kept.len() - 1).to_string() })
    }

    async fn unwrap(&self, wrapped: &Wrapped, binding: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        let _ = self.asked.fetch_add(1, Ordering::Relaxed);
        if let Some(kind) = *self.trouble.lock().unwrap() {
            return Err(Error::new(kind, "kms.test", "the service has trouble"));
        }
        let kept = self.kept.lock().unwrap();
        let found = wrapped.text.parse::<usize>().ok().and_then(|at| kept.get(at)).filter(|(bound, _)| *bound == binding.bytes());
        let (_, key) = found.ok_or_else(|| Error::new(ErrorKind::WrongKey, "kms.refused", "not of this key and binding"))?;
        Ok(Zeroizing::new(key.to_vec()))
    }
}

/// A key service opens the slots that name its key; trouble with it is trouble, and a forged slot is only a detour.
#[tokio::test(flavor = "current_thread")]
async fn a_key_service_is_asked_for_its_own_slots_only() {
    let (store, env) = (Store::in_memory(), fixed::env("slots"));
    let (vault, _) = Vault::create(store.clone(), env.clone()).await.unwrap();
    let name = ClusterName::new("main", SystemId(7)).unwrap();
    let (own, other) = (Service::new("own"), Service::new("other"));
    let wraps = [Wrap::Kms(other.clone()), Wrap::Kms(own.clone()), Wrap::Passphrase("correct horse".into())];
    let _ = vault.create_cluster(&name, &wraps).await.unwrap();
    let unlock = Unlock::Kms(own.clone());
    let cluster = vault.unlock(&name, &unlock).await.unwrap();
    assert_eq!((own.asked(), other.asked()), (1, 0));

    // First in order, and claiming what anybody can read.
    let master = MasterKey::generate(&env).unwrap();
    let mut forged = SlotDocument::create(&env, cluster.keys().identity(), &master, &Wrap::Kms(own.clone()), "x").await.unwrap();
    forged.key_id = ulid::Ulid(1);
    forged.commitment = cluster.keys().master().commitment(cluster.keys().identity());
    store.put_once(&layout::key_slot(&name, forged.key_id), document::encode(&forged).unwrap().into()).await.unwrap();
    assert!(vault.unlock(&name, &unlock).await.is_ok());
    assert_eq!(own.asked(), 2);

    // Away: one question, and neither a wrong key nor damage.
    own.fail(Some(ErrorKind::Storage));
    let error = vault.unlock(&name, &unlock).await.unwrap_err();
    assert_eq!((error.kind(), error.code(), own.asked()), (ErrorKind::Storage, "kms.test", 1));
    assert!(vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.is_ok(), "another key opens meanwhile");
    // Refused: every slot is tried, because the refusal may be about the forged one alone.
    own.fail(Some(ErrorKind::Usage));
    let error = vault.unlock(&name, &unlock).await.unwrap_err();
    assert_eq!((error.kind(), own.asked()), (ErrorKind::Usage, 2));
    own.fail(None);
    for slot in vault.slots(&name).await.unwrap() {
        if slot.key_id != forged.key_id {
            store.delete(&layout::key_slot(&name, slot.key_id)).await.unwrap();
        }
    }
    let error = vault.unlock(&name, &unlock).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongKey, "the service says that the forged one is none of its own");
    let error = vault.unlock(&name, &Unlock::Kms(other.clone())).await.unwrap_err();
    assert_eq!((error.code(), other.asked()), ("key.wrong", 0));
}
