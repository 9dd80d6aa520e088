//! What a copy ships, in which order, and what it refuses.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use pgvault_core::ErrorKind;
use pgvault_core::config::RetentionConfig;
use pgvault_core::copy::copy;
use pgvault_core::crypto::slot::Unlock;
use pgvault_core::env::Env;
use pgvault_core::postgres::{Lsn, TimelineId};
use pgvault_core::retention::{ExpireOptions, Policy, expire};
use pgvault_core::testing::{FaultyStore, ListOrder};
use pgvault_core::vault::artifact::{self, NewArtifact};
use pgvault_core::vault::mark::{self, Mark};
use pgvault_core::vault::tables::Limits;
use pgvault_core::vault::{Vault, layout, snapshot};
use ulid::Ulid;

use crate::world::{ROW, World, name, open, options, restored, store};

/// Overwrites an object behind pgvault's back.
async fn replace(store: &dyn ObjectStore, name: &str, bytes: Vec<u8>) {
    let _ = store.put(&Path::from(name), PutPayload::from(bytes)).await.unwrap();
}

async fn flip(store: &dyn ObjectStore, name: &str, at: usize) {
    let mut bytes = store.get(&Path::from(name)).await.unwrap().bytes().await.unwrap().to_vec();
    bytes[at] ^= 0x10;
    replace(store, name, bytes).await;
}

fn puts(calls: &[String]) -> Vec<&str> {
    calls.iter().filter_map(|call| call.strip_prefix("put ")).collect()
}

#[tokio::test]
async fn a_copy_holds_what_the_vault_holds_under_other_keys() {
    let world = World::new().await;
    let copied = world.copy().await.unwrap();
    assert!(copied.failed.is_empty(), "{copied:?}");
    assert_eq!(copied.backups, world.backups.iter().map(|(id, _)| *id).collect::<Vec<_>>(), "oldest first");
    assert_eq!((copied.present, copied.packs, copied.wal, copied.gaps), (0, 4, 4, 1), "{copied:?}");
    world.assert_whole(&world.reopened().await, "copied").await;

    // The same packs by name; no byte behind their clear headers is the same.
    let (source, target) = (pgvault_core::testing::objects_of(&*world.source).await, world.held().await);
    let ids: Vec<Ulid> = snapshot::list(&world.from).await.unwrap().snapshots.iter().map(|s| s.manifest.id).collect();
    for id in ids {
        let mut refs = Vec::new();
        for cluster in [&world.from, &world.to] {
            refs.push(snapshot::open(cluster, id, None).await.unwrap().packs().await.unwrap());
        }
        assert!(!refs[0].is_empty() && refs[0].len() == refs[1].len());
        for (one, other) in refs[0].iter().zip(&refs[1]) {
            assert_eq!(
                (one.id, one.kind, one.live, one.frames, one.size),
                (other.id, other.kind, other.live, other.frames, other.size)
            );
            assert_ne!(one.sha256, other.sha256);
            let name = format!("{}{}", name().prefix(), layout::pack(Ulid::from_bytes(one.id)));
            assert_eq!(target[&name].len() as u64, other.size);
            let blocks = |bytes: &Bytes| bytes[112..].chunks_exact(16).map(<[u8]>::to_vec).collect::<BTreeSet<_>>();
            assert!(blocks(&source[&name]).is_disjoint(&blocks(&target[&name])), "{name} was not sealed anew");
        }
    }
    // The target's key opens it, and the source's does not.
    assert_eq!(open(store(world.target.clone()), 0).await.unwrap_err().kind(), ErrorKind::WrongKey);
    // It needs nothing of the source.
    drop(world.source);
    let again = open(store(world.target.clone()), 1).await.unwrap();
    assert!(restored(&again, world.backups[1].0).await.unwrap() == world.backups[1].1);
}

