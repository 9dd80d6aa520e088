//! One base backup, from the session that announces it to the manifest that commits it.
//!
//! The order is the format's: session, packs, maps, WAL up to the stop position, deadline, manifest. Whatever fails before
//! the manifest leaves orphans that garbage collection removes, never a backup that does not restore.

use std::time::Duration;

use ulid::Ulid;

use super::keep;
use super::leftovers::Leftovers;
use super::options::BackupOptions;
use super::parent::Parent;
use super::pipeline::{Before, Output};
use super::server::{Copied, Copying, Server};
use crate::crypto::sealed::SealedObject;
use crate::postgres::BackupLabel;
use crate::vault::audit::{self, Event};
use crate::vault::session::{Purpose, Session};
use crate::vault::snapshot::{BackupKind, BadPage, Manifest, Snapshot, SourceKind};
use crate::vault::tables::{Limits, Tables};
use crate::vault::{Cluster, layout};
use crate::wal::take;
use crate::{Error, ErrorKind, Result};

/// Warnings that a manifest keeps.
const MAX_WARNINGS: usize = 500;

/// A warning says so when a restore would read more than this for each byte it writes.
const MAX_AMPLIFICATION: f64 = 2.5;

/// How long an archiver that works gets: it archives a segment as soon as it is complete.
const ARCHIVER_PATIENCE: Duration = Duration::from_secs(10);

/// Takes a base backup; returns its manifest once it is committed.
///
/// # Errors
/// [`ErrorKind::Source`] when the server cannot be used, [`ErrorKind::Storage`] when the store fails; nothing is committed
/// then, and the call may be repeated.
pub async fn backup(cluster: &Cluster, options: &BackupOptions) -> Result<Manifest> {
    prepare(cluster, options).await?.commit().await
}

/// A backup that is stored, but for the manifest that commits it. Dropped, it leaves what an interrupted backup leaves.
#[derive(Debug)]
pub struct Prepared {
    cluster: Cluster,
    session: Session,
    manifest: Manifest,
    object: SealedObject,
    packs: Vec<Ulid>,
}

impl Prepared {
    /// What will be committed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Commits the backup.
    ///
    /// # Errors
    /// When the store fails, or something that the backup needs has gone meanwhile, or its session's time is over.
    pub async fn commit(self) -> Result<Manifest> {
        let Self { cluster, session, manifest, object, packs } = self;
        keep::ensure(&cluster, &manifest, packs.into_iter()).await?;
        session.ensure_live(&cluster).await?;
        cluster.put_once(&object).await?;
        let id = manifest.id;
        if let Err(error) = audit::record(&cluster, Event::BackupCommitted { backup_id: id }).await {
            // The backup is committed and whole; `check` says that its record is missing.
            tracing::warn!(%error, "the backup was not recorded in the vault's audit log");
        }
        tracing::info!(backup = %id, object = %cluster.path(&layout::snapshot(id)), "backup committed");
        Ok(manifest)
    }
}

/// Takes a base backup as [`backup`] does, and stops before it is committed: the server may end, be promoted or be looked at before
/// somebody decides whether the backup is worth keeping.
///
/// # Errors
/// As [`backup`].
pub async fn prepare(cluster: &Cluster, options: &BackupOptions) -> Result<Prepared> {
    let id = cluster.env().new_id()?;
    let server = Server::connect(cluster, options).await?;
    let session = Session::begin(cluster, Purpose::Backup, id).await?;
    // Large, and not every caller's stack is.
    Box::pin(run(cluster, options, id, server, session)).await
}

