//! Point-in-time truth: whatever the target, the restored cluster holds exactly what had been committed there.
//!
//! What that is comes from PostgreSQL's own `pg_waldump`, not from pgvault: the order in which transactions end, when,
//! and where their records begin. Twenty times and twenty positions.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Random, Running, Site, amcheck, amcheck_read_only, lsn, run, sql, switch_and_archive, wait_until};
use jiff::Timestamp;
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Outcome, Server};

const MIB16: u64 = 16 << 20;

/// The end of a transaction in the WAL.
#[derive(Debug, Clone)]
struct End {
    lsn: Lsn,
    xid: u32,
    time: i64,
    committed: bool,
}

/// What happened, in the order of the WAL.
struct Truth {
    ends: Vec<End>,
    /// Rows of the journal: id, transaction, commit time.
    rows: Vec<(u64, u32, i64)>,
}

impl Truth {
    fn read(server: &Server, from: Lsn) -> Self {
        let mut dump = std::process::Command::new(server.install().program("pg_waldump").unwrap());
        dump.env("TZ", "UTC").env("LC_ALL", "C").args(["--rmgr=Transaction", "-p"]).arg(server.pgdata().join("pg_wal"));
        dump.arg("-s").arg(from.to_string()).arg("-e").arg(lsn(server, "pg_current_wal_lsn()").to_string());
        let ran = run(dump);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let ends = ran.stdout.lines().filter_map(|line| {
            let after = |text: &str| Some(line.split_once(text)?.1);
            let what = after("desc: ")?;
            let committed = what.starts_with("COMMIT ");
            if !committed && !what.starts_with("ABORT ") {
                return None;
            }
            let time: String = what.split_once(' ')?.1.chars().take_while(|c| c.is_ascii_digit() || "-: .".contains(*c)).collect();
            let time = format!("{}Z", time.trim().replacen(' ', "T", 1));
            Some(End {
                lsn: after("lsn: ")?.split(',').next()?.parse().ok()?,
                xid: after("tx:")?.split(',').next()?.trim().parse().ok()?,
                time: time.parse::<Timestamp>().unwrap_or_else(|e| panic!("{line}: {e}")).as_microsecond(),
                committed,
            })
        });
        let ends: Vec<End> = ends.collect();
        let rows = sql(
            server,
            "select id, xmin, (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1000000)::bigint from journal order by id",
        );
        let rows = rows.lines().map(|line| {
            let mut fields = line.split('|');
            let mut next = || fields.next().unwrap();
            (next().parse().unwrap(), next().parse().unwrap(), next().parse().unwrap())
        });
        Self { ends, rows: rows.collect() }
    }

    /// The rows whose transaction is among these.
    fn rows(&self, ends: &[End]) -> Vec<u64> {
        let committed: BTreeSet<u32> = ends.iter().filter(|end| end.committed).map(|end| end.xid).collect();
        self.rows.iter().filter(|(_, xid, _)| committed.contains(xid)).map(|(id, ..)| *id).collect()
    }

    /// Rows at a moment. Nothing when the order of the WAL and the order of the clock disagree there: a session takes the
    /// time of its commit before its place in the WAL, so that two orders are possible.
    fn at_time(&self, time: i64) -> Option<Vec<u64>> {
        let stop = self.ends.iter().position(|end| end.time > time).unwrap_or(self.ends.len());
        let rows = self.rows(&self.ends[..stop]);
        let by_clock: Vec<u64> = self.rows.iter().filter(|(.., committed)| *committed <= time).map(|(id, ..)| *id).collect();
        (rows == by_clock).then_some(rows)
    }

    /// Rows whose commit record begins at or before a position.
    fn at_lsn(&self, position: Lsn) -> Vec<u64> {
        let stop = self.ends.iter().position(|end| end.lsn > position).unwrap_or(self.ends.len());
        self.rows(&self.ends[..stop])
    }
}

fn journal(server: &Server) -> Vec<u64> {
    sql(server, "select id from journal order by id").lines().map(|line| line.parse().unwrap()).collect()
}

