//! Throwaway servers on a real PostgreSQL, of the version in `PGVAULT_TEST_PG`.

#![expect(clippy::unwrap_used, reason = "also in the helpers of a test, a failure is a panic")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgvault_verify::process::{Account, Auth, Error, Install, Mode, Outcome, Server};
use tempfile::TempDir;

fn install() -> Install {
    Install::for_tests().unwrap()
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// A folder that the server's account can write to.
fn folder() -> TempDir {
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    Account::unprivileged().unwrap().own(folder.path()).unwrap();
    folder
}

fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_server_starts_answers_and_is_gone_with_its_value() {
    let install = install();
    let mut server = Server::builder(&install).config("work_mem = '5MB'").start().unwrap();
    let major: u32 = server.psql("show server_version_num").unwrap()[..2].parse().unwrap();
    assert_eq!(major, install.version().major());
    assert_eq!(server.psql("show work_mem").unwrap(), "5MB");
    assert_eq!(server.psql("show data_checksums").unwrap(), "on");
    assert_eq!(server.psql("show listen_addresses").unwrap(), "");
    assert_eq!(server.psql("create database other; select 1; select 'zwölf'").unwrap(), "1\nzwölf");
    assert_eq!(server.psql_in("other", "select current_database()").unwrap(), "other");
    let direct = std::process::Command::new(install.client("psql").unwrap())
        .args(["-XqAt", "-c", "select 42", "-d", &server.conninfo()])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&direct.stdout), "42\n");

    let first = server.pid().unwrap();
    server.restart(Mode::Fast).unwrap();
    let second = server.pid().unwrap();
    assert_ne!(first, second);
    assert!(!exists(first) && exists(second));
    assert!(matches!(server.start(), Err(Error::State { state: "running", .. })));
    let folder = server.pgdata().to_path_buf();
    drop(server);
    assert!(!exists(second));
    assert!(!folder.exists());
}

