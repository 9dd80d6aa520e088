//! What `wal stream` does when its replication slot is not what it was (R5).
//!
//! The slot only keeps WAL on the server; where streaming goes on is decided by where the vault ends. WAL that the server
//! still has is fetched whatever became of the slot; WAL that is gone leaves a gap that is told, listed and not crossed.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Site, lsn, sql, wait_until};
use pgvault_core::postgres::{Acknowledgement, ConnInfo, Connection, Mode};
use pgvault_verify::process::Server;

const PATIENCE: Duration = Duration::from_secs(60);

/// A small cluster whose segments are 1 MiB, so that few rows fill many.
fn start(site: &Site, keep: &str) -> Server {
    let builder = site.cluster("main").wal_segment_mib(1).config("wal_keep_size = 0\nmin_wal_size = 2MB\nmax_wal_size = 2MB");
    let server = site.start(builder.config(keep));
    let _ = sql(&server, "CREATE TABLE t (id bigserial, pad text)");
    server
}

/// Writes at least `segments` segments.
fn fill(server: &Server, segments: u32) {
    for _ in 0..segments {
        let _ = sql(
            server,
            "INSERT INTO t (pad) SELECT repeat(md5(g::text), 8) FROM generate_series(1, 3000) g; SELECT pg_switch_wal()",
        );
    }
}

fn last_segment(server: &Server) -> String {
    sql(server, "SELECT pg_walfile_name(pg_switch_wal())").trim().to_owned()
}

fn gaps(site: &Site) -> usize {
    site.summary(&["list"])["gaps"].as_array().unwrap().len()
}

/// Streams until a segment that was written meanwhile is in the vault. A slot that has to be made anew begins at the last
/// checkpoint, which may lie behind what was written before: so more than one may have to be written.
fn catch_up(site: &Site, server: &Server) {
    let stream = site.stream();
    let active = "SELECT coalesce(bool_or(active), false) FROM pg_replication_slots WHERE slot_name = 'pgvault'";
    wait_until("the stream is attached", PATIENCE, || sql(server, active).trim() == "t");
    let mut wanted = String::new();
    let mut next = Instant::now();
    wait_until("the stream has caught up", PATIENCE, || {
        if Instant::now() >= next {
            let _ = sql(server, "INSERT INTO t (pad) VALUES ('caught up')");
            wanted = format!("{}.wal", last_segment(server));
            next = Instant::now() + Duration::from_secs(5);
        }
        site.wal_objects(1).contains(&wanted)
    });
    assert_eq!(stream.terminate(), Some(0));
}

#[test]
fn r5_a_dropped_or_advanced_slot_leaves_no_gap_while_the_server_has_the_wal() {
    let site = Site::new();
    let server = start(&site, "wal_keep_size = 1GB");
    catch_up(&site, &server);
    let _ = site.backup("local");
    for change in [
        "SELECT pg_drop_replication_slot('pgvault')",
        "SELECT pg_replication_slot_advance('pgvault', pg_current_wal_lsn())",
        // Somebody made it anew, without reserving anything.
        "SELECT pg_drop_replication_slot('pgvault'), pg_create_physical_replication_slot('pgvault', false)",
    ] {
        fill(&server, 5);
        let _ = sql(&server, change);
        fill(&server, 2);
        catch_up(&site, &server);
        let listed = site.summary(&["list"]);
        assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "after {change}: {listed}");
    }
    site.pgv(&["check"]).ok();
    let rows = sql(&server, "SELECT count(*) FROM t");
    let (restored, _) = site.restore_to("latest", &[]);
    assert_eq!(sql(&restored, "SELECT count(*) FROM t"), rows);
}

#[test]
fn r5_wal_that_the_server_gave_up_is_a_gap_that_is_told_and_not_crossed() {
    let site = Site::new();
    let server = start(&site, "max_slot_wal_keep_size = 2MB");
    catch_up(&site, &server);
    let _ = site.backup("local");
    let status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgvault'";
    let before = gaps(&site);
    wait_until("the slot is lost", PATIENCE, || {
        fill(&server, 4);
        let _ = sql(&server, "CHECKPOINT");
        sql(&server, status).trim() == "lost"
    });
    catch_up(&site, &server);
    assert_eq!(gaps(&site), before + 1);
    let told = site.summary(&["list"])["gaps"].as_array().unwrap().last().unwrap().clone();
    assert!(told["recorded_at"].is_string() && told["from_time"].is_string(), "{told}");
    site.pgv(&["restore", "--to", "latest", "--pgdata", site.path("refused").to_str().unwrap()]).expect(5).says("gap");
    assert_eq!(site.pgv(&["check"]).code, Some(4), "a gap hurts the backup before it");

    let backup = site.backup("local");
    let _ = sql(&server, "INSERT INTO t (pad) VALUES ('after the gap')");
    catch_up(&site, &server);
    let rows = sql(&server, "SELECT count(*) FROM t");
    let plan = site.summary(&["restore", "--to", "latest", "--dry-run", "--pgdata", "unused"]);
    assert_eq!(plan["backup_id"], backup["backup_id"]);
    let (restored, _) = site.restore_to("latest", &[]);
    assert_eq!(sql(&restored, "SELECT count(*) FROM t"), rows);
}