#[tokio::test]
async fn a_copy_ships_only_what_is_new() {
    let mut world = World::new().await;
    let faulty = FaultyStore::new(world.target.clone()).with_order(ListOrder::Reversed);
    world.to = open(store(Arc::new(faulty.clone())), 1).await.unwrap();
    let _ = world.copy().await.unwrap();

    faulty.heal();
    let again = world.copy().await.unwrap();
    assert_eq!(
        (again.backups.len(), again.present, again.packs, again.wal, again.gaps, again.bytes),
        (0, 2, 0, 0, 0, 0),
        "{again:?}"
    );
    assert_eq!(puts(&faulty.calls()), Vec::<&str>::new(), "nothing is new, and nothing is written");

    // One region changed, one segment more: its pack, its map, its manifest, and what announces and records them.
    let mut content = world.backups[1].1.clone();
    content[7] ^= 1;
    let id = world.back_up(content, Limits::default(), 0x90_0200, 0x90_0300).await;
    world.add_wal(ROW[3]).await;
    faulty.heal();
    let third = world.copy().await.unwrap();
    assert_eq!((third.backups.as_slice(), third.present, third.packs, third.wal), ([id].as_slice(), 2, 2, 1), "{third:?}");
    let calls = faulty.calls();
    let written = puts(&calls);
    let kinds = |part: &str| written.iter().filter(|name| name.contains(part)).count();
    assert_eq!((kinds("/pack/"), kinds("/snap/"), kinds("/wal/"), kinds("/audit/")), (2, 1, 1, 1), "{written:?}");
    assert_eq!(written.len(), 7, "and two sessions: {written:?}");
    let heads_of_packs = calls.iter().filter(|call| call.starts_with("head ") && call.contains("/pack/")).count();
    assert_eq!(heads_of_packs, 0, "packs are listed, not asked for one by one");
    world.assert_whole(&world.reopened().await, "grown").await;
}

/// The manifest is the commit: everything that it needs is there before.
#[tokio::test]
async fn the_manifest_comes_last() {
    let mut world = World::new().await;
    let faulty = FaultyStore::new(world.target.clone());
    world.to = open(store(Arc::new(faulty.clone())), 1).await.unwrap();
    let _ = world.copy().await.unwrap();
    let calls = faulty.calls();
    let written = puts(&calls);
    let at = |part: &str| written.iter().position(|name| name.contains(part)).unwrap();
    assert_eq!(at("/session/"), 0, "{written:?}");
    for (id, _) in &world.backups {
        let manifest = at(&format!("/snap/{id}"));
        for pack in snapshot::open(&world.to, *id, None).await.unwrap().packs().await.unwrap() {
            assert!(at(&layout::pack(Ulid::from_bytes(pack.id))) < manifest, "{written:?}");
        }
        assert!(at(ROW[1]) < manifest && manifest < at(ROW[2]), "the WAL that it needs, and no other: {written:?}");
    }
}

#[tokio::test]
async fn t30_what_was_changed_in_the_source_is_noticed_and_not_shipped() {
    // Every pack of the newest backup in turn, in its header, its frames and its end; and a manifest, and WAL.
    let world = World::new().await;
    let packs = snapshot::open(&world.from, world.backups[1].0, None).await.unwrap().packs().await.unwrap();
    let older: BTreeSet<_> =
        snapshot::open(&world.from, world.backups[0].0, None).await.unwrap().packs().await.unwrap().iter().map(|p| p.id).collect();
    for pack in packs {
        let size = usize::try_from(pack.size).unwrap();
        let name = world.from.path(&layout::pack(Ulid::from_bytes(pack.id)));
        for at in [50, 113, size / 2, size - 60, size - 1] {
            flip(&*world.source, &name, at).await;
            let target = Twin::of(&world).await;
            let copied = copy(&world.from, &target.cluster, &options()).await.unwrap();
            flip(&*world.source, &name, at).await;
            // The others are copied; whatever needs it is not, and is named.
            let hurt = if older.contains(&pack.id) { 2 } else { 1 };
            assert_eq!((copied.backups.len(), copied.failed.len()), (2 - hurt, hurt), "{name} at {at}: {copied:?}");
            assert!(copied.failed.iter().all(|failed| failed.error.kind() == ErrorKind::Corrupt), "{copied:?}");
            let there = pgvault_core::testing::objects_of(&*target.memory).await;
            assert!(!there.contains_key(&name), "{name} was shipped although it was changed at {at}");
            // Once it is right again, so is the copy.
            let again = copy(&world.from, &target.cluster, &options()).await.unwrap();
            assert_eq!((again.backups.len(), again.failed.len()), (hurt, 0), "{again:?}");
            world.assert_whole(&target.cluster, &name).await;
        }
    }
}

