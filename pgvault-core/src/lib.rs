//! The pgvault engine.

pub mod backup;
pub mod clock;
pub mod config;
pub mod crypto;
pub mod env;
pub mod error;
pub mod format;
pub mod postgres;
pub mod progress;
pub mod restore;
#[cfg(feature = "testing")]
pub mod testing;
pub mod vault;
pub mod wal;

pub use error::{Error, ErrorKind, Result};
