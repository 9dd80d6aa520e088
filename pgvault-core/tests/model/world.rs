//! One history: who takes part, who goes when, and what comes after it.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use object_store::ObjectStore;
use pgvault_core::clock::{Clock, FixedClock};
use pgvault_core::copy::{CopyOptions, copy};
use pgvault_core::env::Env;
use pgvault_core::progress::Silent;
use pgvault_core::retention::Policy;
use pgvault_core::testing::{Dice, Fault, FaultyStore, Schedule};
use pgvault_core::vault::gc::{GcOptions, collect};
use pgvault_core::vault::{Cluster, audit, layout, snapshot};
use tokio::task::{JoinHandle, LocalSet};
use ulid::Ulid;

use crate::place::{Place, SEGMENT, Seeded, backups, names, read_all, wal};
use crate::programs::{COPY, Program, ROLES, Role, SOURCE, Shared, Told, policy};
use crate::turnstile::Turnstile;
use crate::witness::Witness;

/// Requests of a history.
const STEPS: usize = 5000;

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

/// A clock that goes, and is wrong.
#[derive(Debug)]
struct Skewed(Arc<FixedClock>, SignedDuration);

impl Clock for Skewed {
    fn now(&self) -> Timestamp {
        self.0.now() + self.1
    }
}

/// What all programs of a history share.
struct World {
    places: [Place; 2],
    policies: [Policy; 2],
    ledger: Shared,
    turnstile: Turnstile,
}

impl World {
    /// Starts program `number`.
    async fn start(&self, number: usize, dice: &mut Dice) -> (usize, JoinHandle<()>) {
        let (mut clusters, mut faults) = (Vec::new(), Vec::new());
        // Its own clock may be wrong by years.
        let hours = i64::try_from(dice.below(20_000)).unwrap() - 10_000;
        for place in &self.places {
            let faulty = FaultyStore::new(place.store.clone());
            let store: Arc<dyn ObjectStore> = Arc::new(self.turnstile.of(number, Arc::new(faulty.clone())));
            let clock = Skewed(place.clock.clone(), SignedDuration::from_hours(hours));
            let env = Env::new(Arc::new(clock), Arc::new(Seeded::new(dice.roll())));
            // It opens the vaults before anything goes wrong.
            let opened = tokio::task::spawn_local({
                let place = place.clone();
                async move { place.over(store, env).await.unwrap() }
            });
            self.drive(number, &opened).await;
            clusters.push(opened.await.unwrap());
            faults.push(faulty);
        }
        let mut is_faulty = false;
        for faulty in faults {
            if dice.permille(250) {
                faulty.follow(Schedule::of(dice.roll(), &[Fault::Fail, Fault::Lie, Fault::Throttle, Fault::Tear]));
                is_faulty = true;
            }
        }
        let plain = if is_faulty { None } else { Some(self.places[SOURCE].cluster().await) };
        let program = Program {
            clusters: clusters.try_into().unwrap(),
            ledger: self.ledger.clone(),
            place: self.places[SOURCE].clone(),
            dice: Dice::new(dice.roll()),
            policies: self.policies.clone(),
            turnstile: self.turnstile.of(number, self.places[SOURCE].store.clone()),
            plain,
        };
        (number, tokio::task::spawn_local(program.run(ROLES[number])))
    }

    /// Lets everything that a program asks for through until a task of it is done.
    async fn drive<T>(&self, program: usize, task: &JoinHandle<T>) {
        while !task.is_finished() {
            tokio::task::yield_now().await;
            if let Some(at) = self.turnstile.waiting().iter().position(|waiting| *waiting == program) {
                self.turnstile.release(at);
            }
        }
    }

    /// Gives every program that can go on the time to come to its next request.
    async fn settle(&self, programs: &[(usize, JoinHandle<()>)]) {
        loop {
            let before = self.turnstile.waiting().len();
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            let waiting = self.turnstile.waiting();
            // One that neither waits nor sleeps works on another thread.
            let idle: BTreeSet<usize> = waiting.iter().copied().chain(self.turnstile.sleeping()).collect();
            if !programs.iter().all(|(program, task)| idle.contains(program) || task.is_finished()) {
                std::thread::yield_now();
            } else if waiting.len() == before {
                break;
            }
        }
    }
}

