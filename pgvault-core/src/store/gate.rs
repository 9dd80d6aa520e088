//! How many requests run at once, how fast bytes may flow, and when the store has asked to be left alone.
//!
//! One gate belongs to one [`Store`](super::Store) and everything that was made of it. Requests wait in front of it. The
//! number that may pass follows what the store bears: one that throttles halves it, each request that succeeds gives back a
//! fraction, as TCP does it. What was sent is counted on the way.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// What a job may take from the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests at once; at least 1.
    pub requests: u32,
    /// Bytes that are sent per second.
    pub upload: Option<u64>,
    /// Bytes that are read per second.
    pub download: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 32, upload: None, download: None }
    }
}

/// Requests that were made, repeated ones included, and what they moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Requests {
    /// Objects created, or tried to be.
    pub put: u64,
    /// Objects read, whole or in part.
    pub get: u64,
    /// Questions for size and age.
    pub head: u64,
    /// Pages of listings.
    pub list: u64,
    /// Objects deleted, or tried to be.
    pub delete: u64,
    /// Everything else: retention, versions, a bucket's settings.
    pub other: u64,
    /// How many of these were repetitions of one that failed.
    pub retried: u64,
    /// How many were answered with a request to slow down.
    pub throttled: u64,
    /// Bytes of objects sent.
    pub bytes_sent: u64,
    /// Bytes of objects received.
    pub bytes_received: u64,
}

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Put,
    Get,
    Head,
    List,
    Delete,
    Other,
}

