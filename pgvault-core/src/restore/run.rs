//! Carrying out a plan.
//!
//! The order is the safety: a marker first, `global/pg_control` last. A directory without `pg_control` cannot be started,
//! and a restored `pg_control` names a checkpoint that does not exist, so that it cannot be started without the
//! `backup_label` that says where recovery really begins (T12).

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::delta::{self, UNFINISHED, Wanted};
use super::files::{self, BATCH_EXTENTS, Batch, TargetFile, Writer};
use super::plan::Plan;
use super::recovery::{self, RestoreCommand, TargetAction};
use crate::format::file_table::{FileEntry, Node};
use crate::format::map::{self, PackId};
use crate::format::pack_table::PackRef;
use crate::postgres::{TablespaceMap, TablespaceMapEntry, invalidate_checkpoint};
use crate::progress::SharedProgress;
use crate::vault::maps::MapReader;
use crate::vault::session::{Purpose, Reads, Session};
use crate::vault::{Cluster, audit, layout};
use crate::{Error, ErrorKind, Result};

const CONTROL: &str = "global/pg_control";
const CONTROL_STAGED: &str = "global/pg_control.pgvault";

/// How to restore.
#[derive(Debug)]
pub struct RestoreOptions {
    /// The data directory to write.
    pub pgdata: PathBuf,
    /// Keep what is right in an existing directory, remove what does not belong.
    pub delta: bool,
    /// Where tablespaces go: original location to new location. There is no default: an original path is used only when it
    /// is mapped to itself.
    pub tablespace_mapping: BTreeMap<String, PathBuf>,
    /// How the server calls back for WAL.
    pub restore_command: RestoreCommand,
    /// What the server does at the target.
    pub action: TargetAction,
    /// Set `archive_mode = off` in the restored cluster.
    pub archive_off: bool,
    /// Threads that decode and write.
    pub workers: usize,
    /// Told about progress.
    pub progress: SharedProgress,
}

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    /// Bytes written; with `delta`, only what differed.
    pub bytes_written: u64,
    /// Bytes of the cluster.
    pub source_bytes: u64,
    /// How long it took.
    pub duration: Duration,
    /// Anything the operator should know.
    pub warnings: Vec<String>,
}

/// Carries out a plan; PostgreSQL can be started on the directory when it returns.
///
/// # Errors
/// When the target is not usable, the store fails, or stored bytes were changed. The directory then has no `pg_control`;
/// `delta` continues where it stopped.
pub async fn restore(cluster: &Cluster, plan: &Plan, options: &RestoreOptions) -> Result<Restored> {
    let began = std::time::Instant::now();
    let manifest = &plan.snapshot.manifest;
    let locations = map_tablespaces(plan, options)?;
    let mut roots = vec![options.pgdata.clone()];
    roots.extend(locations.values().cloned());
    // All of them are looked at before any is touched.
    for root in &roots {
        check_root(root, options.delta, root == &options.pgdata)?;
    }
    let mut told = announce(cluster, plan).await?;
    // So is the vault: without these nothing can be restored, and `--delta` would spoil a directory for nothing.
    let table = plan.snapshot.packs().await?;
    let mut maps = MapReader::ahead(cluster, &table).await?;
    let packs: BTreeMap<PackId, PackRef> = table.into_iter().map(|p| (p.id, p)).collect();
    for root in &roots {
        prepare_root(root, root == &options.pgdata)?;
    }
    write_durably(&options.pgdata.join(UNFINISHED), b"pgvault restore did not finish; run it again with --delta\n", 0o600)?;
    if options.delta {
        remove_if_there(&options.pgdata.join(CONTROL))?;
        sync_directory(&options.pgdata.join("global"));
    }
    options.progress.phase("restore", Some(manifest.source_bytes));
    if options.delta {
        remove_strangers(plan, &options.pgdata, &locations).await?;
    }
    let bytes_written = write_files((cluster, &packs), plan, options, &locations, &mut maps, |_| true).await?;
    let mut warnings = finish(plan, options, &locations, &roots)?;
    warnings.append(&mut told);
    let record = audit::Event::Restored {
        backup_id: manifest.id,
        target: plan.target.to_string(),
        pgdata: options.pgdata.to_string_lossy().into_owned(),
    };
    if let Err(error) = audit::record(cluster, record).await {
        // A restorer's credentials need not be able to write.
        tracing::warn!(%error, "the restore was not recorded in the vault's audit log");
    }
    Ok(Restored { bytes_written, source_bytes: manifest.source_bytes, duration: began.elapsed(), warnings })
}