async fn run(cluster: &Cluster, options: &BackupOptions, id: Ulid, mut server: Server, session: Session) -> Result<Prepared> {
    let label = format!("pgvault {id}");
    let started_at = server.now().await?;
    let source = if options.pgdata.is_some() { SourceKind::Local } else { SourceKind::Remote };
    // Only now, after the session was announced: what they refer to is safe until its deadline.
    let before = if options.full {
        Before::default()
    } else {
        Before { parent: Parent::find(cluster).await?, leftovers: Leftovers::find(cluster, &session).await? }
    };
    let copying = Copying { options, session: session.id, before };
    let Copied { output, entries, tablespaces, backup_label, stop, finished_at, census, mut warnings } = match &options.pgdata {
        Some(pgdata) => server.copy_local(cluster, copying, pgdata, &label).await?,
        None => server.copy_remote(cluster, copying, &label).await?,
    };
    let parsed = BackupLabel::parse(backup_label.as_bytes())
        .map_err(|e| Error::new(ErrorKind::Source, "source.label", format!("the server's {e}")))?;
    let timeline = parsed.timeline;
    let Output { bad_pages, bad_page_count, .. } = &output;
    if options.strict && *bad_page_count > 0 {
        return Err(bad_pages_refused(bad_pages, *bad_page_count));
    }
    if *bad_page_count > bad_pages.len() as u64 {
        warnings.push(format!("{bad_page_count} pages are bad; the first {} are listed", bad_pages.len()));
    }
    if output.restore_amplification > MAX_AMPLIFICATION {
        warnings.push(format!(
            "a restore reads {:.1} times what it writes, because the pages of this backup are spread over those before it; `pgvault backup --full` puts them together",
            output.restore_amplification
        ));
    }
    warnings.extend(output.warnings);
    cut(&mut warnings);
    options.progress.phase("wal", None);
    let patience = match options.archive_patience {
        Some(patience) => patience,
        None if server.archives().await? => ARCHIVER_PATIENCE,
        None => Duration::ZERO,
    };
    take::ensure(cluster, &mut server.replication, server.segment_size, timeline, parsed.start_lsn, stop, patience).await?;

    let mut table = output.entries;
    for entry in &entries {
        table.push(entry);
    }
    table.sort();
    let tables = Tables::store(cluster, &output.packs, table.into_chunks(), Limits::default()).await?;
    let table_packs = tables.packs().count() as u64;
    let mut manifest = Manifest {
        id,
        kind: if output.parent.is_some() { BackupKind::Incremental } else { BackupKind::Full },
        parent: output.parent,
        source,
        cluster: cluster.name().name.clone(),
        system_id: cluster.name().system_id,
        server_version: server.version.clone(),
        major: server.major,
        from_standby: server.is_standby,
        timeline,
        start_lsn: parsed.start_lsn,
        stop_lsn: stop,
        started_at: options.as_of.map_or(started_at, |as_of| as_of.min(started_at)),
        finished_at: options.as_of.unwrap_or(finished_at),
        wal_segment_size: server.segment_size,
        block_size: server.block_size,
        data_checksums: server.checksums,
        backup_label,
        tablespaces,
        bad_pages: output.bad_pages,
        labels: options.labels.clone(),
        warnings,
        census,
        files: output.files,
        source_bytes: output.bytes,
        changed_bytes: output.changed_bytes,
        stored_bytes: output.stored_bytes + tables.packs().map(|pack| pack.size).sum::<u64>(),
        restore_amplification: output.restore_amplification,
        objects_put: output.new_packs + table_packs + 1,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    // The manifest counts itself. With its own size in it, it is some bytes longer or shorter than it says.
    manifest.stored_bytes += Snapshot { manifest: &manifest, tables: &tables }.seal(cluster)?.bytes.len() as u64;
    let object = Snapshot { manifest: &manifest, tables: &tables }.seal(cluster)?;
    let needed = output.packs.iter().chain(tables.packs());
    let packs = needed.map(|pack| Ulid::from_bytes(pack.id)).collect();
    Ok(Prepared { cluster: cluster.clone(), session, manifest, object, packs })
}

/// Cuts a list of warnings to what somebody may still read: the manifest's JSON has to fit into one frame.
fn cut(warnings: &mut Vec<String>) {
    if let Some(more) = warnings.len().checked_sub(MAX_WARNINGS).filter(|more| *more > 0) {
        warnings.truncate(MAX_WARNINGS);
        warnings.push(format!("and {more} more"));
    }
}

fn bad_pages_refused(pages: &[BadPage], count: u64) -> Error {
    let named: Vec<String> = pages.iter().take(5).map(|p| format!("{} block {} ({})", p.path, p.block, p.reason)).collect();
    Error::new(ErrorKind::Corrupt, "backup.bad_pages", format!("{count} pages of the source are damaged: {}", named.join(", ")))
        .with_hint("nothing was committed; repair the relations, or back up without --strict to keep what is there")
}
