//! The tables of a manifest, inside its object and outside: what was written is read, and nothing else.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use bytes::Bytes;
use object_store::memory::InMemory;
use pgvault_core::crypto::sealed::{FrameEncoder, ObjectReader, SealedObject, SealedWriter};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::format::file_table::{FileEntry, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap};
use pgvault_core::format::object::{HEADER_LEN, Kind, TAIL_LEN};
use pgvault_core::format::pack_table::{self, PackKind, PackRef};
use pgvault_core::format::{BLOCK, MAX_FRAME, MAX_OBJECT};
use pgvault_core::inspect::{CheckOptions, Report, Severity, check, scrub};
use pgvault_core::postgres::SystemId;
use pgvault_core::progress::Silent;
use pgvault_core::restore::plan::{PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Objects, from_objects, objects_of};
use pgvault_core::vault::layout::{self, ClusterName};
use pgvault_core::vault::snapshot::{self, Manifest, Snapshot};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault, audit};
use pgvault_core::{ErrorKind, Result};
use sha2::{Digest, Sha256};
use ulid::Ulid;

/// Every chunk in a pack of its own.
const OUTSIDE: Limits = Limits { inline: 0, pack: 1 };

/// Not a passphrase: vaults are opened by the hundred, and stretching takes its time.
fn key() -> &'static (Unlock, Wrap) {
    static KEY: OnceLock<(Unlock, Wrap)> = OnceLock::new();
    KEY.get_or_init(|| {
        let identity = age::x25519::Identity::generate();
        let wrap = Wrap::Recipient(identity.to_public().to_string());
        (Unlock::Identity(identity.to_string().expose_secret().to_owned().into()), wrap)
    })
}

fn name() -> ClusterName {
    ClusterName::new("main", SystemId(7)).unwrap()
}

fn store(memory: Arc<InMemory>) -> Store {
    let options =
        StoreOptions { attempts: 1, request_timeout: Duration::from_secs(20), backoff: Duration::ZERO, ..StoreOptions::default() };
    Store::new(memory, "memory:///", options)
}

async fn create() -> (Arc<InMemory>, Cluster) {
    let memory = Arc::new(InMemory::new());
    let (vault, _) = Vault::create(store(memory.clone()), Env::default()).await.unwrap();
    assert!(vault.create_cluster(&name(), std::slice::from_ref(&key().1)).await.unwrap());
    (memory, vault.unlock(&name(), &key().0).await.unwrap())
}

async fn open(objects: &Objects) -> Cluster {
    let vault = Vault::open(store(from_objects(objects).await), Env::default()).await.unwrap();
    vault.unlock(&name(), &key().0).await.unwrap()
}

fn manifest(id: Ulid, files: u64, source_bytes: u64) -> Manifest {
    let json = serde_json::json!({
        "id": id, "kind": "full", "parent": null, "source": "local", "cluster": "main", "system_id": "7",
        "server_version": "15.20", "major": 15, "from_standby": false, "timeline": 1,
        "start_lsn": "0/E00028", "stop_lsn": "0/E00028",
        "started_at": "2026-11-21T09:29:11Z", "finished_at": "2026-11-21T09:29:12Z",
        "wal_segment_size": 1 << 20, "block_size": 8192, "data_checksums": true,
        "backup_label": "START WAL LOCATION: 0/E00028\n", "tablespaces": [], "bad_pages": [], "labels": {}, "warnings": [],
        "files": files, "source_bytes": source_bytes, "changed_bytes": 0, "stored_bytes": 0, "restore_amplification": 1.0, "objects_put": 0, "version": "0",
    });
    serde_json::from_value(json).unwrap()
}

async fn commit(cluster: &Cluster, tables: &Tables, manifest: &Manifest) {
    cluster.put_once(&Snapshot { manifest, tables }.seal(cluster).unwrap()).await.unwrap();
    audit::record(cluster, audit::Event::BackupCommitted { backup_id: manifest.id }).await.unwrap();
}

fn seal(cluster: &Cluster, kind: Kind, name: &str, frames: &[Vec<u8>]) -> SealedObject {
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), kind, name, 0).unwrap();
    let mut encoder = FrameEncoder::new(1).unwrap();
    for frame in frames {
        let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame)).unwrap();
    }
    writer.finish(Vec::new())
}

