//! Starts restored PostgreSQL clusters and checks them.

mod checks;
pub mod drill;
mod isolation;
pub mod process;
pub mod report;
pub mod runner;
mod seed;
mod task;
