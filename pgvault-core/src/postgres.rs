//! What PostgreSQL's own bytes mean: positions, files and the protocol.
//!
//! The parsers here take bytes and return values; they do no I/O, never panic on any input and allocate no more than the
//! input's size. The connection modules speak to a server.

mod backup_label;
mod base_backup;
mod bytes;
mod connection;
mod conninfo;
mod control_file;
mod lsn;
mod message;
pub mod page;
mod relation;
mod replication;
mod segment;
mod tablespace_map;
mod tar;
mod timeline_history;
mod tls;
pub mod wal;

pub use backup_label::{BackupFrom, BackupLabel};
pub use base_backup::{BackupEvent, BaseBackup, BaseBackupOptions, ServerTablespace};
pub use connection::{
    Connection, DEFAULT_IDLE_TIMEOUT, Mode, ResultSet, Row, quote_identifier, quote_literal, quote_replication_literal,
};
pub use conninfo::{
    ChannelBinding, ClientCert, ConnInfo, Endpoint, Host, Keepalive, RootCert, SessionAttrs, SslMode, SslNegotiation, SslSettings,
};
pub use control_file::{ControlFile, ControlFileError, DbState, WalLevel, invalidate_checkpoint};
pub(crate) use lsn::hex8;
pub use lsn::{Lsn, SystemId, TimelineId};
pub use message::{Notice, ServerError, sqlstate};
pub use page::{PageHeader, PageState};
pub use relation::{Fork, PG_DEFAULT_TABLESPACE, PG_GLOBAL_TABLESPACE, RelationFile};
pub use replication::{Acknowledgement, SlotState, SystemIdentity, TimelineHistoryFile, WalMessage, WalStream};
pub use segment::{SegmentName, SegmentSize, WalFileName, WalSegNo};
pub use tablespace_map::{TablespaceMap, TablespaceMapEntry};
pub use tar::{EntryKind, TarDecoder, TarEntry, TarEvent};
pub use timeline_history::{Ancestor, TimelineHistory};
pub use wal::{SegmentHeader, SegmentScan, SegmentScanner, scan_segment, timestamp_from_pg, timestamp_to_pg};

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
