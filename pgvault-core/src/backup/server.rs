//! The server of a backup: its connections, what they say about it, and how its files come.

use jiff::Timestamp;
use ulid::Ulid;

use super::census::Counting;
use super::local;
use super::options::BackupOptions;
use super::pipeline::{Before, Output, Pipeline, Setting};
use super::remote;
use super::worker::PageRules;
use crate::format::file_table::FileEntry;
use crate::postgres::{
    BaseBackupOptions, Connection, ControlFile, Lsn, Mode, SegmentSize, ServerError, TimelineId, quote_literal, sqlstate,
};
use crate::vault::Cluster;
use crate::vault::census::Census;
use crate::vault::snapshot::Tablespace;
use crate::{Error, ErrorKind, Result};

/// What a source found, whichever it was.
pub(super) struct Copied {
    pub(super) output: Output,
    pub(super) entries: Vec<FileEntry>,
    pub(super) tablespaces: Vec<Tablespace>,
    pub(super) backup_label: String,
    pub(super) stop: Lsn,
    pub(super) finished_at: Timestamp,
    pub(super) census: Option<Census>,
    pub(super) warnings: Vec<String>,
}

/// What a copy is made with.
pub(super) struct Copying<'a> {
    pub(super) options: &'a BackupOptions,
    /// Names the packs.
    pub(super) session: Ulid,
    pub(super) before: Before,
}

/// The connections of one backup and what they say about the server.
pub(super) struct Server {
    pub(super) sql: Connection,
    pub(super) replication: Connection,
    pub(super) version: String,
    pub(super) major: u32,
    pub(super) is_standby: bool,
    pub(super) segment_size: SegmentSize,
    pub(super) block_size: u32,
    pub(super) segment_blocks: u32,
    pub(super) checksums: bool,
    pub(super) catalog_version: u32,
    pub(super) warnings: Vec<String>,
}

