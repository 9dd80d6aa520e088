//! Where a participant can be stopped.
//!
//! Whoever plays a part (a worker, the garbage collection, a capture pass) says [`Pause::here`] before each thing that others can
//! see or disturb. Alone, that only counts the step. As an [`Actor`], it waits there until it is told to go on: others act meanwhile,
//! or it is killed, which is what the end of a process by `kill -9` looks like: its connection closes without a goodbye, its half-written
//! file stays.
//!
//! A step can wait for a lock of PostgreSQL. [`Actor::advance`] then says so and returns, as told by `pg_locks` and not by a clock, so
//! that the same choices give the same history. A blocked actor goes on by itself, once the lock is free; advance it until it
//! has reached its next pause.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use pgvault_core::Result;
use pgvault_core::postgres::{Connection, ResultSet};
use tokio::sync::{Notify, oneshot};

use crate::ledger::{Ledger, Step};

/// How long a step may take before PostgreSQL is asked for the first time whether it waits for a lock. Most take less.
const LOOK_AFTER: Duration = Duration::from_millis(1);

#[derive(Default)]
struct Gate {
    waiting: Mutex<Vec<oneshot::Sender<()>>>,
    arrived: Notify,
    last: Mutex<&'static str>,
}

impl Gate {
    fn has_waiting(&self) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|sender| !sender.is_closed());
        !waiting.is_empty()
    }

    fn open(&self) {
        for sender in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Whoever gave up waiting has been killed.
            let _ = sender.send(());
        }
    }
}

/// A participant's hold on the order of steps; see the [module documentation](self).
///
/// A clone belongs to the same participant: code that runs several things at once may pause in each of them, and all go on together.
/// A task that it has spawned and that outlives a killed participant stands still in its next pause for good.
#[derive(Clone)]
pub struct Pause {
    who: Arc<str>,
    ledger: Ledger,
    gate: Option<Arc<Gate>>,
    backend: Arc<AtomicI32>,
}

impl fmt::Debug for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pause").field("who", &self.who).finish_non_exhaustive()
    }
}

impl Pause {
    /// For somebody who is alone: steps are counted, and nobody waits.
    pub fn alone(who: &str, ledger: &Ledger) -> Self {
        Self { who: who.into(), ledger: ledger.clone(), gate: None, backend: Arc::default() }
    }

    fn gated(who: &str, ledger: &Ledger) -> (Self, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        let pause = Self { who: who.into(), ledger: ledger.clone(), gate: Some(gate.clone()), backend: Arc::default() };
        (pause, gate)
    }

    /// Lets others go first, then begins a step: what is about to be done.
    pub async fn here(&self, what: &'static str) -> Step {
        if let Some(gate) = &self.gate {
            let (sender, receiver) = oneshot::channel();
            gate.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
            *gate.last.lock().unwrap_or_else(PoisonError::into_inner) = what;
            gate.arrived.notify_one();
            // The scheduler only lets go of a gate together with the actor.
            let _ = receiver.await;
        }
        self.ledger.begin(&self.who, what)
    }

    /// The step that goes on now.
    pub fn now(&self) -> Step {
        self.ledger.now()
    }

    /// Says through which backend this participant talks, so that its waiting for a lock can be told from others'.
    pub(crate) fn speaks_through(&self, pid: i32) {
        self.backend.store(pid, Ordering::Relaxed);
    }
}

/// A look at who waits for locks in one database.
#[derive(Clone)]
pub struct Monitor {
    connection: Arc<tokio::sync::Mutex<Connection>>,
    /// Backends of actors that said which is theirs.
    known: Arc<Mutex<BTreeSet<i32>>>,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Monitor")
    }
}

impl Monitor {
    pub(crate) fn new(connection: Connection) -> Self {
        Self { connection: Arc::new(tokio::sync::Mutex::new(connection)), known: Arc::default() }
    }

    pub(crate) fn know(&self, pid: i32) {
        let _ = self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    }

    /// Runs SQL on the connection of the monitor.
    pub(crate) async fn query(&self, sql: &str) -> Result<Vec<ResultSet>> {
        self.connection.lock().await.simple_query(sql).await
    }

    async fn pids(&self, sql: &str) -> Result<BTreeSet<i32>> {
        let sets = self.query(sql).await?;
        let rows = sets.first().map(|set| set.rows.as_slice()).unwrap_or_default();
        rows.iter().map(|row| Ok(row.required(0)?.parse().unwrap_or_default())).collect()
    }

    /// Backends of this database that wait for a lock, by process id.
    ///
    /// # Errors
    /// As any query.
    pub async fn waiting(&self) -> Result<BTreeSet<i32>> {
        const WAITING: &str = "select distinct l.pid from pg_locks l join pg_stat_activity a using (pid) \
                               where not l.granted and a.datname = current_database()";
        self.pids(WAITING).await
    }

