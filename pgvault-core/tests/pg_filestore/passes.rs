//! What passes store, notice and refuse.

use std::sync::Arc;

use odoosim::{Collection, Content, Odoo, Pause, Rules, Series, Site};
use pgvault_core::ErrorKind;
use pgvault_core::clock::Clock as _;
use pgvault_core::filestore::capture::{Capture, Depth, TRIES};
use pgvault_core::filestore::dropped;
use pgvault_core::filestore::fetch::{Why, get};
use pgvault_core::filestore::guard::Guard;
use pgvault_core::filestore::pass::{PassKind, instances, load};
use pgvault_core::format::file_run::State;
use pgvault_core::inspect::{CheckOptions, Severity};
use pgvault_core::postgres::ConnInfo;
use pgvault_core::progress::Silent;
use pgvault_core::vault::gc::{GcOptions, collect};

use crate::place::{capture, cluster, files, known, options, restore, runtime, timed_cluster, try_restore};

/// Attaches contents, each in a transaction of its own.
async fn attach(odoo: &Odoo, contents: &[Content]) {
    let mut worker = odoo.worker().await.unwrap();
    for content in contents {
        worker.begin().await.unwrap();
        let _ = worker.attach(content).await.unwrap();
        worker.commit().await.unwrap();
    }
}

fn contents(range: std::ops::Range<u32>) -> Vec<Content> {
    range.map(|n| Content::new(format!("document {n} ").repeat(n as usize % 700 + 1))).collect()
}

async fn unlink_all(odoo: &Odoo) {
    let mut worker = odoo.worker().await.unwrap();
    worker.begin().await.unwrap();
    while let Some(attachment) = worker.nth(0).await.unwrap() {
        worker.unlink(&attachment).await.unwrap();
    }
    worker.commit().await.unwrap();
}

fn on<T>(series: Series, test: impl AsyncFnOnce(&Site, Odoo) -> T) -> T {
    let site = Site::start().unwrap();
    runtime().block_on(async {
        let odoo = site.create("shop", series, Rules::default()).await.unwrap();
        test(&site, odoo).await
    })
}

#[test]
fn what_was_captured_comes_back_as_it_was() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        let large =
            Content::new((0..9_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect::<Vec<_>>());
        attach(&odoo, &contents(0..600)).await;
        attach(&odoo, &[large]).await;
        let mut capture = capture(&cluster, &odoo).await;
        let first = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        assert_eq!((first.kind, first.new_files, first.counts.present), (PassKind::Full, 601, 601));
        assert!(first.watermark().is_some());
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("filestore");
        let fetched = restore(&cluster, &odoo, &target, false).await.unwrap();
        assert_eq!((fetched.files, fetched.unknown, fetched.kept), (601, 0, 0));
        let source = odoo.data_dir().join("filestore/shop");
        assert_eq!(files(&target), files(&source));
        assert!(target.join("checklist").is_dir());
        // Again: nothing is written into a directory that has something in it, unless that is asked for.
        let refused = restore(&cluster, &odoo, &target, false).await.unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (ErrorKind::Usage, "filestore.not_empty"));
        // What is not right is replaced, what does not belong there is removed.
        let some = files(&target).into_keys().next().unwrap();
        std::fs::write(target.join(&some), "other").unwrap();
        std::fs::write(target.join("00/stray"), "stray").unwrap_or_default();
        std::fs::create_dir_all(target.join("x")).unwrap();
        std::fs::write(target.join("x/stray"), "stray").unwrap();
        let again = restore(&cluster, &odoo, &target, true).await.unwrap();
        assert_eq!((again.files, again.kept), (601, 600));
        assert!(again.removed >= 1);
        assert_eq!(files(&target), files(&source));
    });
}

