//! `wal stream` while it runs: what it stores and when, what it costs, and what happens when the store or the server is in trouble.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Random, Site, client, full, lsn, segment_number, sql, wait_until};
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Mode, Outcome, Server};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn attached(server: &Server) -> bool {
    sql(server, "select count(*) from pg_stat_replication where application_name = 'pgvault' and state = 'streaming'") == "1"
}

fn wait_until_attached(server: &Server) {
    wait_until("the stream is attached", Duration::from_secs(60), || attached(server));
}

fn status(stream: &common::Running) -> Value {
    serde_json::from_str(&stream.http("/status").1).unwrap()
}

/// The value of a metric.
fn metric(stream: &common::Running, name: &str) -> f64 {
    let text = stream.http("/metrics").1;
    let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name} is not in\n{text}"))
}

/// New WAL is in the vault within the flush interval, nothing is stored while nothing is written, and parts restore like segments.
#[test]
fn new_wal_is_stored_within_the_interval_and_nothing_when_idle() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config("autovacuum = off\ncheckpoint_timeout = 1h"));
    site.wal_settings("flush_interval = \"300ms\"");
    let stream = site.stream_with(&["--metrics-listen", "127.0.0.1:0"]);
    wait_until_attached(&server);
    let _ = site.backup("remote");
    let _ = sql(&server, "create table t(n int)");
    let mut slowest = Duration::ZERO;
    for n in 0..20 {
        let _ = sql(&server, &format!("insert into t values ({n})"));
        let (began, end) = (Instant::now(), lsn(&server, "pg_current_wal_flush_lsn()"));
        wait_until("the row is in the vault", Duration::from_secs(20), || site.vault_end(1, 16 * MIB) >= Some(end));
        slowest = slowest.max(began.elapsed());
    }
    eprintln!("slowest {slowest:?}");
    assert!(site.wal_objects(1).iter().any(|name| name.contains(".part")));

    // A server that writes nothing costs nothing, but for the snapshot that it logs once after other WAL.
    let count = || site.wal_objects(1).len();
    wait_until("the server is quiet", Duration::from_secs(60), || {
        let before = lsn(&server, "pg_current_wal_lsn()");
        std::thread::sleep(Duration::from_secs(2));
        lsn(&server, "pg_current_wal_lsn()") == before
    });
    let (objects, end) = (count(), lsn(&server, "pg_current_wal_lsn()"));
    std::thread::sleep(Duration::from_secs(3));
    if lsn(&server, "pg_current_wal_lsn()") == end {
        assert_eq!(count(), objects);
    }

    assert_eq!(stream.http("/healthz").0, 200);
    assert_eq!(stream.http("/readyz").0, 200);
    assert_eq!(status(&stream)["connected"], true);
    assert!(metric(&stream, "pgvault_wal_archived_parts_total") >= 20.0);
    assert!(metric(&stream, "pgvault_wal_flush_seconds_count") >= 20.0);
    assert!(metric(&stream, "pgvault_wal_durable_lsn_bytes") >= 16_777_216.0);
    assert!(metric(&stream, "pgvault_wal_archive_lag_bytes") < 1.0);
    wait_until("the slot was looked at", Duration::from_secs(30), || {
        stream.http("/metrics").1.contains("pgvault_slot_retained_bytes")
    });
    assert_eq!(stream.http("/other").0, 404);

    let (restored, outcome) = site.restore_to("latest", &[]);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&restored, "select count(*), sum(n) from t"), "20|190");
    drop(stream);
}

