//! What the engine takes from the outside besides data: the time and randomness.
//!
//! Both are injected, so that a test can replay a run byte for byte, stop the clock or turn it back.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use ulid::Ulid;

use crate::clock::{Clock, SystemClock};
use crate::{Error, ErrorKind, Result};

/// A source of unpredictable bytes.
pub trait Random: Send + Sync + fmt::Debug {
    /// Fills `out`.
    ///
    /// # Errors
    /// When the operating system has no randomness to give.
    fn fill(&self, out: &mut [u8]) -> Result<()>;
}

/// The operating system's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRandom;

impl Random for OsRandom {
    fn fill(&self, out: &mut [u8]) -> Result<()> {
        getrandom::fill(out)
            .map_err(|e| Error::new(ErrorKind::Failed, "random", format!("read the system's random generator: {e}")))
    }
}

/// Time, randomness and the identifiers made of both.
#[derive(Debug, Clone)]
pub struct Env {
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    last_id: Arc<Mutex<u128>>,
}

impl Default for Env {
    fn default() -> Self {
        Self::new(Arc::new(SystemClock), Arc::new(OsRandom))
    }
}

impl Env {
    /// An environment of these parts.
    pub fn new(clock: Arc<dyn Clock>, random: Arc<dyn Random>) -> Self {
        Self { clock, random, last_id: Arc::default() }
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// `N` unpredictable bytes.
    ///
    /// # Errors
    /// As [`Random::fill`].
    pub fn random<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// A new name, later than every name this environment gave before, even when the clock runs backwards (T23).
    ///
    /// # Errors
    /// As [`Random::fill`].
    pub fn new_id(&self) -> Result<Ulid> {
        let millis = u64::try_from(self.now().as_millisecond()).unwrap_or(0);
        let fresh = Ulid::from_parts(millis, u128::from_le_bytes(self.random()?)).0;
        let mut last = self.last_id.lock().unwrap_or_else(PoisonError::into_inner);
        *last = fresh.max(last.saturating_add(1));
        Ok(Ulid(*last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::FixedClock;

    /// T23: a clock that stands still or jumps back still gives unique, ordered names.
    #[test]
    fn t23_names_stay_ordered_when_the_clock_runs_backwards() {
        let clock = Arc::new(FixedClock::new("2026-10-25T01:59:59Z".parse().unwrap()));
        let env = Env::new(clock.clone(), Arc::new(OsRandom));
        let mut last = Ulid(0);
        for second in [5, 5, 3, 0, 9] {
            clock.set(Timestamp::from_second(1_700_000_000 + second).unwrap());
            for _ in 0..10 {
                let id = env.new_id().unwrap();
                assert!(id > last);
                last = id;
            }
        }
    }
}
