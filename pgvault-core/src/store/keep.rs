//! Keeping objects: locks that are made longer, legal holds, versions, and what the bucket does by itself.
//!
//! A directory and a store in memory have nothing of this.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, PutMode, PutOptions, PutPayload};

use super::gate::Verb;
use super::guard::{BucketRules, Guard, Version};
use super::retention::{Immutability, Lock, LockMode};
use super::{Put, Store, path};
use crate::{Error, ErrorKind, Result};

/// Locks that are looked at and made longer at the same time.
const AT_ONCE: usize = 16;

impl Store {
    /// The locks that are asked for.
    pub fn immutability(&self) -> Option<Immutability> {
        self.settings.immutability
    }

    /// True for a store that can lock, hold, and keep versions, or says that it can.
    pub fn can_keep(&self) -> bool {
        self.guard.is_some()
    }

    fn guard(&self) -> Result<&dyn Guard> {
        self.guard.as_deref().ok_or_else(|| {
            let why = format!("{} keeps no versions and has no locks", self.location);
            Error::new(ErrorKind::Unsupported, "store.unsupported", why).with_hint("only stores in a cloud have them")
        })
    }

    /// Makes sure that each of these objects stays locked at least as long as one that is written now. Does nothing when no
    /// immutability is asked for. A lock is never made shorter or weaker.
    ///
    /// # Errors
    /// When an object is missing, or the store does not lock it.
    pub async fn keep(&self, names: &[String]) -> Result<()> {
        let Some(immutability) = self.settings.immutability else { return Ok(()) };
        let wanted = immutability.lock(self.now())?;
        let kept = futures::stream::iter(names).map(|name| self.keep_until(name, &wanted)).buffer_unordered(AT_ONCE);
        kept.try_collect().await
    }

    /// Makes sure that an object is locked as `wanted`, or longer.
    ///
    /// # Errors
    /// As [`Store::keep`].
    pub async fn keep_until(&self, name: &str, wanted: &Lock) -> Result<()> {
        let guard = self.guard()?;
        let path = self.full(name);
        let found = self.guarded("read the lock of", name, || guard.lock_of(&path)).await?;
        if found.is_some_and(|found| found.covers(wanted)) {
            return Ok(());
        }
        // A stronger lock that ends too early stays as strong.
        let mode = found.map_or(wanted.mode, |found| if found.mode == wanted.mode { wanted.mode } else { LockMode::Compliance });
        let until = found.map_or(wanted.until, |found| wanted.until.max(found.until));
        let lock = Lock { mode, until };
        self.guarded("lock", name, || guard.set_lock(&path, &lock)).await
    }