/// One chunk of a file table.
fn chunk(entries: &[FileEntry]) -> Vec<u8> {
    let mut writer = TableWriter::default();
    for entry in entries {
        writer.push(entry);
    }
    writer.finish().concat()
}

/// Commits a backup of a directory with one file, `global/pg_control`: three chunks, one of the pack table.
async fn back_up(cluster: &Cluster, limits: Limits) -> (Ulid, Vec<PackRef>) {
    let control = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres/pg_control.15");
    let control = std::fs::read(control).unwrap();
    assert_eq!(control.len(), BLOCK);
    let id = cluster.env().new_id().unwrap();
    let object = seal(cluster, Kind::Data, &layout::pack(id), std::slice::from_ref(&control));
    cluster.put_once(&object).await.unwrap();
    let pack = PackRef { live: 1, ..object.as_pack(id.to_bytes(), PackKind::Data) };
    let map = FileMap {
        packs: vec![pack.id],
        extents: vec![Extent::Stored { blocks: 1, pack: 0, frame: 0, slot: 0 }],
        digests: vec![[0; 8]],
    };
    let directory = |path: &str| FileEntry { path: path.into(), mode: 0o700, node: Node::Directory };
    let file = Node::File { len: BLOCK as u64, map: MapPlace::Inline(map.encode()) };
    let file = FileEntry { path: "global/pg_control".into(), mode: 0o600, node: file };
    let chunks = vec![chunk(&[directory("base"), directory("global")]), chunk(&[file, directory("pg_wal")])];
    let tables = Tables::store(cluster, &[pack], chunks, limits).await.unwrap();
    let manifest = manifest(cluster.env().new_id().unwrap(), 1, BLOCK as u64);
    commit(cluster, &tables, &manifest).await;
    (manifest.id, tables.packs().copied().collect())
}

async fn restores(cluster: &Cluster, id: Ulid) -> Result<()> {
    // In memory where there is such a place: a restore syncs its whole file system.
    let shm = Path::new("/dev/shm");
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
    let restored = restore(cluster, &plan, &options).await;
    assert_eq!(restored.is_ok(), pgdata.join("global/pg_control").exists());
    if restored.is_ok() {
        assert!(pgdata.join("base").is_dir() && pgdata.join("pg_wal").is_dir());
    }
    restored.map(drop)
}

async fn report(cluster: &Cluster) -> Report {
    check(cluster, &CheckOptions { sizes_only: false, progress: Arc::new(Silent) }).await.unwrap()
}

async fn scrubbed(cluster: &Cluster) -> Vec<String> {
    let report = scrub(cluster.vault(), None, &(Arc::new(Silent) as _)).await.unwrap();
    report.findings.into_iter().map(|finding| finding.object).collect()
}

