//! A small cluster at rest, its first backup, and what a restore of it must look like.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use pgvault_core::Result;
use pgvault_core::backup::{BackupOptions, backup};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::inspect::{CheckOptions, Finding, Report, Severity, check};
use pgvault_core::postgres::{ConnInfo, ControlFile};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, Restored, TargetAction, restore};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Objects, objects_of};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_core::wal::push;
use pgvault_verify::process::{Install, Server};
use tempfile::TempDir;
use ulid::Ulid;

use crate::place::{Copy, from_objects};

/// Words that occur in the source and must not occur in the vault.
pub(crate) const SECRETS: [&str; 4] = ["plainrowmarker", "secret_relation_marker", "secret_file_marker", "pg_attribute"];

/// Files and what they hold.
pub(crate) type Tree = BTreeMap<String, (u64, String)>;

/// An age identity and its recipient.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) secret: String,
    pub(crate) recipient: String,
}

impl Key {
    pub(crate) fn new() -> Self {
        let identity = age::x25519::Identity::generate();
        Self { secret: identity.to_string().expose_secret().to_owned(), recipient: identity.to_public().to_string() }
    }

    pub(crate) fn wrap(&self) -> Wrap {
        Wrap::Recipient(self.recipient.clone())
    }

    pub(crate) fn unlock(&self) -> Unlock {
        Unlock::Identity(self.secret.clone().into())
    }
}

/// The cluster and its vault.
pub(crate) struct Source {
    pub(crate) server: Server,
    pub(crate) folder: TempDir,
    pub(crate) name: ClusterName,
    /// The operator's key.
    pub(crate) key: Key,
    /// A second key.
    pub(crate) other: Key,
    /// What every restored data directory must hold.
    pub(crate) truth: Tree,
    /// The vault after the first backup.
    pub(crate) base: Objects,
    /// The first backup.
    pub(crate) first: Ulid,
    /// WAL files that continue where the vault's WAL ends.
    pub(crate) segments: Vec<PathBuf>,
}

/// A folder in memory where there is one: a restore syncs its whole file system.
pub(crate) fn folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let builder = tempfile::Builder::new();
    if shm.is_dir() { builder.tempdir_in(shm).unwrap() } else { builder.tempdir().unwrap() }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Patient enough for a busy machine, quick where a fault is certain.
pub(crate) fn options(request_timeout: Duration) -> StoreOptions {
    StoreOptions { attempts: 2, request_timeout, backoff: Duration::from_millis(1), ..StoreOptions::default() }
}

pub(crate) fn store(inner: Arc<dyn object_store::ObjectStore>) -> Store {
    Store::new(inner, "memory:///", options(Duration::from_secs(20)))
}

impl Source {
    pub(crate) fn new() -> Self {
        let folder = folder();
        let server = Server::builder(&Install::for_tests().unwrap())
            .wal_segment_mib(1)
            .config("autovacuum = off")
            .config("fsync = off")
            .config("max_wal_senders = 30")
            .config("max_replication_slots = 30")
            .config("wal_keep_size = '256MB'")
            .config("max_wal_size = '1GB'")
            .config("checkpoint_timeout = '1h'")
            .config("cluster_name = 'secret_file_marker'")
            .start()
            .unwrap();
        server
            .psql(
                "update pg_database set datistemplate = false; drop database template0; drop database template1;
                 create table secret_relation_marker (n int, name text, noise bytea);
                 alter table secret_relation_marker alter noise set storage external;
                 insert into secret_relation_marker
                     select n, 'plainrowmarker', 'plainrowmarker'::bytea || decode(string_agg(md5(random()::text), ''), 'hex')
                     from generate_series(1, 120) n, generate_series(1, 600) m group by n;",
            )
            .unwrap();
        // A file that does not compress, so that frames stored as they are get looked at too.
        let mut noise = vec![0; 600 << 10];
        getrandom::fill(&mut noise).unwrap();
        noise.extend_from_slice(SECRETS[0].as_bytes());
        fs::write(server.pgdata().join("secret_file_marker"), noise).unwrap();
        server.psql("vacuum freeze analyze").unwrap();
        server.psql("checkpoint").unwrap();
        let control = fs::read(server.pgdata().join("global/pg_control")).unwrap();
        let system_id = ControlFile::parse(&control).unwrap().system_identifier;
        let mut source = Self {
            name: ClusterName::new("main", system_id).unwrap(),
            server,
            folder,
            key: Key::new(),
            other: Key::new(),
            truth: Tree::new(),
            base: Objects::new(),
            first: Ulid(0),
            segments: Vec::new(),
        };
        let memory = Copy::new();
        let first = runtime().block_on(async {
            let vault = Vault::create(store(memory.clone()), Env::default()).await.unwrap().0;
            assert!(vault.create_cluster(&source.name, &[source.key.wrap(), source.other.wrap()]).await.unwrap());
            let cluster = source.open(store(memory.clone())).await.unwrap();
            backup(&cluster, &source.backup_options(true)).await.unwrap().id
        });
        source.first = first;
        source.truth = tree(source.server.pgdata());
        assert!(source.truth.len() > 200, "{}", source.truth.len());
        source.base = runtime().block_on(objects_of(&*memory));
        source.segments = (0..22).map(|_| source.more_wal()).collect();
        source
    }

    /// A new segment of WAL, copied out of the server's way.
    pub(crate) fn more_wal(&self) -> PathBuf {
        // Not in a transaction, so that no file of the cluster changes.
        let said = self.server.psql(
            "select pg_logical_emit_message(false, 'plainrowmarker', repeat('plainrowmarker', 1000));
             select pg_walfile_name(pg_current_wal_insert_lsn()); select pg_switch_wal()",
        );
        let said = said.unwrap();
        let name = said.lines().find(|line| line.len() == 24).unwrap();
        let copy = self.folder.path().join(name);
        let _ = fs::copy(self.server.pgdata().join("pg_wal").join(name), &copy).unwrap();
        copy
    }

