//! `az://account/container/prefix`: Azure Blob Storage.
//!
//! Sources: Blob service REST API, "Put Blob" (`x-ms-immutability-policy-*`, from version 2020-06-12 on), "Set Blob Immutability
//! Policy", "Set Blob Legal Hold", "Get Blob Properties", "Get Container Properties".

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use jiff::fmt::rfc2822;
use object_store::azure::{AzureAuthorizer, AzureConfigKey, AzureCredentialProvider, MicrosoftAzureBuilder};
use object_store::client::{HttpClient, HttpConnector, HttpRequest, HttpRequestBody};
use secrecy::ExposeSecret;

use super::exchange::{exchange, refusal};
use super::{Backend, authority_and_path, authority_of, client_options, connector, ensure_encrypted, no_retries, wrong, xml};
use crate::store::gate::Gate;
use crate::store::guard::{BucketRules, Guard, Version, VersionsPage};
use crate::store::http::Dress;
use crate::store::retention::{Lock, LockMode};
use crate::store::settings::{AzureSettings, Settings};
use crate::{Error, ErrorKind, Result};

const STORE: &str = "Azure";

pub(in crate::store) fn open(url: &url::Url, settings: &Settings, gate: &Arc<Gate>) -> Result<(Backend, String)> {
    let (account, path) = authority_and_path(url)?;
    let (container, prefix) = path.split_once('/').unwrap_or((&path, ""));
    if container.is_empty() {
        return Err(wrong(format!("vault.url `{url}` names no container: az://account/container/prefix")));
    }
    let environment = MicrosoftAzureBuilder::from_env();
    let azure = &settings.azure;
    let allow_http = settings.allow_http;
    let endpoint = azure.endpoint.clone().or_else(|| environment.get_config_value(&AzureConfigKey::Endpoint));
    ensure_encrypted(endpoint.as_deref(), allow_http)?;
    let options = client_options(settings, allow_http, None)?;
    let mut builder = credentials(environment, azure)
        .with_account(&account)
        .with_container_name(container)
        .with_retry(no_retries())
        .with_client_options(options.clone());
    let base = match &endpoint {
        Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
        None => format!("https://{account}.blob.core.windows.net"),
    };
    if endpoint.is_some() {
        builder = builder.with_endpoint(base.clone());
    }
    let host = authority_of(&base).ok_or_else(|| wrong(format!("the endpoint `{base}` is not an address")))?;
    let unusable = |e: object_store::Error| {
        Error::new(ErrorKind::Usage, "vault.azure", format!("open {url}: {e}")).with_hint(
            "give the pod or machine an identity, or set vault.azure.access_key or vault.azure.sas (or AZURE_* variables); \
             vault.azure.credential says which kind is meant",
        )
    };
    let plain = connector(settings, gate, vec![host.clone()], None);
    let credentials = builder.clone().with_http_connector(plain.clone()).build().map_err(unusable)?.credentials().clone();
    let dress = Arc::new(AzureDress { credentials: credentials.clone(), account: account.clone() });
    let client = builder
        .with_credentials(credentials.clone())
        .with_http_connector(connector(settings, gate, vec![host], Some(dress)))
        .build()
        .map_err(unusable)?;
    let http = plain.connect(&options).map_err(unusable)?;
    let container = url::Url::parse(&format!("{base}/{container}")).map_err(|e| wrong(format!("the endpoint `{base}`: {e}")))?;
    let guard = AzureGuard { http, credentials, account, container };
    Ok((
        Backend { inner: Arc::new(client), guard: Some(Arc::new(guard)), directory: None, one_wins_by_contract: true },
        prefix.to_owned(),
    ))
}

fn credentials(mut builder: MicrosoftAzureBuilder, azure: &AzureSettings) -> MicrosoftAzureBuilder {
    if let Some(key) = &azure.access_key {
        builder = builder.with_access_key(key.expose_secret());
    }
    if let Some(sas) = &azure.sas {
        builder = builder.with_config(AzureConfigKey::SasKey, sas.expose_secret().trim_start_matches('?'));
    }
    if let Some(id) = &azure.client_id {
        builder = builder.with_client_id(id);
    }
    if let Some(tenant) = &azure.tenant_id {
        builder = builder.with_tenant_id(tenant);
    }
    if let Some(secret) = &azure.client_secret {
        builder = builder.with_client_secret(secret.expose_secret());
    }
    // What is configured wins over what the environment has of another kind.
    let configured = [
        (azure.access_key.is_some(), "access_key"),
        (azure.sas.is_some(), "sas_token"),
        (azure.client_secret.is_some(), "client_secret"),
    ];
    let implied = configured.into_iter().find_map(|(given, kind)| given.then_some(kind));
    match azure.credential.as_deref().or(implied) {
        Some(kind) => builder.with_credential_type(kind),
        None => builder,
    }
}

/// Adds the lock to a PUT and authorizes it again: a shared key signs every header of Azure's.
#[derive(Debug)]
struct AzureDress {
    credentials: AzureCredentialProvider,
    account: String,
}

