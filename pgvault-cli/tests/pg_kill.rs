//! The real program, killed at random moments, on a full disk, with the wrong key, over damaged objects.
//!
//! The moments come from a seed that is printed (`PGVAULT_TEST_SEED` repeats a run); `PGVAULT_TEST_FULL=1` kills more often.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgvault_verify::process::{Install, Server};
use serde_json::Value;
use tempfile::TempDir;
use vault::{VAULT, Vaults};

#[path = "common/vault.rs"]
mod vault;

/// A server, a vault, and the configuration that joins them.
struct Place {
    server: Server,
    vaults: Vaults,
    folder: TempDir,
}

/// A way to damage an object.
type Change = dyn Fn(&mut Vec<u8>);

/// Files and what they hold.
type Tree = BTreeMap<String, Vec<u8>>;

fn in_memory() -> TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

impl Place {
    /// `noise` megabytes of rows that do not compress.
    fn new(noise: usize) -> Self {
        Self::with_vaults(noise, Vaults::new)
    }

    fn with_vaults(noise: usize, vaults: impl FnOnce(&Path) -> Vaults) -> Self {
        let folder = in_memory();
        let server = Server::builder(&Install::for_tests().unwrap())
            .wal_segment_mib(1)
            .config("autovacuum = off")
            .config("fsync = off")
            .config("wal_keep_size = '1GB'")
            .config("max_wal_size = '2GB'")
            .config("checkpoint_timeout = '1h'")
            .start()
            .unwrap();
        let rows = noise * 100;
        server
            .psql(&format!(
                "update pg_database set datistemplate = false; drop database template0; drop database template1;
                 create table noise (n int, bytes bytea); alter table noise alter bytes set storage external;
                 insert into noise select n, decode(string_agg(md5(random()::text), ''), 'hex')
                     from generate_series(1, {rows}) n, generate_series(1, 640) m group by n"
            ))
            .unwrap();
        server.psql("vacuum freeze analyze").unwrap();
        server.psql("checkpoint").unwrap();
        let place = Self { server, vaults: vaults(folder.path()), folder };
        fs::write(place.folder.path().join("passphrase"), "correct horse\n").unwrap();
        place.configure("passphrase");
        place
    }

    fn configure(&self, passphrase_file: &str) {
        let passphrase = format!("passphrase_file = \"{}\"", self.folder.path().join(passphrase_file).display());
        let (connection, pgdata) = (self.server.conninfo(), self.server.pgdata().display());
        let cluster = format!("[cluster.main]\nconnection = \"{connection}\"\npgdata = \"{pgdata}\"\n");
        // Who reads leaves hints in pages, in those of catalogues too, and here every byte is compared.
        let cluster = cluster + "[cluster.main.drill]\ncount_rows = false\n";
        fs::write(self.config(), self.vaults.config(VAULT, &passphrase, &cluster)).unwrap();
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("pgvault.toml")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgvault"));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG")) {
                let _ = command.env_remove(name);
            }
        }
        let _ = command.arg("--config").arg(self.config()).args(["--output", "json"]).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs to the expected exit code; gives the summary.
    fn expect(&self, code: i32, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = format!("{arguments:?}: {}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        text.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).unwrap())
    }

    fn backups(&self) -> Vec<String> {
        let list = self.expect(0, &["list"]);
        list["backups"].as_array().unwrap().iter().map(|b| b["backup_id"].as_str().unwrap().to_owned()).collect()
    }

    /// Archives every complete segment, as the server's archiver would.
    fn archive(&self) {
        // At a segment's start the function names the one before, which is complete: something is written first.
        let open = self.server.psql(
            "select pg_switch_wal(); select pg_logical_emit_message(false, '', ''); select pg_walfile_name(pg_current_wal_insert_lsn())",
        );
        let open = open.unwrap().lines().last().unwrap().to_owned();
        let folder = self.server.pgdata().join("pg_wal");
        let stored = self.vaults.names();
        let first = stored.iter().filter_map(|n| n.split_once("/wal/00000001/")).map(|(_, n)| n[..24].to_owned()).min();
        let Some(first) = first else { return };
        let mut names: Vec<String> =
            fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        for name in names.iter().filter(|n| n.len() == 24 && ***n >= *first && **n < open) {
            if !stored.iter().any(|stored| stored.ends_with(&format!("{name}.wal"))) {
                let _ = self.expect(0, &["wal", "push", folder.join(name).to_str().unwrap()]);
            }
        }
    }

    fn restore(id: &str, to: &Path, more: &[&str]) -> Vec<String> {
        let arguments = ["restore", "--to", "immediate", "--backup", id, "--pgdata", to.to_str().unwrap()];
        arguments.iter().chain(more).map(|&argument| argument.to_owned()).collect()
    }

    /// Restores a backup afresh and compares its relations with the source's.
    fn assert_restores(&self, id: &str) -> Tree {
        let target = in_memory();
        let arguments = Self::restore(id, target.path(), &[]);
        let _ = self.expect(0, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let restored = tree(target.path());
        let relation =
            |name: &&String| (name.starts_with("base/") || name.starts_with("global/")) && !name.ends_with("pg_internal.init");
        let source = tree(self.server.pgdata());
        for name in source.keys().filter(relation).filter(|name| *name != "global/pg_control") {
            assert!(source.get(name) == restored.get(name), "{id}: {name} differs");
        }
        assert!(restored.keys().filter(relation).count() > 200);
        restored
    }
}

fn walkdir(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root) else { return found };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walkdir(&path)) } else { found.push(path.to_str().unwrap().to_owned()) }
    }
    found.sort();
    found
}

