//! The simulator against what is known of Odoo: each claim about the order of things, on a real server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test, and its helpers panic like it")]

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{attached, column, deleted, run};
use jiff::SignedDuration;
use odoosim::truth::{local_names, rows};
use odoosim::{Actor, Attachment, Collection, Content, Damage, Odoo, Pause, Progress, Recording, Rules, Series, Site, Worker, gc};

/// Everything is put on the clock's far side of any grace.
fn after_the_grace(odoo: &Odoo) {
    odoo.advance(SignedDuration::from_secs(1801));
}

#[test]
fn a_new_content_is_on_disk_and_on_the_checklist_before_its_commit() {
    run(async |site: &Site, series| {
        let odoo = site.create("new", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"a new content");
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach(&content).await.unwrap();
        assert_eq!(fs::read(odoo.filestore().path(&content.store_fname())).unwrap(), content.bytes());
        assert_eq!(fs::read(odoo.filestore().mark_path(&content.store_fname())).unwrap(), b"");
        assert_eq!(odoo.ask("select count(*) from ir_attachment").await.unwrap().unwrap(), "0");
        worker.commit().await.unwrap();
        let row = "select concat_ws(' ', type, store_fname, file_size, checksum, db_datas) from ir_attachment";
        let expected = format!("binary {} 13 {}", content.store_fname(), content.sha1());
        assert_eq!(odoo.ask(row).await.unwrap().unwrap(), expected);
    });
}

/// The order of file, mark and row is what all of this is about.
#[test]
fn file_mark_and_row_come_in_the_order_of_the_series() {
    run(async |site: &Site, series| {
        let odoo = site.create("order", series, Rules::default()).await.unwrap();
        let first = attached(&odoo, &Content::new(*b"first")).await;
        let before = odoo.ledger().now();
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach(&Content::new(*b"second")).await.unwrap();
        worker.overwrite(&first, &Content::new(*b"third")).await.unwrap();
        worker.commit().await.unwrap();
        let mut steps: Vec<String> =
            odoo.ledger().log().into_iter().filter(|entry| entry.step > before).map(|entry| entry.what).collect();
        steps.drain(..2);
        let expected = match series {
            Series::V14 | Series::V18 => {
                "look, create the file, write, write the rest, mark, insert, \
                 look, create the file, write, write the rest, mark, mark, update, commit"
            }
            Series::V19 => {
                "look, insert, look, create the file, write, write the rest, mark, \
                 look, update, mark, look, create the file, write, write the rest, mark, commit"
            }
            Series::V20 => {
                "insert, look, mark, create the file, write, write the rest, rename, \
                 update, mark, look, mark, create the file, write, write the rest, rename, commit"
            }
        };
        assert_eq!(steps.join(", "), expected, "{series:?}");
    });
}

#[test]
fn parts_of_a_file_are_to_be_seen_until_19_and_beside_its_name_in_20() {
    run(async |site: &Site, series| {
        let odoo = site.create("parts", series, Rules::default()).await.unwrap();
        let content = Content::numbered(1, 2);
        let mut writer = Actor::new("writer", odoo.ledger(), odoo.monitor(), |pause| attach(odoo.clone(), pause, content.clone()));
        writer.advance_to("write the rest").await.unwrap();
        let path = odoo.filestore().path(&content.store_fname());
        let beside = path.with_file_name(format!("{}.__new", content.sha1()));
        let half = &content.bytes()[..content.bytes().len() / 2];
        if series == Series::V20 {
            assert!(!path.exists());
            assert_eq!(fs::read(&beside).unwrap(), half);
        } else {
            assert_eq!(fs::read(&path).unwrap(), half);
        }
        assert!(!odoo.ledger().is_on_disk(&content.store_fname()));
        writer.finish().await.unwrap().unwrap();
        assert_eq!(fs::read(&path).unwrap(), content.bytes());
        assert!(odoo.ledger().is_on_disk(&content.store_fname()) && !beside.exists());
    });
}

async fn attach(odoo: Odoo, pause: Pause, content: Content) -> pgvault_core::Result<()> {
    let mut worker = Worker::connect(&odoo, &pause).await?;
    worker.begin().await?;
    worker.attach(&content).await?;
    worker.commit().await
}

