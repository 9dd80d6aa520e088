//! Backups that store what changed: whatever happens to a cluster, each of them restores as if it stood alone.

#![expect(
    clippy::unwrap_used,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "a test; names of objects are what they are"
)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Random, Running, Site, amcheck, full, run, sql, tree, wait_until};
use pgvault_verify::process::{Mode, Server};
use serde_json::Value;

/// Written to by nobody but those who ask, so that what is on disk after a backup's checkpoint is what was copied.
const QUIET: &str = "autovacuum = off\nbgwriter_lru_maxpages = 0\nfsync = off";

fn stored(backup: &Value) -> u64 {
    backup["stored_bytes"].as_u64().unwrap()
}

/// Files of a data directory that say something of their own in a backup, or are not in it at all.
fn is_own(path: &str) -> bool {
    let left_out = [
        "pg_wal/",
        "pg_replslot/",
        "pg_stat_tmp/",
        "pg_notify/",
        "pg_serial/",
        "pg_snapshots/",
        "pg_subtrans/",
        "pg_dynshmem/",
        "pg_stat/",
    ];
    let own = [
        "global/pg_control",
        "backup_label",
        "postgresql.auto.conf",
        "recovery.signal",
        "tablespace_map",
        "postmaster.pid",
        "postmaster.opts",
        "current_logfiles",
    ];
    left_out.iter().any(|folder| path.starts_with(folder))
        || own.contains(&path)
        || path.ends_with("pg_internal.init")
        || path.contains("pgsql_tmp")
        || path.ends_with(".log")
}

/// The files of a data directory that a backup has, with their contents, those of its tablespaces included.
fn files(pgdata: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all: BTreeMap<String, Vec<u8>> = tree(pgdata)
        .into_iter()
        .filter(|(path, (mode, _))| mode & 0o170_000 == 0o100_000 && !is_own(path))
        .map(|(path, (_, bytes))| (path, bytes))
        .collect();
    for link in std::fs::read_dir(pgdata.join("pg_tblspc")).unwrap().flatten() {
        let name = format!("pg_tblspc/{}", link.file_name().to_string_lossy());
        let inside = tree(&link.path()).into_iter().filter(|(_, (mode, _))| mode & 0o170_000 == 0o100_000);
        all.extend(inside.map(|(path, (_, bytes))| (format!("{name}/{path}"), bytes)));
    }
    // Of an unlogged relation only the init fork is in a backup.
    let unlogged: Vec<String> = all.keys().filter_map(|path| path.strip_suffix("_init").map(ToOwned::to_owned)).collect();
    all.retain(|path, _| {
        !unlogged.iter().any(|of| {
            let rest = path.strip_prefix(of.as_str());
            rest.is_some_and(|rest| rest != "_init" && (rest.is_empty() || rest.starts_with(['.', '_'])))
        })
    });
    all
}

#[track_caller]
fn assert_same(one: &BTreeMap<String, Vec<u8>>, other: &BTreeMap<String, Vec<u8>>, why: &str) {
    let mut differing = Vec::new();
    for path in one.keys().chain(other.keys().filter(|path| !one.contains_key(*path))) {
        match (one.get(path), other.get(path)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) => {
                let block = a.chunks(8192).zip(b.chunks(8192)).position(|(a, b)| a != b);
                differing.push(format!("{path}: {} and {} bytes, from block {block:?} on", a.len(), b.len()));
            }
            (a, _) => differing.push(format!("{path}: only in the {}", if a.is_some() { "first" } else { "second" })),
        }
    }
    assert!(differing.is_empty(), "{why}:\n{}", differing.join("\n"));
}

/// Backs up, and compares what the backup restores with the data directory as the backup has found it.
#[track_caller]
fn back_up_and_compare(site: &Site, server: &Server, arguments: &[&str], why: &str) -> Value {
    let backup = site.summary(&[&["backup"], arguments].concat());
    let source = files(server.pgdata());
    let (restored, places) = restore(site, &site.path("place"), &["--backup", backup["backup_id"].as_str().unwrap()]);
    assert_same(&source, &files(&restored), why);
    for folder in [restored, places] {
        let _ = std::fs::remove_dir_all(folder);
    }
    backup
}

/// Restores to where a backup is consistent, and its tablespace, if it has one, beside it.
fn restore(site: &Site, original: &Path, more: &[&str]) -> (PathBuf, PathBuf) {
    let place = site.fresh("place");
    let mapping = format!("--tablespace-mapping={}={}", original.display(), place.display());
    let mapping = original.is_dir().then_some(mapping.as_str());
    (site.restore("immediate", &[more, mapping.as_slice()].concat()), place)
}

/// Restores the newest, starts it, and asks PostgreSQL whether all is well.
fn prove(site: &Site, original: &Path, rows: &str) {
    let (pgdata, _place) = restore(site, original, &[]);
    let (mut server, _) = site.recover(&pgdata);
    if sql(&server, "select pg_is_in_recovery()") == "t" {
        let _ = sql(&server, "select pg_promote()");
    }
    assert_eq!(sql(&server, ROWS), rows);
    amcheck(&server);
    server.stop(Mode::Fast).unwrap();
    let mut checksums = site.command(site.install.program("pg_checksums").unwrap());
    checksums.args(["--check", "-D"]).arg(&pgdata);
    let ran = run(checksums);
    assert!(ran.code == Some(0) || ran.stderr.contains("not enabled"), "{ran:?}");
    drop(server);
    std::fs::remove_dir_all(pgdata).unwrap();
}

