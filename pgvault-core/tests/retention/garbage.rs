//! What is collected, and when it is not.

use std::sync::Arc;

use jiff::SignedDuration;
use pgvault_core::ErrorKind;
use pgvault_core::env::Env;
use pgvault_core::postgres::{Lsn, TimelineId};
use pgvault_core::testing::{Fault, FaultyStore};
use pgvault_core::vault::artifact::{self, NewArtifact};
use pgvault_core::vault::audit::{self, Event};
use pgvault_core::vault::gc::{Collected, GcOptions, collect};
use pgvault_core::vault::mark::{self, Mark};
use pgvault_core::vault::session::{Purpose, Reads, Session};
use pgvault_core::vault::{Cluster, layout, snapshot};
use ulid::Ulid;

use crate::place::{Place, SEGMENT, Sketch, Writing, backup, backups, names, read_all};
use crate::run;

async fn gc(cluster: &Cluster) -> Collected {
    collect(cluster, &GcOptions::default()).await.unwrap()
}

/// As expiry does it.
async fn drop_backup(cluster: &Cluster, id: Ulid) {
    let name = cluster.path(&layout::snapshot(id));
    let committed = Some(cluster.store().head(&name).await.unwrap().last_modified);
    audit::record(cluster, Event::BackupExpired { backup_id: id, committed }).await.unwrap();
    cluster.store().delete(&name).await.unwrap();
}

async fn packs(cluster: &Cluster) -> usize {
    names(cluster, layout::dir::PACK).await.len()
}

/// An interrupted backup with so many packs.
async fn interrupted(cluster: &Cluster, packs: u32) {
    let mut writing = Writing::begin(cluster).await.unwrap();
    for number in 0..packs {
        writing.store(cluster, number).await.unwrap();
    }
}

#[test]
fn orphans_go_in_a_later_run_and_not_before_the_grace() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let kept = backup(&cluster, Sketch::at(4)).await.unwrap();
        let needed = packs(&cluster).await;
        interrupted(&cluster, 3).await;
        place.pass(50);
        let first = gc(&cluster).await;
        assert_eq!((first.planned, first.swept.deleted, first.snapshots), (3, 0, 1), "{first:?}");
        for _ in 0..3 {
            place.pass(23);
            let early = gc(&cluster).await;
            assert_eq!((early.planned, early.waiting, early.swept.deleted), (0, 3, 0), "{early:?}");
        }
        place.pass(3);
        let dry = collect(&cluster, &GcOptions { dry_run: true, ..GcOptions::default() }).await.unwrap();
        assert_eq!((dry.swept.deleted, packs(&cluster).await), (3, needed + 3));
        let last = gc(&cluster).await;
        assert_eq!((last.swept.deleted, packs(&cluster).await), (3, needed), "{last:?}");
        assert!(names(&cluster, layout::dir::GC).await.is_empty(), "the plan is done");
        let _ = read_all(&cluster, kept).await.unwrap();
        // A week later nothing is left but the backup.
        place.pass(200);
        let _ = gc(&cluster).await;
        assert_eq!(names(&cluster, layout::dir::SESSION).await.len(), 1, "only this run's own");
    });
}

#[test]
fn a_grace_that_is_too_short_is_refused() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let short = GcOptions { grace: SignedDuration::from_hours(71), dry_run: true };
        let error = collect(&cluster, &short).await.unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "gc.grace"));
    });
}

/// R9, H9: packs that a backup under way has taken from a backup that expires meanwhile stay.
#[test]
fn r9_h9_a_backup_under_way_keeps_the_packs_that_it_refers_to() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let parent = backup(&cluster, Sketch { packs: 4, ..Sketch::at(4) }).await.unwrap();
        place.pass(100);
        let mut writing = Writing::begin(&cluster).await.unwrap();
        place.pass(1);
        drop_backup(&cluster, parent).await;
        for _ in 0..4 {
            let _ = gc(&cluster).await;
            place.pass(11);
        }
        writing.store(&cluster, 0).await.unwrap();
        let id = writing.commit(&cluster, &Sketch::at(8)).await.unwrap().id;
        place.pass(40);
        let swept = gc(&cluster).await;
        let _ = read_all(&cluster, id).await.unwrap();
        // What only the parent had is gone or going: its first pack, which is not taken over.
        place.pass(80);
        let _ = (gc(&cluster).await, swept);
        assert_eq!(names(&cluster, layout::dir::PACK).await, read_all(&cluster, id).await.unwrap());
    });
}

