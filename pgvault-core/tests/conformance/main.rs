//! What pgvault relies on in a store: those that have it pass, and each one that lacks something is caught by the check for it.

#![expect(clippy::unwrap_used, reason = "a test")]

mod quirks;

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use pgvault_core::ErrorKind;
use pgvault_core::env::Env;
use pgvault_core::store::probe::{Outcome, ProbeReport, probe};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::conformance::Suite;
use pgvault_core::testing::{Fault, FaultyStore, Lag, ListOrder, objects_of};
use quirks::{Quirk, Quirky};

fn over(inner: Arc<dyn ObjectStore>) -> Store {
    let options = StoreOptions { attempts: 3, request_timeout: Duration::from_secs(30), backoff: Duration::from_millis(1) };
    Store::new(inner, "test", options)
}

async fn probed(inner: Arc<dyn ObjectStore>) -> ProbeReport {
    probe(&over(inner), &Env::default()).await.unwrap()
}

#[tokio::test]
async fn the_probe_passes_what_can_hold_a_vault_and_leaves_nothing() {
    let memory = Arc::new(InMemory::new());
    let counting = FaultyStore::new(memory.clone());
    let report = probed(Arc::new(counting.clone())).await;
    assert!(report.is_ok() && report.ensure().is_ok(), "{report}");
    assert_eq!(report.may_delete, Some(true));
    let passed = |name: &str| report.check(name).unwrap().outcome;
    for name in ["missing", "create_only", "create_only_race", "ranges", "listing", "clock", "deletion"] {
        assert_eq!(passed(name), Outcome::Passed, "{name}: {report}");
    }
    assert!(objects_of(&*memory).await.is_empty());
    assert!(counting.calls().len() < 60, "{} requests", counting.calls().len());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["checks"][1]["name"], "create_only");
    assert_eq!(json["checks"][1]["outcome"], "passed");

    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let report = probe(&Store::open(&url, StoreOptions::default()).unwrap(), &Env::default()).await.unwrap();
    assert!(report.is_ok(), "{report}");
}

/// What the probe must find, by which check, and the code of the error that `init` ends with.
#[tokio::test]
async fn the_probe_names_what_is_wrong_with_a_store() {
    let quirky: [(Quirk, &str, &str); 8] = [
        (Quirk::Overwrites, "create_only", "store.overwrites"),
        (Quirk::ChecksThenWrites, "create_only_race", "store.overwrites"),
        (Quirk::LosesPuts, "create_only", "store.overwrites"),
        (Quirk::RangeIsShort, "ranges", "store.ranges"),
        (Quirk::RangeIsShifted, "ranges", "store.ranges"),
        (Quirk::MissingIsDenied, "missing", "store.denied"),
        (Quirk::KeepsDeleted, "deletion", "store.deletion"),
        (Quirk::ClockStandsAt1980, "clock", ""),
    ];
    let mut stores: Vec<(Arc<dyn ObjectStore>, &str, &str)> = Vec::new();
    for (quirk, check, code) in quirky {
        stores.push((Quirky::new(quirk), check, code));
    }
    let lagging = |lag| Arc::new(FaultyStore::new(Arc::new(InMemory::new())).with_lag(lag));
    stores.push((lagging(Lag::Listings(100)), "listing", "store.listing"));
    stores.push((lagging(Lag::Everything(100)), "create_only", "store.overwrites"));
    for (store, check, code) in stores {
        let name = store.to_string();
        let report = probed(store).await;
        let found = report.check(check).unwrap();
        assert!(!found.fix.is_empty(), "{name}: {report}");
        if code.is_empty() {
            assert_eq!(found.outcome, Outcome::Warned, "{name}: {report}");
            assert!(report.is_ok());
            continue;
        }
        assert_eq!(found.outcome, Outcome::Failed, "{name}: {report}");
        let error = report.ensure().unwrap_err();
        assert_eq!(error.code(), code, "{name}: {error:?}");
        assert!(error.to_string().contains(check) && error.hint().is_some(), "{name}: {error:?}");
        assert_eq!(report.overwrites(), code == "store.overwrites", "{name}: {report}");
    }
}

#[tokio::test]
async fn the_probe_does_without_the_right_to_delete() {
    let memory = Arc::new(InMemory::new());
    let counting = FaultyStore::new(memory.clone());
    assert!(probed(Arc::new(counting.clone())).await.is_ok());
    let first_delete = 1 + counting.calls().iter().position(|call| call.starts_with("delete")).unwrap();
    counting.inject(Fault::Deny, first_delete, true);
    let report = probed(Arc::new(counting)).await;
    assert!(report.is_ok(), "{report}");
    assert_eq!((report.may_delete, report.check("deletion").unwrap().outcome), (Some(false), Outcome::Skipped));
    assert_eq!(objects_of(&*memory).await.len(), 2);
}

/// A store in trouble is not a store that cannot hold a vault.
#[tokio::test]
async fn the_probe_tells_trouble_and_refusal_from_unfitness() {
    for (fault, kind, code) in [(Fault::Fail, ErrorKind::Storage, "store.failed"), (Fault::Deny, ErrorKind::Failed, "store.denied")]
    {
        let faulty = FaultyStore::new(Arc::new(InMemory::new()));
        faulty.inject(fault, 1, true);
        let error = probe(&over(Arc::new(faulty)), &Env::default()).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (kind, code), "{error:?}");
        assert!(error.hint().is_some(), "{error:?}");
    }
}

/// The suite, with as much of everything as a test may take.
fn suite(inner: Arc<dyn ObjectStore>) -> Suite {
    Suite::new(over(inner)).keys(1100).racers(32, 2).large(3 << 20)
}

fn refused(inner: Arc<dyn ObjectStore>) -> pgvault_core::Result<Store> {
    let faulty = FaultyStore::new(inner);
    faulty.inject(Fault::Deny, 1, true);
    Ok(over(Arc::new(faulty)))
}

#[tokio::test]
async fn memory_conforms_in_any_order_of_its_listings() {
    for order in [ListOrder::Natural, ListOrder::Reversed, ListOrder::Shuffled(7)] {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store: Arc<dyn ObjectStore> = Arc::new(FaultyStore::new(memory.clone()).with_order(order));
        let (second, stranger) = (over(memory.clone()), store.clone());
        let suite = suite(store).second(second).denied(move || refused(stranger.clone()));
        let report = suite.run(&Env::default()).await.unwrap();
        assert!(report.is_ok(), "{order:?}: {report}");
        let skipped: Vec<&str> = report.checks.iter().filter(|c| c.outcome != Outcome::Passed).map(|c| c.name).collect();
        assert!(skipped.is_empty(), "{skipped:?}: {report}");
        assert!(objects_of(&*memory).await.is_empty());
    }
}

#[tokio::test]
async fn a_directory_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let open = || Store::open(&url, StoreOptions { backoff: Duration::from_millis(1), ..StoreOptions::default() }).unwrap();
    let suite = Suite::new(open()).second(open()).keys(1100).racers(32, 4).large(64 << 20);
    let report = suite.run(&Env::default()).await.unwrap();
    assert!(report.is_ok(), "{report}");
}
