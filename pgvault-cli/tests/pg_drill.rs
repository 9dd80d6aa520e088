//! Restore drills: what is whole passes, what is not fails by the right check and in the right words, and nothing is left behind.

#![allow(clippy::unwrap_used)]
#![expect(clippy::case_sensitive_file_extension_comparisons, reason = "names of objects are what they are")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use common::drills::{Drills, ODOO, change_page, named, relation, servers_below};
use common::{Running, client, full, run, sql, switch_and_archive, tree, wait_until};
use pgvault_verify::process::{Mode, Outcome};
use serde_json::Value;

/// A loaded cluster passes, and everything that shows drills shows it.
#[test]
fn a_drill_of_a_cluster_under_load_passes() {
    let drills = Drills::new("");
    let (site, server) = (&drills.site, &drills.server);
    let status = site.summary(&["status"]);
    assert_eq!(status["last_passed_drill"], Value::Null);
    site.pgv(&["restore", "--to", "last-verified", "--pgdata", site.path("x").to_str().unwrap()]).expect(5).says("restore drill");

    let _ = sql(server, ODOO);
    let mut init = server.client("pgbench").unwrap();
    let _ = init.args(["-q", "-i", "-s", "3"]);
    assert_eq!(run(init).code, Some(0));
    let load = client(server, "pgbench", &["-c", "2", "-T", "60"]);
    let _ = sql(server, "vacuum analyze");
    let backup = site.backup("local")["backup_id"].clone();
    let _ = switch_and_archive(server);
    let files = [site.path("r.html"), site.path("r.json"), site.path("r.xml")];
    let [html, json, junit] = files.each_ref().map(|file| file.to_str().unwrap());
    let ran = drills.verify(&["--html", html, "--json", json, "--junit", junit]).expect(0);
    load.kill9();
    let drill = ran.json();
    assert_eq!(drill["result"], "passed", "{drill:#}");
    assert_eq!(drill["backup_id"], backup);
    for name in [
        "plan",
        "row-counts",
        "restore",
        "base-files",
        "recovery",
        "promotion",
        "catalog-dump",
        "tables",
        "amcheck",
        "sequences",
        "indexes",
        "constraints",
        "collations",
        "extensions",
        "odoo-identity:postgres",
        "odoo-modules:postgres",
        "odoo-sequences:postgres",
        "odoo-attachments:postgres",
        "odoo-books:postgres",
        "page-checksums",
        "removal",
        "rto",
    ] {
        assert!(named(&drill, "passed").contains_key(name), "{name}: {drill:#}");
    }
    assert!(drill["rto_ms"].as_u64().unwrap() > 0 && drill["projection"]["total_ms"].as_u64().unwrap() > 0);
    let facts: Vec<&str> = drill["facts"].as_array().unwrap().iter().map(|fact| fact["label"].as_str().unwrap()).collect();
    assert!(facts.contains(&"newest of the sales orders"), "{facts:?}");
    drills.assert_nothing_left();

    // The reports say the same, and the receipt proves itself without a vault.
    let page = fs::read_to_string(html).unwrap();
    assert!(page.contains("Passed.") && page.contains("sales orders") && !page.contains("http"), "{page}");
    assert!(fs::read_to_string(junit).unwrap().contains("failures=\"0\""));
    let key = drill["public_key"].as_str().unwrap();
    run({
        let mut command = site.command(site.path("pgvault"));
        let _ = command.args(["verify", "receipt", json, "--public-key", key]);
        command
    })
    .ok();
    let text = fs::read_to_string(json).unwrap();
    let forged = site.write("forged.json", text.replacen("\"rto_ms\": ", "\"rto_ms\": 1", 1));
    site.pgv(&["verify", "receipt", forged.to_str().unwrap()]).expect(4).says("signature");

    let status = site.summary(&["status"]);
    assert_eq!(status["last_passed_drill"]["drill_id"], drill["drill_id"]);
    assert!(status["last_passed_drill_age_seconds"].as_i64().unwrap() >= 0);
    let listed = site.summary(&["list"]);
    assert_eq!(listed["backups"][0]["verified"], true);
    // A newer backup without a drill does not push it out.
    let newer = site.backup("local")["backup_id"].clone();
    let mut expire = site.pgvault(&["--output", "json", "expire", "--dry-run"]);
    let _ = expire.env("PGVAULT_CLUSTER__MAIN__RETENTION__KEEP_LAST", "1");
    let ran = run(expire).ok();
    assert_eq!(ran.json()["expired"].as_array().unwrap().len(), 0, "{ran:?}");
    let listed = site.summary(&["list"]);
    assert_eq!((&listed["backups"][1]["backup_id"], &listed["backups"][1]["verified"]), (&newer, &Value::Bool(false)));
    let shown = site.summary(&["verify", "report"]);
    assert_eq!(shown["drill_id"], drill["drill_id"]);

    // What was proven can be restored as it was proven, whatever came later.
    let _ = sql(server, "truncate sale_order");
    let _ = switch_and_archive(server);
    let (restored, outcome) = site.restore_to("last-verified", &[]);
    assert_eq!(outcome, Outcome::Paused);
    assert_eq!(sql(&restored, "select count(*) from sale_order"), "3000");
    let reached = drill["reached"]["lsn"].as_str().unwrap();
    assert_eq!(sql(&restored, "select pg_last_wal_replay_lsn()"), reached);
    drop(restored);

    // Any moment, by a seed that repeats it.
    let one = drills.verify(&["--to", "random", "--seed", "11"]).expect(0).json();
    let two = drills.verify(&["--to", "random", "--seed", "12"]).expect(0).json();
    assert_ne!(one["target"], two["target"]);
    let trend = site.summary(&["status"])["rto_trend_ms"].as_array().unwrap().len();
    assert_eq!(trend, 3);
}

