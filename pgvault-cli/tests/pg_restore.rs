//! What a restore leaves behind: the right bytes, and nothing that starts when it should not.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Running, Site, amcheck, assert_same_tree, files_below, lsn, run, sql, switch_and_archive, tree, wait_until};
use pgvault_verify::process::{Mode, Outcome, Server};

/// A cluster with something in it, archiving; one backup.
fn site_with_a_backup(site: &Site) -> Server {
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(
        &server,
        "create table t(id int primary key, pad text); insert into t select g, repeat(md5(g::text), 20) from generate_series(1, 20000) g; \
         alter system set work_mem = '5MB'; create unlogged table u(id int); insert into u values (1)",
    );
    let _ = site.backup("local");
    let _ = sql(&server, "insert into t values (20001, 'after the backup')");
    let _ = switch_and_archive(&server);
    server
}

fn copy(site: &Site, from: &Path, name: &str) -> PathBuf {
    let to = site.path(name);
    let mut command = site.command("cp");
    command.arg("-a").arg(from).arg(&to);
    assert_eq!(run(command).code, Some(0));
    to
}

/// Relation files of a database with at least so many bytes, in order.
fn relations(pgdata: &Path, least: u64) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = files_below(&pgdata.join("base"))
        .into_iter()
        .filter(|path| path.file_name().unwrap().to_str().unwrap().bytes().all(|b| b.is_ascii_digit()))
        .filter(|path| fs::metadata(path).unwrap().len() >= least)
        .collect();
    found.sort();
    found
}

fn delta(site: &Site, pgdata: &Path) -> serde_json::Value {
    site.summary(&["restore", "--to", "immediate", "--delta", "--pgdata", pgdata.to_str().unwrap()])
}