fn rfc3339(microseconds: i64) -> String {
    Timestamp::from_microsecond(microseconds).unwrap().to_string()
}

/// Balances of all of pgbench's tables: equal at every moment that is a moment.
fn is_consistent(server: &Server) -> bool {
    sql(
        server,
        "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches) \
         and (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history) \
         and (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from pgbench_history)",
    ) == "t"
}

struct Load(#[allow(dead_code, reason = "held while it runs")] Vec<Running>);

impl Load {
    fn start(site: &Site, server: &Server) -> Self {
        let script = site.write("writer.sql", "insert into journal(writer) values (:client_id);\n");
        let writers = ["-n", "-c", "3", "-R", "150", "-T", "3600", "-f", script.to_str().unwrap(), "postgres"];
        Self(vec![
            common::client(server, "pgbench", &["-n", "-c", "2", "-R", "60", "-T", "3600", "postgres"]),
            common::client(server, "pgbench", &writers),
        ])
    }
}

#[test]
fn r10_a_restore_to_any_target_holds_exactly_what_was_committed_there() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(&server, "create extension amcheck; create table journal(id bigserial primary key, writer int)");
    let mut init = server.client("pgbench").unwrap();
    assert_eq!(
        run({
            init.args(["-q", "-i", "-s", "1", "postgres"]);
            init
        })
        .code,
        Some(0)
    );
    let begin = lsn(&server, "pg_current_wal_lsn()");

    let before_any = sql(&server, "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    let load = Load::start(&site, &server);
    let rows = |n: u64| {
        wait_until("the writers wrote", Duration::from_secs(120), || {
            sql(&server, "select count(*) from journal").parse::<u64>().unwrap() >= n
        });
    };
    rows(50);
    let first = site.backup("local");
    let stop: Lsn = first["stop_lsn"].as_str().unwrap().parse().unwrap();
    let finished: Timestamp = first["finished_at"].as_str().unwrap().parse().unwrap();
    let count = |server: &Server| sql(server, "select count(*) from journal").parse::<u64>().unwrap();
    let now = count(&server);
    rows(now + 300);
    let _ = switch_and_archive(&server);
    let point = lsn(&server, "pg_create_restore_point('before the deploy')");
    let xid: u32 = sql(&server, "insert into journal(writer) values (99) returning xmin").parse().unwrap();
    let aborted: u32 = sql(&server, "begin; insert into journal(writer) values (98) returning xmin; rollback").parse().unwrap();
    // Somebody else's backup must make no difference to the moments before it.
    let second = site.backup("remote");
    rows(now + 700);
    let _ = switch_and_archive(&server);
    rows(now + 900);
    drop(load);
    let _ = sql(&server, "insert into journal(writer) values (100)");
    let last = switch_and_archive(&server);
    let truth = Truth::read(&server, begin);
    assert_eq!(truth.rows(&truth.ends).len(), truth.rows.len(), "pg_waldump shows every row's transaction");

    let listed = site.summary(&["list"]);
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed}");
    assert_eq!(listed["backups"].as_array().unwrap().len(), 2);

    // A restore per target: (target, rows that must be there).
    let mut random = Random::new();
    let wanted = 20;
    let mut targets: Vec<(String, Vec<u64>)> = Vec::new();
    let end_time = truth.ends.iter().map(|end| end.time).max().unwrap();
    let after = |lsn: Lsn| truth.ends.iter().filter(move |end| end.lsn > lsn);
    let from = u64::try_from(finished.as_microsecond()).unwrap() + 1;
    while targets.len() < wanted {
        let mut time = i64::try_from(random.between(from, u64::try_from(end_time).unwrap())).unwrap();
        // Half of them exactly the moment of a commit: `at or before` includes it.
        if targets.len().is_multiple_of(2) {
            time = truth.ends.iter().map(|end| end.time).filter(|end| *end >= time).min().unwrap();
        }
        let Some(rows) = truth.at_time(time) else { continue };
        targets.push((rfc3339(time), rows));
    }
    let inside: Vec<Lsn> = after(stop).map(|end| end.lsn).collect();
    let end = *inside.last().unwrap();
    for n in 0..wanted {
        // Half of them exactly where a transaction's end begins, or the byte before; the others anywhere, in records too.
        let position = match n % 4 {
            0 => inside[usize::try_from(random.between(0, inside.len() as u64)).unwrap()],
            1 => Lsn(inside[usize::try_from(random.between(1, inside.len() as u64)).unwrap()].0 - 1),
            _ => Lsn(random.between(stop.0, end.0)),
        };
        targets.push((format!("lsn:{position}"), truth.at_lsn(position)));
    }
    let through = |lsn: Lsn| truth.at_lsn(lsn);
    let own_end = truth.ends.iter().find(|end| end.xid == xid).unwrap().lsn;
    let aborted_end = truth.ends.iter().find(|end| end.xid == aborted).unwrap().lsn;
    targets.push((format!("xid:{xid}"), through(own_end)));
    targets.push((format!("xid:{aborted}"), through(aborted_end)));
    targets.push(("name:before the deploy".into(), through(point)));
    let everything = truth.rows(&truth.ends);
    targets.push(("latest".into(), everything.clone()));
    // The very last transaction, as a time: PostgreSQL itself would end with an error.
    targets.push((rfc3339(end_time), everything.clone()));
    let second_stop: Lsn = second["stop_lsn"].as_str().unwrap().parse().unwrap();
    targets.push(("immediate".into(), through(second_stop)));

    let check = |(target, rows): &(String, Vec<u64>)| {
        let (restored, outcome) = site.restore_to(target, &[]);
        let found = journal(&restored);
        let differ = |one: &[u64], other: &[u64]| one.iter().filter(|id| !other.contains(id)).copied().collect::<Vec<_>>();
        assert!(
            found == *rows,
            "{target}: {} rows instead of {}; too many: {:?}, missing: {:?}",
            found.len(),
            rows.len(),
            differ(&found, rows),
            differ(rows, &found)
        );
        assert!(is_consistent(&restored), "{target}");
        if target == "latest" {
            assert_eq!(outcome, Outcome::Promoted);
            amcheck(&restored);
        } else if target == &rfc3339(end_time) {
            assert_eq!(outcome, Outcome::Paused);
            amcheck_read_only(&restored);
        }
        let folder = restored.pgdata().to_path_buf();
        drop(restored);
        std::fs::remove_dir_all(folder).unwrap();
    };
    // Two at a time: while one replays, the other decodes.
    std::thread::scope(|scope| {
        let (left, right) = targets.split_at(targets.len() / 2);
        let left = scope.spawn(move || left.iter().for_each(check));
        right.iter().for_each(check);
        left.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });

    outside_of_the_window(&site, &truth, &before_any, &first, &last);
    the_earlier_backup_is_chosen(&site, &first, &second);

    // With an action of its own the server does not wait for an operator.
    let (promoted, outcome) = site.restore_to("name:before the deploy", &["--target-action", "promote"]);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(journal(&promoted), through(point));
    let (_, outcome) = site.restore_to("name:before the deploy", &["--target-action", "shutdown"]);
    assert_eq!(outcome, Outcome::ShutDown);
}

