//! The programs of a history: what each does, again and again, and what they know together.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pgvault_core::config::RetentionConfig;
use pgvault_core::copy::{CopyOptions, copy};
use pgvault_core::progress::Silent;
use pgvault_core::retention::{ExpireOptions, Policy, expire};
use pgvault_core::testing::Dice;
use pgvault_core::vault::gc::{GcOptions, collect};
use pgvault_core::vault::hold::{self, Scope};
use pgvault_core::vault::session::{Purpose, READ_HOURS, Reads, Session};
use pgvault_core::vault::{Cluster, layout, snapshot};
use pgvault_core::{Error, ErrorKind, Result};
use ulid::Ulid;

use crate::place::{Place, SEGMENT, Sketch, Writing, put_wal};
use crate::turnstile::Turnstile;

/// What happened.
#[derive(Debug, Default, Clone)]
pub(crate) struct Told {
    pub(crate) requests: u64,
    pub(crate) committed: u64,
    pub(crate) crashed: u64,
    pub(crate) failed: u64,
    pub(crate) expiries: u64,
    pub(crate) expired: u64,
    pub(crate) collections: u64,
    pub(crate) planned: u64,
    pub(crate) swept: u64,
    pub(crate) postponed: u64,
    pub(crate) restored: u64,
    pub(crate) held: u64,
    /// Of these, stretches of time.
    pub(crate) ranges: u64,
    /// Runs of `copy` that came to their end, and the backups that they committed.
    pub(crate) copies: u64,
    pub(crate) copied: u64,
    /// What the pruner of the copy expired and swept.
    pub(crate) copies_expired: u64,
    pub(crate) copies_swept: u64,
    /// Backups that were copied when everything was over.
    pub(crate) caught_up: u64,
}

impl Told {
    fn counts(&mut self) -> [&mut u64; 18] {
        let Self { requests, committed, crashed, failed, expiries, expired, collections, planned, swept, .. } = self;
        let Self { postponed, restored, held, ranges, copies, copied, copies_expired, copies_swept, caught_up, .. } = self;
        [
            requests,
            committed,
            crashed,
            failed,
            expiries,
            expired,
            collections,
            planned,
            swept,
            postponed,
            restored,
            held,
            ranges,
            copies,
            copied,
            copies_expired,
            copies_swept,
            caught_up,
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (count, more) in self.counts().into_iter().zip(other.clone().counts()) {
            *count += *more;
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.clone().counts().into_iter().all(|count| *count > 0)
    }
}

/// What the programs know together: what was acknowledged.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) told: Told,
    /// Where the server was, and when: the segments in which backups began.
    pub(crate) positions: Vec<(Timestamp, u64)>,
    /// What the writers stored.
    pub(crate) packs: BTreeMap<Ulid, String>,
    /// Of each vault.
    pub(crate) sides: [Side; 2],
}

/// What is known of a vault.
#[derive(Default)]
pub(crate) struct Side {
    /// Holds in force.
    pub(crate) holds: BTreeMap<Ulid, Scope>,
    /// What is being read, and since when: the packs, and the segment that makes it consistent.
    pub(crate) reading: Vec<(Timestamp, BTreeSet<Ulid>, u64)>,
}

pub(crate) type Shared = Rc<RefCell<Ledger>>;

/// The vault that is written to, and its copy.
pub(crate) const SOURCE: usize = 0;
pub(crate) const COPY: usize = 1;

/// One of several that take turns, and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Writer,
    Pruner(usize),
    Restorer,
    Holder,
    Copier,
}

pub(crate) const ROLES: [Role; 9] = [
    Role::Writer,
    Role::Writer,
    Role::Pruner(SOURCE),
    Role::Pruner(SOURCE),
    Role::Restorer,
    Role::Holder,
    Role::Copier,
    Role::Copier,
    Role::Pruner(COPY),
];

