//! Filestores captured from a real PostgreSQL and a real directory that somebody plays Odoo on, and fetched again.
//!
//! - `place`: a site, a vault in memory, and captures of one into the other.
//! - `passes`: what passes store, notice and refuse.
//! - `histories`: random histories, and every file that a restore to any moment needs.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod histories;
mod passes;
mod place;
