//! What the WAL of single statements says, against what they are known to do, and all of it against `pg_waldump`.

use std::collections::BTreeMap;
use std::process::Command;

use pgvault_core::postgres::Lsn;
use pgvault_core::postgres::wal::Touch;

use crate::place::{Place, builder};

/// `count(*)`, oid of the database and file of the table.
fn state(place: &Place) -> (u64, u32, u32) {
    let answer = place.sql(
        "postgres",
        "select (select count(*) from t), (select oid from pg_database where datname = 'postgres'), pg_relation_filenode('t')",
    );
    let mut parts = answer.split('|');
    let mut next = || parts.next().unwrap().parse::<u64>().unwrap();
    (next(), u32::try_from(next()).unwrap(), u32::try_from(next()).unwrap())
}

#[test]
fn statements_are_told_apart() {
    let place = Place::new(builder().config("autovacuum = off"));
    let file = place.path("rows");
    std::fs::write(&file, (0..500).map(|n| format!("{n}\tx")).collect::<Vec<_>>().join("\n")).unwrap();
    place.server.account().own(&file).unwrap();
    let copy = format!("copy t from '{}'", file.display());
    // What runs before, the statement, what it does, and whether the table keeps its file.
    let cases: &[(&str, &str, Touch, bool)] = &[
        ("", "select count(*) from t", Touch::Untouched, true),
        ("", "insert into t values (1000, 'x')", Touch::Grew, true),
        ("", "begin; insert into t values (1000, 'x'); rollback", Touch::Grew, true),
        ("", &copy, Touch::Grew, true),
        ("", "insert into t values (-1, 'x') on conflict do nothing", Touch::Grew, true),
        ("", "insert into t values (1, 'x') on conflict do nothing", Touch::Untouched, true),
        ("", "insert into t values (1, 'x') on conflict (n) do update set t = 'y'", Touch::Updated, true),
        ("", "update t set t = 'hot' where n = 5", Touch::Updated, true),
        ("", "update t set n = -n", Touch::Updated, true),
        ("", "begin; update t set n = -n; rollback", Touch::Updated, true),
        ("", "delete from t where n = 7", Touch::Changed, true),
        ("", "begin; delete from t where n = 7; rollback", Touch::Changed, true),
        ("", "delete from t where n = -99", Touch::Untouched, true),
        ("", "select * from t for update", Touch::Untouched, true),
        ("", "begin; select * from t for key share; savepoint a; select * from t for update; commit", Touch::Untouched, true),
        ("delete from t where n < 50", "vacuum t", Touch::Untouched, true),
        ("delete from t where n > 50", "vacuum (freeze, index_cleanup on, truncate on) t", Touch::Untouched, true),
        ("delete from t", "vacuum t", Touch::Untouched, true),
        ("", "vacuum freeze t", Touch::Untouched, true),
        ("", "analyze t", Touch::Untouched, true),
        ("", "create index on t (t)", Touch::Untouched, true),
        ("", "create index concurrently on t (t)", Touch::Untouched, true),
        ("", "reindex table t", Touch::Untouched, true),
        ("", "create sequence s; select nextval('s') from generate_series(1, 100)", Touch::Untouched, true),
        ("", "alter table t add column c int default 5", Touch::Untouched, true),
        ("", "alter table t rename to u; alter table u rename to t", Touch::Untouched, true),
        ("", "checkpoint; update t set t = 'image'", Touch::Updated, true),
        ("", "truncate t", Touch::Changed, false),
        ("", "begin; truncate t; insert into t values (1, 'x'); truncate t; commit", Touch::Changed, false),
        ("", "vacuum full t", Touch::Changed, false),
        ("", "cluster t using t_pkey", Touch::Changed, false),
        ("", "alter table t alter n type bigint", Touch::Changed, false),
        ("", "begin; truncate t; insert into t values (1, 'x'); rollback", Touch::Untouched, true),
    ];
    let first = place.lsn();
    for (before, statement, expected, keeps_file) in cases {
        let _ = place.sql(
            "postgres",
            "drop table if exists t; drop sequence if exists s; create table t (n int primary key, t text) with (fillfactor = 50);
             insert into t select n + 500, repeat('x', 50) from generate_series(1, 300) n; insert into t select n, 'x' from generate_series(1, 100) n",
        );
        if statement.starts_with("copy") {
            let _ = place.sql("postgres", "truncate t");
        }
        let _ = place.sql("postgres", before);
        let (rows, database, filenode) = state(&place);
        let start = place.lsn();
        let _ = place.sql("postgres", statement);
        let until = place.lsn();
        let (rows_after, _, filenode_after) = state(&place);
        let touched = place.touched(start, until);
        assert_eq!(filenode == filenode_after, *keeps_file, "{statement}");
        assert_eq!(touched.was_dropped(database, filenode), !keeps_file, "{statement}");
        assert_eq!(touched.kind(database, filenode_after), *expected, "{statement}");
        if *keeps_file {
            assert!(rows_after == rows || *expected >= Touch::Grew, "{statement}");
            assert!(rows_after >= rows || *expected == Touch::Changed, "{statement}");
        }
    }
    // Dropped tables and databases.
    let (_, database, filenode) = state(&place);
    let start = place.lsn();
    let _ = place.sql("postgres", "begin; drop table t; prepare transaction 'p'");
    let prepared = place.lsn();
    let _ = place.sql("postgres", "commit prepared 'p'; create database d");
    let other = place.sql("postgres", "select oid from pg_database where datname = 'd'").parse().unwrap();
    let middle = place.lsn();
    let _ = place.sql("postgres", "drop database d");
    let until = place.lsn();
    assert!(!place.touched(start, prepared).was_dropped(database, filenode));
    assert!(place.touched(start, until).was_dropped(database, filenode));
    assert!(!place.touched(start, middle).was_database_dropped(other));
    assert!(place.touched(start, until).was_database_dropped(other) && !place.touched(start, until).was_database_dropped(database));
    assert_as_pg_waldump(&place, first, until);
}