fn tree(root: &Path) -> Tree {
    let prefix = format!("{}/", root.display());
    walkdir(root)
        .into_iter()
        .filter(|name| !name.starts_with(&format!("{prefix}pg_wal/")))
        .map(|name| (name[prefix.len()..].to_owned(), fs::read(&name).unwrap()))
        .collect()
}

/// A small generator of its own: the moments need no more, and a seed repeats them.
struct Moments(u64);

impl Moments {
    fn seeded(test: &str) -> Self {
        let given = std::env::var("PGVAULT_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| u64::from(std::process::id()) ^ jiff::Timestamp::now().as_microsecond().unsigned_abs());
        eprintln!("{test}: PGVAULT_TEST_SEED={seed}");
        Self(seed | 1)
    }

    /// A moment up to `most`.
    fn within(&mut self, most: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        most * u32::try_from(self.0 % 1000).unwrap() / 1000
    }
}

fn rounds() -> usize {
    if std::env::var_os("PGVAULT_TEST_FULL").is_some() { 50 } else { 12 }
}

/// Starts the program and kills it after a while; true when it had already succeeded.
fn kill_after(mut command: Command, moment: Duration) -> bool {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(moment);
    // Not an error when it has ended.
    let _ = child.kill();
    child.wait().unwrap().success()
}

#[test]
fn a_backup_killed_at_any_moment_leaves_a_whole_vault() {
    let place = Place::new(8);
    let mut moments = Moments::seeded("backups");
    let _ = place.expect(0, &["init"]);
    let timed = || {
        let began = Instant::now();
        let id = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
        (id, began.elapsed())
    };
    // Those that are killed find pages that are stored already, and are faster than the first.
    let ((first, _), (second, whole)) = (timed(), timed());
    let mut acknowledged = vec![first, second];
    let mut finished = 0;
    for round in 0..rounds() {
        let source = if round % 3 == 2 { "remote" } else { "local" };
        let moment = moments.within(whole);
        let done = kill_after(place.command(&["backup", "--source", source]), moment);
        finished += usize::from(done);
        place.archive();
        let check = place.expect(0, &["check"]);
        assert_eq!(check["result"], "passed", "round {round}, {source} killed after {moment:?}: {check}");
        let listed = place.backups();
        assert!(acknowledged.iter().all(|id| listed.contains(id)), "round {round}: {listed:?} lacks one of {acknowledged:?}");
        acknowledged = listed;
    }
    let last = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
    let listed = place.backups();
    assert!(listed.contains(&last));
    eprintln!("{} of {} backups were killed in time; {} are listed", rounds() - finished, rounds(), listed.len());
    assert!(finished < rounds(), "no kill came in time");
    for id in &listed {
        let _ = place.assert_restores(id);
    }
}

#[test]
fn a_restore_killed_at_any_moment_cannot_be_started_and_is_completed_by_delta() {
    let place = Place::new(8);
    let mut moments = Moments::seeded("restores");
    let _ = place.expect(0, &["init"]);
    let id = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
    let fresh = place.assert_restores(&id);
    let began = Instant::now();
    let target = in_memory();
    let arguments = Place::restore(&id, target.path(), &[]);
    let _ = place.expect(0, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let whole = began.elapsed();
    drop(target);
    let (mut killed, mut halfway) = (0, 0);
    for round in 0..rounds() {
        let target = in_memory();
        let arguments = Place::restore(&id, target.path(), &[]);
        let moment = moments.within(whole);
        let done = kill_after(place.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>()), moment);
        let left = tree(target.path());
        if left.contains_key("global/pg_control") {
            assert!(left == fresh, "round {round}, killed after {moment:?}: it could be started, and is not whole");
        } else {
            assert!(!done, "round {round}: it succeeded without pg_control");
            killed += 1;
            halfway += usize::from(!left.is_empty());
        }
        if done {
            continue;
        }
        // Killed once more while it is being completed.
        let arguments = Place::restore(&id, target.path(), &["--delta"]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        if round % 2 == 0 && !kill_after(place.command(&arguments), moments.within(whole)) {
            let left = tree(target.path());
            assert!(!left.contains_key("global/pg_control") || left == fresh, "round {round}: a broken delta could be started");
        }
        let _ = place.expect(0, &arguments);
        let completed = tree(target.path());
        let differ: Vec<&String> =
            completed.keys().chain(fresh.keys()).filter(|name| completed.get(*name) != fresh.get(*name)).collect();
        assert!(differ.is_empty(), "round {round}: completed by --delta, and still these differ from a fresh restore: {differ:?}");
    }
    eprintln!("{killed} of {} restores were killed in time, {halfway} of them with files written", rounds());
    assert!(killed > 0, "no kill came in time");
    assert_eq!(place.expect(0, &["check"])["result"], "passed");
}

/// Unmounts when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// T6: no space left in the middle of a backup.
#[test]
fn t6_a_full_disk_fails_the_backup_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    // Only a directory can be full.
    let place = Place::with_vaults(8, Vaults::in_directory);
    let vault = place.vaults.directory(VAULT).unwrap();
    fs::create_dir(&vault).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=40m", "tmpfs"]).arg(&vault).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mounting a small file system is not allowed here");
        return;
    }
    let _mount = Mount(vault.clone());
    let _ = place.expect(0, &["init"]);
    let first = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
    let filler = vault.join("filler");
    for left in [0_u64, 4 << 10, 64 << 10, 2 << 20] {
        let free = rustix::fs::statvfs(&vault).unwrap();
        let fill = (free.f_bavail * free.f_frsize).saturating_sub(left);
        fs::write(&filler, vec![1; usize::try_from(fill).unwrap()]).unwrap();
        // All of it: what has changed may fit.
        let output = place.run(&["backup", "--full"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(1 | 20)), "with {left} bytes left: {} {said}", output.status);
        assert!(said.contains("space") && !said.contains("panicked"), "with {left} bytes left: {said}");
        assert_eq!(place.expect(0, &["check"])["result"], "passed");
        assert_eq!(place.backups(), [first.as_str()]);
        fs::remove_file(&filler).unwrap();
    }
    let second = place.expect(0, &["backup", "--full"])["backup_id"].as_str().unwrap().to_owned();
    assert_eq!(place.backups(), [first.clone(), second.clone()]);
    place.archive();
    assert_eq!(place.expect(0, &["check"])["result"], "passed");
    let _ = (place.assert_restores(&first), place.assert_restores(&second));
}

