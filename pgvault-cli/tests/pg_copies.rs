//! A vault and its copy, with real PostgreSQL: what is restored from either is the same, and neither ends a recovery too early.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{Site, VAULT, assert_same_tree, run, sql, switch_and_archive};
use pgvault_verify::process::{Outcome, Server};

/// The vault, and a copy of it with a key of its own.
struct Copies {
    site: Site,
    server: Server,
    /// Behind everything that is in both.
    both: String,
}

const FALLBACK: &str = "fallback = [\"east\"]\n";

impl Copies {
    /// A cluster that archives; two backups, of which the second is incremental, and WAL behind them.
    fn new() -> Self {
        let site = Site::in_directory();
        let server = site.start(site.cluster("main").config(site.archiving()));
        let _ = site.write("passphrase-east", "another key altogether\n");
        let _ = sql(
            &server,
            "create table t(id int primary key, pad text); \
             insert into t select g, repeat(md5(g::text), 20) from generate_series(1, 20000) g",
        );
        let _ = site.backup("local");
        let _ = sql(&server, "update t set pad = 'changed' where id = 4711; insert into t values (20001, 'between')");
        let incremental = site.backup("local");
        assert_eq!(incremental["kind"], "incremental");
        let mut copies = Self { site, server, both: String::new() };
        copies.both = copies.add(20_002, "behind both");
        // More than a recovering server reads ahead of what it replays.
        let _ = sql(&copies.server, "insert into t select g, repeat(md5(g::text), 20) from generate_series(30001, 36000) g");
        let _ = switch_and_archive(&copies.server);
        copies.configure(false);
        copies
    }

    /// A row in a segment that is archived; gives the position behind it.
    fn add(&self, id: u32, what: &str) -> String {
        let _ = sql(&self.server, &format!("insert into t values ({id}, '{what}')"));
        let position = sql(&self.server, "select pg_current_wal_lsn()");
        let _ = switch_and_archive(&self.server);
        position
    }

    fn config(&self) -> std::path::PathBuf {
        self.site.path("pgvault.toml")
    }

    /// With the copy in the configuration, and with it asked for what the vault does not give.
    fn configure(&self, fallback: bool) {
        let text = fs::read_to_string(self.config()).unwrap();
        let text = text.split("\n[copies.east]").next().unwrap().replace(FALLBACK, "");
        let text = if fallback { text.replacen("[vault]\n", &format!("[vault]\n{FALLBACK}"), 1) } else { text };
        assert_eq!(text.contains(FALLBACK), fallback, "{text}");
        let east = self.site.path("east");
        let key = self.site.path("passphrase-east");
        let copy = format!("\n[copies.east]\nurl = \"file://{}\"\npassphrase_file = \"{}\"\n", east.display(), key.display());
        let _ = self.site.write("pgvault.toml", format!("{text}{copy}"));
    }

    /// Moves the vault, or its copy, out of sight, or back.
    fn set_away(&self, name: &str, away: bool) {
        let (here, there) = (self.site.path(name), self.site.path(format!("{name}-away")));
        let (from, to) = if away { (here, there) } else { (there, here) };
        if to.exists() {
            // What a look at the place has created.
            fs::remove_dir(&to).unwrap();
        }
        fs::rename(from, to).unwrap();
    }

    fn fetch(&self, name: &str, more: &[&str]) -> (Option<i32>, Option<Vec<u8>>) {
        let into = self.site.fresh("fetched");
        let mut arguments = vec!["wal", "fetch"];
        arguments.extend(more);
        arguments.extend([name, into.to_str().unwrap()]);
        let ran = run(self.site.pgvault(&arguments));
        (ran.code, fs::read(&into).ok())
    }
}

/// Everything but the two files that say how to get WAL, and when it was restored.
fn assert_same_data(one: &Path, other: &Path) {
    for pgdata in [one, other] {
        let settings = fs::read_to_string(pgdata.join("postgresql.auto.conf")).unwrap();
        let settings: Vec<&str> = settings.lines().filter(|line| !line.starts_with("restore_command")).collect();
        fs::write(pgdata.join("postgresql.auto.conf"), settings.join("\n")).unwrap();
    }
    assert_same_tree(one, other);
}

