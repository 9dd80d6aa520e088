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
use pgvault_core::store::{Settings, Store, StoreOptions};
use pgvault_core::testing::conformance::Suite;
use pgvault_core::testing::{Fault, FaultyStore, Lag, ListOrder, objects_of};
use quirks::{Quirk, Quirky};

fn over(inner: Arc<dyn ObjectStore>) -> Store {
    let options = StoreOptions { attempts: 3, backoff: Duration::from_millis(1), ..StoreOptions::default() };
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
    assert!(counting.calls().len() < 170, "{} requests", counting.calls().len());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["checks"][1]["name"], "create_only");
    assert_eq!(json["checks"][1]["outcome"], "passed");

    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let report = probe(&Store::open(&url, Settings::default()).unwrap(), &Env::default()).await.unwrap();
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
    stores.push((lagging(Lag::Listings(2)), "listing", "store.listing"));
    stores.push((lagging(Lag::Everything(2)), "create_only", "store.overwrites"));
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
    assert_eq!(objects_of(&*memory).await.len(), 6);
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

/// More keys than a page has; with `PGVAULT_TEST_FULL=1` as many as a year of WAL makes.
fn keys() -> usize {
    if std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1") { 100_000 } else { 1100 }
}

fn refused(inner: Arc<dyn ObjectStore>) -> Store {
    let faulty = FaultyStore::new(inner);
    faulty.inject(Fault::Deny, 1, true);
    over(Arc::new(faulty))
}

#[tokio::test]
async fn memory_conforms_in_any_order_of_its_listings() {
    for order in [ListOrder::Natural, ListOrder::Reversed, ListOrder::Shuffled(7)] {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store: Arc<dyn ObjectStore> = Arc::new(FaultyStore::new(memory.clone()).with_order(order));
        let (second, stranger) = (over(memory.clone()), store.clone());
        let suite = suite(store).keys(keys()).large(64 << 20).second(second).denied(move || Ok(refused(stranger.clone())));
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
    let options = StoreOptions { backoff: Duration::from_millis(1), ..StoreOptions::default() };
    let open = || Store::open(&url, Settings { options, ..Settings::default() }).unwrap();
    let suite = Suite::new(open()).second(open()).keys(keys()).racers(32, 4).large(64 << 20);
    let report = suite.run(&Env::default()).await.unwrap();
    assert!(report.is_ok(), "{report}");
}

/// H13, R11: each store that almost works is caught, by the check that is for it.
#[tokio::test]
async fn h13_each_store_that_almost_conforms_is_caught_by_its_check() {
    use Quirk as Q;
    let quirky = [
        (Q::Overwrites, "create_only"),
        (Q::ChecksThenWrites, "create_only_race"),
        (Q::ChecksThenWrites, "create_only_32"),
        (Q::LosesPuts, "create_only"),
        (Q::CutsLargeObjects, "large_object"),
        (Q::ForgetsEmptyObjects, "empty_object"),
        (Q::RangeIsShort, "range_edges"),
        (Q::RangeIsShifted, "range_edges"),
        (Q::RangeOverTheEndIsFilled, "range_edges"),
        (Q::ListsOnePage, "many_keys"),
        (Q::PrefixIsText, "list_prefix"),
        (Q::FoldsCase, "names"),
        (Q::KeepsDeleted, "delete_create"),
        (Q::KeepsDeleted, "cleanup"),
        (Q::MissingIsDenied, "missing"),
        (Q::ClockStandsAt1980, "server_times"),
        (Q::ClockRunsBackwards, "server_times"),
    ];
    for (quirk, check) in quirky {
        let report = suite(Quirky::new(quirk)).run(&Env::default()).await.unwrap();
        let found = report.check(check).unwrap();
        assert_eq!(found.outcome, Outcome::Failed, "{quirk:?}: {report}");
        assert!(!found.fix.is_empty() && !report.is_ok(), "{quirk:?}: {report}");
    }
    // Where a listing begins too early, `Store` leaves out what was not asked for.
    let report = suite(Quirky::new(Q::ListsFromInstead)).run(&Env::default()).await.unwrap();
    assert!(report.is_ok(), "{report}");
    // What happens only to names that pgvault never makes.
    for quirk in [Q::DecodesNames, Q::PlusIsSpace] {
        let report = suite(Quirky::new(quirk)).run(&Env::default()).await.unwrap();
        let found = report.check("names").unwrap();
        assert!(found.outcome == Outcome::Warned && !found.fix.is_empty() && report.is_ok(), "{quirk:?}: {report}");
    }
    let lagging = |lag| Arc::new(FaultyStore::new(Arc::new(InMemory::new())).with_lag(lag));
    for (lag, check) in [(Lag::Listings(3), "list_after_write"), (Lag::Everything(3), "create_only")] {
        let report = suite(lagging(lag)).run(&Env::default()).await.unwrap();
        assert_eq!(report.check(check).unwrap().outcome, Outcome::Failed, "{lag:?}: {report}");
    }
    // What reads of one client and writes of another do not agree on.
    let report = suite(Arc::new(InMemory::new())).second(over(Arc::new(InMemory::new()))).run(&Env::default()).await.unwrap();
    assert_eq!(report.check("second_client").unwrap().outcome, Outcome::Failed, "{report}");
}

/// T1: who answers "there is no such object" to those who may not know is caught, and so is who tries a refusal again and again.
#[tokio::test]
async fn t1_a_store_that_says_missing_instead_of_forbidden_is_caught() {
    let strangers: [(Arc<dyn ObjectStore>, Outcome); 3] = [
        (Quirky::new(Quirk::DeniedIsMissing), Outcome::Failed),
        // No credentials are asked for at all.
        (Arc::new(InMemory::new()), Outcome::Failed),
        (
            {
                let faulty = FaultyStore::new(Arc::new(InMemory::new()));
                faulty.inject(Fault::Deny, 1, true);
                Arc::new(faulty)
            },
            Outcome::Passed,
        ),
    ];
    for (stranger, outcome) in strangers {
        let name = stranger.to_string();
        let suite = suite(Arc::new(InMemory::new())).denied(move || Ok(over(stranger.clone())));
        let report = suite.run(&Env::default()).await.unwrap();
        assert_eq!(report.check("denied").unwrap().outcome, outcome, "{name}: {report}");
    }
}