/// R9, H9: a pack that was planned, was referred to by a backup that came and went, and that a third one refers to now. The plan
/// is old enough, nobody was there before it, and no snapshot has it.
#[test]
fn r9_h9_a_pack_that_was_needed_in_between_is_not_swept_from_under_a_writer() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let _ = backup(&cluster, Sketch::at(2)).await.unwrap();
        let mut first = Writing::begin(&cluster).await.unwrap();
        for number in 0..3 {
            first.store(&cluster, number).await.unwrap();
        }
        assert_eq!(gc(&cluster).await.planned, 3);
        place.pass(47);
        let first = first.commit(&cluster, &Sketch::at(4)).await.unwrap().id;
        place.pass(15);
        let second = Writing::begin(&cluster).await.unwrap();
        drop_backup(&cluster, first).await;
        place.pass(11);
        let swept = gc(&cluster).await;
        assert_eq!((swept.swept.deleted, swept.postponed.len()), (0, 1), "{swept:?}");
        let second = second.commit(&cluster, &Sketch::at(6)).await.unwrap().id;
        let _ = read_all(&cluster, second).await.unwrap();
        let _ = gc(&cluster).await;
        let _ = read_all(&cluster, second).await.unwrap();
    });
}

/// H9: what an interrupted backup left is there for one that goes on with it, up to its last moment.
#[test]
fn h9_a_backup_that_goes_on_with_another_keeps_its_packs() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        interrupted(&cluster, 3).await;
        let _ = gc(&cluster).await;
        place.pass(23);
        let writing = Writing::begin(&cluster).await.unwrap();
        place.pass(47);
        let _ = gc(&cluster).await;
        let id = writing.commit(&cluster, &Sketch::at(3)).await.unwrap().id;
        place.pass(3);
        let _ = gc(&cluster).await;
        assert!(read_all(&cluster, id).await.unwrap().len() >= 3);
    });
}

/// H12: there is no lease to lose. A writer that stalls for longer than a session lasts commits nothing.
#[test]
fn h12_a_stalled_writer_does_not_commit_when_its_packs_may_be_gone() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let mut writing = Writing::begin(&cluster).await.unwrap();
        writing.store(&cluster, 0).await.unwrap();
        let _ = gc(&cluster).await;
        place.pass(48);
        let error = writing.commit(&cluster, &Sketch::at(3)).await.unwrap_err();
        assert_eq!(error.code(), "session.expired");
        place.pass(30);
        let _ = gc(&cluster).await;
        place.pass(73);
        let _ = gc(&cluster).await;
        assert_eq!((packs(&cluster).await, backups(&cluster).await.len()), (0, 0));
    });
}

/// R8: a restore that announced itself before its backup expired reads to its end.
#[test]
fn r8_a_restore_keeps_the_packs_of_a_backup_that_expired_meanwhile() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let id = backup(&cluster, Sketch::at(3)).await.unwrap();
        place.pass(60);
        let opened = snapshot::open(&cluster, id, None).await.unwrap();
        let _ = Session::read(&cluster, Purpose::Restore, Reads::of(&opened.manifest)).await.unwrap();
        // By somebody who did not look.
        drop_backup(&cluster, id).await;
        assert_eq!(gc(&cluster).await.planned, 3);
        place.pass(75);
        let swept = gc(&cluster).await;
        assert_eq!((swept.swept.deleted, swept.waiting), (0, 3), "{swept:?}");
        place.pass(30);
        assert_eq!(gc(&cluster).await.swept.deleted, 3);
    });
}

/// A snapshot that cannot be read may refer to anything.
#[test]
fn an_unreadable_snapshot_stops_the_collection() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let id = backup(&cluster, Sketch::at(4)).await.unwrap();
        interrupted(&cluster, 1).await;
        let _ = gc(&cluster).await;
        place.pass(100);
        let name = cluster.path(&layout::snapshot(id));
        let good = cluster.store().get(&name).await.unwrap();
        for (at, kind) in [(150, ErrorKind::Corrupt), (4, ErrorKind::Unsupported)] {
            let mut bytes = good.to_vec();
            bytes[at] ^= 2;
            cluster.store().overwrite(&name, bytes.into()).await.unwrap();
            let error = collect(&cluster, &GcOptions::default()).await.unwrap_err();
            assert_eq!((error.kind(), error.code()), (kind, "gc.unreadable"));
            assert!(error.to_string().contains(&id.to_string()) && error.hint().is_some());
        }
        cluster.store().overwrite(&name, good).await.unwrap();
        assert_eq!(gc(&cluster).await.swept.deleted, 1);
    });
}

/// H17: what is not named like a pack is not touched.
#[test]
fn h17_what_has_no_name_of_a_pack_is_left_alone() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let id = Ulid(7);
        for name in
            [format!("pack/00/{id}.tmp.pack"), format!("pack/00/{id}.pack.tmp.x"), "pack/00/x".into(), format!("pack/zz/{id}.pack")]
        {
            cluster.store().put_once(&cluster.path(&name), bytes::Bytes::from_static(b"x")).await.unwrap();
        }
        for _ in 0..3 {
            let _ = gc(&cluster).await;
            place.pass(100);
        }
        assert_eq!(cluster.store().list(&cluster.path(layout::dir::PACK)).await.unwrap().len(), 4);
    });
}