#[test]
fn t27_a_delta_restore_over_a_dirty_directory_equals_a_fresh_one() {
    let site = Site::new();
    let _server = site_with_a_backup(&site);
    let fresh = site.restore("immediate", &[]);

    // Nothing is dirty: nothing but the last steps is written.
    let clean = copy(&site, &fresh, "clean");
    let summary = delta(&site, &clean);
    assert!(summary["bytes_written"].as_u64().unwrap() < 100_000, "{summary}");
    assert_same_tree(&fresh, &clean);

    let dirty = copy(&site, &fresh, "dirty");
    let files = relations(&dirty, 24 << 10);
    assert!(files.len() > 9, "{files:?}");
    // Extended, truncated to pages, truncated inside a page, emptied.
    fs::OpenOptions::new().append(true).open(&files[0]).unwrap().write_all(&vec![7; 3 * 8192]).unwrap();
    fs::OpenOptions::new().write(true).open(&files[1]).unwrap().set_len(8192).unwrap();
    fs::OpenOptions::new().write(true).open(&files[2]).unwrap().set_len(9000).unwrap();
    fs::write(&files[3], b"").unwrap();
    // Other contents with the same length and the same times, at the end and in the middle; once in the largest file.
    let largest = files.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    for (path, at) in [(&files[4], 0), (&files[5], 12_345), (largest, fs::metadata(largest).unwrap().len() - 1)] {
        let meta = fs::metadata(path).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
        file.set_modified(meta.modified().unwrap()).unwrap();
        drop(file);
        assert_eq!(fs::metadata(path).unwrap().len(), meta.len());
        assert_eq!(fs::metadata(path).unwrap().modified().unwrap(), meta.modified().unwrap());
    }
    // Missing.
    fs::remove_file(&files[6]).unwrap();
    fs::remove_file(dirty.join("PG_VERSION")).unwrap();
    // Strangers: files, folders full of them, links.
    fs::create_dir_all(dirty.join("base/99999/deep")).unwrap();
    fs::write(dirty.join("base/99999/deep/1"), b"x").unwrap();
    fs::write(dirty.join("standby.signal"), b"").unwrap();
    fs::write(dirty.join("pg_wal/000000010000000000000077"), b"old wal").unwrap();
    fs::write(dirty.join("backup_label.old"), b"x").unwrap();
    let victim = site.write("victim", "untouched");
    let victims = site.directory("victims");
    fs::write(victims.join("file"), b"untouched").unwrap();
    symlink(&victim, dirty.join("a link")).unwrap();
    symlink(&victims, dirty.join("base/88888")).unwrap();
    // A link where a file belongs, and where a folder belongs; a folder where a file belongs, and a file for a folder.
    fs::remove_file(&files[7]).unwrap();
    symlink(&victim, &files[7]).unwrap();
    fs::remove_dir_all(dirty.join("pg_wal")).unwrap();
    symlink(&victims, dirty.join("pg_wal")).unwrap();
    fs::remove_file(&files[8]).unwrap();
    fs::create_dir(&files[8]).unwrap();
    fs::write(files[8].join("inside"), b"x").unwrap();
    fs::remove_dir_all(dirty.join("pg_notify")).unwrap();
    fs::write(dirty.join("pg_notify"), b"x").unwrap();
    // A file that somebody else's name leads to as well, as in a copy made with `cp -al`.
    let shared = site.path("shared");
    fs::hard_link(&files[9], &shared).unwrap();
    fs::OpenOptions::new().write(true).open(&shared).unwrap().write_all_at(b"theirs", 100).unwrap();
    let theirs = fs::read(&shared).unwrap();
    // Other modes.
    fs::set_permissions(dirty.join("pg_hba.conf"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(dirty.join("base"), fs::Permissions::from_mode(0o755)).unwrap();
    site.account.own(&dirty).unwrap();

    let _ = delta(&site, &dirty);
    assert_same_tree(&fresh, &dirty);
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    assert_eq!(fs::read(victims.join("file")).unwrap(), b"untouched");
    assert_eq!(tree(&victims).len(), 1);
    assert_eq!(fs::read(&shared).unwrap(), theirs, "written through a hard link");

    // A directory that was lived in.
    let lived = copy(&site, &fresh, "lived");
    let (mut server, outcome) = site.recover(&lived);
    assert_eq!(outcome, Outcome::Paused);
    let _ = sql(&server, "select pg_promote()");
    let _ = sql(&server, "delete from t where id % 3 = 0; create table other as select * from t; vacuum full t; checkpoint");
    server.stop(Mode::Fast).unwrap();
    drop(server);
    let _ = delta(&site, &lived);
    assert_same_tree(&fresh, &lived);
    let (server, _) = site.recover(&lived);
    assert_eq!(sql(&server, "select count(*) from t"), "20000");
    let _ = sql(&server, "select pg_promote()");
    amcheck(&server);
}

#[test]
fn r15_an_interrupted_restore_does_not_start_and_is_completed_by_delta() {
    let site = Site::new();
    let _server = site_with_a_backup(&site);
    let fresh = site.restore("immediate", &[]);
    let mut cut = 0;
    for round in 0..6u64 {
        let pgdata = site.path(format!("cut{round}"));
        let mut command = site.pgvault(&["restore", "--to", "immediate", "--pgdata", pgdata.to_str().unwrap()]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = Running::new(command.spawn().unwrap());
        // From the first file on, later and later.
        let enough = usize::try_from(round * 160).unwrap();
        wait_until("the restore has begun", Duration::from_secs(30), || {
            !child.is_running() || (pgdata.join("base").is_dir() && files_below(&pgdata).len() > enough)
        });
        child.kill9();
        if pgdata.join("global/pg_control").exists() {
            continue;
        }
        cut += 1;
        assert!(pgdata.join("pgvault.restore-unfinished").exists());
        // PostgreSQL refuses it, if it gets as far as having a version.
        if fs::read(pgdata.join("PG_VERSION")).is_ok_and(|version| version.starts_with(b"1")) {
            let error = Server::adopt(&site.install, &pgdata).start().unwrap_err().to_string();
            assert!(error.contains("pg_control") || error.contains("ended"), "{error}");
        }
        let _ = site.restore_into(&pgdata, "immediate", &[]).expect(2).says("not empty");
        let _ = delta(&site, &pgdata);
        let _ = fs::remove_file(pgdata.join("postmaster.opts"));
        assert_same_tree(&fresh, &pgdata);
    }
    assert!(cut >= 2, "only {cut} restores were interrupted");
    let (server, _) = site.recover(&site.path("cut0"));
    assert_eq!(sql(&server, "select count(*) from t"), "20000");
}

#[test]
fn t12_a_restored_directory_is_safe_against_wrong_handling() {
    let site = Site::new();
    let mut original = site_with_a_backup(&site);

    // T12: without backup_label the server must not start from the wrong place, though all the WAL for it is there.
    let unlabelled = site.restore("latest", &[]);
    for segment in files_below(&original.pgdata().join("pg_wal")) {
        let name = segment.file_name().unwrap();
        if name.len() == 24 {
            fs::copy(&segment, unlabelled.join("pg_wal").join(name)).unwrap();
        }
    }
    site.account.own(&unlabelled).unwrap();
    fs::remove_file(unlabelled.join("backup_label")).unwrap();
    let refuses = || {
        let error = Server::adopt(&site.install, &unlabelled).start().unwrap_err().to_string();
        assert!(error.contains("could not locate a valid checkpoint record"), "{error}");
    };
    refuses();
    // Not even without the signal file, as after a copy of the wrong files.
    fs::remove_file(unlabelled.join("recovery.signal")).unwrap();
    refuses();

    // Modes and owners: what PostgreSQL demands.
    let restored = site.restore("latest", &[]);
    for (name, (mode, _)) in tree(&restored) {
        assert_eq!(mode & 0o077, 0, "{name} has mode {mode:o}");
    }
    let meta = fs::metadata(&restored).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o700, site.account.uid()));
    assert!(!restored.join("pgvault.restore-unfinished").exists());
    assert!(!restored.join("postmaster.pid").exists());
    assert!(restored.join("recovery.signal").is_file() && restored.join("backup_label").is_file());
    assert!(restored.join("pg_wal/archive_status").is_dir());

    // A directory with anything in it is refused; so is --delta where no cluster was, or where a server runs.
    let _ = site.restore_into(&restored, "latest", &[]).expect(2).says("not empty");
    let other = site.directory("photos");
    let _ = site.write("photos/cat", "meow");
    let _ = site.restore_into(&other, "latest", &[]).expect(2).says("not empty");
    let _ = site.restore_into(&other, "latest", &["--delta"]).expect(2).says("data directory");
    assert_eq!(fs::read(other.join("cat")).unwrap(), b"meow");
    let before = sql(&original, "select count(*) from t");
    let _ = site.restore_into(original.pgdata(), "latest", &["--delta"]).expect(2).says("postmaster.pid");
    original.restart(Mode::Immediate).unwrap();
    assert_eq!(sql(&original, "select count(*) from t"), before);
    // An empty directory that exists is fine.
    let empty = site.directory("empty");
    let _ = site.restore_into(&empty, "latest", &[]).ok();

    restored_settings(&site, &original);
}

/// Restoring a restored cluster: the settings of the first recovery give way to those of the second, others stay.
fn restored_settings(site: &Site, original: &Server) {
    let read = |pgdata: &Path| fs::read_to_string(pgdata.join("postgresql.auto.conf")).unwrap();
    let values = |text: &str, name: &str| text.lines().filter(|line| line.split([' ', '=']).next() == Some(name)).count();
    let point = sql(original, "select pg_create_restore_point('first')");
    let _ = switch_and_archive(original);
    let one = site.restore("name:first", &["--target-action", "promote"]);
    let text = read(&one);
    assert_eq!(values(&text, "restore_command"), 1, "{text}");
    assert_eq!(values(&text, "recovery_target_lsn"), 1, "{text}");
    assert_eq!(values(&text, "work_mem"), 1, "{text}");
    let (server, outcome) = site.recover(&one);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&server, "show work_mem"), "5MB");
    let _ = sql(&server, "insert into t values (30000, 'on the copy')");
    // The copy gets a vault of its own.
    site.configure_text("vault2", &server.conninfo(), Some(server.pgdata()));
    site.pgv(&["init"]).ok();
    let backup = site.backup("remote");
    assert_eq!(backup["timeline"], 2);
    let two = site.restore("immediate", &["--archive-off"]);
    let text = read(&two);
    for (name, count) in [
        ("restore_command", 1),
        ("recovery_target", 1),
        ("recovery_target_lsn", 1),
        ("recovery_target_timeline", 1),
        ("recovery_target_action", 1),
        ("archive_mode", 1),
        ("work_mem", 1),
    ] {
        assert_eq!(values(&text, name), count, "{name} in\n{text}\nafter {point}");
    }
    // A target of the recovery before must not stop this one, from wherever it is read.
    assert!(text.contains("\nrecovery_target_lsn = ''\n"), "{text}");
    let conf = two.join("postgresql.conf");
    let stale = format!("{}\nrecovery_target_lsn = '{point}'\n", std::fs::read_to_string(&conf).unwrap());
    std::fs::write(&conf, stale).unwrap();
    let (server, _) = site.recover(&two);
    assert_eq!(sql(&server, "select count(*) from t where id = 30000"), "1");
}

