#![expect(clippy::needless_pass_by_value, reason = "policies are made where they are used")]

use super::*;
use crate::config::RetentionConfig;

const DAY: i64 = 24;

fn now() -> Timestamp {
    "2026-06-30T12:00:00Z".parse().unwrap()
}

fn ago(hours: i64) -> Timestamp {
    now() - SignedDuration::from_hours(hours)
}

fn policy(config: RetentionConfig) -> Policy {
    Policy::of(&config).unwrap()
}

fn window(days: u64) -> RetentionConfig {
    RetentionConfig { window: Some(std::time::Duration::from_secs(days * 86_400)), ..RetentionConfig::default() }
}

/// Backup `number`, stored so many hours ago; its position is its number in units of 16 MiB.
fn backup(number: u64, hours: i64) -> Backup {
    Backup {
        id: Ulid(number.into()),
        timeline: TimelineId(1),
        start: Lsn(number << 24),
        stop: Lsn((number << 24) + 100),
        stored_at: ago(hours),
        started_at: ago(hours + 1),
        finished_at: ago(hours),
        whole: true,
        segment_size: SegmentSize::DEFAULT,
    }
}

fn on(timeline: u32, backup: Backup) -> Backup {
    Backup { timeline: TimelineId(timeline), ..backup }
}

fn bad(backup: Backup) -> Backup {
    Backup { whole: false, ..backup }
}

fn known(backups: Vec<Backup>) -> Known {
    let line = Line { history: Some(TimelineHistory::root(TimelineId(1))), newest: Some(now()) };
    Known {
        now: now(),
        backups,
        lines: [(TimelineId(1), line)].into(),
        holds: Vec::new(),
        reading: Vec::new(),
        verified: BTreeSet::new(),
        locked: BTreeMap::new(),
    }
}

fn line(timeline: u32, history: &str, newest: i64) -> (TimelineId, Line) {
    let history = TimelineHistory::parse(TimelineId(timeline), history).unwrap();
    (TimelineId(timeline), Line { history: Some(history), newest: Some(ago(newest)) })
}

fn kept(config: RetentionConfig, known: &Known) -> Vec<u128> {
    let plan = Plan::new(&policy(config), known);
    plan.verdicts.iter().filter(|v| !v.kept.is_empty()).map(|v| v.backup.id.0).collect()
}

/// T18: the newest backup before the window belongs to it, and everything inside; nothing else does.
#[test]
fn t18_the_window_keeps_the_backup_that_its_first_moment_is_restored_from() {
    let daily: Vec<Backup> = (1..=10).map(|n| backup(n, (10 - i64::try_from(n).unwrap()) * DAY + 6)).collect();
    // Three days ago lies between the backups of 78 and of 54 hours ago.
    assert_eq!(kept(window(3), &known(daily.clone())), [7, 8, 9, 10]);
    assert_eq!(kept(window(30), &known(daily.clone())), (1..=10).collect::<Vec<u128>>());
    // Counts add to the window, and take nothing from it.
    let counted = RetentionConfig { keep_last: Some(1), ..window(3) };
    assert_eq!(kept(counted, &known(daily.clone())), [7, 8, 9, 10]);
    let counted = RetentionConfig { keep_last: Some(6), ..window(3) };
    assert_eq!(kept(counted, &known(daily)), [5, 6, 7, 8, 9, 10]);
    assert_eq!(kept(window(3), &known(Vec::new())), Vec::<u128>::new());
}

/// T18: nothing expires when nothing should; a first backup in a new vault is kept, however old.
#[test]
fn t18_nothing_expires_when_nothing_should() {
    for hours in [0, 10, 1000, 100_000] {
        assert_eq!(kept(window(1), &known(vec![backup(1, hours)])), [1]);
        let count = RetentionConfig { keep_last: Some(1), ..RetentionConfig::default() };
        assert_eq!(kept(count, &known(vec![backup(1, hours)])), [1]);
    }
    // A clock that was set back: backups that the store dates after now are inside.
    assert_eq!(kept(window(1), &known(vec![backup(1, -40), backup(2, -50)])), [1, 2]);
}

