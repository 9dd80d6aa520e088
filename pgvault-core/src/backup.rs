//! Base backups.

mod file;
mod packer;
mod pipeline;
mod worker;
