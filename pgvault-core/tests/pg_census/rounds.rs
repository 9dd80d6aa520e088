//! Random writers, a backup among them, a copy that is recovered to a random later moment: every count is explained.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgvault_core::postgres::wal::Touch;
use pgvault_core::postgres::{ConnInfo, Connection, Lsn, Mode};
use pgvault_core::vault::census::{Between, CountedDatabase, CountedTable, Found, Verdict};

use crate::place::{Copy, Place, builder};
use crate::records::assert_as_pg_waldump;

const WRITERS: u64 = 3;

/// Reproducible random numbers.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }
}

/// Tables by what may happen to them, in both databases.
const SETUP: &str = "
    create table quiet as select generate_series(1, 321) n;
    create table grows (n serial primary key, t text);
    create table updates (n int primary key, t text) with (fillfactor = 60);
    insert into updates select n, 'x' from generate_series(1, 400) n;
    create table mixed (n serial primary key, t text); insert into mixed (t) select 'x' from generate_series(1, 400);
    create table rewritten (n int, t text); insert into rewritten select n, 'x' from generate_series(1, 200) n;
    create table parted (n int) partition by range (n);
    create table low partition of parted for values from (0) to (500);
    create table high partition of parted for values from (500) to (1000);
    create table comes_and_goes (n int);
";

/// One statement of a transaction.
fn statement(random: &mut Random) -> String {
    let (n, m) = (random.below(400), random.below(20) + 1);
    match random.below(24) {
        0 | 1 => "insert into grows (t) values ('one')".to_owned(),
        2 => format!("insert into grows (t) select 'many' from generate_series(1, {m})"),
        3 => format!("insert into grows (n, t) values ({n}, 'x') on conflict do nothing"),
        4 => "copy grows (t) from program 'seq 1 30'".to_owned(),
        5 | 6 => format!("update updates set t = 'hot{n}' where n = {n}"),
        7 => format!("update updates set n = n where n % 40 = {m}"),
        8 => format!(
            "insert into updates values ({n}, 'x') on conflict (n) do update set t = excluded.t || 'y' where updates.n = {n}"
        ),
        9 => format!("select * from updates where n < {n} for update"),
        10 | 11 => format!("insert into mixed (t) select 'y' from generate_series(1, {m})"),
        12 | 13 => format!("delete from mixed where n % 50 = {m}"),
        14 => format!("update mixed set t = t || 'z' where n = {n}"),
        15 => "truncate rewritten".to_owned(),
        16 => format!("insert into rewritten select n, 'x' from generate_series(1, {m}) n"),
        17 => "alter table rewritten alter n type bigint; alter table rewritten alter n type int".to_owned(),
        18 => format!("insert into parted values ({n})"),
        19 => format!("update parted set n = (n + 500) % 1000 where n % 20 = {m}"),
        20 => "drop table comes_and_goes; create table comes_and_goes as select generate_series(1, 9) n".to_owned(),
        21 => "drop table comes_and_goes".to_owned(),
        22 => "create table comes_and_goes as select generate_series(1, 5) n".to_owned(),
        _ => {
            "savepoint a; insert into grows (t) values ('nested'); rollback to a; insert into grows (t) values ('kept')".to_owned()
        }
    }
}

/// What cannot run in a transaction.
fn alone(random: &mut Random) -> String {
    let table = ["grows", "updates", "mixed", "rewritten", "quiet"];
    let mut table = || table[usize::try_from(random.below(5)).unwrap()];
    let (one, other) = (table(), table());
    match random.below(8) {
        0 => format!("vacuum {one}"),
        1 => format!("vacuum freeze {one}"),
        2 => format!("vacuum full {one}"),
        3 => "cluster mixed using mixed_pkey".to_owned(),
        4 => "checkpoint".to_owned(),
        5 => format!("analyze {one}; vacuum {other}"),
        6 => "reindex table grows".to_owned(),
        _ => "create index concurrently if not exists later on mixed (t)".to_owned(),
    }
}