/// R3: what is archived is what `pg_wal` has, over pauses, switches and messages that cross segment ends, at any segment size.
#[test]
fn r3_what_is_archived_is_what_was_written() {
    let mut random = Random::new();
    for mib in [1, 16, 64] {
        let site = Site::new();
        let builder =
            site.cluster("main").wal_segment_mib(mib).config("min_wal_size = 4GB\nmax_wal_size = 8GB\nwal_keep_size = 8GB");
        let server = site.start(builder);
        site.wal_settings("flush_interval = \"200ms\"");
        let stream = site.stream();
        wait_until_attached(&server);
        let _ = sql(&server, "create table t(id bigserial, pad text)");
        for round in 0..if full() { 200 } else { 12 } {
            let rows = random.between(1, 4000);
            let _ =
                sql(&server, &format!("insert into t(pad) select repeat(md5(random()::text), 30) from generate_series(1, {rows})"));
            match random.between(0, 4) {
                0 => drop(sql(&server, "select pg_switch_wal()")),
                1 => std::thread::sleep(Duration::from_millis(random.between(100, 700))),
                // A record over many pages, and over a segment's end when that is small.
                2 => drop(sql(&server, "select pg_logical_emit_message(true, 'x', repeat('y', 1500000))")),
                _ => {}
            }
            if round % 5 == 4 {
                // One message that is all of a switched segment, and one that ends where it does.
                let _ = sql(&server, "checkpoint; select pg_switch_wal()");
            }
        }
        let _ = sql(&server, "select pg_switch_wal()");
        let end = lsn(&server, "pg_current_wal_flush_lsn()");
        let size = u64::from(mib) * MIB;
        let whole = Lsn(end.0 / size * size);
        wait_until("the vault has it", Duration::from_secs(60), || site.vault_end(1, size) >= Some(whole));
        assert_eq!(stream.terminate(), Some(0));

        let names: std::collections::BTreeSet<String> =
            site.wal_objects(1).iter().filter_map(|name| name.get(..24).map(ToOwned::to_owned)).collect();
        let mut compared = 0;
        for name in names {
            if segment_number(&name, size).unwrap() * size >= whole.0 {
                continue;
            }
            let destination = site.fresh("fetched");
            let _ = site.pgv(&["wal", "fetch", &name, destination.to_str().unwrap()]).ok();
            assert!(same(&destination, &server.pgdata().join("pg_wal").join(&name)), "{name} of {mib} MiB");
            compared += 1;
        }
        eprintln!("{compared} segments of {mib} MiB are the same");
        assert!(compared >= 3);
        assert_eq!(site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0);
    }
}

fn same(one: &Path, other: &Path) -> bool {
    fs::read(one).unwrap() == fs::read(other).unwrap()
}

/// Commits that wait together are stored together.
#[test]
fn waiting_commits_share_a_put() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config("autovacuum = off"));
    site.wal_settings("synchronous = true");
    let stream = site.stream_with(&["--metrics-listen", "127.0.0.1:0"]);
    wait_until_attached(&server);
    let _ = sql(&server, "create table t(n int)");
    let _ = sql(&server, "alter system set synchronous_standby_names = 'pgvault'");
    let _ = sql(&server, "select pg_reload_conf()");
    let script = site.write("insert.sql", "insert into t values (1);\n");
    let commits = || sql(&server, "select count(*) from t").parse::<f64>().unwrap();
    let load = client(&server, "pgbench", &["-n", "-c", "16", "-T", "3600", "-f", script.to_str().unwrap(), "postgres"]);
    wait_until("commits are acknowledged", Duration::from_secs(30), || commits() > 50.0);
    let (before, parts) = (commits(), metric(&stream, "pgvault_wal_archived_parts_total"));
    wait_until("many commits are acknowledged", Duration::from_secs(60), || commits() > before + 1500.0);
    let (commits, parts) = (commits() - before, metric(&stream, "pgvault_wal_archived_parts_total") - parts);
    drop(load);
    eprintln!("{commits} commits, {parts} parts");
    assert!(commits > 3.0 * parts, "{commits} commits took {parts} PUTs");

    // R1, H3: a stop with commits and a stream attached.
    let began = Instant::now();
    let mut server = server;
    server.stop(Mode::Fast).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "the stop took {:?}", began.elapsed());
    let asked = metric(&stream, "pgvault_wal_keepalives_total");
    assert!(asked < 100.0, "{asked} keepalives");
}