#[test]
fn a_pass_with_nothing_new_is_one_small_object_or_none() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        attach(&odoo, &contents(0..40)).await;
        let mut capture = capture(&cluster, &odoo).await;
        assert_eq!(capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap().kind, PassKind::Full);
        let before = cluster.store().list("").await.unwrap();
        // Something happens in the database, and no file is written.
        let _ = odoo.ask("create table nothing()").await.unwrap();
        let idle = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        assert_eq!((idle.kind, idle.new_files, idle.stored_bytes), (PassKind::Checklist, 0, 0));
        let after = cluster.store().list("").await.unwrap();
        let new: Vec<_> = after.iter().filter(|object| !before.iter().any(|old| old.name == object.name)).collect();
        assert_eq!(new.len(), 1, "{new:?}");
        assert!(new[0].size < 64 << 10, "{new:?}");
        // New files alone are looked at, and found.
        attach(&odoo, &contents(40..45)).await;
        let more = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        assert_eq!((more.kind, more.new_files, more.counts.present), (PassKind::Checklist, 5, 45));
        assert!(more.watermark().unwrap().1.lsn > idle.watermark().unwrap().1.lsn);
    });
}

/// A1: created, captured, deleted and collected; it is there for every moment at which a row referred to it.
#[test]
fn a1_what_was_deleted_and_collected_comes_back() {
    for series in Series::ALL {
        on(series, async |_, odoo| {
            let cluster = cluster(&odoo).await;
            attach(&odoo, &contents(0..9)).await;
            let content = Content::new(*b"an invoice");
            attach(&odoo, std::slice::from_ref(&content)).await;
            let mut capture = capture(&cluster, &odoo).await;
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            let mut worker = odoo.worker().await.unwrap();
            worker.begin().await.unwrap();
            let attachment = worker.nth(9).await.unwrap().unwrap();
            assert_eq!(attachment.store_fname, Some(content.store_fname()));
            worker.unlink(&attachment).await.unwrap();
            worker.commit().await.unwrap();
            odoo.advance(jiff::SignedDuration::from_hours(2));
            let _ = odoo.collect().await.unwrap();
            assert!(!odoo.ledger().is_on_disk(&content.store_fname()), "{series:?}");
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            let full = capture.pass(Depth::Full).await.unwrap().pass.unwrap();
            assert_eq!((full.counts.present, full.counts.gone), (9, 1), "{series:?}");
            let mut bytes = Vec::new();
            let mut known = known(&cluster).await;
            let _ = get(&mut known.catalog, &content.store_fname(), &mut bytes).await.unwrap();
            assert_eq!(bytes, b"an invoice");
            let entry = known.catalog.entry(&content.store_fname()).await.unwrap().unwrap();
            assert!(matches!(entry.state, State::Gone(..)), "{entry:?}");
        });
    }
}

/// The collector empties the checklist: the pass after it looks at everything.
#[test]
fn the_pass_after_the_collector_looks_at_everything() {
    for series in [Series::V14, Series::V18, Series::V19] {
        on(series, async |_, odoo| {
            let cluster = cluster(&odoo).await;
            attach(&odoo, &contents(0..3)).await;
            let mut capture = capture(&cluster, &odoo).await;
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            // New, and off the checklist before it was seen there.
            attach(&odoo, &contents(3..6)).await;
            let _ = odoo.collect().await.unwrap();
            assert_eq!(odoo.filestore().marks().unwrap().len(), 0);
            let pass = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
            assert_eq!((pass.kind, pass.new_files, pass.counts.present), (PassKind::Full, 3, 6), "{series:?}");
            // Another program finds the tripwire that the last one has set, and knows as much.
            drop(capture);
            attach(&odoo, &contents(6..8)).await;
            let pass = crate::place::capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
            assert_eq!((pass.kind, pass.new_files), (PassKind::Checklist, 2), "{series:?}");
            // A pass that was interrupted has set another: the collector may have run before that.
            attach(&odoo, &contents(8..9)).await;
            let _ = odoo.collect().await.unwrap();
            let marks = odoo.data_dir().join("filestore/shop/checklist");
            let folder = std::fs::read_dir(&marks).unwrap().next().unwrap().unwrap().path();
            std::fs::write(folder.join(format!("pgvault-tripwire-{}", ulid::Ulid(7))), "").unwrap();
            let pass = crate::place::capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
            assert_eq!((pass.kind, pass.new_files, pass.counts.present), (PassKind::Full, 1, 9), "{series:?}");
        });
    }
}

