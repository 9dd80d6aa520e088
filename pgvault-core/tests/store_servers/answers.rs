//! Answers that pgvault must not misunderstand, one by one.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pgvault_core::format::MAX_OBJECT;
use pgvault_core::store::{Put, Settings, Store};
use pgvault_core::testing::proxy::{Canned, Proxy, Rule, Speed, Wire};
use pgvault_core::{Error, ErrorKind};
use pgvault_teststores::{Kind, Server};

use crate::wire::{Behind, address, impatient};
use crate::{runtime, settings};

const X: Bytes = Bytes::from_static(b"x");

/// Everything that reads, and its error.
async fn reads(store: &Store) -> Vec<(&'static str, Option<Error>)> {
    vec![
        ("get", store.get("a/x").await.err()),
        ("get_if_exists", store.get_if_exists("a/x").await.err()),
        ("get_range", store.get_range("a/x", 0..1).await.err()),
        ("head", store.head("a/x").await.err()),
        ("list", store.list("a/").await.err()),
        ("list_after", store.list_after("a/", Some("a/b")).await.err()),
        ("list_directories", store.list_directories("a/").await.err()),
    ]
}

/// T1: a 404 that is not the store's own word about the object is no absence, and neither is a missing bucket. A HEAD cannot tell
/// the one from the other; nothing in pgvault asks with a HEAD whether something is there.
#[test]
fn t1_a_404_of_somebody_else_is_not_an_absence() {
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        behind.direct.put_once("a/x", X).await.unwrap();
        let page =
            Canned { status: 404, headers: vec![("content-type".into(), "text/html".into())], body: "<h1>nginx</h1>".into() };
        for (canned, kind) in [
            (page, ErrorKind::Storage),
            (Canned::empty(404), ErrorKind::Storage),
            (Canned::s3(404, "NoSuchBucket"), ErrorKind::NoVault),
        ] {
            behind.proxy.heal();
            behind.proxy.rule(Rule::new(Wire::Answer(canned.clone())));
            for (what, error) in reads(&behind.through).await {
                let error = error.unwrap_or_else(|| panic!("{what} succeeds with {canned:?}"));
                if what != "head" {
                    assert_eq!(error.kind(), kind, "{what}, {canned:?}: {error:?}");
                    assert!(error.hint().is_some(), "{what}, {canned:?}: {error:?}");
                }
            }
        }
        behind.proxy.heal();
        behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(404, "NoSuchKey"))));
        assert_eq!(behind.through.get_if_exists("a/x").await.unwrap(), None, "the store's own word counts");
    });
}

/// T1: of two stores, one fails and the other has nothing: who asks both must be able to tell.
#[test]
fn t1_a_store_that_fails_is_told_from_one_that_has_nothing() {
    runtime().block_on(async {
        let (failing, empty) = (Behind::new(Kind::Rgw).await, Behind::new(Kind::Rgw).await);
        for fault in [Wire::Reset, Wire::HalfHeaders, Wire::Garbage, Wire::Answer(Canned::empty(500)), Wire::StallHeaders] {
            failing.proxy.heal();
            failing.proxy.rule(Rule::new(fault.clone()));
            for (what, error) in reads(&failing.through).await {
                let error = error.unwrap_or_else(|| panic!("{what} with {fault:?} finds nothing, instead of failing"));
                assert_eq!(error.kind(), ErrorKind::Storage, "{what} with {fault:?}: {error:?}");
            }
        }
        assert_eq!(empty.through.get_if_exists("a/x").await.unwrap(), None);
        assert!(empty.through.list("a/").await.unwrap().is_empty());
    });
}

