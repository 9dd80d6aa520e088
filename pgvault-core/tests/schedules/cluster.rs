//! WAL, backups and restores under random histories of faults.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use object_store::ObjectStore;
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Dice, FaultyStore, ListOrder, Schedule, from_objects};

use crate::seeds;
use crate::world::{Case, Told, World};

/// What hangs, hangs shortly; a busy machine may see faults that were not made.
fn hurried(inner: Arc<dyn ObjectStore>) -> Store {
    let options = StoreOptions {
        attempts: 3,
        request_timeout: Duration::from_millis(150),
        backoff: Duration::from_millis(1),
        ..StoreOptions::default()
    };
    Store::new(inner, "memory:///", options)
}

async fn run(world: &World, seed: u64) -> Told {
    let schedule = Schedule::new(seed);
    let why = schedule.to_string();
    let memory: Arc<dyn ObjectStore> = from_objects(&world.base).await;
    let faulty = FaultyStore::new(memory.clone()).with_order(ListOrder::Shuffled(seed)).with_slowness(Duration::from_millis(3));
    faulty.follow(schedule);
    let store = hurried(Arc::new(faulty.clone()));
    let mut case = Case { world, store, dice: Dice::new(!seed), told: Told::default(), why };
    case.run(7).await;
    faulty.heal();
    case.afterwards(Store::new(memory, "memory:///", StoreOptions::default())).await;
    case.told
}

/// A fault at random at any request of anything: what is listed restores, what was acknowledged is there.
#[test]
fn whatever_is_listed_restores_after_any_history_of_faults() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let world = World::new().await;
        let (mut all, began, seeds) = (Told::default(), std::time::Instant::now(), seeds(100));
        let count = seeds.end - seeds.start;
        // Most of them wait for an answer that does not come.
        let mut cases = stream::iter(seeds).map(|seed| run(&world, seed)).buffer_unordered(24);
        let mut backups = 0;
        while let Some(told) = cases.next().await {
            all.errors += told.errors;
            all.done += told.done;
            backups += told.backups.len();
        }
        let seconds = began.elapsed().as_secs_f64();
        eprintln!("{count} schedules: {} operations done, {} failed, {backups} backups, {seconds:.1} s", all.done, all.errors);
        // Faults that nothing feels, and faults that let nothing through, would both show nothing.
        assert!(count < 100 || (all.done > all.errors / 20 && all.errors > all.done / 20 && backups > 20), "{all:?}");
    });
}