#[test]
fn a_killed_server_leaves_no_process_and_recovers_what_was_committed() {
    let mut server = Server::builder(&install()).start().unwrap();
    server.psql("create table t as select generate_series(1, 1000) n").unwrap();
    let backend: u32 =
        server.psql("select pid from pg_stat_activity where backend_type = 'checkpointer'").unwrap().parse().unwrap();
    server.kill9().unwrap();
    assert!(!server.is_running());
    let state = fs::read_to_string(format!("/proc/{backend}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
    assert!(matches!(server.stop(Mode::Fast), Err(Error::State { state: "not running", .. })));
    server.start().unwrap();
    assert_eq!(server.psql("select count(*) from t").unwrap(), "1000");
    server.stop(Mode::Immediate).unwrap();
    server.start().unwrap();
    assert_eq!(server.psql("select count(*) from t").unwrap(), "1000");
}

#[test]
fn passwords_checksums_segment_size_and_port_are_as_asked() {
    let folder = folder();
    let pgdata = folder.path().join("data");
    let server = Server::builder(&install())
        .pgdata(&pgdata)
        .auth(Auth::Scram("s e'cret".to_owned()))
        .user("owner")
        .checksums(false)
        .wal_segment_mib(1)
        .tcp(true)
        .start()
        .unwrap();
    assert_eq!(server.psql("show data_checksums; show wal_segment_size; select current_user").unwrap(), "off\n1MB\nowner");
    let mut client = server.client("psql").unwrap();
    client.args(["-XqAtw", "-c", "select 1"]).env("PGHOST", "127.0.0.1");
    assert_eq!(String::from_utf8_lossy(&client.output().unwrap().stdout), "1\n");
    let refused = client.env_remove("PGPASSWORD").output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no password supplied"));
    assert!(!format!("{server:?}").contains("cret"));
    drop(server);
    assert!(pgdata.join("PG_VERSION").is_file(), "a data directory of the caller's stays");

    let owner = fs::metadata(folder.path()).unwrap().uid();
    fs::write(folder.path().join("file"), "").unwrap();
    let own = fs::metadata(folder.path().join("file")).unwrap().uid();
    let error = Server::builder(&install()).pgdata(folder.path()).start().unwrap_err();
    assert!(error.to_string().contains("directory not empty"), "{error}");
    assert_eq!(fs::metadata(folder.path()).unwrap().uid(), owner);
    assert_eq!(fs::metadata(folder.path().join("file")).unwrap().uid(), own);
}

#[test]
fn failures_carry_what_the_programs_said() {
    let error = Server::builder(&install()).config("work_mem = 'plenty'").start().unwrap_err();
    assert!(matches!(error, Error::Ended { .. }));
    assert!(error.to_string().contains("invalid value for parameter \"work_mem\": \"plenty\""), "{error}");

    let error = Server::builder(&install()).wal_segment_mib(3).start().unwrap_err();
    assert!(error.to_string().contains("initdb") && error.to_string().contains("power of "), "{error}");

    let server = Server::builder(&install()).start().unwrap();
    let error = server.psql("select 1; select * from missing; select 2").unwrap_err();
    assert!(matches!(&error, Error::Command { .. }));
    assert!(error.to_string().contains("relation \"missing\" does not exist"), "{error}");
}

#[test]
fn large_statements_and_large_answers_do_not_block_each_other() {
    let server = Server::builder(&install()).start().unwrap();
    let sql = "select repeat('x', 1000);\n".repeat(5000);
    assert_eq!(server.psql(&sql).unwrap().len(), 5000 * 1001 - 1);
}

#[test]
fn an_adopted_copy_is_cut_off_from_its_original_and_keeps_its_files() {
    let install = install();
    let folder = folder();
    let marker = folder.path().join("ran");
    let mut original = Server::builder(&install)
        .config("archive_mode = on")
        .config(format!("archive_command = 'touch {}'", marker.display()))
        .config("max_connections = 37")
        .config("external_pid_file = '/tmp/pgvault-must-not-appear.pid'")
        .config("primary_conninfo = 'host=production.invalid'")
        .config("shared_buffers = '256MB'")
        .start()
        .unwrap();
    original.psql("create table t as select 1 n").unwrap();
    original.stop(Mode::Fast).unwrap();
    let _ = fs::remove_file(&marker);
    let copied = folder.path().join("copy");
    copy(original.pgdata(), &copied);
    // As in a restored Debian cluster whose configuration came along.
    let line = format!("data_directory = '{}'\n", original.pgdata().display());
    let configuration = fs::read_to_string(copied.join("postgresql.conf")).unwrap() + &line;
    fs::write(copied.join("postgresql.conf"), &configuration).unwrap();
    original.start().unwrap();

    let adopted = Server::adopt(&install, &copied).option("work_mem", "7MB").start().unwrap();
    assert_eq!(adopted.psql("show data_directory").unwrap(), copied.display().to_string());
    assert_eq!(adopted.psql("show archive_mode; show primary_conninfo; show listen_addresses").unwrap(), "off\n\n");
    assert_eq!(adopted.psql("show shared_buffers; show work_mem; show max_connections").unwrap(), "64MB\n7MB\n37");
    adopted.psql("select pg_switch_wal(); select pg_switch_wal()").unwrap();
    assert!(!marker.exists());
    assert_eq!(fs::read_to_string(copied.join("postgresql.conf")).unwrap(), configuration);

    // A second server on the same directory is refused by PostgreSQL, and stopping it leaves the first alone.
    let error = Server::adopt(&install, &copied).start().unwrap_err();
    assert!(error.to_string().contains("lock file \"postmaster.pid\" already exists"), "{error}");
    assert_eq!(adopted.psql("select n from t").unwrap(), "1");
    drop(adopted);
    assert_eq!(original.psql("select n from t").unwrap(), "1");

    // Debian keeps postgresql.conf and pg_hba.conf elsewhere, so that a physical backup has none.
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(copied.join(name)).unwrap();
    }
    let adopted = Server::adopt(&install, &copied).start().unwrap();
    assert_eq!(adopted.psql("show max_connections").unwrap(), "37");
    drop(adopted);
    assert!(!copied.join("postgresql.conf").exists());

    fs::write(copied.join("PG_VERSION"), "9.6\n").unwrap();
    let error = Server::adopt(&install, &copied).start().unwrap_err();
    assert!(matches!(error, Error::Version { .. }), "{error}");
}

/// A base backup with its archive, a named restore point and a row on each side of it.
struct Backup {
    folder: TempDir,
    install: Install,
}

impl Backup {
    fn take() -> Self {
        let install = install();
        let folder = folder();
        let path = folder.path().display();
        let archive = folder.path().join("archive");
        fs::create_dir(&archive).unwrap();
        Account::unprivileged().unwrap().own(&archive).unwrap();
        let server = Server::builder(&install)
            .config("archive_mode = on")
            .config(format!("archive_command = 'cp %p {path}/archive/%f'"))
            .config(format!("restore_command = 'cp {path}/archive/%f %p'"))
            .start()
            .unwrap();
        server.psql("create table t as select 1 n").unwrap();
        let backup = server
            .client("pg_basebackup")
            .unwrap()
            .args(["-X", "none", "-c", "fast", "-D"])
            .arg(folder.path().join("base"))
            .output()
            .unwrap();
        assert!(backup.status.success(), "{}", String::from_utf8_lossy(&backup.stderr));
        let last = server
            .psql(
                "insert into t values (2); select pg_create_restore_point('here') \\g /dev/null
                 insert into t values (3); select pg_walfile_name(pg_current_wal_lsn()); select pg_switch_wal() \\g /dev/null",
            )
            .unwrap();
        for _ in 0..200 {
            if archive.join(&last).is_file() && server.psql("select last_archived_wal from pg_stat_archiver").unwrap() >= last {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { folder, install }
    }

    fn restored(&self, name: &str) -> PathBuf {
        let pgdata = self.folder.path().join(name);
        copy(&self.folder.path().join("base"), &pgdata);
        fs::write(pgdata.join("recovery.signal"), "").unwrap();
        pgdata
    }
}

#[test]
fn the_end_of_recovery_is_told_apart() {
    let backup = Backup::take();
    let recover = |name: &str, target: &str, action: &str| {
        let mut server = Server::adopt(&backup.install, backup.restored(name))
            .option("recovery_target_name", target)
            .option("recovery_target_action", action)
            .launch()
            .unwrap();
        let outcome = server.wait_until_paused_or_promoted(Duration::from_secs(60));
        (server, outcome)
    };

    let (server, outcome) = recover("paused", "here", "pause");
    assert_eq!(outcome.unwrap(), Outcome::Paused);
    assert_eq!(server.psql("select max(n), pg_is_in_recovery() from t").unwrap(), "2|t");
    // pg_basebackup ran as this process; the server's account became the owner.
    assert_eq!(fs::metadata(server.pgdata()).unwrap().uid(), server.account().uid());

    let (server, outcome) = recover("promoted", "here", "promote");
    assert_eq!(outcome.unwrap(), Outcome::Promoted);
    assert_eq!(server.psql("insert into t values (9); select max(n) from t").unwrap(), "9");

    let (mut server, outcome) = recover("stopped", "here", "shutdown");
    assert_eq!(outcome.unwrap(), Outcome::ShutDown);
    assert!(!server.is_running());

    let (_server, outcome) = recover("absent", "nowhere", "pause");
    let error = outcome.unwrap_err();
    assert!(error.to_string().contains("recovery ended before configured recovery target was reached"), "{error}");

    // Paused, but not at the target.
    let pgdata = backup.restored("small");
    let mut server = Server::adopt(&backup.install, pgdata).option("max_connections", "10").launch().unwrap();
    let error = server.wait_until_paused_or_promoted(Duration::from_secs(60)).unwrap_err();
    assert!(error.to_string().contains("max_connections"), "{error}");
}

#[test]
fn a_folder_that_the_account_cannot_enter_is_named() {
    let account = Account::unprivileged().unwrap();
    if rustix::process::geteuid().as_raw() == account.uid() {
        return; // Without a change of identity there is nothing to check.
    }
    let private = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap();
    let error = Server::builder(&install()).pgdata(private.path().join("data")).start().unwrap_err();
    assert!(matches!(error, Error::Account(_)));
    assert!(error.to_string().contains(&format!("cannot enter {}", private.path().display())), "{error}");
}