async fn run(seed: u64) -> Told {
    let mut dice = Dice::new(seed);
    let source = Place::of_seed(!seed).await;
    let target = Place::at(source.clock.clone(), seed.rotate_left(32) ^ 0x5555).await;
    let ((policy, window), (policy_of_copy, window_of_copy)) = (policy(&mut dice), policy(&mut dice));
    let world = World {
        turnstile: Turnstile::new(source.store.clone(), source.clock.clone()),
        places: [source, target],
        policies: [policy, policy_of_copy],
        ledger: Shared::default(),
    };
    let World { places, ledger, turnstile, .. } = &world;
    let clock = &places[SOURCE];
    let mut witnesses = [
        Witness::new(places[SOURCE].cluster().await, SOURCE, window, seed),
        Witness::new(places[COPY].cluster().await, COPY, window_of_copy, seed),
    ];
    let mut programs = Vec::new();
    for number in 0..ROLES.len() {
        programs.push(world.start(number, &mut dice).await);
    }
    // How fast time goes by the requests: minutes or hours.
    let pace = *dice.pick(&[3, 10, 25]).unwrap();
    // A collection takes ten times the requests of a backup. Of slow writers it overtakes some, of fast ones none.
    let haste = *dice.pick(&[1, 5, 15]).unwrap();
    let weight = |program: usize| if matches!(ROLES[program], Role::Pruner(_)) { haste } else { 1 };
    for step in 0..STEPS {
        world.settle(&programs).await;
        let waiting = turnstile.waiting();
        let mut now = clock.now();
        if !waiting.is_empty() {
            let total = waiting.iter().map(|program| weight(*program)).sum();
            let mut chosen = dice.below(total);
            let at = waiting.iter().position(|program| {
                let weight = weight(*program);
                let found = chosen < weight;
                chosen = chosen.saturating_sub(weight);
                found
            });
            ledger.borrow_mut().told.requests += 1;
            let minutes = if dice.permille(4) { 60 * dice.below(40) } else { dice.below(pace) };
            let then = now + SignedDuration::from_mins(i64::try_from(minutes).unwrap());
            if let Some(urgent) = turnstile.overdue(then) {
                turnstile.release(urgent);
            } else {
                turnstile.release(at.unwrap());
                now = then;
            }
        }
        clock.clock.set(now);
        // Everybody sleeps: until the first wakes.
        if let Some(next) = turnstile.wake(now).filter(|_| waiting.is_empty()) {
            clock.clock.set(next.max(now));
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
            programs.push(world.start(number, &mut dice).await);
        }
        if step % 50 == 0 {
            for witness in &mut witnesses {
                witness.look(clock, ledger).await;
            }
        }
    }
    for (_, task) in programs {
        task.abort();
        let _ = task.await;
    }
    look(&mut witnesses, &world).await;
    for witness in &witnesses {
        afterwards(clock, &witness.cluster, seed).await;
    }
    look(&mut witnesses, &world).await;
    let [source, target] = &witnesses;
    catch_up(&source.cluster, &target.cluster, &world, seed).await;
    look(&mut witnesses, &world).await;
    afterwards(clock, &witnesses[COPY].cluster, seed).await;
    for witness in &witnesses {
        witness.compare(ledger).await;
    }
    ledger.borrow().told.clone()
}

async fn look(witnesses: &mut [Witness; 2], world: &World) {
    for witness in witnesses {
        witness.look(&world.places[SOURCE], &world.ledger).await;
    }
}

/// Time passes, nobody writes: what is left is what the backups need.
async fn afterwards(place: &Place, cluster: &Cluster, seed: u64) {
    let before = backups(cluster).await;
    for _ in 0..4 {
        let _ = collect(cluster, &GcOptions::default()).await.unwrap();
        place.pass(100);
    }
    assert_eq!(backups(cluster).await, before, "seed {seed}");
    let mut needed = BTreeSet::new();
    for id in before {
        needed.extend(read_all(cluster, id).await.unwrap_or_else(|e| panic!("{id}: {e:?} (seed {seed})")));
    }
    assert_eq!(names(cluster, layout::dir::PACK).await, needed, "(seed {seed})");
}

/// One copy, and what the source has is in the copy.
async fn catch_up(source: &Cluster, target: &Cluster, world: &World, seed: u64) {
    let options = CopyOptions { workers: 1, progress: Arc::new(Silent) };
    let copied = copy(source, target, &options).await.unwrap_or_else(|e| panic!("copy: {e:?} (seed {seed})"));
    assert!(copied.failed.is_empty(), "{:?} (seed {seed})", copied.failed);
    world.ledger.borrow_mut().told.caught_up += copied.backups.len() as u64;
    let there = backups(target).await;
    // What its own retention has expired does not come again.
    let expired = audit::of(target, &[audit::event::BACKUP_EXPIRED]).await.unwrap().into_iter();
    let expired: BTreeSet<Ulid> = expired
        .filter_map(|record| match record.event {
            audit::Event::BackupExpired { backup_id, .. } => Some(backup_id),
            _ => None,
        })
        .collect();
    for id in backups(source).await.into_iter().filter(|id| there.contains(id) || !expired.contains(id)) {
        assert!(there.contains(&id), "{id} is not in the copy (seed {seed})");
        let manifest = async |cluster| serde_json::to_value(snapshot::open(cluster, id, None).await.unwrap().manifest).unwrap();
        assert_eq!(manifest(source).await, manifest(target).await, "{id} (seed {seed})");
    }
    let mut first = u64::MAX;
    for id in there {
        first = first.min(snapshot::open(target, id, None).await.unwrap().manifest.start_lsn.0 / SEGMENT);
    }
    let there: BTreeSet<u64> = wal(target, 1).await.into_iter().collect();
    let missing: Vec<u64> = wal(source, 1).await.into_iter().filter(|n| *n >= first && !there.contains(n)).collect();
    assert!(missing.is_empty(), "WAL {missing:?} is not in the copy (seed {seed})");
}
