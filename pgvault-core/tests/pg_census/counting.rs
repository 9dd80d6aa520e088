//! What a census counts, and what it leaves out.

use std::collections::BTreeMap;
use std::time::Duration;

use pgvault_core::backup::{BackupOptions, CensusOptions};
use pgvault_core::postgres::wal::Touch;
use pgvault_core::postgres::{Connection, Lsn, Mode};
use pgvault_core::vault::census::{Between, Census, CountedDatabase, Found, Verdict};
use pgvault_core::vault::snapshot::{self, Manifest};

use crate::place::{Place, builder, runtime};

const HOLD_UP: Duration = Duration::from_secs(2);

/// Rows by schema and table.
fn rows(database: &CountedDatabase) -> BTreeMap<String, u64> {
    database.tables.iter().map(|table| (table.to_string(), table.rows)).collect()
}

fn database<'a>(census: &'a Census, name: &str) -> &'a CountedDatabase {
    census.databases.iter().find(|database| database.name == name).unwrap_or_else(|| panic!("{name} is not in {census:?}"))
}

fn census(manifest: &Manifest) -> &Census {
    manifest.census.as_ref().unwrap()
}

fn left_out(census: &Census, reason: &str) -> u64 {
    census.left_out.get(reason).copied().unwrap_or_default()
}

/// A session that stays.
async fn session(place: &Place, more: &str, sql: &str) -> Connection {
    let mut connection = Connection::connect(&place.connection(more), Mode::Sql).await.unwrap();
    let _ = connection.simple_query(sql).await.unwrap();
    connection
}

#[test]
fn tables_of_all_databases_are_counted_while_writers_are_at_work() {
    let place = Place::new(builder());
    let _ = place.sql(
        "postgres",
        "create table quiet (n int); insert into quiet select generate_series(1, 1234);
         create table empty (); create unlogged table unlogged (n int); insert into unlogged values (1);
         create table parent (n int); insert into parent values (1);
         create table child () inherits (parent); insert into child values (2), (3);
         create table parted (n int) partition by range (n);
         create table part partition of parted for values from (0) to (10); insert into parted values (1), (2);
         create materialized view materialized as select * from quiet; create view v as select * from quiet;
         create table indexed (n int primary key); insert into indexed select generate_series(1, 500); vacuum analyze indexed;
         create table shielded (n int); insert into shielded values (1), (2); alter table shielded enable row level security;
         create table large (t text); insert into large select repeat('x', 5000) from generate_series(1, 400);
         alter table large alter t set storage plain; insert into large select repeat('x', 5000) from generate_series(1, 400);
         create table busy (n int);",
    );
    let _ = place.sql("postgres", "create database \"Odd \"\"name\" ");
    let _ = place.sql("postgres", "create database empty");
    let odd = "Odd \"name";
    let _ =
        place.sql(odd, "create schema \"s.\"\"t'\"; create table \"s.\"\"t'\".\"T \\ \"\"1\" as select generate_series(1, 7) n");
    let id = |relation: &str| place.sql("postgres", &format!("select '{relation}'::regclass::oid"));
    let file = |relation: &str| place.sql("postgres", &format!("select pg_relation_filenode('{relation}')"));
    let _ = place.sql("postgres", "truncate quiet; insert into quiet select generate_series(1, 1234)");
    assert_ne!(id("quiet"), file("quiet"));
    for local in [true, false] {
        let before: u64 = place.sql("postgres", "select count(*) from busy").parse().unwrap();
        let options = place.options(local, HOLD_UP);
        let options =
            BackupOptions { census: options.census.map(|census| CensusOptions { table_bytes: 1 << 20, ..census }), ..options };
        let runtime = runtime();
        let writer = runtime.spawn({
            let info = place.connection("");
            async move {
                let mut connection = Connection::connect(&info, Mode::Sql).await.unwrap();
                loop {
                    let _ = connection.simple_query("insert into busy values (1); select pg_sleep(0.005)").await.unwrap();
                }
            }
        });
        let manifest = place.backup(&options);
        writer.abort();
        let after: u64 = place.sql("postgres", "select count(*) from busy").parse().unwrap();
        let census = census(&manifest);
        let postgres = database(census, "postgres");
        let mut counted = rows(postgres);
        let busy = counted.remove("public.busy").unwrap_or_else(|| panic!("{census:?}"));
        assert!((before..=after).contains(&busy) && after > before, "{before} {busy} {after}");
        let expected = [
            ("public.quiet", 1234),
            ("public.empty", 0),
            ("public.parent", 1),
            ("public.child", 2),
            ("public.part", 2),
            ("public.indexed", 500),
            ("public.shielded", 2),
        ];
        assert_eq!(counted, expected.map(|(name, rows)| (name.to_owned(), rows)).into());
        assert_eq!(rows(database(census, odd)), BTreeMap::from([("s.\"t'.T \\ \"1".to_owned(), 7)]));
        assert_eq!(rows(database(census, "empty")), BTreeMap::new());
        assert_eq!(census.left_out, BTreeMap::from([("large".to_owned(), 1)]));
        assert!(census.databases.iter().all(|database| database.settled), "{census:?}");
        assert!(census.databases.iter().all(|database| (manifest.start_lsn..=manifest.stop_lsn).contains(&database.lsn)));
        let quiet = postgres.tables.iter().find(|table| table.name == "quiet").unwrap();
        assert_eq!((quiet.oid.to_string(), quiet.filenode.to_string()), (id("quiet"), file("quiet")));
        // A copy that was recovered to less than was counted proves nothing.
        let touched = place.touched(manifest.start_lsn, manifest.stop_lsn);
        assert_eq!(postgres.between(quiet, &touched, postgres.lsn).doubt, None);
        assert!(postgres.between(quiet, &touched, Lsn(postgres.lsn.0 - 1)).doubt.is_some());
        let stored = runtime.block_on(snapshot::open(place.cluster(), manifest.id, None)).unwrap();
        assert_eq!(stored.manifest.census.as_ref(), Some(census));
        assert_eq!(runtime.block_on(stored.census()).unwrap().as_ref(), Some(census));
        let listed = runtime.block_on(snapshot::list(place.cluster())).unwrap().snapshots.pop().unwrap();
        assert_eq!(listed.manifest.census, None, "a listing holds no tables");
        assert_eq!(runtime.block_on(listed.census()).unwrap().as_ref(), Some(census));
    }
}

