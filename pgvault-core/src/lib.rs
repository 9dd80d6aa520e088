//! The pgvault engine.

pub mod clock;
pub mod error;
pub mod postgres;

pub use error::{Error, ErrorKind, Result};
