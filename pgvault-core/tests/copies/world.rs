//! A vault with two backups of one small data directory and some WAL, and an empty one beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use pgvault_core::copy::{Copied, CopyOptions, copy};
use pgvault_core::crypto::sealed::{FrameEncoder, SealedWriter};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::format::BLOCK;
use pgvault_core::format::file_table::{FileEntry, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap, PackId};
use pgvault_core::format::object::Kind;
use pgvault_core::format::pack_table::{PackKind, PackRef};
use pgvault_core::inspect::{CheckOptions, check};
use pgvault_core::postgres::{Lsn, SegmentHeader, TimelineId};
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Objects, from_objects, objects_of};
use pgvault_core::vault::layout::{self, ClusterName};
use pgvault_core::vault::snapshot::{Manifest, Snapshot};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault, audit};
use pgvault_core::wal::catalog::Gap;
use pgvault_core::wal::{gap, object};
use pgvault_core::{ErrorKind, Result};
use ulid::Ulid;

/// Segments in a row, of 1 MiB, from 0/800000 on. See testdata/postgres/README.md.
pub(crate) const ROW: [&str; 5] = [
    "000000010000000000000008",
    "000000010000000000000009",
    "00000001000000000000000A",
    "00000001000000000000000B",
    "00000001000000000000000C",
];

/// The gap that the source has on record, behind everything that is there.
pub(crate) const GAP: Gap = Gap { timeline: TimelineId(1), from: Lsn(0xD0_0000), to: Lsn(0xE0_0000) };

/// Blocks of the one large file.
const BLOCKS: usize = 80;
const REGION: usize = 32 * BLOCK;

fn testdata(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(name)).unwrap()
}

pub(crate) fn segment(name: &str) -> Vec<u8> {
    zstd::stream::decode_all(testdata(&format!("{name}.zst")).as_slice()).unwrap()
}

/// Keys of their own: the first is the source's, the second the target's.
pub(crate) fn keys() -> &'static [(Unlock, Wrap); 2] {
    static KEYS: OnceLock<[(Unlock, Wrap); 2]> = OnceLock::new();
    KEYS.get_or_init(|| {
        [(); 2].map(|()| {
            let identity = age::x25519::Identity::generate();
            let wrap = Wrap::Recipient(identity.to_public().to_string());
            (Unlock::Identity(identity.to_string().expose_secret().to_owned().into()), wrap)
        })
    })
}

pub(crate) fn name() -> ClusterName {
    ClusterName::new("main", SegmentHeader::parse(&segment(ROW[0])).unwrap().system_identifier).unwrap()
}

pub(crate) fn store(inner: Arc<dyn ObjectStore>) -> Store {
    store_within(inner, Duration::from_secs(20))
}

pub(crate) fn store_within(inner: Arc<dyn ObjectStore>, request_timeout: Duration) -> Store {
    let options = StoreOptions { attempts: 2, request_timeout, backoff: Duration::from_millis(1), ..StoreOptions::default() };
    Store::new(inner, "memory:///", options)
}

pub(crate) async fn open(store: Store, which: usize) -> Result<Cluster> {
    Vault::open(store, Env::default()).await?.unlock(&name(), &keys()[which].0).await
}

async fn create(which: usize) -> (Arc<InMemory>, Cluster) {
    let memory = from_objects(&Objects::new()).await;
    let (vault, _) = Vault::create(store(memory.clone()), Env::default()).await.unwrap();
    assert!(vault.create_cluster(&name(), std::slice::from_ref(&keys()[which].1)).await.unwrap());
    (memory.clone(), open(store(memory), which).await.unwrap())
}

pub(crate) fn options() -> CopyOptions {
    CopyOptions { workers: 2, progress: Arc::new(Silent) }
}

/// Both vaults.
pub(crate) struct World {
    pub(crate) source: Arc<InMemory>,
    pub(crate) target: Arc<InMemory>,
    pub(crate) from: Cluster,
    pub(crate) to: Cluster,
    /// The source's backups, and the large file of each.
    pub(crate) backups: Vec<(Ulid, Vec<u8>)>,
    /// Where each region of the large file lies.
    regions: Vec<(PackId, u32)>,
    packs: Vec<PackRef>,
}