    /// The lock of an object, as the store has it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when the store has none.
    pub async fn lock_of(&self, name: &str) -> Result<Option<Lock>> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("read the lock of", name, || guard.lock_of(&path)).await
    }

    /// Sets a lock as it is given, weaker or shorter ones included, which a store refuses. For finding out whether it does.
    ///
    /// # Errors
    /// When the store refuses.
    pub async fn set_lock(&self, name: &str, lock: &Lock) -> Result<()> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("lock", name, || guard.set_lock(&path, lock)).await
    }

    /// True when a legal hold lies on an object.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when the store has none.
    pub async fn is_held(&self, name: &str) -> Result<bool> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("read the hold of", name, || guard.is_held(&path)).await
    }

    /// Lays a legal hold on an object, or lifts it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when the store has none.
    pub async fn set_hold(&self, name: &str, held: bool) -> Result<()> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("hold", name, || guard.set_hold(&path, held)).await
    }

    /// What the bucket does by itself.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a store that is no bucket.
    pub async fn bucket_rules(&self) -> Result<BucketRules> {
        let guard = self.guard()?;
        self.guarded("read the rules of", &self.location, || guard.rules()).await
    }

    /// Every version of every object below a prefix, with the marks that hide them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when the store keeps none.
    pub async fn versions(&self, prefix: &str) -> Result<Vec<Version>> {
        let guard = self.guard()?;
        let full = format!("{}{prefix}", self.prefix);
        let (mut all, mut page) = (Vec::new(), None);
        loop {
            let (versions, next) = self.guarded("list the versions of", prefix, || guard.versions(&full, page.clone())).await?;
            all.extend(versions.into_iter().filter_map(|version| {
                let name = version.name.strip_prefix(&self.prefix)?.to_owned();
                Some(Version { name, ..version })
            }));
            match next {
                Some(next) if Some(&next) != page.as_ref() => page = Some(next),
                _ => return Ok(all),
            }
        }
    }

    /// The bytes of one version of an object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such version.
    pub async fn get_version(&self, name: &str, version: &str) -> Result<Bytes> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("read a version of", name, || guard.get_version(&path, version)).await
    }

    /// Deletes one version of an object for good. pgvault's own work never needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Immutable`] when the store refuses.
    pub async fn delete_version(&self, name: &str, version: &str) -> Result<()> {
        let guard = self.guard()?;
        let path = self.full(name);
        self.guarded("delete", name, || guard.delete_version(&path, version)).await
    }

    /// Who has created `name`, on a store that keeps versions and has told this writer that it did, and perhaps others: whoever
    /// wrote the first version. A plain read gives the last one, so the first is written once more when that is another; one
    /// that was refused has read what was on top at that moment.
    ///
    /// A writer that dies between its PUT and this leaves its own version on top; [`crate::vault::undelete`] finds it.
    pub(super) async fn first_version(&self, name: &str, bytes: &Bytes, put: Put) -> Result<Put> {
        let mut versions = self.versions(name).await?;
        // The newest comes first (`ListObjectVersions`: in the order in which they were stored).
        versions.retain(|version| version.name == name && !version.is_delete_marker);
        let (Some(first), Some(latest)) = (versions.last(), versions.first()) else {
            let why = format!("{name} was stored, and none of its versions is listed");
            return Err(Error::new(ErrorKind::Storage, "store.versions", why));
        };
        if first.id == latest.id {
            return Ok(put);
        }
        let kept = self.get_version(name, &first.id).await?;
        if first.etag.is_empty() || first.etag != latest.etag {
            tracing::warn!(name, "several writers were told that they created an object; the first one's is kept");
            self.overwrite(name, kept.clone()).await?;
        }
        Ok(match put {
            _ if kept != *bytes => Put::Different(kept),
            Put::Same => Put::Same,
            Put::Created | Put::Different(_) => Put::Created,
        })
    }

    /// Writes an object whether or not its name is taken: to give a name back the bytes that it had first, or, with an object
    /// of no use, to find out whether the credentials may. Nothing else may overwrite.
    ///
    /// # Errors
    /// When the store refuses.
    pub async fn overwrite(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.ensure_writable()?;
        let options = PutOptions { mode: PutMode::Overwrite, ..self.put_options(name)? };
        self.retried(Verb::Put, "overwrite", name, || async {
            self.inner.put_opts(&path(name)?, PutPayload::from_bytes(bytes.clone()), options.clone()).await
        })
        .await
        .map(drop)
    }

    /// Creates an object of no use that is locked for a while, to find out whether locks are kept.
    ///
    /// # Errors
    /// As [`Store::put_new`].
    pub async fn put_locked(&self, name: &str, bytes: Bytes, lock: Lock) -> Result<()> {
        self.ensure_writable()?;
        let mut options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let _ = options.extensions.insert(lock);
        self.retried(Verb::Put, "create", name, || async {
            self.inner.put_opts(&path(name)?, PutPayload::from_bytes(bytes.clone()), options.clone()).await
        })
        .await
        .map(drop)
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn guarded<T, F>(&self, doing: &str, name: &str, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        self.repeated(doing, name, || self.bounded(Duration::ZERO, request())).await
    }
}
