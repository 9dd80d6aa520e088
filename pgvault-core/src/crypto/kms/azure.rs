//! Azure Key Vault and Managed HSM: `wrapkey` and `unwrapkey` with an RSA key, RSA-OAEP-256.
//!
//! <https://learn.microsoft.com/rest/api/keyvault/keys/wrap-key/wrap-key> and `unwrap-key`; errors:
//! <https://learn.microsoft.com/azure/key-vault/general/rest-error-codes>. These operations take no context, so what binds a slot
//! is our own seal (see [`super`]). The version that wrapped is kept in the slot, because a key's newest version may be another
//! by then and unwraps nothing of the old one.
//!
//! Tokens: [`token`].

pub(super) mod token;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::http::{Client, Problem, Verdict, by_status, json, post, secret_header};
use super::{Binding, Environment, KeyName, Kms, Provider, Wrapped};
use crate::config::KmsOptions;
use crate::crypto::aead::KEY_LEN;
use crate::format::FormatError;
use crate::{Error, ErrorKind, Result};
use token::Tokens;

/// Served by every cloud since 2023.
const API_VERSION: &str = "7.4";

/// A key in Azure Key Vault.
#[derive(Debug)]
pub(super) struct AzureKeyVault {
    name: KeyName,
    endpoint: String,
    /// `NAME`, without a version.
    key: String,
    /// The version in the name, if there is one.
    pinned: Option<String>,
    client: Client,
    tokens: Tokens,
}

impl AzureKeyVault {
    pub(super) fn new(name: &KeyName, options: &KmsOptions, environment: &Environment) -> Result<Self> {
        let (address, path) = name.address_and_path();
        let address = address.unwrap_or_default();
        let mut parts = path.split('/').skip(1).map(ToOwned::to_owned);
        // `https://NAME.vault.azure.net` needs a token for `https://vault.azure.net`; other clouds have other ends.
        let audience = address.split_once('.').map(|(_, rest)| format!("https://{rest}")).unwrap_or_default();
        Ok(Self {
            name: name.clone(),
            endpoint: options.endpoint.as_deref().unwrap_or(address).trim_end_matches('/').into(),
            key: parts.next().unwrap_or_default(),
            pinned: parts.next(),
            client: Client::new(Provider::Azure, options, options.ca_file.as_deref())?,
            tokens: Tokens::new(audience, options, environment)?,
        })
    }

    async fn call(&self, doing: &str, version: &str, verb: &str, value: &[u8]) -> Result<Answer> {
        let deadline = self.client.deadline();
        let token = self.tokens.get(&self.client, deadline).await?;
        let headers = [
            (http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json")),
            (http::header::AUTHORIZATION, secret_header(&token)?),
        ];
        let value = Zeroizing::new(BASE64URL.encode(value));
        let body = json(&Body { alg: "RSA-OAEP-256", value: &value })?;
        // Without a version the newest is meant.
        let version = if version.is_empty() { String::new() } else { format!("/{version}") };
        let url = format!("{}/keys/{}{version}/{verb}?api-version={API_VERSION}", self.endpoint, self.key);
        let answer = self.client.call(deadline, doing, || post(&url, body.clone(), &headers), judge).await?;
        serde_json::from_slice(&answer).map_err(|_| self.client.bad_answer(doing))
    }
}

#[derive(Serialize)]
struct Body<'a> {
    alg: &'static str,
    value: &'a str,
}

#[derive(Deserialize)]
struct Answer {
    /// The key's address, version included.
    kid: String,
    value: String,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

fn is_version(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

#[async_trait::async_trait]
impl Kms for AzureKeyVault {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], _: &Binding) -> Result<Wrapped> {
        const DOING: &str = "wrap a key";
        let answer = self.call(DOING, self.pinned.as_deref().unwrap_or_default(), "wrapkey", key).await?;
        let version = answer.kid.rsplit('/').next().filter(|version| is_version(version));
        let version = version.ok_or_else(|| self.client.bad_answer(DOING))?.to_owned();
        Ok(Wrapped { version, text: answer.value.clone() })
    }

    async fn unwrap(&self, wrapped: &Wrapped, _: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        const DOING: &str = "unwrap a key";
        // It comes from the store and becomes part of the address.
        if !is_version(&wrapped.version) {
            return Err(FormatError::new("key slot", "names something that is no version of a key").into());
        }
        let bytes = BASE64URL.decode(wrapped.text.trim_end_matches('='));
        let bytes = bytes.map_err(|_| Error::new(ErrorKind::Corrupt, "format.invalid", "key slot: is not base64url"))?;
        let answer = self.call(DOING, &wrapped.version, "unwrapkey", &bytes).await?;
        BASE64URL.decode(answer.value.trim_end_matches('=')).map(Zeroizing::new).map_err(|_| self.client.bad_answer(DOING))
    }
}

/// `{"error": {"code": "Forbidden", "message": "...", "innererror": {"code": "KeyDisabled"}}}`.
pub(super) fn judge(status: StatusCode, body: &[u8]) -> Problem {
    #[derive(Deserialize, Default)]
    struct Outer {
        #[serde(default)]
        error: Inner,
    }
    #[derive(Deserialize, Default)]
    struct Inner {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
        innererror: Option<Box<Inner>>,
    }
    let mut said = serde_json::from_slice::<Outer>(body).unwrap_or_default().error;
    // The innermost code says most.
    if let Some(inner) = said.innererror.take().filter(|inner| !inner.code.is_empty()) {
        said.code = inner.code;
    }
    let lower = said.message.to_ascii_lowercase();
    let verdict = match (said.code.as_str(), status.as_u16()) {
        ("KeyDisabled" | "KeyNotYetValidOrExpired" | "KeyExpired" | "KeyNotYetValid", _) => Verdict::Unusable,
        // The same answer for what the caller may not and what nobody may.
        (_, 403)
            if lower.contains("disabled key")
                || lower.contains("validity period")
                || lower.contains("not permitted on this key") =>
        {
            Verdict::Unusable
        }
        ("KeyNotFound" | "VaultNotFound", _) => Verdict::NoKey,
        // Padding that does not come out right; unwrapping has no other parameter that could be bad.
        ("BadParameter", 400) => Verdict::Refused,
        _ => by_status(status),
    };
    Problem { verdict, code: said.code, message: said.message }
}
