//! Keys, time and randomness that are the same in every run.

use std::sync::{Arc, Mutex};

use pgvault_core::Result;
use pgvault_core::clock::FixedClock;
use pgvault_core::env::{Env, Random};

/// Bytes that anybody can compute: BLAKE3's extendable output of a seed, taken in order.
pub struct Stream(Mutex<blake3::OutputReader>);

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stream")
    }
}

impl Random for Stream {
    fn fill(&self, out: &mut [u8]) -> Result<()> {
        self.0.lock().unwrap().fill(out);
        Ok(())
    }
}

/// An environment whose clock stands and whose randomness follows from `seed`.
pub fn env(seed: &str) -> Env {
    let clock = FixedClock::new("2026-11-21T09:29:11Z".parse().unwrap());
    let stream = Stream(Mutex::new(blake3::Hasher::new().update(seed.as_bytes()).finalize_xof()));
    Env::new(Arc::new(clock), Arc::new(stream))
}
