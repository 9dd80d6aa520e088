//! pgvault on real object stores: what only they can show.
//!
//! Each test names the servers that it needs, and fails without them. Places, users and policies come from `pgvault_teststores`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod doctor;
mod locks;
mod placement;
mod ransom;
mod refused;

use pgvault_core::config::{self, Config, Job};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::SystemId;
use pgvault_core::store::{Settings, Store};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_teststores::{Kind, Place, Server};

/// A server that the tests of this process share.
pub(crate) fn server(kind: Kind) -> std::sync::Arc<Server> {
    Server::shared(kind).unwrap()
}

/// The configuration that leads to a place, with further lines of `[vault]`.
pub(crate) fn config(place: &Place, more: &str) -> Config {
    config::load_text(&place.config(more, "").unwrap(), std::iter::empty()).unwrap()
}

pub(crate) fn settings(place: &Place, more: &str) -> Settings {
    config(place, more).vault.store_settings(Job::Other).unwrap()
}

pub(crate) fn open(place: &Place, more: &str) -> Store {
    Store::open(&place.url(), settings(place, more)).unwrap()
}

pub(crate) fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

/// A vault with one cluster, and an object or two in it.
pub(crate) async fn vault(store: Store) -> Cluster {
    let (vault, _) = Vault::create(store, Env::default()).await.unwrap();
    let name = ClusterName::new("main", SystemId(7)).unwrap();
    let _ = vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap();
    vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.unwrap()
}
