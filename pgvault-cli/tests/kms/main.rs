//! Clusters whose key is in a key service, through the built program: AWS KMS by `LocalStack`, Vault transit by `OpenBao`, Azure Key
//! Vault and Google Cloud KMS by stand-ins of our own. What goes wrong is the same four times; see [`mini`].

#![expect(clippy::unwrap_used, clippy::format_push_string, unreachable_pub, reason = "a test; its modules are shared")]

mod azure;
#[path = "../common/mod.rs"]
mod common;
mod gcp;
mod logins;
mod mini;
mod real;
mod services;
mod site;

use std::time::{Duration, Instant};

use mini::{Mini, Reply};
use pgvault_core::crypto::slot::{Method, SlotDocument};
use pgvault_core::format::document;
use secrecy::ExposeSecret;
use serde_json::Value;
use services::{Denied, Service};
use site::Site;

/// A test for each of the services.
macro_rules! for_each_service {
    ($($test:ident)*) => {
        mod aws_kms { $(#[test] fn $test() { super::$test(&super::services::aws()); })* }
        mod azure_kv { $(#[test] fn $test() { super::$test(&super::services::azure()); })* }
        mod gcp_kms { $(#[test] fn $test() { super::$test(&super::services::gcp()); })* }
        mod vault_transit { $(#[test] fn $test() { super::$test(&super::services::transit()); })* }
    };
}

for_each_service! {
    a_cluster_lives_with_its_key_in_the_service
    a_recovery_key_opens_while_the_service_is_away
    an_outage_is_never_a_wrong_key
    what_passes_is_waited_for
    nothing_is_waited_for_longer_than_allowed
    a_refusal_is_told_in_the_services_words
    a_changed_slot_is_refused
    a_slot_of_another_cluster_is_refused
    many_open_at_once
    nothing_secret_is_printed
}

fn keys(listed: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    listed["keys"].as_array().unwrap().iter().map(|key| (text(&key["key_id"]), text(&key["type"]))).collect()
}

fn a_cluster_lives_with_its_key_in_the_service(service: &Service) {
    let mut site = Site::new(service, &service.key);
    let created = site.init();
    assert!(created.json()["cluster_created"] == true);
    // Needs no key and no service.
    let _ = service.front.seen();
    let listed = keys(&site.run(&["key", "list"]).ok().json());
    assert!(service.front.seen().is_empty());
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].1, service.key);
    let _ = site.open().ok();
    let _ = site.run(&["check"]).ok();

    let added = site.run(&["key", "add", "--kms", &service.other, "--label", "second"]).ok().json();
    assert_eq!(added["added"]["type"], service.other.as_str());
    (service.rotate)();
    let _ = site.open().ok();
    let rotated = site.run(&["key", "rotate", &listed[0].0, "--kms", &service.key]).ok().json();
    assert_ne!(rotated["added"]["key_id"], listed[0].0.as_str());
    let _ = site.open().ok();
    let _ = site.run(&["check"]).ok();

    // The other key opens what it has a slot for, and is asked about no other slot.
    site.vault = format!("kms = '{}'", service.other);
    let _ = service.front.seen();
    let _ = site.open().ok();
    let asked = service.front.seen().iter().filter(|seen| !seen.path.contains("oauth2")).count();
    assert_eq!(asked, 1);
    let own = keys(&site.run(&["key", "list"]).ok().json()).into_iter().find(|(_, key)| *key == service.other).unwrap().0;
    let _ = site.run(&["key", "revoke", &own]).ok();
    let _ = service.front.seen();
    let refused = site.open().expect(12).says(&service.key);
    assert!(!refused.stderr.contains("kms."), "{}", refused.stderr);
    assert!(service.front.seen().is_empty(), "a key without a slot is not asked");
    site.vault = format!("kms = '{}'", service.key);
    let _ = site.open().ok();
    let last = keys(&site.run(&["key", "list"]).ok().json()).remove(0).0;
    let _ = site.run(&["key", "revoke", &last]).expect(2).says("only key slot");
}

fn a_recovery_key_opens_while_the_service_is_away(service: &Service) {
    let identity = age::x25519::Identity::generate();
    let mut site = Site::new(service, &service.key);
    site.vault = format!("{}\nrecipients = ['{}']", site.vault, identity.to_public());
    let _ = site.init();
    assert_eq!(keys(&site.run(&["key", "list"]).ok().json()).len(), 2);
    let file = site.path("recovery.txt");
    std::fs::write(&file, identity.to_string().expose_secret()).unwrap();
    site.options = "endpoint = 'http://127.0.0.1:1'\nallow_http = true\ntimeout = '1s'".into();
    let _ = site.open().expect(20);
    // The configuration stays as it is; the identity comes first.
    site.environment.push(("PGVAULT_VAULT__IDENTITY_FILE".into(), file.to_str().unwrap().into()));
    let _ = site.open().ok();
}

/// An outage in every shape ends with 20 and says to try again; nothing of a wrong key.
fn an_outage_is_never_a_wrong_key(service: &Service) {
    let mut site = Site::new(service, &service.key);
    let _ = site.init();
    let away = |ran: common::Ran| {
        let ran = ran.expect(20).says("try again");
        assert!(ran.stderr.contains("kms.unavailable"), "{}", ran.stderr);
        assert!(!ran.stderr.contains("key.wrong") && !ran.stderr.contains("opens no slot"), "{}", ran.stderr);
    };
    site.options = site.options.replace("'60s'", "'1s'");
    let page = Reply::Answer(200, vec![("content-type".into(), "text/html".into())], b"<html>log in to the hotel</html>".to_vec());
    for reply in [
        Reply::plain(500),
        Reply::plain(503),
        Reply::Answer(502, Vec::new(), b"<html>bad gateway</html>".to_vec()),
        Reply::plain(429),
        Reply::Cut,
        Reply::Half,
        Reply::Hang,
        Reply::Endless,
        page,
        Reply::Answer(200, Vec::new(), b"{}".to_vec()),
        Reply::Answer(200, Vec::new(), vec![b'['; 60_000]),
    ] {
        service.front.always(Some(reply));
        away(site.open());
    }
    service.front.always(None);
    site.options = site.options.replace(&service.front.url(), "http://127.0.0.1:1");
    away(site.open());
    site.options = site.options.replace("http://127.0.0.1:1", &service.front.url()).replace("'1s'", "'60s'");
    let _ = site.open().ok();
}

fn what_passes_is_waited_for(service: &Service) {
    let site = Site::new(service, &service.key);
    let _ = site.init();
    let _ = service.front.seen();
    service.front.next([Reply::plain(503), Reply::Cut, Reply::Half]);
    let _ = site.open().ok();
    assert!(service.front.seen().len() >= 4);
    let begun = Instant::now();
    service.front.next([Reply::plain(429).with_header("retry-after", "2")]);
    let _ = site.open().ok();
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

fn nothing_is_waited_for_longer_than_allowed(service: &Service) {
    let mut site = Site::new(service, &service.key);
    let _ = site.init();
    site.options = site.options.replace("'60s'", "'2s'");
    for reply in [Reply::Hang, Reply::plain(503)] {
        service.front.always(Some(reply));
        let begun = Instant::now();
        let _ = site.open().expect(20);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
    // Longer than there is time for: then it is said at once.
    site.options = site.options.replace("'2s'", "'60s'");
    service.front.always(Some(Reply::plain(429).with_header("retry-after", "600")));
    let begun = Instant::now();
    let _ = site.open().expect(20).says("600 s");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    service.front.always(None);
}

fn a_refusal_is_told_in_the_services_words(service: &Service) {
    let mut site = Site::new(service, &service.key);
    let _ = site.init();
    let usage = |ran: common::Ran, code: &str, words: &str| {
        let ran = ran.expect(2).says(words);
        assert!(ran.stderr.contains(code), "{}", ran.stderr);
    };
    let words = |words: [&'static str; 4]| {
        let kinds = ["aws-kms", "azure-kv", "gcp-kms", "vault-transit"];
        words[kinds.iter().position(|kind| service.key.starts_with(kind)).unwrap()]
    };
    let no_right = words(["AccessDeniedException", "ForbiddenByRbac", "PERMISSION_DENIED", "permission denied"]);
    match &service.denied {
        Denied::Recorded(reply) => {
            service.front.next([reply.clone()]);
            usage(site.open(), "kms.denied", no_right);
        }
        Denied::Credential(environment) => {
            let own = site.environment.clone();
            site.environment.extend(environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
            usage(site.open(), "kms.denied", no_right);
            site.environment = own;
        }
    }
    (service.disable)(true);
    let disabled = site.open();
    if service.key.starts_with("vault-transit") {
        // A retired version looks like any other bytes that the key does not open.
        let _ = disabled.expect(12).says("disallowed by policy (too old)");
    } else {
        usage(disabled, "kms.key_unusable", words(["DisabledException", "KeyDisabled", "FAILED_PRECONDITION", ""]));
    }
    (service.disable)(false);
    let _ = site.open().ok();
    let absent = words(["NotFoundException", "KeyNotFound", "NOT_FOUND", "permission denied"]);
    let added = site.run(&["key", "add", "--kms", &service.missing]);
    if service.key.starts_with("vault-transit") {
        // `update` alone may not create a key that is not there.
        let _ = added.expect(2);
    } else {
        usage(added, "kms.no_key", absent);
    }
    // A redirect is told and not followed: the credential would go where it leads.
    let elsewhere = Mini::start(|_| Reply::plain(200));
    service.front.always(Some(Reply::plain(307).with_header("location", &elsewhere.url())));
    let refused = site.open().expect(2);
    assert!(refused.stderr.contains("HTTP 307"), "{}", refused.stderr);
    assert!(elsewhere.seen().is_empty());
    service.front.always(None);
    // Without leave, no address without TLS.
    site.options = site.options.replace("allow_http = true", "");
    let refused = site.open().expect(2);
    assert!(refused.stderr.contains("kms.connection"), "{}", refused.stderr);
    assert!(site.run(&["key", "add", "--kms", "kms:x"]).expect(2).stderr.contains("kms.name"));
}

/// Every part of the slot, changed by somebody who can also correct the document's own hash.
fn a_changed_slot_is_refused(service: &Service) {
    let site = Site::new(service, &service.key);
    let _ = site.init();
    let (file, slot) = site.slots().remove(0);
    let Method::Kms { key, key_version, slot_key, wrapped } = slot.method.clone() else { panic!("{slot:?}") };
    let flip = |text: &str, at: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    };
    let middle = slot_key.len() * 3 / 4;
    let mut changed = vec![
        Method::Kms {
            slot_key: flip(&slot_key, middle),
            key: key.clone(),
            key_version: key_version.clone(),
            wrapped: wrapped.clone(),
        },
        Method::Kms { slot_key: String::new(), key: key.clone(), key_version: key_version.clone(), wrapped: wrapped.clone() },
        Method::Kms { slot_key: "\"x\n".into(), key: key.clone(), key_version: key_version.clone(), wrapped: wrapped.clone() },
        Method::Kms { wrapped: flip(&wrapped, 5), key: key.clone(), key_version: key_version.clone(), slot_key: slot_key.clone() },
        Method::Kms { wrapped: "AAAA".into(), key: key.clone(), key_version: key_version.clone(), slot_key: slot_key.clone() },
    ];
    for version in ["../x", "x?y", "deadbeef"] {
        changed.push(Method::Kms {
            key_version: version.into(),
            key: key.clone(),
            slot_key: slot_key.clone(),
            wrapped: wrapped.clone(),
        });
    }
    for method in changed {
        // Where the service keeps its own account of versions, ours is not read.
        if key_version.is_empty() && matches!(&method, Method::Kms { key_version, .. } if !key_version.is_empty()) {
            continue;
        }
        std::fs::write(&file, document::encode(&SlotDocument { method: method.clone(), ..slot.clone() }).unwrap()).unwrap();
        let _ = service.front.seen();
        let ran = site.open();
        assert!(matches!(ran.code, Some(2 | 4 | 12)), "{method:?}: {:?}\n{}", ran.code, ran.stderr);
        for seen in service.front.seen() {
            assert!(!seen.path.contains("..") && !seen.path.contains("?y"), "{}", seen.path);
        }
    }
    // Another cluster's service must not be asked because a slot says so.
    let method = Method::Kms { key: service.other.clone(), key_version, slot_key, wrapped };
    std::fs::write(&file, document::encode(&SlotDocument { method, ..slot.clone() }).unwrap()).unwrap();
    let _ = service.front.seen();
    let _ = site.open().expect(12);
    assert!(service.front.seen().is_empty());
    std::fs::write(&file, document::encode(&slot).unwrap()).unwrap();
    let _ = site.open().ok();
}

fn a_slot_of_another_cluster_is_refused(service: &Service) {
    let (site, foreign) = (Site::new(service, &service.key), Site::new(service, &service.key));
    let _ = site.init();
    let _ = foreign.init();
    let (file, own) = site.slots().remove(0);
    let (_, copied) = foreign.slots().remove(0);
    // As it is, it names another master key and counts for nothing; so it claims to hold this one.
    let claiming = SlotDocument { commitment: own.commitment.clone(), ..copied };
    let beside = file.with_file_name(format!("{}.json", claiming.key_id));
    std::fs::write(&beside, document::encode(&claiming).unwrap()).unwrap();
    // The genuine slot opens the cluster whichever is tried first.
    let _ = site.open().ok();
    std::fs::remove_file(&file).unwrap();
    let ran = site.open();
    assert!(matches!(ran.code, Some(4 | 12)), "{:?}\n{}", ran.code, ran.stderr);
    // Nor under the name and id of the genuine one.
    std::fs::remove_file(&beside).unwrap();
    std::fs::write(&file, document::encode(&SlotDocument { key_id: own.key_id, ..claiming }).unwrap()).unwrap();
    let ran = site.open();
    assert!(matches!(ran.code, Some(4 | 12)), "{:?}\n{}", ran.code, ran.stderr);
}

fn many_open_at_once(service: &Service) {
    let site = Site::new(service, &service.key);
    let _ = site.init();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..8).map(|_| scope.spawn(|| site.open())).collect();
        for run in running {
            let _ = run.join().unwrap().ok();
        }
    });
}

fn nothing_secret_is_printed(service: &Service) {
    let site = Site::new(service, &service.key);
    let mut printed = String::new();
    let mut keep = |ran: common::Ran| printed.push_str(&format!("{}{}", ran.stdout, ran.stderr));
    keep(site.init());
    let _ = service.front.seen();
    service.front.next([Reply::plain(503)]);
    keep(site.open().ok());
    keep(site.run(&["key", "list"]).ok());
    // What was sent as a credential, or came back as a key.
    let mut secrets = vec!["wJalrXUtnFEMI/K7MDENG".to_owned(), "session/token".to_owned(), azure::SECRET.to_owned()];
    for seen in service.front.seen() {
        secrets.extend(["authorization", "x-vault-token"].iter().filter_map(|name| seen.headers.get(*name)).cloned());
        if !seen.bearer().is_empty() {
            secrets.push(seen.bearer().to_owned());
        }
    }
    assert!(secrets.len() > 3, "{secrets:?}");
    for secret in secrets {
        assert!(!printed.contains(&secret), "{secret} is in\n{printed}");
    }
}
