//! One history: the programs, what they were told, and what must be true at any moment.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use object_store::ObjectStore;
use pgvault_core::config::RetentionConfig;
use pgvault_core::env::Env;
use pgvault_core::retention::{ExpireOptions, Policy, expire};
use pgvault_core::testing::{Dice, Fault, FaultyStore, Schedule};
use pgvault_core::vault::gc::{GcOptions, collect};
use pgvault_core::vault::hold::{self, Scope};
use pgvault_core::vault::session::{Purpose, READ_HOURS, Reads, Session};
use pgvault_core::vault::{Cluster, layout, snapshot};
use pgvault_core::{Error, ErrorKind, Result};
use tokio::task::{JoinHandle, LocalSet};
use ulid::Ulid;

use crate::place::{Place, SEGMENT, Seeded, Sketch, Writing, backups, names, put_wal, read_all, wal};
use crate::turnstile::Turnstile;

/// What happened.
#[derive(Debug, Default, Clone)]
pub(crate) struct Told {
    requests: u64,
    committed: u64,
    crashed: u64,
    failed: u64,
    expiries: u64,
    expired: u64,
    collections: u64,
    planned: u64,
    swept: u64,
    postponed: u64,
    restored: u64,
    held: u64,
}

impl Told {
    pub(crate) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.committed += other.committed;
        self.crashed += other.crashed;
        self.failed += other.failed;
        self.expiries += other.expiries;
        self.expired += other.expired;
        self.collections += other.collections;
        self.planned += other.planned;
        self.swept += other.swept;
        self.postponed += other.postponed;
        self.restored += other.restored;
        self.held += other.held;
    }

    pub(crate) fn is_busy(&self) -> bool {
        [self.committed, self.crashed, self.failed, self.expired, self.swept, self.postponed, self.restored, self.held]
            .iter()
            .all(|count| *count > 0)
    }
}

/// What the programs know together: what was acknowledged.
#[derive(Default)]
struct Ledger {
    told: Told,
    /// Segment in which the next backup begins.
    segment: u64,
    /// Holds in force, with their backups.
    holds: BTreeMap<Ulid, Ulid>,
    /// What is being read, and since when: the packs, and the segment that makes it consistent.
    reading: Vec<(Timestamp, BTreeSet<Ulid>, u64)>,
}

/// Two writers, two pruners, one that restores and one that holds.
const PROGRAMS: usize = 6;

/// Requests of a history.
const STEPS: usize = 4000;

type Shared = Rc<RefCell<Ledger>>;

struct Program {
    cluster: Cluster,
    ledger: Shared,
    place: Place,
    dice: Dice,
    policy: Policy,
    turnstile: Turnstile,
}

/// The window or the count that a history has.
fn policy(dice: &mut Dice) -> (Policy, Option<i64>) {
    let days = *dice.pick(&[1, 2, 4, 10]).unwrap();
    let window = dice.permille(500);
    let config = RetentionConfig {
        window: window.then(|| Duration::from_secs(days * 86_400)),
        keep_last: (!window || dice.permille(200)).then_some(1),
        daily: dice.permille(200).then_some(2),
        ..RetentionConfig::default()
    };
    (Policy::of(&config).unwrap(), window.then(|| i64::try_from(days).unwrap() * 24))
}

impl Program {
    /// Does nothing for up to so many hours.
    async fn rest(&mut self, hours: usize) {
        let minutes = i64::try_from(self.dice.below(hours * 60)).unwrap();
        self.turnstile.sleep(self.place.now() + SignedDuration::from_mins(minutes)).await;
    }

    async fn writer(mut self) {
        loop {
            self.rest(30).await;
            match self.backup().await {
                Ok(()) => self.ledger.borrow_mut().told.committed += 1,
                Err(error) => self.judge("backup", &error),
            }
        }
    }

    async fn backup(&mut self) -> Result<()> {
        let some = u8::try_from(self.dice.below(256)).unwrap();
        let mut writing = Writing::begin_sharing(&self.cluster, Some(some)).await?;
        for number in 0..u32::try_from(1 + self.dice.below(4)).unwrap() {
            writing.store(&self.cluster, number).await?;
        }
        let segment = {
            let mut ledger = self.ledger.borrow_mut();
            ledger.segment += 1;
            ledger.segment
        };
        put_wal(&self.cluster, 1, segment).await?;
        let sketch = Sketch { bad: self.dice.permille(150), ..Sketch::at(segment) };
        writing.commit(&self.cluster, &sketch).await.map(drop)
    }