/// Another empty target.
struct Twin {
    memory: Arc<object_store::memory::InMemory>,
    cluster: pgvault_core::vault::Cluster,
}

impl Twin {
    async fn of(world: &World) -> Self {
        let memory = pgvault_core::testing::from_objects(&world.held().await).await;
        let cluster = open(store(memory.clone()), 1).await.unwrap();
        Self { memory, cluster }
    }
}

#[tokio::test]
async fn t30_changed_wal_is_named_and_the_rest_is_copied() {
    let world = World::new().await;
    let name = world.from.path(&format!("wal/00000001/{}.wal", ROW[2]));
    flip(&*world.source, &name, 200).await;
    let copied = world.copy().await.unwrap();
    assert_eq!((copied.backups.len(), copied.failed.len()), (2, 1), "{copied:?}");
    assert!(copied.failed[0].name.contains(ROW[2]) && !world.held().await.contains_key(&name), "{copied:?}");
    // WAL that a backup cannot do without.
    let target = World::new().await;
    let name = target.from.path(&format!("wal/00000001/{}.wal", ROW[1]));
    flip(&*target.source, &name, 200).await;
    let copied = target.copy().await.unwrap();
    assert_eq!(copied.backups.len(), 0, "{copied:?}");
    assert!(copied.failed.iter().all(|failed| failed.error.kind() == ErrorKind::Corrupt), "{copied:?}");
    assert!(target.held().await.keys().all(|name| !name.contains("/snap/")));
}

/// R11: a name with other contents is refused by name, and nothing is overwritten.
#[tokio::test]
async fn r11_other_contents_under_a_name_end_the_copy() {
    let world = World::new().await;
    let _ = world.copy().await.unwrap();
    let there = world.held().await;
    // The source loses a segment and somebody stores another one in its place, as after a split brain.
    let wal = format!("wal/00000001/{}.wal", ROW[2]);
    let mut other = World::new().await;
    let (one, kept) = (other.to.clone(), other.from.clone());
    let mut bytes = crate::world::segment(ROW[2]);
    bytes[500_000..].fill(0);
    let sealed = pgvault_core::wal::object::seal_file(&one, ROW[2].parse().unwrap(), &bytes).unwrap().remove(0);
    one.put_once(&sealed).await.unwrap();
    let before = other.held().await;
    let error = other.copy().await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Conflict, "copy.different"), "{error:?}");
    assert!(error.to_string().contains(&wal), "{error}");
    let path = kept.path(&wal);
    assert!(other.held().await[&path] == before[&path] && there.contains_key(&path));

    // A pack of another size under one of its names.
    other = World::new().await;
    let pack = snapshot::open(&other.from, other.backups[0].0, None).await.unwrap().packs().await.unwrap()[0];
    let path = other.to.path(&layout::pack(Ulid::from_bytes(pack.id)));
    replace(&*other.target, &path, vec![0; 500]).await;
    let error = other.copy().await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Conflict, "copy.different"), "{error:?}");
    assert!(error.to_string().contains(&path), "{error}");
}

#[tokio::test]
async fn a_copy_goes_to_another_vault_that_its_key_opens() {
    let world = World::new().await;
    let error = copy(&world.from, &world.from, &options()).await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "copy.same_vault"));
    let vault = Vault::open(store(world.target.clone()), Env::default()).await.unwrap();
    let wrong = Unlock::Passphrase("another".into());
    assert_eq!(vault.unlock(&name(), &wrong).await.unwrap_err().kind(), ErrorKind::WrongKey);
}

