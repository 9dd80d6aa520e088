//! Write-ahead log in the vault: how it gets in, what is there, how it gets out.
//!
//! ```text
//! archive_command -> push --\                            -> fetch -> restore_command
//!                            object -> vault -> catalog
//! replication slot -> stream /                            -> prefetch -> cache -> restore_command
//! ```
//!
//! A segment is one create-only object; a segment that is still open, or too large for one object, is a row of parts.

pub mod assemble;
pub mod catalog;
pub mod deposit;
pub mod fetch;
pub mod gap;
pub mod object;
pub mod prefetch;
pub mod push;
pub mod spool;
pub mod stream;
pub mod take;
pub mod verify;

#[cfg(test)]
mod testdata;
