//! Manifests of base backups: writing one is the commit point, reading one is all a restore needs to start.
//!
//! ```text
//! frame 0     the manifest, JSON
//! frame 1     where the tables are
//! frame 2..   the tables' chunks, unless they lie in packs of their own
//! ```

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::census::Census;
use super::tables::{self, FIRST_CHUNK, FileTable, PackTable, Tables};
use super::{Cluster, StoredObject, layout};
use crate::crypto::sealed::{FrameEncoder, SealedObject, SealedWriter};
use crate::format::FormatError;
use crate::format::object::Kind;
use crate::format::pack_table::PackRef;
use crate::format::table_index::TableIndex;
use crate::postgres::{Lsn, SegmentSize, SystemId, TimelineId};
use crate::{Error, ErrorKind, Result};

/// Manifests read at once.
const PARALLEL: usize = 8;

/// Where a backup was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// `BASE_BACKUP` over a replication connection.
    Remote,
    /// The data directory, between `pg_backup_start` and `pg_backup_stop`.
    Local,
}

/// Whether a backup re-read and stored everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupKind {
    /// Every block was stored by this backup.
    Full,
    /// Unchanged blocks are references to packs of earlier backups.
    Incremental,
}

/// A tablespace other than the two built-in ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its object identifier, the name of the link under `pg_tblspc`.
    pub oid: u32,
    /// Where it lay on the source.
    pub location: String,
}

/// A page whose checksum did not match what it held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// The file, relative to the data directory.
    pub path: String,
    /// The block's number in the relation (not in the file: segments of a relation count on).
    pub block: u32,
    /// What is wrong with it.
    pub reason: String,
}

/// A base backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup's id, also the object's name.
    pub id: Ulid,
    /// Whether it stored everything.
    pub kind: BackupKind,
    /// The backup it compared with; information only, nothing is needed from it.
    pub parent: Option<Ulid>,
    /// Where it was read from.
    pub source: SourceKind,
    /// The configured cluster name.
    pub cluster: String,
    /// The cluster's identity.
    pub system_id: SystemId,
    /// `server_version` as the server prints it.
    pub server_version: String,
    /// Its major version, as in `PG_VERSION`.
    pub major: u32,
    /// True when the server was a standby.
    pub from_standby: bool,
    /// The timeline at start and stop.
    pub timeline: TimelineId,
    /// Where recovery begins (the checkpoint's redo position).
    pub start_lsn: Lsn,
    /// Where the backup is consistent.
    pub stop_lsn: Lsn,
    /// Server time at the start.
    pub started_at: jiff::Timestamp,
    /// Server time once the backup was complete: the earliest moment it can be restored to.
    pub finished_at: jiff::Timestamp,
    /// Bytes of a WAL segment.
    pub wal_segment_size: SegmentSize,
    /// Bytes of a page.
    pub block_size: u32,
    /// True when pages carry checksums.
    pub data_checksums: bool,
    /// The `backup_label` file, byte for byte.
    pub backup_label: String,
    /// Tablespaces by oid.
    pub tablespaces: Vec<Tablespace>,
    /// Pages that were broken at the source.
    pub bad_pages: Vec<BadPage>,
    /// What the operator attached.
    pub labels: BTreeMap<String, String>,
    /// Anything the operator should know.
    pub warnings: Vec<String>,
    /// Rows of the tables; `None` when they were not counted, in manifests of versions that counted none, and in a [`list`]ing, where
    /// the tables of all backups would be too many to hold: see [`OpenSnapshot::census`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub census: Option<Census>,
    /// Files in the file table.
    pub files: u64,
    /// Bytes of the files.
    pub source_bytes: u64,
    /// Bytes that had to be stored because they changed, before compression.
    pub changed_bytes: u64,
    /// Blocks that a restore decodes for each that it writes: 1 for a full backup.
    pub restore_amplification: f64,
    /// Bytes this backup added to the vault, WAL aside.
    pub stored_bytes: u64,
    /// Objects this backup added to the vault, WAL aside, with this manifest.
    pub objects_put: u64,
    /// The version of pgvault that wrote it.
    pub version: String,
}

/// Everything a manifest object holds, ready to be sealed.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// The manifest.
    pub manifest: &'a Manifest,
    /// Its tables; what does not fit into the object is stored by now.
    pub tables: &'a Tables,
}

impl Snapshot<'_> {
    /// Seals the manifest object.
    ///
    /// # Errors
    /// When it would be larger than an object may be.
    pub fn seal(&self, cluster: &Cluster) -> Result<SealedObject> {
        let json = serde_json::to_vec(self.manifest).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
        seal(cluster, self.manifest.id, &json, self.tables)
    }
}

/// Seals a manifest object of which `json` is the manifest.
///
/// # Errors
/// When it would be larger than an object may be.
pub(crate) fn seal(cluster: &Cluster, id: Ulid, json: &[u8], tables: &Tables) -> Result<SealedObject> {
    let keys = cluster.keys();
    let mut writer = SealedWriter::new(cluster.env(), keys, Kind::Snapshot, layout::snapshot(id), 1 << 20)?;
    let mut encoder = FrameEncoder::new(tables::LEVEL)?;
    let index = tables.index.encode();
    for frame in [json, &index].into_iter().chain(tables.chunks.iter().map(Vec::as_slice)) {
        let _ = writer.push(&mut encoder, frame, keys.digest().frame(frame))?;
    }
    let object = writer.finish(Vec::new());
    if object.bytes.len() as u64 > crate::format::MAX_OBJECT {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "snapshot.too_large",
            format!("the manifest would be {} bytes; the format allows {}", object.bytes.len(), crate::format::MAX_OBJECT),
        ));
    }
    Ok(object)
}

