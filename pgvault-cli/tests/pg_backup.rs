//! Base backups of real servers, from both sources: what must be in them, what must not, and that they restore.

#![allow(clippy::unwrap_used, clippy::print_stderr)]
#![expect(clippy::case_sensitive_file_extension_comparisons, reason = "names of objects are what they are")]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Running, Site, amcheck, client, files_below, full, lsn, run, sql, switch_and_archive, tree, wait_until};
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Mode, Outcome, Server};
use serde_json::Value;

const SOURCES: [&str; 2] = ["local", "remote"];

/// Names that break what splits on spaces, quotes, slashes or line ends (T25).
const HOSTILE: [&str; 4] = ["a \\ = [b] # \"c\" 'd' $e %f", "zwölf; drop -- \u{1F418}", "line\nend\ttab", "..%2F..*?{}"];

/// Since 19, no role and no database has a line end in its name.
fn hostile(site: &Site) -> Vec<String> {
    let end = if site.install.version().major() < 19 { "\n" } else { "\u{b}" };
    HOSTILE.iter().map(|name| name.replace('\n', end)).collect()
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn path_of(server: &Server, relation: &str) -> String {
    sql(server, &format!("select pg_relation_filepath('{relation}')"))
}

/// The fields of a backup's summary that scripts rely on.
fn check_summary(backup: &Value, source: &str, timeline: u64) {
    assert_eq!(backup["source"], source, "{backup}");
    // What the backup before has is not stored again.
    let is_full = backup["kind"] == "full";
    assert!(is_full || (backup["kind"] == "incremental" && backup["parent"].is_string()), "{backup}");
    assert_eq!(backup["timeline"], timeline);
    let position = |name: &str| backup[name].as_str().unwrap().parse::<Lsn>().unwrap();
    assert!(position("start_lsn") < position("stop_lsn"), "{backup}");
    let time = |name: &str| backup[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(time("started_at") <= time("finished_at"), "{backup}");
    let number = |name: &str| backup[name].as_u64().unwrap_or_else(|| panic!("{name} in {backup}"));
    assert!(number("source_bytes") > 20 << 20, "{backup}");
    assert!(number("changed_bytes") <= number("source_bytes") && (number("changed_bytes") > 10 << 20) == is_full, "{backup}");
    assert!((number("stored_bytes") > 1 << 20) == is_full && number("stored_bytes") < number("source_bytes"), "{backup}");
    assert!(number("objects_put") >= 2 && number("objects_put") < 20, "{backup}");
    assert!(number("peak_rss_bytes") > 1 << 20 && number("peak_rss_bytes") < 512 << 20, "{backup}");
    assert!(backup["warnings"].is_array());
    assert_eq!(backup["backup_id"].as_str().unwrap().len(), 26);
}

#[test]
fn t19_t25_t26_tablespaces_hostile_names_unlogged_and_temporary_relations() {
    let site = Site::new();
    // T19, H15: one location's name begins with the other's, one has a space, one stays empty.
    let spaces = [site.directory("ts"), site.directory("ts 2"), site.directory("ts2")];
    let server = site.start(site.cluster("main").config(site.archiving()));
    for (n, path) in spaces.iter().enumerate() {
        let _ = sql(&server, &format!("create tablespace ts{n} location '{}'", path.display()));
    }
    let _ = sql(
        &server,
        "create table t(id int primary key, pad text) tablespace ts0; insert into t select g, md5(g::text) from generate_series(1, 5000) g",
    );
    let _ = sql(&server, "create database inside tablespace ts1");
    let _ = server.psql_in("inside", "create table t as select g as id from generate_series(1, 100) g").unwrap();
    let _ = sql(
        &server,
        "create unlogged table u(id serial primary key, pad text); insert into u(pad) select md5(g::text) from generate_series(1, 3000) g; checkpoint",
    );
    let _ = sql(&server, "create unlogged table u2(id int) tablespace ts0; insert into u2 values (1)");
    for name in hostile(&site) {
        let name = quoted(&name);
        let _ = sql(
            &server,
            &format!(
                "create role {name}; create database {name} owner {name}; create schema {name}; create table {name}.{name}({name} int)"
            ),
        );
        let database = name.trim_matches('"').replace("\"\"", "\"");
        let _ = server.psql_in(&database, &format!("create table {name}({name} int); insert into {name} values (1), (2)")).unwrap();
    }
    let temporary = client(
        &server,
        "psql",
        &[
            "-XqAt",
            "-c",
            "create temp table gone as select g, md5(g::text) from generate_series(1, 5000) g",
            "-c",
            "select pg_sleep(3600)",
        ],
    );
    wait_until("the temporary table is there", Duration::from_secs(20), || {
        sql(&server, "select count(*) from pg_class where relname = 'gone' and relpages >= 0 and pg_relation_size(oid) > 0") == "1"
    });
    let (unlogged, gone) =
        (path_of(&server, "u"), sql(&server, "select pg_relation_filepath(oid) from pg_class where relname = 'gone'"));
    assert!(server.pgdata().join(&unlogged).metadata().unwrap().len() > 0);

    for source in SOURCES {
        let backup = site.summary(&["backup", "--source", source, "--label", "why=because", "--label", "x= = "]);
        check_summary(&backup, source, 1);
        let _ = sql(&server, &format!("insert into t values ({}, 'after')", 10_000 + site.snapshots()));
        let _ = switch_and_archive(&server);
        let rows = sql(&server, "select count(*) from t");

        // Without saying where the tablespaces go, nothing is written, least of all to where they are.
        let before: Vec<_> = spaces.iter().map(|path| tree(path)).collect();
        let refused = site.path("refused");
        let mut ran = site.restore_into(&refused, "latest", &[]).expect(2);
        for path in &spaces {
            ran = ran.says(&format!("--tablespace-mapping '{}=NEW'", path.display()));
        }
        let new: Vec<PathBuf> = (0..3).map(|n| site.path(format!("{source}-{n}"))).collect();
        let mappings: Vec<String> =
            spaces.iter().zip(&new).map(|(old, new)| format!("--tablespace-mapping={}={}", old.display(), new.display())).collect();
        let mappings: Vec<&str> = mappings.iter().map(String::as_str).collect();
        let _ = site.restore_into(&refused, "latest", &mappings[..2]).expect(2).says(&spaces[2].display().to_string());
        let twice = format!("--tablespace-mapping={}={}", spaces[2].display(), new[0].display());
        let _ = site.restore_into(&refused, "latest", &[mappings[0], mappings[1], &twice]).expect(2);
        let occupied = format!("--tablespace-mapping={0}={0}", spaces[2].display());
        let _ = site.restore_into(&refused, "latest", &[mappings[0], mappings[1], &occupied]).expect(2).says("not empty");
        assert!(!refused.exists() && new.iter().all(|path| !path.exists()));

        let pgdata = site.restore("latest", &mappings);
        let after: Vec<_> = spaces.iter().map(|path| tree(path)).collect();
        assert!(before.iter().zip(&after).all(|(one, other)| one.keys().eq(other.keys())), "the original tablespaces were touched");
        let links: Vec<PathBuf> =
            fs::read_dir(pgdata.join("pg_tblspc")).unwrap().map(|e| fs::read_link(e.unwrap().path()).unwrap()).collect();
        assert_eq!(links.len(), 3);
        assert!(links.iter().all(|link| new.contains(link)), "{links:?}");
        // The empty one has its version folder, so that a table can be created in it at once.
        // T26: the init fork is kept, the others and temporary relations are not.
        assert!(pgdata.join(format!("{unlogged}_init")).exists());
        assert!(!pgdata.join(&unlogged).exists(), "{source}: an unlogged relation's rows are in the backup");
        assert!(!pgdata.join(&gone).exists(), "{source}: a temporary relation is in the backup");

        let (restored, outcome) = site.recover(&pgdata);
        assert_eq!(outcome, Outcome::Promoted);
        assert_eq!(sql(&restored, "select count(*) from t"), rows);
        assert_eq!(restored.psql_in("inside", "select count(*) from t").unwrap(), "100");
        assert_eq!(sql(&restored, "select count(*) from u; select count(*) from u2"), "0\n0");
        let _ = sql(
            &restored,
            "insert into u(pad) values ('again'); insert into u2 values (2); create table n(id int) tablespace ts2; insert into n values (1)",
        );
        assert_eq!(sql(&restored, "select count(*) from u where id > 0"), "1");
        for name in hostile(&site) {
            let own = quoted(&name);
            assert_eq!(restored.psql_in(&name, &format!("select sum({own}) from {own}")).unwrap(), "3", "{name}");
            assert_eq!(sql(&restored, &format!("select count(*) from {own}.{own}")), "0");
        }
        // Of six databases once is enough.
        if source == "local" {
            amcheck(&restored);
        }
        drop(restored);
        delta_over_tablespaces(&site, &pgdata, &new, &mappings);
    }
    drop(temporary);
    let backups = site.summary(&["list"])["backups"].clone();
    assert_eq!(backups[0]["labels"]["why"], "because", "{backups}");
    let _ = site.pgv(&["check"]).ok();
}

/// T27: what was lived in, with tablespaces that hold strangers, becomes what a fresh restore is.
fn delta_over_tablespaces(site: &Site, pgdata: &Path, spaces: &[PathBuf], mappings: &[&str]) {
    let fresh: Vec<PathBuf> = (0..spaces.len()).map(|_| site.fresh("fresh-space")).collect();
    let elsewhere: Vec<String> = mappings
        .iter()
        .zip(&fresh)
        .map(|(mapping, new)| format!("{}={}", mapping.rsplit_once('=').unwrap().0, new.display()))
        .collect();
    let elsewhere: Vec<&str> = elsewhere.iter().map(String::as_str).collect();
    let other = site.restore("latest", &elsewhere);

    let version = fs::read_dir(&spaces[0]).unwrap().next().unwrap().unwrap().path();
    fs::write(version.join("stranger"), b"x").unwrap();
    fs::create_dir(spaces[0].join("PG_9.6_201608131")).unwrap();
    fs::write(spaces[0].join("PG_9.6_201608131/theirs"), b"another server's").unwrap();
    let largest = files_below(&version).into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    fs::OpenOptions::new().write(true).open(&largest).unwrap().write_all_at(b"damage", 5000).unwrap();
    site.account.own(&spaces[0]).unwrap();
    let mut arguments = vec!["--delta"];
    arguments.extend(mappings);
    let _ = site.restore_into(pgdata, "latest", &arguments).ok();

    assert_eq!(fs::read(spaces[0].join("PG_9.6_201608131/theirs")).unwrap(), b"another server's");
    fs::remove_dir_all(spaces[0].join("PG_9.6_201608131")).unwrap();
    for (one, two) in spaces.iter().zip(&fresh) {
        common::assert_same_tree(one, two);
    }
    // The links and the map of tablespaces name other places; everything else is the same.
    let without = |pgdata: &Path| {
        let mut tree = tree(pgdata);
        tree.retain(|name, _| !name.starts_with("pg_tblspc/") && name != "tablespace_map");
        tree
    };
    assert!(without(pgdata) == without(&other));
}

/// T8: files grow, shrink and vanish while they are copied, and every backup restores to the same end.
#[test]
fn t8_files_that_change_while_they_are_copied() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()).config("autovacuum_naptime = 1s"));
    let mut init = server.client("pgbench").unwrap();
    init.args(["-q", "-i", "-s", "2", "postgres"]);
    assert_eq!(run(init).code, Some(0));
    let _ = sql(
        &server,
        "create table grows(id serial, pad text); create table shrinks as select g, repeat('x', 500) as pad from generate_series(1, 4000) g",
    );
    let script = site.write(
        "churn.sql",
        "\\set n random(1, 1000000000)\n\
         create table v_:client_id_:n as select g, md5(g::text) from generate_series(1, 300) g;\n\
         create index on v_:client_id_:n(g);\n\
         insert into grows(pad) select repeat(md5(g::text), 10) from generate_series(1, 200) g;\n\
         drop table v_:client_id_:n;\n\
         begin; truncate shrinks; insert into shrinks select g, repeat('y', 500) from generate_series(1, 2000) g; commit;\n\
         delete from shrinks where g > 100;\n\
         vacuum shrinks;\n",
    );
    let text = fs::read_to_string(&script).unwrap().replace("v_:client_id_:n", "v_:n");
    let script = site.write("churn.sql", text);
    let mut load = vec![
        client(&server, "pgbench", &["-n", "-c", "2", "-R", "200", "-T", "3600", "postgres"]),
        client(&server, "pgbench", &["-n", "-c", "2", "-R", "25", "-T", "3600", "-f", script.to_str().unwrap(), "postgres"]),
    ];
    wait_until("there is load", Duration::from_secs(30), || {
        sql(&server, "select (select count(*) from grows) > 1000 and (select count(*) from pgbench_history) > 200") == "t"
    });
    let mut backups = Vec::new();
    for source in SOURCES {
        let backup = site.backup(source);
        assert_eq!(backup["bad_pages"].as_array().unwrap().len(), 0, "a page under change is not a bad page: {backup}");
        backups.push(backup["backup_id"].as_str().unwrap().to_owned());
    }
    assert!(load.iter_mut().all(Running::is_running));
    drop(load);
    let everything = "select (select count(*) || ' ' || sum(abalance) from pgbench_accounts), (select count(*) || ' ' || sum(delta) from pgbench_history), \
        (select count(*) || ' ' || sum(id) || ' ' || sum(length(pad)) from grows), (select count(*) from shrinks), \
        (select count(*) from pg_class where relname like 'v\\_%')";
    // A client that was cut off may have left its last transaction unfinished a moment longer.
    wait_until("the load has ended", Duration::from_secs(20), || {
        sql(&server, "select count(*) from pg_stat_activity where backend_type = 'client backend'") == "1"
    });
    let expected = sql(&server, everything);
    let _ = switch_and_archive(&server);
    for backup in &backups {
        let (restored, outcome) = site.restore_to("latest", &["--backup", backup]);
        assert_eq!(outcome, Outcome::Promoted);
        assert_eq!(sql(&restored, everything), expected, "{backup}");
        amcheck(&restored);
    }
}

