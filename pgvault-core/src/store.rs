//! Objects by name, over any `object_store` backend, with answers a writer can rely on.
//!
//! Every PUT is create-only. Its answer may be lost (a timeout), or be about somebody else's earlier PUT (a retry inside
//! the client that finds its own first attempt). So whatever a failing PUT says, the truth is what a GET shows: the same
//! bytes mean success, none mean try again, others mean that the name was taken.
//! Source of the ambiguity: `object_store` marks create-only PUTs as not idempotent, and maps S3's 409 to `AlreadyExists`.

pub mod probe;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use crate::env::Env;
use crate::{Error, ErrorKind, Result};

/// How hard to try.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Attempts at one request before its error is reported.
    pub attempts: u32,
    /// Time allowed for one attempt, from start to last byte.
    pub request_timeout: Duration,
    /// Wait before the second attempt; doubles for each further one.
    pub backoff: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { attempts: 5, request_timeout: Duration::from_secs(120), backoff: Duration::from_millis(200) }
    }
}

/// The outcome of a create-only PUT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// The object is there because of this call.
    Created,
    /// The object was there already, with the same bytes.
    Same,
    /// The name is taken by these other bytes.
    Different(Bytes),
}

/// What a listing tells of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its full name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// When the store says it was written: the only clock that retention trusts.
    pub last_modified: jiff::Timestamp,
}

/// A place in an object store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    location: String,
    options: StoreOptions,
    /// The directory, for a store that is one.
    directory: Option<std::path::PathBuf>,
    /// Why nothing may be written.
    refusal: Option<Arc<str>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("location", &self.location).finish_non_exhaustive()
    }
}

impl Store {
    /// A store over any backend. `location` is its address for messages.
    pub fn new(inner: Arc<dyn ObjectStore>, location: impl Into<String>, options: StoreOptions) -> Self {
        Self { inner, location: location.into(), options, directory: None, refusal: None }
    }

    /// A store that lives as long as the process.
    pub fn in_memory() -> Self {
        Self::new(Arc::new(object_store::memory::InMemory::new()), "memory:///", StoreOptions::default())
    }

