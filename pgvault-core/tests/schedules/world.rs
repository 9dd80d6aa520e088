//! A small cluster, and a program of a few operations on it: WAL, backups and restores, each as a process of its own, which opens the
//! vault first.
//!
//! What its store does meanwhile is the caller's. Afterwards the store is healthy, and whatever was said:
//!
//! - what was acknowledged is there: segments read as they were pushed, backups are listed;
//! - every backup that is listed restores byte for byte;
//! - the check finds no damage;
//! - every error was of a kind that such trouble has, and nothing ran for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use pgvault_core::backup::{BackupOptions, backup};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::inspect::{CheckOptions, Severity, check};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Dice, Objects, from_objects, objects_of};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault, snapshot};
use pgvault_core::wal::fetch::{Fetched, contents, fetch};
use pgvault_core::wal::push::push;
use pgvault_core::{ErrorKind, Result};
use tempfile::TempDir;
use ulid::Ulid;

use crate::server::{ROW, Server};

/// A folder in memory where there is one: a restore syncs its whole file system.
fn folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let builder = tempfile::Builder::new();
    if shm.is_dir() { builder.tempdir_in(shm).unwrap() } else { builder.tempdir().unwrap() }
}

/// The cluster, its server, and a vault with nothing in it yet.
pub(crate) struct World {
    server: Server,
    name: ClusterName,
    unlock: String,
    pub(crate) base: Objects,
    /// The segments as files.
    wal: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let server = Server::start().await;
        let name = ClusterName::new("main", server.data.system_id).unwrap();
        let identity = age::x25519::Identity::generate();
        let memory = from_objects(&Objects::new()).await;
        let store = Store::new(memory.clone(), "memory:///", StoreOptions::default());
        let (vault, _) = Vault::create(store, Env::default()).await.unwrap();
        assert!(vault.create_cluster(&name, &[Wrap::Recipient(identity.to_public().to_string())]).await.unwrap());
        let wal = folder();
        for (name, bytes) in ROW.iter().zip(&server.data.segments) {
            fs::write(wal.path().join(name), bytes).unwrap();
        }
        Self { server, name, unlock: identity.to_string().expose_secret().to_owned(), base: objects_of(&*memory).await, wal }
    }

    async fn open(&self, store: Store) -> Result<Cluster> {
        let vault = Vault::open(store, Env::default()).await?;
        vault.unlock(&self.name, &Unlock::Identity(self.unlock.clone().into())).await
    }

    fn segment(&self, number: usize) -> PathBuf {
        self.wal.path().join(ROW[number])
    }

    fn backup_options(&self) -> BackupOptions {
        BackupOptions {
            connection: self.server.connection(),
            pgdata: None,
            level: 1,
            workers: 2,
            labels: BTreeMap::new(),
            strict: true,
            spread_checkpoint: false,
            archive_patience: Some(Duration::ZERO),
            as_of: None,
            full: false,
            census: None,
            progress: Arc::new(Silent),
        }
    }

    async fn restore(&self, cluster: &Cluster, id: Ulid, pgdata: &Path, delta: bool) -> Result<()> {
        let plan = plan(cluster, &Target::Immediate, PlanOptions { backup: Some(id), timeline: None }).await?;
        let options = RestoreOptions {
            pgdata: pgdata.to_path_buf(),
            delta,
            tablespace_mapping: BTreeMap::new(),
            restore_command: RestoreCommand { program: "pgvault".into(), global_arguments: Vec::new(), arguments: Vec::new() },
            action: TargetAction::Pause,
            archive_off: false,
            workers: 2,
            progress: Arc::new(Silent),
        };
        restore(cluster, &plan, &options).await.map(drop)
    }

    fn assert_restored(&self, pgdata: &Path, why: &str) {
        for (name, bytes) in &self.server.data.files {
            let restored = fs::read(pgdata.join(name)).unwrap_or_else(|e| panic!("{why}: {name}: {e}"));
            // It names a checkpoint that does not exist, on purpose (T12).
            let same = if name == "global/pg_control" { restored.len() == bytes.len() } else { restored == *bytes };
            assert!(same, "{why}: {name} differs");
        }
        for name in ["backup_label", "recovery.signal"] {
            assert!(pgdata.join(name).is_file(), "{why}: there is no {name}");
        }
    }
}

/// What was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) segments: BTreeSet<usize>,
    pub(crate) backups: BTreeSet<Ulid>,
    pub(crate) errors: usize,
    pub(crate) done: usize,
}

/// A run of the program.
pub(crate) struct Case<'a> {
    pub(crate) world: &'a World,
    /// The store that things happen to.
    pub(crate) store: Store,
    pub(crate) dice: Dice,
    pub(crate) told: Told,
    /// What tells this run from all others.
    pub(crate) why: String,
}