/// Writes those files of a backup that are wanted, to look at them, into an empty directory; gives their bytes. No server can be started
/// on them: there is no `pg_control`.
///
/// # Errors
/// As [`restore`].
pub async fn restore_some(
    cluster: &Cluster,
    plan: &Plan,
    options: &RestoreOptions,
    wanted: impl Fn(&FileEntry) -> bool,
) -> Result<u64> {
    let locations = map_tablespaces(plan, options)?;
    let roots: Vec<&PathBuf> = std::iter::once(&options.pgdata).chain(locations.values()).collect();
    for root in &roots {
        check_root(root, false, *root == &options.pgdata)?;
    }
    let _ = announce(cluster, plan).await?;
    let table = plan.snapshot.packs().await?;
    let mut maps = MapReader::ahead(cluster, &table).await?;
    let packs: BTreeMap<PackId, PackRef> = table.into_iter().map(|p| (p.id, p)).collect();
    for root in &roots {
        prepare_root(root, *root == &options.pgdata)?;
    }
    write_files((cluster, &packs), plan, options, &locations, &mut maps, wanted).await
}

/// Makes the directories and links of a backup, and those of its files that are wanted; gives the bytes that were written.
async fn write_files(
    (cluster, packs): (&Cluster, &BTreeMap<PackId, PackRef>),
    plan: &Plan,
    options: &RestoreOptions,
    locations: &BTreeMap<u32, PathBuf>,
    maps: &mut MapReader,
    wanted: impl Fn(&FileEntry) -> bool,
) -> Result<u64> {
    let written = Arc::new(AtomicU64::new(0));
    let writer =
        Writer { cluster, packs, workers: options.workers.max(1), progress: options.progress.clone(), written: written.clone() };
    let mut batch = Batch::default();
    let mut files = plan.snapshot.files();
    while let Some(entries) = files.next_chunk().await? {
        for entry in entries.iter().filter(|entry| !matches!(entry.node, Node::File { .. }) || wanted(entry)) {
            place(entry, options, locations, maps, &mut batch).await?;
            if batch.len() >= BATCH_EXTENTS {
                writer.write(std::mem::take(&mut batch)).await?;
            }
        }
    }
    writer.write(batch).await?;
    Ok(written.load(Ordering::Relaxed))
}

/// Announces what is read, so that it is not expired meanwhile, and looks whether that came too late; gives warnings.
async fn announce(cluster: &Cluster, plan: &Plan) -> Result<Vec<String>> {
    let manifest = &plan.snapshot.manifest;
    if let Err(error) = Session::read(cluster, Purpose::Restore, Reads::of(manifest)).await {
        // A restorer's credentials need not be able to write, and a store that takes nothing may still give.
        tracing::warn!(%error, "the restore could not be announced: `pgvault expire` does not know of it");
        return Ok(vec![format!(
            "the restore could not be announced, so `pgvault expire` must not run before it is over: {error}"
        )]);
    }
    match cluster.store().head(&cluster.path(&layout::snapshot(manifest.id))).await {
        Ok(_) => Ok(Vec::new()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Error::new(ErrorKind::NotFound, "backup.expired", format!("backup {} has expired meanwhile", manifest.id))
                .with_hint("run the restore again: it takes another backup, if one reaches the target"))
        }
        Err(error) => Err(error),
    }
}

/// Where each tablespace goes, by oid.
fn map_tablespaces(plan: &Plan, options: &RestoreOptions) -> Result<BTreeMap<u32, PathBuf>> {
    let spaces = &plan.snapshot.manifest.tablespaces;
    let mut locations = BTreeMap::new();
    let mut missing = Vec::new();
    for space in spaces {
        match options.tablespace_mapping.get(&space.location) {
            Some(path) if path.is_absolute() => drop(locations.insert(space.oid, path.clone())),
            Some(path) => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "restore.mapping",
                    format!("the tablespace location {} is not absolute", path.display()),
                ));
            }
            None => missing.push(format!("--tablespace-mapping '{}=NEW'", space.location)),
        }
    }
    if let Some(unknown) = options.tablespace_mapping.keys().find(|old| !spaces.iter().any(|s| s.location == **old)) {
        return Err(Error::new(ErrorKind::Usage, "restore.mapping", format!("the backup has no tablespace at {unknown}")));
    }
    if !missing.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "restore.mapping", "the backup has tablespaces outside the data directory")
            .with_hint(format!("say where each goes (its old path is used only when you name it): {}", missing.join(" "))));
    }
    let mut all: Vec<&Path> = locations.values().map(PathBuf::as_path).collect();
    all.push(&options.pgdata);
    for (n, a) in all.iter().enumerate() {
        // T19: component-wise, so that /ts and /ts2 are different places.
        if let Some(b) = all.iter().enumerate().find(|(m, b)| *m != n && a.starts_with(b)).map(|(_, b)| b) {
            return Err(Error::new(ErrorKind::Usage, "restore.mapping", format!("{} lies in {}", a.display(), b.display()))
                .with_hint("give the data directory and every tablespace a directory of its own"));
        }
    }
    Ok(locations)
}

