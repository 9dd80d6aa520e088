//! Rows counted beside a backup, what the WAL says about them later, and both against a real PostgreSQL.
//!
//! - `place`: a cluster, its vault in memory, its WAL.
//! - `counting`: what a manifest's census has in it, and what it leaves out.
//! - `records`: what [`pgvault_core::postgres::wal::Touched`] says about each kind of statement, and against `pg_waldump`.
//! - `rounds`: random writers, backups, and restored copies whose counts must be explained.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod counting;
mod place;
mod records;
mod rounds;
