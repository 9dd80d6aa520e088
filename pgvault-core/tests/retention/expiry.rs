//! What expires, and what survives it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use pgvault_core::ErrorKind;
use pgvault_core::config::RetentionConfig;
use pgvault_core::env::Env;
use pgvault_core::retention::{ExpireOptions, Expired, Policy, expire};
use pgvault_core::testing::{Fault, FaultyStore};
use pgvault_core::vault::hold::{self, Scope};
use pgvault_core::vault::session::{Purpose, Reads, Session};
use pgvault_core::vault::{Cluster, audit, layout, snapshot};
use ulid::Ulid;

use crate::place::{Place, Sketch, backup, backups, put_history, put_wal, wal};
use crate::run;

const DAY: i64 = 24;

fn window(days: u64) -> RetentionConfig {
    RetentionConfig { window: Some(Duration::from_secs(days * 86_400)), ..RetentionConfig::default() }
}

fn last(count: u32) -> RetentionConfig {
    RetentionConfig { keep_last: Some(count), ..RetentionConfig::default() }
}

fn options(config: &RetentionConfig) -> ExpireOptions {
    ExpireOptions { policy: Policy::of(config).unwrap(), dry_run: false, verified: BTreeSet::new() }
}

async fn expired(cluster: &Cluster, config: &RetentionConfig) -> Expired {
    expire(cluster, &options(config), |_| {}).await.unwrap()
}

/// Ten days: a backup each day, and a segment every six hours. The first segments are older than the first backup.
async fn ten_days(place: &Place, cluster: &Cluster) -> Vec<Ulid> {
    let mut ids = Vec::new();
    put_wal(cluster, 1, 1).await.unwrap();
    for day in 0..10 {
        ids.push(backup(cluster, Sketch::at(4 + day * 4)).await.unwrap());
        for segment in 1..4 {
            place.pass(6);
            put_wal(cluster, 1, 4 + day * 4 + segment).await.unwrap();
        }
        place.pass(6);
    }
    ids
}

/// T18: the window keeps the backups in it, the one before it, and all WAL from that one's start on. Running it again changes nothing.
#[test]
fn t18_no_wal_that_a_kept_backup_needs_is_deleted() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let dry = ExpireOptions { dry_run: true, ..options(&window(3)) };
        let mut named = Vec::new();
        let told = expire(&cluster, &dry, |object| named.push(object.name.clone())).await.unwrap();
        assert_eq!((backups(&cluster).await.len(), wal(&cluster, 1).await.len()), (10, 41), "a dry run deletes nothing");

        let report = expired(&cluster, &window(3)).await;
        // At noon of the tenth day three days ago was noon of the seventh; backup 6 is of that day's beginning.
        let kept: Vec<Ulid> = ids[7..].to_vec();
        let begin = ids[7];
        assert_eq!(backups(&cluster).await, kept.iter().copied().collect(), "{report:?}");
        assert_eq!(report.expired, ids[..7]);
        assert_eq!(wal(&cluster, 1).await, (32..44).collect::<Vec<_>>());
        assert_eq!((told.expired, named.len()), (report.expired.clone(), 29));
        assert!(report.backups.iter().all(|v| v.kept.is_empty() == report.expired.contains(&v.backup.id)), "{begin}");

        let again = expired(&cluster, &window(3)).await;
        assert_eq!((again.expired, again.wal.deleted), (vec![], 0));
    });
}

/// T18: a first backup in a new vault does not take the WAL before it along, and nothing goes that is younger than the window.
#[test]
fn t18_nothing_expires_when_nothing_should() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        for segment in 1..5 {
            put_wal(&cluster, 1, segment).await.unwrap();
        }
        // Without any backup nothing can be judged.
        place.pass(400 * DAY);
        assert_eq!(expired(&cluster, &window(1)).await.wal.deleted, 0);
        put_wal(&cluster, 1, 5).await.unwrap();
        let _ = backup(&cluster, Sketch::at(6)).await.unwrap();
        assert_eq!(expired(&cluster, &window(500)).await.wal.deleted, 0);
        assert_eq!(backups(&cluster).await.len(), 1);
        let report = expired(&cluster, &window(1)).await;
        assert_eq!((report.expired.len(), wal(&cluster, 1).await), (0, vec![5, 6]));
    });
}

