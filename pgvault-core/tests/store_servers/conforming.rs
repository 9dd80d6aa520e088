//! The conformance suite on every server that there is.

use pgvault_core::env::Env;
use pgvault_core::store::Store;
use pgvault_core::store::probe::{Outcome, ProbeReport, probe};
use pgvault_core::testing::conformance::Suite;
use pgvault_teststores::{Kind, Server};

use crate::{open, runtime, settings};

/// The whole suite; with `PGVAULT_TEST_FULL=1`, 100,000 keys.
fn conforms(kind: Kind, knows_users: bool) -> ProbeReport {
    let server = Server::shared(kind).unwrap();
    let place = server.place().unwrap();
    let (store, second) = (open(&server, &place), open(&server, &place));
    let full = std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1");
    let mut suite = Suite::new(store).second(second).keys(if full { 100_000 } else { 2100 }).concurrency(16).racers(32, 4);
    if knows_users {
        let (url, mut wrong) = (place.url(), settings(&server, None));
        // Any other key of the right length.
        wrong.azure.access_key = wrong.azure.access_key.map(|_| format!("{}==", "A".repeat(86)).into());
        wrong.s3.secret_access_key = wrong.s3.secret_access_key.map(|_| "not the owner's secret, and of no use".to_owned().into());
        suite = suite.denied(move || Store::open(&url, wrong.clone()));
    }
    let report = runtime().block_on(suite.run(&Env::default())).unwrap();
    assert!(report.is_ok(), "{kind}: {report}");
    let denied = report.check("denied").unwrap().outcome;
    assert_eq!(denied, if knows_users { Outcome::Passed } else { Outcome::Skipped }, "{kind}: {report}");
    assert_eq!(place.names().unwrap(), Vec::<String>::new(), "{kind}");
    report
}

#[test]
fn ceph_conforms() {
    let _ = conforms(Kind::Rgw, true);
}

#[test]
fn azurite_conforms() {
    let _ = conforms(Kind::Azurite, true);
}

/// It believes every signature.
#[test]
fn localstack_conforms() {
    let _ = conforms(Kind::Localstack, false);
}

#[test]
fn the_stand_in_for_google_conforms() {
    let _ = conforms(Kind::Gcs, false);
}

/// R11, H13: these answer 200 and overwrite.
fn overwrites(kind: Kind) {
    let server = Server::shared(kind).unwrap();
    let store = open(&server, &server.place().unwrap());
    let report = runtime().block_on(probe(&store, &Env::default())).unwrap();
    assert!(report.overwrites(), "{kind}: {report}");
    let error = report.ensure().unwrap_err();
    assert_eq!(error.code(), "store.overwrites", "{error:?}");
    assert!(error.hint().is_some(), "{error:?}");
}

/// It refuses the second of two PUTs, and not of two at once.
#[test]
#[ignore = "needs s3s-fs, which `cargo xtask test --stores all` builds"]
fn h13_s3s_is_refused_because_writers_race() {
    let server = Server::shared(Kind::S3sFs).unwrap();
    let store = open(&server, &server.place().unwrap());
    let report = runtime().block_on(probe(&store, &Env::default())).unwrap();
    let outcome = |name: &str| report.check(name).unwrap().outcome;
    assert_eq!((outcome("create_only"), outcome("create_only_race")), (Outcome::Passed, Outcome::Failed), "{report}");
    assert!(report.overwrites() && report.ensure().unwrap_err().hint().unwrap().contains("in two steps"), "{report}");
}

#[test]
fn r11_s3rver_is_refused() {
    overwrites(Kind::S3rver);
}

/// Takes a quarter of an hour to build where it is not installed.
#[test]
#[ignore = "needs Garage, which `cargo xtask test --stores all` builds"]
fn r11_garage_is_refused() {
    overwrites(Kind::Garage);
}