/// A backup of a cluster that nothing archives has all it needs; so without page checksums and with small segments.
#[test]
fn a_backup_without_an_archiver_is_self_contained() {
    let site = Site::new();
    let server = site.start(site.cluster("main").checksums(false).wal_segment_mib(1).config("archive_mode = off"));
    let _ = sql(
        &server,
        "create table t(id int primary key, pad text); insert into t select g, repeat(md5(g::text), 10) from generate_series(1, 20000) g",
    );
    for (n, source) in SOURCES.into_iter().enumerate() {
        let backup = site.backup(source);
        check_summary(&backup, source, 1);
        let _ = sql(&server, &format!("insert into t values ({}, 'not archived')", 30_000 + n));
        for (to, wanted) in [("immediate", Outcome::Paused), ("latest", Outcome::Promoted)] {
            let (restored, outcome) = site.restore_to(to, &[]);
            assert_eq!(outcome, wanted, "{source} {to}");
            assert_eq!(sql(&restored, "select count(*) from t"), (20_000 + n).to_string(), "{source} {to}");
            assert_eq!(sql(&restored, "show data_checksums; show wal_segment_size"), "off\n1MB");
            if wanted == Outcome::Promoted {
                amcheck(&restored);
            }
        }
    }
    assert_eq!(sql(&server, "select count(*) from pg_replication_slots"), "0", "a backup leaves no slot behind");
}