/// A3: a file whose content is not what its name says is never stored as good, and what the vault has of it stays.
#[test]
fn a3_a_truncated_file_is_source_damage_and_the_good_content_stays() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        let (known_good, never_good) = (Content::new(*b"stored while it was good"), Content::new(*b"bad from the beginning"));
        attach(&odoo, &contents(0..3)).await;
        attach(&odoo, std::slice::from_ref(&known_good)).await;
        let mut capture = capture(&cluster, &odoo).await;
        let _ = capture.pass(Depth::AsNeeded).await.unwrap();
        attach(&odoo, std::slice::from_ref(&never_good)).await;
        for name in [known_good.store_fname(), never_good.store_fname()] {
            odoo.filestore().damage(&name, odoosim::Damage::Truncate).unwrap();
        }
        let mut warnings = Vec::new();
        for n in 1..=TRIES {
            let captured = capture.pass(Depth::Full).await.unwrap();
            warnings.extend(captured.warnings);
            let counts = captured.pass.unwrap().counts;
            assert_eq!((counts.lost, counts.present), (1, 3), "pass {n}");
        }
        assert!(warnings.iter().any(|warning| warning.contains(&known_good.store_fname())), "{warnings:?}");
        assert!(warnings.iter().any(|warning| warning.contains(&never_good.store_fname())), "{warnings:?}");
        let counts = capture.pass(Depth::Full).await.unwrap().pass.unwrap().counts;
        assert_eq!((counts.lost, counts.damaged, counts.present), (1, 1, 3));
        let mut catalog = known(&cluster).await.catalog;
        let mut bytes = Vec::new();
        let _ = get(&mut catalog, &known_good.store_fname(), &mut bytes).await.unwrap();
        assert_eq!(bytes, known_good.bytes());
        let state = catalog.entry(&never_good.store_fname()).await.unwrap().unwrap().state;
        assert!(matches!(state, State::Damaged(_)), "{state:?}");
        let folder = tempfile::tempdir().unwrap();
        let fetched = restore(&cluster, &odoo, &folder.path().join("f"), false).await.unwrap();
        assert_eq!((fetched.files, fetched.unknown, fetched.bad_at_source), (4, 0, 1));
        assert!(matches!(fetched.missing[0].why, Why::DamagedAtSource { .. }), "{:?}", fetched.missing);
    });
}

/// A9: an empty directory where files were is a volume that is not mounted.
#[test]
fn a9_an_unmounted_filestore_is_never_recorded_as_no_files() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        attach(&odoo, &contents(0..30)).await;
        let folder = odoo.data_dir().join("filestore/shop");
        let aside = odoo.data_dir().join("aside");
        // From the beginning: rows refer to files, and there are none.
        std::fs::rename(&folder, &aside).unwrap();
        let missing = capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap_err();
        assert_eq!((missing.kind(), missing.code()), (ErrorKind::Source, "filestore.none"));
        std::fs::create_dir(&folder).unwrap();
        let empty = capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap_err();
        assert_eq!((empty.kind(), empty.code()), (ErrorKind::Source, "filestore.empty"));
        assert_eq!(instances(&cluster).await.unwrap().len(), 0);
        std::fs::remove_dir(&folder).unwrap();
        std::fs::rename(&aside, &folder).unwrap();
        let mut capture = capture(&cluster, &odoo).await;
        let good = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        // Later: what was known is gone.
        std::fs::rename(&folder, &aside).unwrap();
        std::fs::create_dir(&folder).unwrap();
        for depth in [Depth::AsNeeded, Depth::Full] {
            let error = capture.pass(depth).await.unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Source, "filestore.empty"), "{error:?}");
        }
        let after = known(&cluster).await;
        assert_eq!((after.pass.id, after.pass.counts.present), (good.id, 30));
    });
}

