//! Restored directories that are started where they lie, asked, and left or made copies of. On a real PostgreSQL, of the version in
//! `PGVAULT_TEST_PG`.

mod world;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use pgvault_core::ErrorKind;
use pgvault_core::restore::TargetAction;
use pgvault_core::restore::plan::Stop;
use pgvault_verify::process::Mode;
use pgvault_verify::side::{Side, is_sealed, seal};
use world::{Open, Restored, World};

/// What a later start has to find: the target as it was, and nothing of the isolation.
#[test]
fn a_directory_that_was_left_recovers_to_the_same_target_and_goes_on_as_it_says() {
    let mut world = World::new();
    let _ = world.sql("create table t(i int); insert into t values (1)");
    world.backup();
    let _ = world.sql("insert into t values (2); select pg_create_restore_point('two')");
    let time = world.sql("select clock_timestamp()");
    let _ = world.sql("select pg_sleep(0.01); insert into t values (3)");
    let xid = world.sql("begin; insert into t values (4); select pg_current_xact_id()::xid; commit");
    // The checkpoint of a server that stops, as a target: a server that stops behind it would not meet it again.
    world.server.stop(Mode::Fast).unwrap();
    let checkpoint = world.checkpoint();
    world.server.start().unwrap();
    let _ = world.sql("insert into t values (5)");
    world.archive();
    let targets = [
        ("name:two".to_owned(), 2),
        (time.replace(' ', "T"), 2),
        (format!("xid:{xid}"), 4),
        (format!("lsn:{checkpoint}"), 4),
        ("immediate".to_owned(), 1),
        ("latest".to_owned(), 5),
    ];
    for (target, rows) in targets {
        for action in [TargetAction::Pause, TargetAction::Promote] {
            let restored = world.restore(&target, action);
            let before = fs::read(restored.pgdata.join("postgresql.auto.conf")).unwrap();
            let side = world.start(&restored);
            let reached = side.reached().clone();
            world.block_on(async {
                let mut sql = side.connect("postgres").await.unwrap();
                let row =
                    sql.query_one("select count(*), pg_is_in_recovery(), current_setting('archive_mode') from t").await.unwrap();
                assert_eq!((row.required(0).unwrap(), row.required(1).unwrap()), (rows.to_string().as_str(), "t"), "{target}");
                assert_eq!(row.required(2).unwrap(), "off");
                assert!(sql.simple_query("insert into t values (9)").await.is_err(), "{target}");
                sql.close().await;
                side.leave().await.unwrap();
            });
            assert_eq!(fs::read(restored.pgdata.join("postgresql.auto.conf")).unwrap(), before, "{target}");
            assert!(restored.pgdata.join("recovery.signal").exists(), "{target}");
            for name in ["postmaster.opts", "postmaster.pid", "standby.signal"] {
                assert!(!restored.pgdata.join(name).exists(), "{target}: {name}");
            }
            // By its owner, with its own configuration.
            let wanted = if action == TargetAction::Promote { Open::Promoted } else { Open::Paused };
            let plain = world.start_plainly(&restored, wanted);
            assert_eq!(plain.sql("select count(*) from t"), rows.to_string(), "{target} {action:?}");
            if action == TargetAction::Pause {
                assert_eq!(plain.sql("select pg_last_wal_replay_lsn()"), reached.lsn.to_string(), "{target}");
            }
            for (name, value) in
                [("archive_mode", "on"), ("cluster_name", "the-shop"), ("hot_standby", "on"), ("checkpoint_timeout", "5min")]
            {
                assert_eq!(plain.sql(&format!("show {name}")), value, "{target}");
            }
            assert_eq!(plain.sql("show listen_addresses"), "127.0.0.1", "{target}");
            drop(plain);
        }
    }
}

/// The same where the archive ends with the target, which is the checkpoint of the server that was stopped for good.
#[test]
fn the_end_of_a_server_that_was_stopped_is_found_again() {
    let mut world = World::new();
    let _ = world.sql("create table t(i int); insert into t values (1)");
    world.backup();
    let _ = world.sql("insert into t values (2)");
    world.server.stop(Mode::Fast).unwrap();
    world.archive_all();
    let checkpoint = world.checkpoint();
    for action in [TargetAction::Promote, TargetAction::Pause] {
        let restored = world.restore("latest", action);
        assert_eq!(restored.plan.stop, Stop::Lsn { lsn: checkpoint, inclusive: true });
        let side = world.start(&restored);
        assert!(side.reached().lsn > checkpoint);
        world.block_on(side.leave()).unwrap();
        let wanted = if action == TargetAction::Promote { Open::Promoted } else { Open::Paused };
        let plain = world.start_plainly(&restored, wanted);
        assert_eq!(plain.sql("select count(*) from t"), "2");
    }
}