/// T7: a PUT that is answered with 200 and an error is not acknowledged before the object is there.
#[test]
fn t7_a_put_that_is_answered_with_200_and_an_error_is_no_success() {
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        for (n, code) in ["InternalError", "SlowDown", "RequestTimeout"].into_iter().enumerate() {
            behind.proxy.heal();
            behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(200, code))).method("PUT").times(1));
            let name = format!("a/{n}");
            assert_eq!(behind.through.put_new(&name, X).await.unwrap(), Put::Created);
            assert_eq!(behind.direct.get(&name).await.unwrap(), X, "{code}");
            assert_eq!(behind.proxy.happened().len(), 1);
        }
        behind.proxy.heal();
        behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(200, "InternalError"))).method("PUT"));
        let error = behind.through.put_new("a/never", X).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Storage, "store.failed"), "{error:?}");
        assert!(error.to_string().contains("InternalError"), "{error}");
        assert_eq!(behind.direct.get_if_exists("a/never").await.unwrap(), None);
        // A refusal for good stays one, whatever the status says.
        behind.proxy.heal();
        behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(200, "NotImplemented"))).method("PUT"));
        assert_eq!(behind.through.put_new("a/never", X).await.unwrap_err().kind(), ErrorKind::Unsupported);
    });
}

/// T24: who asks for patience gets it, and not for ever.
#[test]
fn t24_retry_after_is_honoured_and_bounded() {
    runtime().block_on(async {
        for canned in [Canned::s3(503, "SlowDown"), Canned::empty(429), Canned::empty(503)] {
            let behind = Behind::new(Kind::Rgw).await;
            behind.proxy.rule(Rule::new(Wire::Answer(canned.clone().header("retry-after", "1"))).times(1));
            let began = Instant::now();
            behind.through.put_once("a/x", X).await.unwrap();
            assert!(began.elapsed() >= Duration::from_millis(990), "{canned:?}: {:?}", began.elapsed());
            assert_eq!(behind.through.requests().throttled, 1, "{canned:?}");
        }
        let behind = Behind::new(Kind::Rgw).await;
        behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(503, "SlowDown"))));
        let error = behind.through.get("a/x").await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Storage, "store.throttled"), "{error:?}");
        assert_eq!(behind.proxy.requests().len(), impatient().attempts as usize);
        assert!(error.hint().unwrap().contains("vault.limits"), "{error:?}");
    });
}

/// H13, T24: what is refused for good is asked for once.
#[test]
fn h13_a_refusal_for_good_ends_at_once_with_the_providers_code() {
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        for (status, code) in [
            (403, "AccessDenied"),
            (403, "SignatureDoesNotMatch"),
            (403, "InvalidAccessKeyId"),
            (401, "Unauthorized"),
            (400, "InvalidToken"),
        ] {
            behind.proxy.heal();
            behind.proxy.rule(Rule::new(Wire::Answer(Canned::s3(status, code))));
            for (what, error) in reads(&behind.through).await {
                let error = error.unwrap_or_else(|| panic!("{what} succeeds with {code}"));
                assert_eq!(error.kind(), ErrorKind::Failed, "{what} with {code}: {error:?}");
                if what != "head" {
                    assert_eq!(error.code(), "store.denied", "{what} with {code}: {error:?}");
                    assert!(error.to_string().contains(code) && error.hint().is_some(), "{what} with {code}: {error:?}");
                }
            }
            assert_eq!(behind.proxy.requests().len(), 7, "{code}: one request for each question");
            // A PUT is followed by one look: the refusal may be about a second attempt of somebody in between.
            let error = behind.through.put_new("a/x", X).await.unwrap_err();
            assert_eq!(error.code(), "store.denied", "{code}: {error:?}");
            assert_eq!(behind.proxy.requests().len(), 9, "{code}");
        }
    });
}

/// T22: no object is larger than one PUT may be, and none is sent in parts, which cannot be create-only.
#[test]
fn t22_the_largest_object_is_one_put() {
    assert_eq!(MAX_OBJECT, 64 << 20);
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        let body = Bytes::from(vec![7; 64 << 20]);
        behind.through.put_once("a/large", body.clone()).await.unwrap();
        let requests = behind.proxy.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert!(requests[0].method == "PUT" && !requests[0].target.contains('?'), "{requests:?}");
        assert!(behind.through.get("a/large").await.unwrap() == body);
    });
}