/// T17, R10: nothing is guessed and nothing is written when the target cannot be reached; the nearest one is named.
fn outside_of_the_window(site: &Site, truth: &Truth, before_any: &str, first: &serde_json::Value, last: &str) {
    let pgdata = site.path("refused");
    let refused = |to: &str, code: i32, texts: &[&str]| {
        let mut ran = site.restore_into(&pgdata, to, &[]).expect(code);
        for text in texts {
            ran = ran.says(text);
        }
        assert!(!pgdata.exists(), "{to} wrote something");
    };
    let finished = first["finished_at"].as_str().unwrap();
    // Before the first backup, and while it ran.
    refused(before_any, 5, &["nearest", finished]);
    refused(first["started_at"].as_str().unwrap(), 5, &["nearest", finished]);
    let start = first["start_lsn"].as_str().unwrap();
    refused(&format!("lsn:{start}"), 5, &["nearest", first["stop_lsn"].as_str().unwrap()]);
    // Behind the end.
    let end = truth.ends.iter().map(|end| end.time).max().unwrap();
    refused(&rfc3339(end + 1), 5, &["nearest", &rfc3339(end)]);
    refused("2099-01-01T00:00:00Z", 5, &["nearest", &rfc3339(end)]);
    let number = common::segment_number(last, MIB16).unwrap();
    refused(&format!("lsn:{}", Lsn((number + 2) * MIB16)), 5, &["nearest", "last position is lsn:"]);
    refused("xid:4000000000", 5, &["xid:4000000000"]);
    refused("name:no such point", 5, &["no such point"]);
    refused("last-verified", 5, &["restore drill"]);
    refused("2026-11-21T10:00:00", 2, &["time zone"]);
    refused("13am", 2, &[]);
}