/// Makes sure that a directory is empty or missing, unless delta is wanted.
fn check_root(path: &Path, delta: bool, is_pgdata: bool) -> Result<()> {
    match fs::read_dir(path) {
        Ok(mut entries) => {
            let empty = entries.all(|e| e.is_ok_and(|e| e.file_name() == "lost+found"));
            if !empty && !delta {
                return Err(Error::new(ErrorKind::Usage, "restore.not_empty", format!("{} is not empty", path.display()))
                    .with_hint("choose an empty directory, or use --delta to rewrite only what differs"));
            }
            if !empty && is_pgdata {
                delta::ensure_data_directory(path)?;
            }
            Ok(())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

fn prepare_root(path: &Path, is_pgdata: bool) -> Result<()> {
    if !path.exists() {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| Error::io("create", path, e))?;
    }
    if is_pgdata {
        // The server refuses to start on a directory that others can enter.
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(|e| Error::io("set the mode of", path, e))?;
    }
    Ok(())
}

/// Where an entry of the file table goes.
fn locate(path: &str, pgdata: &Path, locations: &BTreeMap<u32, PathBuf>) -> PathBuf {
    if path == CONTROL {
        return pgdata.join(CONTROL_STAGED);
    }
    let inside = path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split_once('/'));
    let space = inside.and_then(|(oid, rest)| Some((locations.get(&oid.parse().ok()?)?, rest)));
    space.map_or_else(|| pgdata.join(path), |(location, rest)| location.join(rest))
}

async fn remove_strangers(plan: &Plan, pgdata: &Path, locations: &BTreeMap<u32, PathBuf>) -> Result<()> {
    let mut wanted: BTreeMap<PathBuf, BTreeMap<String, Wanted>> = BTreeMap::new();
    for root in std::iter::once(pgdata).chain(locations.values().map(PathBuf::as_path)) {
        let _ = wanted.insert(root.to_path_buf(), BTreeMap::new());
    }
    let mut files = plan.snapshot.files();
    while let Some(entries) = files.next_chunk().await? {
        for entry in entries {
            if matches!(entry.node, Node::Tablespace { .. }) {
                continue;
            }
            let path = locate(&entry.path, pgdata, locations);
            let root = wanted.iter_mut().find(|(root, _)| path.starts_with(root));
            if let Some((root, names)) = root {
                let relative = path.strip_prefix(root).ok().and_then(Path::to_str).unwrap_or_default();
                let kind = if entry.node == Node::Directory { Wanted::Directory } else { Wanted::File };
                let _ = names.insert(relative.to_owned(), kind);
            }
        }
    }
    if let Some(names) = wanted.get_mut(pgdata) {
        names.extend([(UNFINISHED.to_owned(), Wanted::File), ("pg_tblspc".to_owned(), Wanted::Directory)]);
    }
    for (root, names) in wanted {
        delta::remove_strangers(&root, &names, root != pgdata)?;
    }
    Ok(())
}

/// Creates one entry and plans what has to be written into it.
async fn place(
    entry: &FileEntry,
    options: &RestoreOptions,
    locations: &BTreeMap<u32, PathBuf>,
    maps: &mut MapReader,
    batch: &mut Batch,
) -> Result<()> {
    let path = locate(&entry.path, &options.pgdata, locations);
    // A manifest has no business making programs run as somebody else.
    let mode = entry.mode & 0o777;
    match &entry.node {
        Node::Directory => {
            make_directory(&path, mode)?;
        }
        Node::Tablespace { .. } => {
            let oid = entry.path.strip_prefix("pg_tblspc/").and_then(|oid| oid.parse::<u32>().ok());
            let location = oid.and_then(|oid| locations.get(&oid)).ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    "restore.tablespace",
                    format!("{} is not among the backup's tablespaces", entry.path),
                )
            })?;
            make_directory(&options.pgdata.join("pg_tblspc"), 0o700)?;
            std::os::unix::fs::symlink(location, &path).map_err(|e| Error::io("link", &path, e))?;
        }
        Node::File { len, map } => {
            let mut exists = options.delta && path.symlink_metadata().is_ok_and(|m| m.is_file());
            if exists && path.symlink_metadata().is_ok_and(|m| m.nlink() > 1) {
                // Another name of the same file, a safety copy perhaps, must not change with it.
                remove_if_there(&path)?;
                exists = false;
            }
            let target = TargetFile { name: entry.path.clone(), path: path.clone(), len: *len };
            let number = batch.add_file(target);
            if exists {
                delta::prepare(&path, *len, mode)?;
            } else {
                if let Some(parent) = path.parent().filter(|parent| !parent.is_dir()) {
                    make_directory(parent, 0o700)?;
                }
                files::create(&path, *len, mode).map_err(|e| Error::io("create", &path, e))?;
            }
            for section in 0..map::sections(*len) {
                let map = maps.section(map, *len, section).await.map_err(|e| e.context(&entry.path))?;
                let first = u64::from(section) * u64::from(map::SECTION_BLOCKS);
                if exists {
                    let (path, digest, len) = (path.clone(), maps.cluster().keys().digest().clone(), *len);
                    let compared =
                        tokio::task::spawn_blocking(move || delta::differing(&path, len, first, &map, &digest).map(|d| (d, map)));
                    let (differing, map) = compared.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
                    for (block, extent) in differing {
                        batch.want(number, block, &map.packs, extent)?;
                    }
                } else {
                    let mut block = first;
                    for extent in &map.extents {
                        batch.want(number, block, &map.packs, *extent)?;
                        block += u64::from(extent.blocks());
                    }
                }
            }
        }
    }
    Ok(())
}

