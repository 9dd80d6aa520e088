//! Deleting many objects: several at once, none that is locked, and past those that fail.
//!
//! One object that cannot be deleted must not keep all the others (H20). A store that deletes nothing at all must not be asked a
//! million times.

use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;

use crate::store::{ObjectInfo, Pruned, Store};
use crate::{Error, ErrorKind, Result};

/// Deletes at once.
const AT_ONCE: usize = 16;

/// Failures after which it is given up.
const MAX_FAILURES: u64 = 100;

/// Names that are kept of what was locked, and of what failed.
const MAX_NAMED: usize = 100;

/// An object that was left where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// Its full name.
    pub name: String,
    /// Why.
    pub why: String,
    /// Until when, if it is locked and the store tells.
    pub until: Option<Timestamp>,
}

/// What was deleted, and what was not.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Tally {
    /// Objects that were deleted; with a dry run those that would be.
    pub deleted: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Objects that are locked or held.
    pub locked: u64,
    /// Their bytes.
    pub locked_bytes: u64,
    /// When the first of their locks ends, as far as the store tells.
    pub first_unlocked: Option<Timestamp>,
    /// Objects that could not be deleted.
    pub failed: u64,
    /// The first of those that were left.
    pub left: Vec<Left>,
}

impl Tally {
    /// Notes what became of an object.
    fn note(&mut self, object: &ObjectInfo, outcome: &Result<Pruned>) {
        let left = |why: String, until| Left { name: object.name.clone(), why, until };
        let left = match outcome {
            Ok(Pruned::Deleted) => {
                self.deleted += 1;
                self.deleted_bytes = self.deleted_bytes.saturating_add(object.size);
                return;
            }
            Ok(kept) => {
                self.locked += 1;
                self.locked_bytes = self.locked_bytes.saturating_add(object.size);
                match kept {
                    Pruned::Locked(Some(until)) => {
                        self.first_unlocked = Some(self.first_unlocked.map_or(*until, |first| first.min(*until)));
                        left(format!("locked until {until}"), Some(*until))
                    }
                    Pruned::Held => left("under a legal hold".into(), None),
                    _ => left("locked by the store".into(), None),
                }
            }
            Err(error) => {
                self.failed += 1;
                left(error.to_string(), None)
            }
        };
        if self.left.len() < MAX_NAMED {
            self.left.push(left);
        }
    }
}

/// Deletes, and keeps count.
#[derive(Debug)]
pub struct Pruner {
    store: Store,
    now: Timestamp,
    may_lock: bool,
    dry_run: bool,
    /// What was done so far.
    pub tally: Tally,
}

impl Pruner {
    /// For locks as they are at `now`, by the store's clock. With `dry_run` nothing is deleted, and all else is as it would be.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub async fn new(store: &Store, now: Timestamp, dry_run: bool) -> Result<Self> {
        Ok(Self { store: store.clone(), now, may_lock: store.may_lock().await?, dry_run, tally: Tally::default() })
    }

    /// True when objects may be locked, so that it is worth to ask before anything is announced.
    pub fn may_lock(&self) -> bool {
        self.may_lock
    }

    /// Deletes objects; gives each with what became of it. One that failed may be tried again by another run.
    ///
    /// # Errors
    /// When too many failed. What is done is done, and noted.
    pub async fn delete(&mut self, objects: Vec<ObjectInfo>) -> Result<Vec<(ObjectInfo, Result<Pruned>)>> {
        let (store, now, may_lock, dry_run) = (&self.store, self.now, self.may_lock, self.dry_run);
        let mut deleting = stream::iter(objects)
            .map(|object| async move {
                let outcome = match dry_run {
                    false => store.prune(&object.name, now, may_lock).await,
                    true if may_lock => store.kept_by(&object.name, now).await.map(|kept| kept.unwrap_or(Pruned::Deleted)),
                    true => Ok(Pruned::Deleted),
                };
                (object, outcome)
            })
            .buffer_unordered(AT_ONCE);
        let mut done = Vec::new();
        while let Some((object, outcome)) = deleting.next().await {
            self.tally.note(&object, &outcome);
            if let Err(error) = &outcome {
                tracing::warn!(object = %object.name, %error, "could not be deleted");
                if self.tally.failed >= MAX_FAILURES {
                    return Err(Error::new(
                        ErrorKind::Storage,
                        "prune.failures",
                        format!("{MAX_FAILURES} objects could not be deleted, the last of them {}: {error}", object.name),
                    )
                    .with_hint("run it again: it goes on where it stopped; only credentials that may delete can do it"));
                }
            }
            done.push((object, outcome));
        }
        Ok(done)
    }

    /// Of these objects, those that are not locked; the others are noted.
    ///
    /// # Errors
    /// When the store cannot be asked about any of too many.
    pub async fn unlocked(&mut self, objects: Vec<ObjectInfo>) -> Vec<ObjectInfo> {
        if !self.may_lock {
            return objects;
        }
        let (store, now) = (&self.store, self.now);
        let mut asking = stream::iter(objects)
            .map(|object| async move {
                let kept = store.kept_by(&object.name, now).await;
                (object, kept)
            })
            .buffer_unordered(AT_ONCE);
        let mut free = Vec::new();
        while let Some((object, kept)) = asking.next().await {
            match kept {
                Ok(None) => free.push(object),
                Ok(Some(kept)) => self.tally.note(&object, &Ok(kept)),
                Err(error) => self.tally.note(&object, &Err(error)),
            }
        }
        free
    }
}
