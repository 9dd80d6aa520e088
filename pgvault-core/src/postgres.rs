//! What PostgreSQL's own bytes mean: positions, files and the protocol.
//!
//! The parsers here take bytes and return values; they do no I/O, never panic on any input and allocate no more than the
//! input's size. The connection modules speak to a server.

mod backup_label;
mod bytes;
mod control_file;
mod lsn;
pub mod page;
mod relation;
mod segment;
mod tablespace_map;
mod timeline_history;
pub mod wal;

pub use backup_label::{BackupFrom, BackupLabel};
pub use control_file::{ControlFile, ControlFileError, DbState, WalLevel, invalidate_checkpoint};
pub(crate) use lsn::hex8;
pub use lsn::{Lsn, SystemId, TimelineId};
pub use page::{PageHeader, PageState};
pub use relation::{Fork, PG_DEFAULT_TABLESPACE, PG_GLOBAL_TABLESPACE, RelationFile};
pub use segment::{SegmentName, SegmentSize, WalFileName, WalSegNo};
pub use tablespace_map::{TablespaceMap, TablespaceMapEntry};
pub use timeline_history::{Ancestor, TimelineHistory};
pub use wal::{SegmentHeader, SegmentScan, scan_segment, timestamp_from_pg, timestamp_to_pg};

/// Bytes that are not what PostgreSQL writes at this place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ParseError {
    /// The structure that was being read, for example `pg_control`.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl ParseError {
    /// A parse error of the structure `what`.
    pub fn new(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into() }
    }
}