pub(crate) struct Program {
    /// As this program sees the vaults: its requests wait, and may fail.
    pub(crate) clusters: [Cluster; 2],
    pub(crate) ledger: Shared,
    pub(crate) place: Place,
    pub(crate) dice: Dice,
    pub(crate) policies: [Policy; 2],
    pub(crate) turnstile: Turnstile,
    /// The source behind everybody's back, for whoever sees no faults and therefore must not fail.
    pub(crate) plain: Option<Cluster>,
}

/// The window or the count that a history has.
pub(crate) fn policy(dice: &mut Dice) -> (Policy, Option<i64>) {
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

async fn listed(cluster: &Cluster) -> Result<Vec<Ulid>> {
    let listed = cluster.store().list(&cluster.path(layout::dir::SNAP)).await?;
    Ok(listed.iter().filter_map(|object| layout::id_of(&object.name)).collect())
}

impl Program {
    pub(crate) async fn run(self, role: Role) {
        match role {
            Role::Writer => self.writer().await,
            Role::Pruner(side) => self.pruner(side).await,
            Role::Restorer => self.restorer().await,
            Role::Holder => self.holder().await,
            Role::Copier => self.copier().await,
        }
    }

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
        let cluster = &self.clusters[SOURCE];
        let began = self.place.now();
        let some = u8::try_from(self.dice.below(256)).unwrap();
        let mut writing = Writing::begin_sharing(cluster, Some(some)).await?;
        for number in 0..u32::try_from(1 + self.dice.below(4)).unwrap() {
            // Before it is stored: whether it was is not always told.
            let (id, text) = writing.pack(number);
            let _ = self.ledger.borrow_mut().packs.insert(id, text);
            writing.store(cluster, number).await?;
        }
        let segment = {
            let mut ledger = self.ledger.borrow_mut();
            let next = ledger.positions.last().map_or(1, |(_, last)| last + 1);
            ledger.positions.push((self.place.now(), next));
            next
        };
        put_wal(cluster, 1, segment).await?;
        let bad = self.dice.permille(150);
        // The server's time, which is right.
        let sketch = Sketch { bad, claims: Some((began, self.place.now())), ..Sketch::at(segment) };
        writing.commit(cluster, &sketch).await.map(drop)
    }

    async fn pruner(mut self, side: usize) {
        loop {
            self.rest(12).await;
            if self.dice.permille(450) {
                let options = ExpireOptions { policy: self.policies[side].clone(), dry_run: false, verified: BTreeSet::new() };
                match expire(&self.clusters[side], &options, |_| {}).await {
                    Ok(report) => {
                        let told = &mut self.ledger.borrow_mut().told;
                        told.expiries += 1;
                        let expired = if side == SOURCE { &mut told.expired } else { &mut told.copies_expired };
                        *expired += report.expired.len() as u64;
                    }
                    Err(error) => self.judge("expire", &error),
                }
            } else {
                match collect(&self.clusters[side], &GcOptions::default()).await {
                    Ok(report) => {
                        let told = &mut self.ledger.borrow_mut().told;
                        told.collections += 1;
                        told.planned += report.planned;
                        told.postponed += report.postponed.len() as u64;
                        let swept = if side == SOURCE { &mut told.swept } else { &mut told.copies_swept };
                        *swept += report.swept.deleted;
                    }
                    Err(error) => self.judge("gc", &error),
                }
            }
        }
    }

    async fn restorer(mut self) {
        loop {
            self.rest(60).await;
            let side = self.dice.below(2);
            match self.restore(side).await {
                Ok(()) => self.ledger.borrow_mut().told.restored += 1,
                Err(error) => self.judge("restore", &error),
            }
        }
    }

    async fn restore(&mut self, side: usize) -> Result<()> {
        let cluster = &self.clusters[side];
        let there = listed(cluster).await?;
        let Some(id) = self.dice.pick(&there).copied() else { return Ok(()) };
        let opened = match snapshot::open(cluster, id, None).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let session = Session::read(cluster, Purpose::Restore, Reads::of(&opened.manifest)).await?;
        match cluster.store().head(&cluster.path(&layout::snapshot(id))).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            seen => drop(seen?),
        }
        let packs = opened.packs().await?;
        let ids = packs.iter().map(|pack| Ulid::from_bytes(pack.id)).collect();
        let reads = (session.began, ids, opened.manifest.start_lsn.0 / SEGMENT);
        self.ledger.borrow_mut().sides[side].reading.push(reads);
        for pack in packs {
            let read = cluster.store().get(&cluster.path(&layout::pack(Ulid::from_bytes(pack.id)))).await;
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
            let side = self.dice.below(2);
            let held: Vec<Ulid> = self.ledger.borrow().sides[side].holds.keys().copied().collect();
            let done = match self.dice.pick(&held).copied().filter(|_| held.len() > 1) {
                Some(hold) => {
                    // From the moment on when it may have been taken back, nothing is promised.
                    let _ = self.ledger.borrow_mut().sides[side].holds.remove(&hold);
                    hold::remove(&self.clusters[side], hold).await.map(drop)
                }
                None => self.hold(side).await,
            };
            if let Err(error) = done {
                self.judge("hold", &error);
            }
        }
    }

    async fn hold(&mut self, side: usize) -> Result<()> {
        let scope = if self.dice.permille(500) {
            // Mostly past, sometimes still to come.
            let minutes = |hours: usize, dice: &mut Dice| SignedDuration::from_mins(i64::try_from(dice.below(hours * 60)).unwrap());
            let from = self.place.now() - SignedDuration::from_hours(14 * 24) + minutes(24 * 24, &mut self.dice);
            Scope::Range { from, to: from + minutes(6 * 24, &mut self.dice) }
        } else {
            let there = listed(&self.clusters[side]).await?;
            let Some(backup_id) = self.dice.pick(&there).copied() else { return Ok(()) };
            Scope::Backup { backup_id }
        };
        let cluster = &self.clusters[side];
        let placed = hold::place(cluster, scope, String::new()).await?;
        // A pruner that began before it may not have seen it, and such a one may take its two days. What is still there when they must
        // have ended is held.
        {
            let told = &mut self.ledger.borrow_mut().told;
            told.held += 1;
            told.ranges += u64::from(matches!(scope, Scope::Range { .. }));
        }
        self.turnstile.sleep(self.place.now() + SignedDuration::from_hours(200)).await;
        if let Scope::Backup { backup_id } = scope {
            match cluster.store().head(&cluster.path(&layout::snapshot(backup_id))).await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let _ = self.ledger.borrow_mut().sides[side].holds.insert(placed.id, scope);
        Ok(())
    }

    async fn copier(mut self) {
        // One request after the other: with several, which comes first is up to the machine.
        let options = CopyOptions { workers: 1, progress: Arc::new(Silent) };
        loop {
            self.rest(30).await;
            match copy(&self.clusters[SOURCE], &self.clusters[COPY], &options).await {
                Ok(copied) => {
                    if let Some(plain) = &self.plain {
                        // What was not copied was damaged, which nothing is, or expired meanwhile, which is no failure.
                        let there = listed(plain).await.unwrap();
                        assert!(copied.failed.is_empty(), "{:?} with {there:?}", copied.failed);
                    }
                    let told = &mut self.ledger.borrow_mut().told;
                    told.copies += 1;
                    told.copied += copied.backups.len() as u64;
                }
                Err(error) => self.judge("copy", &error),
            }
        }
    }

    fn judge(&self, doing: &str, error: &Error) {
        let allowed = match error.kind() {
            ErrorKind::Storage => true,
            // Deadlines; what expired between a listing and a look; what an interrupted copy left and a collection has planned.
            _ => matches!(
                error.code(),
                "session.expired" | "store.not_found" | "prune.failures" | "hold.unknown" | "store.denied" | "copy.collecting"
            ),
        };
        assert!(allowed || error.kind() == ErrorKind::NotFound, "{doing}: {error:?}");
        self.ledger.borrow_mut().told.failed += 1;
    }
}