/// T16: a timeline that left before the backup was taken cannot be reached from it; each timeline has its own window.
#[test]
fn t16_a_timeline_that_forked_before_the_backup_is_refused() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(&server, "create table t(id int); insert into t values (1)");
    let first = site.backup("local");
    let _ = sql(&server, "insert into t values (2)");
    let now = "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let before_fork = sql(&server, now);
    let _ = sql(&server, "select pg_create_restore_point('fork'); create table more()");
    let _ = switch_and_archive(&server);

    // A copy is promoted and archives beside the original, on its own timeline.
    let copy = promoted_copy(&site, "name:fork");
    let _ = sql(&copy, "insert into t values (20)");
    let _ = switch_and_archive(&copy);
    drop(copy);

    // The original goes on.
    let _ = sql(&server, "insert into t values (3)");
    let second = site.backup("local");
    let later = sql(&server, now);
    let end = lsn(&server, "pg_current_wal_insert_lsn()");
    let _ = sql(&server, "insert into t values (4)");
    let _ = switch_and_archive(&server);

    let rows = |to: &str, more: &[&str]| {
        let (server, _) = site.restore_to(to, more);
        sql(&server, "select string_agg(id::text, ' ' order by id) from t")
    };
    assert_eq!(rows("latest", &["--timeline", "1"]), "1 2 3 4");
    assert_eq!(rows("latest", &["--timeline", "2"]), "1 2 20");
    // H8: both lived on after they parted. Neither is taken for the other, and what is the same on both is not refused.
    let refused = site.path("refused");
    for to in ["latest", &later, &format!("lsn:{end}")] {
        let ran = site.restore_into(&refused, to, &[]).expect(5).says("--timeline 1 or --timeline 2");
        let _ = ran.says("means different things").says("parted at lsn:");
    }
    assert!(!refused.exists());
    assert_eq!(rows("name:fork", &[]), "1 2");
    assert_eq!(rows(&before_fork, &[]), "1 2");
    let status = site.pgv(&["status"]).ok().says("lived on beside each other");
    assert!(status.stderr.contains("timeline 1"), "{status:?}");
    assert_eq!(site.summary(&["list"])["branches"][0]["timeline"], 1);
    assert_eq!(rows("immediate", &[]), "1 2 3");
    let id = |backup: &serde_json::Value| backup["backup_id"].as_str().unwrap().to_owned();
    assert_eq!(rows("immediate", &["--backup", &id(&first)]), "1");
    let pgdata = site.path("refused");
    let ran = site.restore_into(&pgdata, "latest", &["--timeline", "2", "--backup", &id(&second)]).expect(5);
    let _ = ran.says("not part of the history of timeline 2");
    let _ = site.restore_into(&pgdata, "latest", &["--timeline", "9"]).says("00000009");
    assert!(!pgdata.exists());
}