/// T18: ten timelines and more; a branch that nothing kept leads to loses its WAL, and its history when no server will ask for it.
#[test]
fn t18_wal_is_deleted_by_ancestry() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let _ = backup(&cluster, Sketch::at(4)).await.unwrap();
        for segment in 5..12 {
            put_wal(&cluster, 1, segment).await.unwrap();
        }
        // 2 left 1 in segment 6 and was given up; 11 left 1 in segment 10 and is what lives.
        put_history(&cluster, 2, "1\t0/600100\tno recovery target specified\n").await;
        put_history(&cluster, 11, "1\t0/A00100\tno recovery target specified\n").await;
        for segment in 6..9 {
            put_wal(&cluster, 2, segment).await.unwrap();
        }
        place.pass(20 * DAY);
        for segment in 10..20 {
            put_wal(&cluster, 11, segment).await.unwrap();
        }
        // Everything goes on from the backup on timeline 1.
        assert_eq!(expired(&cluster, &window(7)).await.wal.deleted, 0);
        let _ = backup(&cluster, Sketch { timeline: 11, ..Sketch::at(16) }).await.unwrap();
        place.pass(20 * DAY);
        let report = expired(&cluster, &window(7)).await;
        assert_eq!(report.expired.len(), 1);
        let left = (wal(&cluster, 1).await, wal(&cluster, 2).await, wal(&cluster, 11).await);
        assert_eq!(left, (vec![], vec![], vec![16, 17, 18, 19]));
        let history = |timeline: &str| cluster.path(&format!("wal/{timeline}/{timeline}.history"));
        assert!(cluster.store().get_if_exists(&history("00000002")).await.unwrap().is_none());
        assert!(cluster.store().get_if_exists(&history("0000000B")).await.unwrap().is_some());
    });
}

/// T2, R8: a backup that is under way on another host keeps its packs, and the WAL that was stored since.
#[test]
fn t2_a_backup_under_way_elsewhere_loses_nothing_to_expiry() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let old = backup(&cluster, Sketch::at(2)).await.unwrap();
        place.pass(30 * DAY);
        let mut writing = crate::place::Writing::begin(&cluster).await.unwrap();
        writing.store(&cluster, 0).await.unwrap();
        put_wal(&cluster, 1, 9).await.unwrap();
        place.pass(40);
        // On the other host a backup of a server that lags behind not at all is made, and the first one expires.
        let other = backup(&cluster, Sketch::at(20)).await.unwrap();
        let report = expired(&cluster, &last(1)).await;
        assert_eq!(report.expired, [old]);
        assert_eq!(wal(&cluster, 1).await, [9, 20], "{report:?}");
        let id = writing.commit(&cluster, &Sketch::at(9)).await.unwrap().id;
        assert_eq!(backups(&cluster).await, [other, id].into());
        let _ = crate::place::read_all(&cluster, id).await.unwrap();
    });
}

/// T2: a slow backup that commits while an expiry is at work, at whichever of its requests, keeps the WAL that it began with.
#[test]
fn t2_a_backup_that_commits_during_an_expiry_keeps_its_wal() {
    run(async {
        let mut late = 0;
        for at in 1.. {
            let place = Place::new().await;
            let cluster = place.cluster().await;
            let mut slow = crate::place::Writing::begin(&cluster).await.unwrap();
            slow.store(&cluster, 0).await.unwrap();
            put_wal(&cluster, 1, 3).await.unwrap();
            place.pass(1);
            // It began later, is there, and needs nothing of that.
            let _ = backup(&cluster, Sketch::at(9)).await.unwrap();
            place.pass(1);
            let held = Arc::new(FaultyStore::new(place.store.clone()));
            let seen = place.over(held.clone(), Env::default()).await.unwrap();
            // From here on its requests are counted.
            held.heal();
            held.hold(at);
            let options = options(&last(1));
            let mut expiring = std::pin::pin!(expire(&seen, &options, |_| {}));
            let reached = tokio::select! {
                () = held.held() => true,
                done = &mut expiring => done.map(|_| false).unwrap(),
            };
            let id = slow.commit(&cluster, &Sketch::at(3)).await.unwrap().id;
            held.release();
            if reached {
                late += 1;
                let _ = expiring.await.unwrap();
            }
            if backups(&cluster).await.contains(&id) {
                assert!(wal(&cluster, 1).await.contains(&3), "it committed before request {at}, and lost its WAL");
            }
            if !reached {
                break;
            }
        }
        assert!(late > 10, "an expiry has more requests than {late}");
    });
}