/// Segments larger than an object are stored as parts, and come out whole.
#[test]
fn segments_of_64_mib_are_stored_as_parts() {
    let site = Site::new();
    let server = site.start(site.cluster("main").wal_segment_mib(64).config(site.archiving()));
    let _ = sql(&server, "create table t(id int)");
    let _ = site.backup("local");
    let _ = sql(&server, "insert into t values (1)");
    let first = switch_and_archive(&server);
    let _ = sql(&server, "insert into t values (2)");
    let second = switch_and_archive(&server);
    let objects = site.wal_objects(1);
    for name in [&first, &second] {
        let parts = objects.iter().filter(|object| object.starts_with(&format!("{name}.")) && object.ends_with(".part")).count();
        assert_eq!(parts, 2, "{objects:?}");
        let fetched = site.fresh("fetched");
        let _ = site.pgv(&["wal", "fetch", name, fetched.to_str().unwrap()]).ok();
        assert!(fs::read(fetched).unwrap() == fs::read(server.pgdata().join("pg_wal").join(name)).unwrap());
        let again = site.pgv(&["--output", "json", "wal", "push", server.pgdata().join("pg_wal").join(name).to_str().unwrap()]);
        assert_eq!(again.ok().json()["already_there"], true);
    }
    let (restored, outcome) = site.restore_to("latest", &[]);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&restored, "select string_agg(id::text, ' ' order by id) from t"), "1 2");
    // A part that is missing is a gap, not the end.
    drop(restored);
    let part = site.vaults.object(objects.iter().find(|object| object.starts_with(&first)).unwrap());
    let _ = site.vaults.take(&part);
    let _ = site.pgv(&["wal", "fetch", &first, site.path("x").to_str().unwrap()]).expect(255);
}

