//! `wal check` on what real servers wrote: nothing is found where nothing is wrong, and what is wrong is found where it is.

#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::case_sensitive_file_extension_comparisons)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{Ran, Running, Site, client, lsn, run, sql, switch_and_archive, wait_until};
use jiff::Timestamp;
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Mode, Outcome, Server};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn check(site: &Site, more: &[&str]) -> Ran {
    let mut arguments = vec!["--output", "json", "wal", "check"];
    arguments.extend(more);
    site.pgv(&arguments)
}

fn list<'a>(report: &'a Value, field: &str) -> &'a Vec<Value> {
    report[field].as_array().unwrap_or_else(|| panic!("{report}"))
}

fn at(value: &Value) -> Lsn {
    value.as_str().unwrap_or_default().parse().unwrap_or_else(|_| panic!("{value} is no position"))
}

/// Rows, long records, aborts, prepared transactions, restore points and switches.
fn load(server: &Server, segments: u64) {
    let start = lsn(server, "pg_current_wal_lsn()");
    let mut round = 0;
    while lsn(server, "pg_current_wal_lsn()").0 < start.0 + segments * MIB {
        round += 1;
        let _ = sql(server, "insert into t(pad) select repeat(md5(g::text), 20) from generate_series(1, 900) g");
        let _ = sql(server, &format!("begin; delete from t where id % 97 = {round}; prepare transaction 'p{round}'"));
        let _ = sql(server, &format!("begin; update t set pad = 'x' where id % 97 = {round} + 40; rollback"));
        let _ = sql(server, &format!("commit prepared 'p{round}'"));
        if round % 3 == 0 {
            // Over one segment, or over more than two.
            let _ = sql(server, &format!("select pg_logical_emit_message(true, 'x', repeat('y', {}))", 400_000 * round));
        }
        if round % 4 == 0 {
            let _ = sql(server, "select pg_switch_wal()");
        }
        if round % 5 == 0 {
            let _ = sql(server, "checkpoint");
        }
    }
}

fn stream_attached(site: &Site, server: &Server) -> Running {
    let stream = site.stream();
    wait_until("the stream is attached", PATIENCE, || {
        sql(server, "select count(*) from pg_replication_slots where active and not temporary") == "1"
    });
    stream
}

/// Where transactions end and when, as PostgreSQL's own tool reads the segments of a timeline.
fn transaction_ends(server: &Server, timeline: u32, from: Lsn, to: Lsn) -> BTreeMap<Lsn, Timestamp> {
    let mut dump = std::process::Command::new(server.install().program("pg_waldump").unwrap());
    dump.env("TZ", "UTC").env("LC_ALL", "C").args(["--rmgr=Transaction", "-p"]).arg(server.pgdata().join("pg_wal"));
    dump.arg("-t").arg(timeline.to_string()).arg("-s").arg(from.to_string()).arg("-e").arg(to.to_string());
    let ran = run(dump);
    let ends = ran.stdout.lines().filter_map(|line| {
        let after = |text: &str| Some(line.split_once(text)?.1);
        let what = after("desc: ")?;
        let (operation, rest) = what.split_once(' ')?;
        if !["COMMIT", "ABORT", "COMMIT_PREPARED", "ROLLBACK_PREPARED", "ABORT_PREPARED"].contains(&operation) {
            return None;
        }
        let rest = rest.split_once(": ").filter(|(xid, _)| xid.bytes().all(|b| b.is_ascii_digit())).map_or(rest, |(_, rest)| rest);
        let time: String = rest.chars().take_while(|c| c.is_ascii_digit() || "-: .".contains(*c)).collect();
        Some((
            after("lsn: ")?.split(',').next()?.parse().ok()?,
            format!("{}Z", time.trim().replacen(' ', "T", 1)).parse().unwrap_or_else(|e| panic!("{line}: {e}")),
        ))
    });
    ends.collect()
}