/// R10: a target between two backups starts from the first, one behind the second from the second.
fn the_earlier_backup_is_chosen(site: &Site, first: &serde_json::Value, second: &serde_json::Value) {
    let plan = |to: &str| site.summary(&["restore", "--dry-run", "--to", to, "--pgdata", "/nowhere"])["backup_id"].clone();
    let time = |value: &serde_json::Value, name: &str| value[name].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(plan(&time(second, "started_at").to_string()), first["backup_id"]);
    let just_before = time(second, "finished_at").as_microsecond() - 1;
    assert_eq!(plan(&rfc3339(just_before)), first["backup_id"]);
    assert_eq!(plan(second["finished_at"].as_str().unwrap()), second["backup_id"]);
    assert_eq!(plan("latest"), second["backup_id"]);
    assert_eq!(plan("immediate"), second["backup_id"]);
    // The same moment, written with another offset.
    let moved = format!(
        "{}",
        time(second, "finished_at").to_zoned(jiff::tz::TimeZone::fixed(jiff::tz::offset(2))).strftime("%Y-%m-%dT%H:%M:%S%.f%:z")
    );
    assert!(moved.ends_with("+02:00"));
    assert_eq!(plan(&moved), second["backup_id"]);
}

/// An archive of whole segments mostly ends in the middle of a record; what is offered then must be what can be reached.
#[test]
fn the_end_of_the_archive_may_cut_a_record_in_two() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(&server, "create table t(id int, pad text)");
    let _ = site.backup("local");
    let _ = sql(
        &server,
        "do $$ begin for i in 1..500 loop insert into t select i, repeat('x', 90) from generate_series(1, 400); commit; end loop; end $$",
    );
    let flushed = lsn(&server, "pg_current_wal_flush_lsn()").0;
    let full = flushed - flushed % MIB16;
    let name = sql(&server, &format!("select pg_walfile_name('{}')", Lsn(full - 1)));
    wait_until("the last whole segment is archived", Duration::from_secs(60), || {
        sql(&server, &format!("select coalesce(last_archived_wal, '') >= '{name}' from pg_stat_archiver")) == "t"
    });
    let mut dump = std::process::Command::new(server.install().program("pg_waldump").unwrap());
    dump.arg("-p").arg(server.pgdata().join("pg_wal")).arg("-s").arg(Lsn(full - 65_536).to_string());
    dump.arg("-e").arg(lsn(&server, "pg_current_wal_flush_lsn()").to_string());
    let text = run(dump).stdout;
    let records = text.lines().filter_map(|line| line.split_once("lsn: ")?.1.split(',').next()?.parse::<Lsn>().ok());
    let records: Vec<Lsn> = records.filter(|lsn| lsn.0 < full).collect();
    let (last, before) = (records[records.len() - 1], records[records.len() - 2]);
    drop(server);

    let rows = |to: &str| {
        let (restored, _) = site.restore_to(to, &[]);
        sql(&restored, "select count(*) || ' ' || max(id) from t")
    };
    let everything = rows("latest");
    assert_ne!(everything, "0 ");
    // Unless the segment happens to end with a record, the last one cannot be replayed.
    assert_eq!(rows(&format!("lsn:{last}")), everything);
    assert_eq!(rows(&format!("lsn:{}", Lsn(last.0 - 1))), everything);
    let _ = rows(&format!("lsn:{before}"));
    let listed = site.summary(&["list"]);
    assert_eq!(rows(listed["window"][0]["last"].as_str().unwrap()), everything, "{listed}");
}

