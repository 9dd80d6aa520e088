//! Access tokens of Microsoft Entra ID, from what the environment offers first:
//!
//! | variables | how |
//! |---|---|
//! | `AZURE_TENANT_ID`, `AZURE_CLIENT_ID`, `AZURE_CLIENT_SECRET` | client credentials |
//! | `AZURE_TENANT_ID`, `AZURE_CLIENT_ID`, `AZURE_FEDERATED_TOKEN_FILE` | workload identity: the file's token as the assertion |
//! | `IDENTITY_ENDPOINT`, `IDENTITY_HEADER` | managed identity of App Service and Container Apps |
//! | none | managed identity of the machine; `AZURE_CLIENT_ID` chooses among several |
//!
//! <https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow>,
//! <https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token>,
//! <https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference>. `object_store` has the same,
//! but for storage alone.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::config::{KmsOptions, SecretSource};
use crate::crypto::kms::http::{Client, Problem, Request, Secret, Verdict, by_status, post, secret_header};
use crate::crypto::kms::{Environment, Provider};
use crate::{Error, ErrorKind, Result};

const DOING: &str = "get a token";
/// A token is not used in the last minutes before it expires.
const MARGIN: Duration = Duration::from_secs(300);

#[derive(Debug)]
enum Grant {
    Secret(SecretString),
    Federated(PathBuf),
}

#[derive(Debug)]
enum Source {
    Login {
        url: String,
        client_id: String,
        grant: Grant,
    },
    /// An address that gives tokens to whoever can reach it, and a header that it wants.
    Managed {
        url: String,
        header: (HeaderName, HeaderValue),
        client: Client,
    },
}

/// Tokens for one audience; the last one is kept while it is valid.
#[derive(Debug)]
pub(super) struct Tokens {
    source: Source,
    audience: String,
    kept: Mutex<Option<Kept>>,
}

struct Kept {
    header: Zeroizing<String>,
    until: Instant,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("until", &self.until).finish_non_exhaustive()
    }
}

