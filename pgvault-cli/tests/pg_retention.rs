//! Retention over a real server's backups and WAL: what is left restores, and what is gone frees its space.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{Ran, Site, files_below, run, sql, switch_and_archive};
use serde_json::Value;

/// Runs pgvault under a policy.
fn under(site: &Site, policy: &[(&str, &str)], arguments: &[&str]) -> Ran {
    let mut command = site.pgvault(arguments);
    for (key, value) in policy {
        command.env(format!("PGVAULT_CLUSTER__MAIN__RETENTION__{key}"), value);
    }
    run(command)
}

fn json(site: &Site, policy: &[(&str, &str)], arguments: &[&str]) -> Value {
    let all: Vec<&str> = ["--output", "json"].iter().chain(arguments).copied().collect();
    under(site, policy, &all).ok().json()
}

/// Lets so many hours pass for everything in a vault: the times of a directory's files are its store's.
fn age(vault: &Path, hours: u64) {
    for file in files_below(vault) {
        let file = fs::File::options().write(true).open(vault.join(file)).unwrap();
        let written: SystemTime = file.metadata().unwrap().modified().unwrap();
        file.set_modified(written - Duration::from_secs(hours * 3600)).unwrap();
    }
}

/// R8, T18: backups with WAL in between; after expiry and collection each that is left restores to its own moment and to the last one.
#[test]
fn r8_t18_what_is_left_after_expiry_and_collection_restores() {
    let site = Site::in_directory();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let vault = site.vaults.directory(common::VAULT).unwrap();
    let _ = sql(&server, "create table t(n int, pad text)");
    let mut ids = Vec::new();
    for n in 1..=4 {
        let fill = format!("insert into t select {n}, repeat(md5(g::text), 20) from generate_series(1, 4000) g; checkpoint");
        let _ = sql(&server, &fill);
        ids.push(site.backup("local")["backup_id"].as_str().unwrap().to_owned());
        let _ = switch_and_archive(&server);
    }
    // Everything that the first three stored is written anew, so that their packs are of no use to the last.
    let _ = sql(&server, "vacuum full; checkpoint");
    ids.push(summary_id(&site.summary(&["backup", "--full"])));
    let _ = sql(&server, "insert into t select 9, 'last'");
    let _ = switch_and_archive(&server);
    let wal = site.wal_objects(1);
    age(&vault, 100);

    under(&site, &[], &["expire"]).expect(2).says("retention");
    let hold = json(&site, &[], &["hold", "add", "--backup", &ids[0], "--reason", "case 12"]);
    let two = [("KEEP_LAST", "2")];
    let dry = json(&site, &two, &["expire", "--dry-run"]);
    assert_eq!(dry["expired"].as_array().unwrap().len(), 2, "{dry}");
    under(&site, &two, &["expire", "--dry-run"]).ok().says("held by").says("one of the last").says("no rule keeps it");
    assert_eq!((site.snapshots(), site.wal_objects(1).len()), (5, wal.len()));

    let expired = json(&site, &two, &["expire"]);
    assert_eq!(expired["expired"], dry["expired"], "{expired}");
    assert_eq!(expired["wal"]["deleted"], dry["wal"]["deleted"]);
    assert!(expired["wal"]["deleted"].as_u64().unwrap() > 0, "{expired}");
    let listed: Vec<String> = site.summary(&["list"])["backups"].as_array().unwrap().iter().map(summary_id).collect();
    assert_eq!(listed, [ids[0].clone(), ids[3].clone(), ids[4].clone()]);
    assert_eq!(site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0, "what expired is no gap");

    // The first pass finds, a later one deletes.
    let first = json(&site, &[], &["gc"]);
    assert_eq!(first["swept"]["deleted"], 0, "{first}");
    under(&site, &[], &["gc", "--grace", "10h"]).expect(2).says("too short");
    let _ = json(&site, &[], &["hold", "remove", first_id(&hold)]);
    assert_eq!(json(&site, &[], &["hold", "list"])["holds"].as_array().unwrap().len(), 0);
    assert_eq!(json(&site, &two, &["expire"])["expired"].as_array().unwrap().len(), 1);
    let _ = json(&site, &[], &["gc"]);
    age(&vault, 100);
    let before = json(&site, &[], &["du"]);
    let last = json(&site, &[], &["gc"]);
    assert!(last["swept"]["deleted"].as_u64().unwrap() > 0, "{last}");
    let after = json(&site, &[], &["du", "--by", "kind"]);
    assert_eq!(after["saved"]["unneeded_bytes"], 0, "{after}");
    assert!(after["bytes"].as_u64().unwrap() < before["bytes"].as_u64().unwrap(), "{before} {after}");

    let _ = site.pgv(&["check"]).ok();
    for (id, rows) in [(&ids[3], "16000"), (&ids[4], "16000")] {
        let (restored, _) = site.restore_to("immediate", &["--backup", id]);
        assert_eq!(sql(&restored, "select count(*) from t"), rows);
        drop(restored);
        let (restored, _) = site.restore_to("latest", &["--backup", id]);
        assert_eq!(sql(&restored, "select count(*) from t"), "16001");
    }
}

fn summary_id(backup: &Value) -> String {
    backup["backup_id"].as_str().unwrap().to_owned()
}

fn first_id(hold: &Value) -> &str {
    hold["hold"]["id"].as_str().unwrap()
}