#[test]
fn garbage_is_collected_and_what_rows_refer_to_is_kept() {
    run(async |site: &Site, series| {
        let odoo = site.create("garbage", series, Rules::default()).await.unwrap();
        let (kept, gone, aborted) = (Content::new(*b"kept"), Content::new(*b"gone"), Content::new(*b"aborted"));
        attached(&odoo, &kept).await;
        let row = attached(&odoo, &gone).await;
        deleted(&odoo, &row).await;
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach(&aborted).await.unwrap();
        worker.rollback().await.unwrap();
        after_the_grace(&odoo);
        assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 3, removed: 2 });
        let there = |content: &Content| odoo.filestore().path(&content.store_fname()).exists();
        assert!(there(&kept) && !there(&gone) && !there(&aborted));
        assert_eq!(odoo.filestore().marks().unwrap(), []);
        let lastcall = odoo.ask("select lastcall from ir_cron where id = 1").await.unwrap().unwrap();
        assert_eq!(lastcall, odoo.now().strftime("%Y-%m-%d %H:%M:%S").to_string());
    });
}

#[test]
fn what_is_not_on_the_checklist_is_never_collected() {
    run(async |site: &Site, series| {
        let odoo = site.create("unlisted", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"nobody refers to it and nobody marked it");
        odoo.filestore().plant(&content.store_fname(), &content).unwrap();
        after_the_grace(&odoo);
        assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 0, removed: 0 });
        assert!(odoo.ledger().is_on_disk(&content.store_fname()));
    });
}

#[test]
fn the_collection_waits_for_open_writers_until_19_and_gives_up() {
    run(async |site: &Site, series| {
        if series == Series::V20 {
            return;
        }
        let rules = Rules { lock_timeout: Duration::from_millis(200), ..Rules::default() };
        let odoo = site.create("lock", series, rules).await.unwrap();
        let content = Content::new(*b"open");
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach(&content).await.unwrap();
        assert_eq!(odoo.collect().await.unwrap(), Collection::GaveUp);
        assert!(odoo.filestore().mark_path(&content.store_fname()).exists());

        let odoo = Odoo::open(site.conninfo(), "lock", site.data_dir(), series, Rules::default()).await.unwrap();
        let mut collector = collector(&odoo);
        collector.advance_to("gc: lock").await.unwrap();
        assert!(matches!(collector.advance().await.unwrap(), Progress::Blocked));
        assert!(collector.is_still_blocked().await.unwrap());
        worker.commit().await.unwrap();
        assert!(!collector.is_still_blocked().await.unwrap());
        assert_eq!(collector.finish().await.unwrap().unwrap(), Collection::Done { checked: 1, removed: 0 });
    });
}

fn collector(odoo: &Odoo) -> Actor<'static, pgvault_core::Result<Collection>> {
    let it = odoo.clone();
    Actor::new("gc", odoo.ledger(), odoo.monitor(), |pause| async move { gc::collect(&it, &pause).await })
}

/// The race of PR 224833: the collection has its lock, the writer only a file so far.
#[test]
fn a_row_dangles_after_the_race_of_14_and_18_and_not_in_19() {
    run(async |site: &Site, series| {
        if series == Series::V20 {
            return;
        }
        let odoo = site.create("race", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"collected before its row was there");
        let mut collector = collector(&odoo);
        collector.advance_to("gc: list").await.unwrap();
        let mut writer = Actor::new("writer", odoo.ledger(), odoo.monitor(), |pause| attach(odoo.clone(), pause, content.clone()));
        writer.advance_to("insert").await.unwrap();
        assert!(matches!(writer.advance().await.unwrap(), Progress::Blocked));
        let collection = collector.finish().await.unwrap().unwrap();
        writer.finish().await.unwrap().unwrap();
        let row = odoo.ask("select store_fname from ir_attachment").await.unwrap().unwrap();
        assert_eq!(row, content.store_fname());
        let removed = usize::from(series.writes_before_row());
        assert_eq!(collection, Collection::Done { checked: removed, removed }, "{series:?}");
        assert_eq!(odoo.ledger().is_on_disk(&row), removed == 0, "{series:?}");
    });
}

