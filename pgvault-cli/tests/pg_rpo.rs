//! What is lost with the database's host: `kill -9`, the data directory removed, a restore to `latest` from the vault alone.
//!
//! Clients write down what was acknowledged to them outside of the database. What a restored server has is compared with that.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Random, Running, Site, full, sql, wait_until};
use pgvault_verify::process::{Outcome, Server};

const CLIENTS: u32 = 16;

/// Rows that were acknowledged: client, number, when.
type Acknowledged = Arc<Mutex<Vec<(u32, u32, Instant)>>>;

/// Clients that insert one row after the other, each in a transaction of its own, until the server is gone.
struct Clients {
    acknowledged: Acknowledged,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(server: &Server) -> Self {
        let acknowledged = Acknowledged::default();
        let threads = (0..CLIENTS)
            .map(|client| {
                let mut command = server.client("psql").unwrap();
                command.args(["-X", "-q", "-A", "-t", "postgres"]);
                let mut psql = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
                let acknowledged = acknowledged.clone();
                std::thread::spawn(move || {
                    let (mut input, mut output) = (psql.stdin.take().unwrap(), BufReader::new(psql.stdout.take().unwrap()));
                    for number in 1.. {
                        let mut line = String::new();
                        let asked = writeln!(input, "insert into t(client, number) values ({client}, {number}) returning number;");
                        if asked.is_err() || output.read_line(&mut line).is_err() || line.trim() != number.to_string() {
                            break;
                        }
                        acknowledged.lock().unwrap().push((client, number, Instant::now()));
                    }
                    let _ = psql.kill();
                    let _ = psql.wait();
                })
            })
            .collect();
        Self { acknowledged, threads }
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until all have noticed that the server is gone.
    fn end(self) -> Vec<(u32, u32, Instant)> {
        for thread in self.threads {
            thread.join().unwrap();
        }
        self.acknowledged.lock().unwrap().clone()
    }
}

/// A server with a table, a stream and a backup.
fn site(settings: &str) -> (Site, Server, Running) {
    let site = Site::new();
    let server = site.start(site.cluster("main"));
    site.wal_settings(settings);
    let stream = site.stream();
    wait_until("the stream is attached", Duration::from_secs(30), || attached(&server));
    let _ = sql(&server, "create table t(client int, number int)");
    let _ = site.backup("local");
    (site, server, stream)
}

fn attached(server: &Server) -> bool {
    sql(server, "select count(*) from pg_stat_replication where application_name = 'pgvault' and state = 'streaming'") == "1"
}

/// The host is gone.
fn destroy(server: &mut Server) -> Instant {
    let at = Instant::now();
    server.kill9().unwrap();
    fs::remove_dir_all(server.pgdata()).unwrap();
    at
}

/// Restores what the vault has, and gives the rows that are missing with the time that they were acknowledged before `killed`.
fn lost(site: &Site, acknowledged: &[(u32, u32, Instant)], killed: Instant) -> Vec<Duration> {
    let (restored, outcome) = site.restore_to("latest", &[]);
    assert_eq!(outcome, Outcome::Promoted);
    let rows = sql(&restored, "select client || ' ' || number from t");
    let rows: BTreeSet<&str> = rows.lines().collect();
    let missing = acknowledged.iter().filter(|(client, number, _)| !rows.contains(format!("{client} {number}").as_str()));
    missing.map(|(_, _, at)| killed.saturating_duration_since(*at)).collect()
}

/// Asynchronous: what is older than the flush interval and the time of a PUT is there.
#[test]
fn nothing_older_than_the_flush_interval_is_lost_with_the_host() {
    let mut random = Random::new();
    for round in 1..=if full() { 20 } else { 2 } {
        let (site, mut server, stream) = site("flush_interval = \"1s\"");
        let clients = Clients::start(&server);
        std::thread::sleep(Duration::from_millis(random.between(3000, 6000)));
        let killed = destroy(&mut server);
        let acknowledged = clients.end();
        // The stream stores what it has, although nobody answers any more.
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(stream.terminate(), Some(0));
        let lost = lost(&site, &acknowledged, killed);
        let oldest = lost.iter().max().copied().unwrap_or_default();
        eprintln!("round {round}: {} acknowledged, {} lost, the oldest {oldest:?} before the kill", acknowledged.len(), lost.len());
        assert!(acknowledged.len() > 100, "the clients did next to nothing");
        assert!(oldest < Duration::from_secs(3), "{oldest:?}");
    }
}

/// Synchronous: nothing that was acknowledged is missing, whatever else is killed meanwhile.
#[test]
fn no_acknowledged_commit_is_lost_with_the_host_when_synchronous() {
    let mut random = Random::new();
    let commit = ["on", "remote_write", "remote_apply"];
    for round in 0..if full() { 20 } else { 3 } {
        let (site, mut server, mut stream) = site("synchronous = true");
        let _ = sql(&server, "alter system set synchronous_standby_names = 'pgvault'");
        let _ = sql(&server, &format!("alter system set synchronous_commit = '{}'", commit[round % 3]));
        let _ = sql(&server, "select pg_reload_conf()");
        wait_until("the stream is the synchronous standby", Duration::from_secs(20), || {
            sql(&server, "select count(*) from pg_stat_replication where sync_state = 'sync'") == "1"
        });
        let clients = Clients::start(&server);
        wait_until("commits are acknowledged", Duration::from_secs(30), || clients.count() > 200);
        std::thread::sleep(Duration::from_millis(random.between(500, 3000)));
        let what = ["nothing else", "the stream", "the store"][round % 3];
        match round % 3 {
            1 => {
                stream.kill9();
                std::thread::sleep(Duration::from_millis(random.between(100, 1500)));
                stream = site.stream();
            }
            2 => {
                site.vaults.refuse_wal(true);
                std::thread::sleep(Duration::from_millis(random.between(100, 1500)));
                let before = clients.count();
                std::thread::sleep(Duration::from_millis(500));
                assert!(clients.count() - before <= CLIENTS as usize, "commits are acknowledged although the store takes nothing");
                site.vaults.refuse_wal(false);
            }
            _ => {}
        }
        let before = clients.count();
        wait_until("commits are acknowledged again", Duration::from_secs(60), || clients.count() > before + 100);
        std::thread::sleep(Duration::from_millis(random.between(0, 700)));
        let killed = destroy(&mut server);
        let acknowledged = clients.end();
        // Not even the stream gets another chance.
        stream.kill9();
        let lost = lost(&site, &acknowledged, killed);
        eprintln!("round {round}, {what} was killed before: {} acknowledged, {} lost", acknowledged.len(), lost.len());
        assert!(lost.is_empty(), "{lost:?}");
    }
}

/// With `durability = "spool"` commits go on while the store is down, and what they wrote reaches the vault without the server.
#[test]
fn a_spool_that_counts_keeps_what_was_acknowledged_while_the_store_was_down() {
    let (site, mut server, stream) = site("");
    let spool = site.directory("spool");
    assert_eq!(stream.terminate(), Some(0));
    let settings = |durability| {
        format!("synchronous = true\nspool = \"{}\"\nspool_limit = \"200MiB\"\ndurability = \"{durability}\"", spool.display())
    };
    site.wal_settings(&settings("spool"));
    let stream = site.stream();
    wait_until("the stream is attached", Duration::from_secs(30), || attached(&server));
    let _ = sql(&server, "alter system set synchronous_standby_names = 'pgvault'");
    let _ = sql(&server, "select pg_reload_conf()");
    let clients = Clients::start(&server);
    wait_until("commits are acknowledged", Duration::from_secs(30), || clients.count() > 100);
    site.vaults.refuse_wal(true);
    std::thread::sleep(Duration::from_millis(500));
    let before = clients.count();
    wait_until("commits go on", Duration::from_secs(30), || clients.count() > before + 500);
    // More than one segment has to fit.
    let _ = sql(&server, "select pg_switch_wal()");
    let before = clients.count();
    wait_until("commits go on in the next segment", Duration::from_secs(30), || clients.count() > before + 500);
    let killed = destroy(&mut server);
    let acknowledged = clients.end();
    stream.kill9();
    assert!(common::files_below(&spool).len() >= 3, "two segments and the lock");

    site.vaults.refuse_wal(false);
    let stream = site.stream();
    wait_until("the spool is in the vault", Duration::from_secs(30), || common::files_below(&spool).len() == 1);
    assert_eq!(stream.terminate(), Some(0));
    let lost = lost(&site, &acknowledged, killed);
    assert!(lost.is_empty(), "{lost:?}");
}

/// Without it, what is in the spool is told as written, and never as durable.
#[test]
fn a_spool_that_does_not_count_is_not_told_as_durable() {
    let (site, server, stream) = site("");
    assert_eq!(stream.terminate(), Some(0));
    let spool = site.directory("spool");
    site.wal_settings(&format!("flush_interval = \"100ms\"\nspool = \"{}\"", spool.display()));
    let stream = site.stream_with(&["--metrics-listen", "127.0.0.1:0"]);
    wait_until("the stream is attached", Duration::from_secs(30), || attached(&server));
    site.vaults.refuse_wal(true);
    let _ = sql(&server, "insert into t values (1, 1)");
    let end = sql(&server, "select pg_current_wal_flush_lsn()");
    let told = |column: &str| sql(&server, &format!("select {column} >= '{end}' from pg_stat_replication"));
    wait_until("the spool has it", Duration::from_secs(30), || told("write_lsn") == "t");
    assert_eq!((told("flush_lsn"), told("replay_lsn")), ("f".into(), "f".into()));
    wait_until("the stream says what is wrong", Duration::from_secs(30), || stream.http("/readyz").0 == 503);
    site.vaults.refuse_wal(false);
    wait_until("the vault has it", Duration::from_secs(30), || told("flush_lsn") == "t");
    wait_until("the stream is well again", Duration::from_secs(30), || stream.http("/readyz").0 == 200);
    assert_eq!(site.stream().ended(Duration::from_secs(20)), Some(11), "one stream for each spool");
}

/// The spool takes what memory does not, in order, and is empty when the vault has everything; a full one leaves the rest to the server.
#[test]
fn a_spool_holds_what_memory_does_not_and_never_more_than_its_limit() {
    let site = Site::new();
    let server = site.start(site.cluster("main").wal_segment_mib(1).config("min_wal_size = 2MB"));
    let spool = site.directory("spool");
    site.wal_settings(&format!("flush_interval = \"100ms\"\nspool = \"{}\"\nspool_limit = \"20MiB\"", spool.display()));
    let stream = site.stream();
    wait_until("the stream is attached", Duration::from_secs(30), || attached(&server));
    let _ = site.backup("local");
    let _ = sql(&server, "create table t(client int, number int, pad text)");
    site.vaults.refuse_wal(true);
    let write = || sql(&server, "insert into t select 1, n, repeat(md5(n::text), 30) from generate_series(1, 2000) n");
    let position = |column: &str| common::lsn(&server, &format!("(select {column} from pg_stat_replication)"));
    let start = common::lsn(&server, "pg_current_wal_flush_lsn()");
    while common::lsn(&server, "pg_current_wal_flush_lsn()").0 < start.0 + (12 << 20) {
        let _ = write();
    }
    let end = common::lsn(&server, "pg_current_wal_flush_lsn()");
    wait_until("the spool has it", Duration::from_secs(30), || position("write_lsn") >= end);
    assert!(position("flush_lsn").0 <= start.0 + (1 << 20));
    assert!(common::files_below(&spool).len() > 10);

    // Beyond the limit the connection is closed, and the server keeps the rest.
    while common::lsn(&server, "pg_current_wal_flush_lsn()").0 < start.0 + (60 << 20) {
        let _ = write();
    }
    wait_until("the spool is full", Duration::from_secs(30), || !attached(&server));
    let size: u64 = common::files_below(&spool).iter().filter_map(|file| Some(fs::metadata(file).ok()?.len())).sum();
    assert!(size <= (20 << 20) + (128 << 10), "{size} bytes");
    let rows = sql(&server, "select count(*), sum(number) from t");
    let end = common::lsn(&server, "pg_current_wal_flush_lsn()");
    site.vaults.refuse_wal(false);
    wait_until("the vault has everything", Duration::from_secs(60), || site.vault_end(1, 1 << 20) >= Some(end));
    wait_until("the spool is let go", Duration::from_secs(30), || common::files_below(&spool).len() <= 2);
    assert_eq!(stream.terminate(), Some(0));
    let (restored, _) = site.restore_to("latest", &[]);
    assert_eq!(sql(&restored, "select count(*), sum(number) from t"), rows);
}