impl World {
    /// Two backups, four segments, and a gap on record.
    pub(crate) async fn new() -> Self {
        let ((source, from), (target, to)) = (create(0).await, create(1).await);
        let mut world = Self { source, target, from, to, backups: Vec::new(), regions: Vec::new(), packs: Vec::new() };
        world.add_wal(ROW[0]).await;
        world.add_wal(ROW[1]).await;
        // Noise, text and zeroes: stored as they are, and compressed.
        let mut content: Vec<u8> =
            (0..BLOCKS * BLOCK).map(|n| if n < REGION { ((n * n) >> 7).to_le_bytes()[0] } else { b'a' }).collect();
        content[REGION * 2..].fill(0x77);
        world.back_up(content.clone(), Limits::default(), 0x80_0028, 0x90_0100).await;
        content[REGION + 5] = b'!';
        // Its tables do not lie in the manifest's object.
        world.back_up(content, Limits { inline: 0, pack: 1 }, 0x90_0100, 0x90_0200).await;
        world.add_wal(ROW[2]).await;
        world.add_part(ROW[3], 5000).await;
        assert!(gap::record(&world.from, GAP).await.unwrap());
        world
    }

    pub(crate) async fn add_wal(&self, name: &str) {
        let bytes = segment(name);
        for sealed in object::seal_file(&self.from, name.parse().unwrap(), &bytes).unwrap() {
            assert!(object::put(&self.from, &sealed, &bytes).await.unwrap());
        }
    }

    /// The first bytes of a segment.
    pub(crate) async fn add_part(&self, name: &str, len: usize) {
        let bytes = &segment(name)[..len];
        let header = SegmentHeader::parse(bytes).unwrap();
        let scan = pgvault_core::postgres::scan_segment(bytes, header.start, header.segment_size).unwrap();
        let sealed = object::seal_part(&self.from, name.parse().unwrap(), 0, bytes, &scan).unwrap();
        assert!(object::put(&self.from, &sealed, bytes).await.unwrap());
    }

    async fn add_pack(&mut self, kind: PackKind, frames: &[&[u8]]) -> PackId {
        let id = self.from.env().new_id().unwrap();
        let keys = self.from.keys();
        let of = if kind == PackKind::Data { Kind::Data } else { Kind::Meta };
        let mut writer = SealedWriter::new(self.from.env(), keys, of, layout::pack(id), 0).unwrap();
        let mut encoder = FrameEncoder::new(1).unwrap();
        for frame in frames {
            let _ = writer.push(&mut encoder, frame, keys.digest().frame(frame)).unwrap();
        }
        let object = writer.finish(Vec::new());
        self.from.put_once(&object).await.unwrap();
        self.packs.push(PackRef { live: 1, ..object.as_pack(id.to_bytes(), kind) });
        id.to_bytes()
    }

    /// Commits a backup that stores the regions that differ from the backup before.
    pub(crate) async fn back_up(&mut self, content: Vec<u8>, limits: Limits, start: u64, stop: u64) -> Ulid {
        let control = testdata("pg_control.15");
        let parent = self.backups.last().map(|(_, content)| content.clone()).unwrap_or_default();
        let changed: Vec<usize> = (0..content.len().div_ceil(REGION))
            .filter(|n| content.chunks(REGION).nth(*n) != parent.chunks(REGION).nth(*n))
            .collect();
        let mut frames: Vec<&[u8]> = vec![&control];
        frames.extend(changed.iter().map(|n| content.chunks(REGION).nth(*n).unwrap()));
        let data = self.add_pack(PackKind::Data, &frames).await;
        for (n, frame) in changed.iter().zip(1..) {
            self.regions.resize(self.regions.len().max(n + 1), (data, 0));
            self.regions[*n] = (data, frame);
        }
        let digests = self.from.keys().digest();
        let map = FileMap {
            packs: self.regions.iter().map(|(pack, _)| *pack).collect(),
            extents: (0..)
                .zip(content.chunks(REGION))
                .map(|(pack, region)| Extent::Stored {
                    blocks: u32::try_from(region.len() / BLOCK).unwrap(),
                    pack,
                    frame: self.regions[pack as usize].1,
                    slot: 0,
                })
                .collect(),
            digests: content.chunks(BLOCK).map(|block| digests.block(block)).collect(),
        }
        .encode();
        let meta = self.add_pack(PackKind::Meta, &[&map]).await;
        let small = FileMap {
            packs: vec![data],
            extents: vec![Extent::Stored { blocks: 1, pack: 0, frame: 0, slot: 0 }],
            digests: vec![self.from.keys().digest().block(&control)],
        };
        let directory = |path: &str| FileEntry { path: path.into(), mode: 0o700, node: Node::Directory };
        let file =
            |path: &str, len: usize, map| FileEntry { path: path.into(), mode: 0o600, node: Node::File { len: len as u64, map } };
        let mut writer = TableWriter::default();
        for entry in [
            directory("base"),
            file("base/1", content.len(), MapPlace::of_sections([(meta, 0)])),
            directory("global"),
            file("global/pg_control", control.len(), MapPlace::Inline(small.encode())),
            directory("pg_wal"),
        ] {
            writer.push(&entry);
        }
        self.packs.sort();
        let tables = Tables::store(&self.from, &self.packs, writer.finish(), limits).await.unwrap();
        let id = self.from.env().new_id().unwrap();
        let json = serde_json::json!({
            "id": id, "kind": "full", "parent": null, "source": "local", "cluster": "main", "system_id": name().system_id.to_string(),
            "server_version": "15.20", "major": 15, "from_standby": false, "timeline": 1,
            "start_lsn": Lsn(start).to_string(), "stop_lsn": Lsn(stop).to_string(),
            "started_at": "2026-11-21T09:29:11Z", "finished_at": format!("2026-11-21T09:29:{:02}Z", 12 + self.backups.len()),
            "wal_segment_size": 1 << 20, "block_size": 8192, "data_checksums": true,
            "backup_label": "START WAL LOCATION: 0/800028\n", "tablespaces": [], "bad_pages": [], "labels": {}, "warnings": [],
            "files": 2, "source_bytes": content.len() + control.len(), "changed_bytes": 0, "stored_bytes": 0,
            "restore_amplification": 1.0, "objects_put": 0, "version": "0",
        });
        let manifest: Manifest = serde_json::from_value(json).unwrap();
        self.from.put_once(&Snapshot { manifest: &manifest, tables: &tables }.seal(&self.from).unwrap()).await.unwrap();
        audit::record(&self.from, audit::Event::BackupCommitted { backup_id: id }).await.unwrap();
        self.backups.push((id, content));
        id
    }