/// H9: what an interrupted copy left a moment ago is on no list that a collector may act on.
#[tokio::test]
async fn h9_young_leftovers_are_used_while_garbage_is_collected() {
    let world = World::new().await;
    let pack = snapshot::open(&world.from, world.backups[0].0, None).await.unwrap().packs().await.unwrap()[0];
    // Left behind: a pack and no manifest.
    let _ = world.copy().await.unwrap();
    for name in world.held().await.keys().filter(|name| name.contains("/snap/")) {
        world.target.delete(&Path::from(name.as_str())).await.unwrap();
    }
    replace(&*world.target, &world.to.path("gc/01M7YQ0CJRQERHS1KZH3PBAPVP.plan"), vec![0; 200]).await;
    // It is young, so no plan that is due names it.
    let copied = world.copy().await.unwrap();
    assert_eq!((copied.backups.len(), copied.packs), (2, 0), "{copied:?}");
    assert!(world.held().await.contains_key(&world.to.path(&layout::pack(Ulid::from_bytes(pack.id)))));
}

/// A copy has a retention of its own. What that has expired would come again with every copy, as young as new, and never go.
#[tokio::test]
async fn what_the_copy_has_expired_is_not_shipped_again() {
    let world = World::new().await;
    let first = world.copy().await.unwrap();
    assert_eq!((first.backups.len(), first.expired), (2, 0));
    let last = RetentionConfig { keep_last: Some(1), ..RetentionConfig::default() };
    let options = ExpireOptions { policy: Policy::of(&last).unwrap(), dry_run: false, verified: BTreeSet::new() };
    let expired = expire(&world.to, &options, |_| {}).await.unwrap().expired;
    assert_eq!(expired, [world.backups[0].0]);
    let again = world.copy().await.unwrap();
    assert_eq!((again.backups.len(), again.present, again.expired, again.packs), (0, 1, 1, 0), "{again:?}");
    // One that is gone without a record was lost, and comes again.
    let lost = world.to.path(&layout::snapshot(world.backups[1].0));
    world.target.delete(&Path::from(lost)).await.unwrap();
    let again = world.copy().await.unwrap();
    assert_eq!((again.backups.as_slice(), again.expired), ([world.backups[1].0].as_slice(), 1), "{again:?}");
}

#[tokio::test]
async fn marks_and_artifacts_come_along() {
    let world = World::new().await;
    for (name, lsn) in [("too early", 0x80_0100), ("before the update", 0x90_0300)] {
        let (id, time) = (world.from.env().new_id().unwrap(), world.from.env().now());
        let (labels, odoo) = ([("git".to_owned(), "3f2a".to_owned())].into(), Vec::new());
        let (timeline, lsn, by, version) = (TimelineId(1), Lsn(lsn), "me@here".to_owned(), "0".to_owned());
        mark::store(&world.from, &Mark { id, name: name.into(), timeline, lsn, time, labels, odoo, by, version }).await.unwrap();
    }
    // Of more than one frame.
    let content: Vec<u8> = (0..5_u32 << 20).map(|n| (n.wrapping_mul(n) >> 7).to_le_bytes()[0]).collect();
    let file = NewArtifact { name: "odoo.conf".into(), mode: 0o640, content: content.clone() };
    let known = artifact::list(&world.from).await.unwrap();
    let _ = artifact::put(&world.from, &known, &file, false).await.unwrap();

    let copied = world.copy().await.unwrap();
    assert_eq!((copied.marks, copied.artifacts), (1, 1), "{copied:?}");
    let target = world.reopened().await;
    let (from, to) = (mark::list(&world.from).await.unwrap(), mark::list(&target).await.unwrap());
    assert_eq!(to.marks, from.marks[1..], "a mark that no backup of the copy leads to is not shipped");
    let (from, to) = (artifact::list(&world.from).await.unwrap(), artifact::list(&target).await.unwrap());
    assert_eq!(to.versions, from.versions);
    assert!(artifact::read(&target, &to.versions[0]).await.unwrap() == content);
    let again = world.copy().await.unwrap();
    assert_eq!((again.marks, again.artifacts), (0, 0), "{again:?}");
}
