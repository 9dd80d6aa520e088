//! `s3://bucket/prefix`: Amazon S3 and what speaks its language.
//!
//! Sources: Amazon S3 API reference, `PutObject`, `PutObjectRetention`, `PutObjectLegalHold`, `ListObjectVersions`,
//! `GetBucketVersioning`, `GetObjectLockConfiguration`, `GetBucketLifecycleConfiguration`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use md5::{Digest, Md5};
use object_store::StaticCredentialProvider;
use object_store::aws::{
    AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsAuthorizer, AwsCredential, AwsCredentialProvider, Checksum, S3ConditionalPut,
};
use object_store::client::{HttpClient, HttpConnector, HttpRequest, HttpRequestBody};
use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use secrecy::ExposeSecret;

use super::exchange::{exchange, refusal};
use super::{Backend, authority_and_path, authority_of, client_options, connector, ensure_encrypted, no_retries, wrong, xml};
use crate::store::answer::Answer;
use crate::store::gate::Gate;
use crate::store::guard::{BucketRules, Guard, Version, VersionsPage};
use crate::store::http::Dress;
use crate::store::retention::Lock;
use crate::store::settings::{S3Encryption, Settings};
use crate::{Error, ErrorKind, Result};

const STORE: &str = "S3";

const CONTENT_MD5: HeaderName = HeaderName::from_static("content-md5");

/// How long a request that is signed in its URL may be on its way.
/// Longer than the 15 minutes that clocks may differ by.
const SIGNED_FOR: Duration = Duration::from_secs(30 * 60);

/// Opens a bucket; gives the names in front of the vault's as well.
pub(in crate::store) fn open(url: &url::Url, settings: &Settings, gate: &Arc<Gate>) -> Result<(Backend, String)> {
    let (bucket, prefix) = authority_and_path(url)?;
    let environment = AmazonS3Builder::from_env();
    let of_client = |key| environment.get_config_value(&AmazonS3ConfigKey::Client(key));
    let allow_http = settings.allow_http || of_client(object_store::ClientConfigKey::AllowHttp).as_deref() == Some("true");
    // The more specific variable (`AWS_ENDPOINT_URL_S3`) wins in the client, over the other and over what is set here.
    let from_environment = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
    let endpoint = settings.s3.endpoint.clone();
    let endpoint = endpoint.or_else(|| from_environment.iter().find_map(|key| environment.get_config_value(key)));
    let endpoint = endpoint.map(|endpoint| hosted(&endpoint, &bucket, settings.s3.virtual_hosted)).transpose()?;
    ensure_encrypted(endpoint.as_deref(), allow_http)?;
    let proxy = of_client(object_store::ClientConfigKey::ProxyUrl);
    let region = settings.s3.region.clone().or_else(|| environment.get_config_value(&AmazonS3ConfigKey::Region));
    let region = region.unwrap_or_else(|| "us-east-1".into());
    let options = client_options(settings, allow_http, proxy)?;
    let mut builder = environment
        .with_bucket_name(&bucket)
        .with_region(&region)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // What a bucket with Object Lock asks for with each PUT, and what the others check and keep (T28).
        .with_checksum_algorithm(Checksum::SHA256)
        .with_virtual_hosted_style_request(settings.s3.virtual_hosted)
        // One object at a time, as every store has it, with the provider's own code when it refuses.
        .with_disable_bulk_delete(true)
        .with_retry(no_retries())
        .with_client_options(options.clone());
    if let Some(endpoint) = &endpoint {
        builder = builder.with_endpoint(endpoint).with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    if let (Some(id), Some(secret)) = (&settings.s3.access_key_id, &settings.s3.secret_access_key) {
        // All three together: a token in the environment belongs to the key there.
        let token = settings.s3.session_token.as_ref().map(|token| token.expose_secret().to_owned());
        let credential = AwsCredential { key_id: id.clone(), secret_key: secret.expose_secret().to_owned(), token };
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)));
    }
    builder = match &settings.s3.encryption {
        None => builder,
        Some(S3Encryption::Kms(key)) => builder.with_sse_kms_encryption(key),
        Some(S3Encryption::DualKms(key)) => builder.with_dsse_kms_encryption(key),
        Some(S3Encryption::Customer(key)) => builder.with_ssec_encryption(key.expose_secret()),
    };
    if settings.s3.bucket_key {
        builder = builder.with_bucket_key(true);
    }
    let hosts = match &endpoint {
        Some(endpoint) => {
            vec![authority_of(endpoint).ok_or_else(|| wrong(format!("the endpoint `{endpoint}` is not an address")))?]
        }
        // And the bucket in front of it. The service that gives credentials has another name.
        None => vec![format!("s3.{region}.amazonaws.com:443")],
    };
    let unusable = |e: object_store::Error| {
        let profile = std::env::var_os("AWS_PROFILE").is_some();
        let hint = if profile {
            "profiles (AWS_PROFILE, ~/.aws) are not read: export the keys, or use `aws configure export-credentials --format env`"
        } else {
            "set vault.s3.access_key_id and its secret, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and vault.s3.endpoint for a \
             store that is not Amazon's"
        };
        Error::new(ErrorKind::Usage, "vault.s3", format!("open {url}: {e}")).with_hint(hint)
    };
    // The headers of a lock are signed with the credentials that the client itself uses.
    let plain = connector(settings, gate, hosts.clone(), None);
    let credentials = builder.clone().with_http_connector(plain.clone()).build().map_err(unusable)?.credentials().clone();
    let dress = Arc::new(S3Dress { credentials: credentials.clone(), region });
    let s3 = builder
        .with_credentials(credentials)
        .with_http_connector(connector(settings, gate, hosts, Some(dress)))
        .build()
        .map_err(unusable)?;
    let http = plain.connect(&options).map_err(unusable)?;
    let guard = S3Guard { s3: s3.clone(), http, prefix: prefix.clone() };
    let backend =
        Backend { inner: Arc::new(s3), guard: Some(Arc::new(guard)), directory: None, one_wins_by_contract: endpoint.is_none() };
    Ok((backend, prefix))
}

