//! From an address and settings to a client of the store: one file for each kind.

pub(super) mod azure;
mod exchange;
pub(super) mod gcs;
pub(super) mod local;
pub(super) mod s3;
mod xml;

use std::sync::Arc;

use object_store::client::{Certificate, ClientOptions};
use object_store::{ObjectStore, RetryConfig};

use super::gate::Gate;
use super::guard::Guard;
use super::http::{Connector, Dress, Waits};
use super::settings::Settings;
use crate::{Error, ErrorKind, Result};

/// A client, with what else its store can do.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) inner: Arc<dyn ObjectStore>,
    pub(super) guard: Option<Arc<dyn Guard>>,
    pub(super) directory: Option<std::path::PathBuf>,
    /// The provider documents that of several create-only PUTs of one name one wins. Who only speaks a provider's language
    /// has not said so.
    pub(super) one_wins_by_contract: bool,
}

/// What `vault.url` is wrong about.
pub(super) fn wrong(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, "vault.url", why)
        .with_hint("use file:///absolute/path, s3://bucket/prefix, az://account/container/prefix or gs://bucket/prefix")
}

/// The name after the scheme and the path below it.
pub(super) fn authority_and_path(url: &url::Url) -> Result<(String, String)> {
    if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
        return Err(wrong("vault.url names a place only; keys and endpoints have settings of their own"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong(format!("vault.url `{url}` has a part behind `?` or `#`, which means nothing here")));
    }
    let name = url.host_str().unwrap_or_default();
    if name.is_empty() {
        return Err(wrong(format!("vault.url `{url}` names no bucket")));
    }
    Ok((name.to_owned(), url.path().trim_matches('/').to_owned()))
}

/// Makes sure that an endpoint is encrypted, or meant not to be. The client's own refusal would look like an outage.
pub(super) fn ensure_encrypted(endpoint: Option<&str>, allow_http: bool) -> Result<()> {
    match endpoint {
        Some(endpoint) if endpoint.starts_with("http://") && !allow_http => {
            Err(Error::new(ErrorKind::Usage, "vault.http", format!("the endpoint {endpoint} is not encrypted"))
                .with_hint("use https, or set vault.allow_http = true for a store on this machine"))
        }
        _ => Ok(()),
    }
}

/// How every cloud's client talks HTTP.
pub(super) fn client_options(settings: &Settings, allow_http: bool, proxy: Option<String>) -> Result<ClientOptions> {
    let agent = http::HeaderValue::from_static(concat!("pgvault/", env!("CARGO_PKG_VERSION")));
    let mut options = ClientOptions::new()
        .with_allow_http(allow_http)
        .with_user_agent(agent)
        // The layer above bounds each request by what it carries.
        .with_timeout_disabled()
        .with_connect_timeout(settings.options.connect_timeout)
        .with_pool_max_idle_per_host(settings.limits.requests.clamp(1, 256) as usize);
    if let Some(path) = &settings.ca_file {
        let usage = |why: String| Error::new(ErrorKind::Usage, "vault.ca_file", format!("vault.ca_file {}: {why}", path.display()));
        let pem = std::fs::read(path).map_err(|e| usage(e.to_string()))?;
        let certificates = Certificate::from_pem_bundle(&pem).map_err(|e| usage(e.to_string()))?;
        if certificates.is_empty() {
            return Err(usage("it holds no certificate".into()));
        }
        for certificate in certificates {
            options = options.with_root_certificate(certificate);
        }
    }
    if let Some(proxy) = settings.proxy.clone().or(proxy) {
        options = options.with_proxy_url(proxy).with_proxy_excludes(not_by_proxy());
    }
    Ok(options)
}

/// What gives a machine its credentials is on the machine or next to it, and a proxy would ask for its own.
fn not_by_proxy() -> String {
    const METADATA: &str =
        "169.254.169.254,169.254.170.2,169.254.170.23,fd00:ec2::254,metadata.google.internal,localhost,127.0.0.1";
    let more = ["NO_PROXY", "no_proxy"].into_iter().find_map(|name| std::env::var(name).ok()).filter(|more| !more.is_empty());
    more.map_or_else(|| METADATA.to_owned(), |more| format!("{METADATA},{more}"))
}

/// The layer under a client.
pub(super) fn connector(settings: &Settings, gate: &Arc<Gate>, hosts: Vec<String>, dress: Option<Arc<dyn Dress>>) -> Connector {
    let waits = Waits { first_byte: settings.options.first_byte_timeout, idle: settings.options.idle_timeout };
    Connector { gate: gate.clone(), clock: settings.clock.clone(), waits, dress, hosts: hosts.into() }
}

/// The client's own repetitions, which there are none of: [`super::Store`] repeats what fails, and two nested loops would
/// multiply their patience (T24).
pub(super) fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// The host and port of an endpoint, as requests to it have them.
pub(super) fn authority_of(endpoint: &str) -> Option<String> {
    super::http::host_of(&endpoint.parse().ok()?)
}