    /// Opens `file:///path`, `s3://bucket/prefix` or `memory:///`.
    ///
    /// A directory is created when it is missing and its parent exists; every write to it is fsynced before it is
    /// acknowledged. Credentials, region and endpoint of S3 come from the standard environment variables (`AWS_*`); plain HTTP is
    /// refused unless `AWS_ALLOW_HTTP` is `true`.
    ///
    /// # Errors
    /// When the address is malformed or of a kind this build does not support.
    pub fn open(address: &str, options: StoreOptions) -> Result<Self> {
        let usage = |why: String| {
            Error::new(ErrorKind::Usage, "vault.url", why).with_hint("use file:///absolute/path or s3://bucket/prefix")
        };
        let url = url::Url::parse(address).map_err(|e| usage(format!("vault.url `{address}` is not a URL: {e}")))?;
        match url.scheme() {
            "memory" => Ok(Self::new(Arc::new(object_store::memory::InMemory::new()), address, options)),
            "file" => {
                let path = url
                    .to_file_path()
                    .map_err(|()| usage(format!("vault.url `{address}` is not the address of a local directory")))?;
                if !path.is_dir() {
                    std::fs::create_dir(&path).map_err(|e| Error::io("create the vault directory", &path, e))?;
                }
                let local = object_store::local::LocalFileSystem::new_with_prefix(&path)
                    .map_err(|e| usage(format!("open {}: {e}", path.display())))?
                    .with_fsync(true);
                Ok(Self { directory: Some(path), ..Self::new(Arc::new(local), address, options) })
            }
            "s3" => {
                let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
                let bucket = bucket.ok_or_else(|| usage(format!("vault.url `{address}` names no bucket")))?;
                if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
                    return Err(usage("vault.url may name a bucket and a prefix only; keys and endpoint come from `AWS_*`".into()));
                }
                let prefix = Path::from_url_path(url.path()).map_err(|e| usage(format!("vault.url: {e}")))?;
                // This module repeats what fails; two nested loops would multiply their patience (T24).
                let no_retries = object_store::RetryConfig { max_retries: 0, ..object_store::RetryConfig::default() };
                let timeout = AmazonS3ConfigKey::Client(object_store::ClientConfigKey::Timeout);
                let builder = AmazonS3Builder::from_env()
                    .with_bucket_name(bucket)
                    .with_conditional_put(S3ConditionalPut::ETagMatch)
                    .with_retry(no_retries)
                    .with_config(timeout, format!("{} seconds", options.request_timeout.as_secs()));
                // The client's own refusal comes with each request, and looks like an outage.
                let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint).unwrap_or_default();
                let allow = builder.get_config_value(&AmazonS3ConfigKey::Client(object_store::ClientConfigKey::AllowHttp));
                if endpoint.starts_with("http://") && allow.as_deref() != Some("true") {
                    return Err(usage(format!("the endpoint {endpoint} is not encrypted"))
                        .with_hint("use https, or set AWS_ALLOW_HTTP=true for a store on this machine"));
                }
                let s3 = builder.build().map_err(|e| {
                    usage(format!("open {address}: {e}")).with_hint(
                        "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a store that is not Amazon's",
                    )
                })?;
                Ok(Self::new(Arc::new(PrefixStore::new(s3, prefix)), address, options))
            }
            other => {
                Err(Error::new(ErrorKind::Usage, "vault.url", format!("vault.url: `{other}://` is not supported by this build"))
                    .with_hint("use file:///absolute/path or s3://bucket/prefix"))
            }
        }
    }

    /// The same place, where creating and deleting fails with what `refusal` says.
    #[must_use]
    pub(crate) fn refusing_writes(self, refusal: &Error) -> Self {
        Self { refusal: Some(refusal.to_string().into()), ..self }
    }

    fn ensure_writable(&self) -> Result<()> {
        match &self.refusal {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Unsupported, "vault.feature", why.to_string()).with_hint("use a newer pgvault")),
        }
    }

    /// The address, for messages.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Makes sure that the store refuses to create a name twice, with an object that is removed again if that is allowed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it overwrites: on such a store two writers would destroy each other's work.
    pub async fn probe_create_only(&self, env: &Env) -> Result<()> {
        let name = format!("probe/{}", env.new_id()?);
        let first = self.put_new(&name, Bytes::from_static(b"pgvault probe 1")).await?;
        let second = self.put_new(&name, Bytes::from_static(b"pgvault probe 2")).await?;
        // The writer's credential should not be able to delete; then the probe stays, and costs nothing.
        let _ = self.delete(&name).await;
        match (first, second) {
            (Put::Created, Put::Different(kept)) if &kept[..] == b"pgvault probe 1" => Ok(()),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                "store.overwrites",
                format!("the store at {} does not honour create-only writes (probe: {other:?})", self.location),
            )
            .with_hint("use a store that implements conditional PUT (If-None-Match: *)")),
        }
    }

    /// Creates an object, never overwriting; settles lost and ambiguous answers by reading back.
    ///
    /// # Errors
    /// [`ErrorKind::Storage`] when the store keeps failing: the object may or may not exist then, and the same call with
    /// the same bytes may be repeated.
    pub async fn put_new(&self, name: &str, bytes: Bytes) -> Result<Put> {
        self.ensure_writable()?;
        let path = Path::from(name);
        let mut failure = None;
        // An earlier attempt may have been carried out although it was reported as failed.
        let mut maybe_ours = false;
        for attempt in 0..self.options.attempts.max(1) {
            if attempt > 0 {
                self.back_off(attempt).await;
            }
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let put = self.inner.put_opts(&path, PutPayload::from_bytes(bytes.clone()), options);
            let Err(error) = self.bounded(put).await else { return Ok(Put::Created) };
            let permanent = error.is_permanent();
            maybe_ours |= !error.is_taken();
            // One look only: this loop is the one that repeats, and two nested ones would multiply their patience (T24).
            match self.look(name).await {
                Ok(Some(found)) if found == bytes => {
                    self.settle(name).await?;
                    return Ok(if maybe_ours { Put::Created } else { Put::Same });
                }
                Ok(Some(found)) => return Ok(Put::Different(found)),
                // Not there: the attempt failed cleanly, or another's object of that name was deleted in between.
                Ok(None) => {}
                Err(unreadable) => {
                    failure = Some(unreadable);
                    continue;
                }
            }
            failure = Some(error.into_error("create", name));
            if permanent {
                break;
            }
        }
        Err(failure.unwrap_or_else(|| Error::new(ErrorKind::Storage, "store.put", format!("create {name}: no attempt was made"))))
    }

    /// Makes an object durable that was found and not written by this call: that it can be read does not mean that it would
    /// survive a power failure. Only a local directory has this difference.
    pub(crate) async fn settle(&self, name: &str) -> Result<()> {
        let Some(root) = &self.directory else { return Ok(()) };
        let path = root.join(name);
        let synced = tokio::task::spawn_blocking(move || {
            std::fs::File::open(&path).and_then(|file| file.sync_all())?;
            path.parent().map_or(Ok(()), |parent| std::fs::File::open(parent).and_then(|directory| directory.sync_all()))
        });
        let synced = synced.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
        synced.map_err(|e| Error::new(ErrorKind::Storage, "store.sync", format!("make {name} durable: {e}")).with_source(e))
    }

    /// Creates an object under a name that nobody else can have chosen.
    ///
    /// # Errors
    /// As [`Store::put_new`], and [`ErrorKind::Conflict`] when the name is taken by other bytes.
    pub async fn put_once(&self, name: &str, bytes: Bytes) -> Result<()> {
        match self.put_new(name, bytes).await? {
            Put::Created | Put::Same => Ok(()),
            Put::Different(_) => {
                Err(Error::new(ErrorKind::Conflict, "store.taken", format!("{name} already exists with other content"))
                    .with_hint("another writer uses the same vault with a copied state; do not run two copies of one machine"))
            }
        }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist.
    pub async fn get(&self, name: &str) -> Result<Bytes> {
        self.retried("read", name, || self.get_whole(name)).await
    }

    /// Reads an object; `None` when the store says that there is none.
    ///
    /// # Errors
    /// When the store fails in any other way: an error is never taken for absence (T1).
    pub async fn get_if_exists(&self, name: &str) -> Result<Option<Bytes>> {
        match self.get(name).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads an object with one request; `None` when the store says that there is none.
    async fn look(&self, name: &str) -> Result<Option<Bytes>> {
        match self.bounded(self.get_whole(name)).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Failure(object_store::Error::NotFound { .. })) => Ok(None),
            Err(failure) => Err(failure.into_error("read", name)),
        }
    }

    async fn get_whole(&self, name: &str) -> object_store::Result<Bytes> {
        let got = self.inner.get(&Path::from(name)).await?;
        if got.meta.size > crate::format::MAX_OBJECT {
            let source = format!("{} bytes is more than any object of a vault has", got.meta.size).into();
            return Err(object_store::Error::NotSupported { source });
        }
        got.bytes().await
    }

    /// Reads part of an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist, [`ErrorKind::Corrupt`] when it is shorter than the range.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let short = || Error::new(ErrorKind::Corrupt, "object.short", format!("{name} ends before byte {}", range.end));
        match self.retried("read", name, || async { self.inner.get_range(&Path::from(name), range.clone()).await }).await {
            Ok(bytes) if bytes.len() as u64 == range.end.saturating_sub(range.start) => Ok(bytes),
            Ok(_) => Err(short()),
            // Stores have no error of their own for a range behind the end; an object that was cut short is not a store in
            // trouble, and waiting does not help it.
            Err(error) if error.kind() == ErrorKind::Storage => match self.bounded(self.inner.head(&Path::from(name))).await {
                Ok(meta) if meta.size < range.end => Err(short().with_source(error)),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Size and age of an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist.
    pub async fn head(&self, name: &str) -> Result<ObjectInfo> {
        let meta = self.retried("stat", name, || async { self.inner.head(&Path::from(name)).await }).await?;
        info(&meta)
    }

    /// Every object below a prefix, sorted by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.list_after(prefix, None).await
    }

    /// Every object below a prefix whose name sorts after `after`, sorted by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list_after(&self, prefix: &str, after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let path = Path::from(prefix);
        let metas = self
            .repeated("list", prefix, || async {
                let mut listing = match after {
                    Some(after) => self.inner.list_with_offset(Some(&path), &Path::from(after)),
                    None => self.inner.list(Some(&path)),
                };
                let mut metas = Vec::new();
                // Each page is a request. All of them together take as long as there are objects.
                while let Some(meta) = self.bounded(listing.try_next()).await? {
                    metas.push(meta);
                }
                Ok(metas)
            })
            .await?;
        let mut found = metas.iter().map(info).collect::<Result<Vec<_>>>()?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The names one level below a prefix that have something below them.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list_directories(&self, prefix: &str) -> Result<Vec<String>> {
        let path = Path::from(prefix);
        let listed = self.retried("list", prefix, || async { self.inner.list_with_delimiter(Some(&path)).await }).await?;
        let mut names: Vec<String> = listed.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// Deletes an object. Only the pruner role's credentials can; a missing object is not an error.
    ///
    /// # Errors
    /// [`ErrorKind::Immutable`] when the store refuses.
    pub async fn delete(&self, name: &str) -> Result<()> {
        self.ensure_writable()?;
        match self.retried("delete", name, || async { self.inner.delete(&Path::from(name)).await }).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn retried<T, F>(&self, doing: &str, name: &str, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        self.repeated(doing, name, || self.bounded(request())).await
    }

    async fn repeated<T, F>(&self, doing: &str, name: &str, attempt_once: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut attempt = 0;
        loop {
            match attempt_once().await {
                Ok(value) => return Ok(value),
                Err(error) if error.is_permanent() || attempt + 1 >= self.options.attempts => {
                    return Err(error.into_error(doing, name));
                }
                Err(error) => {
                    tracing::warn!(doing, name, attempt, error = %error.0, "object store request failed, trying again");
                    attempt += 1;
                    self.back_off(attempt).await;
                }
            }
        }
    }

    async fn bounded<T>(&self, request: impl Future<Output = object_store::Result<T>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.options.request_timeout, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Failure(error)),
            Err(_) => Err(Failure(object_store::Error::Generic {
                store: "pgvault",
                source: format!("no answer within {:?}", self.options.request_timeout).into(),
            })),
        }
    }

    async fn back_off(&self, attempt: u32) {
        tokio::time::sleep(self.options.backoff.saturating_mul(1 << attempt.saturating_sub(1).min(8))).await;
    }
}

