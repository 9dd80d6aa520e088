//! `wal push` that takes others along: faster after an outage, and as honest as before about the file that was named.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Ran, Running, Site, sql, wait_until};
use pgvault_verify::process::Server;

fn configure(site: &Site, batch: u32) {
    let text = fs::read_to_string(site.path("pgvault.toml")).unwrap();
    let text = text.split("\n[cluster.main.wal]").next().unwrap();
    let _ = site.write("pgvault.toml", format!("{text}\n[cluster.main.wal]\npush_batch = {batch}\n"));
}

fn push(site: &Site, path: &Path) -> Ran {
    site.pgv(&["--output", "json", "wal", "push", path.to_str().unwrap()])
}

/// What PostgreSQL has marked as ready, oldest first.
fn ready(server: &Server) -> Vec<String> {
    let status = fs::read_dir(server.pgdata().join("pg_wal/archive_status")).unwrap();
    let mut names: Vec<String> = status
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".ready")?.to_owned()))
        .filter(|name| name.len() == 24)
        .collect();
    names.sort();
    names
}

/// A server whose archiver does not get through while the file `outage` is there, and segments that wait.
fn outage(site: &Site, count: usize) -> Server {
    let _ = site.write("outage", "");
    let command = format!(
        "archive_mode = on\narchive_command = 'test ! -e {} && {} --config {} wal push \"%p\"'",
        site.path("outage").display(),
        site.path("pgvault").display(),
        site.path("pgvault.toml").display()
    );
    let server = site.start(site.cluster("main").wal_segment_mib(1).config(command));
    let _ = sql(&server, "create table t(id bigserial, pad text)");
    while ready(&server).len() < count {
        let _ = sql(&server, "insert into t(pad) select md5(g::text) from generate_series(1, 200) g; select pg_switch_wal()");
    }
    server
}

/// A copy of what waits, to be treated as a server never would.
fn copy(site: &Site, server: &Server, name: &str) -> PathBuf {
    let folder = site.directory(name);
    let _ = site.directory(&format!("{name}/archive_status"));
    for segment in ready(server) {
        let bytes = fs::read(server.pgdata().join("pg_wal").join(&segment)).unwrap();
        let _ = site.write(&format!("{name}/{segment}"), bytes);
        let _ = site.write(&format!("{name}/archive_status/{segment}.ready"), "");
    }
    folder
}

#[test]
fn what_waits_after_an_outage_is_stored_by_few_calls_and_the_archiver_finds_it_stored() {
    let site = Site::new();
    let server = outage(&site, 17);
    let names = ready(&server);
    configure(&site, 8);
    let wal = |name: &str| server.pgdata().join("pg_wal").join(name);
    assert_eq!(push(&site, &wal(&names[0])).ok().json()["others_stored"], 7);
    assert_eq!(site.wal_objects(1).len(), 8);
    // Already there, and the next ones with it.
    let second = push(&site, &wal(&names[1])).ok().json();
    assert_eq!((&second["already_there"], &second["others_stored"]), (&true.into(), &7.into()));
    assert_eq!(push(&site, &wal(&names[2])).ok().json()["others_stored"], names.len() - 15);
    assert_eq!(site.wal_objects(1).len(), names.len());

    fs::remove_file(site.path("outage")).unwrap();
    // After a failure the archiver sleeps for a minute; a new segment wakes it.
    let _ = sql(&server, "insert into t(pad) values ('wake'); select pg_switch_wal()");
    wait_until("the archiver has told all of them", Duration::from_secs(90), || ready(&server).is_empty());
    let failed = sql(&server, "select coalesce(last_failed_wal, '') from pg_stat_archiver");
    assert!(failed.is_empty() || failed <= names[0], "{failed}");
    let _ = site.pgv(&["check"]).ok();
    for name in &names {
        let destination = site.fresh("fetched");
        let _ = site.pgv(&["wal", "fetch", name, destination.to_str().unwrap()]).ok();
        assert!(fs::read(destination).unwrap() == fs::read(wal(name)).unwrap(), "{name}");
    }
}