/// A copy: nobody reaches it before it is released, whoever tries and whatever dies.
#[test]
fn a_copy_is_out_of_reach_until_it_is_released() {
    let mut world = World::new();
    let _ = world.sql("create table t(i int); insert into t values (1)");
    world.backup();
    let _ = world.sql("insert into t values (2)");
    world.archive();
    let restored = world.restore("latest", TargetAction::Pause);
    let before = fs::read(restored.pgdata.join("postgresql.auto.conf")).unwrap();
    seal(&restored.pgdata).unwrap();
    world.refuses_to_start(&restored);
    let promoted = world.block_on(async { world.start_in(&restored).await.unwrap().promote().await.unwrap() });
    assert!(is_sealed(&restored.pgdata).unwrap());
    // Nothing listens but a socket in a folder that only its account, and root, can enter.
    world.block_on(async {
        let mut sql = promoted.connect("postgres").await.unwrap();
        let row = sql
            .query_one(
                "select current_setting('listen_addresses'), current_setting('unix_socket_directories'), current_setting('archive_mode'), pg_is_in_recovery(), pg_backend_pid()",
            )
            .await
            .unwrap();
        assert_eq!((row.required(0).unwrap(), row.required(2).unwrap(), row.required(3).unwrap()), ("", "off", "f"));
        let folder = row.required(1).unwrap();
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700, "{folder}");
        let postmaster = world::parent_of(row.required(4).unwrap().parse().unwrap());
        assert_eq!(world::listening(postmaster), 0, "TCP sockets of the copy's server");
        let row = sql.query_one("insert into t values (3) returning i").await.unwrap();
        assert_eq!(row.required(0).unwrap(), "3");
        sql.close().await;
    });
    // It dies before it was made harmless: it is nobody's server.
    drop(promoted);
    world.refuses_to_start(&restored);

    let restored = world.restore("latest", TargetAction::Pause);
    world.block_on(async {
        let promoted = world.start_in(&restored).await.unwrap().promote().await.unwrap();
        assert!(is_sealed(&restored.pgdata).unwrap(), "also when nobody has sealed it");
        promoted.withhold().await.unwrap();
    });
    world.refuses_to_start(&restored);

    let restored = world.restore("latest", TargetAction::Pause);
    seal(&restored.pgdata).unwrap();
    world.block_on(async {
        let promoted = world.start_in(&restored).await.unwrap().promote().await.unwrap();
        let mut sql = promoted.connect("postgres").await.unwrap();
        let _ = sql.simple_query("insert into t values (4)").await.unwrap();
        sql.close().await;
        promoted.release().await.unwrap();
    });
    let plain = world.start_plainly(&restored, Open::Promoted);
    assert_eq!(plain.sql("select string_agg(i::text, ',' order by i) from t"), "1,2,4");
    assert_eq!(plain.sql("select timeline_id from pg_control_checkpoint()"), "2");
    assert_eq!(plain.sql("show cluster_name"), "the-shop");
    assert_eq!(String::from_utf8(fs::read(restored.pgdata.join("postgresql.auto.conf")).unwrap()), String::from_utf8(before));
}