/// A committed backup, opened.
#[derive(Debug, Clone)]
pub struct OpenSnapshot {
    /// Its manifest.
    pub manifest: Manifest,
    index: TableIndex,
    object: StoredObject,
}

impl OpenSnapshot {
    /// The packs its files need.
    ///
    /// # Errors
    /// When the store fails or a table was changed.
    pub async fn packs(&self) -> Result<Vec<PackRef>> {
        let mut packs = Vec::new();
        let mut table = self.pack_table();
        while let Some(more) = table.next_chunk().await? {
            packs.extend(more);
        }
        Ok(packs)
    }

    /// The table of the packs that its files need, for who cannot hold all of it.
    pub fn pack_table(&self) -> PackTable<'_> {
        PackTable::new(&self.object, &self.index)
    }

    /// The packs that the tables themselves lie in; none when they are in the manifest's object.
    pub fn table_packs(&self) -> impl Iterator<Item = &PackRef> {
        self.index.packs.iter().map(|held| &held.pack)
    }

    /// The manifest as it is stored, with what a newer version may have added to it.
    pub(crate) async fn json(&self) -> Result<Vec<u8>> {
        self.object.frame(0).await
    }

    /// Rows of the tables, as the manifest has them; `None` when they were not counted.
    ///
    /// # Errors
    /// When the store fails or the manifest was changed.
    pub async fn census(&self) -> Result<Option<Census>> {
        #[derive(Deserialize)]
        struct OfManifest {
            #[serde(default)]
            census: Option<Census>,
        }
        let of: OfManifest = serde_json::from_slice(&self.json().await?)
            .map_err(|e| Error::new(ErrorKind::Corrupt, "snapshot.json", format!("{}: {e}", layout::snapshot(self.manifest.id))))?;
        Ok(of.census)
    }

    /// The chunks of the file table, each as it is stored.
    pub(crate) async fn file_chunks(&self) -> Result<Vec<Vec<u8>>> {
        tables::file_chunks(&self.object, &self.index).await
    }

    /// The file table, from its beginning.
    pub fn files(&self) -> FileTable<'_> {
        FileTable::new(&self.object, &self.index)
    }
}

/// Opens a committed backup.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none of that id, [`ErrorKind::Corrupt`] when it was changed.
pub async fn open(cluster: &Cluster, id: Ulid, size: Option<u64>) -> Result<OpenSnapshot> {
    let name = layout::snapshot(id);
    let object = cluster.open(Kind::Snapshot, &name, size).await?;
    let json = object.frame(0).await?;
    let manifest: Manifest =
        serde_json::from_slice(&json).map_err(|e| Error::new(ErrorKind::Corrupt, "snapshot.json", format!("{name}: {e}")))?;
    if manifest.id != id {
        return Err(Error::new(ErrorKind::Corrupt, "snapshot.id", format!("{name} holds the manifest of {}", manifest.id)));
    }
    let index = TableIndex::parse(&object.frame(1).await?).map_err(|e| Error::from(e).context(&name))?;
    let inside = if index.packs.is_empty() { u64::from(index.pack_chunks) + u64::from(index.file_chunks) } else { 0 };
    if u64::from(object.frame_count()) != u64::from(FIRST_CHUNK) + inside {
        let error = FormatError::new("table index", "does not account for every frame of the manifest");
        return Err(Error::from(error).context(&name));
    }
    Ok(OpenSnapshot { manifest, index, object })
}

/// The committed backups of a cluster.
#[derive(Debug, Default)]
pub struct Listing {
    /// Those that can be read, oldest first.
    pub snapshots: Vec<OpenSnapshot>,
    /// Those that cannot: one damaged manifest must not stand in the way of the others.
    pub damaged: Vec<Damaged>,
}

/// A backup whose manifest cannot be read.
#[derive(Debug)]
pub struct Damaged {
    /// The backup.
    pub id: Ulid,
    /// What is wrong.
    pub error: Error,
}

/// Reads every manifest.
///
/// # Errors
/// When the store fails. Damage is no error; it is in the listing.
pub async fn list(cluster: &Cluster) -> Result<Listing> {
    open_all(cluster, names(cluster).await?).await
}

/// The ids of the committed backups in the order in which they were begun, and how large the object of each is.
///
/// # Errors
/// When the store fails.
pub async fn names(cluster: &Cluster) -> Result<Vec<(Ulid, u64)>> {
    let listed = cluster.store().list(&cluster.path(layout::dir::SNAP)).await?;
    Ok(listed.iter().filter_map(|object| Some((layout::id_of(&object.name)?, object.size))).collect())
}

/// Reads the manifests of some backups, of those that are still there.
///
/// # Errors
/// As [`list`].
pub async fn open_all(cluster: &Cluster, backups: impl IntoIterator<Item = (Ulid, u64)>) -> Result<Listing> {
    let mut listing = Listing::default();
    let opening = backups.into_iter().map(|(id, size)| async move { (id, open(cluster, id, Some(size)).await) });
    let mut opening = stream::iter(opening.collect::<Vec<_>>()).buffered(PARALLEL);
    while let Some((id, opened)) = opening.next().await {
        match opened {
            Ok(mut snapshot) => {
                snapshot.manifest.census = None;
                listing.snapshots.push(snapshot);
            }
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                tracing::warn!(backup = %id, %error, "a manifest cannot be read");
                listing.damaged.push(Damaged { id, error });
            }
            // Expired since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    listing.snapshots.sort_by_key(|s| (s.manifest.finished_at, s.manifest.id));
    Ok(listing)
}
