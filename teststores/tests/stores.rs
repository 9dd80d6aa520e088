//! Every server does what the tests of pgvault rely on, and those that are to be refused do what they are refused for.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use pgvault_teststores::{Gate, Kind, Place, Role, Server};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn create(store: &dyn ObjectStore, name: &str, bytes: impl Into<Bytes>) -> object_store::Result<()> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    store.put_opts(&Path::from(name), PutPayload::from_bytes(bytes.into()), options).await.map(drop)
}

/// How many of so many writers are told that they have created the one name.
async fn winners(store: &Arc<dyn ObjectStore>, writers: usize) -> usize {
    let attempts = (0..writers).map(|n| {
        let store = Arc::clone(store);
        async move { create(&*store, "race", format!("writer {n}")).await.is_ok() }
    });
    join_all(attempts).await.into_iter().filter(|won| *won).count()
}

/// What every store does that pgvault works on.
fn a_store_for_pgvault(place: &Place) {
    let store = place.object_store().unwrap();
    runtime().block_on(async {
        create(&*store, "a/one", "1").await.unwrap();
        let taken = create(&*store, "a/one", "2").await.unwrap_err();
        assert!(matches!(taken, Error::AlreadyExists { .. } | Error::Precondition { .. }), "{taken:?}");
        assert_eq!(winners(&store, 16).await, 1);

        let numbers: Bytes = (0..=255).cycle().take(100_000).collect::<Vec<u8>>().into();
        create(&*store, "a/numbers", numbers.clone()).await.unwrap();
        create(&*store, "a/nothing", Bytes::new()).await.unwrap();
        let path = Path::from("a/numbers");
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), numbers);
        for range in [0..1, 10..20, 99_999..100_000, 0..100_000] {
            let (from, to) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
            assert_eq!(store.get_range(&path, range.clone()).await.unwrap(), numbers.slice(from..to), "{range:?}");
        }
        let tail = GetOptions { range: Some(GetRange::Offset(99_990)), ..GetOptions::default() };
        assert_eq!(store.get_opts(&path, tail).await.unwrap().bytes().await.unwrap(), numbers.slice(99_990..));
        assert!(store.get_range(&path, 100_000..100_001).await.is_err(), "behind the end");
        assert_eq!(store.head(&path).await.unwrap().size, 100_000);
        assert_eq!(store.head(&Path::from("a/nothing")).await.unwrap().size, 0);
        assert!(matches!(store.get(&Path::from("a/none")).await.unwrap_err(), Error::NotFound { .. }));

        for name in ["b/c/1", "b/d/1", "b/d/2", "b/e", "b/with space+plus%25.tmp"] {
            create(&*store, name, name.to_owned()).await.unwrap();
        }
        let listed = store.list_with_delimiter(Some(&Path::from("b"))).await.unwrap();
        let folders: Vec<&str> = listed.common_prefixes.iter().map(AsRef::as_ref).collect();
        assert_eq!((folders, listed.objects.len()), (vec!["b/c", "b/d"], 2));
        let after: Vec<_> = store.list_with_offset(Some(&Path::from("b")), &Path::from("b/d/1")).try_collect().await.unwrap();
        let mut after: Vec<String> = after.iter().map(|meta: &object_store::ObjectMeta| meta.location.to_string()).collect();
        // Azurite does not know where to start, and gives all.
        after.retain(|name| place.kind() != Kind::Azurite || &**name > "b/d/1");
        after.sort();
        assert_eq!(after, ["b/d/2", "b/e", Path::from("b/with space+plus%25.tmp").as_ref()]);

        store.delete(&Path::from("b/e")).await.unwrap();
        assert!(matches!(store.get(&Path::from("b/e")).await.unwrap_err(), Error::NotFound { .. }));
        create(&*store, "b/e", "again").await.unwrap();
    });
    look_behind(place);
    assert_eq!(place.sibling("other").names().unwrap(), Vec::<String>::new(), "places are apart");
}

