//! `gs://bucket/prefix`: Google Cloud Storage, through its XML API as `object_store` does.
//!
//! Sources: Cloud Storage documentation, "HTTP headers and query string parameters for XML API" (`x-goog-object-lock-mode`,
//! `x-goog-object-lock-retain-until-date`), "List objects" with `versions`; JSON API, "Objects: get" and "Objects: patch" with
//! `retention` and `temporaryHold`: the XML API has no holds, and answers 404 for an object without retention.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderValue, Method, Response};
use object_store::client::{HttpClient, HttpConnector, HttpRequest, HttpRequestBody};
use object_store::gcp::{GcpCredentialProvider, GoogleCloudStorageBuilder};

use super::exchange::{exchange, refusal};
use super::{Backend, authority_and_path, authority_of, client_options, connector, ensure_encrypted, no_retries, wrong, xml};
use crate::store::answer::Answer;
use crate::store::gate::Gate;
use crate::store::guard::{BucketRules, Guard, Version, VersionsPage};
use crate::store::http::Dress;
use crate::store::retention::{Lock, LockMode};
use crate::store::settings::Settings;
use crate::{Error, ErrorKind, Result};

const STORE: &str = "GCS";

pub(in crate::store) fn open(url: &url::Url, settings: &Settings, gate: &Arc<Gate>) -> Result<(Backend, String)> {
    let (bucket, prefix) = authority_and_path(url)?;
    let allow_http = settings.allow_http;
    let endpoint = settings.gcs.endpoint.clone();
    ensure_encrypted(endpoint.as_deref(), allow_http)?;
    if settings.placement.values().any(|placement| !placement.tags.is_empty()) {
        return Err(wrong("objects in Google's stores have no tags: remove them from the configuration"));
    }
    let options = client_options(settings, allow_http, None)?;
    let base = endpoint.unwrap_or_else(|| "https://storage.googleapis.com".into());
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(&bucket)
        .with_base_url(&base)
        .with_retry(no_retries())
        .with_client_options(options.clone());
    if let Some(file) = &settings.gcs.service_account_file {
        builder = builder.with_service_account_path(file.to_string_lossy());
    }
    if settings.gcs.anonymous {
        builder = builder.with_skip_signature(true).with_bearer_token("");
    }
    let host = authority_of(&base).ok_or_else(|| wrong(format!("the endpoint `{base}` is not an address")))?;
    let unusable = |e: object_store::Error| {
        Error::new(ErrorKind::Usage, "vault.gcs", format!("open {url}: {e}")).with_hint(
            "set vault.gcs.service_account_file or GOOGLE_APPLICATION_CREDENTIALS to a key file of type service_account or \
             authorized_user (external_account is not understood); on Google's machines leave both out",
        )
    };
    let plain = connector(settings, gate, vec![host.clone()], None);
    let gcs =
        builder.with_http_connector(connector(settings, gate, vec![host], Some(Arc::new(GcsDress)))).build().map_err(unusable)?;
    let http = plain.connect(&options).map_err(unusable)?;
    let credentials = (!settings.gcs.anonymous).then(|| gcs.credentials().clone());
    let guard = GcsGuard { http, credentials, base: base.trim_end_matches('/').to_owned(), bucket };
    Ok((Backend { inner: Arc::new(gcs), guard: Some(Arc::new(guard)), directory: None, one_wins_by_contract: true }, prefix))
}

/// Adds the lock to a PUT; a bearer token signs nothing.
#[derive(Debug)]
struct GcsDress;

#[async_trait]
impl Dress for GcsDress {
    async fn dress(&self, request: &mut HttpRequest, lock: &Lock) -> object_store::Result<()> {
        let until = HeaderValue::try_from(lock.until.to_string()).map_err(|e| xml::unreadable(STORE, "lock", e))?;
        let headers = request.headers_mut();
        let _ = headers.insert("x-goog-object-lock-mode", HeaderValue::from_static(lock.mode.s3()));
        let _ = headers.insert("x-goog-object-lock-retain-until-date", until);
        Ok(())
    }
}

#[derive(Debug)]
struct GcsGuard {
    http: HttpClient,
    credentials: Option<GcpCredentialProvider>,
    base: String,
    bucket: String,
}

