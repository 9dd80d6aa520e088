//! Two servers, and which of them is the primary changes: while the stream is attached, while it is away, and twice while it is away.
//!
//! The stream finds the primary by itself (`host=a,b target_session_attrs=read-write`), as an operator would configure it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Running, Site, lsn, run, sql, wait_until};
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Mode, Outcome, Server};

const MIB16: u64 = 16 << 20;

/// A primary and its standby.
struct Pair {
    site: Site,
    primary: Server,
    standby: Server,
    copies: u16,
}

impl Pair {
    fn new() -> Self {
        let site = Site::new();
        let builder = site.cluster("main").config("wal_log_hints = on\nautovacuum = off\nhot_standby_feedback = off");
        let primary = site.start(builder);
        let _ = sql(&primary, "create table t(id int primary key)");
        let standby = copy(&site, &primary, "copy1", 5433);
        let pair = Self { site, primary, standby, copies: 1 };
        pair.configure();
        pair
    }

    /// Either may be the primary.
    fn configure(&self) {
        let socket = |server: &Server| server.socket_dir().display().to_string();
        let text = format!(
            "host={},{} port={},{} user={} dbname=postgres target_session_attrs=read-write",
            socket(&self.primary),
            socket(&self.standby),
            self.primary.port(),
            self.standby.port(),
            self.primary.user(),
        );
        self.site.configure_text("vault", &text, None);
        self.site.wal_settings("flush_interval = \"200ms\"");
    }

    /// Waits until the standby has everything, takes the primary away and promotes the standby.
    ///
    /// A primary that was stopped in order becomes the standby of the new one; one that was killed is made anew, and then has no WAL of
    /// the time before.
    fn fail_over(&mut self, mode: Mode) {
        let end = lsn(&self.primary, "pg_current_wal_flush_lsn()");
        wait_until("the standby has replayed", Duration::from_secs(30), || {
            sql(&self.standby, &format!("select coalesce(pg_last_wal_replay_lsn() >= '{end}', false)")) == "t"
        });
        self.primary.stop(mode).unwrap();
        let _ = sql(&self.standby, "select pg_promote()");
        wait_until("it is promoted", Duration::from_secs(30), || sql(&self.standby, "select pg_is_in_recovery()") == "f");
        std::mem::swap(&mut self.primary, &mut self.standby);
        let port = self.standby.port();
        if matches!(mode, Mode::Fast) {
            let data = self.standby.pgdata().to_path_buf();
            fs::write(data.join("standby.signal"), "").unwrap();
            self.site.account.own(&data).unwrap();
            self.standby = standby(&self.site, &data, &self.primary, port);
        } else {
            self.copies += 1;
            self.standby = copy(&self.site, &self.primary, &format!("copy{}", self.copies), port);
        }
        self.configure();
    }

    fn insert(&self, from: u32, to: u32) {
        let _ = sql(&self.primary, &format!("insert into t select generate_series({from}, {to})"));
    }

    #[track_caller]
    fn wait_for_vault(&self, timeline: u32) {
        let end = lsn(&self.primary, "pg_current_wal_flush_lsn()");
        // What the timeline before has left is repeated in its first segment.
        wait_until("the vault has it", Duration::from_secs(60), || self.site.vault_end(timeline, MIB16) >= Some(end));
    }

    fn rows(&self, to: &str, more: &[&str]) -> String {
        let (restored, outcome) = self.site.restore_to(to, more);
        let expected = if to == "latest" { Outcome::Promoted } else { Outcome::Paused };
        assert_eq!(outcome, expected, "{to}");
        sql(&restored, "select count(*), coalesce(sum(id), 0) from t")
    }

    fn stream(&self) -> Running {
        let stream = self.site.stream();
        wait_until("the stream is attached", Duration::from_secs(60), || {
            sql(&self.primary, "select count(*) from pg_stat_replication where application_name = 'pgvault'") == "1"
        });
        stream
    }
}

fn copy(site: &Site, of: &Server, name: &str, port: u16) -> Server {
    let data: PathBuf = site.path(name);
    let mut copy = of.client("pg_basebackup").unwrap();
    copy.args(["-X", "stream", "-c", "fast", "-D"]).arg(&data);
    assert_eq!(run(copy).code, Some(0));
    let _ = site.write(&format!("{name}/standby.signal"), "");
    site.account.own(&data).unwrap();
    standby(site, &data, of, port)
}

fn standby(site: &Site, data: &Path, of: &Server, port: u16) -> Server {
    Server::adopt(&site.install, data)
        .option("primary_conninfo", of.conninfo())
        .option("wal_keep_size", "1GB")
        .option("shared_buffers", "16MB")
        .port(port)
        .start()
        .unwrap()
}

/// A restore point that is on the server's disk: by itself it waits for the next commit.
fn point(server: &Server, name: &str) -> Lsn {
    let at = lsn(server, &format!("pg_create_restore_point('{name}')"));
    let _ = sql(server, "select pg_logical_emit_message(true, 'flush', '')");
    at
}