/// Writes what recovery needs, makes everything durable, and only then lets the directory be started.
fn finish(plan: &Plan, options: &RestoreOptions, locations: &BTreeMap<u32, PathBuf>, roots: &[PathBuf]) -> Result<Vec<String>> {
    let pgdata = &options.pgdata;
    let manifest = &plan.snapshot.manifest;
    let warnings: Vec<String> = manifest
        .bad_pages
        .first()
        .map(|_| {
            format!(
                "the backup holds {} pages that were already broken at the source; `pgvault list --output json` names them",
                manifest.bad_pages.len()
            )
        })
        .into_iter()
        .collect();
    for name in ["standby.signal", "recovery.signal", "backup_label.old", "tablespace_map.old"] {
        remove_if_there(&pgdata.join(name))?;
    }
    let conf = pgdata.join("postgresql.auto.conf");
    let existing = match fs::read(&conf) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        read => read.map_err(|e| Error::io("read", &conf, e))?,
    };
    let text = recovery::auto_conf(&existing, plan, &options.restore_command, options.action, options.archive_off);
    write_durably(&conf, &text, 0o600)?;
    write_durably(&pgdata.join("backup_label"), manifest.backup_label.as_bytes(), 0o600)?;
    if !locations.is_empty() {
        let entries = locations.iter().map(|(oid, path)| TablespaceMapEntry { oid: *oid, path: path.clone() });
        write_durably(&pgdata.join("tablespace_map"), &TablespaceMap { entries: entries.collect() }.to_bytes(), 0o600)?;
    }
    write_durably(&pgdata.join("recovery.signal"), b"", 0o600)?;
    for root in roots {
        sync_file_system(root)?;
    }
    let staged = pgdata.join(CONTROL_STAGED);
    let mut control = fs::read(&staged).map_err(|e| Error::io("read", &staged, e))?;
    invalidate_checkpoint(&mut control)
        .map_err(|e| Error::new(ErrorKind::Corrupt, "restore.control", format!("{CONTROL}: {e}")))?;
    write_durably(&staged, &control, 0o600)?;
    remove_if_there(&pgdata.join(UNFINISHED))?;
    fs::rename(&staged, pgdata.join(CONTROL)).map_err(|e| Error::io("rename", &staged, e))?;
    sync_directory(&pgdata.join("global"));
    sync_directory(pgdata);
    Ok(warnings)
}

fn make_directory(path: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().recursive(true).mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| Error::io("set the mode of", path, e)),
        Err(e) => Err(Error::io("create", path, e)),
    }
}

fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    use std::io::Write as _;
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io("write", path, e))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Makes everything written to a file system durable: one call instead of one per file, which matters with a million files.
fn sync_file_system(path: &Path) -> Result<()> {
    let directory = File::open(path).map_err(|e| Error::io("open", path, e))?;
    rustix::fs::syncfs(&directory).map_err(|e| Error::io("sync", path, e.into()))
}

/// Makes renames and removals in a directory durable.
fn sync_directory(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.sync_all();
    }
}