#[test]
fn keys_and_damage_end_with_the_documented_exit_codes() {
    let place = Place::new(1);
    let file = |name: &str| place.folder.path().join(name);
    let text = |name: &str| file(name).to_str().unwrap().to_owned();
    fs::write(file("new"), "battery staple\n").unwrap();
    fs::write(file("wrong"), "guess\n").unwrap();
    let _ = place.expect(10, &["list"]);
    let _ = place.expect(0, &["init"]);
    let id = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
    let keys = || place.expect(0, &["key", "list"])["keys"].as_array().unwrap().clone();
    let old = keys()[0]["key_id"].as_str().unwrap().to_owned();

    // The wrong key: 12, and the message names the right one.
    place.configure("wrong");
    let refused = place.expect(12, &["list"]);
    assert!(refused["error"]["hint"].as_str().unwrap().contains(&old), "{refused}");
    let _ = place.expect(12, &["check"]);
    let _ = place.expect(12, &["key", "add", "--new-passphrase-file", &text("new")]);
    assert_eq!(place.run(&["wal", "fetch", "000000010000000000000001", &text("x")]).status.code(), Some(255));
    assert_eq!(keys().len(), 1, "listing needs no key");
    place.configure("passphrase");

    // The last key stays; a rotation leaves the new one alone.
    let _ = place.expect(2, &["key", "revoke", &old]);
    let added = place.expect(0, &["key", "add", "--new-passphrase-file", &text("wrong"), "--label", "spare"]);
    assert_eq!(keys().len(), 2);
    let _ = place.expect(0, &["key", "revoke", added["added"]["key_id"].as_str().unwrap()]);
    let _ = place.expect(0, &["key", "rotate", &old, "--new-passphrase-file", &text("new"), "--new-data-key"]);
    let _ = place.expect(12, &["list"]);
    place.configure("new");
    assert_eq!(place.backups(), [id.as_str()]);
    assert_eq!(place.expect(0, &["check"])["result"], "passed");
    let _ = place.assert_restores(&id);
    // Written under the new data key, beside what is under the old.
    let second = place.expect(0, &["backup"])["backup_id"].as_str().unwrap().to_owned();
    let _ = place.assert_restores(&second);
    // Running `init` again brings no revoked key back.
    let _ = place.expect(0, &["init"]);
    assert_eq!(keys().len(), 1);
    place.archive();
    assert_eq!(place.expect(0, &["check"])["result"], "passed");

    // Damage: 4 from whoever reads it, and nothing that could be started; 255 where a server would promote.
    let objects = place.vaults.names();
    let damaged = |what: &str, change: &Change, then: &dyn Fn(&str)| {
        let name = objects.iter().find(|name| name.contains(what)).unwrap();
        let original = place.vaults.read(name);
        let mut bytes = original.to_vec();
        change(&mut bytes);
        place.vaults.replace(name, bytes);
        then(name);
        place.vaults.replace(name, original);
    };
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
    };
    let empty = |bytes: &mut Vec<u8>| bytes.clear();
    let refused = |backup: &str| {
        let target = in_memory();
        let arguments = Place::restore(backup, target.path(), &[]);
        let _ = place.expect(4, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(!target.path().join("global/pg_control").exists());
    };
    let changes: [&Change; 2] = [&flip, &empty];
    for change in changes {
        damaged(&format!("snap/{id}"), change, &|name| {
            let report = place.expect(4, &["check"]);
            let named = report["findings"].as_array().unwrap().iter().any(|f| name.ends_with(f["object"].as_str().unwrap()));
            assert!(named && report.to_string().contains(&id), "{report}");
            refused(&id);
        });
        damaged("/wal/", change, &|name| {
            let _ = place.expect(4, &["check"]);
            let segment = &name.rsplit('/').next().unwrap()[..24];
            assert_eq!(place.run(&["wal", "fetch", segment, &text("fetched")]).status.code(), Some(255));
            assert!(!file("fetched").exists());
        });
        damaged("/epochs/", change, &|_| {
            let _ = place.expect(4, &["check"]);
            refused(&id);
        });
        damaged("/keys/", change, &|_| drop(place.expect(4, &["check"])));
        damaged("vault.json", change, &|_| drop(place.expect(4, &["check"])));
        // Every pack of either backup.
        for pack in objects.iter().filter(|name| name.contains("/pack/")) {
            damaged(pack, change, &|name| {
                let report = place.expect(4, &["check"]);
                let finding = report["findings"].as_array().unwrap().iter().find(|f| name.ends_with(f["object"].as_str().unwrap()));
                let hurts = finding.unwrap_or_else(|| panic!("{name}: {report}"))["hurts"].as_array().unwrap().clone();
                // The second backup refers to packs of the first.
                assert!((1..=2).contains(&hurts.len()), "{report}");
                for hurt in &hurts {
                    refused(hurt.as_str().unwrap());
                }
            });
        }
    }
    let _ = place.vaults.take("vault.json");
    let _ = place.expect(10, &["check"]);
}