/// Which databases are Odoo's, and what they refer to.
#[test]
fn databases_are_found_by_what_they_hold_and_their_references_page_by_page() {
    let mut world = World::new();
    let hostile = "o'd \"oo\\ = x host=nowhere";
    let quoted = format!("\"{}\"", hostile.replace('"', "\"\""));
    let _ = world.sql(&format!("create database {quoted}; create database plain; create database elsewhere"));
    let _ = world.server.psql_in("elsewhere", "create schema s; create table s.ir_module_module(name text, state text)").unwrap();
    let _ = world.server.psql_in(hostile, include_str!("odoo/18.sql")).unwrap();
    let _ = world
        .server
        .psql_in(
            hostile,
            "update ir_module_module set state = 'to upgrade' where name = 'sale';
             insert into ir_attachment(name, type, store_fname, checksum, file_size)
                 select 'a', 'binary', left(h, 2) || '/' || h, h, g from generate_series(1, 25000) g, lateral (select encode(sha1, 'hex') h from (select substr(sha256(g::text::bytea), 1, 20) sha1) s) x;
             insert into ir_attachment(name, type, store_fname, checksum, file_size)
                 select 'again', type, store_fname, checksum, file_size from ir_attachment where file_size <= 10;
             insert into ir_attachment(name, type, store_fname, checksum, file_size)
                 select 'wrong', type, store_fname, repeat('0', 40), 7 from ir_attachment where file_size = 1 limit 1;
             insert into ir_attachment(name, type, store_fname, checksum, file_size) values ('o', 'binary', 'odd name', null, null);
             insert into ir_attachment(name, type, store_fname, checksum, file_size) values ('s', 'binary', 's3://bucket/x', 'x', 3);
             insert into ir_attachment(name, type, db_datas, file_size) values ('d', 'binary', 'xyz', 3);
             insert into ir_attachment(name, type, url) values ('u', 'url', 'https://example.com')",
        )
        .unwrap();
    world.backup();
    world.archive();
    let restored = world.restore("latest", TargetAction::Pause);
    let side = world.start(&restored);
    world.block_on(async {
        assert_eq!(side.databases().await.unwrap(), ["elsewhere", hostile, "plain", "postgres"]);
        let found = side.odoo_databases().await.unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].name.as_str(), found[0].version.as_deref()), (hostile, Some("18.0.1.3")));
        assert_eq!(found[0].uuid.as_deref(), Some("6e0b1a3c-1111-4222-8333-944445555666"));
        assert!(!found[0].is_neutralised);
        let half: Vec<(&str, &str)> =
            found[0].half_upgraded.iter().map(|module| (module.name.as_str(), module.state.as_str())).collect();
        assert_eq!(half, [("sale", "to upgrade")]);

        let mut references = side.references(hostile).await.unwrap();
        let mut all = Vec::new();
        let mut pages = 0;
        loop {
            let page = references.next_page().await.unwrap();
            if page.is_empty() {
                break;
            }
            pages += 1;
            all.extend(page);
        }
        assert_eq!((pages, all.len()), (3, 25_002));
        assert!(all.is_sorted_by(|one, other| one.store_fname != other.store_fname));
        assert_eq!(all.iter().map(|reference| reference.rows).sum::<u64>(), 25_013);
        let torn: Vec<_> = all.iter().filter(|reference| reference.checksums > 1).collect();
        assert_eq!(torn.len(), 1);
        assert_eq!((torn[0].rows, torn[0].checksums, torn[0].file_size), (3, 2, Some(7)));
        let odd = all.iter().find(|reference| reference.store_fname == "odd name").unwrap();
        assert_eq!((odd.checksum.as_deref(), odd.file_size, odd.rows, odd.checksums), (None, None, 1, 0));
        let census = references.census().await.unwrap();
        let places: Vec<(&str, u64)> = census.iter().map(|place| (place.place.as_str(), place.rows)).collect();
        assert_eq!(places, [("db", 1), ("local", 25_011), ("other", 1), ("s3", 1), ("url", 1)]);
        assert_eq!(census[1].bytes, 25_000 * 25_001 / 2 + 55 + 7);
        references.close().await;
        let error = side.references("plain").await.unwrap_err();
        assert_eq!(error.code(), "side.no_attachments");
        side.leave().await.unwrap();
    });
}

/// What keeps a server from its target is said, and it is not left running.
#[test]
fn a_target_that_is_not_reached_is_an_error_and_nothing_is_left() {
    let mut world = World::new();
    let _ = world.sql("create table t(i int); insert into t values (1)");
    world.backup();
    let _ = world.sql("insert into t values (2)");
    world.archive();
    let mut restored = world.restore("latest", TargetAction::Pause);
    let Restored { plan, pgdata } = &mut restored;
    let conf = pgdata.join("postgresql.auto.conf");
    let text = fs::read_to_string(&conf).unwrap().replace("recovery_target_lsn = '0/", "recovery_target_lsn = 'F/");
    fs::write(&conf, text).unwrap();
    let error = world.block_on(world.start_in(&Restored { plan: plan.clone(), pgdata: pgdata.clone() })).unwrap_err();
    assert_eq!((error.code(), error.kind()), ("side.recovery", ErrorKind::Failed));
    assert!(error.to_string().contains("the WAL in the vault ends before it"), "{error}");
    for name in ["postmaster.pid", "postmaster.opts"] {
        assert!(!pgdata.join(name).exists(), "{name}");
    }
    // At the end of WAL nothing pauses, so it is not even tried.
    let mut end = plan.clone();
    end.stop = Stop::End;
    let error = world.block_on(Side::start(&world.cluster, &end, pgdata, &world.options())).unwrap_err();
    assert_eq!(error.code(), "side.not_pinned");
}
