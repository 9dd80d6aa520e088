//! Getting a cluster back.
//!
//! ```text
//! target -> plan (which backup, which timeline, is the WAL whole) -> files -> recovery settings -> PostgreSQL -> wal fetch
//! ```

pub mod branch;
pub mod changes;
mod delta;
mod files;
pub mod mark;
pub mod plan;
mod recovery;
mod run;
pub mod target;
pub mod window;

pub use recovery::{RestoreCommand, TargetAction};
pub use run::{RestoreOptions, Restored, restore, restore_some};