/// The tests' own look into a place.
fn look_behind(place: &Place) {
    let name = place.find("/numbers").unwrap();
    assert_eq!(name, "a/numbers");
    assert_eq!(place.read(&name).unwrap().len(), 100_000);
    place.replace(&name, "tampered").unwrap();
    assert_eq!(place.read(&name).unwrap(), "tampered");
    place.remove(&name).unwrap();
    assert!(place.read(&name).is_err());
    assert!(place.find("/numbers").is_err());
    place.clear().unwrap();
    assert_eq!(place.names().unwrap(), Vec::<String>::new());
}

/// Thousands of names: listings come in pages.
fn long_listings(place: &Place, names: usize) {
    let store = place.object_store().unwrap();
    runtime().block_on(async {
        let puts = futures::stream::iter(0..names).map(|n| {
            let store = Arc::clone(&store);
            async move { create(&*store, &format!("many/{n:06}"), "x").await }
        });
        puts.buffer_unordered(16).try_collect::<Vec<()>>().await.unwrap();
        let listed: Vec<_> = store.list(Some(&Path::from("many"))).try_collect().await.unwrap();
        let mut listed: Vec<String> = listed.into_iter().map(|meta: object_store::ObjectMeta| meta.location.to_string()).collect();
        listed.sort();
        listed.dedup();
        assert_eq!(listed.len(), names);
    });
    place.clear().unwrap();
}

/// Object Lock as S3 has it: what is locked stays, and a lock only grows.
fn object_lock(server: &Server) {
    let place = server.bucket(true).unwrap();
    let client = place.client().unwrap();
    let target = format!("/{}/{}/locked", place.bucket(), place.prefix());
    let date =
        |hours: i64| (jiff::Timestamp::now() + jiff::SignedDuration::from_hours(hours)).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    for mode in ["COMPLIANCE", "GOVERNANCE"] {
        let headers = [("x-amz-object-lock-mode", mode), ("x-amz-object-lock-retain-until-date", &date(2))];
        let put = client.call("PUT", &target, &headers, "precious").unwrap();
        let version = put.header("x-amz-version-id").expect("a version").to_owned();
        let this = format!("{target}?versionId={version}");
        let retention = format!("{target}?retention&versionId={version}");
        assert_eq!(client.call("GET", &retention, &[], "").unwrap().element("Mode").as_deref(), Some(mode));
        assert_eq!(client.send("DELETE", &this, &[], "").unwrap().status, 403, "{mode}");
        let retain = |hours: i64, more: &[(&str, &str)]| {
            let until = date(hours);
            let body = format!("<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>");
            client.send("PUT", &retention, more, body).unwrap().status
        };
        assert_eq!((retain(1, &[]), retain(3, &[])), (403, 200), "{mode}: shorter, longer");
        let bypass = [("x-amz-bypass-governance-retention", "true")];
        let allowed = mode == "GOVERNANCE";
        assert_eq!(retain(1, &bypass) == 200, allowed, "{mode}");
        // A delete without a version hides the object; what is locked is still there.
        let _ = client.call("DELETE", &target, &[], "").unwrap();
        assert_eq!(client.send("GET", &target, &[], "").unwrap().status, 404);
        assert_eq!(client.call("GET", &this, &[], "").unwrap().text(), "precious");
        assert_eq!(client.send("DELETE", &this, &bypass, "").unwrap().is_success(), allowed, "{mode}");
    }
}

