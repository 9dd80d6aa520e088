//! PGV1, the vault's bytes: headers, frames, footers, maps and tables.
//!
//! Everything here is parsing and serialising: no I/O, no keys. Each parser takes bytes that may have come from an
//! attacker, so it checks every bound, never panics and never allocates more than the input could fill.
//! `docs/format.md` describes the same bytes for someone who writes another reader.

mod cursor;
pub mod document;
pub mod file_run;
pub mod file_table;
pub mod map;
pub mod object;
pub mod pack_table;
pub mod table_index;

pub use cursor::{Cursor, put_string, put_varint};

/// Bytes in one positional block: the granule of change detection and of a file map.
///
/// Fixed at PostgreSQL's default page size and independent of a cluster's real `block_size`.
pub const BLOCK: usize = 8192;

/// Blocks in one region, the most that one data frame holds (256 KiB, docs/decisions/0002).
pub const REGION_BLOCKS: usize = 32;

/// The largest raw frame that any object may hold.
pub const MAX_FRAME: usize = 4 << 20;

/// The largest object a writer produces and a reader accepts; one PUT, no multipart.
pub const MAX_OBJECT: u64 = 64 << 20;

/// The largest file. The map of a larger one might not fit one pack (PostgreSQL's own end at 1 GiB).
pub const MAX_FILE: u64 = 32 << 30;

/// Stored bytes that do not follow the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct FormatError {
    /// The structure that was being read.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: String,
    /// True when a newer pgvault may understand it.
    pub unsupported: bool,
}

impl FormatError {
    /// A format error of the structure `what`.
    pub fn new(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into(), unsupported: false }
    }

    /// A well-formed structure of a version or with a mandatory feature that this build does not know.
    pub fn unsupported(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into(), unsupported: true }
    }
}

impl From<FormatError> for crate::Error {
    fn from(error: FormatError) -> Self {
        let (kind, code) = if error.unsupported {
            (crate::ErrorKind::Unsupported, "format.unsupported")
        } else {
            (crate::ErrorKind::Corrupt, "format.invalid")
        };
        Self::new(kind, code, error.to_string())
    }
}
