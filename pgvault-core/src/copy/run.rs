//! One copy, from the listing of both vaults to the last WAL.

use std::collections::{BTreeMap, BTreeSet};

use ulid::Ulid;

use super::object::{Route, is_damage};
use super::packs::{self, Shelf};
use super::wal::{Archive, Stretch};
use super::{object, records};
use crate::backup::keep;
use crate::postgres::Lsn;
use crate::progress::SharedProgress;
use crate::store::Put;
use crate::vault::audit::{self, Event, event};
use crate::vault::snapshot::{self, Manifest, OpenSnapshot};
use crate::vault::tables::{Limits, Tables};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// How to copy.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Objects that are on their way at once. Each takes about twice its size of memory: 128 MiB at most.
    pub workers: usize,
    /// Told about progress, in stored bytes.
    pub progress: SharedProgress,
}

/// Something of the source that was not copied because it cannot be read.
#[derive(Debug)]
pub struct Failed {
    /// The object, or the backup's manifest, relative to the cluster.
    pub name: String,
    /// What is wrong with it.
    pub error: Error,
}

/// What a copy has done.
#[derive(Debug, Default)]
pub struct Copied {
    /// Backups that this call has committed in the target, oldest first.
    pub backups: Vec<Ulid>,
    /// Backups that were there before.
    pub present: u64,
    /// Backups that the target's own retention has expired. They are not shipped again.
    pub expired: u64,
    /// Packs that were stored.
    pub packs: u64,
    /// WAL objects that were stored.
    pub wal: u64,
    /// Records of gaps that were stored.
    pub gaps: u64,
    /// Marks that were stored.
    pub marks: u64,
    /// Versions of artifacts that were stored.
    pub artifacts: u64,
    /// Bytes of these packs and WAL objects.
    pub bytes: u64,
    /// What could not be copied. Everything else was.
    pub failed: Vec<Failed>,
}

/// Ships every backup of `source` that `target` does not have and never expired, oldest first, and the WAL from the oldest backup there on.
///
/// Only the difference is shipped, and a copy that was interrupted is gone on with. What is damaged in the source is not copied,
/// nor is a backup that needs it; both are in the result, and everything else is copied.
///
/// # Errors
/// [`ErrorKind::Usage`] when both are the same vault. [`ErrorKind::Conflict`] when the target has other contents under a name.
/// [`ErrorKind::Storage`] when a store fails: the same call may be repeated.
pub async fn copy(source: &Cluster, target: &Cluster, options: &CopyOptions) -> Result<Copied> {
    ensure_apart(source, target)?;
    let route = Route { source: source.clone(), target: target.clone() };
    let listing = snapshot::list(source).await?;
    let there = snapshot::list(target).await?;
    let archive = Archive::list(&route).await?;
    options.progress.phase("copy", None);
    let mut run = Run { route, options, archive, shelf: None, copied: Copied::default() };
    for damaged in listing.damaged {
        run.fail(layout::snapshot(damaged.id), damaged.error);
    }
    let unreadable: BTreeSet<Ulid> = there.damaged.iter().map(|damaged| damaged.id).collect();
    for damaged in there.damaged {
        run.fail(layout::snapshot(damaged.id), damaged.error.context("the copy has a backup that cannot be read"));
    }
    let expired = expired(target, &listing.snapshots, &there.snapshots).await?;
    let there: BTreeMap<Ulid, Manifest> = there.snapshots.into_iter().map(|s| (s.manifest.id, s.manifest)).collect();
    // What the target already has counts too: its WAL goes on.
    let mut oldest = there.values().map(|m| (m.start_lsn, m.wal_segment_size)).min_by_key(|(start, _)| *start);
    for snapshot in listing.snapshots {
        let id = snapshot.manifest.id;
        if let Some(copy) = there.get(&id) {
            ensure_same(target, &snapshot.manifest, copy)?;
            run.copied.present += 1;
        } else if expired.contains(&id) {
            run.copied.expired += 1;
        } else if !unreadable.contains(&id) {
            let begins = (snapshot.manifest.start_lsn, snapshot.manifest.wal_segment_size);
            if run.backup(&snapshot).await? {
                oldest = Some(oldest.filter(|(start, _)| *start <= begins.0).unwrap_or(begins));
            }
        }
    }
    if let Some((start, size)) = oldest {
        run.rest_of_wal(start, size).await?;
    }
    run.copied.gaps = records::ship_gaps(&run.route).await?;
    (run.copied.marks, run.copied.artifacts) = records::ship_marks_and_artifacts(&run.route).await?;
    Ok(run.copied)
}

/// The backups that the target had, and that its retention has expired: what the audit log there says.
async fn expired(target: &Cluster, wanted: &[OpenSnapshot], there: &[OpenSnapshot]) -> Result<BTreeSet<Ulid>> {
    let there: BTreeSet<Ulid> = there.iter().map(|snapshot| snapshot.manifest.id).collect();
    if wanted.iter().all(|snapshot| there.contains(&snapshot.manifest.id)) {
        return Ok(BTreeSet::new());
    }
    let records = audit::of(target, &[event::BACKUP_EXPIRED]).await?;
    let expired = records.into_iter().filter_map(|record| match record.event {
        Event::BackupExpired { backup_id, .. } => Some(backup_id),
        _ => None,
    });
    Ok(expired.collect())
}