/// A number that looks like none of its neighbours, so that tables of such do not compress.
fn noise(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

fn many_packs(count: u64) -> Vec<PackRef> {
    let hash = |n: u64| (0..4).flat_map(|part| noise(n * 4 + part).to_le_bytes()).collect::<Vec<u8>>().try_into().unwrap();
    let pack = |n: u64| PackRef {
        id: u128::from(n).to_be_bytes(),
        kind: PackKind::Data,
        size: 32 << 20,
        footer_len: 7000,
        frames: 300,
        live: 9600,
        sha256: hash(n),
    };
    (1..=count).map(pack).collect()
}

/// Nine terabytes stored: a table of packs that is no longer one frame, in the manifest's own object.
#[tokio::test]
async fn a_pack_table_of_many_frames_is_read_back() {
    let (_, cluster) = create().await;
    let packs = many_packs(300_000);
    let tables = Tables::store(&cluster, &packs, Vec::new(), Limits::default()).await.unwrap();
    assert_eq!(tables.packs().count(), 0, "it fits");
    let manifest = manifest(Ulid(1), 0, 0);
    commit(&cluster, &tables, &manifest).await;
    let snapshot = snapshot::open(&cluster, manifest.id, None).await.unwrap();
    assert!(snapshot.packs().await.unwrap() == packs);
    assert!(snapshot.files().next_chunk().await.unwrap().is_none());
}

/// Tables that are larger than any object.
#[tokio::test]
async fn tables_of_a_million_files_and_more_are_read_back() {
    const FILES: u64 = 1_500_000;
    let (memory, cluster) = create().await;
    let entry = |n: u64| {
        let mut map = vec![0; 32];
        for (word, place) in (0..).zip(map.as_chunks_mut().0) {
            *place = noise(n + word * FILES).to_le_bytes();
        }
        FileEntry { path: format!("base/{n:07}"), mode: 0o600, node: Node::File { len: n, map: MapPlace::Inline(map) } }
    };
    let mut writer = TableWriter::default();
    for number in 0..FILES {
        writer.push(&entry(number));
    }
    let packs = many_packs(300_000);
    let tables = Tables::store(&cluster, &packs, writer.finish(), Limits::default()).await.unwrap();
    let sizes: Vec<u64> = tables.packs().map(|pack| pack.size).collect();
    assert!(sizes.iter().sum::<u64>() > MAX_OBJECT, "an object would have held it: {sizes:?}");
    assert!(sizes.iter().all(|size| *size <= (16 << 20) + MAX_FRAME as u64 + 4096), "{sizes:?}");
    let manifest = manifest(Ulid(1), FILES, 0);
    commit(&cluster, &tables, &manifest).await;
    let stored = objects_of(&*memory).await;
    let size = stored[&cluster.path(&layout::snapshot(manifest.id))].len();
    assert!(size < 4096, "the manifest's own object has {size} bytes");

    let snapshot = snapshot::open(&cluster, manifest.id, None).await.unwrap();
    assert!(snapshot.packs().await.unwrap() == packs);
    let mut files = snapshot.files();
    let mut next = 0;
    while let Some(entries) = files.next_chunk().await.unwrap() {
        for read in entries {
            // All would take the test longer than the reading; the order is looked at by the reader.
            assert!(next % 16 != 0 || read == entry(next), "{read:?}");
            next += 1;
        }
    }
    assert_eq!(next, FILES);
    let listing = snapshot::list(&cluster).await.unwrap();
    assert_eq!((listing.snapshots.len(), listing.damaged.len()), (1, 0));
    assert_eq!(scrubbed(&cluster).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_backup_with_its_tables_outside_is_one_like_any_other() {
    for (limits, outside) in [(OUTSIDE, 3), (Limits { pack: 1 << 20, ..OUTSIDE }, 1), (Limits::default(), 0)] {
        let (_, cluster) = create().await;
        let (id, packs) = back_up(&cluster, limits).await;
        assert_eq!(packs.len(), outside);
        assert_eq!(snapshot::open(&cluster, id, None).await.unwrap().table_packs().count(), outside);
        assert_eq!(report(&cluster).await.findings, []);
        assert_eq!(scrubbed(&cluster).await, Vec::<String>::new());
        restores(&cluster, id).await.unwrap();
    }
}

/// Each pack of a table changed in each of its parts, as rot does it and with the clear hash made to fit.
#[tokio::test]
async fn a_changed_table_pack_is_named_and_nothing_is_restored_with_it() {
    let (memory, cluster) = create().await;
    let (first, mine) = back_up(&cluster, OUTSIDE).await;
    let (second, theirs) = back_up(&cluster, OUTSIDE).await;
    let objects = objects_of(&*memory).await;
    let path = |pack: &PackRef| cluster.path(&layout::pack(Ulid::from_bytes(pack.id)));
    for (number, pack) in mine.iter().enumerate() {
        let name = path(pack);
        let original = &objects[&name];
        let len = original.len();
        let footer = len - TAIL_LEN - pack.footer_len as usize;
        let mut changes: Vec<(String, Option<Bytes>, bool)> = Vec::new();
        for at in [0, 4, 6, 20, 40, 50, 70, 100, HEADER_LEN, footer - 1, footer, len - TAIL_LEN, len - TAIL_LEN + 8] {
            let mut bytes = original.to_vec();
            bytes[at] ^= 1;
            changes.push((format!("a bit at {at}"), Some(bytes.clone().into()), false));
            let hash = Sha256::digest(&bytes[..len - 32]);
            bytes[len - 32..].copy_from_slice(&hash);
            // What stands in the clear and says what no PGV1 object says is seen without a key too.
            let clear = [0, 4, 6, len - TAIL_LEN, len - TAIL_LEN + 8].contains(&at);
            changes.push((format!("a bit at {at}, hash made to fit"), Some(bytes.into()), !clear));
        }
        for kept in [len - 1, len / 2, 0] {
            changes.push((format!("cut to {kept}"), Some(original.slice(..kept)), false));
        }
        changes.push(("deleted".into(), None, true));
        let siblings = [&mine[(number + 1) % mine.len()], &theirs[number]];
        for sibling in siblings {
            changes.push((format!("{} in its place", path(sibling)), Some(objects[&path(sibling)].clone()), true));
        }
        for (change, bytes, scrubs) in changes {
            let why = format!("table pack {number}: {change}");
            let mut changed = objects.clone();
            match bytes {
                Some(bytes) => drop(changed.insert(name.clone(), bytes)),
                None => drop(changed.remove(&name)),
            }
            let cluster = open(&changed).await;
            let report = report(&cluster).await;
            let named = report.findings.iter().find(|f| f.object == name && f.severity == Severity::Error);
            assert!(named.is_some_and(|f| f.hurts == [first]), "{why}: {:?}", report.findings);
            // Bit 0 of the kind makes another known kind of it; only a key tells.
            if !change.contains("at 6,") {
                assert_eq!(scrubbed(&cluster).await.contains(&name), !scrubs, "{why}");
            }
            let error = restores(&cluster, first).await.unwrap_err();
            assert!([ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()), "{why}: {error:?}");
            // Its neighbour is not concerned, and the list shows both.
            restores(&cluster, second).await.unwrap();
            assert_eq!(snapshot::list(&cluster).await.unwrap().snapshots.len(), 2);
        }
    }
}

/// The hash in the clear is for whoever has no key: a restore does without it, scrub and check say it.
#[tokio::test]
async fn a_table_pack_whose_hash_alone_rotted_is_named_and_restored() {
    let (memory, cluster) = create().await;
    let (id, packs) = back_up(&cluster, OUTSIDE).await;
    let mut objects = objects_of(&*memory).await;
    let name = cluster.path(&layout::pack(Ulid::from_bytes(packs[0].id)));
    let mut bytes = objects[&name].to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    let _ = objects.insert(name.clone(), bytes.into());
    let cluster = open(&objects).await;
    assert_eq!(scrubbed(&cluster).await, [name.as_str()]);
    assert!(report(&cluster).await.findings.iter().any(|f| f.object == name && f.hurts == [id]));
    restores(&cluster, id).await.unwrap();
}

/// Whoever has the keys can seal anything under any name. The manifest says what it was written for.
#[tokio::test]
async fn a_table_pack_sealed_anew_with_other_chunks_is_refused() {
    let (memory, cluster) = create().await;
    let (id, packs) = back_up(&cluster, Limits { inline: 0, pack: 1 << 20 }).await;
    let objects = objects_of(&*memory).await;
    let relative = layout::pack(Ulid::from_bytes(packs[0].id));
    let stored = &objects[&cluster.path(&relative)];
    let reader = ObjectReader::open_whole(cluster.keys(), Kind::Meta, &relative, stored).unwrap();
    let frames: Vec<Vec<u8>> = (0..3).map(|n| reader.decode_from(cluster.keys(), n, stored).unwrap()).collect();
    let swapped = vec![frames[0].clone(), frames[2].clone(), frames[1].clone()];
    let other = vec![frames[0].clone(), chunk(&[]), frames[2].clone()];
    let more = [&frames[..], &frames[2..]].concat();
    for (what, frames, code) in [
        ("the same chunks", frames.clone(), None),
        ("in another order", swapped, Some("table.substituted")),
        ("one of them emptied", other, Some("table.substituted")),
        ("one too many", more, Some("table.substituted")),
        ("one too few", frames[..2].to_vec(), Some("table.substituted")),
    ] {
        let object = seal(&cluster, Kind::Meta, &relative, &frames);
        let mut changed = objects.clone();
        let same_size = object.bytes.len() == stored.len();
        let _ = changed.insert(cluster.path(&relative), object.bytes);
        let cluster = open(&changed).await;
        let restored = restores(&cluster, id).await;
        let found = report(&cluster).await;
        match code {
            None => {
                restored.unwrap();
                assert_eq!(found.findings, [], "{what}");
            }
            Some(code) => {
                let error = restored.unwrap_err();
                assert!(error.kind() == ErrorKind::Corrupt && (!same_size || error.code() == code), "{what}: {error:?}");
                assert!(found.has_errors(), "{what}");
            }
        }
    }
}

/// Each chunk is in order; the table is not.
#[tokio::test]
async fn chunks_in_the_wrong_order_are_refused() {
    let directory = |path: &str| FileEntry { path: path.into(), mode: 0o700, node: Node::Directory };
    let (a, b) = (chunk(&[directory("a"), directory("b")]), chunk(&[directory("b"), directory("c")]));
    for limits in [Limits::default(), OUTSIDE] {
        for chunks in [vec![b.clone(), a.clone()], vec![a.clone(), b.clone()], vec![a.clone(), a.clone()]] {
            let (_, cluster) = create().await;
            let tables = Tables::store(&cluster, &[], chunks, limits).await.unwrap();
            commit(&cluster, &tables, &manifest(Ulid(1), 0, 0)).await;
            let snapshot = snapshot::open(&cluster, Ulid(1), None).await.unwrap();
            let mut files = snapshot.files();
            assert!(files.next_chunk().await.unwrap().is_some());
            assert_eq!(files.next_chunk().await.unwrap_err().kind(), ErrorKind::Corrupt);
            assert!(report(&cluster).await.has_errors());
        }
    }
    let (_, cluster) = create().await;
    let mut packs = many_packs(300_000);
    let last = packs.len() - 1;
    packs[last].id = packs[0].id;
    let tables = Tables::store(&cluster, &packs[..last], Vec::new(), Limits::default()).await.unwrap();
    commit(&cluster, &tables, &manifest(Ulid(1), 0, 0)).await;
    assert_eq!(snapshot::open(&cluster, Ulid(1), None).await.unwrap().packs().await.unwrap().len(), last);
    // At a border between two chunks, which each of them alone does not see.
    let border = pack_table::parse_chunk(&pack_table::encode(&packs)[0]).unwrap().len();
    packs.swap(border - 1, border);
    let tables = Tables::store(&cluster, &packs[..last], Vec::new(), Limits::default()).await.unwrap();
    commit(&cluster, &tables, &manifest(Ulid(2), 0, 0)).await;
    let error = snapshot::open(&cluster, Ulid(2), None).await.unwrap().packs().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

/// An index that leaves frames of the manifest over, or wants more than there are.
#[tokio::test]
async fn a_manifest_with_a_frame_too_many_is_damaged() {
    let (memory, cluster) = create().await;
    let (id, _) = back_up(&cluster, Limits::default()).await;
    let relative = layout::snapshot(id);
    let objects = objects_of(&*memory).await;
    let stored = &objects[&cluster.path(&relative)];
    let reader = ObjectReader::open_whole(cluster.keys(), Kind::Snapshot, &relative, stored).unwrap();
    let frames: Vec<Vec<u8>> = (0..5).map(|n| reader.decode_from(cluster.keys(), n, stored).unwrap()).collect();
    for frames in [frames[..4].to_vec(), frames[..2].to_vec(), [&frames[..], &frames[4..]].concat()] {
        let mut changed = objects.clone();
        let _ = changed.insert(cluster.path(&relative), seal(&cluster, Kind::Snapshot, &relative, &frames).bytes);
        let cluster = open(&changed).await;
        let listing = snapshot::list(&cluster).await.unwrap();
        assert_eq!((listing.snapshots.len(), listing.damaged.len()), (0, 1));
        assert!(report(&cluster).await.findings.iter().any(|f| f.hurts == [id]));
    }
}