/// Writes until it is told to stop. Errors (deadlocks, tables that are not there) are part of it.
async fn write(info: ConnInfo, seed: u64, stop: Arc<AtomicBool>, failures: Arc<Mutex<BTreeMap<String, u64>>>) {
    let mut random = Random::new(seed);
    let mut connection = Connection::connect(&info, Mode::Sql).await.unwrap();
    let _ = connection.simple_query("set lock_timeout = 300; set statement_timeout = 3000").await.unwrap();
    let mut prepared = 0;
    while !stop.load(Ordering::Relaxed) {
        let sql = match random.below(16) {
            0 => alone(&mut random),
            1 => {
                prepared += 1;
                let name = format!("p{seed}_{prepared}");
                let end = if random.below(2) == 0 { "commit" } else { "rollback" };
                format!(
                    "begin; {}; prepare transaction '{name}'; select pg_sleep(0.01); {end} prepared '{name}'",
                    statement(&mut random)
                )
            }
            2 => format!("begin; {}; select pg_sleep(0.05); {}; commit", statement(&mut random), statement(&mut random)),
            3 => format!("begin; {}; {}; rollback", statement(&mut random), statement(&mut random)),
            4..=8 => format!("begin; {}; {}; commit", statement(&mut random), statement(&mut random)),
            _ => statement(&mut random),
        };
        // One after the other: what belongs together says so itself.
        for part in sql.split("; ") {
            if let Err(error) = connection.simple_query(part).await {
                let said = error.to_string();
                *failures.lock().unwrap().entry(said.chars().filter(|c| !c.is_ascii_digit()).take(60).collect()).or_default() += 1;
                let _ = connection.simple_query("rollback").await.unwrap();
                break;
            }
        }
    }
    let _ = connection.simple_query("rollback").await;
}

/// What the copy has of the tables that were counted; those that are locked in it are left out.
fn found(copy: &Copy, database: &CountedDatabase) -> BTreeMap<u32, Option<Found>> {
    let mut found = BTreeMap::new();
    for table in &database.tables {
        let name =
            copy.server.psql_in(&database.name, &format!("select oid::regclass from pg_class where oid = {}", table.oid)).unwrap();
        if name.is_empty() {
            let _ = found.insert(table.oid, None);
            continue;
        }
        let sql = format!("select pg_relation_filenode({}), count(*) from only {name}", table.oid);
        // What was prepared and not committed keeps its locks.
        let Ok(answer) = copy.server.psql_in(&database.name, &format!("set lock_timeout = 300; {sql}")) else {
            eprintln!("{name} is locked");
            continue;
        };
        let (filenode, rows) = answer.lines().last().unwrap().split_once('|').unwrap();
        let _ = found.insert(table.oid, Some(Found { filenode: filenode.parse().unwrap(), rows: rows.parse().unwrap() }));
    }
    found
}

/// How often which verdict was given.
#[derive(Debug, Default)]
struct Tally {
    verdicts: BTreeMap<String, u64>,
    noticed: u64,
}

impl Tally {
    fn count(&mut self, what: impl Into<String>) {
        *self.verdicts.entry(what.into()).or_default() += 1;
    }

    fn judge(&mut self, seed: u64, table: &CountedTable, found: Option<Found>, between: Between) {
        let verdict = table.compare(found, between);
        assert!(!matches!(verdict, Verdict::Wrong(_)), "seed {seed}: {verdict:?}, {table:?}, {found:?}, {between:?}");
        match &verdict {
            Verdict::Same => self.count(format!("same, {:?}", between.touch)),
            Verdict::Explained(why) => self.count(*why),
            other => self.count(format!("{other:?}").chars().take(6).collect::<String>()),
        }
        // One row less, or none of them at all, must be seen wherever anything can be concluded.
        let Some(found) = found else { return };
        if between.doubt.is_some() || found.filenode != table.filenode || between.touch == Touch::Changed || found.rows == 0 {
            return;
        }
        let lost = |rows| table.compare(Some(Found { rows, ..found }), between);
        let is_seen = between.touch <= Touch::Updated || found.rows == table.rows;
        for rows in [found.rows - 1, 0] {
            if rows < table.rows && (is_seen || rows == 0) {
                assert!(matches!(lost(rows), Verdict::Wrong(_)), "seed {seed}: {rows} rows: {table:?}, {found:?}, {between:?}");
                self.noticed += 1;
            }
        }
        if between.touch <= Touch::Updated {
            assert!(matches!(lost(found.rows + 1), Verdict::Wrong(_)), "seed {seed}: a row more");
        }
        if !between.was_dropped {
            assert!(matches!(table.compare(None, between), Verdict::Wrong(_)), "seed {seed}: no table");
        }
    }
}