/// A server whose segments are 1 MiB, archived and streamed at once, that was promoted to a second timeline.
struct Story {
    site: Site,
    server: Server,
    backup: Value,
    later: Value,
    begin: Lsn,
    fork: Lsn,
}

fn story() -> Story {
    let site = Site::new();
    let builder = site.cluster("main").wal_segment_mib(1).config(site.archiving()).config("max_prepared_transactions = 4");
    let mut server = site.start(builder);
    let _ = sql(&server, "create table t(id bigserial primary key, pad text)");
    let begin = lsn(&server, "pg_current_wal_lsn()");
    let stream = stream_attached(&site, &server);
    let backup = site.backup("local");
    let script = site.write("writer.sql", "insert into t(pad) values (md5(random()::text));\n");
    let writer =
        client(&server, "pgbench", &["-n", "-c", "2", "-R", "100", "-T", "3600", "-f", script.to_str().unwrap(), "postgres"]);
    load(&server, 14);
    let _ = switch_and_archive(&server);
    drop(writer);
    // Something in an open segment that only the stream has, and then its end.
    let _ = sql(&server, "insert into t(pad) values ('open')");
    assert_eq!(stream.terminate(), Some(0));
    let ran = check(&site, &["--deep"]).ok();
    assert_eq!(list(&ran.json(), "timelines").len(), 1, "{ran:?}");

    server.stop(Mode::Fast).unwrap();
    let _ = site.write("main/standby.signal", "");
    server.start().unwrap();
    let fork = lsn(&server, "pg_last_wal_replay_lsn()");
    let _ = sql(&server, "select pg_promote()");
    assert_eq!(server.wait_until_paused_or_promoted(PATIENCE).unwrap(), Outcome::Promoted);
    let stream = stream_attached(&site, &server);
    load(&server, 3);
    let later = site.backup("local");
    let _ = switch_and_archive(&server);
    assert_eq!(stream.terminate(), Some(0));
    Story { site, server, backup, later, begin, fork }
}