/// A receiver that confirms less than the slot's position moves the slot back, onto WAL that the server no longer has.
#[test]
fn r5_a_slot_that_was_moved_back_onto_removed_wal_is_made_anew() {
    let site = Site::new();
    let server = start(&site, "max_slot_wal_keep_size = -1");
    catch_up(&site, &server);
    let vault_end = site.vault_end(1, 1 << 20).unwrap();
    let _ = sql(&server, "SELECT pg_drop_replication_slot('pgvault')");
    for _ in 0..3 {
        fill(&server, 4);
        let _ = sql(&server, "CHECKPOINT");
    }
    let _ = sql(&server, "SELECT pg_create_physical_replication_slot('pgvault', true)");
    let options = ConnInfo::parse(&server.conninfo(), &|_| None).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut connection = Connection::connect(&options, Mode::Replication).await.unwrap();
        let now = connection.identify_system().await.unwrap();
        let mut stream = connection.start_replication(Some("pgvault"), now.flush_lsn, now.timeline).await.unwrap();
        let back = Acknowledgement { write: vault_end, flush: vault_end, apply: vault_end };
        stream.send_status(back, true, jiff::Timestamp::now()).await.unwrap();
        stream.stop().await.unwrap();
    });
    assert_eq!(lsn(&server, "restart_lsn from pg_replication_slots"), vault_end, "the server believes everything");
    catch_up(&site, &server);
    let listed = site.summary(&["list"]);
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 1, "{listed}");
}

/// H19: a connection that is open and says nothing is given up, and streaming goes on with the next one.
#[test]
fn h19_a_server_that_fell_silent_is_left_and_found_again() {
    let site = Site::new();
    let server = start(&site, "");
    let text = fs::read_to_string(site.path("pgvault.toml")).unwrap();
    let _ = site.write("pgvault.toml", format!("{text}\n[cluster.main.wal]\nreceive_timeout = \"2s\"\n"));
    let stream = site.stream();
    let pid = "SELECT coalesce(max(active_pid), 0) FROM pg_replication_slots";
    let walsender = || sql(&server, pid).trim().parse::<i32>().unwrap();
    wait_until("the stream is attached", PATIENCE, || walsender() != 0);
    // An idle server answers when it is asked, for longer than the timeout.
    std::thread::sleep(Duration::from_secs(5));
    assert!(!stream.log().contains("not answered"), "{}", stream.log());
    let first = walsender();
    let process = rustix::process::Pid::from_raw(first).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    wait_until("the silence is noticed", PATIENCE, || stream.log().contains("has not answered for 2 s"));
    rustix::process::kill_process(process, rustix::process::Signal::CONT).unwrap();
    wait_until("another connection streams", PATIENCE, || ![0, first].contains(&walsender()));
    let wanted = format!("{}.wal", last_segment(&server));
    wait_until("the stream has caught up", PATIENCE, || site.wal_objects(1).contains(&wanted));
    assert_eq!(stream.terminate(), Some(0));
}

/// R2: a backup stores its own WAL while no stream runs. The stream that starts again must not take what lies behind the hole for
/// everything before it: confirming that would make the server forget what the vault lacks.
#[test]
fn r2_a_stream_goes_on_at_a_hole_in_the_vault_and_not_behind_it() {
    let site = Site::new();
    let server = start(&site, "max_slot_wal_keep_size = -1");
    catch_up(&site, &server);
    let _ = site.backup("local");
    let before = gaps(&site);
    fill(&server, 6);
    // Nothing archives now: the backup fetches just what it needs.
    let _ = site.backup("local");
    assert_eq!(gaps(&site), before + 1);
    site.pgv(&["check"]).expect(4);
    catch_up(&site, &server);
    let listed = site.summary(&["list"]);
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed}");
    site.pgv(&["check"]).ok();
}

/// A disk's snapshot was put back: the server has less than it has sent, and then other WAL under the same positions (R2, R11).
#[test]
fn r11_a_server_that_was_set_back_is_refused() {
    let site = Site::new();
    let mut server = start(&site, "wal_keep_size = 64MB");
    catch_up(&site, &server);
    server.stop(pgvault_verify::process::Mode::Fast).unwrap();
    let (data, snapshot) = (server.pgdata().to_path_buf(), site.path("snapshot"));
    let copy = |from: &Path, to: &Path| {
        assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    };
    copy(&data, &snapshot);
    server.start().unwrap();
    let stream = site.stream();
    let _ = sql(&server, "INSERT INTO t (pad) VALUES ('forgotten')");
    let end = lsn(&server, "pg_current_wal_flush_lsn()");
    wait_until("it is stored", PATIENCE, || site.vault_end(1, 1 << 20) >= Some(end));
    assert_eq!(stream.terminate(), Some(0));
    server.stop(pgvault_verify::process::Mode::Fast).unwrap();
    let stored = site.wal_objects(1);

    fs::remove_dir_all(&data).unwrap();
    copy(&snapshot, &data);
    server.start().unwrap();
    let _ = site.pgv(&["wal", "stream"]).expect(1).says("it was set back");
    // It goes on, past where the vault is.
    while lsn(&server, "pg_current_wal_flush_lsn()").0 < end.0 + 4096 {
        let _ = sql(&server, "INSERT INTO t (pad) VALUES ('another history')");
    }
    let _ = site.pgv(&["wal", "stream"]).expect(1).says("is not what the vault has of it");
    assert_eq!(site.wal_objects(1), stored);
}