#[test]
fn counts_of_a_backup_and_of_a_restored_copy_are_explained_by_the_wal_between() {
    let given = std::env::var("PGVAULT_TEST_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let seeds: Vec<u64> = given.map_or_else(|| (1..=if full() { 30 } else { 12 }).collect(), |seed| vec![seed]);
    let place = Place::new(builder().config("autovacuum_naptime = 1").config("max_locks_per_transaction = 200"));
    let _ = place.sql("postgres", "create database second");
    for database in ["postgres", "second"] {
        let _ = place.sql(database, SETUP);
    }
    let standby = place.standby();
    let mut tally = Tally::default();
    let failures = Arc::new(Mutex::new(BTreeMap::new()));
    let mut first = None;
    let mut last = Lsn::INVALID;
    for seed in &seeds {
        let mut random = Random::new(*seed);
        let stop = Arc::new(AtomicBool::new(false));
        let runtime = crate::place::runtime();
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let database = if n == 0 { "dbname=second" } else { "" };
                runtime.spawn(write(place.connection(database), seed * 100 + n, stop.clone(), failures.clone()))
            })
            .collect();
        let hold_up = Duration::from_millis(100 + random.below(600));
        let mut options = place.options(random.below(2) == 0, hold_up);
        if seed % 3 == 0 {
            // What it replays meanwhile it also shows.
            options.connection = ConnInfo::parse(&standby.conninfo(), &|_| None).unwrap();
            options.pgdata = options.pgdata.map(|_| standby.pgdata().to_path_buf());
        }
        let manifest = place.backup(&options);
        std::thread::sleep(Duration::from_millis(random.below(400)));
        // Somewhere in the middle of what is written; more WAL follows.
        let to = if random.below(4) == 0 { manifest.stop_lsn } else { place.lsn() };
        std::thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        runtime.block_on(async {
            for writer in writers {
                writer.await.unwrap();
            }
        });
        last = place.lsn();
        let copy = place.restore(&manifest, to);
        let _ = first.get_or_insert(manifest.start_lsn);
        let census = manifest.census.as_ref().unwrap();
        let touched = place.touched(manifest.start_lsn, copy.reached);
        for database in &census.databases {
            let found = found(&copy, database);
            for table in &database.tables {
                let Some(found) = found.get(&table.oid) else { continue };
                tally.count(if manifest.from_standby { "of a standby" } else { "of a primary" });
                tally.judge(*seed, table, *found, database.between(table, &touched, copy.reached));
            }
        }
        for (reason, count) in &census.left_out {
            *tally.verdicts.entry(format!("left out: {reason}")).or_default() += count;
        }
    }
    eprintln!("{} rounds: {tally:#?}", seeds.len());
    eprintln!("statements that failed: {:#?}", failures.lock().unwrap());
    assert_as_pg_waldump(&place, first.unwrap(), last);
    if given.is_none() {
        let times = |what: &str| tally.verdicts.get(what).copied().unwrap_or_default();
        for what in
            ["of a standby", "same, Untouched", "same, Updated", "rows were added since", "it was rewritten or truncated since"]
        {
            assert!(times(what) > 0, "{what}: {tally:?}");
        }
        assert!(tally.noticed > if full() { 30 } else { 12 }, "{tally:?}");
    }
}

/// True when the slow variants are wanted too.
fn full() -> bool {
    std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1")
}