impl Tokens {
    pub(super) fn new(audience: String, options: &KmsOptions, environment: &Environment) -> Result<Self> {
        let usage = |why: String| Error::new(ErrorKind::Usage, "kms.credentials", why);
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let secret = variable("AZURE_CLIENT_SECRET").map(|secret| Grant::Secret(secret.as_str().into()));
        let grant = secret.or_else(|| variable("AZURE_FEDERATED_TOKEN_FILE").map(|file| Grant::Federated(file.into())));
        let client_id = variable("AZURE_CLIENT_ID");
        let source = if let Some(grant) = grant {
            let (Some(tenant), Some(client_id)) = (variable("AZURE_TENANT_ID"), client_id) else {
                return Err(usage("AZURE_TENANT_ID or AZURE_CLIENT_ID is missing".into()));
            };
            if !tenant.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)) {
                return Err(usage("AZURE_TENANT_ID is not a tenant".into()));
            }
            let authority = variable("AZURE_AUTHORITY_HOST").map_or("https://login.microsoftonline.com", String::as_str);
            let url = format!("{}/{tenant}/oauth2/v2.0/token", authority.trim_end_matches('/'));
            Source::Login { url, client_id: client_id.clone(), grant }
        } else {
            let (base, version, header) = match (variable("IDENTITY_ENDPOINT"), variable("IDENTITY_HEADER")) {
                (Some(endpoint), Some(header)) => {
                    (endpoint.as_str(), "2019-08-01", (HeaderName::from_static("x-identity-header"), secret_header(header)?))
                }
                _ => (
                    "http://169.254.169.254/metadata/identity/oauth2/token",
                    "2018-02-01",
                    (HeaderName::from_static("metadata"), HeaderValue::from_static("true")),
                ),
            };
            let mut url = url::Url::parse(base).map_err(|e| usage(format!("IDENTITY_ENDPOINT: {e}")))?;
            let _ = url.query_pairs_mut().append_pair("api-version", version).append_pair("resource", &audience);
            if let Some(id) = client_id {
                let _ = url.query_pairs_mut().append_pair("client_id", id);
            }
            Source::Managed { url: url.into(), header, client: Client::metadata(Provider::Azure, options)? }
        };
        Ok(Self { source, audience, kept: Mutex::new(None) })
    }

    /// The value of an `Authorization` header.
    pub(super) async fn get(&self, client: &Client, deadline: Instant) -> Result<Zeroizing<String>> {
        let mut kept = self.kept.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| Instant::now() < kept.until) {
            return Ok(kept.header.clone());
        }
        let answer = self.ask(client, deadline).await?;
        let token: Token = serde_json::from_slice(&answer).map_err(|_| client.bad_answer(DOING))?;
        let token_text = Zeroizing::new(token.access_token);
        let header = Zeroizing::new(format!("Bearer {}", &*token_text));
        // A number, or text with one.
        let seconds = token.expires_in.as_u64().or_else(|| token.expires_in.as_str()?.parse().ok()).unwrap_or(0);
        let lives = Duration::from_secs(seconds.min(86_400)).saturating_sub(MARGIN);
        *kept = Some(Kept { header: header.clone(), until: Instant::now() + lives });
        Ok(header)
    }

    fn form(&self, client_id: &str, grant: &Grant) -> Result<Secret> {
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        let _ = form.append_pair("grant_type", "client_credentials").append_pair("client_id", client_id);
        let _ = form.append_pair("scope", &format!("{}/.default", self.audience));
        match grant {
            Grant::Secret(secret) => {
                let _ = form.append_pair("client_secret", secret.expose_secret());
            }
            Grant::Federated(file) => {
                // It is renewed in place.
                let token = SecretSource::File(file.clone()).read()?;
                let _ = form.append_pair("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
                let _ = form.append_pair("client_assertion", token.expose_secret());
            }
        }
        Ok(Secret::new(form.finish().into_bytes()))
    }

    async fn ask(&self, client: &Client, deadline: Instant) -> Result<Secret> {
        match &self.source {
            Source::Login { url, client_id, grant } => {
                let body = Bytes::from_owner(self.form(client_id, grant)?);
                let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
                let headers = [(http::header::CONTENT_TYPE, kind)];
                client.call(deadline, DOING, || post(url, body.clone(), &headers), judge).await
            }
            Source::Managed { url, header: (name, value), client } => {
                let build = || -> Result<Request> {
                    let request = http::Request::get(url).header(name, value).body(Bytes::new());
                    request.map_err(|e| Error::new(ErrorKind::Usage, "kms.credentials", format!("IDENTITY_ENDPOINT: {e}")))
                };
                client.call(deadline, DOING, build, judge_managed).await
            }
        }
    }
}

#[derive(Deserialize)]
struct Token {
    access_token: String,
    #[serde(default)]
    expires_in: serde_json::Value,
}

/// `{"error": "invalid_client", "error_description": "AADSTS7000215: ..."}`.
pub(in crate::crypto::kms) fn judge(status: StatusCode, body: &[u8]) -> Problem {
    #[derive(Deserialize, Default)]
    struct Said {
        #[serde(default)]
        error: String,
        #[serde(default)]
        error_description: String,
    }
    let said: Said = serde_json::from_slice(body).unwrap_or_default();
    let verdict = match (said.error.as_str(), by_status(status)) {
        ("temporarily_unavailable" | "server_error", _) | (_, Verdict::Again) => Verdict::Again,
        _ => Verdict::Denied,
    };
    Problem { verdict, code: said.error, message: said.error_description }
}

/// 404 and 410 are said while the metadata service is updated.
fn judge_managed(status: StatusCode, body: &[u8]) -> Problem {
    let problem = judge(status, body);
    if matches!(status.as_u16(), 404 | 410) { Problem { verdict: Verdict::Again, ..problem } } else { problem }
}
