//! `global/pg_control`: who a cluster is and where its recovery starts.
//!
//! The server rewrites the file in place, so a reader of a running cluster may see half of one version and half of the next. The
//! CRC tells: [`ControlFileError::Torn`] asks for another read (T13), every other error is final.
//!
//! Layouts: `ControlFileData` and `CheckPoint` in `src/include/catalog/pg_control.h`. Only these things moved since 13:
//!
//! | `PG_CONTROL_VERSION` | PostgreSQL | what changed in the fields read here |
//! |---|---|---|
//! | 1300 | 13 to 16 | |
//! | 1700 | 17 | `CheckPoint.wal_level` fills what was padding |
//! | 1800 | 18 | `default_char_signedness` moves the CRC |
//! | 1902 | 19 beta | `CheckPoint` grows by 8 bytes (64-bit multixact offsets), `slru_pages_per_segment` follows `relseg_size` |
//! | 1905 | 19 rc1 | a second word about checksums follows `data_checksum_version` and moves the CRC |
//!
//! The offsets are those of 64-bit platforms, where 8-byte integers are aligned to 8; `maximum data alignment` is checked.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::bytes::{i32_at, i64_at, u32_at, u64_at};
use super::{Lsn, ParseError, SegmentSize, SystemId, TimelineId};

const WHAT: &str = "pg_control";

/// Where `ControlFileData.checkPoint` stands in every version.
const CHECKPOINT_OFFSET: usize = 32;

/// Where `ControlFileData.checkPointCopy` begins in every version.
const CHECKPOINT_COPY_OFFSET: usize = 40;

/// What [`invalidate_checkpoint`] writes: a position in the first segment, which no cluster has (WAL begins with the second).
const DEAD: Lsn = Lsn(0xDEAD);

/// Why a control file could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlFileError {
    /// The CRC does not match: the file was being written while it was read, or it is damaged. Read it again before believing
    /// the latter (T13).
    #[error("pg_control: CRC is {stored:08X} but the contents give {computed:08X} (read while it was written, or damaged)")]
    Torn {
        /// The CRC in the file.
        stored: u32,
        /// The CRC of what was read.
        computed: u32,
    },
    /// A format this version of pgvault does not know; also what a cluster of a big-endian machine looks like.
    #[error("pg_control: format {version} is not one of PostgreSQL 15 to 19")]
    Unsupported {
        /// `pg_control_version` as read.
        version: u32,
    },
    /// Bytes that no PostgreSQL writes.
    #[error(transparent)]
    Invalid(#[from] ParseError),
}

impl ControlFileError {
    /// True when reading the file again may succeed.
    pub fn is_torn(&self) -> bool {
        matches!(self, Self::Torn { .. })
    }
}

/// What the server was doing when it last wrote `pg_control` (`DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DbState {
    /// Before the first start.
    StartingUp,
    /// Stopped cleanly.
    ShutDown,
    /// Stopped cleanly while it was a standby or recovering.
    ShutDownInRecovery,
    /// Stopping.
    ShuttingDown,
    /// Replaying its own WAL after a crash.
    InCrashRecovery,
    /// Replaying archived or streamed WAL.
    InArchiveRecovery,
    /// Running, or crashed while it ran.
    InProduction,
}

impl DbState {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::StartingUp,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }

    /// True when the data directory is consistent without any replay.
    pub fn is_shut_down(self) -> bool {
        matches!(self, Self::ShutDown | Self::ShutDownInRecovery)
    }
}

/// The words of `pg_controldata`.
impl fmt::Display for DbState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// The `wal_level` the server ran with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalLevel {
    /// WAL that neither a base backup nor a standby can use.
    Minimal,
    /// What physical backup needs.
    Replica,
    /// `replica`, and what logical decoding needs.
    Logical,
}