/// A10: rows without files are counted and reported, and nothing fails because of them; a new loss is told apart.
#[test]
fn a10_rows_that_dangle_are_counted_and_a_new_loss_is_told() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        let all = contents(0..200);
        attach(&odoo, &all).await;
        for content in &all[..2] {
            odoo.filestore().damage(&content.store_fname(), odoosim::Damage::Remove).unwrap();
        }
        let mut capture = capture(&cluster, &odoo).await;
        let pass = capture.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        assert_eq!((pass.counts.present, pass.counts.missing, pass.counts.lost), (198, 2, 0));
        odoo.filestore().damage(&all[7].store_fname(), odoosim::Damage::Remove).unwrap();
        let captured = capture.pass(Depth::Full).await.unwrap();
        let counts = captured.pass.unwrap().counts;
        assert_eq!((counts.present, counts.missing, counts.lost), (197, 2, 1));
        assert!(captured.warnings.iter().any(|warning| warning.contains(&all[7].store_fname())), "{:?}", captured.warnings);
        let folder = tempfile::tempdir().unwrap();
        let fetched = restore(&cluster, &odoo, &folder.path().join("f"), false).await.unwrap();
        assert_eq!((fetched.files, fetched.unknown, fetched.bad_at_source), (198, 0, 2));
        // The one that was lost comes out of the vault.
        assert_eq!(files(&folder.path().join("f")).get(&all[7].store_fname()).map(Vec::as_slice), Some(all[7].bytes()));
        // When no row refers to them any more, they are forgotten.
        unlink_all(&odoo).await;
        let counts = capture.pass(Depth::Full).await.unwrap().pass.unwrap().counts;
        assert_eq!((counts.missing, counts.lost), (0, 0));
    });
}