/// R8: what is restored at the moment is not expired, nor the WAL that it will ask for.
#[test]
fn r8_a_restore_in_progress_keeps_its_backup_and_its_wal() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let opened = snapshot::open(&cluster, ids[2], None).await.unwrap();
        let _ = Session::read(&cluster, Purpose::Restore, Reads::of(&opened.manifest)).await.unwrap();
        let report = expired(&cluster, &last(1)).await;
        assert_eq!(backups(&cluster).await, [ids[2], ids[9]].into(), "{report:?}");
        assert_eq!(wal(&cluster, 1).await, (12..44).collect::<Vec<_>>());
        // It does not last for ever.
        place.pass(97);
        let report = expired(&cluster, &last(1)).await;
        assert_eq!((report.expired, wal(&cluster, 1).await), (vec![ids[2]], (40..44).collect::<Vec<_>>()));
    });
}

/// H20: one hold keeps what it is about, and everything else expires. When it is taken back, that does too.
#[test]
fn h20_a_hold_does_not_wedge_retention() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let held = hold::place(&cluster, Scope::Backup { backup_id: ids[3] }, "case 12".into()).await.unwrap();
        let _ = expired(&cluster, &window(2)).await;
        assert_eq!(backups(&cluster).await, [ids[3], ids[8], ids[9]].into());
        assert_eq!(wal(&cluster, 1).await, [vec![16], (36..44).collect()].concat());
        // What is missing in between expired: it is no gap.
        let size = u32::try_from(crate::place::SEGMENT).unwrap().try_into().unwrap();
        let catalog =
            pgvault_core::wal::catalog::Catalog::load(&cluster, size, pgvault_core::postgres::Lsn::INVALID).await.unwrap();
        assert_eq!(catalog.gaps().len(), 1);
        assert!(pgvault_core::wal::gap::open(&cluster, &catalog).await.unwrap().is_empty());
        assert!(pgvault_core::wal::gap::holes(&cluster, &catalog).await.unwrap().is_empty());

        hold::remove(&cluster, held.id).await.unwrap();
        assert!(hold::active(&cluster).await.unwrap().is_empty());
        assert_eq!(hold::remove(&cluster, held.id).await.unwrap_err().code(), "hold.unknown");
        assert_eq!(expired(&cluster, &window(2)).await.expired, [ids[3]]);
        assert_eq!(wal(&cluster, 1).await, (36..44).collect::<Vec<_>>());
    });
}

/// H10: whoever takes a hold back, and whoever expires, leaves a record before anything goes.
#[test]
fn h10_what_expired_is_recorded_before_it_goes() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let faulty = Arc::new(FaultyStore::new(place.store.clone()));
        let seen = place.over(faulty.clone(), Env::default()).await.unwrap();
        faulty.heal();
        let _ = expired(&seen, &last(2)).await;
        let calls = faulty.calls();
        let at = |verb: &str, folder: &str| calls.iter().position(|call| call.starts_with(verb) && call.contains(folder)).unwrap();
        let last_of =
            |verb: &str, folder: &str| calls.iter().rposition(|call| call.starts_with(verb) && call.contains(folder)).unwrap();
        assert!(at("put", "/audit/") < at("delete", "/snap/"));
        assert!(last_of("delete", "/snap/") < at("delete", "/wal/"));
        let mut gone: Vec<Ulid> = Vec::new();
        for record in audit::of(&cluster, &[audit::event::BACKUP_EXPIRED]).await.unwrap() {
            if let audit::Event::BackupExpired { backup_id, committed } = record.event {
                assert!(committed.is_some());
                gone.push(backup_id);
            }
        }
        assert_eq!(gone, ids[..8]);
    });
}

