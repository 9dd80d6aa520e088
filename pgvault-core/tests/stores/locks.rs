//! Locks: set with the PUT, made longer and never shorter, and only where history depends on an object.

use std::time::Duration;

use bytes::Bytes;
use jiff::SignedDuration;
use pgvault_core::ErrorKind;
use pgvault_core::store::retention::{Lock, LockMode};
use pgvault_core::store::{Put, Store};
use pgvault_core::vault::layout;
use pgvault_teststores::Kind;

use crate::{open, run, server, vault};

/// Servers that keep locks. The last is our own stand-in, and shows only what is sent.
const KEEPERS: [Kind; 3] = [Kind::Rgw, Kind::Localstack, Kind::Gcs];

const RETAIN: &str = "immutability = { mode = 'compliance', retain = '30d' }";

/// From now until a lock's end, in days.
fn days(store: &Store, lock: Option<Lock>) -> i64 {
    lock.map_or(-1, |lock| lock.until.duration_since(store.now()).as_hours() / 24)
}

#[test]
fn what_history_depends_on_is_locked_by_the_put_that_creates_it() {
    for kind in KEEPERS {
        let place = server(kind).bucket(true).unwrap();
        run(async {
            let store = open(&place, RETAIN);
            let cluster = vault(store.clone()).await;
            let pack = cluster.path("pack/00/x.pack");
            assert_eq!(store.put_new(&pack, Bytes::from_static(b"x")).await.unwrap(), Put::Created);
            // The vault that was opened knows which names are which; the bare store takes all for data.
            let session = cluster.path(&layout::session(ulid::Ulid(1), "witness"));
            cluster.store().put_once(&session, Bytes::from_static(b"s")).await.unwrap();
            for object in store.list("").await.unwrap() {
                let lock = store.lock_of(&object.name).await.unwrap();
                if object.name == session || object.name.starts_with("probe/") {
                    continue;
                }
                // 30 days, and the two in which a commit may need it.
                let left = days(&store, lock);
                assert!((31..=32).contains(&left), "{kind}: {} is locked for {left} days: {lock:?}", object.name);
                assert_eq!(lock.unwrap().mode, LockMode::Compliance);
            }
            assert_eq!(cluster.store().lock_of(&session).await.unwrap(), None, "{kind}");
        });
    }
}

#[test]
fn a_lock_is_made_longer_and_never_shorter() {
    for kind in KEEPERS {
        let place = server(kind).bucket(true).unwrap();
        run(async {
            let short = open(&place, "immutability = { mode = 'compliance', retain = '10d' }");
            short.put_once("a", Bytes::from_static(b"a")).await.unwrap();
            let before = short.lock_of("a").await.unwrap().unwrap();
            // Already longer than asked for: nothing changes.
            short.keep(&["a".into()]).await.unwrap();
            assert_eq!(short.lock_of("a").await.unwrap().unwrap(), before, "{kind}");
            let long = open(&place, "immutability = { mode = 'compliance', retain = '60d' }");
            long.keep(&["a".into()]).await.unwrap();
            let after = long.lock_of("a").await.unwrap().unwrap();
            assert!((59..=60).contains(&days(&long, Some(after))), "{kind}: {after:?}");
            short.keep(&["a".into()]).await.unwrap();
            assert_eq!(short.lock_of("a").await.unwrap().unwrap(), after, "{kind}");
            // The store itself refuses what pgvault never asks for.
            let shorter = Lock { until: after.until - SignedDuration::from_hours(24), ..after };
            assert!(short.set_lock("a", &shorter).await.is_err(), "{kind}: a lock was made shorter");
            assert_eq!(short.lock_of("a").await.unwrap().unwrap(), after, "{kind}");
            let missing = long.keep(&["missing".into()]).await.unwrap_err();
            assert_eq!(missing.kind(), ErrorKind::NotFound, "{kind}: {missing:?}");
        });
    }
}