/// The endpoint with the bucket in its host, where that is wanted: the client takes an endpoint as it is.
fn hosted(endpoint: &str, bucket: &str, virtual_hosted: bool) -> Result<String> {
    let endpoint = endpoint.trim_end_matches('/');
    if !virtual_hosted {
        return Ok(endpoint.to_owned());
    }
    let (scheme, host) = endpoint.split_once("://").ok_or_else(|| wrong(format!("the endpoint `{endpoint}` is not an address")))?;
    Ok(if host.starts_with(&format!("{bucket}.")) { endpoint.to_owned() } else { format!("{scheme}://{bucket}.{host}") })
}

/// Adds the lock to a signed PUT and signs it again.
#[derive(Debug)]
struct S3Dress {
    credentials: AwsCredentialProvider,
    region: String,
}

#[async_trait]
impl Dress for S3Dress {
    async fn dress(&self, request: &mut HttpRequest, lock: &Lock) -> object_store::Result<()> {
        let headers = request.headers_mut();
        let _ = headers.insert("x-amz-object-lock-mode", HeaderValue::from_static(lock.mode.s3()));
        let until = HeaderValue::try_from(lock.until.to_string()).map_err(|e| xml::unreadable(STORE, "lock", e))?;
        let _ = headers.insert("x-amz-object-lock-retain-until-date", until);
        // An unsigned request stays one.
        if headers.remove(http::header::AUTHORIZATION).is_none() {
            return Ok(());
        }
        let digest = headers.get("x-amz-content-sha256").and_then(|hex| decode_hex(hex.as_bytes()));
        let credential = self.credentials.get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(request, digest.as_deref())
    }
}

fn decode_hex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks_exact(2).map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

#[derive(Debug)]
struct S3Guard {
    s3: AmazonS3,
    http: HttpClient,
    prefix: String,
}

impl S3Guard {
    /// Sends a request that `object_store` does not know.
    async fn send(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<String>,
    ) -> object_store::Result<Response<Bytes>> {
        let mut options = SignedUrlOptions::default().with_query(query.iter().map(|(k, v)| (*k, *v)));
        let md5 = body.as_ref().map(|body| base64::engine::general_purpose::STANDARD.encode(Md5::digest(body.as_bytes())));
        let md5 = md5.map(HeaderValue::try_from).transpose().map_err(|e| xml::unreadable(STORE, "digest", e))?;
        if let Some(md5) = &md5 {
            options = options.with_signed_header(CONTENT_MD5, md5.clone());
        }
        let url = self.s3.signed_url_opts(method.clone(), &Path::parse(path)?, SIGNED_FOR, &options).await?;
        let mut request = http::Request::builder().method(method).uri(url.as_str());
        if let Some(md5) = md5 {
            request = request.header(CONTENT_MD5, md5);
        }
        let body = body.map_or_else(HttpRequestBody::empty, HttpRequestBody::from);
        let request = request.body(body).map_err(|e| xml::unreadable(STORE, "request", e))?;
        exchange(STORE, &self.http, request).await
    }

