//! The transit engine of `HashiCorp` Vault and of `OpenBao`: `encrypt` and `decrypt` with an AEAD key.
//!
//! <https://developer.hashicorp.com/vault/api-docs/secret/transit>. The binding is `associated_data`, which takes a key of an AEAD
//! type (`aes256-gcm96`, the default, or `chacha20-poly1305`) and Vault 1.9.
//!
//! Logins: a token (`VAULT_TOKEN`, a file, `~/.vault-token`), Kubernetes
//! (<https://developer.hashicorp.com/vault/api-docs/auth/kubernetes>) and `AppRole`
//! (<https://developer.hashicorp.com/vault/api-docs/auth/approle>).

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::Instant;
use zeroize::{Zeroize as _, Zeroizing};

use super::http::{Client, Problem, Verdict, by_status, json, post, secret_header};
use super::{Binding, Environment, KeyName, Kms, Provider, Wrapped};
use crate::config::{KmsOptions, SecretSource, VaultAuth};
use crate::crypto::aead::KEY_LEN;
use crate::{Error, ErrorKind, Result};

/// Where Kubernetes puts a pod's token.
const POD_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// A key in a transit engine.
#[derive(Debug)]
pub(super) struct VaultTransit {
    name: KeyName,
    endpoint: String,
    mount: String,
    key: String,
    namespace: Option<HeaderValue>,
    login: Login,
    client: Client,
    kept: Mutex<Option<(SecretString, Instant)>>,
}

#[derive(Debug)]
enum Login {
    Token(SecretSource),
    /// A role and the secret that proves it, at the mount of an auth method.
    Role {
        mount: String,
        role: String,
        fields: [&'static str; 2],
        secret: SecretSource,
    },
}

impl VaultTransit {
    pub(super) fn new(name: &KeyName, options: &KmsOptions, environment: &Environment) -> Result<Self> {
        let usage = |why: &str, hint: &str| Error::new(ErrorKind::Usage, "config.kms", why).with_hint(hint);
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let (address, path) = name.address_and_path();
        let endpoint = options.endpoint.as_deref().or(address).or_else(|| variable("VAULT_ADDR").map(String::as_str));
        let endpoint = endpoint.ok_or_else(|| {
            usage(
                "the address of Vault is not known",
                "put it into vault.kms (vault-transit:https://HOST:8200/MOUNT/KEY), or set VAULT_ADDR",
            )
        })?;
        let (mount, key) = path.rsplit_once('/').unwrap_or_default();
        let file = |default: &str| SecretSource::File(options.credential_file.clone().unwrap_or_else(|| default.into()));
        let role = || {
            options
                .role
                .clone()
                .ok_or_else(|| usage("vault.kms_options.role is missing", "name the role, or the role id of an AppRole"))
        };
        let mount_of = |default: &str| -> Result<String> {
            let mount = options.auth_mount.as_deref().unwrap_or(default).trim_matches('/').to_owned();
            let plain = mount
                .split('/')
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)));
            if plain {
                Ok(mount)
            } else {
                Err(usage("vault.kms_options.auth_mount is not a path", "it is `kubernetes`, `approle` or like it"))
            }
        };
        let login = match options.auth {
            VaultAuth::Token => Login::Token(match (&options.credential_file, variable("VAULT_TOKEN"), variable("HOME")) {
                (Some(file), _, _) => SecretSource::File(file.clone()),
                (None, Some(token), _) => SecretSource::Value(token.as_str().into()),
                (None, None, home) => SecretSource::File(PathBuf::from(home.map_or("/", String::as_str)).join(".vault-token")),
            }),
            VaultAuth::Kubernetes => {
                Login::Role { mount: mount_of("kubernetes")?, role: role()?, fields: ["role", "jwt"], secret: file(POD_TOKEN) }
            }
            VaultAuth::Approle => {
                if options.credential_file.is_none() {
                    return Err(usage(
                        "vault.kms_options.credential_file is missing",
                        "name the file with the AppRole's secret id",
                    ));
                }
                Login::Role { mount: mount_of("approle")?, role: role()?, fields: ["role_id", "secret_id"], secret: file("") }
            }
        };
        let namespace = options.namespace.as_ref().or_else(|| variable("VAULT_NAMESPACE"));
        let namespace = namespace.map(|text| HeaderValue::from_str(text)).transpose();
        let ca_file = options.ca_file.clone().or_else(|| variable("VAULT_CACERT").map(PathBuf::from));
        Ok(Self {
            name: name.clone(),
            endpoint: endpoint.trim_end_matches('/').into(),
            mount: mount.into(),
            key: key.into(),
            namespace: namespace
                .map_err(|_| usage("the namespace is not one", "see vault.kms_options.namespace and VAULT_NAMESPACE"))?,
            login,
            client: Client::new(Provider::Transit, options, ca_file.as_deref())?,
            kept: Mutex::new(None),
        })
    }

    async fn send(&self, deadline: Instant, doing: &str, path: &str, token: Option<&SecretString>, body: Bytes) -> Result<Answer> {
        let mut headers = vec![
            (http::header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
            // Asked for by proxies that guard against requests that a browser was tricked into.
            (HeaderName::from_static("x-vault-request"), HeaderValue::from_static("true")),
        ];
        if let Some(namespace) = &self.namespace {
            headers.push((HeaderName::from_static("x-vault-namespace"), namespace.clone()));
        }
        if let Some(token) = token {
            headers.push((HeaderName::from_static("x-vault-token"), secret_header(token.expose_secret())?));
        }
        let url = format!("{}/v1/{path}", self.endpoint);
        let answer = self.client.call(deadline, doing, || post(&url, body.clone(), &headers), judge).await?;
        serde_json::from_slice(&answer).map_err(|_| self.client.bad_answer(doing))
    }

    async fn token(&self, deadline: Instant) -> Result<SecretString> {
        const DOING: &str = "log in";
        let (mount, role, [role_field, secret_field], secret) = match &self.login {
            Login::Token(source) => {
                return source.read().map_err(|e| e.with_hint("set VAULT_TOKEN, or vault.kms_options.credential_file"));
            }
            Login::Role { mount, role, fields, secret } => (mount, role, fields, secret),
        };
        let mut kept = self.kept.lock().await;
        if let Some((token, _)) = kept.as_ref().filter(|(_, until)| Instant::now() < *until) {
            return Ok(token.clone());
        }
        let secret = secret.read()?;
        let body = std::collections::BTreeMap::from([(*role_field, role.as_str()), (*secret_field, secret.expose_secret())]);
        let answer = self.send(deadline, DOING, &format!("auth/{mount}/login"), None, json(&body)?).await?;
        let auth = answer.auth.as_ref().ok_or_else(|| self.client.bad_answer(DOING))?;
        let token: SecretString = auth.client_token.as_str().into();
        // Not in its last tenth.
        let lives = Duration::from_secs(auth.lease_duration.min(86_400) * 9 / 10);
        *kept = Some((token.clone(), Instant::now() + lives));
        Ok(token)
    }

    async fn transit(&self, doing: &str, verb: &str, body: &Body<'_>) -> Result<Answer> {
        let deadline = self.client.deadline();
        let token = self.token(deadline).await?;
        self.send(deadline, doing, &format!("{}/{verb}/{}", self.mount, self.key), Some(&token), json(body)?).await
    }
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ciphertext: Option<&'a str>,
    associated_data: String,
}