#[test]
fn h14_an_archive_is_whole_or_what_is_missing_and_damaged_is_named() {
    let Story { site, server, backup, later, begin, fork } = story();
    let clean = check(&site, &[]).ok().json();
    let _ = check(&site, &["--deep"]).ok();
    let timelines = list(&clean, "timelines");
    assert_eq!(timelines.len(), 2, "{clean}");
    assert!(timelines[0]["segments"].as_u64().unwrap() >= 10, "{clean}");
    assert!(timelines.iter().all(|t| t["records"].as_u64().unwrap() > 100 && !t["last_time"].is_null()), "{clean}");
    let names = site.wal_objects(1);
    assert!(names.iter().any(|name| name.ends_with(".part")), "{names:?}");
    assert!(at(&timelines[1]["from"]) <= fork && fork < at(&timelines[1]["to"]), "{clean}");
    let human = site.pgv(&["wal", "check"]).ok();
    assert_eq!(human.stdout.lines().count(), 3, "{}", human.stdout);
    // The WAL of one timeline, from a place on.
    let one = check(&site, &["--timeline", "2"]).ok().json();
    assert_eq!(list(&one, "timelines")[0]["records"], timelines[1]["records"]);
    let some = check(&site, &["--from", backup["backup_id"].as_str().unwrap()]).ok().json();
    assert!(
        at(&list(&some, "timelines")[0]["from"]) > Lsn(0) && at(&list(&some, "timelines")[0]["from"]) <= at(&backup["start_lsn"])
    );
    let _ = check(&site, &["--timeline", "9"]).expect(1).says("no WAL of timeline 9");
    let _ = check(&site, &["--from", "nowhere"]).expect(2);

    // Any one segment that goes is exactly that gap, with the times around it.
    let whole: Vec<String> = names.iter().filter(|name| name.ends_with(".wal")).cloned().collect();
    for name in [&whole[3], &whole[6], &whole[whole.len() - 3]] {
        let number = common::segment_number(name, MIB).unwrap();
        let (from, to) = (Lsn(number * MIB), Lsn((number + 1) * MIB));
        // Without what the stream has of it as well.
        let parts: Vec<_> =
            site.wal_objects(1).into_iter().filter(|part| part.ends_with(".part") && part[..24] == name[..24]).collect();
        let objects = parts.iter().chain([name]).map(|name| site.vaults.object(&format!("/{name}")));
        let hidden: Vec<_> = objects.map(|object| (site.vaults.take(&object), object)).collect();
        let report = check(&site, &[]).expect(4).json();
        assert_eq!(list(&report, "damage").len(), 0, "{report}");
        let gaps = list(&report, "gaps");
        assert_eq!(gaps.len(), 1, "{report}");
        assert_eq!((at(&gaps[0]["from_lsn"]), at(&gaps[0]["to_lsn"]), &gaps[0]["timeline"]), (from, to, &Value::from(1)));
        let ends = transaction_ends(&server, 1, begin, Lsn(fork.0));
        let before = ends.range(..from).next_back().map(|(_, time)| time.to_string());
        let behind = ends.range(to..).next().map(|(_, time)| time.to_string());
        // A record that begins before the gap and ends in it is not there.
        assert!(gaps[0]["from_time"].as_str() <= before.as_deref() && gaps[0]["from_time"].is_string(), "{report}: {before:?}");
        assert_eq!(gaps[0]["to_time"].as_str(), behind.as_deref(), "{report}");
        site.pgv(&["wal", "check"])
            .expect(4)
            .says(&format!("GAP WAL from {from} to {to} of timeline 1 is missing"))
            .says("the last transaction before it ended at");
        // `list` knows the same from the footers, and no restore crosses it.
        let listed = site.summary(&["list"]);
        let listed = &list(&listed, "gaps")[0];
        assert_eq!((at(&listed["from"]), at(&listed["to"])), (from, to));
        assert!(listed["from_time"].is_string() && listed["to_time"].is_string(), "{listed}");
        site.pgv(&["status"]).ok().says(&format!("gap: WAL from {from} to {to} of timeline 1 is missing; the last"));
        let target = format!("lsn:{}", Lsn(from.0 + MIB / 2));
        for target in ["latest", &target, "xid:999999"] {
            let ran = site.restore_into(&site.path("refused"), target, &["--timeline", "1"]).expect(5);
            if !target.starts_with("xid") {
                let _ = ran.says(&format!("WAL from {from} to {to} of timeline 1 is missing")).says("nearest: ");
            }
        }
        let ran = site.restore_into(&site.path("refused"), &target, &["--timeline", "2"]).expect(5);
        let _ =
            ran.says("nearest: the last position is").says("; the first moment that").says(later["backup_id"].as_str().unwrap());
        for (bytes, object) in hidden {
            site.vaults.replace(&object, bytes);
        }
    }
    let _ = check(&site, &[]).ok();

    // An object that was changed where it lies; and the history that tells where the second timeline began.
    let object = site.vaults.object(&format!("/{}", whole[5]));
    let bytes = site.vaults.read(&object);
    site.vaults.flip(&object, 200);
    let report = check(&site, &[]).expect(4).json();
    let damage = list(&report, "damage");
    assert!(damage.len() == 1 && damage[0]["object"].as_str().unwrap().ends_with(&whole[5]), "{report}");
    assert_eq!(list(&report, "gaps").len(), 0, "{report}");
    site.vaults.replace(&object, bytes);
    let history = site.vaults.object("00000002.history");
    let taken = site.vaults.take(&history);
    let report = check(&site, &[]).expect(4).says("is missing: nobody can tell where").json();
    assert!(list(&report, "damage")[0]["object"].as_str().unwrap().ends_with("00000002.history"), "{report}");
    site.vaults.replace(&history, taken);
    let _ = check(&site, &[]).ok();

    pushed_by_hand(&site, &server, fork);
}