impl GcsGuard {
    async fn send(&self, method: Method, address: &str, body: Option<String>) -> object_store::Result<Response<Bytes>> {
        let mut request = http::Request::builder().method(method).uri(format!("{}/{address}", self.base));
        if let Some(credentials) = &self.credentials {
            let credential = credentials.get_credential().await?;
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {}", credential.bearer));
        }
        if address.starts_with("storage/v1/") {
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        let body = body.map_or_else(HttpRequestBody::empty, HttpRequestBody::from);
        let request = request.body(body).map_err(|e| xml::unreadable(STORE, "request", e))?;
        exchange(STORE, &self.http, request).await
    }

    async fn ask(&self, method: Method, address: &str, body: Option<String>) -> object_store::Result<Bytes> {
        let answer = self.send(method, address, body).await?;
        if answer.status().is_success() { Ok(answer.into_body()) } else { Err(refusal(STORE, address, &answer)) }
    }

    /// An object's address in the JSON API, where a slash in its name is no separator.
    fn json(&self, path: &str) -> String {
        let name: String = url::form_urlencoded::byte_serialize(path.as_bytes()).collect();
        format!("storage/v1/b/{}/o/{}", self.bucket, name.replace('+', "%20"))
    }
}

fn page_query(prefix: &str, after: Option<&VersionsPage>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    let _ = query.append_pair("prefix", prefix);
    if let Some(after) = after {
        let _ = query.append_pair("marker", &after.key);
        if !after.version.is_empty() {
            let _ = query.append_pair("generation-marker", &after.version);
        }
    }
    query.finish()
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    #[serde(default)]
    temporary_hold: bool,
    retention: Option<Retention>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Retention {
    mode: String,
    retain_until_time: jiff::Timestamp,
}

impl GcsGuard {
    async fn kept(&self, path: &str) -> object_store::Result<Kept> {
        let body = self.ask(Method::GET, &format!("{}?fields=retention,temporaryHold", self.json(path)), None).await?;
        serde_json::from_slice(&body).map_err(|e| xml::unreadable(STORE, "retention", e))
    }

    async fn patch(&self, path: &str, change: &serde_json::Value) -> object_store::Result<()> {
        self.ask(Method::PATCH, &self.json(path), Some(change.to_string())).await.map(drop)
    }
}

#[async_trait]
impl Guard for GcsGuard {
    async fn lock_of(&self, path: &str) -> object_store::Result<Option<Lock>> {
        let Some(Retention { mode, retain_until_time: until }) = self.kept(path).await?.retention else { return Ok(None) };
        let mode = LockMode::parse(&mode).ok_or_else(|| xml::unreadable(STORE, "retention", mode))?;
        Ok(Some(Lock { mode, until }))
    }

    async fn set_lock(&self, path: &str, lock: &Lock) -> object_store::Result<()> {
        // The JSON API has Azure's names for the modes.
        let retention = serde_json::json!({ "mode": lock.mode.azure(), "retainUntilTime": lock.until.to_string() });
        self.patch(path, &serde_json::json!({ "retention": retention })).await
    }

    async fn is_held(&self, path: &str) -> object_store::Result<bool> {
        Ok(self.kept(path).await?.temporary_hold)
    }

    async fn set_hold(&self, path: &str, held: bool) -> object_store::Result<()> {
        self.patch(path, &serde_json::json!({ "temporaryHold": held })).await
    }

    async fn rules(&self) -> object_store::Result<BucketRules> {
        let mut rules = BucketRules::default();
        match self.send(Method::GET, &format!("{}?versioning", self.bucket), None).await {
            Ok(answer) if answer.status().is_success() => {
                rules.versioning = Some(xml::parse_versioning(STORE, answer.body())?);
            }
            Ok(answer) => rules.unknown.push(format!("versioning: the store answered {}", answer.status())),
            Err(error) => match Answer::of(&error) {
                Some(answer) => rules.unknown.push(format!("versioning: {answer}")),
                None => return Err(error),
            },
        }
        rules.unknown.push("lifecycle and object retention of the bucket: look with `gcloud storage buckets describe`".into());
        Ok(rules)
    }

    async fn versions(
        &self,
        prefix: &str,
        after: Option<VersionsPage>,
    ) -> object_store::Result<(Vec<Version>, Option<VersionsPage>)> {
        let body = self.ask(Method::GET, &format!("{}?versions&{}", self.bucket, page_query(prefix, after.as_ref())), None).await?;
        xml::parse_versions(STORE, &body)
    }

    async fn delete_version(&self, path: &str, version: &str) -> object_store::Result<()> {
        self.ask(Method::DELETE, &format!("{}?generation={version}", self.json(path)), None).await.map(drop)
    }
}