/// Damage that authentic objects hold is found by starting what is in them.
#[test]
fn damage_that_was_stored_fails_the_drill() {
    let mut drills = Drills::new("autovacuum = off");
    let _ = sql(&drills.server, ODOO);
    let _ = sql(
        &drills.server,
        "create table t(id int primary key, pad text); insert into t select g, md5(g::text) from generate_series(1, 20000) g; checkpoint",
    );
    let table = relation(&drills.server, "t");
    let index = relation(&drills.server, "t_pkey");
    let _ = drills.site.backup("local");
    let _ = switch_and_archive(&drills.server);
    assert_eq!(drills.verify(&[]).expect(0).json()["result"], "passed");

    let backup = |drills: &mut Drills, code: i32, change: &dyn Fn()| {
        drills.server.stop(Mode::Fast).unwrap();
        change();
        drills.server.start().unwrap();
        let _ = drills.site.pgv(&["backup"]).expect(code);
        let _ = switch_and_archive(&drills.server);
    };
    // A line pointer that leads nowhere, under a valid checksum and in a valid frame: the backup cannot know.
    let original = fs::read(&table).unwrap();
    backup(&mut drills, 0, &|| change_page(&table, 3, true, |page| page[24..28].copy_from_slice(&[0xFF, 0xFF, 0xFE, 0xFF])));
    let failed = named(&drills.verify(&[]).expect(4).json(), "failed");
    // Who reads through such a pointer finds what he finds: the count may differ as well.
    assert!(failed["amcheck"].contains("\"t\"") && failed["amcheck"].contains("line pointer"), "{failed:?}");
    drills.assert_nothing_left();
    // A flipped bit: the backup has named the page, and the drill does not forgive it.
    backup(&mut drills, 3, &|| {
        fs::write(&table, &original).unwrap();
        change_page(&table, 5, false, |page| page[4000] ^= 1);
    });
    let said = drills.fails(&[], &["page-checksums", "tables", "amcheck"]);
    assert!(said.contains("damaged at the source") && said.contains("block 5"), "{said}");
    // A page of an index that was lost, as a write that never reached the disk.
    backup(&mut drills, 0, &|| {
        fs::write(&table, &original).unwrap();
        change_page(&index, 4, false, |page| page.fill(0));
    });
    let said = drills.fails(&["--deep"], &["amcheck"]);
    assert!(said.contains("t_pkey"), "{said}");
    assert_eq!(drills.site.summary(&["status"])["last_drill"]["outcome"], "failed");
    drills.site.pgv(&["status"]).ok().says("amcheck");
}

