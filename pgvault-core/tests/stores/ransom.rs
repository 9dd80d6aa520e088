//! The ransomware drill: somebody has the writer's credentials and tries everything destructive. History stays.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::SignedDuration;
use pgvault_core::store::Store;
use pgvault_core::store::retention::Lock;
use pgvault_core::vault::undelete::{self, Harm};
use pgvault_teststores::{Kind, Place, Role};

use crate::{open, run, server, vault};

const LOCKS: &str = "immutability = { mode = 'compliance', retain = '30d' }";

/// A vault with some history: every object's name and bytes, but for what nothing depends on.
async fn history(store: &Store) -> BTreeMap<String, Bytes> {
    let cluster = vault(store.clone()).await;
    for n in 0..5_u8 {
        let name = cluster.path(&format!("pack/0{n}/01ARZ3NDEKTSV4RRFFQ69G5FA{n}.pack"));
        cluster.store().put_once(&name, Bytes::from(vec![n; 1000])).await.unwrap();
    }
    let mut objects = BTreeMap::new();
    for object in store.list("").await.unwrap() {
        if !object.name.starts_with("probe/") {
            let _ = objects.insert(object.name.clone(), store.get(&object.name).await.unwrap());
        }
    }
    assert!(objects.len() >= 8, "{:?}", objects.keys());
    objects
}

/// Raw requests, which pgvault would never make. Gives how many were answered with success.
fn attack(place: &Place, names: impl Iterator<Item = String>) -> usize {
    let client = place.client().unwrap();
    let (bucket, prefix) = (place.bucket(), place.prefix());
    let mut succeeded = 0;
    let mut send = |method: &str, target: &str, headers: &[(&str, &str)], body: &str| {
        let answer = client.send(method, target, headers, body.to_owned()).unwrap();
        succeeded += usize::from(answer.is_success());
        answer
    };
    for name in names {
        let target = format!("/{bucket}/{prefix}/{name}");
        let _ = send("PUT", &target, &[], "encrypted by somebody else");
        let _ = send("DELETE", &target, &[], "");
        let bypass = [("x-amz-bypass-governance-retention", "true")];
        let versions = client.send("GET", &format!("/{bucket}?versions&prefix={prefix}/{name}"), &[], "").unwrap().text();
        for id in versions.split("<VersionId>").skip(1).filter_map(|rest| rest.split('<').next()) {
            let _ = send("DELETE", &format!("{target}?versionId={id}"), &bypass, "");
            let shorter = "<Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>2026-12-01T00:00:00Z</RetainUntilDate></Retention>";
            let _ = send("PUT", &format!("{target}?retention&versionId={id}"), &bypass, shorter);
            let _ = send("PUT", &format!("{target}?legal-hold&versionId={id}"), &[], "<LegalHold><Status>OFF</Status></LegalHold>");
        }
    }
    let eat = "<LifecycleConfiguration><Rule><ID>x</ID><Status>Enabled</Status><Prefix></Prefix><Expiration><Days>1</Days></Expiration></Rule></LifecycleConfiguration>";
    let _ = send("PUT", &format!("/{bucket}?lifecycle"), &[], eat);
    let off = "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>";
    let _ = send("PUT", &format!("/{bucket}?versioning"), &[], off);
    let _ = send("PUT", &format!("/{bucket}?object-lock"), &[], "<ObjectLockConfiguration/>");
    let _ = send("PUT", &format!("/{bucket}?policy"), &[], "{}");
    let _ = send("DELETE", &format!("/{bucket}?policy"), &[], "");
    let _ = send("DELETE", &format!("/{bucket}"), &[], "");
    succeeded
}

async fn is_whole(store: &Store, history: &BTreeMap<String, Bytes>) -> Vec<String> {
    let mut lost = Vec::new();
    for (name, bytes) in history {
        match store.get_if_exists(name).await.unwrap() {
            Some(found) if found == bytes => {}
            _ => lost.push(name.clone()),
        }
    }
    lost
}