    async fn pruner(mut self) {
        loop {
            self.rest(12).await;
            if self.dice.permille(450) {
                let options = ExpireOptions { policy: self.policy.clone(), dry_run: false, verified: BTreeSet::new() };
                match expire(&self.cluster, &options, |_| {}).await {
                    Ok(report) => {
                        let told = &mut self.ledger.borrow_mut().told;
                        told.expiries += 1;
                        told.expired += report.expired.len() as u64;
                    }
                    Err(error) => self.judge("expire", &error),
                }
            } else {
                match collect(&self.cluster, &GcOptions::default()).await {
                    Ok(report) => {
                        let told = &mut self.ledger.borrow_mut().told;
                        told.collections += 1;
                        told.planned += report.planned;
                        told.swept += report.swept.deleted;
                        told.postponed += report.postponed.len() as u64;
                    }
                    Err(error) => self.judge("gc", &error),
                }
            }
        }
    }

    async fn restorer(mut self) {
        loop {
            self.rest(60).await;
            match self.restore().await {
                Ok(()) => self.ledger.borrow_mut().told.restored += 1,
                Err(error) => self.judge("restore", &error),
            }
        }
    }

    async fn restore(&mut self) -> Result<()> {
        let there: Vec<Ulid> = self
            .cluster
            .store()
            .list(&self.cluster.path(layout::dir::SNAP))
            .await?
            .iter()
            .filter_map(|object| layout::id_of(&object.name))
            .collect();
        let Some(id) = self.dice.pick(&there).copied() else { return Ok(()) };
        let opened = match snapshot::open(&self.cluster, id, None).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let session = Session::read(&self.cluster, Purpose::Restore, Reads::of(&opened.manifest)).await?;
        match self.cluster.store().head(&self.cluster.path(&layout::snapshot(id))).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            seen => drop(seen?),
        }
        let packs = opened.packs().await?;
        let ids = packs.iter().map(|pack| Ulid::from_bytes(pack.id)).collect();
        self.ledger.borrow_mut().reading.push((session.began, ids, opened.manifest.start_lsn.0 / SEGMENT));
        for pack in packs {
            let read = self.cluster.store().get(&self.cluster.path(&layout::pack(Ulid::from_bytes(pack.id)))).await;
            if let Err(error) = read {
                let hours = self.place.now().duration_since(session.began).as_hours();
                assert!(error.kind() != ErrorKind::NotFound || hours >= READ_HOURS, "{id} lost a pack while it was read");
                return Err(error);
            }
        }
        Ok(())
    }

    async fn holder(mut self) {
        loop {
            self.rest(60).await;
            let held: Vec<Ulid> = self.ledger.borrow().holds.keys().copied().collect();
            let done = match self.dice.pick(&held).copied().filter(|_| held.len() > 1) {
                Some(hold) => {
                    // From the moment on when it may have been taken back, nothing is promised.
                    let _ = self.ledger.borrow_mut().holds.remove(&hold);
                    hold::remove(&self.cluster, hold).await.map(drop)
                }
                None => self.hold().await,
            };
            if let Err(error) = done {
                self.judge("hold", &error);
            }
        }
    }

    async fn hold(&mut self) -> Result<()> {
        let listed = self.cluster.store().list(&self.cluster.path(layout::dir::SNAP)).await?;
        let there: Vec<Ulid> = listed.iter().filter_map(|object| layout::id_of(&object.name)).collect();
        let Some(backup_id) = self.dice.pick(&there).copied() else { return Ok(()) };
        let placed = hold::place(&self.cluster, Scope::Backup { backup_id }, String::new()).await?;
        // A pruner that began before it may not have seen it, and such a one may take its two days. What is still there when they must
        // have ended is held.
        self.ledger.borrow_mut().told.held += 1;
        self.turnstile.sleep(self.place.now() + SignedDuration::from_hours(200)).await;
        match self.cluster.store().head(&self.cluster.path(&layout::snapshot(backup_id))).await {
            Ok(_) => drop(self.ledger.borrow_mut().holds.insert(placed.id, backup_id)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn judge(&self, doing: &str, error: &Error) {
        let allowed = match error.kind() {
            ErrorKind::Storage => true,
            // Deadlines; what expired between a listing and a look.
            _ => matches!(error.code(), "session.expired" | "store.not_found" | "prune.failures" | "hold.unknown" | "store.denied"),
        };
        assert!(allowed || error.kind() == ErrorKind::NotFound, "{doing}: {error:?}");
        self.ledger.borrow_mut().told.failed += 1;
    }
}

/// Looks at the vault behind everybody's back.
struct Witness {
    cluster: Cluster,
    window: Option<i64>,
    /// Every backup that was ever seen, when it was stored, whether it is whole, and where it begins.
    seen: BTreeMap<Ulid, (Timestamp, bool, u64)>,
    /// Their packs.
    packs: BTreeMap<Ulid, Vec<Ulid>>,
    why: String,
}

impl Witness {
    async fn look(&mut self, place: &Place, ledger: &Shared) {
        let why = &self.why;
        let there = names(&self.cluster, layout::dir::PACK).await;
        let listed = self.cluster.store().list(&self.cluster.path(layout::dir::SNAP)).await.unwrap();
        let segments: BTreeSet<u64> = wal(&self.cluster, 1).await.into_iter().collect();
        let mut present = BTreeSet::new();
        for object in listed {
            let id = layout::id_of(&object.name).unwrap();
            if !self.packs.contains_key(&id) {
                let opened = snapshot::open(&self.cluster, id, None).await.unwrap();
                let mut packs: Vec<Ulid> = opened.table_packs().map(|pack| Ulid::from_bytes(pack.id)).collect();
                packs.extend(opened.packs().await.unwrap().iter().map(|pack| Ulid::from_bytes(pack.id)));
                let manifest = &opened.manifest;
                let what = (object.last_modified, manifest.bad_pages.is_empty(), manifest.start_lsn.0 / SEGMENT);
                let _ = (self.packs.insert(id, packs), self.seen.insert(id, what));
            }
            let lost: Vec<&Ulid> = self.packs[&id].iter().filter(|pack| !there.contains(pack)).collect();
            assert!(lost.is_empty(), "{id} lost {lost:?} ({why})");
            let segment = self.seen[&id].2;
            assert!(segments.contains(&segment), "{id} lost its WAL, segment {segment} ({why})");
            let _ = present.insert(id);
        }
        let now = place.now();
        if let Some(hours) = self.window {
            let begin = now - SignedDuration::from_hours(hours);
            let inside = self.seen.iter().filter(|(_, (at, ..))| *at > begin).map(|(id, _)| *id);
            let newest = |whole: bool| {
                let before = self.seen.iter().filter(|(_, (at, is_whole, _))| *at <= begin && (*is_whole || !whole));
                before.max_by_key(|(id, (at, ..))| (*at, **id)).map(|(id, _)| *id)
            };
            let first = newest(false);
            // T29: the newest whole one is needed when the newest is not.
            let whole = newest(true);
            let needed: BTreeSet<Ulid> = inside.chain(first).chain(whole).collect();
            let lost: Vec<&Ulid> = needed.difference(&present).collect();
            assert!(lost.is_empty(), "the window lost {lost:?} ({why})");
            let from = needed.iter().filter_map(|id| self.seen.get(id)).map(|(.., segment)| *segment).min();
            let stored: BTreeSet<u64> = self.seen.values().map(|(.., segment)| *segment).collect();
            let gone: Vec<&u64> = stored.iter().filter(|n| from.is_some_and(|from| **n >= from) && !segments.contains(n)).collect();
            assert!(gone.is_empty(), "the window lost WAL {gone:?} ({why})");
        }
        for (hold, id) in &ledger.borrow().holds {
            assert!(present.contains(id), "{id} is gone, and {hold} holds it ({why})");
        }
        // Whether or not the manifest is still there.
        let mut ledger = ledger.borrow_mut();
        ledger.reading.retain(|(since, ..)| now.duration_since(*since).as_hours() < READ_HOURS);
        for (since, packs, from) in &ledger.reading {
            let lost: Vec<&Ulid> = packs.difference(&there).collect();
            assert!(lost.is_empty(), "{lost:?} are gone, and have been read since {since} ({why})");
            // What follows may have expired before: it is promised to whom the window or a hold promises it.
            assert!(segments.contains(from), "segment {from} is gone, and somebody restores from it since {since} ({why})");
        }
    }
}

/// Runs the history of a seed; panics with the seed when something is wrong.
pub(crate) async fn history(seed: u64) -> Told {
    let programs = LocalSet::new();
    let ran = std::panic::AssertUnwindSafe(programs.run_until(run(seed)));
    match Box::pin(futures::FutureExt::catch_unwind(ran)).await {
        Ok(told) => told,
        Err(panic) => {
            eprintln!("failed with PGVAULT_TEST_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

async fn run(seed: u64) -> Told {
    let mut dice = Dice::new(seed);
    let place = Place::of_seed(!seed).await;
    let (policy, window) = policy(&mut dice);
    let ledger: Shared = Rc::default();
    let turnstile = Turnstile::new(place.store.clone());
    let why = format!("seed {seed}");
    let mut witness =
        Witness { cluster: place.cluster().await, window, seen: BTreeMap::new(), packs: BTreeMap::new(), why: why.clone() };

    let start = async |number: usize, dice: &mut Dice| -> (usize, JoinHandle<()>) {
        let faulty = FaultyStore::new(place.store.clone());
        let program = Program {
            // It opens the vault before anything goes wrong; its own clock may be wrong by years.
            cluster: {
                let clock = pgvault_core::clock::FixedClock::new(
                    place.now() + SignedDuration::from_hours(i64::try_from(dice.below(20_000)).unwrap() - 10_000),
                );
                let store: Arc<dyn ObjectStore> = Arc::new(turnstile.of(number, Arc::new(faulty.clone())));
                let env = Env::new(Arc::new(clock), Arc::new(Seeded::new(dice.roll())));
                let opened = tokio::task::spawn_local({
                    let place = place.clone();
                    async move { place.over(store, env).await.unwrap() }
                });
                drive(&turnstile, &opened).await;
                opened.await.unwrap()
            },
            ledger: ledger.clone(),
            place: place.clone(),
            dice: Dice::new(dice.roll()),
            policy: policy.clone(),
            turnstile: turnstile.clone(),
        };
        if dice.permille(250) {
            faulty.follow(Schedule::of(dice.roll(), &[Fault::Fail, Fault::Lie, Fault::Throttle, Fault::Tear]));
        }
        let task = match number {
            0 | 1 => tokio::task::spawn_local(program.writer()),
            2 | 3 => tokio::task::spawn_local(program.pruner()),
            4 => tokio::task::spawn_local(program.restorer()),
            _ => tokio::task::spawn_local(program.holder()),
        };
        (number, task)
    };
    let mut programs = Vec::new();
    for number in 0..PROGRAMS {
        programs.push(start(number, &mut dice).await);
    }
    // How fast time goes by the requests: minutes or hours.
    let pace = *dice.pick(&[3, 10, 25]).unwrap();
    // A collection takes ten times the requests of a backup. Of slow writers it overtakes some, of fast ones none.
    let haste = *dice.pick(&[1, 5, 15]).unwrap();
    let weight = |program: usize| if matches!(program, 2 | 3) { haste } else { 1 };
    for step in 0..STEPS {
        settle(&turnstile, 1).await;
        let waiting = turnstile.waiting();
        let mut now = place.now();
        if !waiting.is_empty() {
            let total = waiting.iter().map(|program| weight(*program)).sum();
            let mut chosen = dice.below(total);
            let at = waiting.iter().position(|program| {
                let weight = weight(*program);
                let found = chosen < weight;
                chosen = chosen.saturating_sub(weight);
                found
            });
            turnstile.release(at.unwrap());
            ledger.borrow_mut().told.requests += 1;
            let minutes = if dice.permille(4) { 60 * dice.below(40) } else { dice.below(pace) };
            now += SignedDuration::from_mins(i64::try_from(minutes).unwrap());
        }
        place.clock.set(now);
        // Everybody sleeps: until the first wakes.
        if let Some(next) = turnstile.wake(now).filter(|_| waiting.is_empty()) {
            place.clock.set(next.max(now));
            let _ = turnstile.wake(next.max(now));
        }
        for at in 0..programs.len() {
            if programs[at].1.is_finished() {
                // A program ends by a panic only.
                programs.remove(at).1.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
                unreachable!();
            }
        }
        if dice.permille(3) {
            // It dies where it stands, and is started again.
            let at = dice.below(programs.len());
            let (number, task) = programs.remove(at);
            task.abort();
            let _ = task.await;
            ledger.borrow_mut().told.crashed += 1;
            programs.push(start(number, &mut dice).await);
        }
        if step % 50 == 0 {
            witness.look(&place, &ledger).await;
        }
    }
    for (_, task) in programs {
        task.abort();
        let _ = task.await;
    }
    settle(&turnstile, 1).await;
    witness.look(&place, &ledger).await;
    afterwards(&place, &witness.cluster, &why).await;
    witness.look(&place, &ledger).await;
    ledger.borrow().told.clone()
}

/// Lets everything through until a task is done.
async fn drive<T>(turnstile: &Turnstile, task: &JoinHandle<T>) {
    while !task.is_finished() {
        tokio::task::yield_now().await;
        // The last that came is this program's.
        if let Some(last) = turnstile.waiting().len().checked_sub(1) {
            turnstile.release(last);
        }
    }
}

/// Gives every program that can go on the time to come to its next request.
async fn settle(turnstile: &Turnstile, rounds: usize) {
    for _ in 0..rounds {
        let before = turnstile.waiting().len();
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        if turnstile.waiting().len() == before {
            break;
        }
    }
}

/// Time passes, nobody writes: what is left is what the backups need.
async fn afterwards(place: &Place, cluster: &Cluster, why: &str) {
    let before = backups(cluster).await;
    for _ in 0..4 {
        let _ = collect(cluster, &GcOptions::default()).await.unwrap();
        place.pass(100);
    }
    assert_eq!(backups(cluster).await, before, "{why}");
    let mut needed = BTreeSet::new();
    for id in before {
        needed.extend(read_all(cluster, id).await.unwrap_or_else(|e| panic!("{id}: {e:?} ({why})")));
    }
    assert_eq!(names(cluster, layout::dir::PACK).await, needed, "({why})");
}