/// A write that the disk has reported and never made: every page is whole, and rows are missing. The server still has them in memory, and
/// counted them there when the backup was taken.
#[test]
fn rows_that_are_missing_from_whole_pages_fail_the_drill() {
    let drills = Drills::new("autovacuum = off");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(
        server,
        "create table still as select 1 as n; create table kept as select g, md5(g::text) from generate_series(1, 20000) g; create table busy as select g, md5(g::text) from generate_series(1, 20000) g;
         create table lost as select g, md5(g::text) from generate_series(1, 20000) g;
         select pg_stat_force_next_flush(); select 1",
    );
    let _ = sql(server, "vacuum analyze; select count(*) from lost; checkpoint");
    let lost = relation(server, "lost");
    let original = fs::read(&lost).unwrap();
    change_page(&lost, 3, false, |page| page.fill(0));
    let _ = site.backup("local");
    fs::write(&lost, &original).unwrap();
    // Those that are not as they were, as WAL knows.
    let _ = sql(server, "delete from busy where g < 5000; create table new(i int); insert into new values (1)");
    let _ = switch_and_archive(server);
    let said = drills.fails(&[], &["row-counts"]);
    assert!(said.contains("1 of") && said.contains("lost"), "{said}");
    // The same without the damage: what changed since is explained.
    let _ = sql(server, "vacuum analyze");
    let _ = site.summary(&["backup", "--full"]);
    let _ = sql(server, "delete from busy where g < 6000; truncate new; drop table kept; insert into lost select 1, ''");
    let _ = switch_and_archive(server);
    let drill = drills.verify(&[]).expect(0).json();
    let rows = drill["checks"].as_array().unwrap().iter().find(|check| check["name"] == "row-counts").unwrap();
    assert_eq!(rows["verdict"], "passed", "{rows:#}");
    assert!(rows["evidence"]["explained"].as_u64().unwrap() >= 3 && rows["evidence"]["same"].as_u64().unwrap() > 0, "{rows:#}");
}

/// What the operator asks for decides; what he only wants to know does not.
#[test]
fn the_operators_own_checks_decide() {
    let drills = Drills::new("");
    let _ = sql(&drills.server, ODOO);
    let _ = drills.site.backup("local");
    let _ = switch_and_archive(&drills.server);
    drills.configure(
        "rto = \"1h\"
        [[cluster.main.drill.check]]
        name = \"orders\"\nsql = \"select count(*) = 3000 from sale_order\"
        [[cluster.main.drill.check]]
        name = \"psql\"\ncommand = [\"sh\", \"-c\", \"test \\\"$PGDATABASE\\\" = postgres && test -S \\\"$PGHOST/.s.PGSQL.$PGPORT\\\"\"]
        [[cluster.main.drill.check]]
        name = \"known\"\nsql = \"select false\"\nwarn = true",
    );
    let drill = drills.verify(&[]).expect(0).json();
    let passed = named(&drill, "passed");
    assert!(
        passed.contains_key("user:orders:postgres") && passed.contains_key("user:psql:postgres") && passed.contains_key("rto"),
        "{drill:#}"
    );
    assert!(named(&drill, "warned").contains_key("user:known:postgres"));

    let cases = [
        ("sql = \"select count(*) = 3001 from sale_order\"", "does not hold: the answer is f"),
        ("sql = \"select true where false\"", "no rows"),
        ("sql = \"select true from missing_table\"", "missing_table"),
        ("command = [\"sh\", \"-c\", \"echo no stock >&2; exit 3\"]", "ended with 3: no stock"),
        ("command = [\"sleep\", \"60\"]\ntimeout = \"300ms\"", "was ended after"),
        ("sql = \"select true from pg_sleep(60)\"\ntimeout = \"300ms\"", "longer than"),
    ];
    for (asked, words) in cases {
        drills.configure(&format!("[[cluster.main.drill.check]]\nname = \"own\"\ndatabase = \"postgres\"\n{asked}"));
        let said = drills.fails(&[], &["user:own:postgres"]);
        assert!(said.contains(words), "{said}");
    }
    drills.configure("[[cluster.main.drill.check]]\nname = \"own\"");
    drills.verify(&[]).expect(2).says("`sql` or `command`");
    // Too slow is worth a warning: the data is safe.
    drills.configure("rto = \"1ms\"");
    assert!(named(&drills.verify(&[]).expect(0).json(), "warned").contains_key("rto"));
}