/// The older form of it: the content was there already, unreferenced, when somebody referred to it anew.
#[test]
fn a_row_dangles_when_a_content_is_taken_up_again_between_the_look_and_the_unlink() {
    run(async |site: &Site, series| {
        let odoo = site.create("again", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"dropped, and taken up again");
        let row = attached(&odoo, &content).await;
        deleted(&odoo, &row).await;
        after_the_grace(&odoo);
        let mut writer = Actor::new("writer", odoo.ledger(), odoo.monitor(), |pause| attach(odoo.clone(), pause, content.clone()));
        let mut collector = collector(&odoo);
        if series == Series::V20 {
            // Looked up before the row is there; renamed after the writer saw the file, which it does not mark again.
            collector.advance_to("gc: rename the mark").await.unwrap();
            writer.finish().await.unwrap().unwrap();
        } else if series == Series::V19 {
            writer.advance_to("commit").await.unwrap();
        } else {
            writer.advance_to("insert").await.unwrap();
        }
        if series == Series::V19 {
            // The row is locked in, so the collection waits, and then sees it.
            collector.advance_to("gc: lock").await.unwrap();
            assert!(matches!(collector.advance().await.unwrap(), Progress::Blocked));
            writer.finish().await.unwrap().unwrap();
        }
        collector.finish().await.unwrap().unwrap();
        if !writer.has_ended() {
            writer.finish().await.unwrap().unwrap();
        }
        let name = odoo.ask("select store_fname from ir_attachment").await.unwrap().unwrap();
        assert_eq!(odoo.ledger().is_on_disk(&name), series == Series::V19, "{series:?}");
    });
}

/// What would close that race in 20.
#[test]
fn a_content_that_is_marked_when_it_is_taken_up_again_stays() {
    run(async |site: &Site, series| {
        if series != Series::V20 {
            return;
        }
        let odoo = site.create("marked", series, Rules { marks_existing: true, ..Rules::default() }).await.unwrap();
        let content = Content::new(*b"dropped, and taken up again");
        for stop in ["gc: rename the mark", "gc: look at its time", "gc: rename", "gc: look for a new mark"] {
            let row = attached(&odoo, &content).await;
            deleted(&odoo, &row).await;
            after_the_grace(&odoo);
            let mut collector = collector(&odoo);
            collector.advance_to(stop).await.unwrap();
            let row = attached(&odoo, &content).await;
            collector.finish().await.unwrap().unwrap();
            assert!(odoo.ledger().is_on_disk(&content.store_fname()), "{stop}");
            deleted(&odoo, &row).await;
        }
    });
}

#[test]
fn the_collection_of_20_takes_no_lock_and_keeps_what_is_younger_than_the_grace() {
    run(async |site: &Site, series| {
        if series != Series::V20 {
            return;
        }
        let odoo = site.create("grace", series, Rules::default()).await.unwrap();
        let (old, young) = (Content::new(*b"old"), Content::new(*b"young"));
        for (content, seconds) in [(&old, 1000), (&young, 801)] {
            let row = attached(&odoo, content).await;
            deleted(&odoo, &row).await;
            odoo.advance(SignedDuration::from_secs(seconds));
        }
        // A writer that is not done keeps nobody waiting.
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach(&Content::new(*b"open")).await.unwrap();
        assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 1, removed: 1 });
        assert!(!odoo.ledger().is_on_disk(&old.store_fname()) && odoo.ledger().is_on_disk(&young.store_fname()));
        assert!(odoo.filestore().mark_path(&young.store_fname()).exists());
        worker.commit().await.unwrap();

        // Marked anew while it is being collected: it stays.
        odoo.advance(SignedDuration::from_secs(1000));
        let mut collector = collector(&odoo);
        collector.advance_to("gc: look at its time").await.unwrap();
        odoo.filestore().mark(&young.store_fname(), odoo.now()).unwrap();
        collector.advance_to("gc: look for a new mark").await.unwrap();
        assert!(!odoo.ledger().is_on_disk(&young.store_fname()));
        collector.finish().await.unwrap().unwrap();
        assert!(odoo.ledger().is_on_disk(&young.store_fname()));
    });
}

#[test]
fn the_grace_follows_the_timeouts_of_the_database() {
    run(async |site: &Site, series| {
        if series != Series::V20 {
            return;
        }
        let odoo = site.create("timeouts", series, Rules::default()).await.unwrap();
        odoo.ask("alter database timeouts set idle_in_transaction_session_timeout = '1h'").await.unwrap();
        let row = attached(&odoo, &Content::new(*b"gone")).await;
        deleted(&odoo, &row).await;
        odoo.advance(SignedDuration::from_secs(7200));
        assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 0, removed: 0 });
        odoo.advance(SignedDuration::from_secs(1));
        assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 1, removed: 1 });
    });
}