#[test]
fn what_a_role_may_not_read_is_left_out() {
    let place = Place::new(builder());
    let _ = place.sql("postgres", "create role saver login replication; create database closed; create database full_up");
    let _ = place.sql("postgres", "revoke connect on database closed from public; alter database full_up connection limit 0");
    let _ = place.sql(
        "postgres",
        "create table open (n int); insert into open values (1); grant select on open to saver;
         create table secret (n int); create table one_column (a int, b int); grant select (a) on one_column to saver;
         create table shielded (n int); insert into shielded values (1); alter table shielded enable row level security;
         create policy none on shielded using (false); grant select on shielded to saver;
         create schema hidden; create table hidden.t (n int); grant select on hidden.t to saver;
         grant execute on function pg_backup_start(text, boolean), pg_backup_stop(boolean) to saver",
    );
    for local in [true, false] {
        let options = BackupOptions { connection: place.connection("user=saver"), ..place.options(local, HOLD_UP) };
        let manifest = place.backup(&options);
        let census = census(&manifest);
        assert_eq!(rows(database(census, "postgres")), BTreeMap::from([("public.open".to_owned(), 1)]));
        assert_eq!((left_out(census, "right"), left_out(census, "databases")), (4, 2), "{census:?}");
        assert!(database(census, "postgres").settled);
    }
    // The backup's own session is all that the role may have.
    let _ = place.sql("postgres", "alter role saver connection limit 1");
    let options = BackupOptions { connection: place.connection("user=saver"), ..place.options(false, HOLD_UP) };
    let manifest = place.backup(&options);
    assert_eq!(census(&manifest), &Census::default());
}