/// The fields of `pg_control` that a backup or a restore depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The identity `initdb` gave the cluster.
    pub system_identifier: SystemId,
    /// The format of the file.
    pub pg_control_version: u32,
    /// The format of the system catalogs; part of the names of tablespace directories.
    pub catalog_version: u32,
    /// What the server was doing.
    pub state: DbState,
    /// Where the last checkpoint record is.
    pub checkpoint: Lsn,
    /// Where replay from that checkpoint begins.
    pub checkpoint_redo: Lsn,
    /// The timeline of the checkpoint.
    pub checkpoint_timeline: TimelineId,
    /// The timeline before it; the same unless the checkpoint began a timeline.
    pub checkpoint_previous_timeline: TimelineId,
    /// When the checkpoint was made, to the second.
    pub checkpoint_time: Timestamp,
    /// Recovery must reach this before the cluster is consistent; [`Lsn::INVALID`] outside archive recovery.
    pub min_recovery_point: Lsn,
    /// The timeline of `min_recovery_point`, if that is set.
    pub min_recovery_point_timeline: Option<TimelineId>,
    /// The redo position of the backup that is being recovered; [`Lsn::INVALID`] otherwise.
    pub backup_start_point: Lsn,
    /// The end of the backup of a standby that is being recovered; [`Lsn::INVALID`] otherwise.
    pub backup_end_point: Lsn,
    /// True when an end-of-backup record must be replayed before the cluster is consistent.
    pub backup_end_required: bool,
    /// The `wal_level` at the last start.
    pub wal_level: WalLevel,
    /// Whether commits carry their time in `pg_commit_ts` too.
    pub track_commit_timestamp: bool,
    /// Bytes of a page.
    pub block_size: u32,
    /// Pages of a file before a relation continues in the next one.
    pub relation_segment_blocks: u32,
    /// Bytes of a page of WAL.
    pub wal_block_size: u32,
    /// Bytes of a WAL segment.
    pub wal_segment_size: SegmentSize,
    /// `data_checksum_version`; see [`ControlFile::has_checksums`].
    pub data_checksum_version: u32,
}

impl ControlFile {
    /// Reads the contents of `global/pg_control`.
    ///
    /// # Errors
    /// [`ControlFileError::Torn`] when the CRC does not match, which another read may cure; otherwise the file is of an unknown
    /// version or not a control file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlFileError> {
        let layout = checked_layout(bytes)?;
        layout.read(bytes)
    }

    /// True when every page carries a checksum.
    ///
    /// PostgreSQL 19 switches checksums while it runs and stores 2 and 3 meanwhile: some pages have one, so none can be judged.
    pub fn has_checksums(&self) -> bool {
        self.data_checksum_version == 1
    }
}

/// Makes a control file point to a checkpoint that cannot exist, and corrects its CRC.
///
/// A restored cluster must recover from `backup_label`. If somebody deletes that file, PostgreSQL starts from the checkpoint in
/// `pg_control`, which may be later than the backup's start: it would come up, silently corrupt. With this the start fails instead
/// (T12). With `backup_label` in place PostgreSQL takes the position from there and never looks at this one.
///
/// # Errors
/// Those of [`ControlFile::parse`]; the bytes are unchanged then.
pub fn invalidate_checkpoint(bytes: &mut [u8]) -> Result<(), ControlFileError> {
    let layout = checked_layout(bytes)?;
    layout.read(bytes)?;
    let mut put = |offset: usize, value: &[u8]| {
        if let Some(place) = bytes.get_mut(offset..offset + value.len()) {
            place.copy_from_slice(value);
        }
    };
    put(CHECKPOINT_OFFSET, &DEAD.0.to_le_bytes());
    let crc = layout.crc(bytes).ok_or_else(short)?;
    if let Some(place) = bytes.get_mut(layout.crc_offset..layout.crc_offset + 4) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
    Ok(())
}

/// The offsets that differ between versions.
struct Layout {
    /// `CheckPoint.time`.
    checkpoint_time: usize,
    /// `ControlFileData.unloggedLSN`, the first field after the copy of the checkpoint.
    after_checkpoint: usize,
    /// `ControlFileData.xlog_blcksz`.
    wal_block_size: usize,
    /// `ControlFileData.crc`, the last field.
    crc_offset: usize,
}