/// A filestore that lacks a file, or has another content under its name.
#[test]
fn a_filestore_that_lacks_a_file_fails_the_drill() {
    let drills = Drills::new("");
    let _ = sql(&drills.server, ODOO);
    let (one, two) = ("c2/c22b5f9178342609428d6f51b2c5af4c0bde6a42", "0a/0a0a9f2a6772942557ab5355d76af442f8f65e01");
    let _ = sql(
        &drills.server,
        &format!(
            "insert into ir_attachment(name, type, store_fname, file_size) values ('a', 'binary', '{one}', 2), ('b', 'binary', '{two}', 13)"
        ),
    );
    let _ = drills.site.backup("local");
    let _ = switch_and_archive(&drills.server);
    let store = drills.site.directory("filestore");
    for folder in ["c2", "0a"] {
        let _ = drills.site.directory(&format!("filestore/{folder}"));
    }
    let _ = drills.site.write(&format!("filestore/{one}"), "hi");
    let _ = drills.site.write(&format!("filestore/{two}"), "Hello, World!");
    let given = format!("postgres={}", store.display());
    let drill = drills.verify(&["--deep", "--filestore", &given]).expect(0).json();
    assert_eq!(named(&drill, "passed")["filestore:postgres"], "all 2 files are there, 2 of them read");
    let _ = drills.site.write(&format!("filestore/{one}"), "ha");
    assert!(drills.fails(&["--deep", "--filestore", &given], &["filestore:postgres"]).contains(one));
    fs::remove_file(store.join(two)).unwrap();
    let said = drills.fails(&["--filestore", &given], &["filestore:postgres"]);
    assert!(said.contains("1 of 2 files are missing") && said.contains(two), "{said}");
}