/// With the writer's own credentials: what it may do to what is there is nothing but hide it, and that is undone.
#[test]
fn the_writers_credentials_cannot_destroy_history() {
    let place = server(Kind::Rgw).bucket_for_roles(true).unwrap();
    let writer = place.as_role(Role::Writer);
    run(async {
        let store = open(&writer, LOCKS);
        let history = history(&store).await;
        let hits = attack(&writer, history.keys().cloned());
        // The gateway has no condition that would forbid a PUT over an object: each makes a newer version.
        assert!(hits >= history.len(), "the attack did not even try: {hits}");
        let hidden = undelete::find(&store, "").await.unwrap();
        assert!(hidden.iter().all(|one| one.harm == Harm::Overwritten), "{hidden:?}");
        assert_eq!(hidden.len(), history.len());
        for one in &hidden {
            undelete::bring_back(&store, one).await.unwrap();
        }
        assert_eq!(is_whole(&store, &history).await, [""; 0]);
        assert!(undelete::find(&store, "").await.unwrap().is_empty());
        // The rules of the bucket are what they were.
        let rules = open(&place, "").bucket_rules().await.unwrap();
        assert_eq!((rules.versioning, rules.object_lock, rules.expires_objects), (Some(true), Some(true), Some(false)));
        // And the locks hold for the one who may delete, too.
        let pruner = open(&place.as_role(Role::Pruner), "");
        for name in history.keys() {
            let lock = store.lock_of(name).await.unwrap().unwrap();
            for version in pruner.versions(name).await.unwrap().iter().filter(|version| !version.is_delete_marker) {
                let bytes = store.get_version(name, &version.id).await.unwrap();
                let deleted = pruner.delete_version(name, &version.id).await;
                assert!(deleted.is_err() || bytes == "encrypted by somebody else", "{name}: a locked version was deleted");
            }
            let shorter = Lock { until: lock.until - SignedDuration::from_hours(48), ..lock };
            assert!(store.set_lock(name, &shorter).await.is_err(), "{name}: a lock was made shorter");
        }
        assert_eq!(is_whole(&store, &history).await, [""; 0]);
    });
}

/// With an owner's credentials everything can be hidden, and nothing is gone.
#[test]
fn what_an_owner_deletes_and_overwrites_comes_back() {
    for kind in [Kind::Rgw, Kind::Localstack] {
        let place = server(kind).bucket(true).unwrap();
        run(async {
            let store = open(&place, LOCKS);
            let history = history(&store).await;
            for (n, name) in history.keys().enumerate() {
                if n % 2 == 0 {
                    store.delete(name).await.unwrap();
                } else {
                    place.replace(name, "encrypted by somebody else").unwrap();
                    if n % 3 == 0 {
                        store.delete(name).await.unwrap();
                    }
                }
            }
            assert_eq!(is_whole(&store, &history).await.len(), history.len(), "{kind}");
            let hidden = undelete::find(&store, "").await.unwrap();
            assert_eq!(hidden.len(), history.len(), "{kind}: {hidden:?}");
            for one in &hidden {
                undelete::bring_back(&store, one).await.unwrap();
            }
            assert_eq!(is_whole(&store, &history).await, [""; 0], "{kind}");
            assert!(undelete::find(&store, "").await.unwrap().is_empty(), "{kind}");
            for name in history.keys() {
                assert!(store.lock_of(name).await.unwrap().is_some(), "{kind}: {name} came back without a lock");
            }
            assert!(!store.versions("").await.unwrap().is_empty());
        });
    }
}

/// Without versions there is nothing to bring back, and that is said.
#[test]
fn a_store_without_versions_says_so() {
    let store = Store::in_memory();
    let error = run(undelete::find(&store, "")).unwrap_err();
    assert_eq!(error.kind(), pgvault_core::ErrorKind::Unsupported);
}