#[test]
fn older_transactions_and_locks_leave_a_mark_and_nothing_else() {
    let place = Place::new(builder());
    let _ = place.sql(
        "postgres",
        "create table free (n int); insert into free values (1); create table locked (n int); create table o (n int)",
    );
    let runtime = runtime();
    let older = runtime.block_on(session(&place, "", "begin; insert into o values (1)"));
    let reader = runtime.block_on(session(&place, "", "begin isolation level repeatable read; select * from free"));
    let mut options = place.options(true, HOLD_UP);
    options.census = Some(CensusOptions { budget: Duration::from_secs(4), still_only: false, ..CensusOptions::default() });
    let manifest = place.backup(&options);
    let expected = BTreeMap::from([("public.free".to_owned(), 1), ("public.locked".to_owned(), 0), ("public.o".to_owned(), 0)]);
    let counted = database(census(&manifest), "postgres");
    assert_eq!((rows(counted), counted.settled), (expected, false));
    // What that transaction had written is in no WAL behind the start of the backup: only the doubt keeps it from being called wrong.
    let mut older = older;
    let _ = runtime.block_on(older.simple_query("commit")).unwrap();
    let reached = place.lsn();
    let touched = place.touched(manifest.start_lsn, reached);
    let table = counted.tables.iter().find(|table| table.name == "o").unwrap();
    let between = counted.between(table, &touched, reached);
    let found = Some(Found { filenode: table.filenode, rows: 1 });
    assert_eq!(between.touch, Touch::Untouched);
    assert!(matches!(table.compare(found, between), Verdict::Unsure(_)));
    assert!(matches!(table.compare(found, Between { doubt: None, ..between }), Verdict::Wrong(_)));
    // One that only reads is no older transaction.
    let manifest = place.backup(&place.options(true, HOLD_UP));
    assert!(database(census(&manifest), "postgres").settled);
    drop(reader);
    let _ = place.sql("postgres", "begin; insert into o values (1); prepare transaction 'older'");
    let locking = runtime.block_on(session(&place, "", "begin; lock table locked"));
    let manifest = place.backup(&options);
    let counted = database(census(&manifest), "postgres");
    assert_eq!((rows(counted).len(), counted.settled), (2, false));
    assert_eq!(left_out(census(&manifest), "locked"), 1);
    drop(locking);
    let _ = place.sql("postgres", "rollback prepared 'older'");
}

/// A backup writes nothing on the server: tables that nobody has read since they were written are not counted, and so not written to.
#[test]
fn only_tables_that_stand_still_are_counted() {
    let place = Place::new(builder().config("autovacuum = off"));
    let fill = "as select g, repeat('x', 100) from generate_series(1, 20000) g";
    let _ = place.sql("postgres", &format!("create table still {fill}; create table changed {fill}; create table fresh {fill}"));
    let _ = place.sql("postgres", "select pg_stat_force_next_flush()");
    let _ = place.sql("postgres", "vacuum analyze still, changed");
    let _ = place.sql("postgres", "update changed set g = g where g <= 500; checkpoint");
    let _ = place.sql("postgres", "select pg_stat_force_next_flush()");
    let mut options = place.options(true, HOLD_UP);
    options.census = options.census.map(|census| CensusOptions { still_only: true, ..census });
    let manifest = place.backup(&options);
    let counted = rows(database(census(&manifest), "postgres"));
    assert_eq!(counted, BTreeMap::from([("public.still".to_owned(), 20_000)]));
    assert_eq!(left_out(census(&manifest), "changing"), 2);
    options.census = options.census.map(|census| CensusOptions { still_only: false, ..census });
    let manifest = place.backup(&options);
    assert_eq!(rows(database(census(&manifest), "postgres")).len(), 3);
}

#[test]
fn the_number_of_tables_is_bounded_and_small_ones_come_first() {
    let place = Place::new(builder());
    let _ = place.sql(
        "postgres",
        "do $$ begin for n in 1..60 loop execute format('create table t%s as select generate_series(1, %s) n', n, n * 100); end loop; end $$;
         analyze",
    );
    let mut options = place.options(true, HOLD_UP);
    options.census = options.census.map(|census| CensusOptions { tables: 20, ..census });
    let manifest = place.backup(&options);
    let counted = rows(database(census(&manifest), "postgres"));
    assert_eq!((counted.len(), left_out(census(&manifest), "many")), (20, 40));
    let expected = (1..=20).map(|n| (format!("public.t{n}"), n * 100)).collect();
    assert_eq!(counted, expected);
    for none in [None, Some(CensusOptions { budget: Duration::ZERO, ..CensusOptions::default() })] {
        options.census = none;
        assert_eq!(place.backup(&options).census, None);
    }
    // A copy that is over at once: whatever was counted by then is right.
    options.census = Some(CensusOptions::default());
    options.progress = std::sync::Arc::new(pgvault_core::progress::Silent);
    let manifest = place.backup(&options);
    let full: BTreeMap<String, u64> = (1..=60).map(|n| (format!("public.t{n}"), n * 100)).collect();
    for database in &census(&manifest).databases {
        assert!(rows(database).iter().all(|(name, rows)| full.get(name) == Some(rows)));
    }
}