#[test]
fn a_copy_restores_what_the_vault_restores_and_goes_on_when_the_vault_is_gone() {
    let copies = Copies::new();
    let site = &copies.site;
    // Nothing is created by the way.
    site.pgv(&["copy", "--to", "east"]).expect(10).says("init --copy east");
    site.pgv(&["copy", "--to", "west"]).expect(2).says("east");
    site.pgv(&["init", "--copy", "east"]).ok();

    // PostgreSQL is not touched: it need not even run.
    let first = site.summary(&["copy", "--to", "east"]);
    assert_eq!((first["backups"].as_array().unwrap().len(), first["backups_present"].as_u64()), (2, Some(0)), "{first}");
    assert!(first["packs"].as_u64().unwrap() >= 2 && first["wal_objects"].as_u64().unwrap() >= 3, "{first}");
    let again = site.summary(&["copy", "--to", "east"]);
    assert_eq!((again["backups_present"].as_u64(), again["stored_bytes"].as_u64()), (Some(2), Some(0)), "{again}");
    assert_eq!(again["requests"]["put"].as_u64().unwrap_or(0), 0, "nothing is new: {again}");

    site.pgv(&["check", "--from", "east"]).ok();
    let (list, copied) = (site.summary(&["list"]), site.summary(&["list", "--from", "east"]));
    assert_eq!((&list["backups"], &list["window"]), (&copied["backups"], &copied["window"]));
    let newest = list["backups"][1]["backup_id"].as_str().unwrap().to_owned();
    for backup in [list["backups"][0]["backup_id"].as_str().unwrap(), newest.as_str()] {
        let from_vault = site.restore("immediate", &["--backup", backup]);
        let from_copy = site.restore("immediate", &["--backup", backup, "--from", "east"]);
        assert_same_data(&from_vault, &from_copy);
    }

    // The target's key is its own.
    let _ = site.write("passphrase-east", "correct horse battery staple\n");
    site.pgv(&["copy", "--to", "east"]).expect(12);
    site.pgv(&["list", "--from", "east"]).expect(12);
    let _ = site.write("passphrase-east", "another key altogether\n");

    // The vault is gone. A restore says so, or takes the copy when it may, and says that.
    copies.set_away(VAULT, true);
    site.pgv(&["restore", "--to", "latest", "--pgdata", site.fresh("refused").to_str().unwrap()]).expect(10);
    let (server, _) = site.restore_to("latest", &["--from", "east"]);
    assert_eq!(sql(&server, "select count(*), max(pad) filter (where id = 20002) from t"), "26002|behind both");
    drop(server);

    copies.configure(true);
    let pgdata = site.fresh("fallen-back");
    let said = site.restore_into(&pgdata, "immediate", &[]).ok().says("the vault cannot be restored from");
    let _ = said.says("restoring from copy east");
    assert_same_data(&pgdata, &site.restore("immediate", &["--from", "east"]));

    // The restored server calls back without naming a copy, and is given WAL by it.
    let (server, outcome) = site.restore_to(&format!("lsn:{}", copies.both), &[]);
    assert_eq!(outcome, Outcome::Paused);
    assert_eq!(sql(&server, "select pad from t where id = 20002"), "behind both");
    drop(server);
    // T1: where the copy ends, the vault may go on. Recovery stops there, and does not promote.
    let mut server = site.launch(&site.restore("latest", &[]));
    let ended = server.wait_until_paused_or_promoted(Duration::from_secs(60));
    assert!(ended.unwrap_err().to_string().contains("exited with exit code 255"), "it must stop, not promote");
}

/// T1: with real exit codes, which is what PostgreSQL sees.
#[test]
fn t1_wal_fetch_takes_neither_silence_nor_lag_for_the_end() {
    let copies = Copies::new();
    let site = &copies.site;
    site.pgv(&["init", "--copy", "east"]).ok();
    let _ = site.summary(&["copy", "--to", "east"]);
    let shipped = sql(&copies.server, "select last_archived_wal from pg_stat_archiver");
    // The copy lags behind.
    let _ = copies.add(20_003, "not shipped yet");
    let newest = sql(&copies.server, "select last_archived_wal from pg_stat_archiver");
    assert!(newest > shipped);
    let behind = "0000000100000000000000F0";
    copies.configure(true);

    let truth = |name: &str| fs::read(copies.server.pgdata().join("pg_wal").join(name)).unwrap();
    assert_eq!(copies.fetch(behind, &[]).0, Some(1), "both have answered");
    assert!(copies.fetch(&newest, &[]) == (Some(0), Some(truth(&newest))), "the vault has it");
    assert_eq!(copies.fetch(&newest, &["--from", "east"]).0, Some(1), "the copy alone, as was asked for");

    // One is lost in the vault, and those behind it are there: a gap, but for the copy.
    let name = site.vaults.object(&format!("{shipped}.wal"));
    let bytes = site.vaults.take(&name);
    assert!(copies.fetch(&shipped, &[]) == (Some(0), Some(truth(&shipped))));
    site.vaults.replace(&name, bytes);

    copies.set_away(VAULT, true);
    assert!(copies.fetch(&shipped, &[]) == (Some(0), Some(truth(&shipped))), "the copy has it");
    assert_eq!(copies.fetch(&newest, &[]).0, Some(255), "the vault may have it");
    assert_eq!(copies.fetch(behind, &[]).0, Some(255), "recovery must not end");
    copies.set_away(VAULT, false);

    copies.set_away("east", true);
    assert!(copies.fetch(&newest, &[]) == (Some(0), Some(truth(&newest))), "the copy is not asked for what the vault has");
    assert_eq!(copies.fetch(behind, &[]).0, Some(255), "the copy may have it");
    copies.set_away("east", false);
    assert_eq!(copies.fetch(behind, &[]).0, Some(1));

    // What was missing comes with the next copy.
    let _ = site.summary(&["copy", "--to", "east"]);
    copies.set_away(VAULT, true);
    assert!(copies.fetch(&newest, &[]) == (Some(0), Some(truth(&newest))));
}