#[test]
fn a_killed_worker_leaves_a_file_and_no_row() {
    run(async |site: &Site, series| {
        let odoo = site.create("killed", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"its writer did not live to see the commit");
        for (stop, whole) in [("write the rest", false), ("commit", true)] {
            let mut writer =
                Actor::new("writer", odoo.ledger(), odoo.monitor(), |pause| attach(odoo.clone(), pause, content.clone()));
            writer.advance_to(stop).await.unwrap();
            writer.kill().await.unwrap();
            assert_eq!(odoo.ask("select count(*) from ir_attachment").await.unwrap().unwrap(), "0");
            assert_eq!(odoo.ledger().is_on_disk(&content.store_fname()), whole);
            if !whole && series != Series::V20 {
                // The part is in the way of the same content from now on, and until 19 it is on no checklist.
                let mut worker = odoo.worker().await.unwrap();
                worker.begin().await.unwrap();
                assert_eq!(worker.attach(&content).await.unwrap_err().code(), "odoo.collision");
                worker.rollback().await.unwrap();
                assert_eq!(odoo.collect().await.unwrap(), Collection::Done { checked: 0, removed: 0 });
                odoo.filestore().damage(&content.store_fname(), Damage::Remove).unwrap();
            }
        }
        let locks = "select count(*) from pg_locks where relation = 'ir_attachment'::regclass";
        assert_eq!(odoo.ask(locks).await.unwrap().unwrap(), "0");
    });
}

#[test]
fn an_error_of_the_disk_is_swallowed_until_18() {
    run(async |site: &Site, series| {
        let odoo = site.create("full", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"more than the disk takes");
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.fail_disk_after(5);
        let attached = worker.attach(&content).await;
        if matches!(series, Series::V14 | Series::V18) {
            attached.unwrap();
            worker.commit().await.unwrap();
            assert_eq!(fs::read(odoo.filestore().path(&content.store_fname())).unwrap(), b"more ");
            assert_eq!(odoo.ask("select store_fname from ir_attachment").await.unwrap().unwrap(), content.store_fname());
        } else {
            assert_eq!(attached.unwrap_err().code(), "odoo.disk");
            worker.rollback().await.unwrap();
            assert_eq!(odoo.ask("select store_fname from ir_attachment").await.unwrap(), None);
        }
        assert!(!odoo.ledger().is_on_disk(&content.store_fname()));
    });
}

#[test]
fn only_14_takes_up_paths_of_three_digits() {
    run(async |site: &Site, series| {
        let odoo = site.create("retro", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"written by Odoo 7");
        odoo.filestore().plant(&content.retro_store_fname(), &content).unwrap();
        let row = attached(&odoo, &content).await;
        let expected = if series == Series::V14 { content.retro_store_fname() } else { content.store_fname() };
        assert_eq!(row.store_fname.unwrap(), expected);
    });
}

#[test]
fn only_since_18_is_there_an_index_on_the_names() {
    run(async |site: &Site, series| {
        let odoo = site.create("index", series, Rules::default()).await.unwrap();
        let indexes = "select count(*) from pg_indexes where tablename = 'ir_attachment' and indexdef like '%(store_fname)%'";
        let expected = if series == Series::V14 { "0" } else { "1" };
        assert_eq!(odoo.ask(indexes).await.unwrap().unwrap(), expected);
        let version = odoo.ask("select latest_version from ir_module_module where name = 'base'").await.unwrap().unwrap();
        assert_eq!(version, format!("{}.0.1.3", series.major()));
    });
}

#[test]
fn other_kinds_of_attachments_have_no_file() {
    run(async |site: &Site, series| {
        let odoo = site.create("kinds", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"elsewhere");
        let mut worker = odoo.worker().await.unwrap();
        worker.begin().await.unwrap();
        worker.attach_in_database(&content).await.unwrap();
        worker.attach_url("https://example.com/it's").await.unwrap();
        worker.attach_empty().await.unwrap();
        for place in ["s3://bucket", "azure://container", "code:/"] {
            let id = worker.attach_remote(place, &content).await.unwrap();
            worker.unlink(&Attachment { id, store_fname: Some(format!("{place}/x")) }).await.unwrap();
            worker.attach_remote(place, &content).await.unwrap();
        }
        worker.commit().await.unwrap();
        assert!(!odoo.filestore().root().exists());
        let kinds = column(
            &odoo,
            "select coalesce(split_part(store_fname, ':', 1), case when db_datas is null then type else 'db' end) \
             from ir_attachment order by 1",
        )
        .await;
        assert_eq!(kinds, ["azure", "binary", "code", "db", "s3", "url"]);
        let bytes = odoo.ask("select convert_from(db_datas, 'UTF8') from ir_attachment where db_datas is not null").await.unwrap();
        assert_eq!(bytes.unwrap(), "elsewhere");

        odoo.ask("update ir_config_parameter set value = 'db' where key = 'ir_attachment.location'").await.unwrap();
        let row = attached(&odoo, &content).await;
        assert_eq!(row.store_fname, None);
    });
}