/// Longest pause that a store may ask for; a longer one is a store in trouble, and the caller should hear of it.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// One throttled answer after another within this time belongs to the same burst, and counts once.
const BURST: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct State {
    running: u32,
    allowed: f64,
    last_cut: Option<Instant>,
    not_before: Option<Instant>,
    upload_free: Option<Instant>,
    download_free: Option<Instant>,
    /// The store's clock minus this machine's, in milliseconds.
    ahead: Option<i64>,
    requests: Requests,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Gate {
    limits: Limits,
    state: Mutex<State>,
    wake: Notify,
}

impl Gate {
    pub(super) fn new(limits: Limits) -> Self {
        let state = State {
            running: 0,
            allowed: f64::from(limits.requests.max(1)),
            last_cut: None,
            not_before: None,
            upload_free: None,
            download_free: None,
            ahead: None,
            requests: Requests::default(),
        };
        Self { limits, state: Mutex::new(state), wake: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more request may run.
    pub(super) async fn enter(self: &Arc<Self>) -> Pass {
        loop {
            let mut woken = pin!(self.wake.notified());
            // Before the look, so that a leaving request between the two is not missed.
            let _ = woken.as_mut().enable();
            let pause = {
                let mut state = self.state();
                let pause = state.not_before.filter(|until| *until > Instant::now());
                if pause.is_none() && f64::from(state.running) < state.allowed.floor() {
                    state.running += 1;
                    return Pass { gate: self.clone() };
                }
                pause
            };
            match pause {
                Some(until) => tokio::time::sleep_until(until).await,
                None => woken.await,
            }
        }
    }

    /// The store throttles: fewer at once from here on, and none before `pause` is over.
    pub(super) fn throttled(&self, pause: Option<Duration>) {
        let now = Instant::now();
        let mut state = self.state();
        state.requests.throttled += 1;
        if state.last_cut.is_none_or(|cut| now.duration_since(cut) >= BURST) {
            state.allowed = (state.allowed / 2.0).max(1.0);
            state.last_cut = Some(now);
        }
        if let Some(pause) = pause {
            let until = now + pause.min(LONGEST_PAUSE);
            state.not_before = Some(state.not_before.map_or(until, |other| other.max(until)));
        }
    }

    /// A request succeeded: the store may bear a little more.
    pub(super) fn succeeded(&self) {
        let most = f64::from(self.limits.requests.max(1));
        let mut state = self.state();
        if state.allowed < most {
            state.allowed = (state.allowed + 1.0 / state.allowed).min(most);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Waits until `bytes` may be sent.
    pub(super) async fn upload(&self, bytes: u64) {
        let Some(rate) = self.limits.upload else { return };
        let until = reserve(&mut self.state().upload_free, bytes, rate);
        tokio::time::sleep_until(until).await;
    }

    /// Waits as long as `bytes` should have taken to come.
    pub(super) async fn download(&self, bytes: u64) {
        let Some(rate) = self.limits.download else { return };
        let until = reserve(&mut self.state().download_free, bytes, rate) + time_of(bytes, rate);
        tokio::time::sleep_until(until).await;
    }

    pub(super) fn count(&self, verb: Verb) {
        let mut state = self.state();
        let requests = &mut state.requests;
        let counter = match verb {
            Verb::Put => &mut requests.put,
            Verb::Get => &mut requests.get,
            Verb::Head => &mut requests.head,
            Verb::List => &mut requests.list,
            Verb::Delete => &mut requests.delete,
            Verb::Other => &mut requests.other,
        };
        *counter += 1;
    }

    pub(super) fn count_retry(&self) {
        self.state().requests.retried += 1;
    }

    pub(super) fn count_bytes(&self, sent: u64, received: u64) {
        let mut state = self.state();
        state.requests.bytes_sent += sent;
        state.requests.bytes_received += received;
    }

    pub(super) fn requests(&self) -> Requests {
        self.state().requests
    }

    /// Remembers how far the store's clock is ahead of this machine's.
    pub(super) fn note_clock(&self, ahead_millis: i64) {
        self.state().ahead = Some(ahead_millis);
    }

    /// How far the store's clock is ahead of this machine's, in milliseconds, as its last answer said; to a second.
    pub(super) fn clock_ahead(&self) -> Option<i64> {
        self.state().ahead
    }
}

/// The right to run one request.
#[derive(Debug)]
pub(super) struct Pass {
    gate: Arc<Gate>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.running = state.running.saturating_sub(1);
        drop(state);
        self.gate.wake.notify_one();
    }
}

/// Takes the next free stretch of a line that carries `rate` bytes a second; gives its beginning.
fn reserve(free: &mut Option<Instant>, bytes: u64, rate: u64) -> Instant {
    let now = Instant::now();
    let start = free.map_or(now, |free| free.max(now));
    *free = Some(start + time_of(bytes, rate));
    start
}

fn time_of(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(requests: u32) -> Arc<Gate> {
        Arc::new(Gate::new(Limits { requests, ..Limits::default() }))
    }

    async fn passes(gate: &Arc<Gate>) -> Vec<Pass> {
        let mut passes = Vec::new();
        while let Ok(pass) = tokio::time::timeout(Duration::from_millis(1), gate.enter()).await {
            passes.push(pass);
        }
        passes
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_throttles_gets_fewer_at_once_and_more_again_later() {
        let gate = gate(16);
        assert_eq!(passes(&gate).await.len(), 16);
        for _ in 0..50 {
            gate.throttled(None);
        }
        assert_eq!(passes(&gate).await.len(), 8, "one burst counts once");
        tokio::time::sleep(BURST).await;
        gate.throttled(None);
        assert_eq!(passes(&gate).await.len(), 4);
        for _ in 0..200 {
            gate.succeeded();
        }
        assert_eq!(passes(&gate).await.len(), 16);
        for _ in 0..20 {
            tokio::time::sleep(BURST).await;
            gate.throttled(None);
        }
        assert_eq!(passes(&gate).await.len(), 1, "one always runs");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_sent_before_the_pause_that_the_store_asked_for_is_over() {
        let gate = gate(4);
        let begun = Instant::now();
        gate.throttled(Some(Duration::from_secs(7)));
        drop(gate.enter().await);
        assert_eq!(begun.elapsed().as_secs(), 7);
        gate.throttled(Some(Duration::from_secs(86_400)));
        drop(gate.enter().await);
        assert!(begun.elapsed() <= Duration::from_secs(7) + LONGEST_PAUSE + Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_let_in_when_another_leaves() {
        let gate = gate(2);
        let (first, second) = (gate.enter().await, gate.enter().await);
        let waiters: Vec<_> = (0..10)
            .map(|_| {
                tokio::spawn({
                    let gate = gate.clone();
                    async move { drop(gate.enter().await) }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        drop(first);
        for waiter in waiters {
            tokio::time::timeout(Duration::from_secs(1), waiter).await.unwrap().unwrap();
        }
        drop(second);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_flow_at_the_rate_that_is_allowed() {
        let gate = Gate::new(Limits { requests: 4, upload: Some(1000), download: Some(500) });
        let begun = Instant::now();
        for _ in 0..5 {
            gate.upload(1000).await;
        }
        assert_eq!(begun.elapsed().as_secs(), 4, "the fifth begins when four are through");
        let begun = Instant::now();
        gate.download(1000).await;
        gate.download(1000).await;
        assert_eq!(begun.elapsed().as_secs(), 4);
    }
}
