//! Random histories: workers, the garbage collection and whoever watches them, interleaved step by step as a seed says.
//!
//! The same seed chooses the same participants in the same order, and they draw from their own seeds what they do, so that a history can be
//! had again. That holds as long as the watchers are as predictable; and a lock that is waited for until the garbage collection gives up
//! takes real time.
//!
//! ```no_run
//! # use odoosim::*;
//! # use pgvault_core::Result;
//! # use pgvault_core::postgres::Lsn;
//! struct Backup {
//!     watermark: Lsn,
//! }
//!
//! #[async_trait::async_trait]
//! impl Participant for Backup {
//!     async fn pass(&mut self, pause: &Pause) -> Result<()> {
//!         pause.here("list").await; // others go on here
//!         Ok(())
//!     }
//! }
//!
//! # async fn example(site: Site) -> Result<()> {
//! let mut odoo = site.create("shop", Series::V19, Rules::default()).await?;
//! for seed in 0..2000 {
//!     odoo = odoo.cleared().await?;
//!     let mut backup = Backup { watermark: Lsn::INVALID };
//!     let participants = vec![Participation::new("backup", 9, &mut backup).killed_every(40)];
//!     let outcome = History::new(seed, Options::default()).run(&odoo, participants).await?;
//!     let missing = outcome.missing(backup.watermark, |name| false);
//!     assert!(missing.iter().all(|missing| missing.whole.is_empty()), "seed {seed}: {missing:?}");
//! }
//! # Ok(())
//! # }
//! ```

mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::SignedDuration;
use pgvault_core::Result;
use pgvault_core::postgres::Lsn;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::gc::{self, Collection};
use crate::ledger::{Interval, Ledger, Step};
use crate::odoo::Odoo;
use crate::pause::{Actor, Pause, Progress};
use crate::truth::{Recording, Truth, local_names};

use self::requests::{Shared, Work, count, locked, work};

/// Somebody who looks on, such as a backup.
#[async_trait]
pub trait Participant: Send {
    /// Does its work once. Between its own steps it awaits [`Pause::here`], where others go on; what it does between two of these
    /// nobody can interrupt.
    ///
    /// # Errors
    /// Ends the history.
    async fn pass(&mut self, pause: &Pause) -> Result<()>;

    /// Its pass was killed: what is only in memory is to be forgotten, as by a process that starts again.
    fn killed(&mut self) {}
}

#[async_trait]
impl<P: Participant + ?Sized> Participant for &mut P {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        (**self).pass(pause).await
    }

    fn killed(&mut self) {
        (**self).killed();
    }
}

/// A participant, and how often it begins and is killed.
pub struct Participation<'a> {
    name: String,
    every: u32,
    kill_every: u32,
    /// Shared with the pass that it is in, so that it survives when that is killed.
    participant: Arc<tokio::sync::Mutex<Box<dyn Participant + 'a>>>,
}

impl fmt::Debug for Participation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Participation").field("name", &self.name).field("every", &self.every).finish_non_exhaustive()
    }
}

impl<'a> Participation<'a> {
    /// `participant` begins a pass in one of `every` of its turns on average, 1 being always, when it is not in one.
    pub fn new(name: &str, every: u32, participant: impl Participant + 'a) -> Self {
        let participant: Box<dyn Participant + 'a> = Box::new(participant);
        Self {
            name: name.to_owned(),
            every: every.max(1),
            kill_every: 0,
            participant: Arc::new(tokio::sync::Mutex::new(participant)),
        }
    }

    /// Kills it in one of so many of its turns in the middle of a pass; never if 0. Its future is dropped where it stands, then
    /// [`Participant::killed`] is called. Nobody waits until the server has noticed that its connections are gone.
    #[must_use]
    pub fn killed_every(mut self, turns: u32) -> Self {
        self.kill_every = turns;
        self
    }
}

/// How a history is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many workers there are.
    pub workers: usize,
    /// How many operations they do together; one of these numbers.
    pub operations: RangeInclusive<u32>,
    /// The garbage collection begins in one of so many of its turns; never if 0.
    pub gc_every: u32,
    /// One in so many turns of a worker or of the garbage collection ends with `kill -9`; none if 0.
    pub kill_every: u32,
    /// How much time passes with each step, at most; half of it on average.
    pub step_time: SignedDuration,
}

impl Default for Options {
    fn default() -> Self {
        Self { workers: 3, operations: 30..=120, gc_every: 12, kill_every: 150, step_time: SignedDuration::from_secs(60) }
    }
}

