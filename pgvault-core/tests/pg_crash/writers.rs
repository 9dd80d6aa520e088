//! Many writers, keys, names and clocks.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use pgvault_core::ErrorKind;
use pgvault_core::backup::backup;
use pgvault_core::clock::FixedClock;
use pgvault_core::env::{Env, OsRandom};
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::store::{Put, Store};
use pgvault_core::testing::{Fault, FaultyStore, ListOrder, Objects, objects_of};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Vault, snapshot};
use pgvault_core::wal::catalog::Catalog;
use pgvault_core::wal::fetch::contents;
use pgvault_core::wal::push::push;
use ulid::Ulid;

use crate::place::{Copy, from_objects};
use crate::source::{Key, Source, errors, options, report, runtime, store};

/// H1: whatever many writers put into the vault at once, one key reads all of it.
#[test]
fn h1_what_24_writers_store_at_once_opens_with_one_key() {
    let source = Source::new();
    runtime().block_on(async {
        let memory = from_objects(&source.base).await;
        assert_eq!(source.segments.len(), 22);
        let pushes = join_all(source.segments.iter().map(|segment| async {
            let cluster = source.open(store(memory.clone())).await.unwrap();
            push(&cluster, segment).await.unwrap()
        }));
        let backups = join_all([true, false].map(|local| {
            let (source, memory) = (&source, memory.clone());
            async move {
                let cluster = source.open(store(memory)).await.unwrap();
                backup(&cluster, &source.backup_options(local)).await.unwrap().id
            }
        }));
        let (_, ids) = futures::join!(pushes, backups);
        let cluster = source.open(store(memory.clone())).await.unwrap();
        source.archive_the_rest(&cluster).await;
        assert_eq!(errors(&report(&cluster).await), Vec::<String>::new());
        for segment in &source.segments {
            let name = segment.file_name().unwrap().to_str().unwrap().parse().unwrap();
            assert!(contents(&cluster, name).await.unwrap().unwrap() == fs::read(segment).unwrap());
        }
        for id in ids {
            source.assert_restores(&cluster, id, "one of two backups at once").await;
        }
    });
}

/// A wrong key is told apart from every other trouble, and the error says which keys would do.
#[test]
fn a_wrong_key_is_named_as_such() {
    let source = Source::new();
    runtime().block_on(async {
        let vault = Vault::open(store(from_objects(&source.base).await), Env::default()).await.unwrap();
        let error = vault.unlock(&source.name, &Key::new().unlock()).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::WrongKey, "key.wrong"));
        for slot in vault.slots(&source.name).await.unwrap() {
            assert!(error.hint().unwrap().contains(&slot.key_id.to_string()), "{error:?}");
        }
    });
}

/// H17: names that contain each other, or what other programs take for temporary files, keep their objects apart.
#[test]
fn h17_clusters_with_hostile_names_share_a_vault_and_nothing_else() {
    let source = Source::new();
    runtime().block_on(async {
        let memory = Copy::new();
        let id = source.name.system_id;
        let names = ["main", "main-1", "main.1", "main.tmp.x", "x.tmp.main", "1", "a--b", "A_b.c-"];
        let names = names.map(|name| ClusterName::new(name, id).unwrap());
        for (n, name) in names.iter().enumerate() {
            let vault = Vault::create(store(memory.clone()), Env::default()).await.unwrap().0;
            assert!(vault.create_cluster(name, &[source.key.wrap()]).await.unwrap(), "{name}");
            let cluster = vault.unlock(name, &source.key.unlock()).await.unwrap();
            let _ = push(&cluster, &source.segments[n]).await.unwrap();
        }
        let vault = Vault::open(store(memory.clone()), Env::default()).await.unwrap();
        assert_eq!(vault.clusters().await.unwrap().into_iter().collect::<BTreeSet<_>>(), names.iter().cloned().collect());
        for (n, name) in names.iter().enumerate() {
            assert_eq!(&vault.find_cluster(&name.name, None).await.unwrap(), name);
            let cluster = vault.unlock(name, &source.key.unlock()).await.unwrap();
            let size = 1_u32 << 20;
            let catalog = Catalog::load(&cluster, size.try_into().unwrap(), pgvault_core::postgres::Lsn(0)).await.unwrap();
            let listed: Vec<String> = catalog.timelines.values().flat_map(|t| t.segments.iter().map(ToString::to_string)).collect();
            assert_eq!(listed, [source.segments[n].file_name().unwrap().to_str().unwrap()], "{name}");
            assert_eq!(errors(&report(&cluster).await), Vec::<String>::new(), "{name}");
        }
        // Moving one cluster's objects under another's name gives nothing away.
        let mut moved = objects_of(&*memory).await;
        let (from, to) = (names[0].prefix(), names[1].prefix());
        let stolen: Vec<(String, Bytes)> = moved
            .iter()
            .filter_map(|(name, bytes)| Some((format!("{to}{}", name.strip_prefix(&from)?), bytes.clone())))
            .filter(|(name, _)| name.contains("/wal/"))
            .collect();
        let names_stolen: Vec<String> = stolen.iter().map(|(name, _)| name.clone()).collect();
        moved.extend(stolen);
        let vault = Vault::open(store(from_objects(&moved).await), Env::default()).await.unwrap();
        let cluster = vault.unlock(&names[1], &source.key.unlock()).await.unwrap();
        let found = report(&cluster).await;
        for name in names_stolen {
            assert!(found.findings.iter().any(|f| f.object == name), "{name}: {:?}", found.findings);
        }
    });
}