/// The last commit counts also when its record begins in one segment and ends in the next, in which no other does.
#[test]
fn the_last_commit_may_run_over_the_end_of_a_segment() {
    const MIB: u64 = 1 << 20;
    let site = Site::new();
    let builder = site.cluster("main").wal_segment_mib(1).config(site.archiving());
    let server = site.start(builder.config("autovacuum = off\ncheckpoint_timeout = 1h\nmax_wal_size = 2GB"));
    let _ = sql(&server, "create table t(id int); create table journal(id bigint)");
    let _ = site.backup("local");
    // Writes up to 24 bytes before the end of the segment, where nothing but the commit's header has room. Others write, too.
    let mut id = 0;
    let (commit, segment) = loop {
        id += 1;
        assert!(id < 50, "the commit never fell on the end of a segment");
        let _ = sql(&server, "insert into t values (0)");
        let fill = format!(
            "do $$ declare goal numeric; here numeric; cost numeric; begin \
               insert into t values ({id}); \
               goal := (div(pg_current_wal_insert_lsn() - '0/0', {MIB}) + 1) * {MIB} - 24; \
               loop \
                 here := pg_current_wal_insert_lsn() - '0/0'; \
                 exit when goal - here < 7000; \
                 perform pg_logical_emit_message(false, 'x', repeat('y', least(goal - here - 6000, 300000)::int)); \
               end loop; \
               perform pg_logical_emit_message(false, 'x', repeat('y', 1000)); \
               cost := (pg_current_wal_insert_lsn() - '0/0') - here - 1000; \
               here := pg_current_wal_insert_lsn() - '0/0'; \
               perform pg_logical_emit_message(false, 'x', repeat('y', (goal - here - cost)::int)); \
             end $$; select pg_current_wal_insert_lsn()"
        );
        let _ = sql(&server, &fill);
        let end = lsn(&server, "pg_current_wal_insert_lsn()");
        let truth = Truth::read(&server, Lsn(end.0 - MIB));
        let last = truth.ends.iter().rfind(|end| end.committed).unwrap().lsn;
        if last.0 / MIB < end.0 / MIB && last.0 % MIB + 34 > MIB {
            break (last, end.0 / MIB);
        }
    };
    let _ = sql(&server, "select pg_switch_wal()");
    let name = format!("00000001{:08X}{:08X}.wal", segment >> 12, segment & 0xFFF);
    wait_until("the segment with the rest of the commit is archived", Duration::from_secs(30), || {
        site.wal_objects(1).contains(&name)
    });
    let committed = sql(
        &server,
        &format!("select (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1000000)::bigint from t where id = {id}"),
    );
    let committed = Timestamp::from_microsecond(committed.parse().unwrap()).unwrap();
    let listed = site.summary(&["list"]);
    let window = listed["window"][0].clone();
    assert_eq!(window["last"].as_str().unwrap().parse::<Timestamp>().unwrap(), committed, "commit at {commit}: {listed}");
    for target in [committed.to_string(), "latest".to_owned()] {
        let (restored, _) = site.restore_to(&target, &[]);
        assert_eq!(sql(&restored, "select max(id) from t"), id.to_string(), "{target}");
    }
    let before = committed.checked_sub(jiff::SignedDuration::from_micros(1)).unwrap();
    let (restored, _) = site.restore_to(&before.to_string(), &[]);
    assert_eq!(sql(&restored, &format!("select count(*) from t where id = {id}")), "0");
}