/// A manifest that cannot be read is named, is kept, and keeps the WAL that it may need; the others expire.
#[test]
fn a_damaged_manifest_is_named_and_never_expired() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let name = cluster.path(&layout::snapshot(ids[4]));
        let at = cluster.store().head(&name).await.unwrap().last_modified;
        let mut bytes = cluster.store().get(&name).await.unwrap().to_vec();
        bytes[200] ^= 1;
        let then = place.now();
        place.clock.set(at);
        cluster.store().overwrite(&name, bytes.into()).await.unwrap();
        place.clock.set(then);
        let report = expired(&cluster, &last(1)).await;
        assert_eq!(backups(&cluster).await, [ids[4], ids[9]].into());
        assert_eq!(report.damaged.iter().map(|d| d.backup_id).collect::<Vec<_>>(), [ids[4]]);
        assert!(wal(&cluster, 1).await.contains(&20), "{:?}", wal(&cluster, 1).await);
    });
}

/// Whoever may write can claim any time in a manifest, and not when the store got it.
#[test]
fn claimed_times_push_no_real_backup_out() {
    run(async {
        let place = Place::new().await;
        let cluster = place.cluster().await;
        let ids = ten_days(&place, &cluster).await;
        let mut fake = Vec::new();
        for days in [-1000, -4, -3, 1, 1000] {
            let claimed = place.now() + SignedDuration::from_hours(days * DAY);
            fake.push(backup(&cluster, Sketch { claims: Some((claimed, claimed)), ..Sketch::at(100) }).await.unwrap());
        }
        let _ = expired(&cluster, &window(3)).await;
        assert_eq!(backups(&cluster).await, ids[7..].iter().chain(&fake).copied().collect());
    });
}

/// R8: at whichever request it dies or is refused, what is left is whole, and another run finishes.
#[test]
fn r8_expiry_that_is_interrupted_anywhere_goes_on() {
    run(async {
        for fault in [Fault::Fail, Fault::Throttle, Fault::Lie, Fault::Deny] {
            for (at, onwards) in (1..).step_by(7).flat_map(|at| [(at, true), (at, false)]) {
                let place = Place::new().await;
                let cluster = place.cluster().await;
                let ids = ten_days(&place, &cluster).await;
                let faulty = Arc::new(FaultyStore::new(place.store.clone()));
                let broken = place.over(faulty.clone(), Env::default()).await.unwrap();
                faulty.inject(fault, at, onwards);
                let first = expire(&broken, &options(&window(3)), |_| {}).await;
                let reached = faulty.calls().len() >= at;
                if let Err(error) = &first {
                    assert!(matches!(error.kind(), ErrorKind::Storage | ErrorKind::Failed), "{fault:?} at {at}: {error:?}");
                }
                let kept: BTreeSet<Ulid> = ids[7..].iter().copied().collect();
                assert!(backups(&cluster).await.is_superset(&kept), "{fault:?} at {at}");
                // Of each backup that is still there, the WAL is.
                let there = wal(&cluster, 1).await;
                for (number, _) in (0..).zip(&ids).filter(|(_, id)| backups_has(&cluster, **id)) {
                    assert!(there.contains(&(4 + number * 4)), "{fault:?} at {at}: backup {number} lost its WAL");
                }
                let second = expired(&cluster, &window(3)).await;
                assert!(!second.is_incomplete());
                assert_eq!((backups(&cluster).await, wal(&cluster, 1).await), (kept, (32..44).collect::<Vec<_>>()));
                if !reached {
                    break;
                }
            }
        }
    });
}

fn backups_has(cluster: &Cluster, id: Ulid) -> bool {
    futures::executor::block_on(async { cluster.store().head(&cluster.path(&layout::snapshot(id))).await.is_ok() })
}
