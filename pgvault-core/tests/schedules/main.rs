//! Random histories of faults, thousands of them, each from a number that is printed when it finds something.
//!
//! - `requests`: single requests against a model of what a store promises.
//! - `cluster`: WAL, backups and restores over a small cluster that a server of the tests' own sends.
//!
//! `PGVAULT_TEST_FULL=1` runs 5,000 of each, `PGVAULT_TEST_SCHEDULES=n` so many, `PGVAULT_TEST_SEED=n` only that one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, reason = "a test, and its helpers panic like it")]

mod cluster;
mod requests;
mod server;

use std::ops::Range;

/// The seeds of this run.
fn seeds(quick: u64) -> Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("PGVAULT_TEST_SEED") {
        return seed..seed + 1;
    }
    let full = std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1");
    0..number("PGVAULT_TEST_SCHEDULES").unwrap_or(if full { 5000 } else { quick })
}
