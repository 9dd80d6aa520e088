//! What the database has acknowledged, kept outside of it, and what may be missing of that.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One acknowledged commit.
#[derive(Debug, Clone, Copy)]
struct Commit {
    number: u32,
    at: Instant,
    /// Acknowledged while commits waited for the vault.
    synchronous: bool,
    /// Lost as it may be, with a host that is gone: nobody expects it any more.
    written_off: bool,
}

/// Acknowledged commits of each writer, in order.
#[derive(Debug)]
pub(crate) struct Ledger {
    writers: Vec<Mutex<Vec<Commit>>>,
    /// Odd while commits wait for the vault.
    mode: AtomicU64,
}

/// Numbers of each writer's rows in some database.
pub(crate) type Rows = Vec<Vec<u32>>;

/// What a database lacks of what was acknowledged.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Commits that had waited for the vault.
    pub(crate) synchronous: usize,
    /// Others that were older than allowed.
    pub(crate) too_old: usize,
    /// Others that may be missing.
    pub(crate) allowed: usize,
    /// Age of the oldest missing one that had not waited.
    pub(crate) oldest: Duration,
}

impl Missing {
    pub(crate) fn is_loss(&self) -> bool {
        self.synchronous > 0 || self.too_old > 0
    }
}

impl Ledger {
    pub(crate) fn new(writers: usize) -> Arc<Self> {
        Arc::new(Self { writers: (0..writers).map(|_| Mutex::default()).collect(), mode: AtomicU64::new(0) })
    }

    /// Which promise holds now; to be asked before a transaction is sent.
    pub(crate) fn mode(&self) -> u64 {
        self.mode.load(Ordering::SeqCst)
    }

    /// From now on commits wait for the vault, or may no longer do so.
    pub(crate) fn set_synchronous(&self, on: bool) {
        if (self.mode() % 2 == 1) != on {
            let _ = self.mode.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A transaction that was sent under the promise `sent_under` was acknowledged.
    pub(crate) fn acknowledged(&self, writer: usize, number: u32, sent_under: u64) {
        let at = Instant::now();
        // Acknowledged under another promise than it was sent under: the weaker one counts.
        let synchronous = sent_under % 2 == 1 && self.mode() == sent_under;
        self.commits(writer).push(Commit { number, at, synchronous, written_off: false });
    }

    /// How many have waited for the vault, and how many have not.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let mut counts = (0, 0);
        for writer in 0..self.writers.len() {
            let commits = self.commits(writer);
            let synchronous = commits.iter().filter(|commit| commit.synchronous).count();
            counts = (counts.0 + synchronous, counts.1 + commits.len() - synchronous);
        }
        counts
    }

    /// What `rows` lacks of what was acknowledged until `at`, when what is not older than `allowance` may be missing.
    pub(crate) fn missing(&self, rows: &Rows, at: Instant, allowance: Duration) -> Missing {
        let mut missing = Missing::default();
        self.each_missing(rows, at, |commit| {
            let age = at.saturating_duration_since(commit.at);
            if commit.synchronous {
                missing.synchronous += 1;
            } else {
                missing.oldest = missing.oldest.max(age);
                if age > allowance {
                    missing.too_old += 1;
                } else {
                    missing.allowed += 1;
                }
            }
        });
        missing
    }

    /// What `rows` lacks is gone with its host, and not expected any more. Gives how many.
    pub(crate) fn write_off(&self, rows: &Rows, at: Instant) -> usize {
        let mut count = 0;
        self.each_missing(rows, at, |commit| {
            commit.written_off = true;
            count += 1;
        });
        count
    }

    fn each_missing(&self, rows: &Rows, at: Instant, mut visit: impl FnMut(&mut Commit)) {
        for (writer, rows) in rows.iter().enumerate() {
            let mut there = vec![false; rows.iter().max().map_or(0, |most| *most as usize + 1)];
            for row in rows {
                there[*row as usize] = true;
            }
            let mut commits = self.commits(writer);
            let lacks = |commit: &&mut Commit| !there.get(commit.number as usize).copied().unwrap_or(false);
            commits.iter_mut().filter(|commit| commit.at <= at && !commit.written_off).filter(lacks).for_each(&mut visit);
        }
    }

    fn commits(&self, writer: usize) -> MutexGuard<'_, Vec<Commit>> {
        self.writers[writer].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waited_must_be_there_and_the_rest_as_far_as_it_is_old() {
        let ledger = Ledger::new(2);
        ledger.acknowledged(0, 1, ledger.mode());
        let before = ledger.mode();
        ledger.set_synchronous(true);
        ledger.set_synchronous(true);
        ledger.acknowledged(0, 2, before);
        ledger.acknowledged(1, 1, ledger.mode());
        let during = ledger.mode();
        ledger.set_synchronous(false);
        ledger.acknowledged(1, 2, during);
        assert_eq!(ledger.counts(), (1, 3));
        let at = Instant::now() + Duration::from_secs(10);
        let none = vec![Vec::new(), Vec::new()];
        let missing = ledger.missing(&none, at, Duration::from_secs(60));
        assert_eq!((missing.synchronous, missing.too_old, missing.allowed), (1, 0, 3));
        assert!(missing.is_loss() && missing.oldest >= Duration::from_secs(10));
        let missing = ledger.missing(&vec![vec![1], vec![1]], at, Duration::from_secs(5));
        assert_eq!((missing.synchronous, missing.too_old, missing.allowed), (0, 2, 0));
        assert_eq!(ledger.write_off(&vec![vec![1], vec![1]], at), 2);
        assert_eq!(ledger.missing(&vec![vec![1], vec![1]], at, Duration::ZERO), Missing::default());
        assert!(!ledger.missing(&none, at.checked_sub(Duration::from_secs(60)).unwrap(), Duration::ZERO).is_loss());
    }
}
