//! What a cloud's store can do to keep objects, beyond `object_store`: locks, holds, versions, and a bucket's own rules.
//!
//! Each provider has its own requests for these; `store/backend` has one implementation for each. Paths are full names in
//! the bucket or container, with the vault's prefix.

use async_trait::async_trait;
use jiff::Timestamp;

use super::retention::{Lock, LockMode};

/// One version of an object, or the mark that hides it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The object's full name in the vault.
    pub name: String,
    /// What the provider calls it.
    pub id: String,
    /// The one that a plain GET gives.
    pub is_latest: bool,
    /// A delete marker: there are no bytes, and a plain GET finds nothing.
    pub is_delete_marker: bool,
    /// When it was written.
    pub written: Timestamp,
    /// Its size in bytes; 0 for a delete marker.
    pub size: u64,
    /// What the store compares versions by; empty when it says nothing. Equal ones hold the same bytes.
    pub etag: String,
    /// Its place in the order of writing, where the provider numbers versions.
    pub generation: Option<u64>,
}

/// What a bucket or container does by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct BucketRules {
    /// Old versions are kept when an object is overwritten or deleted; `None` when that could not be learned.
    pub versioning: Option<bool>,
    /// Single objects can be locked.
    pub object_lock: Option<bool>,
    /// The lock that every new object gets by itself: its mode and its days.
    pub default_lock: Option<(LockMode, u32)>,
    /// Versions that were overwritten or deleted are removed after some time, so that their space comes back.
    pub expires_old_versions: Option<bool>,
    /// A rule removes current objects after some time: that would destroy the vault.
    pub expires_objects: Option<bool>,
    /// What could not be learned, and why.
    pub unknown: Vec<String>,
}

/// See the [module documentation](self).
#[async_trait]
pub(super) trait Guard: std::fmt::Debug + Send + Sync {
    /// The lock of an object's current version.
    async fn lock_of(&self, path: &str) -> object_store::Result<Option<Lock>>;

    /// Sets an object's lock. Shortening is the store's to refuse, and the caller's not to try.
    async fn set_lock(&self, path: &str, lock: &Lock) -> object_store::Result<()>;

    /// True when a legal hold lies on an object.
    async fn is_held(&self, path: &str) -> object_store::Result<bool>;

    /// Lays a legal hold on an object, or lifts it.
    async fn set_hold(&self, path: &str, held: bool) -> object_store::Result<()>;

    /// What the bucket does by itself.
    async fn rules(&self) -> object_store::Result<BucketRules>;

    /// A page of the versions below a prefix, and where the next page begins.
    async fn versions(
        &self,
        prefix: &str,
        after: Option<VersionsPage>,
    ) -> object_store::Result<(Vec<Version>, Option<VersionsPage>)>;

    /// Tries to delete one version for good. For finding out whether the credentials may; on an object of no use.
    async fn delete_version(&self, path: &str, version: &str) -> object_store::Result<()>;
}

/// Where a page of versions begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VersionsPage {
    pub(super) key: String,
    pub(super) version: String,
}