/// At whichever request it dies or is refused, nothing that is needed is gone, and other runs finish.
#[test]
fn a_collection_that_is_interrupted_anywhere_goes_on() {
    run(async {
        for fault in [Fault::Fail, Fault::Throttle, Fault::Lie, Fault::Tear] {
            for (at, onwards) in (1..).step_by(13).flat_map(|at| [(at, true), (at, false)]) {
                let place = Place::new().await;
                let cluster = place.cluster().await;
                let id = backup(&cluster, Sketch::at(4)).await.unwrap();
                interrupted(&cluster, 5).await;
                place.pass(60);
                let _ = gc(&cluster).await;
                place.pass(80);
                let faulty = Arc::new(FaultyStore::new(place.store.clone()));
                let broken = place.over(faulty.clone(), Env::default()).await.unwrap();
                faulty.inject(fault, at, onwards);
                let _ = collect(&broken, &GcOptions::default()).await;
                let reached = faulty.calls().len() >= at;
                let needed = read_all(&cluster, id).await.unwrap();
                for _ in 0..3 {
                    assert!(!gc(&cluster).await.is_incomplete());
                    place.pass(80);
                }
                assert_eq!(names(&cluster, layout::dir::PACK).await, needed, "{fault:?} at {at}");
                if !reached {
                    break;
                }
            }
        }
    });
}

async fn put(cluster: &Cluster, content: &str) {
    let known = artifact::list(cluster).await.unwrap();
    let file = NewArtifact { name: "odoo.conf".into(), mode: 0o600, content: content.into() };
    assert!(matches!(artifact::put(cluster, &known, &file, false).await.unwrap(), artifact::Stored::New(_)));
}

async fn set_mark(cluster: &Cluster, segment: u64) {
    let mark = Mark {
        id: cluster.env().new_id().unwrap(),
        name: format!("in {segment}"),
        timeline: TimelineId(1),
        lsn: Lsn(segment * SEGMENT + 0x2000),
        time: cluster.env().now(),
        labels: std::collections::BTreeMap::new(),
        odoo: Vec::new(),
        by: "me@here".into(),
        version: "0".into(),
    };
    mark::store(cluster, &mark).await.unwrap();
}

/// What is left: the contents of the artifact, and the names of marks.
async fn left(cluster: &Cluster) -> (Vec<String>, Vec<String>) {
    let (mut contents, known) = (Vec::new(), artifact::list(cluster).await.unwrap());
    for version in &known.versions {
        contents.push(String::from_utf8(artifact::read(cluster, version).await.unwrap()).unwrap());
    }
    let marks = mark::list(cluster).await.unwrap().marks;
    (contents, marks.into_iter().map(|mark| mark.name).collect())
}

#[test]
fn marks_and_versions_go_when_no_restore_leads_to_them_and_the_newest_version_stays() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        put(&cluster, "first").await;
        place.pass(1);
        put(&cluster, "second").await;
        set_mark(&cluster, 2).await;
        place.pass(400);
        let (contents, marks) = (["first", "second"].map(String::from).to_vec(), vec!["in 2".to_owned()]);
        let _ = gc(&cluster).await;
        assert_eq!(left(&cluster).await, (contents.clone(), marks.clone()), "without a backup nobody knows what can be restored");

        let oldest = backup(&cluster, Sketch::at(4)).await.unwrap();
        place.pass(1);
        put(&cluster, "third").await;
        set_mark(&cluster, 5).await;
        let dry = collect(&cluster, &GcOptions { dry_run: true, ..GcOptions::default() }).await.unwrap();
        assert_eq!((dry.tidied.deleted, left(&cluster).await.0.len()), (2, 3), "{dry:?}");
        let report = gc(&cluster).await;
        assert_eq!(report.tidied.deleted, 2, "{report:?}");
        // The second was there when the backup ended.
        let expected = (["second", "third"].map(String::from).to_vec(), vec!["in 5".to_owned()]);
        assert_eq!(left(&cluster).await, expected);
        place.pass(400);
        let _ = gc(&cluster).await;
        assert_eq!(left(&cluster).await, expected, "the oldest backup leads to all of them, however old they are");

        let _ = backup(&cluster, Sketch::at(9)).await.unwrap();
        drop_backup(&cluster, oldest).await;
        place.pass(400);
        let _ = gc(&cluster).await;
        assert_eq!(left(&cluster).await, (vec!["third".to_owned()], Vec::new()), "the newest version stays for ever");
    });
}
