//! The keyed check of one cluster.
//!
//! One object that cannot be read, or that a newer version wrote, is a finding; the check goes on with all the others.

mod filestores;

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use ulid::Ulid;

use super::{PARALLEL, Report, decode_all, sorted};
use crate::crypto::keys::{ClusterDocument, EpochDocument};
use crate::crypto::slot::SlotDocument;
use crate::format::document;
use crate::format::file_table::{FileEntry, Node};
use crate::format::map::{self, Extent, FileMap, PackId};
use crate::format::pack_table::PackRef;
use crate::format::{BLOCK, FormatError};
use crate::postgres::{Lsn, SegmentSize, TimelineHistory, TimelineId, WalFileName};
use crate::progress::SharedProgress;
use crate::store::ObjectInfo;
use crate::vault::maps::MapReader;
use crate::vault::snapshot::{self, Manifest, OpenSnapshot};
use crate::vault::{Cluster, audit, layout};
use crate::wal::catalog::Catalog;
use crate::wal::gap;
use crate::wal::object::{self, WalName};
use crate::{Error, ErrorKind, Result};

/// How deep to look.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// Compare names and sizes only (V0), without decoding data and WAL (V2).
    pub sizes_only: bool,
    /// Told about progress.
    pub progress: SharedProgress,
}

/// Checks everything a cluster has in the vault.
///
/// # Errors
/// When the store fails. Damage is no error; it is in the report.
pub async fn check(cluster: &Cluster, options: &CheckOptions) -> Result<Report> {
    let listed = cluster.store().list(&cluster.name().prefix()).await?;
    options.progress.phase("check", Some(if options.sizes_only { 0 } else { listed.iter().map(|o| o.size).sum() }));
    let prefix = cluster.name().prefix();
    let objects: BTreeMap<String, ObjectInfo> =
        listed.into_iter().map(|object| (object.name.strip_prefix(&prefix).unwrap_or(&object.name).to_owned(), object)).collect();
    let mut checker = Checker {
        cluster,
        options,
        report: Report::default(),
        objects,
        slots: BTreeSet::new(),
        frames: BTreeMap::new(),
        damaged: BTreeSet::new(),
    };
    checker.vault_document().await?;
    checker.cluster_document().await?;
    checker.keys().await?;
    checker.decode_objects().await?;
    let backups = checker.snapshots().await?;
    checker.records(&backups).await?;
    checker.wal(&backups).await?;
    checker.filestores().await?;
    checker.report.findings.sort_by(|a, b| (b.severity, &a.object).cmp(&(a.severity, &b.object)));
    Ok(checker.report)
}

struct Checker<'a> {
    cluster: &'a Cluster,
    options: &'a CheckOptions,
    report: Report,
    /// Everything under the cluster's prefix, by relative name.
    objects: BTreeMap<String, ObjectInfo>,
    /// Key slots that count.
    slots: BTreeSet<Ulid>,
    /// Frame lengths of packs, as far as they were decoded.
    frames: BTreeMap<PackId, Vec<u32>>,
    /// Relative names of objects that are damaged.
    damaged: BTreeSet<String>,
}

