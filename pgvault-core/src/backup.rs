//! Base backups.
//!
//! ```text
//! server (BASE_BACKUP)  --\
//!                          regions -> pipeline (verify, digest, compress, seal, pack) -> store; then the manifest
//! data directory (files) --/
//! ```
//!
//! Both sources feed the same pipeline: `remote` receives one stream, `local` lets the workers read in parallel.

mod exclude;
mod file;
mod keep;
mod local;
mod packer;
mod pipeline;
mod remote;
mod run;
mod worker;

pub use run::{BackupOptions, backup};