/// One failed request.
struct Failure(object_store::Error);

impl Failure {
    /// The store says that the name exists already.
    fn is_taken(&self) -> bool {
        matches!(self.0, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
    }

    /// Repeating the request cannot help.
    fn is_permanent(&self) -> bool {
        use object_store::Error as E;
        matches!(
            self.0,
            E::NotFound { .. }
                | E::InvalidPath { .. }
                | E::NotSupported { .. }
                | E::NotImplemented { .. }
                | E::PermissionDenied { .. }
                | E::Unauthenticated { .. }
                | E::UnknownConfigurationKey { .. }
        )
    }

    fn into_error(self, doing: &str, name: &str) -> Error {
        use object_store::Error as E;
        let message = format!("{doing} {name}: {}", self.0);
        let (kind, code, hint) = match &self.0 {
            E::NotFound { .. } => (ErrorKind::NotFound, "object.not_found", ""),
            E::AlreadyExists { .. } | E::Precondition { .. } => (ErrorKind::Storage, "store.conflict", ""),
            E::PermissionDenied { .. } if doing == "delete" => (
                ErrorKind::Immutable,
                "store.delete_refused",
                "only the pruner's credentials may delete, and not before retention ends",
            ),
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                (ErrorKind::Failed, "store.denied", "check the credentials and rights for the vault")
            }
            E::InvalidPath { .. } | E::NotSupported { .. } | E::NotImplemented { .. } => {
                (ErrorKind::Unsupported, "store.unsupported", "")
            }
            _ => (ErrorKind::Storage, "store.failed", "the store may answer later; nothing is lost, run the command again"),
        };
        let error = Error::new(kind, code, message).with_source(self.0);
        if hint.is_empty() { error } else { error.with_hint(hint) }
    }
}

fn info(meta: &object_store::ObjectMeta) -> Result<ObjectInfo> {
    let last_modified = jiff::Timestamp::from_millisecond(meta.last_modified.timestamp_millis())
        .map_err(|e| Error::new(ErrorKind::Storage, "store.time", format!("{}: {e}", meta.location)))?;
    Ok(ObjectInfo { name: meta.location.to_string(), size: meta.size, last_modified })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_s3_is_a_bucket_and_a_prefix() {
        let open = |address: &str| Store::open(address, StoreOptions::default());
        assert_eq!(open("s3://bucket/some/prefix").unwrap().location(), "s3://bucket/some/prefix");
        assert!(open("s3://bucket").is_ok());
        for bad in
            ["s3:///prefix", "s3://key:secret@bucket/prefix", "s3://bucket/prefix?endpoint=x", "s3://bucket/#x", "gs://bucket"]
        {
            let error = open(bad).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "vault.url"), "{bad}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