    pub(crate) async fn copy(&self) -> Result<Copied> {
        copy(&self.from, &self.to, &options()).await
    }

    /// The target holds all that the source holds: the check finds nothing, each backup restores, the WAL is byte for byte the same.
    pub(crate) async fn assert_whole(&self, target: &Cluster, why: &str) {
        let found = check(target, &CheckOptions { sizes_only: false, progress: Arc::new(Silent) }).await.unwrap();
        // What an interruption may leave, and nothing else.
        let problems = found.findings.iter().filter(|f| !f.problem.starts_with("has no record in the audit log"));
        assert_eq!(problems.collect::<Vec<_>>(), Vec::<&pgvault_core::inspect::Finding>::new(), "{why}");
        for (id, content) in &self.backups {
            let restored = restored(target, *id).await.unwrap_or_else(|e| panic!("{why}: restore {id}: {e:?}"));
            assert!(restored == *content, "{why}: {id} is not what was backed up");
        }
        for name in [ROW[0], ROW[1], ROW[2], ROW[3]] {
            let file = name.parse().unwrap();
            let (one, other) = (self.from.clone(), target.clone());
            let there = pgvault_core::wal::fetch::contents(&one, file).await.unwrap();
            assert!(there.is_some() && pgvault_core::wal::fetch::contents(&other, file).await.unwrap() == there, "{why}: {name}");
        }
        assert_eq!(gap::recorded(target).await.unwrap(), gap::recorded(&self.from).await.unwrap(), "{why}");
    }

    /// The target again, as somebody else opens it.
    pub(crate) async fn reopened(&self) -> Cluster {
        open(store(self.target.clone()), 1).await.unwrap()
    }

    pub(crate) async fn held(&self) -> Objects {
        objects_of(&*self.target).await
    }
}

/// The large file of a restored backup.
pub(crate) async fn restored(cluster: &Cluster, id: Ulid) -> Result<Vec<u8>> {
    let shm = PathBuf::from("/dev/shm");
    let folder = if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() };
    let pgdata = folder.path().join("data");
    let options = RestoreOptions {
        pgdata: pgdata.clone(),
        delta: false,
        tablespace_mapping: BTreeMap::new(),
        restore_command: RestoreCommand { program: "pgvault".into(), global_arguments: Vec::new(), arguments: Vec::new() },
        action: TargetAction::Pause,
        archive_off: false,
        workers: 1,
        progress: Arc::new(Silent),
    };
    let plan = plan(cluster, &Target::Immediate, PlanOptions { backup: Some(id), timeline: None }).await?;
    let _ = restore(cluster, &plan, &options).await?;
    Ok(std::fs::read(pgdata.join("base/1")).unwrap())
}

/// A store's failure, in any of the ways that a caller is told of it.
pub(crate) fn is_trouble(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Storage | ErrorKind::Failed | ErrorKind::Immutable)
}