/// Refuses to copy a vault to itself, or to another cluster.
fn ensure_apart(source: &Cluster, target: &Cluster) -> Result<()> {
    let ids = (source.vault().document().vault_id, target.vault().document().vault_id);
    if ids.0 != ids.1 && source.name() == target.name() {
        return Ok(());
    }
    let why = format!("{} of {} cannot be copied to {} of {}", source.name(), ids.0, target.name(), ids.1);
    Err(Error::new(ErrorKind::Usage, "copy.same_vault", why)
        .with_hint("a copy is the same cluster in another vault, made by `pgvault init --copy NAME`"))
}

/// A manifest is the commit: one that differs is another backup under the same name.
fn ensure_same(target: &Cluster, one: &Manifest, other: &Manifest) -> Result<()> {
    let json = |m: &Manifest| serde_json::to_value(m).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()));
    if json(one)? == json(other)? { Ok(()) } else { Err(object::taken(&target.path(&layout::snapshot(one.id)))) }
}

struct Run<'a> {
    route: Route,
    options: &'a CopyOptions,
    archive: Archive,
    shelf: Option<Shelf>,
    copied: Copied,
}

impl Run<'_> {
    fn fail(&mut self, name: String, error: Error) {
        self.copied.failed.push(Failed { name, error });
    }

    /// Copies a backup; false when the source's objects do not allow it, which is noted.
    async fn backup(&mut self, snapshot: &OpenSnapshot) -> Result<bool> {
        let id = snapshot.manifest.id;
        let name = layout::snapshot(id);
        match self.commit(snapshot).await {
            Ok(true) => {
                self.copied.backups.push(id);
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(error) if is_damage(&error) => {
                // Expired while it was copied: then nothing is wrong with it.
                match self.route.source.store().head(&self.route.source.path(&name)).await {
                    Err(gone) if gone.kind() == ErrorKind::NotFound => tracing::info!(backup = %id, "expired while it was copied"),
                    _ => self.fail(name, error),
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The order is that of a backup; see the format's page. False when the target's retention has already expired it.
    async fn commit(&mut self, snapshot: &OpenSnapshot) -> Result<bool> {
        let Route { target, .. } = self.route.clone();
        let manifest = &snapshot.manifest;
        let json = snapshot.json().await?;
        let wanted = snapshot.packs().await?;
        let mut shelf = match self.shelf.take().filter(|shelf| !shelf.is_old(target.env().now())) {
            Some(shelf) => shelf,
            None => Shelf::open(&target, manifest.id).await?,
        };
        let mut shipped = packs::Shipped::default();
        let packs = shelf.fill(&self.route, &wanted, self.options.workers, &mut shipped).await;
        let session = shelf.session.clone();
        self.shelf = Some(shelf);
        self.copied.packs += shipped.packs;
        self.copied.bytes += shipped.bytes;
        self.options.progress.advance(shipped.bytes);
        let packs = packs?;
        let wal = self.archive.ship_for(manifest, self.options.workers).await?;
        self.count_wal(wal.objects, wal.bytes);
        let tables = Tables::store(&target, &packs, snapshot.file_chunks().await?, Limits::default()).await?;

        let object = snapshot::seal(&target, manifest.id, &json, &tables)?;
        let needed = packs.iter().chain(tables.packs());
        keep::ensure(&target, manifest, needed.map(|pack| Ulid::from_bytes(pack.id))).await?;
        self.confirm_wal(manifest).await?;
        session.ensure_live(&target).await?;
        if let Put::Different(_) = target.put(&object).await? {
            // Somebody else copies the same vault, and was faster.
            return match snapshot::open(&target, manifest.id, None).await {
                Ok(there) => ensure_same(&target, manifest, &there.manifest).map(|()| true),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            };
        }
        // An expiry that does not know the backup yet may have been at work in between. What is stored now, it leaves.
        self.confirm_wal(manifest).await?;
        if let Err(error) = audit::record(&target, Event::BackupCommitted { backup_id: manifest.id }).await {
            // The backup is committed and whole; `check` says that its record is missing.
            tracing::warn!(%error, "the backup was not recorded in the copy's audit log");
        }
        tracing::info!(backup = %manifest.id, "backup copied");
        Ok(true)
    }

    async fn confirm_wal(&mut self, manifest: &Manifest) -> Result<()> {
        let wal = self.archive.confirm(manifest, self.options.workers).await?;
        self.count_wal(wal.objects, wal.bytes);
        Ok(())
    }

    async fn rest_of_wal(&mut self, start: Lsn, size: crate::postgres::SegmentSize) -> Result<()> {
        let shipped = self.archive.ship(Stretch::from(start, size), size, self.options.workers).await?;
        self.count_wal(shipped.objects, shipped.bytes);
        for (name, error) in shipped.failed {
            self.fail(name, error);
        }
        Ok(())
    }

    fn count_wal(&mut self, objects: u64, bytes: u64) {
        self.copied.wal += objects;
        self.copied.bytes += bytes;
        self.options.progress.advance(bytes);
    }
}