/// H19: an address where nobody is, and one where somebody takes the connection and says nothing.
#[test]
fn h19_nobody_and_somebody_who_says_nothing_are_given_up() {
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        behind.proxy.refuse().await;
        for (what, error) in reads(&behind.through).await {
            let error = error.unwrap_or_else(|| panic!("{what}: nobody is there"));
            assert_eq!(error.kind(), ErrorKind::Storage, "{what}: {error:?}");
        }
        behind.proxy.listen().await.unwrap();
        behind.through.put_once("a/x", X).await.unwrap();
        behind.proxy.rule(Rule::new(Wire::Blackhole));
        let began = Instant::now();
        assert_eq!(behind.through.put_new("a/y", X).await.unwrap_err().kind(), ErrorKind::Storage);
        // Three attempts, each with a look.
        let most = 6 * impatient().first_byte_timeout + Duration::from_secs(3);
        assert!(began.elapsed() < most, "{:?}", began.elapsed());
    });
}

/// A slow link is not a dead one: what counts is the silence.
#[test]
fn a_slow_link_is_waited_for() {
    runtime().block_on(async {
        let behind = Behind::new(Kind::Rgw).await;
        behind.proxy.speed(Speed { latency: Duration::from_millis(20), bytes_per_second: Some(400 << 10) });
        let body = Bytes::from(vec![7; 1 << 20]);
        let began = Instant::now();
        behind.through.put_once("a/x", body.clone()).await.unwrap();
        assert_eq!(behind.through.get("a/x").await.unwrap(), body);
        assert!(began.elapsed() > Duration::from_secs(4), "{:?}", began.elapsed());
        assert_eq!(behind.proxy.requests().len(), 2, "{:?}", behind.proxy.requests());
    });
}

/// TLS that breaks is trouble; a certificate that nobody vouches for is not.
#[test]
fn h19_tls_that_fails_is_given_up_and_a_strange_certificate_at_once() {
    let server = Server::shared(Kind::Rgw).unwrap();
    let place = server.place().unwrap().encrypted().unwrap();
    let tls = server.info().tls.clone().unwrap();
    runtime().block_on(async {
        let proxy = Proxy::start_opaque(address(&tls.endpoint)).await.unwrap();
        let endpoint = format!("https://localhost:{}", proxy.address().port());
        let trusting =
            || Settings { options: impatient(), ca_file: Some(tls.ca_file.clone()), ..settings(&server, Some(&endpoint)) };
        let open = |settings: Settings| Store::open(&place.url(), settings).unwrap();
        let store = open(trusting());
        store.put_once("a/x", X).await.unwrap();
        for fault in [
            Wire::Garbage,
            Wire::Reset,
            Wire::Blackhole,
            // In the middle of the handshake, and of an answer.
            Wire::CutAnswer { after: 100 },
            Wire::ResetAnswer { after: 1000 },
            Wire::StallAnswer { after: 100 },
        ] {
            for times in [1, usize::MAX] {
                proxy.heal();
                proxy.rule(Rule::new(fault.clone()).times(times));
                let store = open(trusting());
                match (store.get("a/x").await, times) {
                    (Ok(found), 1) => assert_eq!(found, X),
                    (Err(error), usize::MAX) => assert_eq!(error.kind(), ErrorKind::Storage, "{fault:?}: {error:?}"),
                    (said, _) => panic!("{fault:?}, {times} times: {said:?}"),
                }
                assert!(!proxy.happened().is_empty());
            }
        }
        proxy.heal();
        let error = open(Settings { ca_file: None, ..trusting() }).get("a/x").await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Failed, "store.untrusted"), "{error:?}");
        assert_eq!(proxy.connections(), 1, "asked once");
    });
}