    async fn is_blocked(&self, backend: &AtomicI32) -> Result<bool> {
        let own = backend.load(Ordering::Relaxed);
        if own != 0 {
            let waiting = format!("select pid from pg_locks where not granted and pid = {own}");
            return Ok(!self.pids(&waiting).await?.is_empty());
        }
        let waiting = self.waiting().await?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(waiting.difference(&known).next().is_some())
    }

    /// Waits until a backend whose client is gone has noticed it: only then are its transaction and its locks gone.
    async fn wait_for_end_of(&self, pid: i32) -> Result<()> {
        loop {
            let row = format!("select count(*) from pg_stat_activity where pid = {pid}");
            if self.connection.lock().await.query_one(&row).await?.required(0)? == "0" {
                let _ = self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// How far an actor came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<T> {
    /// It stands before this.
    Paused(&'static str),
    /// Its step waits for a lock of PostgreSQL.
    Blocked,
    /// It has ended, with this.
    Finished(T),
}

/// Somebody who is let go step by step; see the [module documentation](self).
pub struct Actor<'a, T> {
    future: Option<BoxFuture<'a, T>>,
    gate: Arc<Gate>,
    backend: Arc<AtomicI32>,
    monitor: Monitor,
    blocked: bool,
}

impl<T> fmt::Debug for Actor<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Actor").field("blocked", &self.blocked).field("ended", &self.future.is_none()).finish_non_exhaustive()
    }
}

impl<'a, T> Actor<'a, T> {
    /// Somebody called `who` who does what `part` says. Nothing happens before the first [`advance`](Self::advance).
    pub fn new<F>(who: &str, ledger: &Ledger, monitor: &Monitor, part: impl FnOnce(Pause) -> F) -> Self
    where
        F: Future<Output = T> + Send + 'a,
    {
        let (pause, gate) = Pause::gated(who, ledger);
        let backend = pause.backend.clone();
        Self { future: Some(Box::pin(part(pause))), gate, backend, monitor: monitor.clone(), blocked: false }
    }

    /// True while its last step waits for a lock.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Asks whether the lock that it waits for is still somebody else's.
    ///
    /// # Errors
    /// When PostgreSQL cannot be asked.
    pub async fn is_still_blocked(&self) -> Result<bool> {
        Ok(self.blocked && self.monitor.is_blocked(&self.backend).await?)
    }

    /// True when it has ended or was killed.
    pub fn has_ended(&self) -> bool {
        self.future.is_none()
    }

    /// Lets it do one step, up to its next pause, its end, or a lock that somebody else holds.
    ///
    /// # Errors
    /// When PostgreSQL cannot be asked who waits.
    ///
    /// # Panics
    /// When it has ended already.
    pub async fn advance(&mut self) -> Result<Progress<T>> {
        #[expect(clippy::expect_used, reason = "a mistake of the test that holds the actor")]
        let future = self.future.as_mut().expect("an actor that has ended cannot go on");
        self.gate.open();
        let (mut look, mut patience) = (false, LOOK_AFTER);
        loop {
            tokio::select! {
                biased;
                result = &mut *future => {
                    self.future = None;
                    self.blocked = false;
                    return Ok(Progress::Finished(result));
                }
                () = self.gate.arrived.notified() => {
                    if self.gate.has_waiting() {
                        self.blocked = false;
                        return Ok(Progress::Paused(*self.gate.last.lock().unwrap_or_else(PoisonError::into_inner)));
                    }
                }
                () = tokio::time::sleep(patience) => look = true,
            }
            if std::mem::take(&mut look) {
                if self.monitor.is_blocked(&self.backend).await? {
                    self.blocked = true;
                    return Ok(Progress::Blocked);
                }
                // A long step of its own: asking costs more than waiting.
                patience = (patience * 2).min(LOOK_AFTER * 16);
            }
        }
    }

    /// Lets it do steps until it stands before `what`.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    ///
    /// # Panics
    /// When it ends or is blocked before it gets there.
    pub async fn advance_to(&mut self, what: &str) -> Result<()> {
        loop {
            match self.advance().await? {
                Progress::Paused(before) if before == what => return Ok(()),
                Progress::Paused(_) => {}
                #[expect(clippy::panic, reason = "a mistake of the test that holds the actor")]
                Progress::Blocked | Progress::Finished(_) => panic!("the actor did not get to `{what}`"),
            }
        }
    }

    /// Lets it do all its steps.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub async fn finish(&mut self) -> Result<T> {
        loop {
            if let Progress::Finished(result) = self.advance().await? {
                return Ok(result);
            }
        }
    }

    /// Ends it where it stands, as `kill -9` does, and waits until PostgreSQL has noticed. To be used between steps.
    ///
    /// # Errors
    /// When PostgreSQL cannot be asked.
    pub async fn kill(&mut self) -> Result<()> {
        self.future = None;
        match self.backend.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            pid => self.monitor.wait_for_end_of(pid).await,
        }
    }
}