#[async_trait]
impl Dress for AzureDress {
    async fn dress(&self, request: &mut HttpRequest, lock: &Lock) -> object_store::Result<()> {
        lock_headers(request.headers_mut(), lock)?;
        // A shared access signature is part of the address already.
        if request.headers_mut().remove(http::header::AUTHORIZATION).is_none() {
            return Ok(());
        }
        let credential = self.credentials.get_credential().await?;
        AzureAuthorizer::new(&credential, &self.account).try_authorize(request)
    }
}

fn lock_headers(headers: &mut HeaderMap, lock: &Lock) -> object_store::Result<()> {
    let until =
        rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&lock.until).map_err(|e| xml::unreadable(STORE, "lock", e))?;
    let until = HeaderValue::try_from(until).map_err(|e| xml::unreadable(STORE, "lock", e))?;
    let _ = headers.insert("x-ms-immutability-policy-until-date", until);
    let _ = headers.insert("x-ms-immutability-policy-mode", HeaderValue::from_static(lock.mode.azure()));
    Ok(())
}

#[derive(Debug)]
struct AzureGuard {
    http: HttpClient,
    credentials: AzureCredentialProvider,
    account: String,
    /// Its address.
    container: url::Url,
}

impl AzureGuard {
    async fn send(&self, method: Method, address: &str, headers: HeaderMap) -> object_store::Result<(HeaderMap, Bytes)> {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = method;
        *request.uri_mut() = address.parse().map_err(|e| xml::unreadable(STORE, "address", e))?;
        *request.headers_mut() = headers;
        if request.method() == Method::PUT {
            let _ = request.headers_mut().insert(http::header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        let credential = self.credentials.get_credential().await?;
        AzureAuthorizer::new(&credential, &self.account).try_authorize(&mut request)?;
        let answer = exchange(STORE, &self.http, request).await?;
        if !answer.status().is_success() {
            return Err(refusal(STORE, address, &answer));
        }
        let (parts, body) = answer.into_parts();
        Ok((parts.headers, body))
    }

    fn blob(&self, path: &str, query: &str) -> String {
        // Names are encoded as the client above does it, slashes aside.
        let mut address = self.container.clone();
        if let Ok(mut segments) = address.path_segments_mut() {
            let _ = segments.extend(path.split('/'));
        }
        format!("{address}{query}")
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[async_trait]
impl Guard for AzureGuard {
    async fn lock_of(&self, path: &str) -> object_store::Result<Option<Lock>> {
        let (headers, _) = self.send(Method::HEAD, &self.blob(path, ""), HeaderMap::new()).await?;
        let until = text(&headers, "x-ms-immutability-policy-until-date");
        let mode = text(&headers, "x-ms-immutability-policy-mode").and_then(LockMode::parse);
        let (Some(until), Some(mode)) = (until, mode) else { return Ok(None) };
        let until = rfc2822::parse(until).map_err(|e| xml::unreadable(STORE, "lock", e))?.timestamp();
        Ok(Some(Lock { mode, until }))
    }

    async fn set_lock(&self, path: &str, lock: &Lock) -> object_store::Result<()> {
        let mut headers = HeaderMap::new();
        lock_headers(&mut headers, lock)?;
        self.send(Method::PUT, &self.blob(path, "?comp=immutabilityPolicies"), headers).await.map(drop)
    }

    async fn is_held(&self, path: &str) -> object_store::Result<bool> {
        let (headers, _) = self.send(Method::HEAD, &self.blob(path, ""), HeaderMap::new()).await?;
        Ok(text(&headers, "x-ms-legal-hold") == Some("true"))
    }

    async fn set_hold(&self, path: &str, held: bool) -> object_store::Result<()> {
        let mut headers = HeaderMap::new();
        let _ = headers.insert("x-ms-legal-hold", HeaderValue::from_static(if held { "true" } else { "false" }));
        self.send(Method::PUT, &self.blob(path, "?comp=legalhold"), headers).await.map(drop)
    }

    async fn rules(&self) -> object_store::Result<BucketRules> {
        let (headers, _) = self.send(Method::HEAD, &format!("{}?restype=container", self.container), HeaderMap::new()).await?;
        let worm = text(&headers, "x-ms-immutable-storage-with-versioning-enabled").map(|on| on == "true");
        Ok(BucketRules {
            // Version-level immutability needs versioning; without it nothing here says whether there are versions.
            versioning: worm.filter(|on| *on),
            object_lock: worm,
            unknown: vec!["versioning, soft delete and lifecycle belong to the account: look with `az storage account`".into()],
            ..BucketRules::default()
        })
    }

    async fn versions(&self, _: &str, _: Option<VersionsPage>) -> object_store::Result<(Vec<Version>, Option<VersionsPage>)> {
        Err(object_store::Error::NotImplemented {
            operation: "list versions; use `az storage blob undelete` or the portal".into(),
            implementer: "pgvault for Azure".into(),
        })
    }

    async fn delete_version(&self, path: &str, version: &str) -> object_store::Result<()> {
        let address = self.blob(path, &format!("?versionid={version}"));
        self.send(Method::DELETE, &address, HeaderMap::new()).await.map(drop)
    }
}
