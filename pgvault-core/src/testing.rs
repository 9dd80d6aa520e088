//! How the promises about stores are kept: stores and networks that fail on purpose, and what a store must do to be one.
//!
//! - [`FaultyStore`] fails at its k-th call, or follows a [`Schedule`] of faults that a seed gives.
//! - [`TimedStore`] has the clock of a test, so that days pass in a line.
//! - [`conformance`] asks a store for everything that pgvault relies on. Whoever operates a store that is not in the list of
//!   those that were tested can run it from a test of ten lines.
//! - [`proxy`] stands between pgvault and a real server and does to their connection what only a network can.
//!
//! Nothing here is part of a release: the module exists with the feature `testing` only.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, Result};

pub mod conformance;
mod faulty;
pub mod proxy;
mod schedule;
mod timed;

pub use faulty::{Fault, FaultyStore, Lag, ListOrder, Pace};
pub use schedule::{Dice, Schedule};
pub use timed::TimedStore;

/// Everything in a store, by name.
pub type Objects = BTreeMap<String, Bytes>;

/// A store in memory that holds these objects. The bytes are shared, so a copy of a vault costs nothing.
///
/// # Panics
/// Never: memory does not fail.
pub async fn from_objects(objects: &Objects) -> Arc<InMemory> {
    let store = Arc::new(InMemory::new());
    for (name, bytes) in objects {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let put = store.put_opts(&Path::from(name.as_str()), PutPayload::from_bytes(bytes.clone()), options).await;
        assert!(put.is_ok(), "{name}: {put:?}");
    }
    store
}

/// Everything that a store holds.
///
/// # Panics
/// When the store fails; ask the healthy one underneath.
pub async fn objects_of(store: &dyn ObjectStore) -> Objects {
    let mut objects = Objects::new();
    let listed: Result<Vec<ObjectMeta>> = store.list(None).try_collect().await;
    assert!(listed.is_ok(), "{listed:?}");
    for meta in listed.unwrap_or_default() {
        let bytes = match store.get(&meta.location).await {
            Ok(got) => got.bytes().await,
            Err(error) => Err(error),
        };
        assert!(bytes.is_ok(), "{bytes:?}");
        let _ = objects.insert(meta.location.to_string(), bytes.unwrap_or_default());
    }
    objects
}
