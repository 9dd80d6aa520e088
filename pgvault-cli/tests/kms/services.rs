//! The four services as the tests see them: each behind a [`Mini`] that can answer in its place.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use tempfile::TempDir;

use super::azure::{self, Azure};
use super::gcp::{self, Gcp};
use super::mini::{Mini, Reply, forward};
use super::real;

/// What makes a service refuse.
pub enum Denied {
    /// A credential that may do nothing.
    Credential(Vec<(&'static str, String)>),
    /// An answer that was recorded, where the server at hand does not check.
    Recorded(Reply),
}

/// A service with two keys, and how to reach it.
pub struct Service {
    pub front: Mini,
    pub key: String,
    pub other: String,
    /// The name of a key that is not there.
    pub missing: String,
    pub environment: Vec<(&'static str, String)>,
    pub denied: Denied,
    /// Disables the first key, or enables it again.
    pub disable: Box<dyn Fn(bool)>,
    /// Gives the first key a new version, for what is wrapped from now on.
    pub rotate: Box<dyn Fn()>,
    pub folder: TempDir,
}

fn counter() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// AWS KMS: `LocalStack`.
pub fn aws() -> Service {
    let address = real::localstack();
    let new_key = || real::aws("CreateKey", &json!({}))["KeyMetadata"]["Arn"].as_str().unwrap().to_owned();
    let (key, other) = (new_key(), new_key());
    let changed = key.clone();
    let rotated = key.clone();
    // <https://docs.aws.amazon.com/kms/latest/APIReference/CommonErrors.html>
    let denied = json!({
        "__type": "AccessDeniedException",
        "Message": "User: arn:aws:iam::111122223333:user/backup is not authorized to perform: kms:Decrypt on this resource because no identity-based policy allows the kms:Decrypt action",
    });
    Service {
        front: Mini::start(move |seen| forward(address, seen)),
        missing: "aws-kms:arn:aws:kms:eu-central-1:000000000000:key/00000000-0000-0000-0000-000000000000".into(),
        key: format!("aws-kms:{key}"),
        other: format!("aws-kms:{other}"),
        environment: vec![
            ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE".into()),
            ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".into()),
            ("AWS_SESSION_TOKEN", "session/token==".into()),
        ],
        denied: Denied::Recorded(Reply::json(400, &denied)),
        disable: Box::new(move |disabled| {
            drop(real::aws(if disabled { "DisableKey" } else { "EnableKey" }, &json!({ "KeyId": changed })));
        }),
        rotate: Box::new(move || drop(real::aws("RotateKeyOnDemand", &json!({ "KeyId": rotated })))),
        folder: TempDir::new().unwrap(),
    }
}

/// Vault transit: `OpenBao`.
pub fn transit() -> Service {
    let address = real::openbao();
    let names = [format!("k{}", counter()), format!("k{}", counter())];
    for name in &names {
        drop(real::bao("POST", &format!("team/transit/keys/{name}"), &json!({})));
    }
    let [first, second] = names.clone();
    let (changed, rotated) = (first.clone(), first.clone());
    Service {
        front: Mini::start(move |seen| forward(address, seen)),
        key: format!("vault-transit:https://vault.example.org:8200/team/transit/{first}"),
        other: format!("vault-transit:team/transit/{second}"),
        missing: "vault-transit:team/transit/missing".into(),
        environment: vec![("VAULT_TOKEN", real::bao_token("backups"))],
        denied: Denied::Credential(vec![("VAULT_TOKEN", real::bao_token("nothing"))]),
        // Such a key cannot be disabled; its versions can be retired.
        disable: Box::new(move |disabled| {
            if disabled {
                drop(real::bao("POST", &format!("team/transit/keys/{changed}/rotate"), &json!({})));
            }
            let version = u32::from(disabled) + 1;
            drop(real::bao("POST", &format!("team/transit/keys/{changed}/config"), &json!({ "min_decryption_version": version })));
        }),
        rotate: Box::new(move || drop(real::bao("POST", &format!("team/transit/keys/{rotated}/rotate"), &json!({})))),
        folder: TempDir::new().unwrap(),
    }
}

/// Azure Key Vault: the stand-in.
pub fn azure() -> Service {
    let azure = Azure::start();
    azure.add_key("first");
    azure.add_key("second");
    let environment = |client: &str| {
        vec![
            ("AZURE_TENANT_ID", azure::TENANT.to_owned()),
            ("AZURE_CLIENT_ID", client.to_owned()),
            ("AZURE_CLIENT_SECRET", azure::SECRET.to_owned()),
            ("AZURE_AUTHORITY_HOST", azure.front.url()),
        ]
    };
    let (changed, rotated) = (azure.clone(), azure.clone());
    Service {
        key: "azure-kv:https://backups.vault.azure.net/keys/first".into(),
        other: "azure-kv:https://backups.vault.azure.net/keys/second".into(),
        missing: "azure-kv:https://backups.vault.azure.net/keys/missing".into(),
        environment: environment("backup"),
        denied: Denied::Credential(environment("powerless")),
        disable: Box::new(move |disabled| changed.enable("first", !disabled)),
        rotate: Box::new(move || rotated.add_key("first")),
        front: azure.front,
        folder: TempDir::new().unwrap(),
    }
}

/// Google Cloud KMS: the stand-in.
pub fn gcp() -> Service {
    let (gcp, folder) = (Gcp::start(), TempDir::new().unwrap());
    gcp.add_key("first");
    gcp.add_key("second");
    let account = |name: &str| {
        let file = write(folder.path(), name, "");
        gcp.account(name, Path::new(&file));
        vec![("GOOGLE_APPLICATION_CREDENTIALS", file)]
    };
    let changed = gcp.clone();
    Service {
        key: format!("gcp-kms:{}/first", gcp::RING),
        other: format!("gcp-kms:{}/second", gcp::RING),
        missing: format!("gcp-kms:{}/missing", gcp::RING),
        environment: account("backup"),
        denied: Denied::Credential(account("powerless")),
        disable: Box::new(move |disabled| changed.enable("first", !disabled)),
        // Which version decrypts is the service's own business.
        rotate: Box::new(|| {}),
        front: gcp.front,
        folder,
    }
}
