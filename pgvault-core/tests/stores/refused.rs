//! Stores that answer 200 and do something else are refused, with the reason; unless somebody takes it upon himself.

use bytes::Bytes;
use pgvault_core::ErrorKind;
use pgvault_core::env::Env;
use pgvault_core::store::Put;
use pgvault_core::vault::Vault;
use pgvault_teststores::Kind;

use crate::{open, run, server};

#[test]
fn a_server_that_overwrites_is_refused() {
    let place = server(Kind::S3rver).place().unwrap();
    run(async {
        let error = Vault::create(open(&place, ""), Env::default()).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Unsupported, "store.overwrites"), "{error:?}");
        assert!(error.hint().unwrap().contains("If-None-Match"), "{error:?}");
        assert!(!place.names().unwrap().contains(&"vault.json".to_owned()));
    });
}

/// It is written into the vault, so that no writer forgets to look first.
#[test]
fn one_writer_alone_may_use_it_and_the_vault_says_so() {
    let place = server(Kind::S3rver).place().unwrap();
    run(async {
        let (_, created) = Vault::create_for_single_writer(open(&place, ""), Env::default()).await.unwrap();
        assert!(created);
        let vault = Vault::open(open(&place, ""), Env::default()).await.unwrap();
        assert_eq!(vault.document().features["write"], ["single-writer"]);
        let put = |bytes: &'static [u8]| vault.store().put_new("c/x-1/pack/00/a.pack", Bytes::from_static(bytes));
        assert_eq!(put(b"one").await.unwrap(), Put::Created);
        assert_eq!(put(b"one").await.unwrap(), Put::Same);
        assert_eq!(put(b"two").await.unwrap(), Put::Different(Bytes::from_static(b"one")));
        assert_eq!(vault.store().get("c/x-1/pack/00/a.pack").await.unwrap(), "one");
        // `init` again, with or without the flag, finds the vault.
        assert!(!Vault::create_for_single_writer(open(&place, ""), Env::default()).await.unwrap().1);
        assert!(!Vault::create(open(&place, ""), Env::default()).await.unwrap().1);
    });
}

#[test]
fn a_vault_of_several_writers_does_not_become_one_of_a_single_one() {
    let place = server(Kind::Azurite).place().unwrap();
    run(async {
        let _ = Vault::create(open(&place, ""), Env::default()).await.unwrap();
        let error = Vault::create_for_single_writer(open(&place, ""), Env::default()).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "vault.several_writers"));
    });
}

/// A bucket that does not exist is not a vault that does not exist.
#[test]
fn a_missing_bucket_is_named() {
    for kind in [Kind::Rgw, Kind::Localstack, Kind::Azurite, Kind::Gcs] {
        let place = server(kind).place().unwrap();
        let url = place.url().replace(place.bucket(), "pgvault-no-such-bucket");
        run(async {
            let store = pgvault_core::store::Store::open(&url, crate::settings(&place, "")).unwrap();
            for error in [
                Vault::open(store.clone(), Env::default()).await.unwrap_err(),
                store.get("a").await.unwrap_err(),
                store.list("").await.unwrap_err(),
                store.put_new("a", Bytes::new()).await.unwrap_err(),
            ] {
                assert_eq!((error.kind(), error.code()), (ErrorKind::NoVault, "store.no_bucket"), "{kind}: {error:?}");
            }
        });
    }
}

/// Wrong credentials are refused at once, with the provider's code, and never look like an empty store.
#[test]
fn wrong_credentials_are_told_at_once() {
    let place = server(Kind::Rgw).place().unwrap();
    run(async {
        let mut settings = crate::settings(&place, "");
        settings.s3.secret_access_key = Some("not the secret".to_owned().into());
        let store = pgvault_core::store::Store::open(&place.url(), settings).unwrap();
        let begun = std::time::Instant::now();
        for error in [
            store.get("a").await.unwrap_err(),
            store.list("").await.unwrap_err(),
            store.put_new("a", Bytes::from_static(b"a")).await.unwrap_err(),
        ] {
            assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "store.denied"), "{error:?}");
            assert!(error.to_string().contains("SignatureDoesNotMatch"), "{error}");
        }
        assert_eq!(store.requests().retried, 0);
        assert!(begun.elapsed().as_secs() < 20);
    });
}

/// TLS with a certificate authority of one's own works when it is named, and is an error that does not wait otherwise.
#[test]
fn an_unknown_certificate_authority_is_refused_until_it_is_named() {
    let place = server(Kind::Rgw).place().unwrap().encrypted().unwrap();
    run(async {
        let store = open(&place, "");
        store.put_once("a", Bytes::from_static(b"a")).await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), "a");
        let settings = pgvault_core::store::Settings { ca_file: None, ..crate::settings(&place, "") };
        let store = pgvault_core::store::Store::open(&place.url(), settings).unwrap();
        let error = store.get("a").await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "store.untrusted"), "{error:?}");
        assert_eq!(store.requests().retried, 0);
    });
}

/// On a bucket that keeps versions, Ceph's gateway and `LocalStack` tell every writer of the same moment that it won. There the
/// first version decides, and the vault says so.
#[test]
fn on_a_bucket_with_versions_the_first_of_many_writers_wins() {
    for kind in [Kind::Rgw, Kind::Localstack] {
        for place in [server(kind).versioned_bucket().unwrap(), server(kind).bucket(true).unwrap()] {
            run(async {
                let (vault, _) = Vault::create(open(&place, ""), Env::default()).await.unwrap();
                assert_eq!(vault.document().features["write"], ["first-version"], "{kind}");
                // Another process learns it from the vault.
                let vault = Vault::open(open(&place, ""), Env::default()).await.unwrap();
                for round in 0..10 {
                    let name = format!("c/x-1/wal/00000001/{round:024}.wal");
                    let bytes = |n: u8| Bytes::from(vec![n; 10_000]);
                    let puts = futures::future::join_all((0..16).map(|n| vault.store().put_new(&name, bytes(n)))).await;
                    let kept = vault.store().get(&name).await.unwrap();
                    for (n, put) in puts.into_iter().enumerate() {
                        let mine = bytes(u8::try_from(n).unwrap());
                        let said = match put.unwrap() {
                            Put::Created => mine,
                            Put::Different(other) => other,
                            Put::Same => panic!("writer {n} has not written before"),
                        };
                        let [said, kept] = [said, kept.clone()].map(|bytes| bytes[0]);
                        assert_eq!(said, kept, "{kind}, round {round}, writer {n}: who has won");
                    }
                    assert_eq!(vault.store().put_new(&name, kept.clone()).await.unwrap(), Put::Same, "{kind}");
                }
                // What lost is hidden behind what won: nothing to bring back.
                assert!(pgvault_core::vault::undelete::find(vault.store(), "").await.unwrap().is_empty(), "{kind}");
            });
        }
    }
}

/// A bucket without versions needs none of this.
#[test]
fn a_bucket_without_versions_needs_no_second_look() {
    for kind in [Kind::Rgw, Kind::Localstack, Kind::Azurite, Kind::Gcs] {
        let place = server(kind).place().unwrap();
        run(async {
            let (vault, _) = Vault::create(open(&place, ""), Env::default()).await.unwrap();
            assert_eq!(vault.document().features["write"], [""; 0], "{kind}");
        });
    }
}
