//! Real servers: `LocalStack` for AWS KMS, and `OpenBao` for the transit engine. Each is started once for this program and ends with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::OnceLock;

use pgvault_teststores::{Kind, OpenBao, ROOT_TOKEN, Server};
use serde_json::{Value, json};

use super::mini::ask;

fn parsed(address: &str) -> SocketAddr {
    address.trim_start_matches("http://").trim_end_matches('/').parse().unwrap()
}

/// The interpreter that has AWS's own signing code.
pub fn python() -> PathBuf {
    pgvault_teststores::localstack_python().unwrap()
}

/// AWS KMS by `LocalStack`: it keeps keys, aliases, states and encryption contexts, and checks no credentials.
pub fn localstack() -> SocketAddr {
    parsed(&Server::shared(Kind::Localstack).unwrap().info().endpoint)
}

/// One call of AWS KMS for a test's own purposes.
pub fn aws(operation: &str, body: &Value) -> Value {
    let target = format!("TrentService.{operation}");
    let authorization = "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/kms/aws4_request, SignedHeaders=host, Signature=0";
    let headers =
        [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target.as_str()), ("authorization", authorization)];
    let (status, answer) = ask(localstack(), "POST", "/", &headers, body);
    assert_eq!(status, 200, "{operation}: {answer}");
    answer
}

/// The policy that docs/kms.md gives, for every key of the tests.
const POLICY: &str = r#"
path "team/transit/encrypt/+" { capabilities = ["update"] }
path "team/transit/decrypt/+" { capabilities = ["update"] }
"#;

/// `OpenBao` with a transit engine at `team/transit` and the logins and policies that the tests use.
pub fn openbao() -> SocketAddr {
    static PREPARED: OnceLock<SocketAddr> = OnceLock::new();
    *PREPARED.get_or_init(|| {
        let address = parsed(OpenBao::shared().unwrap().address());
        bao_at(address, "POST", "sys/mounts/team/transit", &json!({ "type": "transit" }));
        bao_at(address, "POST", "sys/auth/approle", &json!({ "type": "approle" }));
        bao_at(address, "POST", "sys/auth/pods", &json!({ "type": "kubernetes" }));
        bao_at(address, "PUT", "sys/policies/acl/backups", &json!({ "policy": POLICY }));
        bao_at(address, "PUT", "sys/policies/acl/nothing", &json!({ "policy": "path \"x\" { capabilities = [\"deny\"] }" }));
        address
    })
}

fn bao_at(address: SocketAddr, method: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = ask(address, method, &format!("/v1/{path}"), &[("x-vault-token", ROOT_TOKEN)], body);
    assert!(status < 300, "{method} {path}: {status} {answer}");
    answer
}

/// One call of `OpenBao` with the root token.
pub fn bao(method: &str, path: &str, body: &Value) -> Value {
    bao_at(openbao(), method, path, body)
}

/// A token with one policy.
pub fn bao_token(policy: &str) -> String {
    let body = json!({ "policies": [policy], "no_default_policy": true });
    bao("POST", "auth/token/create", &body)["auth"]["client_token"].as_str().unwrap().to_owned()
}