/// T18: per timeline, by ancestry and not by number; also ten and more of them.
#[test]
fn t18_each_timeline_that_the_window_reaches_keeps_its_beginning() {
    // 1 -> 2 at segment 5; 1 -> 12 at segment 3: backup 4, on timeline 1, is on the way to neither from there on.
    let histories = [line(1, "", 300), line(2, "1\t0/5000000\tx", 2), line(12, "1\t0/3000000\tx", 2)];
    let backups = vec![backup(1, 400), backup(2, 350), backup(4, 300), on(2, backup(6, 200)), on(2, backup(8, 5))];
    let mut known = Known { lines: histories.into(), ..known(backups) };
    // Timeline 2 from 6; timeline 12 goes on from 2; timeline 1 has nothing in the window.
    assert_eq!(kept(window(7), &known), [2, 6, 8]);
    // Timeline 1 is still written to: 4 is its beginning.
    known.lines.insert(TimelineId(1), line(1, "", 1).1);
    assert_eq!(kept(window(7), &known), [2, 4, 6, 8]);
    // Without its history, timeline 12 may have come from anywhere.
    known.lines.insert(TimelineId(12), Line { history: None, newest: Some(ago(2)) });
    assert_eq!(kept(window(7), &known), [4, 6, 8]);
}

/// T29: a backup with bad pages is not what a window begins with, nor all that is left.
#[test]
fn t29_a_backup_with_bad_pages_is_never_the_only_or_the_oldest_one() {
    let backups = vec![backup(1, 20 * DAY), backup(2, 15 * DAY), bad(backup(3, 10 * DAY)), bad(backup(4, 2 * DAY))];
    assert_eq!(kept(window(7), &known(backups.clone())), [2, 3, 4]);
    let count = RetentionConfig { keep_last: Some(2), ..RetentionConfig::default() };
    assert_eq!(kept(count, &known(backups.clone())), [2, 3, 4]);
    let yearly = RetentionConfig { yearly: Some(1), ..RetentionConfig::default() };
    assert_eq!(kept(yearly, &known(backups)), [2, 4]);
    // Where none is whole there is no better choice.
    assert_eq!(kept(window(1), &known(vec![bad(backup(1, 90)), bad(backup(2, 80)), bad(backup(3, 3))])), [2, 3]);
}

#[test]
fn generations_are_counted_in_the_configured_time_zone() {
    // 21:30 and 22:30 UTC of a day are, in summer in Berlin, before and after midnight.
    let at = |text: &str, n| Backup { stored_at: text.parse().unwrap(), ..backup(n, 0) };
    let backups = vec![
        at("2025-12-31T10:00:00Z", 1),
        at("2026-05-31T10:00:00Z", 2),
        at("2026-06-22T10:00:00Z", 3),
        at("2026-06-28T21:30:00Z", 4),
        at("2026-06-28T22:30:00Z", 5),
        at("2026-06-30T01:00:00Z", 6),
    ];
    let with = |zone: Option<&str>, daily, weekly, monthly, yearly| {
        let config = RetentionConfig {
            daily: Some(daily),
            weekly: Some(weekly),
            monthly: Some(monthly),
            yearly: Some(yearly),
            time_zone: zone.map(str::to_owned),
            ..RetentionConfig::default()
        };
        kept(config, &known(backups.clone()))
    };
    assert_eq!(with(None, 3, 0, 0, 0), [3, 5, 6]);
    assert_eq!(with(Some("Europe/Berlin"), 3, 0, 0, 0), [4, 5, 6]);
    // The 28th is a Sunday.
    assert_eq!(with(None, 0, 2, 0, 0), [5, 6]);
    assert_eq!(with(Some("Europe/Berlin"), 0, 2, 0, 0), [4, 6]);
    assert_eq!(with(None, 0, 0, 3, 0), [1, 2, 6]);
    assert_eq!(with(None, 0, 0, 0, 9), [1, 6]);
}

/// R8: what is held, read, locked or proven stays, whatever the policy says; and takes nothing else with it (H20).
#[test]
fn r8_h20_holds_readers_locks_and_proofs_keep_their_own_and_nothing_else() {
    let backups: Vec<Backup> = (1..=9).map(|n| backup(n, (20 - i64::try_from(n).unwrap()) * DAY)).collect();
    let count = || RetentionConfig { keep_last: Some(1), ..RetentionConfig::default() };
    let hold = |scope| Hold { id: Ulid(77), scope, reason: String::new(), placed_at: now() };
    let mut known = known(backups);
    assert_eq!(kept(count(), &known), [9]);
    known.holds = vec![hold(Scope::Backup { backup_id: Ulid(2) })];
    assert_eq!(kept(count(), &known), [2, 9]);
    let plan = Plan::new(&policy(count()), &known);
    // The WAL that makes it consistent, and not all since.
    assert!(plan.needs.iter().all(|need| need.from != Lsn(2 << 24) || need.to == Some(Lsn((2 << 24) + 100))), "{plan:?}");
    known.verified = [Ulid(1), Ulid(3)].into();
    known.locked = [(Ulid(5), None)].into();
    let reads = Reads { backup_id: Ulid(4), timeline: TimelineId(1), start_lsn: Lsn(4 << 24), stop_lsn: Lsn(4 << 24) };
    known.reading = vec![reads];
    assert_eq!(kept(count(), &known), [2, 3, 4, 5, 9]);
    // A hold on something that is gone holds nothing.
    known.holds = vec![hold(Scope::Backup { backup_id: Ulid(99) })];
    assert_eq!(kept(count(), &known), [3, 4, 5, 9]);
}

