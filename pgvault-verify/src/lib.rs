//! Starts restored PostgreSQL clusters and checks them.

pub mod process;