/// Damage of what is stored is found by the check, and never handed out as a document.
#[test]
fn t30_damage_of_stored_documents_is_found_and_refused() {
    on(Series::V18, async |_, odoo| {
        let cluster = cluster(&odoo).await;
        let all = contents(0..400);
        attach(&odoo, &all).await;
        let _ = capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap();
        let check = async || {
            let options = CheckOptions { sizes_only: false, progress: Arc::new(Silent) };
            let report = pgvault_core::inspect::check(&cluster, &options).await.unwrap();
            report
                .findings
                .iter()
                .filter(|finding| finding.severity == Severity::Error)
                .map(|f| f.problem.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(check().await, Vec::<String>::new());
        let store = cluster.store().clone();
        let objects = store.list(&cluster.path("files/")).await.unwrap();
        assert!(objects.iter().any(|object| object.name.contains("files/pass/")), "{objects:?}");
        for object in &objects {
            let good = store.get(&object.name).await.unwrap();
            for at in [good.len() / 3, good.len() * 2 / 3] {
                let mut bad = good.to_vec();
                bad[at] ^= 4;
                store.delete(&object.name).await.unwrap();
                let _ = store.put_new(&object.name, bad.into()).await.unwrap();
                assert!(!check().await.is_empty(), "a flipped bit of {} at {at}", object.name);
                let folder = tempfile::tempdir().unwrap();
                if let Ok(fetched) = try_restore(&cluster, &odoo, &folder.path().join("f")).await {
                    // The bit was in a tail's hash, which a reader with the key leaves to the check.
                    assert_eq!((fetched.files, fetched.unknown), (400, 0), "{}", object.name);
                    assert_eq!(files(&folder.path().join("f")), files(&odoo.data_dir().join("filestore/shop")));
                }
            }
            store.delete(&object.name).await.unwrap();
            // Without its only pass a filestore is one that never was; that is what locks are for.
            if !object.name.contains("files/pass/") {
                assert!(check().await.iter().any(|problem| problem.contains("is missing")), "{}", object.name);
                let folder = tempfile::tempdir().unwrap();
                assert!(try_restore(&cluster, &odoo, &folder.path().join("f")).await.is_err(), "{}", object.name);
            }
            let _ = store.put_new(&object.name, good).await.unwrap();
        }
        assert_eq!(check().await, Vec::<String>::new());
    });
}

/// What is collected was needed by nobody, and a filestore of years is found by reading one pass.
#[test]
fn garbage_of_filestores_is_collected_and_nothing_else() {
    on(Series::V18, async |_, odoo| {
        let (clock, cluster) = timed_cluster(&odoo).await;
        let hours = |n: i64| clock.set(clock.now() + jiff::SignedDuration::from_hours(n));
        let first = contents(0..300);
        attach(&odoo, &first).await;
        for round in 0..6 {
            let mut capture = capture(&cluster, &odoo).await;
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            attach(&odoo, &contents(300 + round * 300..600 + round * 300)).await;
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            hours(1);
        }
        let folder = instances(&cluster).await.unwrap().remove(0);
        let passes = async || cluster.store().list(&cluster.path(&format!("files/pass/{folder}/"))).await.unwrap().len();
        let packs = async || cluster.store().list(&cluster.path("files/pack/")).await.unwrap().len();
        let (before, packs_before) = (passes().await, packs().await);
        assert!(before >= 7, "{before}");
        // Runs that were merged away are garbage; documents are none.
        for _ in 0..3 {
            hours(80);
            let collected = collect(&cluster, &GcOptions::default()).await.unwrap();
            assert_eq!(collected.swept.failed + collected.tidied.failed, 0);
        }
        assert_eq!(passes().await, 1);
        assert!(packs().await < packs_before, "{} of {packs_before}", packs().await);
        let target = tempfile::tempdir().unwrap();
        let fetched = restore(&cluster, &odoo, &target.path().join("f"), false).await.unwrap();
        assert_eq!((fetched.files, fetched.unknown), (2100, 0));
        assert_eq!(files(&target.path().join("f")), files(&odoo.data_dir().join("filestore/shop")));
    });
}

/// A8: the collector waits until its victims are safe, and then collects; who holds it up too long is passed over.
#[test]
fn a8_the_collector_waits_for_the_guard_and_not_for_ever() {
    for series in [Series::V14, Series::V18, Series::V19] {
        on(series, async |_, odoo| {
            let cluster = cluster(&odoo).await;
            attach(&odoo, &contents(0..5)).await;
            let mut capture = capture(&cluster, &odoo).await;
            let _ = capture.pass(Depth::AsNeeded).await.unwrap();
            let mut guard = Guard::arm(&odoo.conninfo().unwrap(), odoo.name()).await.unwrap();
            // Rows are written as before: born and given up between two passes.
            let short = Content::new(*b"came and went");
            attach(&odoo, std::slice::from_ref(&short)).await;
            let mut worker = odoo.worker().await.unwrap();
            worker.begin().await.unwrap();
            let attachment = worker.nth(5).await.unwrap().unwrap();
            worker.unlink(&attachment).await.unwrap();
            worker.commit().await.unwrap();
            assert!(!guard.wanted_within(std::time::Duration::from_millis(200)).await);
            let collector = tokio::spawn({
                let odoo = odoo.clone();
                async move { odoo.collect().await }
            });
            assert!(guard.wanted_within(std::time::Duration::from_secs(60)).await);
            assert!(odoo.ledger().is_on_disk(&short.store_fname()));
            assert!(capture.before_collection(guard).await.unwrap(), "{series:?}");
            assert!(matches!(collector.await.unwrap().unwrap(), Collection::Done { removed: 1, .. }), "{series:?}");
            assert!(!odoo.ledger().is_on_disk(&short.store_fname()));
            let mut bytes = Vec::new();
            let _ = get(&mut known(&cluster).await.catalog, &short.store_fname(), &mut bytes).await.unwrap();
            assert_eq!(bytes, short.bytes());
            // Nobody gives this one back: the collector, whose patience is 10 s, comes to its end all the same, and so do writers behind it.
            let mut stuck = Guard::arm(&odoo.conninfo().unwrap(), odoo.name()).await.unwrap();
            let collector = tokio::spawn({
                let odoo = odoo.clone();
                async move { odoo.collect().await }
            });
            assert!(stuck.wanted_within(std::time::Duration::from_secs(60)).await);
            attach(&odoo, &contents(5..6)).await;
            assert!(matches!(collector.await.unwrap().unwrap(), Collection::Done { .. }), "{series:?}");
            assert!(!stuck.holds());
            assert!(!stuck.give_back().await);
        });
    }
}

/// A5: renamed, a database goes on with its history; duplicated, it begins one of its own; dropped, it is noted, and what a backup needs stays.
#[test]
fn a5_histories_follow_databases_and_not_their_names() {
    on(Series::V18, async |site, odoo| {
        let cluster = cluster(&odoo).await;
        attach(&odoo, &contents(0..20)).await;
        let _ = capture(&cluster, &odoo).await.pass(Depth::AsNeeded).await.unwrap();
        let pause = Pause::alone("manager", odoo.ledger());
        let odoo = site.rename_database(&odoo, "store", &pause).await.unwrap();
        attach(&odoo, &contents(20..25)).await;
        let pass = capture(&cluster, &odoo).await.pass(Depth::Full).await.unwrap().pass.unwrap();
        assert_eq!((pass.database.name.as_str(), pass.new_files, pass.counts.present), ("store", 5, 25));
        assert_eq!(instances(&cluster).await.unwrap().len(), 1);
        let (odoo, copy) = site.duplicate_database(&odoo, "copy", false, &pause).await.unwrap();
        let secret = Content::new(*b"of the copy alone");
        attach(&copy, std::slice::from_ref(&secret)).await;
        let pass = capture(&cluster, &copy).await.pass(Depth::AsNeeded).await.unwrap().pass.unwrap();
        assert_eq!((pass.kind, pass.new_files), (PassKind::Full, 26), "nothing is taken from the other's");
        let folders = instances(&cluster).await.unwrap();
        assert_eq!(folders.len(), 2);
        let mut have = Vec::new();
        for folder in &folders {
            let mut known = load(&cluster, folder).await.unwrap().unwrap();
            have.push((known.pass.database.name.clone(), known.catalog.entry(&secret.store_fname()).await.unwrap().is_some()));
        }
        have.sort();
        assert_eq!(have, [("copy".into(), true), ("store".into(), false)]);
        // A neutralised copy is not captured beside production.
        let _ = copy.ask("insert into ir_config_parameter(key, value) values ('database.is_neutralized', 'true')").await.unwrap();
        let refused = Capture::open(&cluster, options(&copy)).await.unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (ErrorKind::Conflict, "filestore.copy"));
        let maintenance = ConnInfo { dbname: Some("postgres".into()), ..odoo.conninfo().unwrap() };
        assert!(dropped::note(&cluster, &maintenance).await.unwrap().is_empty());
        site.drop_database(&copy, &pause).await.unwrap();
        let gone = dropped::note(&cluster, &maintenance).await.unwrap();
        assert_eq!(gone.iter().map(|database| database.name.as_str()).collect::<Vec<_>>(), ["copy"]);
        assert!(dropped::note(&cluster, &maintenance).await.unwrap().is_empty(), "it is noted once");
        for folder in &folders {
            let mut known = load(&cluster, folder).await.unwrap().unwrap();
            assert_eq!(known.pass.kind == PassKind::Dropped, known.pass.database.name == "copy");
            assert_eq!(known.catalog.entry(&secret.store_fname()).await.unwrap().is_some(), known.pass.database.name == "copy");
        }
    });
}