#[test]
fn t4_the_others_decide_nothing_about_the_one_that_was_named_and_it_nothing_about_them() {
    let site = Site::new();
    let server = outage(&site, 24);
    let names = ready(&server);
    let folder = copy(&site, &server, "waiting");
    drop(server);
    configure(&site, 4);
    let stored = || site.wal_objects(1);

    // A history comes before any segment.
    let _ = site.write("waiting/00000002.history", b"1\t0/3000000\tno recovery target specified\n");
    let _ = site.write("waiting/archive_status/00000002.history.ready", "");
    configure(&site, 2);
    assert_eq!(push(&site, &folder.join(&names[0])).ok().json()["others_stored"], 1);
    assert_eq!((stored().len(), site.wal_objects(2)), (1, vec!["00000002.history".to_owned()]));
    fs::remove_file(folder.join("archive_status/00000002.history.ready")).unwrap();
    configure(&site, 4);

    // One of the others differs from what is stored: told when it is named, and not before.
    let mut other = fs::read(folder.join(&names[2])).unwrap();
    *other.last_mut().unwrap() ^= 1;
    let _ = push(&site, &site.write(&names[2], other)).ok();
    assert_eq!(push(&site, &folder.join(&names[1])).ok().json()["others_stored"], 3);
    assert_eq!(stored(), names[..6].iter().map(|name| format!("{name}.wal")).collect::<Vec<_>>());
    let _ = site.write(&format!("waiting/{}", names[7]), "poison");
    let _ = push(&site, &folder.join(&names[2])).expect(1).says("different contents");
    // One of them cannot be read, one is not a segment: the rest goes on.
    let shown = stored().len();
    configure(&site, 6);
    fs::remove_file(folder.join(&names[9])).unwrap();
    let _ = site.write(&format!("waiting/{}", names[10]), "not a segment");
    assert_eq!(push(&site, &folder.join(&names[8])).ok().code, Some(0));
    assert!(stored().len() > shown);

    // A poisoned segment in front is refused each time; what waits behind it gets through.
    fs::remove_file(folder.join(format!("archive_status/{}.ready", names[9]))).unwrap();
    fs::remove_file(folder.join(format!("archive_status/{}.ready", names[10]))).unwrap();
    for _ in 0..8 {
        let ran = push(&site, &folder.join(&names[7]));
        assert_ne!(ran.code, Some(0));
    }
    assert_eq!(stored().len(), names.len() - 3, "all but the poisoned ones");

    // Switched off, or beside no archive_status: the one that is named.
    configure(&site, 1);
    let before = stored().len();
    let _ = site.write(&format!("waiting/{}", names[9]), fs::read(folder.join(&names[11])).unwrap());
    assert_eq!(push(&site, &folder.join(&names[11])).ok().json()["others_stored"], 0);
    assert_eq!(stored().len(), before);
}

#[test]
fn a_killed_batch_leaves_whole_objects_and_is_taken_up_again() {
    let site = Site::new();
    let server = outage(&site, 24);
    let names = ready(&server);
    let folder = copy(&site, &server, "waiting");
    drop(server);
    configure(&site, 6);
    let mut cut = 0;
    for name in names.iter().take(10) {
        let before = site.wal_objects(1).len();
        let mut child = Running::new(site.pgvault(&["wal", "push", folder.join(name).to_str().unwrap()]).spawn().unwrap());
        // As soon as the first of them is there.
        wait_until("something is stored, or all is done", Duration::from_secs(60), || {
            site.wal_objects(1).len() > before || !child.is_running()
        });
        if child.is_running() {
            child.kill9();
        }
        let after = site.wal_objects(1).len();
        cut += usize::from(after > before && after < before + 6);
        let _ = site.pgv(&["check", "--sizes-only"]);
    }
    assert!(cut > 0, "no batch was cut off in the middle");
    for name in &names {
        let _ = push(&site, &folder.join(name)).ok();
    }
    assert_eq!(site.wal_objects(1).len(), names.len());
    for name in &names {
        let destination = site.fresh("fetched");
        let _ = site.pgv(&["wal", "fetch", name, destination.to_str().unwrap()]).ok();
        assert!(fs::read(destination).unwrap() == fs::read(folder.join(name)).unwrap(), "{name}");
    }
}
