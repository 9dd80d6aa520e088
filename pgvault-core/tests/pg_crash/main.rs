//! What is left when something goes wrong at the worst moment, over a real PostgreSQL and a store that fails on purpose.
//!
//! One program of several rooms, because they share a source and its first backup:
//!
//! - `matrix`: every operation, a fault at every request it makes.
//! - `tamper`: every kind of object, changed in every part of it. `tamper_wal`: WAL that is not in whole segments.
//!   `tamper_spaces`: packs of a backup with tablespaces.
//! - `place`: where the copies of the vault are; in memory, unless `PGVAULT_TEST_STORE` names a store.
//! - `writers`: many writers at once, keys, hostile names, clocks that run backwards.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod matrix;
mod place;
mod source;
mod tamper;
mod tamper_spaces;
mod tamper_wal;
mod writers;
