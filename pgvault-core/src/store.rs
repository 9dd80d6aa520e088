//! Objects by name, over any `object_store` backend, with answers a writer can rely on.
//!
//! Every PUT is create-only. Its answer may be lost (a timeout), or be about somebody else's earlier PUT (a retry inside
//! the client that finds its own first attempt). So whatever a failing PUT says, the truth is what a GET shows: the same
//! bytes mean success, none mean try again, others mean that the name was taken.
//! Source of the ambiguity: `object_store` marks create-only PUTs as not idempotent, and maps S3's 409 to `AlreadyExists`.

pub mod guard;
pub mod probe;
pub mod retention;
pub mod settings;

mod answer;
mod backend;
mod failure;
mod gate;
mod http;
mod keep;
mod listing;
mod prune;
mod read;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{Attribute, GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, TagSet};
use tokio::time::Instant;

pub use gate::{Limits, Requests};
pub(crate) use keep::oldest_first;
pub use prune::Pruned;
pub(crate) use read::Reading;
pub use settings::{Class, Settings, StoreOptions};

use crate::{Error, ErrorKind, Result};
use answer::Answer;
use failure::Failure;
use gate::{Gate, Verb};
use guard::Guard;
use retention::Lock;

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

/// A place in an object store. Clones share its limits and its counts.
#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing about the store, and none depends on another")]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    location: String,
    settings: Arc<Settings>,
    gate: Arc<Gate>,
    /// What the store can do to keep objects, for one that can.
    guard: Option<Arc<dyn Guard>>,
    /// Names in front of the vault's, with a slash at the end; empty for none.
    prefix: String,
    /// The directory, for a store that is one.
    directory: Option<std::path::PathBuf>,
    /// Tells what an object is for.
    classes: fn(&str) -> Class,
    /// Requests go through [`http`], which counts them.
    is_cloud: bool,
    /// The provider documents that of several create-only PUTs one wins, on buckets with versions as well.
    one_wins_by_contract: bool,
    /// The store overwrites: a name is looked at before it is written.
    looks_first: bool,
    /// The store keeps versions and may accept several of one name at the same moment: the first counts.
    settles_by_versions: bool,
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
        Self::of(inner, location.into(), Settings { options, ..Settings::default() })
    }

    fn of(inner: Arc<dyn ObjectStore>, location: String, settings: Settings) -> Self {
        Self {
            inner,
            location,
            gate: Arc::new(Gate::new(settings.limits)),
            settings: Arc::new(settings),
            guard: None,
            prefix: String::new(),
            directory: None,
            classes: |_| Class::Data,
            is_cloud: false,
            one_wins_by_contract: true,
            looks_first: false,
            settles_by_versions: false,
            refusal: None,
        }
    }

    /// A store that lives as long as the process.
    pub fn in_memory() -> Self {
        Self::new(Arc::new(object_store::memory::InMemory::new()), "memory:///", StoreOptions::default())
    }

    /// Opens `file:///path`, `s3://bucket/prefix`, `az://account/container/prefix`, `gs://bucket/prefix` or `memory:///`.
    ///
    /// No request is made. A directory is created when it is missing and its parent exists; every write to it is fsynced before
    /// it is acknowledged. Credentials, region and endpoint of a cloud come from `settings`, or from what its users keep in
    /// the environment.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when the address or a setting is malformed, plain HTTP was not allowed, or the store has no
    /// retention and `settings` ask for it.
    pub fn open(address: &str, settings: Settings) -> Result<Self> {
        let url = url::Url::parse(address).map_err(|e| backend::wrong(format!("vault.url `{address}` is not a URL: {e}")))?;
        let gate = Arc::new(Gate::new(settings.limits));
        let (opened, prefix) = match url.scheme() {
            "memory" => {
                let inner = Arc::new(object_store::memory::InMemory::new());
                (backend::Backend { inner, guard: None, directory: None, one_wins_by_contract: true }, String::new())
            }
            "file" => (backend::local::open(&url)?, String::new()),
            "s3" => backend::s3::open(&url, &settings, &gate)?,
            "az" => backend::azure::open(&url, &settings, &gate)?,
            "gs" => backend::gcs::open(&url, &settings, &gate)?,
            other => return Err(backend::wrong(format!("vault.url: `{other}://` is not supported"))),
        };
        if settings.immutability.is_some() && opened.guard.is_none() {
            let why = format!("{address} has no retention: vault.immutability cannot be kept there");
            return Err(Error::new(ErrorKind::Usage, "vault.immutability", why)
                .with_hint("use a store with Object Lock, or leave vault.immutability out"));
        }
        let is_cloud = opened.guard.is_some();
        let one_wins_by_contract = opened.one_wins_by_contract;
        let (inner, prefix): (Arc<dyn ObjectStore>, String) = match prefix.as_str() {
            "" => (opened.inner, prefix),
            some => {
                let path = Path::parse(some).map_err(|e| backend::wrong(format!("vault.url: {e}")))?;
                (Arc::new(PrefixStore::new(opened.inner, path)), format!("{some}/"))
            }
        };
        Ok(Self {
            gate,
            guard: opened.guard,
            prefix,
            directory: opened.directory,
            is_cloud,
            one_wins_by_contract,
            ..Self::of(inner, address.to_owned(), settings)
        })
    }

    /// True when the provider documents that of several create-only PUTs of one name one wins.
    pub(crate) fn one_wins_by_contract(&self) -> bool {
        self.one_wins_by_contract
    }

    /// True when the first version of a name counts; see [`Store::settling_by_versions`].
    pub(crate) fn settles_by_versions(&self) -> bool {
        self.settles_by_versions
    }

    /// The same place, with somebody who knows what its objects are for.
    #[must_use]
    pub fn with_classes(self, classes: fn(&str) -> Class) -> Self {
        Self { classes, ..self }
    }

    /// The same place, which is known to keep versions and to tell several writers of one name that each has created it.
    #[must_use]
    pub(crate) fn settling_by_versions(self) -> Self {
        Self { settles_by_versions: true, ..self }
    }

    /// The same place, which is known to overwrite: each name is looked at before it is written. Between the two another writer
    /// can come, so there must be none.
    #[must_use]
    pub(crate) fn looking_first(self) -> Self {
        Self { looks_first: true, ..self }
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

    /// The requests that this store and its clones have made.
    pub fn requests(&self) -> Requests {
        self.gate.requests()
    }

    /// The time by the store's clock, as far as its last answer told it.
    pub fn now(&self) -> jiff::Timestamp {
        let ours = self.settings.clock.now();
        let ahead = jiff::SignedDuration::from_millis(self.gate.clock_ahead().unwrap_or(0));
        ours.checked_add(ahead).unwrap_or(ours)
    }

    /// How far the store's clock is ahead of this machine's, to a second; `None` for a store that has none, or was not asked yet.
    pub fn clock_ahead(&self) -> Option<jiff::SignedDuration> {
        self.gate.clock_ahead().map(jiff::SignedDuration::from_millis)
    }

    /// Creates an object, never overwriting; settles lost and ambiguous answers by reading back.
    ///
    /// # Errors
    /// [`ErrorKind::Storage`] when the store keeps failing: the object may or may not exist then, and the same call with
    /// the same bytes may be repeated.
    pub async fn put_new(&self, name: &str, bytes: Bytes) -> Result<Put> {
        let put = self.create(name, bytes.clone()).await?;
        if self.settles_by_versions { self.first_version(name, &bytes, put).await } else { Ok(put) }
    }

    async fn create(&self, name: &str, bytes: Bytes) -> Result<Put> {
        self.ensure_writable()?;
        if self.looks_first {
            match self.get_if_exists(name).await? {
                Some(found) if found == bytes => return Ok(Put::Same),
                Some(found) => return Ok(Put::Different(found)),
                None => {}
            }
        }
        let path = path(name).map_err(|e| self.describe(Failure::new(e), "create", name))?;
        let options = self.put_options(name)?;
        let size = bytes.len() as u64;
        // An earlier attempt may have been carried out although it was reported as failed.
        let mut maybe_ours = false;
        let mut delays = self.delays();
        loop {
            self.gate.upload(size).await;
            self.count(Verb::Put);
            let put = self.inner.put_opts(&path, PutPayload::from_bytes(bytes.clone()), options.clone());
            let allowance = Duration::from_secs(size / http::SLOWEST_UPLOAD);
            let Err(error) = self.bounded(allowance, put).await else {
                self.gate.count_bytes(size, 0);
                return Ok(Put::Created);
            };
            let permanent = error.is_permanent();
            maybe_ours |= !error.is_taken();
            // One look only: this loop is the one that repeats, and two nested ones would multiply their patience (T24).
            let failure = match self.look(name).await {
                Ok(Some(found)) if found == bytes => {
                    self.settle(name).await?;
                    return Ok(if maybe_ours { Put::Created } else { Put::Same });
                }
                Ok(Some(found)) => return Ok(Put::Different(found)),
                // Not there: the attempt failed cleanly, or another's object of that name was deleted in between.
                Ok(None) => self.describe(error, "create", name),
                // In an archive tier it cannot be read back. Its length must do.
                Err(archived) if archived.code() == "store.archived" => match self.head(name).await {
                    Ok(found) if found.size == size => return Ok(if maybe_ours { Put::Created } else { Put::Same }),
                    _ => archived,
                },
                // Who may only create cannot look; what the PUT said is the better message.
                Err(_) if permanent => self.describe(error, "create", name),
                Err(unreadable) => unreadable,
            };
            match delays.next() {
                Some(delay) if !permanent => self.back_off(delay).await,
                _ => return Err(failure),
            }
        }
    }

    /// Create-only, and what the settings say of objects of this class.
    fn put_options(&self, name: &str) -> Result<PutOptions> {
        let class = (self.classes)(name);
        let mut options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        if let Some(placement) = self.settings.placement.get(&class) {
            if let Some(storage_class) = &placement.storage_class {
                let _ = options.attributes.insert(Attribute::StorageClass, storage_class.clone().into());
            }
            let mut tags = TagSet::default();
            for (key, value) in &placement.tags {
                tags.push(key, value);
            }
            options.tags = tags;
        }
        if let Some(lock) = self.lock_for(class)? {
            let _ = options.extensions.insert(lock);
        }
        Ok(options)
    }

    /// The lock that an object of this class gets now.
    fn lock_for(&self, class: Class) -> Result<Option<Lock>> {
        match &self.settings.immutability {
            Some(immutability) if class != Class::Transient => immutability.lock_of_new(self.now()).map(Some),
            _ => Ok(None),
        }
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
        match self.create(name, bytes).await? {
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
        let bytes = self.retried(Verb::Get, "read", name, || self.get_whole(name)).await?;
        self.received(&bytes).await;
        Ok(bytes)
    }

    /// Counts what came, and waits as long as it should have taken.
    async fn received(&self, bytes: &Bytes) {
        self.gate.count_bytes(0, bytes.len() as u64);
        self.gate.download(bytes.len() as u64).await;
    }

    /// Reads an object whose name others may have written at the same moment, as they all have agreed on it; `None` when the
    /// store says that there is none.
    ///
    /// # Errors
    /// As [`Store::get_if_exists`].
    pub(crate) async fn get_agreed(&self, name: &str) -> Result<Option<Bytes>> {
        let found = self.get_if_exists(name).await?;
        match found {
            Some(_) if self.settles_by_versions => self.read_first_version(name).await.map(Some),
            found => Ok(found),
        }
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
        self.count(Verb::Get);
        match self.bounded(Duration::ZERO, self.get_whole(name)).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(failure) if failure.is_absence() => Ok(None),
            Err(failure) => Err(self.describe(failure, "read", name)),
        }
    }

    async fn get_whole(&self, name: &str) -> object_store::Result<Bytes> {
        let got = self.inner.get(&path(name)?).await?;
        if got.meta.size > crate::format::MAX_OBJECT {
            let source = format!("{} bytes is more than any object of a vault has", got.meta.size).into();
            return Err(object_store::Error::NotSupported { source });
        }
        whole(got).await
    }

    /// Reads part of an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist, [`ErrorKind::Corrupt`] when it is shorter than the range.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let short = || Error::new(ErrorKind::Corrupt, "object.short", format!("{name} ends before byte {}", range.end));
        let read = || async {
            let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
            whole(self.inner.get_opts(&path(name)?, options).await?).await
        };
        match self.retried(Verb::Get, "read", name, read).await {
            Ok(bytes) if bytes.len() as u64 == range.end.saturating_sub(range.start) => {
                self.received(&bytes).await;
                Ok(bytes)
            }
            Ok(_) => Err(short()),
            // A directory has no error of its own for a range behind the end; an object that was cut short is not a store in
            // trouble, and waiting does not help it. A cloud's store has said what is wrong, if it has said anything.
            Err(error) if error.kind() == ErrorKind::Storage && Answer::of(&error).is_none() => match self.size_of(name).await {
                Ok(meta) if meta.size < range.end => Err(short().with_source(error)),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn size_of(&self, name: &str) -> Result<object_store::ObjectMeta, Failure> {
        self.count(Verb::Head);
        self.bounded(Duration::ZERO, async { self.inner.head(&path(name)?).await }).await
    }

    /// Size and age of an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist.
    pub async fn head(&self, name: &str) -> Result<ObjectInfo> {
        let meta = self.retried(Verb::Head, "stat", name, || async { self.inner.head(&path(name)?).await }).await?;
        info(&meta)
    }

    /// The names one level below a prefix that have something below them.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list_directories(&self, prefix: &str) -> Result<Vec<String>> {
        let list = || async { self.inner.list_with_delimiter(Some(&path(prefix)?)).await };
        let listed = self.retried(Verb::List, "list", prefix, list).await?;
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
        match self.retried(Verb::Delete, "delete", name, || async { self.inner.delete(&path(name)?).await }).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn retried<T, F>(&self, verb: Verb, doing: &str, name: &str, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let attempt_once = || {
            self.count(verb);
            self.bounded(Duration::ZERO, request())
        };
        self.repeated(doing, name, attempt_once).await
    }

    async fn repeated<T, F>(&self, doing: &str, name: &str, attempt_once: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut delays = self.delays();
        loop {
            let error = match attempt_once().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match delays.next() {
                Some(delay) if !error.is_permanent() => {
                    tracing::warn!(doing, name, error = %error, "object store request failed, trying again");
                    self.back_off(delay).await;
                }
                _ => return Err(self.describe(error, doing, name)),
            }
        }
    }

    /// Runs one request when it is its turn, and not for longer than it may take.
    async fn bounded<T>(&self, allowance: Duration, request: impl Future<Output = object_store::Result<T>>) -> Result<T, Failure> {
        let _pass = self.gate.enter().await;
        let most = self.settings.options.request_timeout + allowance;
        match tokio::time::timeout(most, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Failure::new(error)),
            Err(_) => Err(Failure::timeout(most)),
        }
    }

    /// The waits between attempts. They end when the patience does, which begins with the first failure: whoever waited for
    /// his turn, or for a large object to go through a small line, has not lost any of it.
    fn delays(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        let options = self.settings.options;
        let delays = ExponentialBuilder::default()
            .with_min_delay(options.backoff)
            .with_max_delay(Duration::from_secs(30))
            .with_max_times(options.attempts.saturating_sub(1) as usize)
            .with_jitter()
            .build();
        let mut begun = None;
        delays.take_while(move |delay| begun.get_or_insert_with(Instant::now).elapsed() + *delay < options.patience)
    }

    async fn back_off(&self, delay: Duration) {
        self.gate.count_retry();
        tokio::time::sleep(delay).await;
    }

    fn count(&self, verb: Verb) {
        if !self.is_cloud {
            self.gate.count(verb);
        }
    }

    fn describe(&self, failure: Failure, doing: &str, name: &str) -> Error {
        failure.into_error(doing, name, self.gate.clock_ahead())
    }
}

/// A name as it is. `Path::from` would change some characters, so that what a listing shows could not be read or deleted.
fn path(name: &str) -> object_store::Result<Path> {
    Ok(Path::parse(name)?)
}

/// All of a body. One that is shorter than was announced is a connection that ended early, and not what the store has.
async fn whole(got: GetResult) -> object_store::Result<Bytes> {
    let announced = got.range.end.saturating_sub(got.range.start);
    let body = got.bytes().await?;
    if body.len() as u64 == announced {
        return Ok(body);
    }
    let source = format!("the answer has {} bytes, and announced {announced}", body.len()).into();
    Err(object_store::Error::Generic { store: "pgvault", source })
}

fn info(meta: &object_store::ObjectMeta) -> Result<ObjectInfo> {
    let unknown = |why: &str| Error::new(ErrorKind::Storage, "store.time", format!("{}: {why}", meta.location));
    // What came without a time is of 1970 to the client. Limits are measured by these times.
    if meta.last_modified.timestamp_millis() <= 0 {
        return Err(unknown("the store does not say when it was written"));
    }
    let last_modified = jiff::Timestamp::from_millisecond(meta.last_modified.timestamp_millis());
    let last_modified = last_modified.map_err(|e| unknown(&e.to_string()))?;
    Ok(ObjectInfo { name: meta.location.to_string(), size: meta.size, last_modified })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_a_cloud_is_a_place_and_nothing_else() {
        let settings = || {
            let mut settings = Settings::default();
            settings.s3.region = Some("eu-west-1".into());
            settings.azure.access_key = Some("a2V5".to_owned().into());
            settings.gcs.anonymous = true;
            settings
        };
        let open = |address: &str| Store::open(address, settings());
        for good in
            ["s3://bucket/some/prefix", "s3://bucket", "az://account/container/a/b", "az://account/container", "gs://bucket/x"]
        {
            assert_eq!(open(good).unwrap().location(), good);
        }
        assert_eq!(open("az://account/container/a/b").unwrap().prefix, "a/b/");
        for bad in [
            "s3:///prefix",
            "s3://key:secret@bucket/prefix",
            "s3://bucket/prefix?endpoint=x",
            "s3://bucket/#x",
            "az://account",
            "gs:///x",
            "ftp://x/y",
            "bucket",
        ] {
            let error = open(bad).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "vault.url"), "{bad}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let mut plain = settings();
        plain.s3.endpoint = Some("http://127.0.0.1:9".into());
        assert_eq!(Store::open("s3://bucket", plain.clone()).unwrap_err().code(), "vault.http");
        plain.allow_http = true;
        assert!(Store::open("s3://bucket", plain).is_ok());
    }

    #[test]
    fn retention_is_refused_where_there_is_none() {
        let immutability = retention::Immutability { mode: retention::LockMode::Compliance, retain: Duration::from_secs(60) };
        let settings = Settings { immutability: Some(immutability), ..Settings::default() };
        assert_eq!(Store::open("memory:///", settings).unwrap_err().code(), "vault.immutability");
    }
}