/// What was overwritten or deleted can be listed, page by page, and read.
fn versions(server: &Server, marker: &str) {
    let place = server.versioned_bucket().unwrap();
    for bytes in ["1", "22", "333"] {
        place.replace("x", bytes).unwrap();
        place.replace("y", bytes).unwrap();
    }
    place.remove("x").unwrap();
    assert!(place.read("x").is_err());
    let client = place.client().unwrap();
    let list =
        |more: &str| client.call("GET", &format!("/{}?versions&prefix={}%2F{more}", place.bucket(), place.prefix()), &[], "");
    let all = list("").unwrap().text();
    assert_eq!(all.matches("<Version>").count(), 6, "{all}");
    assert_eq!(all.matches("<Size>333</Size>").count() + all.matches("<Size>3</Size>").count(), 2, "{all}");
    let first = list("&max-keys=4").unwrap();
    assert_eq!(first.element("IsTruncated").as_deref(), Some("true"), "{first}");
    let next = |name: &str| first.element(&format!("Next{name}")).unwrap_or_else(|| panic!("no {name} in {first}"));
    let (key, version) = if marker == "marker" {
        (next("Marker"), format!("generation-marker={}", next("GenerationMarker")))
    } else {
        (next("KeyMarker"), format!("version-id-marker={}", next("VersionIdMarker")))
    };
    let second = list(&format!("&{marker}={}&{version}", key.replace('/', "%2F"))).unwrap();
    let entries = |answer: &str| answer.matches("<Version>").count() + answer.matches("<DeleteMarker>").count();
    assert_eq!(entries(&first.text()) + entries(&second.text()), entries(&all), "{}", second.text());
}

#[test]
fn a_directory_is_a_store_for_pgvault() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::directory(&folder.path().join("vault"));
    assert_eq!((place.url(), place.kind()), (format!("file://{}/vault", folder.path().display()), Kind::Local));
    a_store_for_pgvault(&place);
}

#[test]
fn azurite_is_a_store_for_pgvault() {
    let server = Server::shared(Kind::Azurite).unwrap();
    let place = server.place().unwrap();
    assert!(place.url().starts_with("az://devstoreaccount1/pgvault-"), "{}", place.url());
    a_store_for_pgvault(&place);
    long_listings(&place, 5100);
    assert!(server.bucket(true).is_err());
}

#[test]
fn the_stand_in_for_google_is_a_store_for_pgvault() {
    let server = Server::shared(Kind::Gcs).unwrap();
    a_store_for_pgvault(&server.place().unwrap());
    versions(&server, "marker");
    long_listings(&server.place().unwrap(), 2100);
}

