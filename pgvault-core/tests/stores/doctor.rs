//! The doctor notices what a store does not keep.

use pgvault_core::env::Env;
use pgvault_core::inspect::doctor::examine_store;
use pgvault_core::store::probe::{Outcome, ProbeReport};
use pgvault_teststores::{Kind, Role};

use crate::{open, run, server};

const LOCKS: &str = "immutability = { mode = 'governance', retain = '1d' }";

fn outcome(report: &ProbeReport, name: &str) -> Option<Outcome> {
    report.check(name).map(|check| check.outcome)
}

#[test]
fn a_store_that_keeps_its_promises_passes() {
    for kind in [Kind::Rgw, Kind::Localstack] {
        let place = server(kind).bucket(true).unwrap();
        run(async {
            let report = examine_store(&open(&place, LOCKS), &Env::default(), false).await.unwrap();
            assert!(report.is_ok(), "{kind}: {report}");
            for name in ["create_only", "locks", "shorten_lock", "delete_locked", "versioning", "object_lock"] {
                assert_eq!(outcome(&report, name), Some(Outcome::Passed), "{kind}, {name}: {report}");
            }
            // The owner may do everything.
            assert_eq!(outcome(&report, "delete"), Some(Outcome::Warned), "{kind}: {report}");
        });
    }
}

/// A server that accepts the headers of a lock and drops them is noticed, because the lock is read back.
#[test]
fn dropped_locks_are_noticed() {
    drops_locks(Kind::Azurite);
}

#[test]
#[ignore = "needs s3s-fs, which `cargo xtask test --stores all` builds"]
fn locks_that_s3s_drops_are_noticed() {
    drops_locks(Kind::S3sFs);
}

fn drops_locks(kind: Kind) {
    let place = server(kind).place().unwrap();
    run(async {
        let report = examine_store(&open(&place, LOCKS), &Env::default(), false).await.unwrap();
        assert!(!report.is_ok(), "{kind}: {report}");
        assert_eq!(outcome(&report, "locks"), Some(Outcome::Failed), "{kind}: {report}");
        let without = examine_store(&open(&place, ""), &Env::default(), false).await.unwrap();
        assert_eq!(outcome(&without, "locks"), None, "{kind}: {without}");
    });
}

#[test]
fn a_writers_credentials_are_seen_to_be_a_writers() {
    let place = server(Kind::Rgw).bucket_for_roles(true).unwrap().as_role(Role::Writer);
    run(async {
        let report = examine_store(&open(&place, LOCKS), &Env::default(), false).await.unwrap();
        assert!(report.is_ok(), "{report}");
        assert_eq!(outcome(&report, "delete"), Some(Outcome::Passed), "{report}");
        assert_eq!(report.may_delete, Some(false));
        let reader = open(&place.as_role(Role::Restorer), LOCKS);
        let report = examine_store(&reader, &Env::default(), true).await.unwrap();
        assert!(report.is_ok(), "{report}");
        let error = examine_store(&reader, &Env::default(), false).await.unwrap_err();
        assert_eq!(error.code(), "store.denied");
    });
}

#[test]
fn a_lifecycle_that_eats_the_vault_is_found() {
    for kind in [Kind::Rgw, Kind::Localstack] {
        let place = server(kind).versioned_bucket().unwrap();
        let rule = |what: &str| {
            let text = format!(
                "<LifecycleConfiguration><Rule><ID>r</ID><Status>Enabled</Status><Filter><Prefix></Prefix></Filter>{what}</Rule></LifecycleConfiguration>"
            );
            let md5 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, <md5::Md5 as md5::Digest>::digest(&text));
            let client = place.client().unwrap();
            let _ = client.call("PUT", &format!("/{}?lifecycle", place.bucket()), &[("content-md5", &md5)], text).unwrap();
        };
        run(async {
            let examine = async || examine_store(&open(&place, ""), &Env::default(), true).await.unwrap();
            assert_eq!(outcome(&examine().await, "lifecycle"), Some(Outcome::Warned), "{kind}");
            rule("<NoncurrentVersionExpiration><NoncurrentDays>3</NoncurrentDays></NoncurrentVersionExpiration>");
            assert_eq!(outcome(&examine().await, "lifecycle"), Some(Outcome::Passed), "{kind}");
            rule("<Expiration><Days>30</Days></Expiration>");
            let report = examine().await;
            assert_eq!(outcome(&report, "lifecycle"), Some(Outcome::Failed), "{kind}: {report}");
        });
    }
}