impl Server {
    pub(super) async fn connect(cluster: &Cluster, options: &BackupOptions) -> Result<Self> {
        let mut replication = Connection::connect(&options.connection, Mode::Replication).await?;
        let identity = replication.identify_system().await?;
        cluster.ensure_is(identity.system_id)?;
        let mut warnings = Vec::new();
        // Keeps the backup's WAL on the server until it is in the vault, whoever archives it.
        let slot = format!("pgvault_backup_{}", replication.backend_pid());
        if let Err(error) = replication.create_physical_slot(&slot, true, true).await {
            warnings.push(format!(
                "no temporary replication slot could be made ({error}); the server may remove WAL before it is archived"
            ));
        }
        let mut sql = Connection::connect(&options.connection, Mode::Sql).await?;
        // The session is idle while files are copied.
        let _ = sql
            .simple_query("SET statement_timeout = 0; SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = 0")
            .await?;
        let major = sql.server_major()?;
        if major < 15 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "source.version",
                format!("PostgreSQL {} is not supported; 15 is the oldest", sql.server_version()),
            ));
        }
        let row = sql
            .query_one(
                "SELECT pg_is_in_recovery(), current_setting('block_size'), current_setting('data_checksums'), (SELECT catalog_version_no FROM pg_control_system()), \
                 (SELECT pg_size_bytes(current_setting('segment_size')) / current_setting('block_size')::int)",
            )
            .await?;
        let number = |column: usize| -> Result<u32> {
            let text = row.required(column)?;
            text.parse().map_err(|_| {
                Error::new(
                    ErrorKind::Source,
                    "source.protocol",
                    format!("the server answered `{text}` where a number was expected"),
                )
            })
        };
        let (block_size, catalog_version, segment_blocks) = (number(1)?, number(3)?, number(4)?);
        let (is_standby, checksums) = (row.required(0)? == "t", row.required(2)? == "on");
        let segment_size = replication.wal_segment_size().await?;
        let version = sql.server_version().to_owned();
        Ok(Self {
            sql,
            replication,
            version,
            major,
            is_standby,
            segment_size,
            block_size,
            segment_blocks,
            checksums,
            catalog_version,
            warnings,
        })
    }

    /// The server's clock.
    pub(super) async fn now(&mut self) -> Result<Timestamp> {
        let row = self.sql.query_one("SELECT extract(epoch FROM clock_timestamp()) * 1000000").await?;
        let text = row.required(0)?;
        let micros = text.split('.').next().and_then(|t| t.parse::<i64>().ok());
        micros
            .and_then(|micros| Timestamp::from_microsecond(micros).ok())
            .ok_or_else(|| Error::new(ErrorKind::Source, "source.protocol", format!("the server's clock says `{text}`")))
    }

    /// True when somebody else is likely to archive the WAL: an archiver is on, or a receiver holds a slot.
    pub(super) async fn archives(&mut self) -> Result<bool> {
        let row = self
            .sql
            .query_one(
                "SELECT current_setting('archive_mode') <> 'off' AND NOT pg_is_in_recovery() \
                 OR EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary AND active)",
            )
            .await?;
        Ok(row.required(0)? == "t")
    }

    fn setting(&self, copying: &Copying<'_>, trust_wal_from: Option<Lsn>) -> Setting {
        let options = copying.options;
        let rules = PageRules {
            block_size: self.block_size,
            segment_blocks: self.segment_blocks,
            checksums: self.checksums,
            trust_wal_from,
        };
        Setting {
            rules,
            level: options.level,
            workers: options.workers,
            progress: options.progress.clone(),
            session: copying.session,
        }
    }

    pub(super) async fn copy_local(
        &mut self,
        cluster: &Cluster,
        copying: Copying<'_>,
        pgdata: &std::path::Path,
        label: &str,
    ) -> Result<Copied> {
        let options = copying.options;
        let control = local::read_control(&pgdata.join("global/pg_control")).await?;
        let control = ControlFile::parse(&control).map_err(|e| Error::new(ErrorKind::Source, "source.control", e.to_string()))?;
        if control.system_identifier != cluster.name().system_id {
            return Err(Error::new(
                ErrorKind::Source,
                "source.other_directory",
                format!(
                    "{} belongs to system identifier {}, the server to {}",
                    pgdata.display(),
                    control.system_identifier,
                    cluster.name().system_id
                ),
            )
            .with_hint("correct pgdata or connection in the configuration"));
        }
        options.progress.phase("checkpoint", None);
        let fast = !options.spread_checkpoint;
        let idle = self.sql.idle_timeout();
        self.sql.set_idle_timeout(None);
        let started = self.sql.query_one(&format!("SELECT pg_backup_start({}, fast => {fast})", quote_literal(label))).await;
        let row = started.map_err(explain_denied)?;
        self.sql.set_idle_timeout(idle);
        let start: Lsn = parse_lsn(row.required(0)?)?;
        // A copy that lags behind the server (a replica's directory with the primary's address) has the same identifier, and
        // pages that are older than where recovery would begin.
        let control = local::read_control(&pgdata.join("global/pg_control")).await?;
        let control = ControlFile::parse(&control).map_err(|e| Error::new(ErrorKind::Source, "source.control", e.to_string()))?;
        if control.checkpoint_redo < start {
            return Err(Error::new(
                ErrorKind::Source,
                "source.other_directory",
                format!("the server's backup starts at {start}, but {} is only at {}", pgdata.display(), control.checkpoint_redo),
            )
            .with_hint("pgdata belongs to another server than connection leads to, a standby of it perhaps; correct one of them"));
        }
        let counting = Counting::start(&options.connection, options.census, cluster.name().system_id, start);
        let version_directory = format!("PG_{}_{}", self.major, self.catalog_version);
        let root = pgdata.to_path_buf();
        let listing = tokio::task::spawn_blocking(move || local::list(&root, &version_directory));
        let listing = listing.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        options.progress.phase("copy", Some(listing.bytes()));
        let pipeline = Pipeline::start(cluster, self.setting(&copying, None), copying.before)?;
        let copying = local::copy(&pipeline, pgdata, &listing).await;
        let output = settle(pipeline, copying).await?;
        let census = counting.end().await;
        // The server waits for nobody here: whether the WAL is in the vault is checked in the vault.
        let row = self.sql.query_one("SELECT lsn, labelfile FROM pg_backup_stop(wait_for_archive => false)").await?;
        let (stop, backup_label) = (parse_lsn(row.required(0)?)?, row.required(1)?.to_owned());
        let finished_at = self.now().await?;
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(listing.warnings);
        Ok(Copied {
            output,
            entries: listing.entries,
            tablespaces: listing.tablespaces,
            backup_label,
            stop,
            finished_at,
            census,
            warnings,
        })
    }

    pub(super) async fn copy_remote(&mut self, cluster: &Cluster, copying: Copying<'_>, label: &str) -> Result<Copied> {
        let options = copying.options;
        options.progress.phase("checkpoint", None);
        let mut connection = Connection::connect(&options.connection, Mode::Replication).await?;
        let idle = connection.idle_timeout();
        connection.set_idle_timeout(None);
        let request = BaseBackupOptions { label: label.into(), fast_checkpoint: !options.spread_checkpoint, max_rate: None };
        cluster.ensure_is(connection.identify_system().await?.system_id)?;
        let mut stream = connection.base_backup(&request)?;
        let begun = remote::begin(&mut stream).await?;
        stream.set_idle_timeout(idle);
        let counting = Counting::start(&options.connection, options.census, cluster.name().system_id, begun.start);
        options.progress.phase("copy", Some(begun.estimate));
        let pipeline = Pipeline::start(cluster, self.setting(&copying, Some(begun.start)), copying.before)?;
        let received = remote::copy(&pipeline, &mut stream, &begun).await;
        let failed = received.as_ref().err().map(|e| Error::new(e.kind(), e.code(), e.to_string()));
        let output = settle(pipeline, failed.map_or(Ok(()), Err)).await;
        let received = received?;
        let output = output?;
        let census = counting.end().await;
        if received.stop_timeline != Some(begun.timeline) {
            return Err(promoted(begun.timeline));
        }
        let finished_at = self.now().await?;
        let mut warnings = std::mem::take(&mut self.warnings);
        if received.checksum_failures && output.bad_page_count == 0 {
            warnings.push("the server reported page checksum failures that were not seen in what it sent; look at its log".into());
        }
        Ok(Copied {
            output,
            entries: received.entries,
            tablespaces: received.tablespaces,
            backup_label: received.backup_label,
            stop: received.stop,
            finished_at,
            census,
            warnings,
        })
    }
}

/// Ends a pipeline whatever its source said; an error of the pipeline is the cause of one in the source.
async fn settle(pipeline: Pipeline, source: Result<()>) -> Result<Output> {
    let finished = pipeline.finish().await;
    match (source, finished) {
        (Ok(()), finished) => finished,
        (Err(error), Err(cause)) if error.code() == "backup.stopped" => Err(cause),
        (Err(error), _) => Err(error),
    }
}

fn explain_denied(error: Error) -> Error {
    if ServerError::of(&error).is_none_or(|e| e.sqlstate != sqlstate::INSUFFICIENT_PRIVILEGE) {
        return error;
    }
    error.with_hint(
        "as a superuser: GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO the role of the connection; \
         or back up with --source remote, for which REPLICATION is enough",
    )
}

fn promoted(timeline: TimelineId) -> Error {
    Error::new(ErrorKind::Source, "source.promoted", format!("the server left timeline {timeline} during the backup"))
        .with_hint("nothing was committed; run the backup again")
}

fn parse_lsn(text: &str) -> Result<Lsn> {
    text.parse().map_err(|e: crate::postgres::ParseError| Error::new(ErrorKind::Source, "source.protocol", e.to_string()))
}
