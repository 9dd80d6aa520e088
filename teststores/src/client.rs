//! Requests that `object_store` does not make: buckets, policies, locks. Signed with its signers, sent with its client.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request};
use object_store::ClientOptions;
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::{Certificate, HttpClient, HttpConnector, HttpRequestBody, ReqwestConnector};
use serde::{Deserialize, Serialize};

use crate::runtime::wait;

/// An access key and its secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The access key, the account, or whatever names the user.
    pub id: String,
    /// The secret that goes with it.
    pub secret: String,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

/// How a request is signed.
#[derive(Debug, Clone)]
enum Signer {
    None,
    Aws { key: Key, region: String },
    Azure { key: Key },
}

/// A client of one server, as one of its users.
#[derive(Debug, Clone)]
pub struct Client {
    http: HttpClient,
    endpoint: String,
    signer: Signer,
}

/// What a server has answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The request, for messages.
    line: String,
}

impl Client {
    /// Without a signature.
    pub fn anonymous(endpoint: &str) -> Result<Self> {
        Self::new(endpoint, None, Signer::None)
    }

    /// With Amazon's signatures, version 4. `ca` is the certificate to trust, in PEM.
    pub fn aws(endpoint: &str, ca: Option<&[u8]>, region: &str, key: &Key) -> Result<Self> {
        Self::new(endpoint, ca, Signer::Aws { key: key.clone(), region: region.to_owned() })
    }

    /// With an Azure account's shared key.
    pub fn azure(endpoint: &str, key: &Key) -> Result<Self> {
        Self::new(endpoint, None, Signer::Azure { key: key.clone() })
    }

    fn new(endpoint: &str, ca: Option<&[u8]>, signer: Signer) -> Result<Self> {
        let mut options = ClientOptions::new().with_allow_http(true).with_timeout(Duration::from_secs(60));
        if let Some(ca) = ca {
            options = options.with_root_certificate(Certificate::from_pem(ca)?);
        }
        let http = ReqwestConnector::default().connect(&options)?;
        Ok(Self { http, endpoint: endpoint.trim_end_matches('/').to_owned(), signer })
    }

    /// Sends a request and waits for the answer, whatever it is. `target` is a path with its query, encoded as it is sent.
    pub fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(format!("{}{target}", self.endpoint));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body: Bytes = body.into();
        if !body.is_empty() || method == "PUT" || method == "POST" {
            request = request.header("content-length", body.len());
        }
        let mut request = request.body(HttpRequestBody::from(body)).with_context(|| format!("make a request for {target}"))?;
        match &self.signer {
            Signer::None => {}
            Signer::Aws { key, region } => {
                let credential = AwsCredential { key_id: key.id.clone(), secret_key: key.secret.clone(), token: None };
                AwsAuthorizer::new(&credential, "s3", region).try_authorize(&mut request, None)?;
            }
            Signer::Azure { key } => {
                let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(&key.secret)?);
                AzureAuthorizer::new(&credential, &key.id).try_authorize(&mut request)?;
            }
        }
        let (http, line) = (self.http.clone(), format!("{method} {}{target}", self.endpoint));
        wait(async move {
            let answer = http.execute(request).await.with_context(|| line.clone())?;
            let (parts, body) = answer.into_parts();
            let body = body.bytes().await.with_context(|| line.clone())?;
            Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body, line })
        })
    }

    /// Sends a request; any other answer than a success is an error.
    pub fn call(&self, method: &str, target: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<Answer> {
        let answer = self.send(method, target, headers, body)?;
        if !answer.is_success() {
            bail!("{answer}");
        }
        Ok(answer)
    }

    /// Waits until the server answers requests at all.
    pub(crate) fn wait_until_up(&self, patience: Duration, alive: impl Fn() -> Result<()>) -> Result<()> {
        let began = std::time::Instant::now();
        loop {
            alive()?;
            let error = match self.send("GET", "/", &[], "") {
                // A server that is starting behind its own door says so with these.
                Ok(answer) if ![502, 503, 504].contains(&answer.status) => return Ok(()),
                Ok(answer) => answer.to_string(),
                Err(error) => format!("{error:#}"),
            };
            ensure!(began.elapsed() < patience, "{} does not answer: {error}", self.endpoint);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Answer {
    /// True for 200 to 299.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// What stands between the first `<name>` and its end, in an answer in XML.
    pub fn element(&self, name: &str) -> Option<String> {
        let text = self.text();
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text();
        write!(f, "{}: {} {}", self.line, self.status, text.chars().take(500).collect::<String>())
    }
}
