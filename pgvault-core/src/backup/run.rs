//! One base backup, from the session that announces it to the manifest that commits it.
//!
//! The order is the format's: session, packs, maps, WAL up to the stop position, deadline, manifest. Whatever fails before
//! the manifest leaves orphans that garbage collection removes, never a backup that does not restore.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use ulid::Ulid;

use super::keep;
use super::local;
use super::pipeline::{Output, Pipeline};
use super::remote;
use super::worker::PageRules;
use crate::format::file_table::{FileEntry, Node, TableWriter};
use crate::postgres::{
    BackupLabel, BaseBackupOptions, ConnInfo, Connection, ControlFile, Lsn, Mode, SegmentSize, ServerError, TimelineId,
    quote_literal, sqlstate,
};
use crate::progress::SharedProgress;
use crate::vault::audit::{self, Event};
use crate::vault::session::{Purpose, Session};
use crate::vault::snapshot::{BackupKind, BadPage, Manifest, Snapshot, SourceKind, Tablespace};
use crate::vault::tables::{Limits, Tables};
use crate::vault::{Cluster, layout};
use crate::wal::take;
use crate::{Error, ErrorKind, Result};

/// Warnings that a manifest keeps.
const MAX_WARNINGS: usize = 500;

/// How to take a backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The server.
    pub connection: ConnInfo,
    /// The data directory, for a local source; `None` for a remote one.
    pub pgdata: Option<PathBuf>,
    /// zstd level.
    pub level: i32,
    /// Threads for the CPU work.
    pub workers: usize,
    /// What the operator attaches to the backup.
    pub labels: BTreeMap<String, String>,
    /// Fail instead of finishing with a list of bad pages.
    pub strict: bool,
    /// Wait for a spread checkpoint instead of asking for one at once.
    pub spread_checkpoint: bool,
    /// How long others get to archive the WAL of the backup before it is fetched from the server.
    pub archive_patience: Option<Duration>,
    /// Told about progress.
    pub progress: SharedProgress,
}

/// How long an archiver that works gets: it archives a segment as soon as it is complete.
const ARCHIVER_PATIENCE: Duration = Duration::from_secs(10);

/// What a source found, whichever it was.
struct Copied {
    output: Output,
    entries: Vec<FileEntry>,
    tablespaces: Vec<Tablespace>,
    backup_label: String,
    stop: Lsn,
    finished_at: Timestamp,
    warnings: Vec<String>,
}

/// Takes a base backup; returns its manifest once it is committed.
///
/// # Errors
/// [`ErrorKind::Source`] when the server cannot be used, [`ErrorKind::Storage`] when the store fails; nothing is committed
/// then, and the call may be repeated.
pub async fn backup(cluster: &Cluster, options: &BackupOptions) -> Result<Manifest> {
    let id = cluster.env().new_id()?;
    let server = Server::connect(cluster, options).await?;
    let session = Session::begin(cluster, Purpose::Backup, id).await?;
    run(cluster, options, id, server, session).await
}