#[test]
fn the_manager_keeps_the_identity_in_a_rename_and_renews_it_in_a_copy() {
    run(async |site: &Site, series| {
        const UUID: &str = "select value from ir_config_parameter where key = 'database.uuid'";
        let odoo = site.create("shop", series, Rules::default()).await.unwrap();
        let content = Content::new(*b"in the filestore of a database that moves");
        let name = content.store_fname();
        attached(&odoo, &content).await;
        let uuid = odoo.ask(UUID).await.unwrap().unwrap();
        let alone = Pause::alone("manager", odoo.ledger());

        let renamed = site.rename_database(&odoo, "moved", &alone).await.unwrap();
        assert_eq!(renamed.ask(UUID).await.unwrap().unwrap(), uuid);
        assert!(renamed.ledger().was_on_disk(&name, 0, 0) && !site.data_dir().join("filestore/shop").exists());

        let (renamed, copy) = site.duplicate_database(&renamed, "staging", true, &alone).await.unwrap();
        assert_ne!(copy.ask(UUID).await.unwrap().unwrap(), uuid);
        assert_eq!(renamed.ask(UUID).await.unwrap().unwrap(), uuid);
        assert!(copy.ledger().is_on_disk(&name) && renamed.ledger().is_on_disk(&name));
        let active = column(&copy, "select cron_name from ir_cron where active").await;
        assert_eq!(active, ["Base: Auto-vacuum internal data"]);
        let hosts = column(&copy, "select smtp_host from ir_mail_server where active").await;
        assert_eq!(hosts, ["invalid"]);

        site.drop_database(&copy, &alone).await.unwrap();
        assert!(!copy.filestore().root().exists() && !copy.ledger().is_on_disk(&name));
        assert!(renamed.ledger().is_on_disk(&name) && Path::new(renamed.filestore().root()).exists());
        let left = column(&renamed, "select datname from pg_database where datname in ('shop', 'moved', 'staging')").await;
        assert_eq!(left, ["moved"]);
    });
}

#[test]
fn the_truth_knows_each_moment_by_its_position() {
    run(async |site: &Site, series| {
        let odoo = site.create("truth", series, Rules::default()).await.unwrap();
        let before = attached(&odoo, &Content::new(*b"before the recording")).await;
        let recording = Recording::start(&odoo).await.unwrap();
        let (one, two) = (Content::new(*b"one"), Content::new(*b"two"));
        let now = async || odoo.ask("select pg_current_wal_flush_lsn()").await.unwrap().unwrap().parse().unwrap();
        let mut moments = vec![now().await];
        let mut states = vec![vec![before.store_fname.clone().unwrap()]];
        let row = attached(&odoo, &one).await;
        moments.push(now().await);
        states.push(vec![before.store_fname.clone().unwrap(), one.store_fname()]);
        // Two transactions at once: the one that began first commits last.
        let (mut late, mut early) = (odoo.worker().await.unwrap(), odoo.worker().await.unwrap());
        late.begin().await.unwrap();
        late.overwrite(&row, &two).await.unwrap();
        early.begin().await.unwrap();
        early.unlink(&before).await.unwrap();
        early.commit().await.unwrap();
        moments.push(now().await);
        states.push(vec![one.store_fname()]);
        late.commit().await.unwrap();
        moments.push(now().await);
        states.push(vec![two.store_fname()]);

        let truth = recording.finish().await.unwrap();
        assert_eq!(truth.commits().len(), 3);
        for (moment, mut state) in moments.iter().zip(states) {
            state.sort();
            assert_eq!(truth.referenced_at(*moment).into_iter().collect::<Vec<_>>(), state, "at {moment}");
        }
        let last = *moments.last().unwrap();
        let direct = rows(&mut odoo.connect().await.unwrap()).await.unwrap();
        assert_eq!((truth.rows_at(last), truth.referenced_at(last)), (direct.clone(), local_names(&direct)));
        assert_eq!(truth.referenced_until(last).len(), 3);
        assert_eq!(odoo.ask("select count(*) from pg_replication_slots").await.unwrap().unwrap(), "0");
    });
}