/// T14: bad pages are found, named by file and block, and do not keep the rest from being saved.
#[test]
fn t14_a_forged_bad_page_is_named() {
    let site = Site::new();
    let mut server = site.start(site.cluster("main").config(site.archiving()).config("autovacuum = off"));
    let _ = sql(
        &server,
        "create table t(id int, pad text); insert into t select g, repeat(md5(g::text), 10) from generate_series(1, 2000) g; create table zeroed as select * from t; vacuum t; checkpoint",
    );
    let (path, zeroed) = (path_of(&server, "t"), path_of(&server, "zeroed"));
    // Pages that a backup has found good are judged again as soon as they differ.
    let _ = site.backup("local");
    server.stop(Mode::Fast).unwrap();
    let write = |path: &str, at: u64, bytes: &[u8]| {
        fs::OpenOptions::new().write(true).open(site.path("main").join(path)).unwrap().write_all_at(bytes, at).unwrap();
    };
    // Garbage inside a page, garbage in place of one, and a page that belongs elsewhere; all zeroes is a new page.
    let mut original = vec![0; 8192];
    fs::File::open(site.path("main").join(&path)).unwrap().read_exact_at(&mut original, 5 * 8192).unwrap();
    write(&path, 3 * 8192 + 4000, b"garbage");
    write(&path, 7 * 8192, &[0xA5; 8192]);
    write(&path, 9 * 8192, &original);
    write(&zeroed, 2 * 8192, &[0; 8192]);
    if full() {
        // A relation of more than one file: the block number goes on over them.
        let second = site.path("main").join(format!("{path}.1"));
        fs::OpenOptions::new().write(true).open(site.path("main").join(&path)).unwrap().set_len(1 << 30).unwrap();
        fs::write(&second, vec![0; 8 * 8192]).unwrap();
        site.account.own(&second).unwrap();
        fs::set_permissions(&second, fs::Permissions::from_mode(0o600)).unwrap();
        write(&format!("{path}.1"), 5 * 8192, &[0xA5; 8192]);
    }
    server.start().unwrap();
    // The second of each kind has those pages from the one before, as they are.
    for (source, kind) in [("local", None), ("remote", None), ("local", Some("--full")), ("remote", None)] {
        let before = site.snapshots();
        let backup: Vec<&str> = ["backup", "--source", source].into_iter().chain(kind).collect();
        let refused = site.pgv(&[&backup[..], &["--strict"]].concat());
        assert_eq!(refused.code, Some(4), "{refused:?}");
        let _ = refused.says(&path).says("block 3");
        assert_eq!(site.snapshots(), before, "{source}: --strict committed a backup");
        let ran = site.pgv(&[&["--output", "json"], &backup[..]].concat()).expect(3);
        assert_eq!(site.snapshots(), before + 1);
        let backup = ran.json();
        let mut found: Vec<(String, u64)> = backup["bad_pages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|page| (page["path"].as_str().unwrap().to_owned(), page["block"].as_u64().unwrap()))
            .collect();
        found.sort();
        let mut wanted = vec![(path.clone(), 3), (path.clone(), 7), (path.clone(), 9)];
        if full() {
            wanted.push((format!("{path}.1"), 131_072 + 5));
        }
        assert_eq!(found, wanted, "{source}: {backup}");
    }
    // `list` shows it; what is not damaged restores.
    let listed = site.summary(&["list"]);
    assert_eq!(listed["backups"][1]["bad_pages"].as_array().unwrap().len(), if full() { 4 } else { 3 });
    let (restored, _) = site.restore_to("immediate", &[]);
    assert_eq!(
        sql(&restored, "select count(*) from zeroed where id < 60"),
        sql(&server, "select count(*) from zeroed where id < 60")
    );
    assert!(restored.psql("select sum(length(pad)) from t").is_err());
}

/// A standby is as good a source as its primary, also when the primary does nothing.
#[test]
fn a_backup_from_a_standby_of_an_idle_primary() {
    let site = Site::new();
    let primary = site.start(site.cluster("main").config("archive_mode = off"));
    let _ = sql(&primary, "create table t(id int primary key); insert into t select generate_series(1, 1000)");
    // The standby is itself a restore.
    let _ = site.backup("local");
    let data = site.restore("immediate", &[]);
    fs::remove_file(data.join("recovery.signal")).unwrap();
    let _ = fs::File::create(data.join("standby.signal")).unwrap();
    site.account.own(&data).unwrap();
    let auto = data.join("postgresql.auto.conf");
    let kept: Vec<String> =
        fs::read_to_string(&auto).unwrap().lines().filter(|line| !line.starts_with("recovery_target")).map(str::to_owned).collect();
    fs::write(&auto, kept.join("\n") + "\n").unwrap();
    let _ = sql(&primary, "insert into t values (1001)");
    let standby = Server::adopt(&site.install, &data)
        .option("primary_conninfo", primary.conninfo())
        .option("shared_buffers", "16MB")
        .port(5433)
        .start()
        .unwrap();
    let end = lsn(&primary, "pg_current_wal_flush_lsn()");
    wait_until("the standby has caught up", Duration::from_secs(60), || {
        sql(&standby, &format!("select coalesce(pg_last_wal_replay_lsn() >= '{end}', false)")) == "t"
    });
    for source in SOURCES {
        let pgdata = (source == "local").then_some(data.as_path());
        site.configure_text("vault", &standby.conninfo(), pgdata);
        let backup = site.backup(source);
        let listed = site.summary(&["list"]);
        let own = listed["backups"].as_array().unwrap().iter().find(|b| b["backup_id"] == backup["backup_id"]).unwrap().clone();
        assert_eq!(own["from_standby"], true, "{own}");
        // The idle primary completes no segment: what the backup needs of the open one is a part.
        assert!(site.wal_objects(1).iter().any(|name| name.ends_with(".part")), "{:?}", site.wal_objects(1));
        for (to, wanted) in [("immediate", Outcome::Paused), ("latest", Outcome::Promoted)] {
            let (restored, outcome) = site.restore_to(to, &["--backup", backup["backup_id"].as_str().unwrap()]);
            assert_eq!(outcome, wanted, "{source} {to}");
            assert_eq!(sql(&restored, "select count(*) from t"), "1001", "{source} {to}");
            if wanted == Outcome::Promoted {
                amcheck(&restored);
            }
        }
    }
}

/// Passwords are found where libpq finds them, and are never shown.
#[test]
fn a_scram_login_through_a_password_file() {
    let site = Site::new();
    let password = "pä:ss\\ wörd";
    let auth = pgvault_verify::process::Auth::Scram(password.into());
    let mut server = site.cluster("main").auth(auth).create().unwrap();
    server.start().unwrap();
    site.configure(&server);
    let refused = site.pgv(&["backup"]);
    assert_ne!(refused.code, Some(0));
    let escaped = password.replace('\\', "\\\\").replace(':', "\\:");
    let file = site.write(".pgpass", format!("# a comment\nother:*:*:*:wrong\n*:*:*:postgres:{escaped}\n"));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let _ = site.pgv(&["init"]).ok();
    for source in SOURCES {
        let ran = site.pgv(&["--output", "json", "backup", "--source", source]).ok();
        assert!(!format!("{}{}", ran.stdout, ran.stderr).contains("wörd"));
    }
    let (restored, _) = site.restore_to("latest", &[]);
    assert_eq!(sql(&restored, "select 1"), "1");
    // A wrong one is told from an unreachable server, in words and without the password.
    let _ = site.write(".pgpass", "*:*:*:*:wrong-secret\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let ran = site.pgv(&["backup"]).expect(6).says("password");
    assert!(!format!("{}{}", ran.stdout, ran.stderr).contains("wrong-secret"));
    // Nothing in the vault, in the configuration or in what was restored names it.
    for name in site.vaults.names() {
        assert!(!contains(&site.vaults.read(&name), "wörd"), "{name}");
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The connection that holds the backup's slot sends nothing while files are copied.
#[test]
fn a_server_that_ends_idle_sessions_leaves_the_backup_its_own() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config("idle_session_timeout = 150ms"));
    let _ = sql(&server, "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 10) FROM generate_series(1, 200000) g");
    for source in ["local", "remote"] {
        let _ = site.backup(source);
    }
    let log = server.log_tail();
    assert!(!log.contains("idle-session timeout"), "{log}");
}

/// A local backup reads a directory that the configuration names: it must be the server's own, and all of it readable.
#[test]
fn a_directory_that_is_not_the_servers_own_is_refused() {
    let site = Site::new();
    let mut server = site.start(site.cluster("main").config(site.archiving()));
    let space = site.directory("space");
    let _ = sql(&server, &format!("CREATE TABLESPACE space LOCATION '{}'", space.display()));
    let _ = sql(&server, "CREATE TABLE t TABLESPACE space AS SELECT generate_series(1, 100) AS id");
    server.stop(Mode::Fast).unwrap();
    let mut copy = site.command("cp");
    copy.arg("-a").arg(server.pgdata()).arg(site.path("lagging"));
    assert_eq!(run(copy).code, Some(0));
    server.start().unwrap();
    let _ = sql(&server, "INSERT INTO t SELECT generate_series(1, 1000); CHECKPOINT");

    let refused = |pgdata: &Path, code: i32, word: &str| {
        site.configure_text("vault", &server.conninfo(), Some(pgdata));
        let _ = site.pgv(&["backup", "--source", "local"]).expect(code).says(word);
        assert_eq!(site.snapshots(), 0);
    };
    refused(&site.path("lagging"), 6, "is only at");
    refused(&site.path("nowhere"), 6, "nowhere");
    let stranger = site.cluster("stranger").create().unwrap();
    refused(stranger.pgdata(), 10, "holds no cluster");

    let version = fs::read_dir(&space).unwrap().next().unwrap().unwrap().path();
    fs::set_permissions(&version, fs::Permissions::from_mode(0o000)).unwrap();
    refused(server.pgdata(), 6, "Permission denied");
    fs::set_permissions(&version, fs::Permissions::from_mode(0o700)).unwrap();
    let _ = site.backup("local");
}
