//! Base backups.
//!
//! ```text
//! server (BASE_BACKUP)  --\
//!                          regions -> pipeline (verify, digest, compress, seal, pack) -> store; then the manifest
//! data directory (files) --/
//! ```
//!
//! Both sources feed the same pipeline: `remote` receives one stream, `local` lets the workers read in parallel. What the backup
//! before has (`parent`), or an interrupted one has left (`leftovers`), is referred to and not stored again.

mod census;
mod entries;
mod exclude;
mod file;
pub(crate) mod keep;
mod leftovers;
mod local;
mod options;
mod parent;
mod pipeline;
mod remote;
mod run;
mod server;
mod usage;
mod worker;

pub use census::CensusOptions;
pub use options::BackupOptions;
pub use run::{Prepared, backup, prepare};
