//! How far the vault is behind the server, in time.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use crate::postgres::Lsn;

/// Positions seen within this time count as one.
const STEP: Duration = Duration::from_millis(20);

/// Positions that are remembered; beyond, the newest are told apart no more.
const MOST: usize = 4096;

/// When the server was first seen at which position that is not durable yet.
#[derive(Debug, Default)]
pub(super) struct Lag(VecDeque<(Lsn, Timestamp)>);

impl Lag {
    /// The server's WAL reaches to `end`.
    pub(super) fn add(&mut self, end: Lsn, now: Timestamp) {
        let full = self.0.len() >= MOST;
        match self.0.back_mut() {
            Some((last, _)) if end <= *last => {}
            Some((last, first)) if full || now.duration_since(*first).unsigned_abs() < STEP => *last = end,
            _ => self.0.push_back((end, now)),
        }
    }

    /// Forgets what is durable; gives how long the oldest of it had to wait.
    pub(super) fn remove(&mut self, durable: Lsn, now: Timestamp) -> Duration {
        let mut waited = Duration::ZERO;
        while let Some((_, seen)) = self.0.front().filter(|(end, _)| *end <= durable) {
            waited = waited.max(now.duration_since(*seen).unsigned_abs());
            let _ = self.0.pop_front();
        }
        waited
    }

    /// Since when the vault has not had everything.
    pub(super) fn since(&self) -> Option<Timestamp> {
        self.0.front().map(|(_, seen)| *seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_is_not_durable_counts() {
        let at = |millis: i64| Timestamp::from_millisecond(1_800_000_000_000 + millis).unwrap();
        let mut lag = Lag::default();
        assert_eq!(lag.since(), None);
        for (end, millis) in [(100, 0), (120, 10), (300, 50), (300, 2000), (400, 3000)] {
            lag.add(Lsn(end), at(millis));
        }
        assert_eq!(lag.since(), Some(at(0)));
        assert_eq!(lag.remove(Lsn(119), at(4000)), Duration::ZERO);
        assert_eq!(lag.remove(Lsn(120), at(4000)), Duration::from_secs(4));
        assert_eq!(lag.since(), Some(at(50)));
        assert_eq!(lag.remove(Lsn(400), at(4000)), Duration::from_millis(3950));
        assert_eq!(lag.since(), None);
        for n in 0..100_000 {
            lag.add(Lsn(1000 + n), at(5000 + 30 * i64::try_from(n).unwrap()));
        }
        assert_eq!((lag.0.len(), lag.0.back().unwrap().0), (MOST, Lsn(100_999)));
    }
}
