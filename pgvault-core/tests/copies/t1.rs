//! T1: WAL from either vault. An error in one is never absence because the other has nothing.

use std::sync::Arc;
use std::time::Duration;

use pgvault_core::copy::either::{Answer, ask};
use pgvault_core::testing::{Fault, FaultyStore, from_objects};
use pgvault_core::vault::Cluster;
use pgvault_core::wal::fetch::contents;

use crate::world::{ROW, World, open, segment, store_within};

async fn fetched(places: &[&Cluster], name: &str) -> Answer<Vec<u8>> {
    let file = name.parse().unwrap();
    let answer = ask(places.iter().copied(), async |cluster| {
        Ok(match contents(cluster, file).await {
            Ok(Some(bytes)) => Answer::Present(bytes),
            Ok(None) => Answer::Absent,
            Err(error) => Answer::Trouble(error),
        })
    });
    answer.await.unwrap()
}

#[tokio::test]
async fn t1_a_failing_vault_beside_one_without_the_segment_is_an_error_and_not_the_end() {
    let world = World::new().await;
    let _ = world.copy().await.unwrap();
    // The vault has gone on since; the copy has not.
    world.add_wal(ROW[3]).await;
    let mut stores = Vec::new();
    let mut clusters = Vec::new();
    for (which, memory) in [&world.source, &world.target].into_iter().enumerate() {
        let objects = pgvault_core::testing::objects_of(&**memory).await;
        let faulty = FaultyStore::new(from_objects(&objects).await);
        clusters.push(open(store_within(Arc::new(faulty.clone()), Duration::from_millis(80)), which).await.unwrap());
        stores.push(faulty);
    }
    let (vault, copy) = (&clusters[0], &clusters[1]);
    let (newest, behind) = (ROW[3], ROW[4]);
    for fault in [Fault::Fail, Fault::Deny, Fault::Hang, Fault::Throttle] {
        let why = format!("{fault:?}");
        // Both answer.
        stores.iter().for_each(FaultyStore::heal);
        let Answer::Present(bytes) = fetched(&[vault, copy], newest).await else { panic!("{why}") };
        assert!(bytes == segment(newest), "{why}");
        assert!(matches!(fetched(&[vault, copy], behind).await, Answer::Absent), "{why}: proven by both");

        // The vault cannot answer. What the copy has is used; what it does not have may be in the vault.
        stores[0].inject(fault, 1, true);
        let Answer::Present(bytes) = fetched(&[vault, copy], ROW[2]).await else { panic!("{why}: the copy has it") };
        assert!(bytes == segment(ROW[2]), "{why}");
        assert!(matches!(fetched(&[vault, copy], behind).await, Answer::Trouble(_)), "{why}: recovery must not end");

        // The copy cannot answer, and the vault has nothing.
        stores[0].heal();
        stores[1].inject(fault, 1, true);
        assert!(matches!(fetched(&[vault, copy], behind).await, Answer::Trouble(_)), "{why}: the copy might have it");
        assert!(matches!(fetched(&[vault, copy], newest).await, Answer::Present(_)), "{why}: the copy is not asked for it");

        // Neither can.
        stores[0].inject(fault, 1, true);
        assert!(matches!(fetched(&[vault, copy], behind).await, Answer::Trouble(_)), "{why}");
    }
}

/// Every single request of either store, where the segment is in neither: absence is only said when every answer came.
#[tokio::test]
async fn t1_a_fault_at_any_request_of_either_is_not_taken_for_the_end() {
    let world = World::new().await;
    let _ = world.copy().await.unwrap();
    for which in 0..2 {
        let memory = if which == 0 { world.source.clone() } else { world.target.clone() };
        let faulty = FaultyStore::new(memory);
        let over = open(store_within(Arc::new(faulty.clone()), Duration::from_secs(20)), which).await.unwrap();
        let places = if which == 0 { [&over, &world.to] } else { [&world.from, &over] };
        faulty.heal();
        assert!(matches!(fetched(&places, ROW[4]).await, Answer::Absent));
        let calls = faulty.calls().len();
        assert!(calls > 2, "{calls}");
        for at in 1..=calls {
            faulty.inject(Fault::Fail, at, true);
            let answer = fetched(&places, ROW[4]).await;
            assert!(matches!(answer, Answer::Trouble(_)), "call {at} of {which}: {answer:?}");
        }
    }
}
