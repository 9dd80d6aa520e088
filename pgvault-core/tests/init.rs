//! Creating a cluster: whoever races, whoever dies and wherever, one master key results, and a repeated `init` works.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use futures::future::join_all;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use pgvault_core::crypto::keys::{ClusterDocument, MasterKey};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::format::document;
use pgvault_core::inspect::{CheckOptions, Severity, check, scrub};
use pgvault_core::postgres::SystemId;
use pgvault_core::progress::Silent;
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Fault, FaultyStore, Objects, from_objects, objects_of};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Vault, audit, keyring, layout};
use pgvault_core::{ErrorKind, Result};
use ulid::Ulid;

/// What an operator configured.
#[derive(Debug, Clone)]
enum Key {
    Passphrase(&'static str),
    Identity { secret: String, recipient: String },
}

impl Key {
    fn identity() -> Self {
        let identity = age::x25519::Identity::generate();
        Self::Identity { secret: identity.to_string().expose_secret().to_owned(), recipient: identity.to_public().to_string() }
    }

    fn wrap(&self) -> Wrap {
        match self {
            Self::Passphrase(phrase) => Wrap::Passphrase((*phrase).into()),
            Self::Identity { recipient, .. } => Wrap::Recipient(recipient.clone()),
        }
    }

    fn unlock(&self) -> Unlock {
        match self {
            Self::Passphrase(phrase) => Unlock::Passphrase((*phrase).into()),
            Self::Identity { secret, .. } => Unlock::Identity(secret.clone().into()),
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn cluster_name() -> ClusterName {
    ClusterName::new("main", SystemId(7)).unwrap()
}

fn over(inner: Arc<dyn ObjectStore>, timeout: Duration) -> Store {
    Store::new(
        inner,
        "test",
        StoreOptions { attempts: 2, request_timeout: timeout, backoff: Duration::from_millis(1), ..StoreOptions::default() },
    )
}

fn patient(inner: Arc<dyn ObjectStore>) -> Store {
    over(inner, Duration::from_secs(60))
}

/// All that `pgvault init` does to a vault, and an object sealed with the key that it came to believe in. Gives that key's name.
async fn init(store: Store, key: &Key) -> Result<String> {
    let (vault, _) = Vault::create(store, Env::default()).await?;
    let _ = vault.create_cluster(&cluster_name(), &[key.wrap()]).await?;
    let cluster = vault.unlock(&cluster_name(), &key.unlock()).await?;
    let _ = keyring::record_creation(&cluster).await?;
    audit::record(&cluster, audit::Event::BackupExpired { backup_id: Ulid(1), committed: None }).await?;
    Ok(cluster.keys().master().commitment(cluster.keys().identity()))
}

/// What must hold afterwards: another `init` works, every one that came to its end used the same key as it, and everything in
/// the vault opens with that key.
async fn judge(healthy: &Arc<dyn ObjectStore>, keys: &[&Key], said: Vec<Result<String>>, why: &str) {
    let before = said.len();
    // Whoever configured the key that won goes on; the others are told.
    let mut used = BTreeSet::new();
    let mut winners = Vec::new();
    for key in keys {
        match init(patient(healthy.clone()), key).await {
            Ok(name) => {
                let _ = used.insert(name);
                winners.push(*key);
            }
            Err(error) if keys.len() > 1 => assert_eq!(error.kind(), ErrorKind::WrongKey, "{why}: {error:?}"),
            Err(error) => panic!("{why}: a repeated init fails: {error:?}"),
        }
    }
    assert!(!winners.is_empty(), "{why}: no key opens the cluster");
    used.extend(said.into_iter().flatten());
    assert_eq!(used.len(), 1, "{why}: {before} inits used {} master keys", used.len());
    for key in winners {
        let vault = Vault::open(patient(healthy.clone()), Env::default()).await.unwrap();
        let cluster = vault.unlock(&cluster_name(), &key.unlock()).await.unwrap();
        let options = CheckOptions { sizes_only: false, progress: Arc::new(Silent) };
        let report = check(&cluster, &options).await.unwrap();
        let leftover = |problem: &str| problem.contains("an `init` that died or came second leaves such a one");
        for finding in &report.findings {
            assert!(finding.severity == Severity::Warning && leftover(&finding.problem), "{why}: {finding:?}");
        }
        assert!(!scrub(&vault, None, &(Arc::new(Silent) as _)).await.unwrap().has_errors(), "{why}");
        // Every slot that is shown is one of the cluster's.
        for slot in vault.slots(&cluster_name()).await.unwrap() {
            slot.verify(cluster.keys().identity(), cluster.keys().master()).unwrap();
        }
    }
}

/// H1: machines that run `init` at the same moment must not each make a master key of their own.
#[test]
fn h1_inits_at_the_same_moment_agree_on_one_key() {
    runtime().block_on(async {
        let identity = Key::identity();
        for (key, racers, rounds) in [(&identity, 8, 25), (&Key::Passphrase("correct horse"), 4, 4)] {
            for round in 0..rounds {
                for local in [false, true] {
                    let folder = tempfile::tempdir().unwrap();
                    let healthy: Arc<dyn ObjectStore> = if local {
                        Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap())
                    } else {
                        Arc::new(InMemory::new())
                    };
                    let inits = (0..racers).map(|_| {
                        let (store, key) = (patient(healthy.clone()), key.clone());
                        tokio::spawn(async move { init(store, &key).await })
                    });
                    let said: Vec<_> = join_all(inits).await.into_iter().map(|joined| joined.unwrap()).collect();
                    let why = format!("{key:?}, round {round}, local {local}");
                    for one in &said {
                        assert!(one.is_ok(), "{why}: {one:?}");
                    }
                    judge(&healthy, &[key], said, &why).await;
                }
            }
        }
    });
}

/// Two operators, each with a key of their own: one becomes the cluster's, the other is told so.
#[test]
fn of_inits_with_different_keys_one_wins_and_the_others_are_told() {
    runtime().block_on(async {
        for round in 0..10 {
            let keys = [Key::identity(), Key::identity(), Key::identity()];
            let healthy: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let inits = keys.iter().map(|key| {
                let (store, key) = (patient(healthy.clone()), key.clone());
                tokio::spawn(async move { init(store, &key).await })
            });
            let said: Vec<_> = join_all(inits).await.into_iter().map(|joined| joined.unwrap()).collect();
            assert_eq!(said.iter().filter(|one| one.is_ok()).count(), 1, "round {round}: {said:?}");
            for error in said.iter().filter_map(|one| one.as_ref().err()) {
                assert_eq!((error.kind(), error.code()), (ErrorKind::WrongKey, "key.wrong"), "round {round}: {error:?}");
            }
            judge(&healthy, &keys.iter().collect::<Vec<_>>(), said, &format!("round {round}")).await;
        }
    });
}

/// The requests that an `init` makes in an empty store, by number: all of its own, and one in twelve of the probe's, which come
/// first and touch nothing but objects of no use.
async fn requests(key: &Key) -> Vec<usize> {
    let faulty = FaultyStore::new(Arc::new(InMemory::new()));
    let _ = init(patient(Arc::new(faulty.clone())), key).await.unwrap();
    let calls = faulty.calls();
    let of_probe = |call: &String| call.contains(" probe/");
    calls.iter().enumerate().filter(|(n, call)| !of_probe(call) || n % 12 == 0).map(|(n, _)| n + 1).collect()
}

/// An `init` that dies at any request, in any way, leaves a vault in which the next one works.
#[test]
fn an_init_that_dies_anywhere_can_be_repeated() {
    runtime().block_on(async {
        for key in [Key::identity(), Key::Passphrase("correct horse")] {
            let all = requests(&key).await;
            let sample = matches!(key, Key::Passphrase(_));
            for at in all {
                for (fault, onwards) in Fault::ALL.into_iter().flat_map(|fault| [(fault, true), (fault, false)]) {
                    if sample && !(onwards && matches!(fault, Fault::Fail | Fault::Lie)) {
                        continue;
                    }
                    let healthy: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
                    let faulty = FaultyStore::new(healthy.clone());
                    faulty.inject(fault, at, onwards);
                    let timeout = Duration::from_millis(if fault == Fault::Hang { 30 } else { 60_000 });
                    let said = init(over(Arc::new(faulty.clone()), timeout), &key).await;
                    let why = format!("{key:?}: {fault:?} at {at}, onwards {onwards} ({:?})", faulty.calls().get(at - 1));
                    assert!(
                        said.is_err() || !onwards || fault.is_harmless() || at > faulty.calls().len(),
                        "{why}: a fault was overlooked"
                    );
                    judge(&healthy, &[&key], vec![said], &why).await;
                }
            }
        }
    });
}

/// Who dies while the other runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dies {
    Nobody,
    /// The one that waits, when it goes on.
    First(usize),
    /// The one that runs in between.
    Second(usize),
}

/// The first `init` stops before its request `hold`; the second runs; the first goes on.
async fn interleaved(keys: [&Key; 2], hold: usize, dies: Dies, fault: Fault) {
    let why = format!("the first waits before {hold}, dies: {dies:?} by {fault:?}");
    let healthy: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let [first, second] = [FaultyStore::new(healthy.clone()), FaultyStore::new(healthy.clone())];
    match dies {
        Dies::Nobody => {}
        Dies::First(at) => first.inject(fault, at, true),
        Dies::Second(at) => second.inject(fault, at, true),
    }
    first.hold(hold);
    let (store, key) = (patient(Arc::new(first.clone())), keys[0].clone());
    let waiting = tokio::spawn(async move { init(store, &key).await });
    first.held().await;
    let in_between = init(patient(Arc::new(second.clone())), keys[1]).await;
    first.release();
    let said = vec![waiting.await.unwrap(), in_between];
    let same = std::ptr::eq(keys[0], keys[1]);
    if dies == Dies::Nobody && same {
        assert!(said.iter().all(Result::is_ok), "{why}: {said:?}");
    }
    let keys = if same { vec![keys[0]] } else { keys.to_vec() };
    judge(&healthy, &keys, said, &why).await;
}

#[test]
fn two_inits_interleaved_at_any_request_agree_on_one_key() {
    runtime().block_on(async {
        let (one, other, phrase) = (Key::identity(), Key::identity(), Key::Passphrase("correct horse"));
        let all = requests(&one).await;
        for hold in all {
            interleaved([&one, &one], hold, Dies::Nobody, Fault::Fail).await;
            interleaved([&one, &other], hold, Dies::Nobody, Fault::Fail).await;
            interleaved([&phrase, &phrase], hold, Dies::Nobody, Fault::Fail).await;
        }
    });
}

#[test]
fn an_init_that_dies_anywhere_in_a_race_disturbs_nobody() {
    runtime().block_on(async {
        let key = Key::identity();
        let all = requests(&key).await;
        for &hold in &all {
            for fault in [Fault::Fail, Fault::Lie] {
                for &at in &all {
                    interleaved([&key, &key], hold, Dies::Second(at), fault).await;
                    if at >= hold {
                        interleaved([&key, &key], hold, Dies::First(at), fault).await;
                    }
                }
            }
        }
    });
}

/// Revoking counts only slots that open the cluster, so what a lost race left does not stand in for the last one.
#[test]
fn the_last_slot_is_the_last_whatever_lost_races_left() {
    runtime().block_on(async {
        let (key, other) = (Key::identity(), Key::identity());
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        // Dies at the commit, and leaves a slot and an epoch.
        let faulty = FaultyStore::new(memory.clone());
        let _ = init(patient(Arc::new(faulty.clone())), &key).await.unwrap();
        let commit = 1 + faulty.calls().iter().position(|call| call.ends_with("cluster.json") && call.starts_with("put")).unwrap();
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let faulty = FaultyStore::new(memory.clone());
        faulty.inject(Fault::Deny, commit, true);
        assert!(init(patient(Arc::new(faulty)), &other).await.is_err());
        let _ = init(patient(memory.clone()), &key).await.unwrap();
        let (vault, name) = (Vault::open(patient(memory.clone()), Env::default()).await.unwrap(), cluster_name());
        assert_eq!(vault.store().list(&layout::keys(&name)).await.unwrap().len(), 2);
        assert_eq!(vault.unlock(&name, &other.unlock()).await.unwrap_err().kind(), ErrorKind::WrongKey);
        let cluster = vault.unlock(&name, &key.unlock()).await.unwrap();
        let slots = vault.slots(&name).await.unwrap();
        assert_eq!(slots.len(), 1, "the slot of the dead is not shown");
        assert_eq!(keyring::revoke(&cluster, slots[0].key_id).await.unwrap_err().code(), "key.last");
        // Rotation leaves one way in, and an `init` does not bring the old one back.
        let added = keyring::rotate(&cluster, slots[0].key_id, &other.wrap(), "new").await.unwrap();
        assert!(!vault.create_cluster(&name, &[key.wrap()]).await.unwrap());
        let cluster = vault.unlock(&name, &other.unlock()).await.unwrap();
        assert!(!keyring::record_creation(&cluster).await.unwrap());
        assert_eq!(vault.unlock(&name, &key.unlock()).await.unwrap_err().kind(), ErrorKind::WrongKey);
        let left: Vec<Ulid> = vault.slots(&name).await.unwrap().iter().map(|slot| slot.key_id).collect();
        assert_eq!(left, [added.key_id]);
    });
}

/// Two operators revoke different slots of the last two at the same moment, at any interleaving: one stays.
#[test]
fn revocations_at_the_same_moment_leave_a_slot() {
    runtime().block_on(async {
        let keys = [Key::identity(), Key::identity()];
        let name = cluster_name();
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let (vault, _) = Vault::create(patient(memory.clone()), Env::default()).await.unwrap();
        assert!(vault.create_cluster(&name, &keys.clone().map(|key| key.wrap())).await.unwrap());
        let slots: Vec<Ulid> = vault.slots(&name).await.unwrap().iter().map(|slot| slot.key_id).collect();
        let base = objects_of(&*memory).await;
        let open = async |inner: Arc<dyn ObjectStore>| {
            let vault = Vault::open(patient(inner), Env::default()).await.unwrap();
            vault.unlock(&name, &keys[0].unlock()).await.unwrap()
        };
        let alone = FaultyStore::new(from_objects(&base).await);
        let cluster = open(Arc::new(alone.clone())).await;
        alone.heal();
        keyring::revoke(&cluster, slots[0]).await.unwrap();
        let mut outcomes = BTreeSet::new();
        for hold in 1..=alone.calls().len() {
            let healthy = from_objects(&base).await;
            let faulty = FaultyStore::new(healthy.clone());
            let (first, second) = (open(Arc::new(faulty.clone())).await, open(healthy.clone()).await);
            faulty.heal();
            faulty.hold(hold);
            let id = slots[0];
            let waiting = tokio::spawn(async move { keyring::revoke(&first, id).await });
            faulty.held().await;
            let in_between = keyring::revoke(&second, slots[1]).await;
            faulty.release();
            let waited = waiting.await.unwrap();
            let left = second.vault().slots(&name).await.unwrap();
            assert!(!left.is_empty(), "held at {hold}: {waited:?}, {in_between:?}: every slot is gone");
            for said in [&waited, &in_between] {
                let code = said.as_ref().err().map(pgvault_core::Error::code);
                assert!(matches!(code, None | Some("key.last" | "key.revoked_elsewhere")), "held at {hold}: {said:?}");
            }
            let opens = [&keys[0], &keys[1]].map(Key::unlock);
            let vault = Vault::open(patient(healthy.clone()), Env::default()).await.unwrap();
            let mut open = None;
            for unlock in &opens {
                open = vault.unlock(&name, unlock).await.ok().or(open);
            }
            let options = CheckOptions { sizes_only: false, progress: Arc::new(Silent) };
            let report = check(&open.unwrap(), &options).await.unwrap();
            assert!(report.findings.is_empty(), "held at {hold}: {:?}", report.findings);
            let _ = outcomes.insert((waited.is_ok(), in_between.is_ok()));
        }
        assert!(outcomes.len() > 1, "{outcomes:?}");
    });
}

/// The document that names the master key: changed, exchanged or deleted, it never leads to another key.
#[test]
fn a_changed_cluster_document_opens_nothing() {
    runtime().block_on(async {
        let key = Key::identity();
        let memory = Arc::new(InMemory::new());
        let name = cluster_name();
        let commitment = init(patient(memory.clone()), &key).await.unwrap();
        let vault = Vault::open(patient(memory.clone()), Env::default()).await.unwrap();
        let identity = *vault.unlock(&name, &key.unlock()).await.unwrap().keys().identity();
        let objects = objects_of(&*memory).await;
        let document_name = layout::cluster_document(&name);
        let original = objects[&document_name].clone();
        let with = |bytes: Option<Vec<u8>>| {
            let mut objects: Objects = objects.clone();
            let _ = objects.remove(&document_name);
            objects.extend(bytes.map(|bytes| (document_name.clone(), bytes.into())));
            async move {
                let memory = from_objects(&objects).await;
                let vault = Vault::open(patient(memory.clone()), Env::default()).await.unwrap();
                let opened = vault.unlock(&cluster_name(), &Unlock::Identity("".into())).await.unwrap_err();
                (opened, vault.create_cluster(&cluster_name(), &[Wrap::Passphrase("correct horse".into())]).await)
            }
        };
        for at in 0..original.len() {
            let mut flipped = original.to_vec();
            flipped[at] ^= 1;
            let (opened, created) = with(Some(flipped)).await;
            assert_eq!(opened.kind(), ErrorKind::Corrupt, "byte {at}");
            assert!(opened.to_string().contains("cluster.json") && opened.hint().is_some(), "byte {at}: {opened:?}");
            assert_eq!(created.unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
        }
        // Deleted: nothing is created anew over what is sealed with the old key.
        let (opened, created) = with(None).await;
        assert_eq!((opened.kind(), opened.code()), (ErrorKind::NoVault, "cluster.unfinished"));
        assert_eq!(created.unwrap_err().code(), "cluster.document_missing");
        // Of a newer version, with a hash that fits.
        let mut newer = document::verify("test", &original).unwrap();
        let _ = newer.insert("version".into(), 2.into());
        let (opened, created) = with(Some(document::encode(&newer).unwrap())).await;
        assert_eq!((opened.kind(), created.unwrap_err().kind()), (ErrorKind::Unsupported, ErrorKind::Unsupported));
        // Exchanged for one that names a key of somebody else: no slot counts any more, and an identity that opens one does not
        // help.
        let foreign = ClusterDocument::create(&Env::default(), &identity, &MasterKey::generate(&Env::default()).unwrap());
        assert_ne!(foreign.commitment, commitment);
        let mut objects = objects.clone();
        let _ = objects.insert(document_name.clone(), document::encode(&foreign).unwrap().into());
        let vault = Vault::open(patient(from_objects(&objects).await), Env::default()).await.unwrap();
        assert_eq!(vault.unlock(&name, &key.unlock()).await.unwrap_err().code(), "cluster.no_slots");
    });
}
