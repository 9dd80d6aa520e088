//! A cluster, its vault and its archive; what is restored from them, and servers that know nothing of pgvault.

#![expect(clippy::unwrap_used, reason = "a failure is a panic")]

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgvault_core::backup::{BackupOptions, backup};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, ControlFile, Lsn};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{Plan, PlanOptions, plan};
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::Store;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_core::wal::push::push;
use pgvault_verify::process::{Install, Mode, Server};
use pgvault_verify::side::{Side, SideOptions};
use tempfile::TempDir;

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    folder: TempDir,
    counter: AtomicU32,
}

/// A directory that was restored, and the plan it was restored by.
pub(crate) struct Restored {
    pub(crate) plan: Plan,
    pub(crate) pgdata: PathBuf,
}

/// What a server comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Open {
    Paused,
    Promoted,
}

impl World {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("pgvault-side-it-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap();
        let archive = folder.path().join("archive");
        fs::create_dir(&archive).unwrap();
        let server = Server::builder(&Install::for_tests().unwrap())
            .wal_segment_mib(1)
            .config("fsync = off\nshared_buffers = 32MB\nmax_wal_senders = 10\nlisten_addresses = '127.0.0.1'\ncluster_name = 'the-shop'")
            .config(format!("archive_mode = on\narchive_command = 'cp %p {}/%f'", archive.display()))
            .start()
            .unwrap();
        server.account().own(&archive).unwrap();
        // What a directory calls for WAL when nobody isolates it: the archive, and nothing when that has ended.
        let script = folder.path().join("fetch");
        fs::write(
            &script,
            format!(
                "#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\n[ -f '{0}'/\"$1\" ] || exit 1\ncp '{0}'/\"$1\" \"$2\"\n",
                archive.display()
            ),
        )
        .unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let control = fs::read(server.pgdata().join("global/pg_control")).unwrap();
        let name = ClusterName::new("main", ControlFile::parse(&control).unwrap().system_identifier).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let cluster = runtime.block_on(async {
            let vault = Vault::create(Store::in_memory(), Env::default()).await.unwrap().0;
            let key = || "correct horse".to_owned();
            assert!(vault.create_cluster(&name, &[Wrap::Passphrase(key().into())]).await.unwrap());
            vault.unlock(&name, &Unlock::Passphrase(key().into())).await.unwrap()
        });
        Self { server, cluster, runtime, folder, counter: AtomicU32::new(0) }
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    #[track_caller]
    pub(crate) fn sql(&self, text: &str) -> String {
        self.server.psql(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    pub(crate) fn backup(&mut self) {
        let options = BackupOptions {
            connection: ConnInfo::parse(&self.server.conninfo(), &|_| None).unwrap(),
            pgdata: Some(self.server.pgdata().to_path_buf()),
            level: 1,
            workers: 1,
            labels: BTreeMap::new(),
            strict: true,
            spread_checkpoint: false,
            archive_patience: Some(Duration::ZERO),
            as_of: None,
            full: false,
            census: None,
            progress: Arc::new(Silent),
        };
        let _ = self.runtime.block_on(async { Box::pin(backup(&self.cluster, &options)).await.unwrap() });
    }

    /// Ends the open segment and brings everything into the vault.
    pub(crate) fn archive(&self) {
        let name = self.sql("select pg_create_restore_point('end') is null; select pg_walfile_name(pg_current_wal_insert_lsn())");
        let name = name.lines().last().unwrap().to_owned();
        let _ = self.sql("select pg_switch_wal()");
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.sql(&format!("select coalesce(last_archived_wal, '') >= '{name}' from pg_stat_archiver")) != "t" {
            assert!(Instant::now() < deadline, "{name} is not archived");
            std::thread::sleep(Duration::from_millis(25));
        }
        self.push();
    }

    /// Of a server that was stopped for good, also the segment that it ended in.
    pub(crate) fn archive_all(&self) {
        let archive = self.folder.path().join("archive");
        for entry in fs::read_dir(self.server.pgdata().join("pg_wal")).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let has_ended = self.checkpoint().0 >> 20;
            let number = u64::from_str_radix(name.get(16..).unwrap_or_default(), 16);
            if name.len() == 24 && number.is_ok_and(|number| number <= has_ended) {
                let _ = fs::copy(entry.path(), archive.join(&name)).unwrap();
            }
        }
        self.server.account().own(&archive).unwrap();
        self.push();
    }

    fn push(&self) {
        let mut files: Vec<_> = fs::read_dir(self.folder.path().join("archive")).unwrap().flatten().map(|e| e.path()).collect();
        files.retain(|path| path.extension().is_none());
        files.sort();
        self.runtime.block_on(async {
            for path in files {
                let _ = push(&self.cluster, &path).await.unwrap();
            }
        });
    }

    /// The last checkpoint of a server that has stopped.
    pub(crate) fn checkpoint(&self) -> Lsn {
        let control = fs::read(self.server.pgdata().join("global/pg_control")).unwrap();
        ControlFile::parse(&control).unwrap().checkpoint
    }

    pub(crate) fn restore(&self, target: &str, action: TargetAction) -> Restored {
        let pgdata = self.folder.path().join(format!("restored{}", self.counter.fetch_add(1, Ordering::Relaxed)));
        let plan = self.runtime.block_on(async {
            let mut plan = plan(&self.cluster, &target.parse().unwrap(), PlanOptions::default()).await.unwrap();
            plan.pin();
            let options = RestoreOptions {
                pgdata: pgdata.clone(),
                delta: false,
                tablespace_mapping: BTreeMap::new(),
                restore_command: RestoreCommand {
                    program: self.folder.path().join("fetch"),
                    global_arguments: Vec::new(),
                    arguments: Vec::new(),
                },
                action,
                archive_off: false,
                workers: 1,
                progress: Arc::new(Silent),
            };
            drop(restore(&self.cluster, &plan, &options).await.unwrap());
            plan
        });
        Restored { plan, pgdata }
    }

    pub(crate) fn options(&self) -> SideOptions {
        SideOptions {
            programs: vec![self.server.install().bin().to_path_buf()],
            timeout: Duration::from_secs(120),
            ..SideOptions::default()
        }
    }

    pub(crate) async fn start_in(&self, restored: &Restored) -> pgvault_core::Result<Side> {
        Box::pin(Side::start(&self.cluster, &restored.plan, &restored.pgdata, &self.options())).await
    }

    #[track_caller]
    pub(crate) fn start(&self, restored: &Restored) -> Side {
        self.block_on(self.start_in(restored)).unwrap_or_else(|error| panic!("{error}"))
    }

    fn plain(&self, restored: &Restored) -> Command {
        let mut command = Command::new(self.server.install().program("postgres").unwrap());
        let _ = command.arg("-D").arg(&restored.pgdata).current_dir("/tmp").stdin(Stdio::null());
        let _ = self.server.account().apply(&mut command);
        command
    }

    /// Starts the server as its owner would, with nothing but a place for its socket, and waits for the end of recovery.
    #[track_caller]
    pub(crate) fn start_plainly(&self, restored: &Restored, wanted: Open) -> Plain {
        let sockets = self.folder.path().join(format!("s{}", self.counter.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&sockets).unwrap();
        self.server.account().own(&sockets).unwrap();
        let log = sockets.join("log");
        let file = fs::File::create(&log).unwrap();
        let mut command = self.plain(restored);
        // A port that the original does not have.
        let port = (self.server.port() % 20_000) + 30_000;
        let _ = command.args(["-c", &format!("unix_socket_directories={}", sockets.display()), "-c", &format!("port={port}")]);
        let _ = command.stdout(file.try_clone().unwrap()).stderr(file);
        let mut plain =
            Plain { child: command.spawn().unwrap(), psql: self.server.install().client("psql").unwrap(), sockets, port };
        let state = match wanted {
            Open::Paused => "select pg_is_in_recovery() and pg_get_wal_replay_pause_state() = 'paused'",
            Open::Promoted => "select not pg_is_in_recovery()",
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while plain.ask(state).as_deref() != Some("t") {
            let ended = plain.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "{wanted:?} of {} {}: {ended:?}\n{}",
                restored.plan.target,
                restored.pgdata.display(),
                fs::read_to_string(&log).unwrap()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        plain
    }

    /// Nobody's start of it succeeds.
    #[track_caller]
    pub(crate) fn refuses_to_start(&self, restored: &Restored) {
        // What root has restored is root's; whoever wants to start it has it given.
        self.server.account().own(&restored.pgdata).unwrap();
        let ran = self.plain(restored).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!ran.status.success() && said.contains("no socket created for listening"), "{} {said}", ran.status);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.server.stop(Mode::Immediate);
    }
}

/// A server that was started by hand; ends with its value.
pub(crate) struct Plain {
    child: Child,
    psql: PathBuf,
    sockets: PathBuf,
    port: u16,
}

impl Plain {
    fn ask(&self, text: &str) -> Option<String> {
        let mut command = Command::new(&self.psql);
        let _ = command.args(["-XqAt", "-U", "postgres", "-d", "postgres", "-p", &self.port.to_string(), "-c", text]);
        let ran = command.arg("-h").arg(&self.sockets).env_remove("PGOPTIONS").output().unwrap();
        ran.status.success().then(|| String::from_utf8_lossy(&ran.stdout).trim_end().to_owned())
    }

    #[track_caller]
    pub(crate) fn sql(&self, text: &str) -> String {
        self.ask(text).unwrap_or_else(|| panic!("{text}"))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap_or_default()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        }
        let _ = self.child.wait();
    }
}

/// The process that started this one.
pub(crate) fn parent_of(pid: u32) -> u32 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    text.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// How many TCP sockets a process listens on.
pub(crate) fn listening(pid: u32) -> usize {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            fs::read_link(entry.path()).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(ToOwned::to_owned)
        })
        .collect();
    let listens = |name: &str| {
        let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("net").join(name)).unwrap_or_default();
        // Columns of the kernel: state 0A listens, the tenth is the inode.
        text.lines()
            .filter(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                columns.get(3) == Some(&"0A") && columns.get(9).is_some_and(|inode| sockets.iter().any(|own| own == inode))
            })
            .count()
    };
    listens("tcp") + listens("tcp6")
}