/// A pass of a participant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// Whose.
    pub who: String,
    /// Its first step.
    pub from: Step,
    /// Its last.
    pub to: Step,
}

/// What came of a history.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// What rows said.
    pub truth: Truth,
    /// What lay on the disk.
    pub ledger: Ledger,
    /// Which passes there were, in the order of their ends.
    pub passes: Vec<Pass>,
    /// How often what happened: `commit`, `rollback`, `kill`, `pass killed`, `gc`, `gc gave up`, `gc conflict`, and codes of errors.
    pub tally: BTreeMap<String, u64>,
}

/// A file that somebody would miss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The name that a row has.
    pub store_fname: String,
    /// The first position at which one has it.
    pub at: Lsn,
    /// When the file was whole on the source. Empty: never, and nobody could have copied it.
    pub whole: Vec<Interval>,
}

impl Outcome {
    /// The files that rows refer to at any position up to `watermark`, and that `has` has not.
    pub fn missing(&self, watermark: Lsn, has: impl Fn(&str) -> bool) -> Vec<Missing> {
        let mut seen = BTreeSet::new();
        let mut missing = Vec::new();
        for (at, rows) in self.truth.states().take_while(|(at, _)| *at <= watermark) {
            for store_fname in local_names(&rows) {
                if seen.insert(store_fname.clone()) && !has(&store_fname) {
                    let whole = self.ledger.intervals(&store_fname);
                    missing.push(Missing { store_fname, at, whole });
                }
            }
        }
        missing
    }

    /// Names that rows refer to in the end, and whose files are not there or not right.
    pub fn dangling(&self) -> Vec<String> {
        let Some((_, rows)) = self.truth.states().last() else { return Vec::new() };
        local_names(&rows).into_iter().filter(|name| !self.ledger.is_on_disk(name)).collect()
    }
}

/// See the [module documentation](self).
#[derive(Debug, Clone)]
pub struct History {
    seed: u64,
    options: Options,
}

/// With what an actor ends.
enum Ended {
    Worker(Result<()>),
    Gc(Result<Collection>),
    Pass(Result<()>),
}

enum Role<'a> {
    Worker,
    Gc,
    Watcher(Participation<'a>),
}

struct Place<'a> {
    role: Role<'a>,
    actor: Option<Actor<'a, Ended>>,
    began: Step,
}

impl History {
    /// A history.
    pub fn new(seed: u64, options: Options) -> Self {
        Self { seed, options }
    }

    /// Lets it happen, on a database that nobody else writes to.
    ///
    /// # Errors
    /// What a participant, the server or the disk says; not what workers run into and live with.
    pub async fn run(&self, odoo: &Odoo, participants: Vec<Participation<'_>>) -> Result<Outcome> {
        let recording = Recording::start(odoo).await?;
        let mut random = StdRng::seed_from_u64(self.seed);
        let left = random.random_range(self.options.operations.clone());
        let shared: Shared = Arc::new(Mutex::new(Work { family: self.seed, left, next_content: 0, tally: BTreeMap::new() }));
        let roles = (0..self.options.workers).map(|_| Role::Worker).chain([Role::Gc]);
        let roles = roles.chain(participants.into_iter().map(Role::Watcher));
        let places = roles.map(|role| Place { role, actor: None, began: 0 }).collect();
        let mut run = Run { history: self, odoo, shared, random, places, passes: Vec::new(), incarnations: 0 };
        Box::pin(run.until_the_end()).await?;
        let truth = recording.finish().await?;
        let tally = locked(&run.shared, |work| work.tally.clone());
        Ok(Outcome { seed: self.seed, truth, ledger: odoo.ledger().clone(), passes: run.passes, tally })
    }
}

struct Run<'h, 'a> {
    history: &'h History,
    odoo: &'h Odoo,
    shared: Shared,
    random: StdRng,
    places: Vec<Place<'a>>,
    passes: Vec<Pass>,
    incarnations: u64,
}

impl Run<'_, '_> {
    async fn until_the_end(&mut self) -> Result<()> {
        loop {
            self.release().await?;
            let ending = locked(&self.shared, |work| work.left == 0);
            // Watchers begin as long as there is something to watch: one of them may hold what the others wait for.
            let watched = |place: &Place<'_>| place.actor.is_some() && !matches!(place.role, Role::Watcher(_));
            let over = ending && !self.places.iter().any(watched);
            let is_ready = |place: &Place<'_>| match (&place.actor, &place.role) {
                (Some(actor), _) => !actor.is_blocked(),
                (None, Role::Watcher(_)) => !over,
                (None, _) => !ending,
            };
            let ready: Vec<usize> =
                self.places.iter().enumerate().filter(|(_, place)| is_ready(place)).map(|(index, _)| index).collect();
            if ready.is_empty() {
                if self.places.iter().all(|place| place.actor.is_none()) {
                    return Ok(());
                }
                // All wait for locks: the server ends that, by a timeout or as a deadlock.
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            let Some(index) = ready.get(self.random.random_range(0..ready.len())).copied() else { continue };
            self.turn(index, ending).await?;
        }
    }