/// A restored directory, promoted at a target, that archives into the same vault.
fn promoted_copy(site: &Site, to: &str) -> Server {
    let pgdata = site.restore(to, &["--target-action", "promote"]);
    let command = format!("{} --config {} wal push \"%p\"", site.path("pgvault").display(), site.path("pgvault.toml").display());
    let mut copy = Server::adopt(&site.install, &pgdata)
        .option("archive_mode", "on")
        .option("archive_command", command)
        .option("fsync", "off")
        .launch()
        .unwrap();
    assert_eq!(copy.wait_until_paused_or_promoted(Duration::from_secs(60)).unwrap(), Outcome::Promoted);
    copy
}

/// R6: after a recovery in place, what the old branch had more is told and can be reached, and does not get in the way.
#[test]
fn r6_a_branch_that_was_given_up_is_left_out_and_told() {
    let site = Site::new();
    let mut server = site.start(site.cluster("main").config(site.archiving()));
    let now =
        |server: &Server| sql(server, "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    let _ = sql(&server, "create table t(id int); insert into t values (1)");
    let _ = site.backup("local");
    let _ = sql(&server, "insert into t values (2); select pg_create_restore_point('fork')");
    let _ = sql(&server, "insert into t values (3)");
    let between = now(&server);
    let _ = sql(&server, "insert into t values (4)");
    let _ = switch_and_archive(&server);
    server.stop(Mode::Fast).unwrap();

    let copy = promoted_copy(&site, "name:fork");
    let _ = sql(&copy, "insert into t values (20)");
    let after = now(&copy);
    let _ = sql(&copy, "insert into t values (21)");
    let _ = switch_and_archive(&copy);
    drop(copy);

    let rows = |to: &str, more: &[&str]| {
        let (server, _) = site.restore_to(to, more);
        sql(&server, "select string_agg(id::text, ' ' order by id) from t")
    };
    assert_eq!(rows("latest", &[]), "1 2 20 21");
    assert_eq!(rows(&after, &[]), "1 2 20");
    assert_eq!(rows("latest", &["--timeline", "1"]), "1 2 3 4");
    let plan = site.pgv(&["--output", "json", "restore", "--to", "latest", "--dry-run", "--pgdata", "unused"]).ok();
    assert_eq!(plan.json()["left_out"][0]["timeline"], 1, "{plan:?}");
    let plan = plan.says("`--timeline 1` follows it");
    assert!(!plan.json()["left_out"][0]["last"].is_null());
    // A moment at which only the old branch lived.
    let refused = site.path("refused");
    let _ = site.restore_into(&refused, &between, &[]).expect(5).says("--timeline 1 or --timeline 2");
    assert_eq!(rows(&between, &["--timeline", "1"]), "1 2 3");
    let status = site.pgv(&["status"]).ok().says("was left");
    assert!(!status.stderr.contains("beside each other"), "{status:?}");

    // H8: the old server, started by mistake, is not streamed from.
    server.start().unwrap();
    let _ = site.pgv(&["wal", "stream"]).expect(1).says("left it at").says("--any-timeline");

    // Of a heir that has archived nothing but its history, the parent's bytes behind the fork are no part.
    for name in site.vaults.names() {
        if name.contains("/wal/00000002/") && !name.ends_with(".history") {
            let _ = site.vaults.take(&name);
        }
    }
    let _ = site.restore_into(&refused, "latest", &[]).expect(5).says("without any transaction");
    assert_eq!(rows("latest", &["--timeline", "2"]), "1 2");
    assert!(!refused.exists());
}
