//! A cluster, its vault, and its WAL.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use object_store::memory::InMemory;
use pgvault_core::backup::{BackupOptions, CensusOptions, backup};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::wal::Touched;
use pgvault_core::postgres::{ConnInfo, ControlFile, Lsn, SegmentName, SegmentSize, TimelineId, WalSegNo};
use pgvault_core::progress::{Progress, SharedProgress, Silent};
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::snapshot::Manifest;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_verify::process::{Install, Outcome, Server, ServerBuilder};
use tempfile::TempDir;

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap()
}

pub(crate) struct Place {
    pub(crate) server: Server,
    cluster: Cluster,
    folder: TempDir,
}

/// Holds the copying up, so that there is time to count in a cluster that is copied at once.
#[derive(Debug)]
struct Slow(Duration);

impl Progress for Slow {
    fn phase(&self, name: &'static str, _: Option<u64>) {
        if name == "copy" {
            std::thread::sleep(self.0);
        }
    }

    fn advance(&self, _: u64) {}
}

pub(crate) const SIZE: u32 = 1 << 20;

pub(crate) fn size() -> SegmentSize {
    SegmentSize::try_from(SIZE).unwrap()
}

pub(crate) fn builder() -> ServerBuilder {
    Server::builder(&Install::for_tests().unwrap())
        .wal_segment_mib(SIZE >> 20)
        .config("fsync = off")
        .config("shared_buffers = 32MB")
        .config("max_wal_senders = 10")
        .config("max_prepared_transactions = 10")
        .config("wal_keep_size = '2GB'")
        .config("max_wal_size = '2GB'")
        // Nothing is removed, so no file takes another name while it is read.
        .config("wal_recycle = off")
        .config("checkpoint_timeout = '1h'")
}

impl Place {
    pub(crate) fn new(builder: ServerBuilder) -> Self {
        let server = builder.start().unwrap();
        let control = fs::read(server.pgdata().join("global/pg_control")).unwrap();
        let name = ClusterName::new("main", ControlFile::parse(&control).unwrap().system_identifier).unwrap();
        let identity = age::x25519::Identity::generate();
        let cluster = runtime().block_on(async {
            let store = Store::new(Arc::new(InMemory::new()), "memory:///", StoreOptions::default());
            let vault = Vault::create(store, Env::default()).await.unwrap().0;
            assert!(vault.create_cluster(&name, &[Wrap::Recipient(identity.to_public().to_string())]).await.unwrap());
            let secret = identity.to_string().expose_secret().to_owned();
            vault.unlock(&name, &Unlock::Identity(secret.into())).await.unwrap()
        });
        let folder = tempfile::Builder::new()
            .prefix("pgvault-census-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap();
        server.account().own(folder.path()).unwrap();
        Self { server, cluster, folder }
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// A file or folder that the server's account owns.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn connection(&self, more: &str) -> ConnInfo {
        ConnInfo::parse(&format!("{} {more}", self.server.conninfo()), &|_| None).unwrap()
    }

    /// A standby of the server.
    pub(crate) fn standby(&self) -> Server {
        let data = self.path("standby");
        let mut command = self.server.client("pg_basebackup").unwrap();
        command.args(["--checkpoint=fast", "--pgdata"]).arg(&data);
        assert!(command.output().unwrap().status.success());
        let signal = data.join("standby.signal");
        fs::write(&signal, "").unwrap();
        self.server.account().own(&signal).unwrap();
        Server::adopt(self.server.install(), &data).option("primary_conninfo", self.server.conninfo()).start().unwrap()
    }

    /// A backup that counts for as long as it needs in a small cluster, or not at all.
    pub(crate) fn options(&self, local: bool, hold_up: Duration) -> BackupOptions {
        let progress: SharedProgress = if hold_up.is_zero() { Arc::new(Silent) } else { Arc::new(Slow(hold_up)) };
        BackupOptions {
            connection: self.connection(""),
            pgdata: local.then(|| self.server.pgdata().to_path_buf()),
            level: 1,
            workers: 1,
            labels: BTreeMap::new(),
            strict: true,
            spread_checkpoint: false,
            archive_patience: Some(Duration::ZERO),
            as_of: None,
            full: false,
            census: Some(CensusOptions { budget: Duration::from_secs(30), still_only: false, ..CensusOptions::default() }),
            progress,
        }
    }

    pub(crate) fn backup(&self, options: &BackupOptions) -> Manifest {
        runtime().block_on(async { Box::pin(backup(&self.cluster, options)).await.unwrap() })
    }

    #[track_caller]
    pub(crate) fn sql(&self, database: &str, text: &str) -> String {
        self.server.psql_in(database, text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// Where the server's WAL is; what lies before it is on disk.
    pub(crate) fn lsn(&self) -> Lsn {
        // The commit that follows the record brings it to the disk.
        self.sql("postgres", "select pg_logical_emit_message(true, 'here', '')").parse().unwrap()
    }

    /// What the WAL from `start` to `until` did, as the server has it on its disk.
    pub(crate) fn touched(&self, start: Lsn, until: Lsn) -> Touched {
        let system = self.cluster.name().system_id;
        let mut touched = Touched::new(system, size(), TimelineId(1), None, start, until);
        while !touched.is_fed() {
            let at = touched.position();
            let name = SegmentName::new(TimelineId(1), WalSegNo::containing(at, size()), size());
            let bytes = fs::read(self.server.pgdata().join("pg_wal").join(name.to_string())).unwrap();
            touched.feed(at, &bytes);
        }
        assert!(touched.is_complete(), "{start} to {until}: {:?}", touched.fault());
        touched
    }

    /// Restores a backup, recovers it to a position, and promotes it.
    pub(crate) fn restore(&self, manifest: &Manifest, to: Lsn) -> Copy {
        let shm = Path::new("/dev/shm");
        let folder = if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() };
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let pgdata = folder.path().join("data");
        runtime().block_on(async {
            let plan = plan(&self.cluster, &Target::Immediate, PlanOptions { backup: Some(manifest.id), timeline: None });
            let options = RestoreOptions {
                pgdata: pgdata.clone(),
                delta: false,
                tablespace_mapping: BTreeMap::new(),
                restore_command: RestoreCommand { program: "false".into(), global_arguments: Vec::new(), arguments: Vec::new() },
                action: TargetAction::Pause,
                archive_off: false,
                workers: 1,
                progress: Arc::new(Silent),
            };
            drop(restore(&self.cluster, &plan.await.unwrap(), &options).await.unwrap());
        });
        let from = self.server.pgdata().join("pg_wal");
        let settings = pgdata.join("postgresql.auto.conf");
        let text = fs::read_to_string(&settings).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("recovery_target")).collect();
        fs::write(&settings, lines.join("\n")).unwrap();
        let mut server = Server::adopt(self.server.install(), &pgdata)
            .option("restore_command", format!("cp {}/%f %p", from.display()))
            .option("recovery_target_lsn", to.to_string())
            // A copy that is only paused keeps the locks of transactions in progress.
            .option("recovery_target_action", "promote")
            .option("fsync", "off")
            .launch()
            .unwrap();
        let outcome = server.wait_until_paused_or_promoted(Duration::from_secs(120)).unwrap();
        assert_eq!(outcome, Outcome::Promoted);
        let reached = server.psql("select pg_last_wal_replay_lsn()").unwrap().parse().unwrap();
        Copy { server, reached, _folder: folder }
    }
}

/// A restored cluster.
pub(crate) struct Copy {
    pub(crate) server: Server,
    pub(crate) reached: Lsn,
    _folder: TempDir,
}