/// R6, H6: one stream, three failovers: one that it sees, one while it is down, and two at once, of which it never sees the first.
#[test]
fn r6_h6_h7_a_stream_follows_every_failover_whether_it_was_there_or_not() {
    let mut pair = Pair::new();
    let stream = pair.stream();
    let _ = pair.site.backup("remote");
    pair.insert(1, 1000);
    let _ = point(&pair.primary, "on one");

    // It is attached while the primary dies and the standby takes over.
    pair.fail_over(Mode::Immediate);
    pair.insert(1001, 2000);
    let _ = point(&pair.primary, "on two");
    pair.wait_for_vault(2);
    assert!(stream.log().contains("on timeline 2"), "{}", stream.log());

    // H6: it is down, and another failover happens.
    assert_eq!(stream.terminate(), Some(0));
    pair.insert(2001, 3000);
    pair.fail_over(Mode::Fast);
    pair.insert(3001, 4000);
    let _ = point(&pair.primary, "on three");
    let stream = pair.stream();
    pair.wait_for_vault(3);

    // H7: two failovers that it never sees; the history of the one in the middle is in the vault all the same.
    assert_eq!(stream.terminate(), Some(0));
    pair.fail_over(Mode::Fast);
    pair.insert(4001, 5000);
    let _ = point(&pair.primary, "on four");
    pair.fail_over(Mode::Fast);
    pair.insert(5001, 6000);
    let stream = pair.stream();
    pair.wait_for_vault(5);
    for timeline in 2..=5 {
        assert!(pair.site.wal_objects(timeline).contains(&format!("{timeline:08}.history")), "timeline {timeline}");
    }
    assert_eq!(stream.terminate(), Some(0));

    assert_eq!(pair.site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0);
    let _ = pair.site.pgv(&["check"]).ok();
    let sum = |rows: u32| format!("{rows}|{}", u64::from(rows) * u64::from(rows + 1) / 2);
    assert_eq!(pair.rows("latest", &[]), sum(6000));
    assert_eq!(pair.rows("name:on one", &[]), sum(1000));
    assert_eq!(pair.rows("name:on two", &[]), sum(2000));
    assert_eq!(pair.rows("name:on three", &[]), sum(4000));
    assert_eq!(pair.rows("name:on four", &[]), sum(5000));
}

/// R6, H8: WAL that the old primary wrote beyond the fork is kept as that timeline's tail, and the old primary, started again, is not
/// streamed from.
#[test]
fn r6_h8_the_old_primarys_tail_is_kept_and_the_old_primary_is_refused() {
    let mut pair = Pair::new();
    let stream = pair.stream();
    let _ = pair.site.backup("remote");
    pair.insert(1, 1000);
    let end = lsn(&pair.primary, "pg_current_wal_flush_lsn()");
    wait_until("the standby has replayed", Duration::from_secs(30), || {
        sql(&pair.standby, &format!("select coalesce(pg_last_wal_replay_lsn() >= '{end}', false)")) == "t"
    });
    // The standby is away, and the primary goes on: these rows are in the vault, and on no other server.
    let fork = lsn(&pair.standby, "pg_last_wal_replay_lsn()");
    pair.standby.stop(Mode::Fast).unwrap();
    pair.insert(1001, 1500);
    let tail = point(&pair.primary, "only on the old primary");
    pair.wait_for_vault(1);
    pair.primary.stop(Mode::Immediate).unwrap();
    pair.standby.start().unwrap();
    let _ = sql(&pair.standby, "select pg_promote()");
    wait_until("it is promoted", Duration::from_secs(30), || sql(&pair.standby, "select pg_is_in_recovery()") == "f");
    std::mem::swap(&mut pair.primary, &mut pair.standby);
    assert!(fork < tail, "the fork at {fork} lies before {tail}");
    pair.insert(2001, 2500);
    pair.wait_for_vault(2);
    assert_eq!(stream.terminate(), Some(0));

    // The tail has not become part of the new timeline, and can be restored on its own.
    assert!(pair.site.vault_end(1, MIB16).unwrap() >= tail);
    let (restored, _) = pair.site.restore_to("name:only on the old primary", &["--timeline", "1"]);
    assert_eq!(sql(&restored, "select count(*), max(id) from t"), "1500|1500");
    drop(restored);
    let (restored, _) = pair.site.restore_to("latest", &["--timeline", "2"]);
    assert_eq!(sql(&restored, "select count(*), max(id) from t"), "1500|2500");
    drop(restored);

    // H8: the old primary comes back and believes that it still is one.
    let before = pair.site.wal_objects(1);
    pair.standby.start().unwrap();
    let _ = sql(&pair.standby, "insert into t values (9999)");
    pair.site.configure_text("vault", &pair.standby.conninfo(), None);
    let _ = pair.site.pgv(&["wal", "stream"]).expect(1).says("timeline 2, which left it at");
    assert_eq!(pair.site.wal_objects(1), before);
}