    /// Lets those go on whose locks have become free. They get there by themselves; here it is waited for, and again for those who waited
    /// for one of them: a transaction that fails lets its locks go at once.
    async fn release(&mut self) -> Result<()> {
        loop {
            let mut released = false;
            for index in 0..self.places.len() {
                let Some(actor) = self.places.get(index).and_then(|place| place.actor.as_ref()) else { continue };
                if actor.is_blocked() && !actor.is_still_blocked().await? {
                    self.advance(index).await?;
                    released = true;
                }
            }
            if !released {
                return Ok(());
            }
        }
    }

    async fn turn(&mut self, index: usize, ending: bool) -> Result<()> {
        let options = &self.history.options;
        let Some(place) = self.places.get_mut(index) else { return Ok(()) };
        if place.actor.is_none() {
            let every = match &place.role {
                Role::Worker => 1,
                Role::Gc => options.gc_every,
                Role::Watcher(participation) => participation.every,
            };
            if every == 0 || !self.random.random_ratio(1, every) {
                return Ok(());
            }
            self.start(index);
        } else if !ending {
            let every = match &place.role {
                Role::Worker | Role::Gc => options.kill_every,
                Role::Watcher(participation) => participation.kill_every,
            };
            if every > 0 && self.random.random_ratio(1, every) {
                return self.kill(index).await;
            }
        }
        let passed = self.random.random_range(0..=options.step_time.as_millis().max(0));
        self.odoo.advance(SignedDuration::from_millis(i64::try_from(passed).unwrap_or_default()));
        self.advance(index).await
    }

    async fn kill(&mut self, index: usize) -> Result<()> {
        let Some(place) = self.places.get_mut(index) else { return Ok(()) };
        if let Some(mut actor) = place.actor.take() {
            actor.kill().await?;
        }
        if let Role::Watcher(participation) = &place.role {
            participation.participant.lock().await.killed();
            count(&self.shared, "pass killed");
        } else {
            count(&self.shared, "kill");
        }
        Ok(())
    }

    fn start(&mut self, index: usize) {
        let (odoo, shared) = (self.odoo.clone(), self.shared.clone());
        let (ledger, monitor) = (self.odoo.ledger(), self.odoo.monitor());
        self.incarnations += 1;
        let seed = self.history.seed ^ self.incarnations.rotate_right(20);
        let Some(place) = self.places.get_mut(index) else { return };
        place.began = ledger.now() + 1;
        place.actor = Some(match &place.role {
            Role::Worker => Actor::new(&format!("worker {index}"), ledger, monitor, |pause| async move {
                Ended::Worker(Box::pin(work(&odoo, &pause, &shared, seed)).await)
            }),
            Role::Gc => {
                Actor::new("gc", ledger, monitor, |pause| async move { Ended::Gc(Box::pin(gc::collect(&odoo, &pause)).await) })
            }
            Role::Watcher(participation) => {
                let participant = Arc::clone(&participation.participant);
                Actor::new(&participation.name, ledger, monitor, |pause| async move {
                    Ended::Pass(participant.lock().await.pass(&pause).await)
                })
            }
        });
    }

    async fn advance(&mut self, index: usize) -> Result<()> {
        let Some(place) = self.places.get_mut(index) else { return Ok(()) };
        let Some(actor) = &mut place.actor else { return Ok(()) };
        let Progress::Finished(ended) = actor.advance().await? else { return Ok(()) };
        place.actor = None;
        match ended {
            Ended::Worker(result) => result?,
            Ended::Gc(result) => count(
                &self.shared,
                match result? {
                    Collection::Done { .. } => "gc",
                    Collection::GaveUp => "gc gave up",
                    Collection::Conflict => "gc conflict",
                },
            ),
            Ended::Pass(result) => {
                result?;
                if let Role::Watcher(participation) = &place.role {
                    let pass = Pass { who: participation.name.clone(), from: place.began, to: self.odoo.ledger().now() };
                    self.passes.push(pass);
                }
            }
        }
        Ok(())
    }
}