/// The same from the text of the server's own reader.
pub(crate) fn assert_as_pg_waldump(place: &Place, start: Lsn, until: Lsn) {
    let dump = dump(place, start, until);
    let mut expected: BTreeMap<(u32, u32), Touch> = BTreeMap::new();
    let mut records = 0u64;
    for line in dump.lines() {
        let Some(manager) = line.strip_prefix("rmgr: ").and_then(|rest| rest.split_whitespace().next()) else { continue };
        let description = line.split(", desc: ").nth(1).unwrap_or_default();
        let operation = description.split([' ', '+']).next().unwrap_or_default();
        let touch = match (manager, operation) {
            ("Heap", "INSERT") | ("Heap2", "MULTI_INSERT") => Touch::Grew,
            ("Heap", "UPDATE" | "HOT_UPDATE") => Touch::Updated,
            ("Heap", "DELETE") | ("XLOG", "FPI") | ("Generic", _) => Touch::Changed,
            ("Storage", "CREATE") => {
                let path = description.split(' ').nth(1).unwrap_or_default();
                if path.contains('_') {
                    continue;
                }
                let mut parts = path.rsplit('/').map(|part| part.parse().unwrap_or(0));
                let (filenode, database) = (parts.next().unwrap(), parts.next().unwrap());
                let _ = expected.insert((database, filenode), Touch::Changed);
                continue;
            }
            _ => continue,
        };
        for block in line.split("blkref #").skip(1) {
            let relation = block.split("rel ").nth(1).unwrap().split(' ').next().unwrap();
            if block.split("blk").next().unwrap().contains("fork") {
                continue;
            }
            let numbers: Vec<u32> = relation.split('/').map(|n| n.parse().unwrap()).collect();
            let known = expected.entry((numbers[1], numbers[2])).or_insert(touch);
            *known = touch.max(*known);
            records += 1;
        }
    }
    let touched = place.touched(start, until);
    assert!(records > 200, "{records} records:\n{dump}");
    for ((database, filenode), touch) in &expected {
        assert_eq!(touched.kind(*database, *filenode), *touch, "{database}/{filenode} from {start} to {until}");
    }
    // Nothing besides: of the numbers around those that occur, the others are untouched.
    for (database, filenode) in expected.keys() {
        for near in filenode.saturating_sub(3)..filenode + 3 {
            let known = expected.get(&(*database, near)).copied().unwrap_or(Touch::Untouched);
            assert_eq!(touched.kind(*database, near), known, "{database}/{near} from {start} to {until}");
        }
    }
}

fn dump(place: &Place, start: Lsn, until: Lsn) -> String {
    let mut command = Command::new(place.server.install().program("pg_waldump").unwrap());
    command.arg("-p").arg(place.server.pgdata().join("pg_wal")).arg("-s").arg(start.to_string()).arg("-e").arg(until.to_string());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