impl Layout {
    fn of(version: u32) -> Option<Self> {
        Some(match version {
            1300 | 1700 => Self { checkpoint_time: 104, after_checkpoint: 128, wal_block_size: 224, crc_offset: 288 },
            1800 => Self { checkpoint_time: 104, after_checkpoint: 128, wal_block_size: 224, crc_offset: 292 },
            1902 => Self { checkpoint_time: 112, after_checkpoint: 136, wal_block_size: 236, crc_offset: 304 },
            1905 => Self { checkpoint_time: 112, after_checkpoint: 136, wal_block_size: 236, crc_offset: 308 },
            _ => return None,
        })
    }

    fn crc(&self, bytes: &[u8]) -> Option<u32> {
        bytes.get(..self.crc_offset).map(crc32c::crc32c)
    }

    fn read(&self, bytes: &[u8]) -> Result<ControlFile, ControlFileError> {
        let u32_of = |offset| u32_at(bytes, offset).ok_or_else(short);
        let lsn_of = |offset| u64_at(bytes, offset).map(Lsn).ok_or_else(short);
        let bool_of = |offset: usize| bytes.get(offset).map(|b| *b != 0).ok_or_else(short);
        let invalid = |why: String| ControlFileError::Invalid(ParseError::new(WHAT, why));

        let after = self.after_checkpoint;
        let alignment = u32_of(after + 76)?;
        let float_format = u64_at(bytes, after + 80).map(f64::from_bits).ok_or_else(short)?;
        if alignment != 8 || float_format.to_bits() != 1_234_567.0_f64.to_bits() {
            return Err(invalid(format!(
                "data alignment {alignment} and float format {float_format} are not of a 64-bit platform"
            )));
        }

        let state = u32_of(16)?;
        let state = DbState::from_number(state).ok_or_else(|| invalid(format!("unknown cluster state {state}")))?;
        let wal_level = match i32_at(bytes, after + 44).ok_or_else(short)? {
            0 => WalLevel::Minimal,
            1 => WalLevel::Replica,
            2 => WalLevel::Logical,
            other => return Err(invalid(format!("unknown wal_level {other}"))),
        };
        let time = i64_at(bytes, self.checkpoint_time).ok_or_else(short)?;
        let checkpoint_time = Timestamp::from_second(time).map_err(|e| invalid(format!("checkpoint time {time}: {e}")))?;

        let block_size = u32_of(after + 88)?;
        let wal_block_size = u32_of(self.wal_block_size)?;
        // The ranges of configure's --with-blocksize and --with-wal-blocksize.
        if !block_size.is_power_of_two() || !(1 << 10..=32 << 10).contains(&block_size) {
            return Err(invalid(format!("block size {block_size} is not a power of two from 1 KiB to 32 KiB")));
        }
        if !wal_block_size.is_power_of_two() || !(1 << 10..=64 << 10).contains(&wal_block_size) {
            return Err(invalid(format!("WAL block size {wal_block_size} is not a power of two from 1 KiB to 64 KiB")));
        }
        let relation_segment_blocks = u32_of(after + 92)?;
        if relation_segment_blocks == 0 {
            return Err(invalid("relation segments of 0 blocks".to_owned()));
        }

        Ok(ControlFile {
            system_identifier: SystemId(u64_at(bytes, 0).ok_or_else(short)?),
            pg_control_version: u32_of(8)?,
            catalog_version: u32_of(12)?,
            state,
            checkpoint: lsn_of(CHECKPOINT_OFFSET)?,
            checkpoint_redo: lsn_of(CHECKPOINT_COPY_OFFSET)?,
            checkpoint_timeline: TimelineId(u32_of(CHECKPOINT_COPY_OFFSET + 8)?),
            checkpoint_previous_timeline: TimelineId(u32_of(CHECKPOINT_COPY_OFFSET + 12)?),
            checkpoint_time,
            min_recovery_point: lsn_of(after + 8)?,
            min_recovery_point_timeline: Some(u32_of(after + 16)?).filter(|t| *t > 0).map(TimelineId),
            backup_start_point: lsn_of(after + 24)?,
            backup_end_point: lsn_of(after + 32)?,
            backup_end_required: bool_of(after + 40)?,
            wal_level,
            track_commit_timestamp: bool_of(after + 72)?,
            block_size,
            relation_segment_blocks,
            wal_block_size,
            wal_segment_size: SegmentSize::try_from(u32_of(self.wal_block_size + 4)?)?,
            data_checksum_version: u32_of(self.wal_block_size + 28)?,
        })
    }
}

