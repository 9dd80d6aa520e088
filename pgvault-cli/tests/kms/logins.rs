//! What is peculiar to one service: its logins, its signatures, its names.

use std::process::Command;

use serde_json::json;

use super::mini::{Mini, Reply};
use super::site::Site;
use super::{azure, real, services};

/// The signature of a request, made again by AWS's own code; no server at hand checks it.
#[test]
fn requests_to_aws_are_signed_as_aws_signs_them() {
    let service = services::aws();
    let site = Site::new(&service, &service.key);
    let _ = site.init();
    let seen = service.front.seen();
    assert!(!seen.is_empty());
    for request in seen {
        assert_eq!(request.headers["x-amz-security-token"], "session/token==");
        let script = r"
import json, sys
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
given = json.load(sys.stdin)
signed = given['authorization'].split('SignedHeaders=')[1].split(',')[0].split(';')
request = AWSRequest(method='POST', url=given['url'], data=given['body'].encode())
for name in signed:
    request.headers[name] = given['headers'][name]
request.context['timestamp'] = given['headers']['x-amz-date']
auth = SigV4Auth(Credentials('AKIDEXAMPLE', 'wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY', 'session/token=='), 'kms', 'REGION')
canonical = auth.canonical_request(request)
print(auth.signature(auth.string_to_sign(request, canonical), request))
";
        let region = service.key.split(':').nth(4).unwrap();
        let given = json!({
            "authorization": request.headers["authorization"], "headers": request.headers,
            "url": format!("{}{}", service.front.url(), request.path), "body": String::from_utf8(request.body.clone()).unwrap(),
        });
        let input = service.folder.path().join("request.json");
        std::fs::write(&input, given.to_string()).unwrap();
        let output = Command::new(real::python())
            .args(["-c", &script.replace("REGION", region)])
            .stdin(std::fs::File::open(&input).unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = String::from_utf8(output.stdout).unwrap();
        assert!(
            request.headers["authorization"].ends_with(&format!("Signature={}", expected.trim())),
            "{} is not {expected}",
            request.headers["authorization"]
        );
    }
}

/// An alias is where the key is looked for when a slot is made; the slot stays with the key that it was.
#[test]
fn a_slot_stays_with_the_key_that_an_alias_led_to() {
    let service = services::aws();
    let (first, second) = (service.key.trim_start_matches("aws-kms:"), service.other.trim_start_matches("aws-kms:"));
    let alias = format!("alias/pgvault-{}", first.rsplit('/').next().unwrap());
    drop(real::aws("CreateAlias", &json!({ "AliasName": alias, "TargetKeyId": first })));
    let mut site = Site::new(&service, &format!("aws-kms:{alias}"));
    let refused = site.run(&["init", "--system-id", "7"]).expect(2);
    assert!(refused.stderr.contains("region"), "{}", refused.stderr);
    site.options.push_str("\nregion = 'us-east-1'");
    let region = first.split(':').nth(3).unwrap();
    site.options = site.options.replace("us-east-1", region);
    let _ = site.init();
    drop(real::aws("UpdateAlias", &json!({ "AliasName": alias, "TargetKeyId": second })));
    let _ = site.open().ok();
    let (_, slot) = site.slots().remove(0);
    assert!(format!("{slot:?}").contains(first));
}

/// Entra ID: a pod's token that is renewed in place, a managed identity, and a secret that is wrong.
#[test]
fn tokens_for_azure_come_from_where_the_environment_says() {
    let service = services::azure();
    let mut site = Site::new(&service, &service.key);
    let _ = site.init();
    let own = site.environment.clone();

    let file = site.path("assertion");
    std::fs::write(&file, "expired").unwrap();
    site.environment.retain(|(name, _)| name != "AZURE_CLIENT_SECRET");
    site.environment.push(("AZURE_FEDERATED_TOKEN_FILE".into(), file.to_str().unwrap().into()));
    let refused = site.open().expect(2).says("AADSTS7000215");
    assert!(refused.stderr.contains("kms.denied"), "{}", refused.stderr);
    std::fs::write(&file, format!("{}\n", azure::ASSERTION)).unwrap();
    let _ = site.open().ok();

    site.environment = vec![
        ("IDENTITY_ENDPOINT".into(), format!("{}/msi/token", service.front.url())),
        ("IDENTITY_HEADER".into(), azure::IDENTITY_HEADER.into()),
        ("AZURE_CLIENT_ID".into(), "assigned".into()),
    ];
    let _ = site.open().ok();

    site.environment = own;
    for (name, value) in &mut site.environment {
        if name == "AZURE_CLIENT_SECRET" {
            *value = "wrong".into();
        }
    }
    let _ = site.open().expect(2).says("invalid_client");
}

/// A key with its version in its name stays with it; without, new slots take the newest.
#[test]
fn an_azure_key_can_be_pinned_to_a_version() {
    let service = services::azure();
    let mut site = Site::new(&service, &service.key);
    let _ = site.init();
    let version = |site: &Site| match site.slots().pop().unwrap().1.method {
        pgvault_core::crypto::slot::Method::Kms { key_version, .. } => key_version,
        other => panic!("{other:?}"),
    };
    let first = version(&site);
    (service.rotate)();
    let pinned = format!("{}/{first}", service.key);
    let _ = site.run(&["key", "add", "--kms", &pinned]).ok();
    assert_eq!(version(&site), first);
    let _ = site.run(&["key", "add", "--kms", &service.key]).ok();
    assert_ne!(version(&site), first);
    site.vault = format!("kms = '{pinned}'");
    let _ = site.open().ok();
}

/// `AppRole`, against the real server.
#[test]
fn an_approle_logs_in_to_the_transit_engine() {
    let service = services::transit();
    drop(real::bao("POST", "auth/approle/role/pgvault", &json!({ "token_policies": ["backups"], "token_ttl": "1h" })));
    let role = real::bao("GET", "auth/approle/role/pgvault/role-id", &json!(null))["data"]["role_id"].as_str().unwrap().to_owned();
    let secret =
        real::bao("POST", "auth/approle/role/pgvault/secret-id", &json!({}))["data"]["secret_id"].as_str().unwrap().to_owned();
    let mut site = Site::new(&service, &service.key);
    site.environment.clear();
    let file = site.path("secret-id");
    std::fs::write(&file, &secret).unwrap();
    site.options.push_str(&format!("\nauth = 'approle'\nrole = '{role}'\ncredential_file = '{}'", file.display()));
    let ran = site.init();
    assert!(!ran.stderr.contains(&secret));
    let _ = site.open().ok();
    std::fs::write(&file, "no-such-secret").unwrap();
    let refused = site.open().expect(2);
    assert!(refused.stderr.contains("kms.denied"), "{}", refused.stderr);
    site.options = site.options.replace("role = ", "# role = ");
    let _ = site.open().expect(2).says("role is missing");
}

/// The certificate of some authority: the server asks for one, even where it will not need it.
fn certificate() -> String {
    let script = "import certifi; print(open(certifi.where()).read())";
    let bundle = Command::new(real::python()).args(["-c", script]).output().unwrap();
    let bundle = String::from_utf8(bundle.stdout).unwrap();
    let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
    let first = bundle.find(begin).unwrap();
    bundle[first..=first + bundle[first..].find(end).unwrap() + end.len()].to_owned()
}

/// Kubernetes: the real server asks a stand-in of the cluster's API whether the pod's token is genuine.
#[test]
fn a_pod_logs_in_to_the_transit_engine() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

    let service = services::transit();
    let account = "system:serviceaccount:backups:pgvault";
    let api = Mini::start(move |seen| {
        let genuine = seen.path == "/apis/authentication.k8s.io/v1/tokenreviews"
            && !seen.json()["spec"]["token"].as_str().unwrap_or("").contains("forged");
        let status = json!({ "authenticated": genuine, "audiences": ["pgvault"], "user": { "username": account, "uid": "u-1", "groups": ["system:serviceaccounts"] } });
        Reply::json(201, &json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status }))
    });
    let config = json!({ "kubernetes_host": api.url(), "token_reviewer_jwt": "reviewer", "kubernetes_ca_cert": certificate() });
    drop(real::bao("POST", "auth/pods/config", &config));
    let role = json!({
        "bound_service_account_names": ["pgvault"], "bound_service_account_namespaces": ["backups"], "token_policies": ["backups"],
    });
    drop(real::bao("POST", "auth/pods/role/pgvault", &role));
    let claims = json!({
        "iss": "kubernetes/serviceaccount", "sub": account, "aud": ["pgvault"], "iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 4_000_000_000u64,
        "kubernetes.io": { "namespace": "backups", "serviceaccount": { "name": "pgvault", "uid": "u-1" } },
    });
    let part = |value: &serde_json::Value| BASE64URL.encode(value.to_string());
    let token = format!("{}.{}.{}", part(&json!({ "alg": "RS256", "typ": "JWT" })), part(&claims), BASE64URL.encode([7; 256]));
    let mut site = Site::new(&service, &service.key);
    site.environment.clear();
    let file = site.path("token");
    std::fs::write(&file, &token).unwrap();
    site.options
        .push_str(&format!("\nauth = 'kubernetes'\nauth_mount = 'pods'\nrole = 'pgvault'\ncredential_file = '{}'", file.display()));
    let _ = site.init();
    let _ = site.open().ok();
    std::fs::write(&file, token.replace('.', ".forged")).unwrap();
    let _ = site.open().expect(2);
}