/// T23: a clock that runs backwards gives no id twice, and the newest backup stays the newest.
#[test]
fn t23_backups_keep_their_order_when_the_clock_runs_backwards() {
    let source = Source::new();
    runtime().block_on(async {
        let memory = from_objects(&source.base).await;
        let clock = Arc::new(FixedClock::new("2026-10-25T03:00:00+02:00".parse().unwrap()));
        let env = Env::new(clock.clone(), Arc::new(OsRandom));
        let mut ids = Vec::new();
        for hour in [2, 1, 1, 0] {
            clock.set(format!("2026-10-25T0{hour}:30:00Z").parse().unwrap());
            let vault = Vault::open(store(memory.clone()), env.clone()).await.unwrap();
            let cluster = vault.unlock(&source.name, &source.key.unlock()).await.unwrap();
            ids.push(backup(&cluster, &source.backup_options(true)).await.unwrap().id);
        }
        assert!(ids.is_sorted() && ids.iter().collect::<BTreeSet<_>>().len() == ids.len(), "{ids:?}");
        // Another machine, whose clock is years behind.
        clock.set("1999-01-01T00:00:00Z".parse().unwrap());
        let behind = Env::new(clock, Arc::new(OsRandom));
        let vault = Vault::open(store(memory.clone()), behind).await.unwrap();
        let cluster = vault.unlock(&source.name, &source.key.unlock()).await.unwrap();
        ids.push(backup(&cluster, &source.backup_options(true)).await.unwrap().id);
        assert!(!ids.is_sorted(), "{ids:?}");
        let listed: Vec<Ulid> = snapshot::list(&cluster).await.unwrap().snapshots.iter().map(|s| s.manifest.id).collect();
        assert_eq!(listed[0], source.first);
        assert_eq!(listed[1..], ids, "listed in the order in which they were taken");
        let newest = plan(&cluster, &Target::Immediate, PlanOptions::default()).await.unwrap();
        assert_eq!(newest.snapshot.manifest.id, ids[4]);
    });
}

/// H19, T24: a store that never answers is given up after so many requests, not after so many of so many.
#[test]
fn h19_a_store_that_never_answers_ends_within_its_attempts() {
    runtime().block_on(async {
        let faulty = FaultyStore::new(from_objects(&Objects::new()).await);
        let patience = Duration::from_millis(10);
        let over = Store::new(Arc::new(faulty.clone()), "memory:///", options(patience));
        let attempts = options(patience).attempts as usize;
        let x = Bytes::from_static(b"x");
        for fault in [Fault::Hang, Fault::Fail] {
            let bounded = async |most: usize, request: &mut (dyn Future<Output = ErrorKind> + Send + Unpin)| {
                faulty.inject(fault, 1, true);
                let kind = tokio::time::timeout(Duration::from_secs(10), request).await.expect("it ends");
                // T1: never "not found".
                assert_eq!(kind, ErrorKind::Storage);
                assert!(faulty.calls().len() <= most, "{fault:?}: {:?}", faulty.calls());
            };
            bounded(2 * attempts, &mut Box::pin(async { over.put_new("a", x.clone()).await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.get("a").await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.get_if_exists("a").await.unwrap_err().kind() })).await;
            // One more tells an object that was cut short from a store in trouble.
            bounded(attempts + 1, &mut Box::pin(async { over.get_range("a", 0..1).await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.head("a").await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.list("a/").await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.list_directories("a/").await.unwrap_err().kind() })).await;
            bounded(attempts, &mut Box::pin(async { over.delete("a").await.unwrap_err().kind() })).await;
        }
    });
}

/// A PUT says truly what became of it, whichever answer was lost.
#[test]
fn a_put_tells_created_same_and_different_apart_under_every_single_fault() {
    runtime().block_on(async {
        for (there, expected) in [(None, Put::Created), (Some("new"), Put::Same), (Some("old"), Put::Different("old".into()))] {
            for fault in [Fault::Fail, Fault::Lie, Fault::Tear] {
                for at in 1..=4 {
                    let mut objects = Objects::new();
                    objects.extend(there.map(|bytes| ("a".to_owned(), Bytes::from_static(bytes.as_bytes()))));
                    let faulty = FaultyStore::new(from_objects(&objects).await);
                    faulty.inject(fault, at, false);
                    let over = Store::new(Arc::new(faulty.clone()), "memory:///", options(Duration::from_secs(5)));
                    let put = over.put_new("a", Bytes::from_static(b"new")).await.unwrap();
                    // A failed first request leaves open whose the same bytes are; nothing is lost by either answer.
                    let unclear = expected == Put::Same && at == 1 && put == Put::Created;
                    assert!(put == expected || unclear, "{there:?}, {fault:?} at {at}: {put:?} ({:?})", faulty.calls());
                }
            }
        }
    });
}

/// Stores promise no order of their listings.
#[test]
fn listings_in_any_order_give_the_same_answers() {
    let source = Source::new();
    runtime().block_on(async {
        let memory = from_objects(&source.grown().await).await;
        let mut seen = BTreeSet::new();
        for order in [ListOrder::Natural, ListOrder::Reversed, ListOrder::Shuffled(1), ListOrder::Shuffled(2)] {
            let ordered = FaultyStore::new(memory.clone()).with_order(order);
            let cluster = source.open(store(Arc::new(ordered))).await.unwrap();
            let names: Vec<String> =
                cluster.store().list(&cluster.path("wal/")).await.unwrap().into_iter().map(|object| object.name).collect();
            assert!(names.is_sorted());
            let found = report(&cluster).await;
            assert_eq!(errors(&found), Vec::<String>::new(), "{order:?}");
            let ids: Vec<Ulid> = snapshot::list(&cluster).await.unwrap().snapshots.iter().map(|s| s.manifest.id).collect();
            let _ = seen.insert((names, found.objects, found.bytes, ids));
        }
        assert_eq!(seen.len(), 1);
    });
}