    /// The same, where only success will do.
    async fn ask(&self, method: Method, path: &str, query: &[(&str, &str)], body: Option<String>) -> object_store::Result<Bytes> {
        let answer = self.send(method, path, query, body).await?;
        if answer.status().is_success() { Ok(answer.into_body()) } else { Err(refusal(STORE, path, &answer)) }
    }

    /// The same, where the store may say that there is no such setting.
    async fn ask_if_set(&self, path: &str, what: &str) -> object_store::Result<Option<Bytes>> {
        let answer = self.send(Method::GET, path, &[(what, "")], None).await?;
        match answer.status() {
            status if status.is_success() => Ok(Some(answer.into_body())),
            StatusCode::NOT_FOUND if Answer::parse(404, None, "", answer.body()).code != "NoSuchKey" => Ok(None),
            _ => Err(refusal(STORE, path, &answer)),
        }
    }
}

#[async_trait]
impl Guard for S3Guard {
    async fn lock_of(&self, path: &str) -> object_store::Result<Option<Lock>> {
        match self.ask_if_set(path, "retention").await {
            Ok(body) => body.map(|body| xml::parse_retention(STORE, &body)).transpose(),
            // A bucket without Object Lock has no locks.
            Err(error) if Answer::of(&error).is_some_and(|a| a.code == "InvalidRequest") => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn set_lock(&self, path: &str, lock: &Lock) -> object_store::Result<()> {
        self.ask(Method::PUT, path, &[("retention", "")], Some(xml::retention(lock))).await.map(drop)
    }

    async fn is_held(&self, path: &str) -> object_store::Result<bool> {
        let body = self.ask_if_set(path, "legal-hold").await?;
        body.map_or(Ok(false), |body| xml::parse_legal_hold(STORE, &body))
    }

    async fn set_hold(&self, path: &str, held: bool) -> object_store::Result<()> {
        self.ask(Method::PUT, path, &[("legal-hold", "")], Some(xml::legal_hold(held))).await.map(drop)
    }

    async fn rules(&self) -> object_store::Result<BucketRules> {
        let mut rules = BucketRules::default();
        let mut unknown = Vec::new();
        for what in ["versioning", "object-lock", "lifecycle"] {
            match self.ask_if_set("", what).await {
                Ok(body) => match (what, body) {
                    ("versioning", Some(body)) => rules.versioning = Some(xml::parse_versioning(STORE, &body)?),
                    ("object-lock", Some(body)) => xml::parse_object_lock(STORE, &body, &mut rules)?,
                    ("object-lock", None) => rules.object_lock = Some(false),
                    ("lifecycle", Some(body)) => {
                        let prefix = if self.prefix.is_empty() { String::new() } else { format!("{}/", self.prefix) };
                        xml::parse_lifecycle(STORE, &body, &prefix, &mut rules)?;
                    }
                    ("lifecycle", None) => (rules.expires_old_versions, rules.expires_objects) = (Some(false), Some(false)),
                    _ => {}
                },
                Err(error) => match Answer::of(&error) {
                    Some(answer) => unknown.push(format!("{what}: {answer}")),
                    None => return Err(error),
                },
            }
        }
        rules.unknown = unknown;
        Ok(rules)
    }

    async fn versions(
        &self,
        prefix: &str,
        after: Option<VersionsPage>,
    ) -> object_store::Result<(Vec<Version>, Option<VersionsPage>)> {
        let mut query = vec![("versions", ""), ("prefix", prefix)];
        if let Some(after) = &after {
            query.push(("key-marker", &after.key));
            if !after.version.is_empty() {
                query.push(("version-id-marker", &after.version));
            }
        }
        let body = self.ask(Method::GET, "", &query, None).await?;
        xml::parse_versions(STORE, &body)
    }

    async fn delete_version(&self, path: &str, version: &str) -> object_store::Result<()> {
        self.ask(Method::DELETE, path, &[("versionId", version)], None).await.map(drop)
    }
}
