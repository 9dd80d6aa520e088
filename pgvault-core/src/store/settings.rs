//! Where a store is and how it is to be used; what [`Store::open`](super::Store::open) takes.
//!
//! Nothing here is read from a file: a program that has a configuration fills it in. What a cloud's users keep in the
//! environment (`AWS_*`, `AZURE_*`, `GOOGLE_*`) is read from there when a setting is not given.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;

use super::gate::Limits;
use super::retention::Immutability;
use crate::clock::{Clock, SystemClock};

/// How hard to try, and how long to wait.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Attempts at one request before its error is reported.
    pub attempts: u32,
    /// Time for one attempt, from start to last byte; an upload may take 1 s more for each 128 KiB.
    pub request_timeout: Duration,
    /// Wait before the second attempt; doubles for each further one, and is spread at random up to twice that.
    pub backoff: Duration,
    /// Time for all attempts at one request: none begins after it.
    pub patience: Duration,
    /// Time for a connection, TLS included.
    pub connect_timeout: Duration,
    /// Time from the end of a request to the first byte of its answer.
    pub first_byte_timeout: Duration,
    /// Time between two pieces of an answer.
    pub idle_timeout: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            attempts: 6,
            request_timeout: Duration::from_secs(120),
            backoff: Duration::from_millis(200),
            patience: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
            first_byte_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(30),
        }
    }
}

/// What an object is for, as far as the store treats it differently. Who owns the names says which is which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Packs: most of the bytes, read by restores only.
    Data,
    /// Write-ahead log.
    Wal,
    /// What is small, and without which nothing else can be read.
    Meta,
    /// What nothing depends on for long. It is never locked.
    Transient,
}

/// Where an object is put, beside its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// The provider's name of a storage class or access tier.
    pub storage_class: Option<String>,
    /// Tags; GCS has none.
    pub tags: BTreeMap<String, String>,
}

/// Everything about a store besides its address.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How hard to try.
    pub options: StoreOptions,
    /// What may be taken from the store.
    pub limits: Limits,
    /// Lets plain HTTP through.
    pub allow_http: bool,
    /// Certificates that are trusted besides the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// Address of a proxy; `HTTPS_PROXY` and `NO_PROXY` when not given.
    pub proxy: Option<String>,
    /// Locks on what history depends on.
    pub immutability: Option<Immutability>,
    /// Where objects of a class are put.
    pub placement: BTreeMap<Class, Placement>,
    /// What only S3 knows.
    pub s3: S3Settings,
    /// What only Azure knows.
    pub azure: AzureSettings,
    /// What only Google knows.
    pub gcs: GcsSettings,
    /// The clock that the store's is compared with.
    pub clock: Arc<dyn Clock>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            options: StoreOptions::default(),
            limits: Limits::default(),
            allow_http: false,
            ca_file: None,
            proxy: None,
            immutability: None,
            placement: BTreeMap::new(),
            s3: S3Settings::default(),
            azure: AzureSettings::default(),
            gcs: GcsSettings::default(),
            clock: Arc::new(SystemClock),
        }
    }
}

/// What only S3 knows.
#[derive(Debug, Clone, Default)]
pub struct S3Settings {
    /// Region; `AWS_REGION` when not given.
    pub region: Option<String>,
    /// Endpoint of a store that is not Amazon's; `AWS_ENDPOINT_URL` when not given.
    pub endpoint: Option<String>,
    /// `bucket.host` instead of `host/bucket`.
    pub virtual_hosted: bool,
    /// Access key; without it the environment, IRSA, pod identity and the instance are asked, in this order.
    pub access_key_id: Option<String>,
    /// Its secret.
    pub secret_access_key: Option<SecretString>,
    /// Token of temporary credentials.
    pub session_token: Option<SecretString>,
    /// Encryption by the store, beside pgvault's own.
    pub encryption: Option<S3Encryption>,
    /// One data key of the KMS for many objects.
    pub bucket_key: bool,
}

/// Encryption by S3, beside pgvault's own.
#[derive(Debug, Clone)]
pub enum S3Encryption {
    /// SSE-KMS with this key.
    Kms(String),
    /// DSSE-KMS with this key.
    DualKms(String),
    /// SSE-C with this key, 32 bytes in base64.
    Customer(SecretString),
}

/// What only Azure knows.
#[derive(Debug, Clone, Default)]
pub struct AzureSettings {
    /// Endpoint, when it is not `https://ACCOUNT.blob.core.windows.net`; the account is part of its path, as with Azurite.
    pub endpoint: Option<String>,
    /// The account's key; better none, and an identity instead.
    pub access_key: Option<SecretString>,
    /// A shared access signature.
    pub sas: Option<SecretString>,
    /// Client id of an identity or an application.
    pub client_id: Option<String>,
    /// Tenant of the application.
    pub tenant_id: Option<String>,
    /// Secret of the application.
    pub client_secret: Option<SecretString>,
    /// Which kind of credentials, when several could be meant: `workload_identity`, `managed_identity`, `client_secret`,
    /// `sas_token`, `access_key`, `azure_cli`.
    pub credential: Option<String>,
}

/// What only Google knows.
#[derive(Debug, Clone, Default)]
pub struct GcsSettings {
    /// Endpoint, when it is not Google's.
    pub endpoint: Option<String>,
    /// Key file of a service account; else `GOOGLE_APPLICATION_CREDENTIALS`, gcloud's own, and the metadata server.
    pub service_account_file: Option<PathBuf>,
    /// Sends no credentials: for a stand-in on this machine.
    pub anonymous: bool,
}
