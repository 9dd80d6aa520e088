//! A vault in memory, and captures into it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::memory::InMemory;
use odoosim::{Odoo, Pause};
use pgvault_core::Result;
use pgvault_core::clock::FixedClock;
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::{Env, OsRandom};
use pgvault_core::filestore::capture::{Capture, CaptureOptions, Step};
use pgvault_core::filestore::fetch::{FetchOptions, Fetched, Sink, Wish, fetch};
use pgvault_core::filestore::pass::{self, Known};
use pgvault_core::postgres::{Connection, Mode};
use pgvault_core::progress::Silent;
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::TimedStore;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A vault for the cluster that a database is in.
pub(crate) async fn cluster(odoo: &Odoo) -> Cluster {
    cluster_in(odoo, Store::in_memory(), Env::default()).await
}

/// The same, with a clock of the store that moves when it is told.
pub(crate) async fn timed_cluster(odoo: &Odoo) -> (Arc<FixedClock>, Cluster) {
    let clock = Arc::new(FixedClock::new("2026-01-01T00:00:00Z".parse().unwrap()));
    let store = TimedStore::new(Arc::new(InMemory::new()), clock.clone());
    let env = Env::new(clock.clone(), Arc::new(OsRandom));
    (clock, cluster_in(odoo, Store::new(Arc::new(store), "memory:///", StoreOptions::default()), env).await)
}

async fn cluster_in(odoo: &Odoo, store: Store, env: Env) -> Cluster {
    let mut sql = Connection::connect(&odoo.conninfo().unwrap(), Mode::Sql).await.unwrap();
    let row = sql.query_one("SELECT system_identifier FROM pg_control_system()").await.unwrap();
    let name = ClusterName::new("main", row.required(0).unwrap().parse().unwrap()).unwrap();
    let (vault, _) = Vault::create(store, env).await.unwrap();
    // A passphrase would take longer than a history.
    let identity = age::x25519::Identity::generate();
    let _ = vault.create_cluster(&name, &[Wrap::Recipient(identity.to_public().to_string())]).await.unwrap();
    let secret = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
    vault.unlock(&name, &Unlock::Identity(secret.into())).await.unwrap()
}

pub(crate) fn options(odoo: &Odoo) -> CaptureOptions {
    CaptureOptions {
        connection: odoo.conninfo().unwrap(),
        database: odoo.name().to_owned(),
        folder: odoo.data_dir().join("filestore").join(odoo.name()),
        workers: 2,
        level: 1,
        full_every: Duration::from_secs(3600 * 24),
        guarded: false,
        accept_losses: false,
        progress: Arc::new(Silent),
        hook: None,
    }
}

/// Lets a pass stop where others of a history may go on.
#[derive(Clone, Default)]
pub(crate) struct Stops(Arc<Mutex<Option<Pause>>>);

impl Stops {
    pub(crate) fn at(&self, pause: &Pause) {
        *self.0.lock().unwrap() = Some(pause.clone());
    }

    pub(crate) fn options(&self, odoo: &Odoo) -> CaptureOptions {
        let stops = self.clone();
        CaptureOptions {
            hook: Some(Arc::new(move |step| {
                let pause = stops.0.lock().unwrap().clone();
                Box::pin(async move {
                    let what = match step {
                        Step::Positioned => "capture: list",
                        Step::Listed => "capture: store",
                        Step::Stored => "capture: go on",
                        Step::Committing => "capture: commit",
                    };
                    if let Some(pause) = pause {
                        let _ = pause.here(what).await;
                    }
                })
            })),
            ..options(odoo)
        }
    }
}

pub(crate) async fn capture(cluster: &Cluster, odoo: &Odoo) -> Capture {
    Capture::open(cluster, options(odoo)).await.unwrap()
}

pub(crate) async fn known(cluster: &Cluster) -> Known {
    let folders = pass::instances(cluster).await.unwrap();
    assert_eq!(folders.len(), 1, "{folders:?}");
    pass::load(cluster, &folders[0]).await.unwrap().unwrap()
}

/// Fetches what rows refer to at the moment into a folder.
pub(crate) async fn restore(cluster: &Cluster, odoo: &Odoo, folder: &Path, delta: bool) -> Result<Fetched> {
    let mut sql = Connection::connect(&odoo.conninfo()?, Mode::Sql).await?;
    let references = pgvault_core::filestore::database::references(&mut sql).await?;
    let sink = Sink::Folder { path: folder.to_path_buf(), owner: None, delta };
    let options = FetchOptions { sink, workers: 2, progress: Arc::new(Silent) };
    fetch(&mut known(cluster).await.catalog, Wish::Referenced(references), &options).await
}

/// The same, of a vault in which anything may be damaged.
pub(crate) async fn try_restore(cluster: &Cluster, odoo: &Odoo, folder: &Path) -> Result<Fetched> {
    let mut sql = Connection::connect(&odoo.conninfo()?, Mode::Sql).await?;
    let references = pgvault_core::filestore::database::references(&mut sql).await?;
    let folders = pass::instances(cluster).await?;
    let Some(mut known) = pass::load(cluster, &folders[0]).await? else { panic!("there is no pass") };
    let sink = Sink::Folder { path: folder.to_path_buf(), owner: None, delta: false };
    fetch(&mut known.catalog, Wish::Referenced(references), &FetchOptions { sink, workers: 2, progress: Arc::new(Silent) }).await
}

/// Every file below a folder, but the checklist.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in walkdir::WalkDir::new(folder) {
        let entry = entry.unwrap();
        let name = entry.path().strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
        if entry.file_type().is_file() && !name.starts_with("checklist/") {
            let _ = files.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    files
}