/// WAL that is missing, a target that is not there, a key that opens nothing: no backup, however whole its files.
#[test]
fn what_cannot_be_reached_fails_the_drill() {
    let drills = Drills::new("");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(server, "create table t as select generate_series(1, 1000) n");
    let _ = site.backup("local");
    for _ in 0..4 {
        let _ = sql(server, "insert into t select generate_series(1, 1000)");
        let _ = switch_and_archive(server);
    }
    assert_eq!(drills.verify(&[]).expect(0).json()["result"], "passed");
    let said = drills.fails(&["--to", "2100-01-01T00:00:00Z"], &["plan"]);
    assert!(said.contains("cannot be restored"), "{said}");
    let said = drills.fails(&["--to", "name:nowhere"], &["plan"]);
    assert!(said.contains("nowhere"), "{said}");

    // A segment in the middle, and then the last one, whose absence no gap shows.
    let objects = site.wal_objects(1);
    let whole: Vec<&String> = objects.iter().filter(|name| name.ends_with(".wal")).collect();
    let vault = site.vaults.directory(common::VAULT);
    if let Some(vault) = vault {
        let place = |name: &str| {
            let file = common::files_below(&vault).into_iter().find(|file| file.ends_with(name)).unwrap();
            vault.join(file)
        };
        for (name, check, words) in
            [(whole[whole.len() - 3], "plan", "WAL is whole only up to"), (whole[whole.len() - 1], "history", "was lost")]
        {
            let (file, hidden) = (place(name), site.path("hidden"));
            fs::rename(&file, &hidden).unwrap();
            let said = drills.fails(&[], &[check]);
            assert!(said.contains(words), "{name}: {said}");
            fs::rename(&hidden, &file).unwrap();
        }
        // One that is there, and was changed: its name promises what it cannot keep.
        let file = place(whole[whole.len() - 3]);
        let bytes = fs::read(&file).unwrap();
        let mut changed = bytes.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        fs::write(&file, changed).unwrap();
        let said = drills.fails(&[], &["recovery"]);
        assert!(said.contains("recovery needs WAL that cannot be had"), "{said}");
        fs::write(&file, bytes).unwrap();
    }
    // A key that was revoked, or is another one.
    let keys = site.summary(&["key", "list"]);
    let old = keys["keys"][0]["key_id"].as_str().unwrap_or_else(|| panic!("{keys}")).to_owned();
    let _ = site.write("new", "another correct horse battery\n");
    fs::set_permissions(site.path("new"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    site.pgv(&["key", "rotate", &old, "--new-passphrase-file", site.path("new").to_str().unwrap()]).ok();
    let ran = drills.verify(&[]).expect(4);
    assert_eq!(ran.json()["checks"][0]["name"], "key-access");
    drills.assert_nothing_left();
}

/// A server that is killed, a drill that is told to stop, a drill that is killed: nothing stays, at the latest when the next one begins.
#[test]
fn nothing_is_left_of_a_drill_that_was_killed() {
    let drills = Drills::new("");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(server, ODOO);
    let _ = site.backup("local");
    let _ = switch_and_archive(server);
    let check = |script: &str| {
        format!("[[cluster.main.drill.check]]\nname = \"own\"\ndatabase = \"postgres\"\ncommand = [\"sh\", \"-c\", '''{script}''']")
    };
    // The socket lies in a folder beside the data.
    drills.configure(&check("kill -9 $(head -1 $PGHOST/../data/postmaster.pid)"));
    let said = drills.fails(&[], &["shutdown"]);
    assert!(said.contains("did not stop in an orderly way"), "{said}");

    let marker = site.path("here");
    drills.configure(&check(&format!("touch {}; exec sleep 300", marker.display())));
    let begin = || {
        let _ = fs::remove_file(&marker);
        let running = Running::new(site.pgvault(&["verify"]).spawn().unwrap());
        wait_until("the drill is at its last check", Duration::from_secs(60), || marker.exists());
        assert!(!servers_below(&site.path("drills")).is_empty());
        running
    };
    assert_eq!(begin().terminate(), Some(1));
    drills.assert_nothing_left();

    begin().kill9();
    let copies = || fs::read_dir(site.path("drills")).unwrap().count();
    assert_eq!(copies(), 1);
    // While one is at work, another leaves it alone.
    let other = begin();
    assert_eq!(copies(), 1, "the folder of the killed one is gone, that of the living one is there");
    drills.configure("");
    let drill = drills.verify(&[]).expect(0).json();
    assert!(!named(&drill, "warned").contains_key("leftovers"), "{drill:#}");
    assert_eq!(copies(), 1);
    other.kill9();
    let drill = drills.verify(&[]).expect(0).json();
    assert!(named(&drill, "warned").contains_key("leftovers"), "{drill:#}");
    drills.assert_nothing_left();
}

/// H11: a drill on the machine of the original, with its port, its paths and its tablespaces, touches none of it.
#[test]
fn h11_the_original_on_the_same_machine_is_untouched() {
    let drills = Drills::new("autovacuum = off\nbgwriter_lru_maxpages = 0\nlog_checkpoints = off\narchive_timeout = 0");
    let (site, server) = (&drills.site, &drills.server);
    let space = site.directory("space");
    let _ = sql(server, &format!("create tablespace fast location '{}'", space.display()));
    let _ = sql(
        server,
        "create table t(id int primary key, pad text) tablespace fast; insert into t select g, md5(g::text) from generate_series(1, 5000) g; vacuum; checkpoint",
    );
    let _ = site.backup("local");
    let _ = switch_and_archive(server);
    let _ = sql(server, "checkpoint");
    let pid = server.pid();
    let all = || {
        let mut all = tree(server.pgdata());
        all.extend(tree(&space).into_iter().map(|(path, file)| (format!("space/{path}"), file)));
        // The server's own, of every moment.
        all.retain(|path, _| !path.contains("pg_stat") && !path.contains("pg_logical") && !path.starts_with("pg_wal/"));
        all
    };
    let before = all();
    let drill = drills.verify(&["--deep"]).expect(0).json();
    assert_eq!(drill["result"], "passed");
    let after = all();
    let changed: Vec<&String> = before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
    assert!(changed.is_empty(), "{changed:?}");
    assert_eq!(server.pid(), pid);
    assert_eq!(sql(server, "select count(*) from t"), "5000");
    drills.assert_nothing_left();
}

/// Without room for the whole copy something is proven, and no backup is.
#[test]
fn a_drill_without_room_is_partial_and_proves_no_backup() {
    let mut drills = Drills::new("autovacuum = off");
    let _ = sql(&drills.server, ODOO);
    let backup = drills.site.backup("local");
    let _ = switch_and_archive(&drills.server);
    let drill = drills.verify(&["--room", "150MiB", "--seed", "5"]).expect(3).json();
    assert_eq!(drill["result"], "partial", "{drill:#}");
    assert!(drill["left_out"][0].as_str().unwrap().contains("no server was started"), "{drill:#}");
    assert!(named(&drill, "passed").contains_key("page-checksums") && named(&drill, "passed").contains_key("wal"), "{drill:#}");
    assert!(drill["restored_bytes"].as_u64().unwrap() < backup["source_bytes"].as_u64().unwrap() + 1);
    drills.assert_nothing_left();
    drills.verify(&["--room", "1MiB"]).expect(1).says("MiB needed");
    drills.assert_nothing_left();
    assert_eq!(drills.site.summary(&["status"])["last_passed_drill"], Value::Null);
    assert_eq!(drills.site.summary(&["list"])["backups"][0]["verified"], false);
    drills.site.pgv(&["restore", "--to", "last-verified", "--pgdata", "/nowhere", "--dry-run"]).expect(5);
    // What a sample shows is a finding all the same.
    let table = relation(&drills.server, "sale_order");
    let _ = sql(&drills.server, "checkpoint");
    drills.server.stop(Mode::Fast).unwrap();
    change_page(&table, 1, false, |page| page[5000] ^= 4);
    drills.server.start().unwrap();
    let _ = drills.site.pgv(&["backup"]).expect(3);
    let said = drills.fails(&["--room", "400MiB"], &["page-checksums"]);
    assert!(said.contains("block 1"), "{said}");
    drills.verify(&["--runner", "kubernetes"]).expect(2).says("not a pod");
}

/// Rolling forward: each generation is made of the one before and of WAL, with production asked for nothing, and restores to the same
/// as the first backup with all the WAL since.
#[test]
fn a_backup_made_of_a_drill_restores_as_the_original_does() {
    let drills = Drills::new("autovacuum_naptime = 1s\nwal_log_hints = on");
    let (site, server) = (&drills.site, &drills.server);
    let mut init = server.client("pgbench").unwrap();
    let _ = init.args(["-q", "-i", "-s", "2"]);
    assert_eq!(run(init).code, Some(0));
    let original = site.backup("local")["backup_id"].as_str().unwrap().to_owned();
    let mut made: Vec<String> = Vec::new();
    let load = |transactions: &str| {
        let mut load = server.client("pgbench").unwrap();
        let _ = load.args(["-c", "2", "-t", transactions]);
        assert_eq!(run(load).code, Some(0));
    };
    for generation in 1..=if full() { 10 } else { 3 } {
        load("300");
        let _ = sql(
            server,
            &format!("create table g{generation} as select g, md5(g::text) from generate_series(1, 3000) g; checkpoint"),
        );
        let _ = switch_and_archive(server);
        let drill = drills.verify(&["--promote-to-backup"]).expect(0).json();
        assert_eq!(drill["result"], "passed", "{drill:#}");
        assert_eq!(
            drill["backup_id"].as_str(),
            Some(made.last().unwrap_or(&original).as_str()),
            "the drill starts from the newest"
        );
        let id = drill["promoted_to"].as_str().unwrap().to_owned();
        let listed = site.summary(&["list"]);
        let backup =
            listed["backups"].as_array().unwrap().iter().find(|backup| backup["backup_id"] == id.as_str()).unwrap().clone();
        assert_eq!(backup["verified"], true, "verified by construction");
        assert_eq!((backup["kind"].as_str(), backup["from_standby"].as_bool()), (Some("incremental"), Some(true)));
        made.push(id.clone());

        load("100");
        let _ = sql(server, "checkpoint");
        let _ = switch_and_archive(server);
        let end = sql(server, &format!("select pg_create_restore_point('end {generation}')"));
        let _ = switch_and_archive(server);
        let target = format!("name:end {generation}");
        // Pages first: whoever reads leaves hints in them.
        let stopped = |id: &str| {
            let (mut restored, outcome) = site.restore_to(&target, &["--backup", id]);
            assert_eq!(outcome, Outcome::Paused);
            restored.stop(Mode::Fast).unwrap();
            restored.pgdata().to_path_buf()
        };
        let (first, second) = (stopped(&original), stopped(&id));
        let differing = differing_pages(&first, &second);
        assert!(differing.is_empty(), "generation {generation} up to {end}: {differing:?}");
        let dump = |pgdata: &Path| {
            let (restored, _) = site.recover(pgdata);
            let dump = run({
                let mut dump = restored.client("pg_dump").unwrap();
                let _ = dump.args(["--no-comments", "postgres"]);
                dump
            });
            // Each dump has a key of its own there.
            dump.ok().stdout.lines().filter(|line| !line.contains("restrict ")).map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        let (first, second) = (dump(&first), dump(&second));
        let differing = first.iter().zip(&second).find(|(one, other)| one != other);
        assert!(differing.is_none() && first.len() == second.len(), "generation {generation} up to {end}: {differing:?}");
    }
    // A target between two generations is reached from the one before it.
    let plan = site.summary(&["restore", "--to", "name:end 1", "--pgdata", "/nowhere", "--dry-run"]);
    assert_eq!(plan["backup_id"].as_str(), Some(made[0].as_str()));
    site.pgv(&["check"]).ok();
    drills.assert_nothing_left();
}

/// A page of a heap without what a reader may note on it (`heap_mask` in PostgreSQL), and without the checksum over that.
fn without_hints(page: &[u8]) -> Vec<u8> {
    let mut page = page.to_vec();
    let word = |page: &[u8], at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    page[8..10].fill(0);
    let (lower, special) = (word(&page, 12), word(&page, 16));
    if special == page.len() {
        for pointer in (24..lower).step_by(4) {
            let item = u32::from_le_bytes(page[pointer..pointer + 4].try_into().unwrap());
            // Bits 15 and 16 are the state: 1 is a tuple.
            if item >> 15 & 3 == 1 {
                page[(item & 0x7FFF) as usize + 21] &= 0xF0;
            }
        }
    }
    page
}

/// Pages of main forks that are not the same in two stopped clusters.
fn differing_pages(one: &Path, other: &Path) -> Vec<String> {
    let pages = |root: &Path| -> BTreeMap<String, Vec<u8>> {
        let all = tree(root).into_iter();
        all.filter(|(path, _)| {
            pgvault_core::postgres::RelationFile::parse(path).is_some_and(|r| r.fork == pgvault_core::postgres::Fork::Main)
        })
        .map(|(path, (_, bytes))| (path, bytes))
        .collect()
    };
    let (one, other) = (pages(one), pages(other));
    let mut differing: Vec<String> =
        one.keys().chain(other.keys()).filter(|path| one.contains_key(*path) != other.contains_key(*path)).cloned().collect();
    for (path, bytes) in &one {
        let Some(others) = other.get(path) else { continue };
        for (number, (a, b)) in bytes.chunks(8192).zip(others.chunks(8192)).enumerate() {
            if without_hints(a) != without_hints(b) {
                differing.push(format!("{path} block {number}"));
            }
        }
        if bytes.len() != others.len() {
            differing.push(format!("{path}: {} and {} bytes", bytes.len(), others.len()));
        }
    }
    differing
}

/// All that a drill needs is the address of the vault, a key, and programs of PostgreSQL.
#[test]
fn a_drill_on_a_machine_that_has_only_the_vault_and_a_key() {
    let drills = Drills::new("");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(server, ODOO);
    let _ = site.backup("remote");
    let _ = switch_and_archive(server);
    let system = sql(server, "select system_identifier from pg_control_system()");
    let Drills { site, mut server, .. } = drills;
    server.stop(Mode::Fast).unwrap();
    drop(server);
    fs::remove_dir_all(site.path("main")).unwrap();
    site.configure_text(common::VAULT, "", None);
    let text = fs::read_to_string(site.path("pgvault.toml")).unwrap();
    let programs = format!("[cluster.main.drill]\nprograms = [\"{}\"]\n", site.install.bin().display());
    let _ = site.write("pgvault.toml", format!("{text}\n{programs}"));
    let elsewhere = site.directory("elsewhere");
    let ran = site.pgv(&["--output", "json", "verify", "--system-id", &system, "--folder", elsewhere.to_str().unwrap()]).expect(0);
    assert_eq!(ran.json()["result"], "passed");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    // Without room it is not begun.
    let ran = site.pgv(&["verify", "--folder", "/proc"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
}