impl Checker<'_> {
    /// The document was verified when the vault was opened; here it is read again, because that may be long ago.
    async fn vault_document(&mut self) -> Result<()> {
        let name = layout::VAULT_DOCUMENT;
        let bytes = self.cluster.store().get(name).await?;
        self.report.objects += 1;
        self.report.bytes += bytes.len() as u64;
        if let Err(problem) = document::verify("vault.json", &bytes) {
            self.report.error(name, problem.to_string(), Vec::new());
        }
        Ok(())
    }

    /// As [`Checker::vault_document`], for the document that names the master key.
    async fn cluster_document(&mut self) -> Result<()> {
        let Some(bytes) = self.read(layout::CLUSTER_DOCUMENT).await? else { return Ok(()) };
        let problem = match ClusterDocument::parse(&bytes) {
            Ok(document) if document.commitment == self.commitment() => return Ok(()),
            Ok(_) => "names another master key than the one that the cluster was opened with".into(),
            Err(problem) => unjudged(&problem),
        };
        self.report.error(self.cluster.path(layout::CLUSTER_DOCUMENT), problem, Vec::new());
        Ok(())
    }

    fn commitment(&self) -> String {
        self.cluster.keys().master().commitment(self.cluster.keys().identity())
    }

    async fn keys(&mut self) -> Result<()> {
        for slot in self.names(layout::dir::KEYS) {
            let Some(bytes) = self.read(&slot).await? else { continue };
            let problem = match document::parse::<SlotDocument>("key slot", &bytes) {
                Ok(document) if document.commitment != self.commitment() => {
                    let problem =
                        "is of another master key and opens nothing; an `init` that died or came second leaves such a one";
                    self.report.warning(self.cluster.path(&slot), problem);
                    continue;
                }
                Ok(document) if self.cluster.path(&slot) != layout::key_slot(self.cluster.name(), document.key_id) => {
                    Some(format!("holds the slot of {}", document.key_id))
                }
                Ok(document) => {
                    let _ = self.slots.insert(document.key_id);
                    document.verify(self.cluster.keys().identity(), self.cluster.keys().master()).err().map(|e| e.to_string())
                }
                Err(problem) => {
                    // Reported once, as itself.
                    self.slots.extend(layout::id_of(&slot));
                    Some(unjudged(&problem))
                }
            };
            if let Some(problem) = problem {
                self.report.error(self.cluster.path(&slot), problem, Vec::new());
            }
        }
        for epoch in self.names(layout::dir::EPOCHS) {
            let Some(bytes) = self.read(&epoch).await? else { continue };
            match document::parse::<EpochDocument>("epoch", &bytes) {
                Ok(document) if !self.cluster.keys().has_epoch(document.epoch_id) => {
                    self.report.warning(
                        self.cluster.path(&epoch),
                        "was sealed by another master key; an `init` that died or came second leaves such a one",
                    );
                }
                Ok(_) => {}
                Err(problem) => self.report.error(self.cluster.path(&epoch), unjudged(&problem), Vec::new()),
            }
        }
        Ok(())
    }

    fn names(&self, dir: &str) -> Vec<String> {
        self.objects.range(dir.to_owned()..).map(|(name, _)| name.clone()).take_while(|name| name.starts_with(dir)).collect()
    }

    /// Reads a document; `None` when it is gone, which is reported.
    async fn read(&mut self, relative: &str) -> Result<Option<bytes::Bytes>> {
        let name = self.cluster.path(relative);
        let Some(bytes) = self.cluster.store().get_if_exists(&name).await? else {
            self.report.warning(name, "was deleted while the check ran");
            return Ok(None);
        };
        self.report.objects += 1;
        self.report.bytes += bytes.len() as u64;
        self.options.progress.advance(bytes.len() as u64);
        Ok(Some(bytes))
    }

    /// Decrypts every frame of every sealed object.
    async fn decode_objects(&mut self) -> Result<()> {
        let small = [
            layout::dir::SNAP,
            layout::dir::SESSION,
            layout::dir::AUDIT,
            layout::dir::DRILL,
            layout::dir::HOLD,
            layout::dir::GC,
            layout::dir::PASS,
            layout::dir::MARK,
        ];
        let names: Vec<(String, u64)> = self
            .objects
            .iter()
            .filter(|(name, _)| !layout::is_clear(name))
            .filter(|(name, _)| !self.options.sizes_only || small.iter().any(|dir| name.starts_with(dir)))
            .map(|(name, object)| (name.clone(), object.size))
            .collect();
        let cluster = self.cluster;
        let mut decoding = stream::iter(names)
            .map(|(name, size)| async move {
                let bytes = match cluster.store().get(&cluster.path(&name)).await {
                    Ok(bytes) => bytes,
                    Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {
                        return Ok((name, size, Err(error.to_string())));
                    }
                    Err(error) => return Err(error),
                };
                let (owner, owned) = (cluster.clone(), name.clone());
                let decoded = tokio::task::spawn_blocking(move || decode_all(&owner, &owned, &bytes)).await;
                let decoded = decoded.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?;
                Ok((name, size, decoded.map_err(|e| unjudged(&e))))
            })
            .buffer_unordered(PARALLEL);
        while let Some(decoded) = decoding.next().await {
            let (name, size, decoded) = decoded?;
            self.report.objects += 1;
            self.report.bytes += size;
            self.options.progress.advance(size);
            match decoded {
                Ok(lens) => {
                    let is_pack = [layout::dir::PACK, layout::dir::FILES].iter().any(|dir| name.starts_with(dir));
                    if let Some(id) = layout::id_of(&name).filter(|_| is_pack) {
                        let _ = self.frames.insert(id.to_bytes(), lens);
                    }
                }
                Err(problem) => {
                    let _ = self.damaged.insert(name.clone());
                    // Packs and WAL are reported with the backups they hurt, below.
                    if ![layout::dir::PACK, layout::dir::WAL, layout::dir::FILES].iter().any(|dir| name.starts_with(dir)) {
                        let hurts = layout::id_of(&name).filter(|_| name.starts_with(layout::dir::SNAP));
                        self.report.error(self.cluster.path(&name), problem.clone(), hurts.into_iter().collect());
                    }
                    let _ = self.objects.get_mut(&name).map(|object| object.name = problem);
                }
            }
        }
        Ok(())
    }

    /// Reads every manifest and compares it with what is there.
    async fn snapshots(&mut self) -> Result<Vec<Manifest>> {
        let mut manifests = Vec::new();
        let mut needed: BTreeMap<PackId, (PackRef, Vec<Ulid>)> = BTreeMap::new();
        for name in self.names(layout::dir::SNAP) {
            let Some(id) = layout::id_of(&name).filter(|_| !self.damaged.contains(&name)) else { continue };
            match self.snapshot(id).await {
                Ok((manifest, packs)) => {
                    for pack in packs {
                        needed.entry(pack.id).or_insert((pack, Vec::new())).1.push(id);
                    }
                    manifests.push(manifest);
                }
                Err(error) => self.report.error(self.cluster.path(&name), finding(error)?, vec![id]),
            }
        }
        for (id, (pack, hurts)) in &needed {
            let problem = self.problem(pack);
            if let Some(problem) = problem {
                let name = layout::pack(Ulid::from_bytes(*id));
                self.report.error(self.cluster.path(&name), problem, sorted(hurts.iter().copied()));
            }
        }
        // Damage in packs that no backup needs is still damage of the store.
        for name in self.damaged.iter().filter(|name| name.starts_with(layout::dir::PACK)) {
            let is_needed = layout::id_of(name).is_some_and(|id| needed.contains_key(&id.to_bytes()));
            if !is_needed {
                let problem = self.objects.get(name).map(|o| o.name.clone()).unwrap_or_default();
                self.report.error(self.cluster.path(name), format!("{problem} (no backup that can be read needs it)"), Vec::new());
            }
        }
        Ok(manifests)
    }

    /// Checks one manifest's file table and maps against its pack table; returns the packs that it needs.
    async fn snapshot(&mut self, id: Ulid) -> Result<(Manifest, Vec<PackRef>)> {
        let size = self.objects.get(&layout::snapshot(id)).map(|o| o.size);
        let snapshot: OpenSnapshot = snapshot::open(self.cluster, id, size).await?;
        let mut needed: Vec<PackRef> = snapshot.table_packs().copied().collect();
        if needed.iter().any(|pack| self.problem(pack).is_some()) {
            // It is reported as itself; there is no reading on without it.
            return Ok((snapshot.manifest, needed));
        }
        let packs = snapshot.packs().await?;
        let known: BTreeSet<PackId> = packs.iter().map(|p| p.id).collect();
        let mut maps = MapReader::new(self.cluster, &packs);
        let (mut files, mut bytes) = (0u64, 0u64);
        let mut table = snapshot.files();
        while let Some(entries) = table.next_chunk().await? {
            for entry in entries {
                if let Node::File { len, .. } = &entry.node {
                    files += 1;
                    bytes = bytes.saturating_add(*len);
                }
                self.maps(&entry, &known, &mut maps).await?;
            }
        }
        let manifest = snapshot.manifest;
        if (files, bytes) != (manifest.files, manifest.source_bytes) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "snapshot.counts",
                format!(
                    "the file table has {files} files of {bytes} bytes; the manifest counts {} of {}",
                    manifest.files, manifest.source_bytes
                ),
            ));
        }
        needed.extend(packs);
        Ok((manifest, needed))
    }

    /// What is wrong with a pack that a manifest names.
    fn problem(&self, pack: &PackRef) -> Option<String> {
        let name = layout::pack(Ulid::from_bytes(pack.id));
        match self.objects.get(&name) {
            None => Some("is missing".to_owned()),
            Some(object) if self.damaged.contains(&name) => Some(object.name.clone()),
            Some(object) if object.size != pack.size => Some(format!("has {} bytes; the manifest says {}", object.size, pack.size)),
            Some(_) => None,
        }
    }

    /// Checks a file's map, section by section.
    async fn maps(&self, entry: &FileEntry, known: &BTreeSet<PackId>, maps: &mut MapReader) -> Result<()> {
        let Node::File { len, map } = &entry.node else { return Ok(()) };
        for number in 0..map::sections(*len) {
            if let Some((pack, _)) = map.locate(number) {
                let name = layout::pack(Ulid::from_bytes(pack));
                if !known.contains(&pack) {
                    let why = format!("{}: its map lies in {name}, which the manifest does not list", entry.path);
                    return Err(Error::new(ErrorKind::Corrupt, "map.pack", why));
                }
                // A damaged or missing pack is reported as itself.
                if self.damaged.contains(&name) || !self.objects.contains_key(&name) {
                    continue;
                }
            }
            let section = maps.section(map, *len, number).await.map_err(|e| e.context(&entry.path))?;
            self.extents(entry, &section, known)?;
        }
        Ok(())
    }

    fn extents(&self, entry: &FileEntry, map: &FileMap, known: &BTreeSet<PackId>) -> Result<()> {
        let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, "map.extent", format!("{}: {why}", entry.path));
        for extent in &map.extents {
            let Extent::Stored { blocks, pack, frame, slot } = *extent else { continue };
            let pack = map
                .packs
                .get(pack as usize)
                .filter(|p| known.contains(*p))
                .ok_or_else(|| corrupt("its map names a pack that the manifest does not list"))?;
            let Some(lens) = self.frames.get(pack) else { continue };
            let len = lens.get(frame as usize).ok_or_else(|| corrupt("its map names a frame that does not exist"))?;
            if u64::from(slot + blocks) * BLOCK as u64 > u64::from(*len) {
                return Err(corrupt("its map points behind the end of a frame"));
            }
        }
        Ok(())
    }

    /// What the audit log says was committed must be there.
    async fn records(&mut self, backups: &[Manifest]) -> Result<()> {
        let there: BTreeSet<Ulid> = self.names(layout::dir::SNAP).iter().filter_map(|name| layout::id_of(name)).collect();
        let slots = std::mem::take(&mut self.slots);
        let (mut committed, mut expired, mut added) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut revocations: BTreeMap<Ulid, i64> = BTreeMap::new();
        for name in self.names(layout::dir::AUDIT) {
            if self.damaged.contains(&name) {
                continue;
            }
            let event = match audit::read(self.cluster, &name).await {
                Ok(record) => record.event,
                Err(error) => {
                    let (name, is_newer) = (self.cluster.path(&name), error.kind() == ErrorKind::Unsupported);
                    let problem = finding(error)?;
                    // Nothing is wrong with it, and no backup depends on it.
                    if is_newer {
                        self.report.warning(name, problem);
                    } else {
                        self.report.error(name, problem, Vec::new());
                    }
                    continue;
                }
            };
            let _ = match event {
                audit::Event::ClusterCreated { key_ids } => {
                    added.extend(key_ids);
                    true
                }
                audit::Event::BackupCommitted { backup_id } => committed.insert(backup_id),
                audit::Event::BackupExpired { backup_id, .. } => expired.insert(backup_id),
                audit::Event::KeyAdded { key_id } => added.insert(key_id),
                audit::Event::KeyRevoked { key_id } => {
                    *revocations.entry(key_id).or_default() += 1;
                    true
                }
                audit::Event::RevocationWithdrawn { key_id } => {
                    *revocations.entry(key_id).or_default() -= 1;
                    true
                }
                audit::Event::EpochStarted { .. }
                | audit::Event::Restored { .. }
                | audit::Event::WalGap { .. }
                | audit::Event::WalExpired { .. }
                | audit::Event::HoldPlaced { .. }
                | audit::Event::HoldRemoved { .. }
                | audit::Event::Unknown => false,
            };
        }
        let revoked: BTreeSet<Ulid> = revocations.into_iter().filter(|(_, count)| *count > 0).map(|(id, _)| id).collect();
        for id in committed.difference(&expired).filter(|id| !there.contains(id)) {
            self.report.error(
                self.cluster.path(&layout::snapshot(*id)),
                "is missing: the audit log says that it was committed, and not that it expired",
                vec![*id],
            );
        }
        for id in added.difference(&revoked).filter(|id| !slots.contains(id)) {
            self.report.error(
                layout::key_slot(self.cluster.name(), *id),
                "is missing or replaced: the audit log says that it was added, and not that it was revoked",
                Vec::new(),
            );
        }
        for id in revoked.intersection(&slots) {
            self.report.warning(
                layout::key_slot(self.cluster.name(), *id),
                "was revoked, but is still there and opens the cluster; revoke it again",
            );
        }
        for backup in backups.iter().filter(|b| !committed.contains(&b.id)) {
            self.report.warning(
                self.cluster.path(&layout::snapshot(backup.id)),
                "has no record in the audit log; the backup was interrupted right after its commit, or the record was deleted",
            );
        }
        Ok(())
    }

    async fn wal(&mut self, backups: &[Manifest]) -> Result<()> {
        let Some(size) = self.segment_size(backups).await? else { return Ok(()) };
        let catalog = match Catalog::load(self.cluster, size, Lsn::INVALID).await {
            Err(error) if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => return Err(error),
            loaded => loaded,
        };
        let damaged: Vec<String> = self.damaged.iter().filter(|name| name.starts_with(layout::dir::WAL)).cloned().collect();
        for name in damaged {
            let problem = self.objects.get(&name).map(|o| o.name.clone()).unwrap_or_default();
            if catalog.as_ref().is_ok_and(|catalog| is_superseded(&name, catalog)) {
                let problem = format!("{problem} (nothing needs it: its bytes are in other objects)");
                self.report.error(self.cluster.path(&name), problem, Vec::new());
            } else {
                self.report.error(self.cluster.path(&name), problem, hurt_by_wal(&name, size, backups));
            }
        }
        let catalog = match catalog {
            Ok(catalog) => catalog,
            Err(error) => {
                let problem = format!("cannot be looked through for gaps: {error}");
                self.report.error(self.cluster.path(layout::dir::WAL), problem, sorted(backups.iter().map(|b| b.id)));
                return Ok(());
            }
        };
        for objects in catalog.timelines.values() {
            for stranger in &objects.strangers {
                self.report.warning(stranger, "is not a WAL object's name");
            }
        }
        let ancestors = catalog.histories.values().flat_map(|history| history.ancestors().iter().map(|a| a.timeline));
        let known: BTreeSet<TimelineId> = catalog.timelines.keys().copied().chain(ancestors).collect();
        for timeline in known.into_iter().filter(|t| *t > TimelineId(1) && !catalog.histories.contains_key(t)) {
            let name = WalName::File(WalFileName::History(timeline)).object();
            let hurts = backups.iter().filter(|b| b.timeline != timeline).map(|b| b.id);
            self.report.error(
                self.cluster.path(&name),
                "is missing: without it nothing can be recovered onto this timeline",
                sorted(hurts),
            );
        }
        for gap in gap::holes(self.cluster, &catalog).await? {
            let on_it = |b: &&Manifest| b.timeline == gap.timeline && b.stop_lsn <= gap.from;
            let object = self.cluster.path(&layout::wal_timeline(gap.timeline));
            let problem = format!("WAL from {} to {} is missing: no backup before it can be recovered past it", gap.from, gap.to);
            if archives_more(&catalog, gap.timeline, backups) {
                self.report.error(object, problem, sorted(backups.iter().filter(on_it).map(|b| b.id)));
            } else {
                self.report.warning(object, format!("{problem}; nothing but backups stores WAL here, so this is as it was set up"));
            }
        }
        for backup in backups {
            let history = catalog.history(backup.timeline).unwrap_or_else(|_| TimelineHistory::root(backup.timeline));
            let end = catalog.contiguous_end(&history, backup.start_lsn);
            if end < backup.stop_lsn {
                let problem =
                    format!("needs WAL from {} to {}, but the vault has it only up to {end}", backup.start_lsn, backup.stop_lsn);
                self.report.error(self.cluster.path(&layout::snapshot(backup.id)), problem, vec![backup.id]);
            }
        }
        Ok(())
    }

    async fn segment_size(&mut self, backups: &[Manifest]) -> Result<Option<SegmentSize>> {
        if let Some(backup) = backups.first() {
            return Ok(Some(backup.wal_segment_size));
        }
        for name in self.names(layout::dir::WAL).into_iter().filter(|name| !self.damaged.contains(name)) {
            let Some(parsed) = WalName::parse(&name) else { continue };
            match object::open(self.cluster, parsed, None).await {
                Ok(opened) => {
                    if let Some(size) = opened.info.segment_size {
                        return Ok(Some(size));
                    }
                }
                Err(error) => self.report.error(self.cluster.path(&name), finding(error)?, Vec::new()),
            }
        }
        Ok(None)
    }
}