#[test]
fn the_stand_in_for_google_keeps_what_is_retained_or_held() {
    let server = Server::shared(Kind::Gcs).unwrap();
    let place = server.bucket(true).unwrap();
    let client = place.client().unwrap();
    let json = [("content-type", "application/json")];
    let object = format!("/storage/v1/b/{}/o/{}%2Fx", place.bucket(), place.prefix());
    let patch = |query: &str, body: &str| client.send("PATCH", &format!("{object}{query}"), &json, body.to_owned()).unwrap().status;
    let held = || place.object_store().unwrap();
    for (mode, bypassed) in [("Unlocked", 200), ("Locked", 403)] {
        place.replace("x", "precious").unwrap();
        assert_eq!(patch("", &format!(r#"{{"retention":{{"mode":"{mode}","retainUntilTime":"2999-01-01T00:00:00Z"}}}}"#)), 200);
        let said: serde_json::Value = serde_json::from_slice(&client.call("GET", &object, &[], "").unwrap().body).unwrap();
        assert_eq!((&said["retention"]["mode"], &said["temporaryHold"]), (&mode.into(), &false.into()));
        let denied = runtime().block_on(async { held().delete(&Path::from("x")).await.unwrap_err() });
        assert!(matches!(denied, Error::PermissionDenied { .. }), "{denied:?}");
        assert!(place.replace("x", "overwritten").is_err());
        assert_eq!(patch("", r#"{"retention":null}"#), 403);
        assert_eq!(patch("?overrideUnlockedRetention=true", r#"{"retention":null}"#), bypassed);
        if mode == "Unlocked" {
            for hold in ["temporaryHold", "eventBasedHold"] {
                assert_eq!(patch("", &format!(r#"{{"{hold}":true}}"#)), 200);
                assert!(place.remove("x").is_err(), "{hold}");
                assert_eq!(patch("", &format!(r#"{{"{hold}":false}}"#)), 200);
            }
            place.remove("x").unwrap();
        }
    }
    // The same in the XML API, with the retention at the upload.
    let target = format!("/{}/{}/y", place.bucket(), place.prefix());
    let lock = [("x-goog-object-lock-mode", "COMPLIANCE"), ("x-goog-object-lock-retain-until-date", "2999-01-01T00:00:00Z")];
    let _ = client.call("PUT", &target, &lock, "precious").unwrap();
    assert_eq!(client.send("DELETE", &target, &[], "").unwrap().status, 403);
    let retention = |until: &str| {
        let body = format!("<Retention><Mode>COMPLIANCE</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>");
        client.send("PUT", &format!("{target}?retention"), &[], body).unwrap().status
    };
    assert_eq!((retention("2998-01-01T00:00:00Z"), retention("2999-06-01T00:00:00Z")), (403, 200));
    let shown = client.call("GET", &format!("{target}?retention"), &[], "").unwrap();
    assert_eq!(shown.element("RetainUntilDate").as_deref(), Some("2999-06-01T00:00:00Z"));
}

#[test]
fn localstack_is_a_store_for_pgvault_and_honours_locks() {
    let server = Server::shared(Kind::Localstack).unwrap();
    a_store_for_pgvault(&server.place().unwrap());
    versions(&server, "key-marker");
    object_lock(&server);
}

#[test]
fn ceph_is_a_store_for_pgvault_and_honours_locks() {
    let server = Server::shared(Kind::Rgw).unwrap();
    let place = server.place().unwrap();
    a_store_for_pgvault(&place);
    long_listings(&place, 2100);
    versions(&server, "key-marker");
    object_lock(&server);
    // A signature names the host that the client has spoken to: through a gate it stays valid.
    let gate = Gate::open(place.endpoint().unwrap()).unwrap();
    place.through(&gate).unwrap().replace("through/a gate", "x").unwrap();
    assert_eq!((place.read("through/a gate").unwrap(), gate.requests()), ("x".into(), 1));
    // Its certificate counts, and so does a signature.
    let encrypted = place.encrypted().unwrap();
    assert!(encrypted.endpoint().unwrap().starts_with("https://localhost:"));
    encrypted.replace("over/tls", "x").unwrap();
    assert_eq!(place.read("over/tls").unwrap(), "x");
    let mut forged = server.info().clone();
    forged.keys.get_mut(&Role::Owner).unwrap().secret.push('x');
    let answer = forged.client(Role::Owner).unwrap().send("GET", &format!("/{}", place.bucket()), &[], "").unwrap();
    assert_eq!(answer.status, 403, "{answer}");
    server.ensure_running().unwrap();
}

/// What a writer, a restorer and a pruner may do, and what none of them may: the policy that is recommended, against the
/// server that enforces it.
#[test]
fn ceph_tells_a_writer_a_restorer_and_a_pruner_apart() {
    let server = Server::shared(Kind::Rgw).unwrap();
    let place = server.bucket_for_roles(true).unwrap();
    let target = format!("/{}/{}/object", place.bucket(), place.prefix());
    let until = (jiff::Timestamp::now() + jiff::SignedDuration::from_hours(2)).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let lock = [("x-amz-object-lock-mode", "GOVERNANCE"), ("x-amz-object-lock-retain-until-date", until.as_str())];
    let status = |role: Role, method: &str, target: &str, headers: &[(&str, &str)], body: &str| {
        place.as_role(role).client().unwrap().send(method, target, headers, body.to_owned()).unwrap().status
    };
    let put = place.as_role(Role::Writer).client().unwrap().call("PUT", &target, &lock, "by the writer").unwrap();
    let version = put.header("x-amz-version-id").unwrap().to_owned();
    let this = format!("{target}?versionId={version}");
    let bucket = format!("/{}", place.bucket());
    for role in [Role::Writer, Role::Restorer, Role::Pruner] {
        assert_eq!(status(role, "GET", &target, &[], ""), 200, "{role:?}");
        assert_eq!(status(role, "GET", &format!("{bucket}?list-type=2"), &[], ""), 200, "{role:?}");
        assert_eq!(status(role, "GET", &format!("{target}?retention&versionId={version}"), &[], ""), 200, "{role:?}");
        for (method, what, body) in [
            ("DELETE", bucket.clone(), ""),
            (
                "PUT",
                format!("{bucket}?versioning"),
                "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>",
            ),
            ("PUT", format!("{bucket}?policy"), "{}"),
            ("DELETE", format!("{bucket}?policy"), ""),
            (
                "PUT",
                format!("{bucket}?lifecycle"),
                "<LifecycleConfiguration><Rule><ID>x</ID><Prefix></Prefix><Status>Enabled</Status><Expiration><Days>1</Days></Expiration></Rule></LifecycleConfiguration>",
            ),
        ] {
            assert_eq!(status(role, method, &what, &[], body), 403, "{role:?} may {method} {what}");
        }
    }
    assert_eq!(status(Role::Restorer, "PUT", &format!("{target}2"), &[], "x"), 403);
    for role in [Role::Writer, Role::Restorer] {
        assert_eq!(status(role, "DELETE", &target, &[], ""), 403, "{role:?}");
        assert_eq!(status(role, "DELETE", &this, &[], ""), 403, "{role:?}");
    }
    let bypass = [("x-amz-bypass-governance-retention", "true")];
    for role in [Role::Writer, Role::Restorer, Role::Pruner] {
        assert_eq!(status(role, "DELETE", &this, &bypass, ""), 403, "{role:?}");
        let shorter = "<Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>2020-01-01T00:00:00Z</RetainUntilDate></Retention>";
        assert_ne!(status(role, "PUT", &format!("{target}?retention&versionId={version}"), &bypass, shorter), 200, "{role:?}");
    }
    assert_eq!(status(Role::Pruner, "DELETE", &this, &[], ""), 403, "it is retained");
    assert_eq!(status(Role::Pruner, "DELETE", &target, &[], ""), 204, "a delete marker");
    assert_eq!(status(Role::Writer, "GET", &this, &[], ""), 200);
}

#[test]
fn s3rver_overwrites_what_exists() {
    let server = Server::shared(Kind::S3rver).unwrap();
    let store = server.place().unwrap().object_store().unwrap();
    let won = runtime().block_on(async { winners(&store, 4).await });
    assert_eq!(won, 4, "pgvault is to refuse it for this");
}

#[test]
#[ignore = "it takes minutes to build; `cargo xtask test --stores all` runs it"]
fn s3s_is_a_store_that_drops_locks_without_a_word() {
    let server = Server::shared(Kind::S3sFs).unwrap();
    let place = server.place().unwrap();
    let store = place.object_store().unwrap();
    // One after the other. Of several at once more than one may win.
    runtime().block_on(async {
        create(&*store, "a", "1").await.unwrap();
        assert!(create(&*store, "a", "2").await.is_err());
    });
    let client = place.client().unwrap();
    let target = format!("/{}/{}/locked", place.bucket(), place.prefix());
    let lock = [("x-amz-object-lock-mode", "COMPLIANCE"), ("x-amz-object-lock-retain-until-date", "2999-01-01T00:00:00Z")];
    let _ = client.call("PUT", &target, &lock, "not locked at all").unwrap();
    assert!(client.call("DELETE", &target, &[], "").is_ok(), "pgvault is to notice it for this");
}

#[test]
#[ignore = "it takes a quarter of an hour to build; `cargo xtask test --stores all` runs it"]
fn garage_overwrites_what_exists() {
    let server = Server::shared(Kind::Garage).unwrap();
    let store = server.place().unwrap().object_store().unwrap();
    assert!(runtime().block_on(winners(&store, 8)) > 1, "pgvault is to refuse it for this");
}
