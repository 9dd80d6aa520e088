//! Exit codes. Scripts rely on them; they are documented in `pgvault --help`.

use std::process::ExitCode;

use pgvault_core::{Error, ErrorKind};

pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
/// What `wal fetch` ends with when it cannot tell: PostgreSQL stops instead of taking it for the end of the archive.
pub(crate) const FETCH_FAILED: u8 = 255;

/// The table in `--help`.
pub(crate) const HELP: &str = "Exit codes:
  0   done
  1   failed
  2   wrong usage or configuration
  3   done, but incomplete (bad pages were found; documents lack; a drill had no room for all; a mark cannot be restored yet)
  4   verification failed: stored data is damaged or missing, or a restored copy is not harmless
  5   the recovery target lies outside what can be restored
  6   PostgreSQL cannot be reached or used
  10  there is no vault, or no such cluster in it
  11  locked by another process
  12  wrong key
  13  refused: the object is under retention
  20  trouble with the object store or the key service; try again

`wal fetch` ends with 0 (written), 1 (proven: nothing later exists) or 255 (any trouble).";

/// How a command that did not fail ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    Incomplete,
    VerificationFailed,
    /// `wal fetch`: the archive ends here.
    EndOfArchive,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(match status {
            Status::Done => 0,
            Status::EndOfArchive => 1,
            Status::Incomplete => 3,
            Status::VerificationFailed => 4,
        })
    }
}

/// The exit code of an error.
pub(crate) fn of(error: &Error) -> u8 {
    match error.kind() {
        ErrorKind::Usage => USAGE,
        ErrorKind::Corrupt | ErrorKind::Unfit => 4,
        ErrorKind::OutsideWindow => 5,
        ErrorKind::Source => 6,
        ErrorKind::NoVault => 10,
        ErrorKind::Locked => 11,
        ErrorKind::WrongKey => 12,
        ErrorKind::Immutable => 13,
        ErrorKind::Storage => 20,
        _ => FAILED,
    }
}
