//! Where objects are put, and with what: storage classes, tags, the store's own encryption, buckets in host names.

use bytes::Bytes;
use pgvault_core::store::settings::S3Encryption;
use pgvault_core::store::{Put, Store};
use pgvault_core::vault::layout;
use pgvault_teststores::Kind;

use crate::{run, server, settings};

/// `LocalStack` keeps classes and tags, and shows them.
#[test]
fn each_kind_of_object_gets_its_own_class_and_tags() {
    let place = server(Kind::Localstack).place().unwrap();
    run(async {
        let more = "storage_class = { data = 'STANDARD_IA' }\ntags = { data = { team = 'shop-1' }, wal = { kind = 'wal' } }";
        let store = Store::open(&place.url(), settings(&place, more)).unwrap().with_classes(layout::class_of);
        let client = place.client().unwrap();
        for (name, class, tag) in [
            ("c/x-1/pack/00/a.pack", Some("STANDARD_IA"), Some("shop-1")),
            ("c/x-1/wal/00000001/a.wal", None, Some("wal")),
            ("c/x-1/snap/a.snap", None, None),
        ] {
            store.put_once(name, Bytes::from_static(b"x")).await.unwrap();
            let target = format!("/{}/{}/{name}", place.bucket(), place.prefix());
            let head = client.call("HEAD", &target, &[], "").unwrap();
            assert_eq!(head.header("x-amz-storage-class"), class, "{name}");
            let tags = client.call("GET", &format!("{target}?tagging"), &[], "").unwrap().text();
            match tag {
                Some(tag) => assert!(tags.contains(&format!("<Value>{tag}</Value>")), "{name}: {tags}"),
                None => assert!(!tags.contains("<Value>"), "{name}: {tags}"),
            }
        }
    });
}

/// With a key of the customer's own, everything that reads an object needs it, a look at one of its versions too.
#[test]
fn objects_under_a_customers_key_are_read_with_it_only() {
    let place = server(Kind::Localstack).versioned_bucket().unwrap();
    run(async {
        let mut with_key = settings(&place, "");
        let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [7_u8; 32]);
        with_key.s3.encryption = Some(S3Encryption::Customer(key.into()));
        let store = Store::open(&place.url(), with_key).unwrap();
        let bytes = Bytes::from(vec![1; 100_000]);
        assert_eq!(store.put_new("a", bytes.clone()).await.unwrap(), Put::Created);
        assert_eq!(store.put_new("a", bytes.clone()).await.unwrap(), Put::Same);
        assert_eq!(store.get_range("a", 5..10).await.unwrap(), bytes[5..10]);
        let version = store.versions("a").await.unwrap().remove(0);
        assert_eq!(store.get_version("a", &version.id).await.unwrap(), bytes);
        let without = Store::open(&place.url(), settings(&place, "")).unwrap();
        assert!(without.get("a").await.is_err());
    });
}

/// Bytes flow no faster than allowed, and fewer requests run at once than would otherwise.
#[test]
fn limits_hold() {
    let place = server(Kind::Azurite).place().unwrap();
    run(async {
        let store =
            Store::open(&place.url(), settings(&place, "limits = { requests = 2, upload = '4MiB', download = '4MiB' }")).unwrap();
        let begun = std::time::Instant::now();
        let names: Vec<String> = (0..8).map(|n| format!("{n}")).collect();
        let puts = names.iter().map(|name| store.put_once(name, Bytes::from(vec![1; 1 << 20])));
        for put in futures::future::join_all(puts).await {
            put.unwrap();
        }
        // The last of 8 MiB begins when 7 are through.
        assert!(begun.elapsed().as_millis() >= 1700, "{:?}", begun.elapsed());
        let begun = std::time::Instant::now();
        for got in futures::future::join_all(names.iter().map(|name| store.get(name))).await {
            assert_eq!(got.unwrap().len(), 1 << 20);
        }
        assert!(begun.elapsed().as_millis() >= 1900, "{:?}", begun.elapsed());
        let requests = store.requests();
        assert_eq!(
            (requests.put, requests.get, requests.bytes_sent, requests.bytes_received),
            (8, 8, 8 << 20, 8 << 20),
            "{requests:?}"
        );
    });
}
