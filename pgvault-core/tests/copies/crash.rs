//! A copy that dies at any request of either store, and the one after it.

use std::sync::Arc;
use std::time::Duration;

use pgvault_core::copy::copy;
use pgvault_core::testing::{Fault, FaultyStore, ListOrder, from_objects};
use pgvault_core::vault::snapshot;

use crate::world::{World, is_trouble, open, options, restored, store, store_within};

/// How it fails, and whether it goes on failing: a store that went away is a program that died.
const WAYS: [(Fault, bool); 5] =
    [(Fault::Fail, true), (Fault::Lie, true), (Fault::Lie, false), (Fault::Deny, false), (Fault::Short, false)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

async fn case(world: &World, side: Side, (fault, onwards): (Fault, bool), at: usize) -> bool {
    let memory = from_objects(&world.held().await).await;
    let inner = if side == Side::Target { memory.clone() } else { world.source.clone() };
    let faulty = FaultyStore::new(inner).with_order(ListOrder::Shuffled(at as u64));
    let over =
        open(store_within(Arc::new(faulty.clone()), Duration::from_secs(20)), usize::from(side == Side::Target)).await.unwrap();
    let healthy = open(store(memory.clone()), 1).await.unwrap();
    let (from, to) = if side == Side::Target { (&world.from, &over) } else { (&over, &healthy) };
    faulty.inject(fault, at, onwards);
    let said = tokio::time::timeout(Duration::from_secs(60), copy(from, to, &options())).await.unwrap();
    let calls = faulty.calls();
    let reached = calls.len() >= at;
    let why = format!("{side:?} {fault:?} at {at}, onwards: {onwards} ({:?})", calls.get(at - 1));
    match &said {
        Ok(copied) => assert!(copied.failed.is_empty(), "{why}: a failing store was taken for damage: {copied:?}"),
        Err(error) => assert!(is_trouble(error.kind()), "{why}: {error:?}"),
    }
    // What is listed now restores already.
    for listed in snapshot::list(&healthy).await.unwrap().snapshots {
        let (_, content) = world.backups.iter().find(|(id, _)| *id == listed.manifest.id).unwrap();
        assert!(restored(&healthy, listed.manifest.id).await.unwrap() == *content, "{why}: a broken backup is listed");
    }
    let again = copy(&world.from, &healthy, &options()).await.unwrap_or_else(|e| panic!("{why}: a second run fails too: {e:?}"));
    assert!(again.failed.is_empty(), "{why}: {again:?}");
    world.assert_whole(&healthy, &why).await;
    reached
}

#[tokio::test]
async fn a_copy_interrupted_at_any_request_leaves_nothing_broken_and_is_gone_on_with() {
    let world = World::new().await;
    for side in [Side::Target, Side::Source] {
        for way in WAYS {
            let mut at = 1;
            // A copy that succeeds makes fewer requests than one that has to look twice: the end is where none is reached.
            while case(&world, side, way, at).await {
                at += 1;
            }
            assert!(at > 12, "{side:?} {way:?}: only {at} requests");
        }
    }
}

/// T5: what is there already is used, not stored again.
#[tokio::test]
async fn t5_packs_of_an_interrupted_copy_are_used() {
    let world = World::new().await;
    let faulty = FaultyStore::new(world.target.clone());
    let over = open(store(Arc::new(faulty.clone())), 1).await.unwrap();
    // Dies right before the first manifest.
    let probe = from_objects(&world.held().await).await;
    let counting = FaultyStore::new(probe);
    let counted = open(store(Arc::new(counting.clone())), 1).await.unwrap();
    counting.heal();
    let one = pgvault_core::copy::CopyOptions { workers: 1, ..options() };
    let _ = copy(&world.from, &counted, &one).await.unwrap();
    let at = counting.calls().iter().position(|call| call.starts_with("put ") && call.contains("/snap/")).unwrap() + 1;
    faulty.inject(Fault::Fail, at, true);
    assert!(copy(&world.from, &over, &one).await.is_err());
    faulty.heal();
    let packs = |names: Vec<String>| names.into_iter().filter(|name| name.contains("/pack/")).count();
    let left = packs(world.held().await.into_keys().collect());
    assert!(left >= 2, "the packs of the first backup: {left}");
    let again = copy(&world.from, &over, &one).await.unwrap();
    assert_eq!(again.packs, 2, "only those of the second backup: {again:?}");
    let sent = faulty.calls().into_iter().filter(|call| call.starts_with("put "));
    assert_eq!(packs(sent.collect()), 2, "nothing is sent again");
    world.assert_whole(&over, "gone on with").await;
}