/// Who sets nothing but has a bucket that locks by itself gets its locks.
#[test]
fn a_buckets_own_retention_is_enough() {
    for kind in [Kind::Rgw, Kind::Localstack] {
        let place = server(kind).bucket(true).unwrap();
        let rule = "<ObjectLockConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><ObjectLockEnabled>Enabled</ObjectLockEnabled>\
                    <Rule><DefaultRetention><Mode>GOVERNANCE</Mode><Days>3</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
        let put = place.client().unwrap().call("PUT", &format!("/{}?object-lock", place.bucket()), &[], rule);
        let _ = put.unwrap();
        run(async {
            let store = open(&place, "");
            let _ = vault(store.clone()).await;
            let lock = store.lock_of("vault.json").await.unwrap().unwrap();
            assert_eq!(lock.mode, LockMode::Governance, "{kind}");
            assert!((2..=3).contains(&days(&store, Some(lock))), "{kind}: {lock:?}");
            let rules = store.bucket_rules().await.unwrap();
            assert_eq!((rules.versioning, rules.object_lock), (Some(true), Some(true)), "{kind}");
            assert_eq!(rules.default_lock, Some((LockMode::Governance, 3)), "{kind}");
        });
    }
}

#[test]
fn a_hold_is_laid_and_lifted() {
    for kind in KEEPERS {
        let place = server(kind).bucket(true).unwrap();
        run(async {
            let store = open(&place, "");
            store.put_once("a", Bytes::from_static(b"a")).await.unwrap();
            assert!(!store.is_held("a").await.unwrap(), "{kind}");
            store.set_hold("a", true).await.unwrap();
            assert!(store.is_held("a").await.unwrap(), "{kind}");
            if kind != Kind::Gcs {
                let version = store.versions("a").await.unwrap().remove(0);
                let refused = store.delete_version("a", &version.id).await.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Immutable, "{kind}: {refused:?}");
            }
            store.set_hold("a", false).await.unwrap();
            assert!(!store.is_held("a").await.unwrap(), "{kind}");
        });
    }
}

/// T28: a bucket that locks asks for a checksum with each PUT.
#[test]
fn t28_puts_carry_what_a_locking_bucket_asks_for() {
    let place = server(Kind::Rgw).bucket(true).unwrap();
    run(async {
        let store = open(&place, RETAIN);
        let body = Bytes::from(vec![7; 8 << 20]);
        assert_eq!(store.put_new("big", body.clone()).await.unwrap(), Put::Created);
        assert_eq!(store.put_new("big", body.clone()).await.unwrap(), Put::Same);
        assert_eq!(store.get("big").await.unwrap(), body);
    });
}

/// A lock's end is counted by the store's clock, so a machine whose clock is behind does not lock too short.
#[test]
fn the_stores_clock_decides_when_a_lock_ends() {
    #[derive(Debug)]
    struct Late;
    impl pgvault_core::clock::Clock for Late {
        fn now(&self) -> jiff::Timestamp {
            jiff::Timestamp::now() - SignedDuration::from_hours(24 * 40)
        }
    }
    let place = server(Kind::Gcs).bucket(true).unwrap();
    run(async {
        let settings = pgvault_core::store::Settings { clock: std::sync::Arc::new(Late), ..crate::settings(&place, RETAIN) };
        let store = Store::open(&place.url(), settings).unwrap();
        // The first answer tells the time.
        assert!(store.get_if_exists("a").await.unwrap().is_none());
        assert!(store.clock_ahead().unwrap() > SignedDuration::from_hours(24 * 39));
        store.put_once("a", Bytes::from_static(b"a")).await.unwrap();
        let until = store.lock_of("a").await.unwrap().unwrap().until;
        let left = until.duration_since(jiff::Timestamp::now());
        assert!(left > SignedDuration::from_hours(24 * 31) && left < SignedDuration::from_hours(24 * 33), "{left:?}");
        assert!(Duration::try_from(left).is_ok());
    });
}