async fn run(cluster: &Cluster, options: &BackupOptions, id: Ulid, mut server: Server, session: Session) -> Result<Manifest> {
    let label = format!("pgvault {id}");
    let started_at = server.now().await?;
    let source = if options.pgdata.is_some() { SourceKind::Local } else { SourceKind::Remote };
    let copied = match &options.pgdata {
        Some(pgdata) => server.copy_local(cluster, options, pgdata, &label).await?,
        None => server.copy_remote(cluster, options, &label).await?,
    };
    let parsed = BackupLabel::parse(copied.backup_label.as_bytes())
        .map_err(|e| Error::new(ErrorKind::Source, "source.label", format!("the server's {e}")))?;
    let timeline = parsed.timeline;
    let bad_page_count = copied.output.bad_page_count;
    if options.strict && bad_page_count > 0 {
        return Err(bad_pages_refused(&copied.output.bad_pages, bad_page_count));
    }
    options.progress.phase("wal", None);
    let patience = match options.archive_patience {
        Some(patience) => patience,
        None if server.archives().await? => ARCHIVER_PATIENCE,
        None => Duration::ZERO,
    };
    take::ensure(cluster, &mut server.replication, server.segment_size, timeline, parsed.start_lsn, copied.stop, patience).await?;

    let (table, files, source_bytes) = file_table(copied.entries, copied.output.entries);
    let tables = Tables::store(cluster, &copied.output.packs, table, Limits::default()).await?;
    let stored = || copied.output.packs.iter().chain(tables.packs());
    let mut warnings = copied.warnings;
    if bad_page_count > copied.output.bad_pages.len() as u64 {
        warnings.push(format!("{bad_page_count} pages are bad; the first {} are listed", copied.output.bad_pages.len()));
    }
    cut(&mut warnings);
    let manifest = Manifest {
        id,
        kind: BackupKind::Full,
        parent: None,
        source,
        cluster: cluster.name().name.clone(),
        system_id: cluster.name().system_id,
        server_version: server.version.clone(),
        major: server.major,
        from_standby: server.is_standby,
        timeline,
        start_lsn: parsed.start_lsn,
        stop_lsn: copied.stop,
        started_at,
        finished_at: copied.finished_at,
        wal_segment_size: server.segment_size,
        block_size: server.block_size,
        data_checksums: server.checksums,
        backup_label: copied.backup_label,
        tablespaces: copied.tablespaces,
        bad_pages: copied.output.bad_pages,
        labels: options.labels.clone(),
        warnings,
        files,
        source_bytes,
        changed_bytes: copied.output.changed_bytes,
        stored_bytes: stored().map(|p| p.size).sum(),
        objects_put: stored().count() as u64 + 1,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let object = Snapshot { manifest: &manifest, tables: &tables }.seal(cluster)?;
    keep::ensure(cluster, &manifest, stored().map(|pack| Ulid::from_bytes(pack.id))).await?;
    session.ensure_live(cluster).await?;
    cluster.put_once(&object).await?;
    if let Err(error) = audit::record(cluster, Event::BackupCommitted { backup_id: id }).await {
        // The backup is committed and whole; `check` says that its record is missing.
        tracing::warn!(%error, "the backup was not recorded in the vault's audit log");
    }
    tracing::info!(backup = %id, object = %cluster.path(&layout::snapshot(id)), "backup committed");
    Ok(manifest)
}

/// Cuts a list of warnings to what somebody may still read: the manifest's JSON has to fit into one frame.
fn cut(warnings: &mut Vec<String>) {
    if let Some(more) = warnings.len().checked_sub(MAX_WARNINGS).filter(|more| *more > 0) {
        warnings.truncate(MAX_WARNINGS);
        warnings.push(format!("and {more} more"));
    }
}

/// Puts directories, links and files into one sorted table.
fn file_table(mut entries: Vec<FileEntry>, files: Vec<FileEntry>) -> (Vec<Vec<u8>>, u64, u64) {
    let count = files.len() as u64;
    let bytes = files.iter().map(|f| if let Node::File { len, .. } = f.node { len } else { 0 }).sum();
    entries.extend(files);
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    entries.dedup_by(|a, b| a.path == b.path);
    let mut writer = TableWriter::default();
    for entry in &entries {
        writer.push(entry);
    }
    (writer.finish(), count, bytes)
}

fn bad_pages_refused(pages: &[BadPage], count: u64) -> Error {
    let named: Vec<String> = pages.iter().take(5).map(|p| format!("{} block {} ({})", p.path, p.block, p.reason)).collect();
    Error::new(ErrorKind::Corrupt, "backup.bad_pages", format!("{count} pages of the source are damaged: {}", named.join(", ")))
        .with_hint("nothing was committed; repair the relations, or back up without --strict to keep what is there")
}

/// The connections of one backup and what they say about the server.
struct Server {
    sql: Connection,
    replication: Connection,
    version: String,
    major: u32,
    is_standby: bool,
    segment_size: SegmentSize,
    block_size: u32,
    segment_blocks: u32,
    checksums: bool,
    catalog_version: u32,
    warnings: Vec<String>,
}

impl Server {
    async fn connect(cluster: &Cluster, options: &BackupOptions) -> Result<Self> {
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
    async fn now(&mut self) -> Result<Timestamp> {
        let row = self.sql.query_one("SELECT extract(epoch FROM clock_timestamp()) * 1000000").await?;
        let text = row.required(0)?;
        let micros = text.split('.').next().and_then(|t| t.parse::<i64>().ok());
        micros
            .and_then(|micros| Timestamp::from_microsecond(micros).ok())
            .ok_or_else(|| Error::new(ErrorKind::Source, "source.protocol", format!("the server's clock says `{text}`")))
    }

    /// True when somebody else is likely to archive the WAL: an archiver is on, or a receiver holds a slot.
    async fn archives(&mut self) -> Result<bool> {
        let row = self
            .sql
            .query_one(
                "SELECT current_setting('archive_mode') <> 'off' AND NOT pg_is_in_recovery() \
                 OR EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary AND active)",
            )
            .await?;
        Ok(row.required(0)? == "t")
    }

    fn rules(&self, trust_wal_from: Option<Lsn>) -> PageRules {
        PageRules { block_size: self.block_size, segment_blocks: self.segment_blocks, checksums: self.checksums, trust_wal_from }
    }

    async fn copy_local(
        &mut self,
        cluster: &Cluster,
        options: &BackupOptions,
        pgdata: &std::path::Path,
        label: &str,
    ) -> Result<Copied> {
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
        let version_directory = format!("PG_{}_{}", self.major, self.catalog_version);
        let root = pgdata.to_path_buf();
        let listing = tokio::task::spawn_blocking(move || local::list(&root, &version_directory));
        let listing = listing.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        options.progress.phase("copy", Some(listing.bytes()));
        let pipeline = Pipeline::start(cluster, self.rules(None), options.level, options.workers, options.progress.clone())?;
        let copying = local::copy(&pipeline, pgdata, &listing).await;
        let output = settle(pipeline, copying).await?;
        // The server waits for nobody here: whether the WAL is in the vault is checked in the vault.
        let row = self.sql.query_one("SELECT lsn, labelfile FROM pg_backup_stop(wait_for_archive => false)").await?;
        let (stop, backup_label) = (parse_lsn(row.required(0)?)?, row.required(1)?.to_owned());
        let finished_at = self.now().await?;
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(listing.warnings);
        Ok(Copied { output, entries: listing.entries, tablespaces: listing.tablespaces, backup_label, stop, finished_at, warnings })
    }

    async fn copy_remote(&mut self, cluster: &Cluster, options: &BackupOptions, label: &str) -> Result<Copied> {
        options.progress.phase("checkpoint", None);
        let mut connection = Connection::connect(&options.connection, Mode::Replication).await?;
        let idle = connection.idle_timeout();
        connection.set_idle_timeout(None);
        let request = BaseBackupOptions { label: label.into(), fast_checkpoint: !options.spread_checkpoint, max_rate: None };
        cluster.ensure_is(connection.identify_system().await?.system_id)?;
        let mut stream = connection.base_backup(&request)?;
        let begun = remote::begin(&mut stream).await?;
        stream.set_idle_timeout(idle);
        options.progress.phase("copy", Some(begun.estimate));
        let rules = self.rules(Some(begun.start));
        let pipeline = Pipeline::start(cluster, rules, options.level, options.workers, options.progress.clone())?;
        let received = remote::copy(&pipeline, &mut stream, &begun).await;
        let failed = received.as_ref().err().map(|e| Error::new(e.kind(), e.code(), e.to_string()));
        let output = settle(pipeline, failed.map_or(Ok(()), Err)).await;
        let received = received?;
        let output = output?;
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
