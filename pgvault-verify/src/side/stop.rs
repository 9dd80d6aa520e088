//! Whether a paused server may be stopped with a checkpoint.
//!
//! A server that stops in recovery notes the last checkpoint that it has replayed, and goes on from there. That of a server that was shut
//! down ends exactly where it is: replay goes on *behind* it. When that record is the target itself, the next start does not meet it
//! again; it would replay one record too many, or end because the WAL ends before the target. Then the server is ended at once instead,
//! and repeats some replay.

use std::fs;
use std::path::Path;

use pgvault_core::postgres::wal::Records;
use pgvault_core::postgres::{SegmentName, SegmentSize, WalSegNo};
use pgvault_core::restore::plan::{Plan, Stop};

/// True when the record at the target is, or may be, the checkpoint of a server that was shut down.
pub(super) fn ends_at_checkpoint(plan: &Plan, pgdata: &Path, size: SegmentSize) -> bool {
    let Stop::Lsn { lsn, inclusive: true } = plan.stop else { return false };
    let number = WalSegNo::containing(lsn, size);
    // The segment lies where recovery has put it; on a branch that was left, under the name of its parent.
    let folder = pgdata.join("pg_wal");
    let Ok(entries) = fs::read_dir(&folder) else { return true };
    for entry in entries.flatten() {
        let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<SegmentName>().ok()) else { continue };
        if name.segment_number(size) != Ok(number) {
            continue;
        }
        let Ok(bytes) = fs::read(entry.path()) else { continue };
        let Ok(mut records) = Records::new(&bytes, number.start(size), size) else { continue };
        if let Some(record) = records.find(|record| record.lsn >= lsn)
            && record.lsn == lsn
        {
            return record.is_shutdown_checkpoint();
        }
    }
    true
}
