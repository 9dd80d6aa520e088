//! Starts restored PostgreSQL clusters and checks them.

mod checks;
pub mod drill;
mod isolation;
pub mod neutralise;
mod odoo;
mod owner;
pub mod process;
mod recovery;
pub mod report;
pub mod runner;
mod seed;
pub mod side;
mod task;