const ROWS: &str = "select count(*), sum(hashtext(t::text)::bigint) from t";

/// What can happen to a cluster between two backups. Gives its name.
fn happen(site: &Site, server: &mut Server, random: &mut Random, step: u64) -> String {
    let from = random.between(1, 60_000);
    let statements = match random.between(0, 19) {
        0..3 => format!("update t set pad = md5(pad) where id % 997 = {}", from % 997),
        3 => format!("update t set pad = md5(pad) where id between {from} and {}", from + 5000),
        4 => format!("delete from t where id between {from} and {}; vacuum t", from + 3000),
        5 => format!("insert into t select g, md5(g::text) from generate_series({0}, {0} + 20000) g", 100_000 + step * 50_000),
        6 => "vacuum full t".into(),
        7 => "truncate other; insert into other select g, repeat(md5(g::text), 3) from generate_series(1, 30000) g".into(),
        8 => "truncate other".into(),
        9 => format!("create database d{step} strategy wal_log"),
        10 => format!("create database d{step} strategy file_copy"),
        11 => {
            let gone = sql(server, "select datname from pg_database where datname ~ '^d[0-9]' order by random() limit 1");
            if gone.is_empty() { "select 1".into() } else { format!("drop database {gone}") }
        }
        12 => "alter table other set tablespace place".into(),
        13 => "alter table other set tablespace pg_default".into(),
        14 => "create unlogged table if not exists u as select g, md5(g::text) from generate_series(1, 9000) g; alter table u set unlogged".into(),
        15 => "create unlogged table if not exists u as select g, md5(g::text) from generate_series(1, 9000) g; alter table u set logged".into(),
        16 => format!("create index i{step} on t(pad); reindex table t"),
        17 => format!("delete from other where g > {from} % 20000; vacuum (truncate true) other"),
        _ => {
            // With checksums and without.
            let on = sql(server, "show data_checksums") == "on";
            server.stop(Mode::Fast).unwrap();
            let mut command = site.command(site.install.program("pg_checksums").unwrap());
            command.arg(if on { "--disable" } else { "--enable" }).arg("-D").arg(server.pgdata());
            let ran = run(command);
            assert_eq!(ran.code, Some(0), "{ran:?}");
            server.start().unwrap();
            return "pg_checksums".into();
        }
    };
    for statement in statements.split("; ") {
        let _ = sql(server, statement);
    }
    statements
}

/// R12, T9, T11: after each of many operations in any order an incremental restores to the files that there are.
#[test]
fn r12_after_any_operation_an_incremental_is_what_a_full_backup_would_be() {
    let site = Site::new();
    let mut random = Random::new();
    let mut server = site.start(site.cluster("main").config(QUIET));
    let _ = sql(&server, &format!("create tablespace place location '{}'", site.directory("place").display()));
    let _ = sql(&server, "create table t(id int, pad text); insert into t select g, md5(g::text) from generate_series(1, 60000) g");
    let _ = sql(&server, "create index on t(id); create table other as select g, md5(g::text) from generate_series(1, 20000) g");
    let first = back_up_and_compare(&site, &server, &[], "the first");
    assert_eq!((first["kind"].as_str(), &first["parent"]), (Some("full"), &Value::Null));
    let steps = if full() { 200 } else { 14 };
    for step in 0..steps {
        let what = happen(&site, &mut server, &mut random, step);
        let source = if step % 5 == 4 { "remote" } else { "local" };
        let backup = back_up_and_compare(&site, &server, &["--source", source], &format!("step {step}, {source}: {what}"));
        assert_eq!(backup["kind"], "incremental", "{backup}");
        if step % 7 == 6 {
            let fresh = back_up_and_compare(&site, &server, &["--full"], &format!("step {step}, all of it"));
            assert_eq!(
                (fresh["kind"].as_str(), fresh["restore_amplification"].as_f64() < Some(1.2)),
                (Some("full"), true),
                "{fresh}"
            );
            prove(&site, &site.path("place"), &sql(&server, ROWS));
        }
    }
    let _ = site.pgv(&["check"]).ok();

    // A copy that was restored and promoted is backed up into the same vault, and is no stranger to it.
    let rows = sql(&server, ROWS);
    drop(server);
    let (pgdata, place) = restore(&site, &site.path("place"), &[]);
    let (promoted, _) = site.recover(&pgdata);
    let _ = sql(&promoted, "select pg_promote()");
    site.configure(&promoted);
    let backup = site.summary(&["backup"]);
    assert_eq!((backup["kind"].as_str(), backup["timeline"].as_u64()), (Some("incremental"), Some(2)), "{backup}");
    assert!(stored(&backup) * 4 < stored(&first), "{backup} after {first}");
    drop(promoted);
    prove(&site, &place, &rows);
}