impl Case<'_> {
    async fn open(&self) -> Result<Cluster> {
        self.world.open(self.store.clone()).await
    }

    /// Notes what an operation said.
    fn judge<T>(&mut self, doing: &str, said: Result<T>) -> Option<T> {
        match said {
            Ok(value) => {
                self.told.done += 1;
                Some(value)
            }
            Err(error) => {
                self.told.errors += 1;
                let allowed = match error.kind() {
                    ErrorKind::Storage => true,
                    ErrorKind::Failed => error.code() == "store.denied",
                    // A segment may be missing between others: its push failed.
                    _ => error.code() == "wal.gap",
                };
                assert!(allowed, "{doing}: {error:?} ({})", self.why);
                None
            }
        }
    }

    /// So many operations.
    pub(crate) async fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            let done = tokio::time::timeout(Duration::from_secs(120), self.step()).await;
            assert!(done.is_ok(), "did not end (H19) ({})", self.why);
        }
    }

    async fn step(&mut self) {
        match self.dice.below(10) {
            0..=2 => {
                let number = self.dice.below(ROW.len());
                let said = async { push(&self.open().await?, &self.world.segment(number)).await }.await;
                if self.judge("push", said).is_some() {
                    let _ = self.told.segments.insert(number);
                }
            }
            3..=5 => {
                let said = async { backup(&self.open().await?, &self.world.backup_options()).await }.await;
                if let Some(manifest) = self.judge("backup", said) {
                    assert!(manifest.bad_pages.is_empty());
                    let _ = self.told.backups.insert(manifest.id);
                }
            }
            6 => {
                let said = async { Ok(snapshot::list(&self.open().await?).await?.snapshots.len()) }.await;
                if let Some(listed) = self.judge("list", said) {
                    assert!(listed >= self.told.backups.len(), "{listed} of {:?} are listed ({})", self.told.backups, self.why);
                }
            }
            7 => self.fetch().await,
            _ => self.restore().await,
        }
    }

    async fn fetch(&mut self) {
        let (number, place) = (self.dice.below(ROW.len()), folder());
        let to = place.path().join("RECOVERYXLOG");
        let said = async { fetch(&self.open().await?, ROW[number].parse().unwrap(), &to, None).await }.await;
        match self.judge("fetch", said) {
            Some(Fetched::Written) => {
                assert!(fs::read(&to).unwrap() == self.world.server.data.segments[number], "another segment ({})", self.why);
            }
            // T1, R7: the end of the archive is said only where nothing is.
            Some(_) => assert!(!self.told.segments.contains(&number), "{number} is said not to be there ({})", self.why),
            None => assert!(!to.exists(), "a failed fetch left a file ({})", self.why),
        }
    }

    async fn restore(&mut self) {
        let known: Vec<Ulid> = self.told.backups.iter().copied().collect();
        let Some(id) = self.dice.pick(&known).copied() else { return };
        let place = folder();
        for attempt in 0..3 {
            let delta = attempt > 0 && fs::read_dir(place.path()).unwrap().next().is_some();
            let said = async { self.world.restore(&self.open().await?, id, place.path(), delta).await }.await;
            if self.judge("restore", said).is_some() {
                self.world.assert_restored(place.path(), &self.why);
                return;
            }
            let startable = place.path().join("global/pg_control").exists();
            assert!(!startable, "a broken restore could be started ({})", self.why);
        }
    }

    /// The store is healthy again.
    pub(crate) async fn afterwards(&self, healthy: Store) {
        let why = &self.why;
        for (name, bytes) in &self.world.base {
            assert!(healthy.get(name).await.unwrap() == *bytes, "{name} was changed ({why})");
        }
        let cluster = self.world.open(healthy).await.unwrap();
        for number in &self.told.segments {
            let stored = contents(&cluster, ROW[*number].parse().unwrap()).await.unwrap();
            assert!(stored.as_deref() == Some(&self.world.server.data.segments[*number][..]), "{number} ({why})");
        }
        let listed: BTreeSet<Ulid> = snapshot::list(&cluster).await.unwrap().snapshots.iter().map(|s| s.manifest.id).collect();
        assert!(listed.is_superset(&self.told.backups), "{:?} were acknowledged, {listed:?} are listed ({why})", self.told.backups);
        for id in &listed {
            let place = folder();
            self.world.restore(&cluster, *id, place.path(), false).await.unwrap_or_else(|e| panic!("restore {id}: {e:?} ({why})"));
            self.world.assert_restored(place.path(), why);
        }
        let report = check(&cluster, &CheckOptions { sizes_only: false, progress: Arc::new(Silent) }).await.unwrap();
        for finding in report.findings.iter().filter(|finding| finding.severity == Severity::Error) {
            // Segments whose push failed are missing between others.
            assert!(finding.problem.starts_with("WAL from "), "{finding:?} ({why})");
        }
    }
}