/// The store is down while the server writes many segments: memory is bounded, the server keeps the WAL and can be stopped, what is
/// wrong is told, and everything is there soon after.
#[test]
fn r1_r13_an_outage_of_the_store_costs_neither_memory_nor_wal() {
    let site = Site::new();
    let mut server =
        site.start(site.cluster("main").config("max_slot_wal_keep_size = 512MB\nwal_keep_size = 0\nmin_wal_size = 80MB"));
    site.wal_settings("flush_interval = \"200ms\"");
    let stream = site.stream_with(&["--metrics-listen", "127.0.0.1:0"]);
    wait_until_attached(&server);
    let _ = site.backup("local");
    let _ = sql(&server, "create table t(id bigserial, pad text)");
    site.vaults.refuse_wal(true);
    let start = lsn(&server, "pg_current_wal_lsn()");
    while lsn(&server, "pg_current_wal_lsn()").0 < start.0 + 280 * MIB {
        let _ = sql(&server, "insert into t(pad) select repeat(md5(random()::text), 30) from generate_series(1, 20000)");
    }
    wait_until("it is not ready, and says why", Duration::from_secs(30), || {
        let (code, says) = stream.http("/readyz");
        code == 503 && says.contains("the store does not take WAL")
    });
    assert!(metric(&stream, "pgvault_wal_archive_failures_total") >= 1.0);
    assert!(metric(&stream, "pgvault_wal_archive_lag_seconds") > 0.5);
    // Half of what the slot may keep is used: told long before the other half is.
    wait_until("the operator is warned", Duration::from_secs(40), || stream.log().contains("max_slot_wal_keep_size"));
    assert_eq!(sql(&server, "select wal_status in ('reserved', 'extended') from pg_replication_slots"), "t");
    let flushed = sql(&server, "select coalesce(max(flush_lsn), '0/0') from pg_stat_replication").parse::<Lsn>().unwrap();
    assert!(flushed <= site.vault_end(1, 16 * MIB).unwrap());
    let memory = stream.peak_memory();
    assert!(memory < 300 * MIB, "{} MiB", memory >> 20);

    // R1, H3: with the store down, and more WAL than fits, a stop takes no time either.
    let rows = sql(&server, "select count(*), max(id) from t");
    let began = Instant::now();
    server.stop(Mode::Fast).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "with the store down the stop took {:?}", began.elapsed());
    server.start().unwrap();

    site.vaults.refuse_wal(false);
    let began = Instant::now();
    let end = lsn(&server, "pg_current_wal_flush_lsn()");
    wait_until("the vault has caught up", Duration::from_secs(90), || site.vault_end(1, 16 * MIB) >= Some(end));
    eprintln!("caught up with {} MiB in {:?}, at most {} MiB of memory", (end.0 - start.0) >> 20, began.elapsed(), memory >> 20);
    wait_until("it is ready again", Duration::from_secs(30), || stream.http("/readyz").0 == 200);
    assert_eq!(site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0);
    assert_eq!(stream.terminate(), Some(0));
    let (restored, outcome) = site.restore_to("latest", &[]);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&restored, "select count(*), max(id) from t"), rows);
}

/// A stream that is stopped by a signal it cannot see (a virtual machine that is paused) goes on afterwards.
#[test]
fn a_stream_that_stood_still_goes_on() {
    use rustix::process::Signal;
    let site = Site::new();
    let server = site.start(site.cluster("main").config("wal_sender_timeout = 3s"));
    site.wal_settings("flush_interval = \"200ms\"");
    let stream = site.stream();
    wait_until_attached(&server);
    let _ = sql(&server, "create table t(n int)");
    stream.signal(Signal::STOP);
    wait_until("the server has given it up", Duration::from_secs(30), || !attached(&server));
    let _ = sql(&server, "insert into t select generate_series(1, 100000)");
    let end = lsn(&server, "pg_current_wal_flush_lsn()");
    stream.signal(Signal::CONT);
    wait_until("the vault has caught up", Duration::from_secs(60), || site.vault_end(1, 16 * MIB) >= Some(end));
    assert_eq!(stream.terminate(), Some(0));
}

/// Wrong settings are refused before anything is done.
#[test]
fn settings_that_cannot_be_meant_are_refused() {
    let site = Site::new();
    let server = site.start(site.cluster("main"));
    for (settings, code, says) in [
        ("flush_interval = \"10ms\"", 2, "between 100ms and 1h"),
        ("flush_interval = \"2h\"", 2, "between 100ms and 1h"),
        ("durability = \"spool\"", 2, "needs a `spool` directory"),
        ("spool = \"/proc/nowhere\"", 1, "open the spool"),
    ] {
        site.wal_settings(settings);
        let _ = site.pgv(&["wal", "stream"]).expect(code).says(says);
    }
    site.wal_settings("");
    let _ = site.pgv(&["wal", "stream", "--metrics-listen", "256.0.0.1:1"]).expect(2).says("choose a free port");
    assert_eq!(sql(&server, "select count(*) from pg_replication_slots"), "0");

    // A slot of another kind under the configured name is left alone.
    let _ = sql(&server, "alter system set wal_level = 'logical'");
    let mut server = server;
    server.restart(Mode::Fast).unwrap();
    let _ = sql(&server, "select pg_create_logical_replication_slot('pgvault', 'pgoutput')");
    let _ = site.pgv(&["wal", "stream"]).expect(6).says("logical");
    assert_eq!(sql(&server, "select slot_type from pg_replication_slots"), "logical");
}