/// The costs: nothing new costs next to nothing, a page costs a page, and a full backup is had by asking.
#[test]
fn what_is_stored_follows_what_has_changed() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(QUIET));
    let _ = sql(
        &server,
        "create table t(id int primary key, pad bytea); insert into t select g, decode(repeat(md5(g::text), 8), 'hex') from generate_series(1, 200000) g; checkpoint",
    );
    let first = site.backup("local");
    let nothing = site.backup("local");
    assert!(stored(&nothing) * 50 < stored(&first), "{nothing} after {first}");
    let parts = (0..3).map(|part| sql(&server, &format!("update t set pad = pad where id % 1500 = {part}; checkpoint")));
    let scattered = parts.map(|_| site.backup("local")).last().unwrap();
    assert!(stored(&scattered) * 8 < stored(&first), "{scattered} after {first}");
    // The same through the server.
    let remote = site.backup("remote");
    assert!(stored(&remote) * 50 < stored(&first), "{remote} after {first}");
    let all = site.summary(&["backup", "--full"]);
    assert!(all["kind"] == "full" && stored(&all) * 10 > stored(&first) * 9, "{all} after {first}");
    let listed = site.summary(&["list"]);
    let kinds: Vec<&str> = listed["backups"].as_array().unwrap().iter().map(|b| b["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["full", "incremental", "incremental", "incremental", "incremental", "incremental", "full"]);
    let rows = "select count(*), sum(hashtext(t::text)::bigint) from t";
    for backup in listed["backups"].as_array().unwrap() {
        let pgdata = site.restore("immediate", &["--backup", backup["backup_id"].as_str().unwrap()]);
        let (restored, _) = site.recover(&pgdata);
        assert_eq!(sql(&restored, rows), sql(&server, rows));
    }
}

/// Damage is not inherited: what a pack held that is gone from the vault is stored again while the source still has it.
#[test]
fn a_backup_after_a_lost_pack_is_whole_again() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(QUIET));
    let _ = sql(
        &server,
        "create table t(id int, pad text); insert into t select g, md5(g::text) from generate_series(1, 50000) g; checkpoint",
    );
    let first = site.backup("local");
    let lost: Vec<String> = site.vaults.names().into_iter().filter(|name| name.ends_with(".pack")).collect();
    for name in &lost {
        let _ = site.vaults.take(name);
    }
    let second = back_up_and_compare(&site, &server, &[], "after the loss");
    let warned = second["warnings"].to_string();
    assert!(warned.contains("missing") && stored(&second) * 10 > stored(&first) * 9, "{second}");
    let _ = site.restore_into(&site.fresh("damaged"), "immediate", &["--backup", first["backup_id"].as_str().unwrap()]).expect(4);
}

/// T5: what an interrupted backup has stored is used, after it was looked at, and what changed since is stored anew.
#[test]
fn t5_an_interrupted_backup_is_gone_on_with() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(QUIET));
    let fill = "create table t(id int primary key, pad bytea); alter table t alter pad set storage external; \
                insert into t select g, decode(repeat(md5(g::text) || md5((-g)::text), 32), 'hex') || decode(md5(random()::text), 'hex') from generate_series(1, 1) g";
    for statement in fill.split("; ") {
        let _ = sql(&server, statement);
    }
    // What does not compress: some packs of it.
    let _ = sql(
        &server,
        "create table noise as select g, (select string_agg(decode(md5(random()::text || g || h), 'hex'), '') from generate_series(1, 400) h) as pad from generate_series(1, 20000) g; checkpoint",
    );
    let packs = |site: &Site| site.vaults.names().iter().filter(|name| name.ends_with(".pack")).count();

    let mut command = site.pgvault(&["backup"]);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut running = Running::new(command.spawn().unwrap());
    wait_until("some packs are stored", Duration::from_secs(60), || packs(&site) >= 2 || !running.is_running());
    running.kill9();
    assert_eq!(site.snapshots(), 0, "it was over before it could be killed");
    let left = packs(&site);
    assert!(left >= 2);
    // One that lies, one that is cut off, and rows that are others by now.
    let victim: PathBuf = site.vaults.names().into_iter().find(|name| name.ends_with(".pack")).unwrap().into();
    site.vaults.flip(victim.to_str().unwrap(), 5000);
    let _ = sql(&server, "update noise set pad = pad || '\\x01' where g % 4000 = 7; checkpoint");

    let backup = back_up_and_compare(&site, &server, &[], "gone on with");
    let made = backup["objects_put"].as_u64().unwrap();
    let all = site.summary(&["backup", "--full"]);
    assert!(made < all["objects_put"].as_u64().unwrap(), "{backup}\n{all}");
    assert!(stored(&backup) + (20 << 20) < stored(&all), "{backup}\n{all}");
    // The damaged one is nobody's.
    let ran = site.pgv(&["check"]);
    assert!(
        ran.stdout.contains("no backup that can be read needs it") || ran.stderr.contains("no backup that can be read needs it"),
        "{ran:?}"
    );
}