fn short() -> ControlFileError {
    ControlFileError::Invalid(ParseError::new(WHAT, "the file is too short"))
}

/// The layout of a file whose CRC is right.
fn checked_layout(bytes: &[u8]) -> Result<Layout, ControlFileError> {
    let version = u32_at(bytes, 8).ok_or_else(short)?;
    let layout = Layout::of(version).ok_or(ControlFileError::Unsupported { version })?;
    let stored = u32_at(bytes, layout.crc_offset).ok_or_else(short)?;
    let computed = layout.crc(bytes).ok_or_else(short)?;
    if stored == computed { Ok(layout) } else { Err(ControlFileError::Torn { stored, computed }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: &[u8] = include_bytes!("../../../testdata/postgres/pg_control.15");
    const PRINTED: &str = include_str!("../../../testdata/postgres/pg_controldata.15.txt");

    fn printed(key: &str) -> &'static str {
        PRINTED.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).unwrap().trim()
    }

    fn seal(bytes: &mut [u8]) {
        let layout = Layout::of(u32_at(bytes, 8).unwrap()).unwrap();
        let crc = layout.crc(bytes).unwrap();
        bytes[layout.crc_offset..layout.crc_offset + 4].copy_from_slice(&crc.to_le_bytes());
    }

    #[test]
    fn a_real_control_file_reads_as_pg_controldata_prints_it() {
        let control = ControlFile::parse(REAL).unwrap();
        assert_eq!(control.system_identifier.to_string(), printed("Database system identifier"));
        assert_eq!(control.pg_control_version.to_string(), printed("pg_control version number"));
        assert_eq!(control.catalog_version.to_string(), printed("Catalog version number"));
        assert_eq!(control.state.to_string(), printed("Database cluster state"));
        assert!(control.state.is_shut_down());
        assert_eq!(control.checkpoint.to_string(), printed("Latest checkpoint location"));
        assert_eq!(control.checkpoint_redo.to_string(), printed("Latest checkpoint's REDO location"));
        assert_eq!(control.checkpoint_timeline.to_string(), printed("Latest checkpoint's TimeLineID"));
        assert_eq!(control.checkpoint_previous_timeline.to_string(), printed("Latest checkpoint's PrevTimeLineID"));
        let time = control.checkpoint_time.strftime("%a %b %d %H:%M:%S %Y").to_string();
        assert_eq!(time, printed("Time of latest checkpoint"));
        assert_eq!(control.min_recovery_point.to_string(), printed("Minimum recovery ending location"));
        assert_eq!(control.min_recovery_point_timeline, None);
        assert_eq!(control.backup_start_point.to_string(), printed("Backup start location"));
        assert_eq!(control.backup_end_point.to_string(), printed("Backup end location"));
        assert!(!control.backup_end_required);
        assert_eq!(control.wal_level, WalLevel::Replica);
        assert!(control.track_commit_timestamp);
        assert_eq!(control.block_size.to_string(), printed("Database block size"));
        assert_eq!(control.relation_segment_blocks.to_string(), printed("Blocks per segment of large relation"));
        assert_eq!(control.wal_block_size.to_string(), printed("WAL block size"));
        assert_eq!(control.wal_segment_size.bytes().to_string(), printed("Bytes per WAL segment"));
        assert_eq!(control.data_checksum_version.to_string(), printed("Data page checksum version"));
        assert!(control.has_checksums());
    }

    /// T13: a reader that meets a half-written file must be able to tell that from a foreign one.
    #[test]
    fn t13_a_torn_read_is_told_apart_and_worth_a_retry() {
        let mut torn = REAL.to_vec();
        torn[CHECKPOINT_OFFSET] ^= 1;
        assert!(ControlFile::parse(&torn).unwrap_err().is_torn());
        let mut foreign = REAL.to_vec();
        foreign[8..12].copy_from_slice(&1100u32.to_le_bytes());
        assert_eq!(ControlFile::parse(&foreign), Err(ControlFileError::Unsupported { version: 1100 }));
        assert!(!ControlFile::parse(&REAL[..200]).unwrap_err().is_torn());
        assert!(!ControlFile::parse(b"").unwrap_err().is_torn());
    }

    /// T12: only the position of the checkpoint changes, and the CRC is right again.
    #[test]
    fn t12_an_invalidated_checkpoint_leaves_everything_else() {
        let mut bytes = REAL.to_vec();
        invalidate_checkpoint(&mut bytes).unwrap();
        let mut expected = ControlFile::parse(REAL).unwrap();
        expected.checkpoint = Lsn(0xDEAD);
        assert_eq!(ControlFile::parse(&bytes).unwrap(), expected);
        assert_eq!(bytes.len(), REAL.len());
        let again = bytes.clone();
        invalidate_checkpoint(&mut bytes).unwrap();
        assert_eq!(bytes, again);

        let mut torn = REAL.to_vec();
        torn[100] ^= 1;
        let before = torn.clone();
        assert!(invalidate_checkpoint(&mut torn).is_err());
        assert_eq!(torn, before);
    }

    /// The later layouts, made from the real file by the struct's changes: bytes inserted where the header gained fields.
    #[test]
    fn later_layouts_are_the_first_with_fields_inserted() {
        let original = ControlFile::parse(REAL).unwrap();
        let with_version = |version: u32, insertions: &[(usize, usize)]| {
            let mut bytes = REAL.to_vec();
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            for (at, count) in insertions {
                bytes.splice(at..at, std::iter::repeat_n(0, *count));
            }
            seal(&mut bytes);
            ControlFile::parse(&bytes).unwrap()
        };
        // 17: nothing moves. 18: default_char_signedness before the nonce, the CRC aligned to 4.
        // 19: logicalDecodingEnabled (4 of padding, 4 of field) before nextXid; the widened nextMultiOffset eats the old padding
        // before `time`; dataChecksumState eats the old tail padding; slru_pages_per_segment after relseg_size. 19 rc1: another word
        // behind the checksum version.
        for (version, insertions) in
            [(1700, &[][..]), (1800, &[(256, 1)]), (1902, &[(64, 8), (232, 4)]), (1905, &[(64, 8), (232, 4), (268, 4)])]
        {
            let parsed = with_version(version, insertions);
            assert_eq!(parsed, ControlFile { pg_control_version: version, ..original.clone() }, "{version}");
        }
    }

    #[test]
    fn checksums_being_switched_on_or_off_count_as_none() {
        for (version, has) in [(0u32, false), (1, true), (2, false), (3, false)] {
            let mut bytes = REAL.to_vec();
            bytes[252..256].copy_from_slice(&version.to_le_bytes());
            seal(&mut bytes);
            assert_eq!(ControlFile::parse(&bytes).unwrap().has_checksums(), has);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = ControlFile::parse(&bytes);
        }

        /// With the CRC made right, so that the fields are reached.
        #[test]
        fn any_fields_never_panic(
            version in proptest::sample::select(vec![1300u32, 1700, 1800, 1902, 1905]),
            edits in proptest::collection::vec((12usize..304, any::<u8>()), 0..16),
        ) {
            let mut bytes = REAL.to_vec();
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            for (at, value) in edits {
                bytes[at] = value;
            }
            seal(&mut bytes);
            let _ = ControlFile::parse(&bytes);
            let _ = invalidate_checkpoint(&mut bytes);
        }
    }
}