    /// Archives what no test pushed: the start of a backup ends the open segment when anything was written to it.
    pub(crate) async fn archive_the_rest(&self, cluster: &Cluster) {
        let open = self.server.psql("select pg_walfile_name(pg_current_wal_insert_lsn())").unwrap();
        let first = self.base.keys().find_map(|name| name.split_once("/wal/00000001/")).unwrap().1[..24].to_owned();
        let pg_wal = self.server.pgdata().join("pg_wal");
        let mut names: Vec<String> =
            fs::read_dir(&pg_wal).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.len() == 24 && *name >= first && *name < open);
        for name in names {
            let _ = push::push(cluster, &pg_wal.join(name)).await.unwrap();
        }
    }

    pub(crate) async fn open(&self, store: Store) -> Result<Cluster> {
        let vault = Vault::open(store, Env::default()).await?;
        let name = vault.find_cluster("main", None).await?;
        vault.unlock(&name, &self.key.unlock()).await
    }

    pub(crate) fn backup_options(&self, local: bool) -> BackupOptions {
        BackupOptions {
            connection: ConnInfo::parse(&self.server.conninfo(), &|_| None).unwrap(),
            pgdata: local.then(|| self.server.pgdata().to_path_buf()),
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

    /// The first backup's vault with more WAL in it.
    pub(crate) async fn grown(&self) -> Objects {
        let memory = from_objects(&self.base).await;
        let cluster = self.open(store(memory.clone())).await.unwrap();
        for segment in &self.segments[..3] {
            let _ = push::push(&cluster, segment).await.unwrap();
        }
        objects_of(&*memory).await
    }

    pub(crate) async fn restore(&self, cluster: &Cluster, id: Ulid, pgdata: &Path, delta: bool) -> Result<Restored> {
        self.restore_with(cluster, id, pgdata, delta, BTreeMap::new()).await
    }

    /// [`Source::restore`], with places for the tablespaces.
    pub(crate) async fn restore_with(
        &self,
        cluster: &Cluster,
        id: Ulid,
        pgdata: &Path,
        delta: bool,
        tablespace_mapping: BTreeMap<String, PathBuf>,
    ) -> Result<Restored> {
        let plan = plan(cluster, &Target::Immediate, PlanOptions { backup: Some(id), timeline: None }).await?;
        let options = RestoreOptions {
            pgdata: pgdata.to_path_buf(),
            delta,
            tablespace_mapping,
            restore_command: RestoreCommand { program: "pgvault".into(), global_arguments: Vec::new(), arguments: Vec::new() },
            action: TargetAction::Pause,
            archive_off: false,
            workers: 2,
            progress: Arc::new(Silent),
        };
        restore(cluster, &plan, &options).await
    }

    /// Restores a backup, compares every file with the source's, and removes the directory.
    pub(crate) async fn assert_restores(&self, cluster: &Cluster, id: Ulid, why: &str) {
        let target = folder();
        let _ = self.restore(cluster, id, target.path(), false).await.unwrap_or_else(|e| panic!("{why}: restore {id}: {e:?}"));
        self.assert_restored(target.path(), why);
    }

    pub(crate) fn assert_restored(&self, pgdata: &Path, why: &str) {
        for name in ["global/pg_control", "backup_label", "recovery.signal", "postgresql.auto.conf"] {
            assert!(pgdata.join(name).is_file(), "{why}: there is no {name}");
        }
        assert!(!pgdata.join("pgvault.restore-unfinished").exists(), "{why}: still marked as unfinished");
        let restored = tree(pgdata);
        let differ = |name: &&String| restored.get(*name) != self.truth.get(*name);
        let wrong: Vec<&String> = restored.keys().chain(self.truth.keys()).filter(differ).collect();
        assert!(wrong.is_empty(), "{why}: these files differ from the source's: {wrong:?}");
    }
}

pub(crate) async fn report(cluster: &Cluster) -> Report {
    check(cluster, &CheckOptions { sizes_only: false, progress: Arc::new(Silent) }).await.unwrap()
}

/// The errors of a check, as text.
pub(crate) fn errors(report: &Report) -> Vec<String> {
    let errors = report.findings.iter().filter(|f| f.severity == Severity::Error);
    let hurts = |f: &Finding| f.hurts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    errors.map(|f| format!("{}: {} (hurts {})", f.object, f.problem, hurts(f))).collect()
}

/// Files that a backup leaves out or a restore writes itself.
fn is_own(path: &str) -> bool {
    let folders = ["pg_wal/", "pg_replslot/", "pg_dynshmem/", "pg_notify/", "pg_serial/", "pg_snapshots/", "pg_stat/"];
    let more = ["pg_stat_tmp/", "pg_subtrans/"];
    let files = [
        "global/pg_control",
        "backup_label",
        "tablespace_map",
        "recovery.signal",
        "postgresql.auto.conf",
        "postmaster.pid",
        "postmaster.opts",
    ];
    folders.iter().chain(&more).any(|folder| path.starts_with(folder))
        || files.contains(&path)
        || path.ends_with("pg_internal.init")
        // A checkpoint writes this one and renames it: it is there or not as a backup happens to look.
        || path == "pg_logical/replorigin_checkpoint.tmp"
}

pub(crate) fn tree(root: &Path) -> Tree {
    let mut files = Tree::new();
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if entry.file_type().is_file() && !is_own(&path) {
            let bytes = fs::read(entry.path()).unwrap();
            let _ = files.insert(path, (bytes.len() as u64, blake3::hash(&bytes).to_string()));
        }
    }
    files
}