/// A private authority is trusted when it is named, and no certificate of a stranger is.
#[test]
fn a_private_authority_is_trusted_when_it_is_named() {
    let service = services::transit();
    let server = pgvault_teststores::OpenBao::shared().unwrap();
    let mut site = Site::new(&service, &service.key);
    site.options = format!("endpoint = '{}'", server.tls().endpoint);
    let refused = site.run(&["init", "--system-id", "7"]).expect(2).says("ca_file");
    assert!(refused.stderr.contains("kms.connection") && refused.stderr.contains("certificate"), "{}", refused.stderr);
    let ca_file = server.tls().ca_file.to_str().unwrap().to_owned();
    site.environment.push(("VAULT_CACERT".into(), ca_file.clone()));
    let _ = site.init();
    let _ = site.environment.pop();
    let _ = site.open().expect(2);
    site.options.push_str(&format!("\nca_file = '{ca_file}'"));
    let _ = site.open().ok();
    site.options = site.options.replace("ca.pem", "nothing.pem");
    let _ = site.open().expect(2).says("nothing.pem");
}

/// The token from a file, and from where `vault login` leaves it; a namespace that is no namespace; nothing at all.
#[test]
fn a_token_for_the_transit_engine_can_lie_in_a_file() {
    let service = services::transit();
    let mut site = Site::new(&service, &service.key);
    let token = site.environment.remove(0).1;
    let _ = site.run(&["init", "--system-id", "7"]).expect(2).says("VAULT_TOKEN");
    std::fs::write(site.path(".vault-token"), &token).unwrap();
    let _ = site.init();
    std::fs::remove_file(site.path(".vault-token")).unwrap();
    let file = site.path("elsewhere");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    site.options.push_str(&format!("\ncredential_file = '{}'", file.display()));
    let _ = site.open().ok();
    // Without an address in the name or the options, it is where Vault's own tools find it.
    site.vault = format!("kms = '{}'", service.other);
    site.options = site.options.replace("endpoint", "# endpoint");
    let _ = site.run(&["key", "add", "--kms", &service.other]).expect(2).says("VAULT_ADDR");
}