/// H20: a hold on a stretch of time keeps what restores each moment of it.
#[test]
fn h20_a_range_keeps_the_backup_before_it_and_the_wal_to_its_end() {
    let backups: Vec<Backup> = (1..=9).map(|n| backup(n, (20 - i64::try_from(n).unwrap()) * DAY)).collect();
    let mut known = known(backups);
    // From just after backup 3 to just before 5. What was stored within two days more may have begun before its end.
    let scope = Scope::Range { from: ago(17 * DAY - 1), to: ago(15 * DAY + 1) };
    known.holds = vec![Hold { id: Ulid(77), scope, reason: String::new(), placed_at: now() }];
    let count = RetentionConfig { keep_last: Some(1), ..RetentionConfig::default() };
    assert_eq!(kept(count.clone(), &known), [3, 4, 5, 6, 9]);
    let plan = Plan::new(&policy(count), &known);
    let held: Vec<&Need> = plan.needs.iter().filter(|need| need.from == Lsn(3 << 24)).collect();
    assert!(held.iter().any(|need| need.to == Some(Lsn((7 << 24) + 100))), "{held:?}");
    assert!(held.iter().all(|need| need.to.is_some()), "{held:?}");
}

/// H20: backups come to a copy of a vault days after they were made, all at once or late. A range is one of the database's time.
#[test]
fn h20_a_range_in_a_copy_goes_by_when_backups_were_made() {
    let made: Vec<Backup> = (1..=9).map(|n| backup(n, (20 - i64::try_from(n).unwrap()) * DAY)).collect();
    let scope = Scope::Range { from: ago(17 * DAY - 1), to: ago(15 * DAY + 1) };
    let count = || RetentionConfig { keep_last: Some(1), ..RetentionConfig::default() };
    let held = |stored: &dyn Fn(&Backup) -> Timestamp| {
        let mut known = known(made.iter().map(|b| Backup { stored_at: stored(b), ..*b }).collect());
        known.holds = vec![Hold { id: Ulid(77), scope, reason: String::new(), placed_at: now() }];
        let plan = Plan::new(&policy(count()), &known);
        // Its own WAL is needed, too, by itself.
        let ends = plan.needs.iter().filter(|need| need.from == Lsn(3 << 24)).map(|need| need.to.unwrap_or(Lsn(u64::MAX)));
        (kept(count(), &known), ends.max().unwrap())
    };
    // Copied long after the stretch. 6 is the first that began after its end.
    let late = held(&|b| ago(10) + SignedDuration::from_secs(i64::try_from(b.start.0 >> 24).unwrap()));
    assert_eq!(late, (vec![3, 4, 5, 6, 9], Lsn((6 << 24) + 100)));
    // Three days late: the first that comes more than two days after the end was made before it.
    let (kept, end) = held(&|b| b.finished_at + SignedDuration::from_hours(3 * DAY));
    assert!([3, 4, 5].iter().all(|id| kept.contains(id)), "{kept:?}");
    assert!(end >= Lsn(6 << 24), "{end}");
}

/// Whoever may write chooses what a manifest says, and not when the store got it: real backups are not pushed out of a window.
#[test]
fn attackers_backups_do_not_push_others_out_of_the_window() {
    let mut backups = vec![backup(1, 8 * DAY), backup(2, 6 * DAY), backup(3, 2 * DAY)];
    backups.extend((100..200).map(|n| Backup { start: Lsn(n), stop: Lsn(u64::MAX), ..backup(n, 0) }));
    let kept = kept(window(7), &known(backups));
    assert!([1, 2, 3].iter().all(|id| kept.contains(id)), "{kept:?}");
}

/// With `wal = "window"` old generations keep what makes them consistent, and the window everything.
#[test]
fn old_generations_need_not_keep_all_wal_since() {
    let backups = vec![backup(1, 200 * DAY), backup(2, 9 * DAY), backup(3, DAY)];
    let config = |wal| RetentionConfig { monthly: Some(12), wal, ..window(7) };
    let open = |wal| {
        let plan = Plan::new(&policy(config(wal)), &known(backups.clone()));
        plan.needs.iter().filter(|need| need.to.is_none()).map(|need| need.from.0 >> 24).min()
    };
    assert_eq!(open(KeepWal::All), Some(1));
    assert_eq!(open(KeepWal::Window), Some(2));
}
