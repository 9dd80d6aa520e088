//! The pgvault engine.

pub mod clock;
pub mod crypto;
pub mod env;
pub mod error;
pub mod format;
pub mod postgres;
pub mod vault;

pub use error::{Error, ErrorKind, Result};