/// What a finding says of an object that does not parse.
fn unjudged(problem: &FormatError) -> String {
    if problem.unsupported { format!("cannot be judged by this version of pgvault: {problem}") } else { problem.to_string() }
}

/// What a finding says of an error that is about an object; an error of the store ends the check.
fn finding(error: Error) -> Result<String> {
    match error.kind() {
        ErrorKind::Unsupported => Ok(format!("cannot be judged by this version of pgvault: {error}")),
        ErrorKind::Corrupt | ErrorKind::NotFound => Ok(error.to_string()),
        _ => Err(error),
    }
}

/// True when a timeline has WAL that no backup needs for itself: then something archives, and a hole is a loss.
fn archives_more(catalog: &Catalog, timeline: TimelineId, backups: &[Manifest]) -> bool {
    let size = catalog.segment_size;
    let own = |start: Lsn| {
        let end = start.advance(size.bytes());
        backups.iter().any(|b| b.timeline == timeline && b.start_lsn < end && start <= b.stop_lsn)
    };
    let present = catalog.timelines.get(&timeline).map(crate::wal::catalog::TimelineObjects::present).unwrap_or_default();
    present.into_iter().filter_map(|segment| object::segment_start(segment, size).ok()).any(|start| !own(start))
}

/// True for a part or a `.partial` that a recovery passes over, because the segment is there or longer parts are.
fn is_superseded(name: &str, catalog: &Catalog) -> bool {
    let (segment, range) = match WalName::parse(name) {
        Some(WalName::Part { segment, from, to }) => (segment, Some((from, to))),
        Some(WalName::File(WalFileName::Partial(segment))) => (segment, None),
        _ => return false,
    };
    let Some(objects) = catalog.timelines.get(&segment.timeline) else { return false };
    let covered = objects.covered(segment, catalog.segment_size);
    let in_use = range.is_some_and(|range| objects.chain(segment).contains(&range));
    let end = range.map_or(catalog.segment_size.bytes(), |(_, to)| u64::from(to));
    objects.segments.contains(&segment) || (!in_use && end <= covered)
}

/// Backups that need a damaged WAL object, or cannot be recovered past it.
fn hurt_by_wal(name: &str, size: SegmentSize, backups: &[Manifest]) -> Vec<Ulid> {
    let Some(WalName::File(WalFileName::Segment(segment) | WalFileName::Partial(segment)) | WalName::Part { segment, .. }) =
        WalName::parse(name)
    else {
        return sorted(backups.iter().map(|b| b.id));
    };
    let end = object::segment_start(segment, size).map_or(Lsn::INVALID, |start| start.advance(size.bytes()));
    sorted(backups.iter().filter(|b| b.timeline <= segment.timeline && b.start_lsn < end).map(|b| b.id))
}