#[derive(Deserialize)]
struct Answer {
    data: Option<Data>,
    auth: Option<Auth>,
}

#[derive(Deserialize, Default)]
struct Data {
    ciphertext: Option<String>,
    plaintext: Option<String>,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    #[serde(default)]
    lease_duration: u64,
}

impl Drop for Data {
    fn drop(&mut self) {
        self.plaintext.zeroize();
    }
}

impl Drop for Auth {
    fn drop(&mut self) {
        self.client_token.zeroize();
    }
}

#[async_trait::async_trait]
impl Kms for VaultTransit {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], binding: &Binding) -> Result<Wrapped> {
        const DOING: &str = "wrap a key";
        let text = Zeroizing::new(BASE64.encode(key));
        let body = Body { plaintext: Some(&text), ciphertext: None, associated_data: BASE64.encode(binding.bytes()) };
        let mut answer = self.transit(DOING, "encrypt", &body).await?;
        let text = answer.data.as_mut().and_then(|data| data.ciphertext.take()).ok_or_else(|| self.client.bad_answer(DOING))?;
        // `vault:v3:...`: the ciphertext says which version of the key made it.
        Ok(Wrapped { version: String::new(), text })
    }

    async fn unwrap(&self, wrapped: &Wrapped, binding: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        const DOING: &str = "unwrap a key";
        let body = Body { plaintext: None, ciphertext: Some(&wrapped.text), associated_data: BASE64.encode(binding.bytes()) };
        let answer = self.transit(DOING, "decrypt", &body).await?;
        let text = answer.data.as_ref().and_then(|data| data.plaintext.as_deref()).ok_or_else(|| self.client.bad_answer(DOING))?;
        BASE64.decode(text).map(Zeroizing::new).map_err(|_| self.client.bad_answer(DOING))
    }
}

/// `{"errors": ["..."]}`: words, and no codes. Those below were read off `OpenBao` 2.7 and Vault's sources.
pub(super) fn judge(status: StatusCode, body: &[u8]) -> Problem {
    #[derive(Deserialize, Default)]
    struct Said {
        #[serde(default)]
        errors: Vec<String>,
    }
    let said: Said = serde_json::from_slice(body).unwrap_or_default();
    let message = said.errors.join("; ");
    let verdict = match status.as_u16() {
        // Enterprise: a replica that has not seen the token or key yet. 472 and 473 are standbys.
        412 | 472 | 473 => Verdict::Again,
        400 if message.contains("encryption key not found") => Verdict::NoKey,
        // An RSA key: it could bind nothing.
        400 if message.contains("non-AEAD cipher") => Verdict::Unusable,
        400 if ["message authentication failed", "invalid ciphertext", "too old", "too new"]
            .iter()
            .any(|words| message.contains(words)) =>
        {
            Verdict::Refused
        }
        400 if ["invalid role", "invalid secret id", "permission denied"].iter().any(|words| message.contains(words)) => {
            Verdict::Denied
        }
        // A route that is not there: another mount, or another server.
        404 => Verdict::Request,
        _ => by_status(status),
    };
    Problem { verdict, code: String::new(), message }
}
