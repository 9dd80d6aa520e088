//! Deleting what nothing needs any more, one object at a time, and never what is locked or held.
//!
//! A lock has to be looked at. In a bucket that keeps versions a DELETE of a locked object succeeds: it hides the object behind a
//! marker and frees nothing, so that the backup is gone and its space is not.

use jiff::Timestamp;

use super::Store;
use crate::{ErrorKind, Result};

/// What became of an object that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pruned {
    /// It is gone.
    Deleted,
    /// It is under retention, until then as far as the store tells.
    Locked(Option<Timestamp>),
    /// A legal hold lies on it.
    Held,
}

impl Store {
    /// True when objects of this store may be locked or held, so that each has to be asked about before it is deleted.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub async fn may_lock(&self) -> Result<bool> {
        if !self.can_keep() {
            return Ok(false);
        }
        match self.bucket_rules().await {
            Ok(rules) => Ok(self.immutability().is_some() || rules.object_lock != Some(false)),
            Err(error) if error.is_transient() => Err(error),
            // Who may not look at the rules does not know.
            Err(_) => Ok(true),
        }
    }

    /// What keeps an object from being deleted at `now`; `None` for nothing.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub async fn kept_by(&self, name: &str, now: Timestamp) -> Result<Option<Pruned>> {
        match self.lock_of(name).await {
            Ok(Some(lock)) if lock.until > now => return Ok(Some(Pruned::Locked(Some(lock.until)))),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => return Ok(None),
            Err(error) => return Err(error),
        }
        match self.is_held(name).await {
            Ok(held) => Ok(held.then_some(Pruned::Held)),
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes an object unless it is locked or held at `now`; looks only when `may_lock` says that it could be. One that is not
    /// there is deleted.
    ///
    /// # Errors
    /// When the store fails. The object may be gone then, and the call may be repeated.
    pub async fn prune(&self, name: &str, now: Timestamp, may_lock: bool) -> Result<Pruned> {
        if may_lock && let Some(kept) = self.kept_by(name, now).await? {
            return Ok(kept);
        }
        match self.delete(name).await {
            Ok(()) => Ok(Pruned::Deleted),
            Err(error) if error.kind() == ErrorKind::Immutable => Ok(Pruned::Locked(None)),
            Err(error) => Err(error),
        }
    }
}