/// What was damaged before it was archived is authentic to the store. It is named by the record.
fn pushed_by_hand(site: &Site, server: &Server, fork: Lsn) {
    site.configure_text("vault2", &server.conninfo(), Some(server.pgdata()));
    site.pgv(&["init"]).ok();
    let offered = site.directory("offered");
    let wal = server.pgdata().join("pg_wal");
    let mut names: Vec<String> = fs::read_dir(&wal)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.len() == 24 && name.as_bytes()[7] == b'1')
        .collect();
    names.sort();
    let fork_segment = fork.0 / MIB;
    let number = |name: &str| common::segment_number(name, MIB).unwrap();
    names.retain(|name| number(name) + 8 > fork_segment && number(name) <= fork_segment);
    // One byte in the data of a record, in the middle of the row.
    let victim =
        names.iter().rev().find(|name| number(name) < fork_segment && !records(server, &wal.join(name)).is_empty()).unwrap();
    let found = records(server, &wal.join(victim));
    let (record, _) = found[found.len() / 2];
    for name in &names {
        let mut bytes = fs::read(wal.join(name)).unwrap();
        if name == victim {
            bytes[usize::try_from(record.0 % MIB).unwrap() + 25] ^= 0x20;
        }
        fs::write(offered.join(name), bytes).unwrap();
    }
    // The first segment of the second timeline repeats the first one's up to the fork; not this copy of it.
    let child = format!("00000002{:08X}{:08X}", fork_segment / 4096, fork_segment % 4096);
    let mut bytes = fs::read(wal.join(&child)).unwrap();
    let repeated = records(server, &wal.join(&child));
    let (changed, _) = *repeated.iter().find(|(lsn, _)| *lsn < fork).unwrap();
    bytes[usize::try_from(changed.0 % MIB).unwrap() + 24] ^= 0x20;
    fs::write(offered.join(&child), bytes).unwrap();
    // What the promotion left of the first timeline's last segment.
    let partial = format!("00000001{}.partial", &child[8..]);
    for name in [&partial, "00000002.history"] {
        let _ = fs::copy(wal.join(name), offered.join(name)).unwrap();
    }
    site.account.own(&offered).unwrap();
    for name in names.iter().chain([&child, &partial, &"00000002.history".to_owned()]) {
        let _ = site.pgv(&["wal", "push", offered.join(name).to_str().unwrap()]).ok();
    }
    let report = check(site, &[]).expect(4).json();
    assert_eq!(list(&report, "gaps").len(), 0, "{report}");
    let damage = list(&report, "damage");
    let named = |object: &str, what: &str| {
        let is_it = |d: &&Value| d["object"].as_str().unwrap().ends_with(object) && d["what"].as_str().unwrap().contains(what);
        at(&damage.iter().find(is_it).unwrap_or_else(|| panic!("{object}: {what} in {report}"))["lsn"])
    };
    assert_eq!(named(&format!("{victim}.wal"), "CRC"), record);
    assert_eq!(named(&format!("{child}.wal"), "CRC"), changed);
    assert_eq!(named(&format!("{child}.wal"), "differs from"), Lsn(changed.0 + 24));
    assert_eq!(damage.len(), 3, "{report}");
}

/// Records that begin and end in a segment, with their lengths.
fn records(server: &Server, segment: &Path) -> Vec<(Lsn, u64)> {
    let mut dump = std::process::Command::new(server.install().program("pg_waldump").unwrap());
    dump.env("LC_ALL", "C").arg(segment);
    let ran = run(dump);
    let found = ran.stdout.lines().filter_map(|line| {
        let after = |text: &str| Some(line.split_once(text)?.1);
        let length: u64 = after("len (rec/tot):")?.split_once('/')?.1.split(',').next()?.trim().parse().ok()?;
        let lsn: Lsn = after("lsn: ")?.split(',').next()?.parse().ok()?;
        // Where no page header is in the way of counting.
        (length > 32 && lsn.0 % 8192 + length < 8192).then_some((lsn, length))
    });
    found.collect()
}
