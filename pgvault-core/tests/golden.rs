//! The bytes of format PGV1, written down: `testdata/format/1/`.
//!
//! Two things are checked. Today's writer still makes these bytes from the same keys, time and randomness. And a reader written
//! from `docs/format.md` alone, with nothing of pgvault but its published constants, finds the contents in them.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use std::path::PathBuf;

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use hkdf::Hkdf;
use pgvault_core::crypto::sealed::{FrameEncoder, ObjectReader, SealedWriter, verify_keyless};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::format::file_table::{FileEntry, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap};
use pgvault_core::format::object::{Codec, Kind};
use pgvault_core::format::pack_table::{PackKind, PackRef};
use pgvault_core::postgres::SystemId;
use pgvault_core::store::Store;
use pgvault_core::vault::layout::{self, ClusterName};
use pgvault_core::vault::snapshot::{self, Manifest, Snapshot};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault};
use sha2::{Digest, Sha256};

const PASSPHRASE: &str = "correct horse battery staple";
const NAME: &str = "drill/example";
const FRAMES: [&[u8]; 3] = [b"hello, vault", b"", &[b'a'; 100]];
const EXTRA: &[u8] = b"{\"n\":1}";

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../testdata/format/1").join(name)
}

/// The vault: every byte of it follows from the seed.
async fn vault() -> (Store, Cluster) {
    let store = Store::in_memory();
    let (vault, _) = Vault::create(store.clone(), fixed::env("golden 1")).await.unwrap();
    let name = ClusterName::new("main", SystemId(7_441_234_567_890_123_456)).unwrap();
    assert!(vault.create_cluster(&name, &[Wrap::Passphrase(PASSPHRASE.into())]).await.unwrap());
    let cluster = vault.unlock(&name, &Unlock::Passphrase(PASSPHRASE.into())).await.unwrap();
    (store, cluster)
}

/// What the two backups hold. The file's map has a run of zeroes, one extent, and digests.
const FILE: &str = "base/5/16384";
const FILE_LEN: u64 = 3 * 8192 + 100;

fn contents() -> Vec<u8> {
    [&[b'x'; 8192][..], &[b'y'; 100], &[0; 8092]].concat()
}

fn manifest(id: ulid::Ulid) -> Manifest {
    serde_json::from_value(serde_json::json!({
        "id": id, "kind": "full", "parent": null, "source": "local", "cluster": "main", "system_id": "7441234567890123456",
        "server_version": "15.20", "major": 15, "from_standby": false, "timeline": 1,
        "start_lsn": "0/E00028", "stop_lsn": "0/E00138",
        "started_at": "2026-11-21T09:29:11Z", "finished_at": "2026-11-21T09:29:12Z",
        "wal_segment_size": 1 << 20, "block_size": 8192, "data_checksums": true,
        "backup_label": "START WAL LOCATION: 0/E00028\n", "tablespaces": [], "bad_pages": [], "labels": {}, "warnings": [],
        "files": 1, "source_bytes": FILE_LEN, "changed_bytes": 8292, "stored_bytes": 0, "restore_amplification": 1.0, "objects_put": 0, "version": "0",
    }))
    .unwrap()
}

/// A pack and two backups of the one file in it: one with its tables in the manifest, one with them outside.
async fn write_backups(cluster: &Cluster) {
    let (env, keys) = (cluster.env(), cluster.keys());
    let id = env.new_id().unwrap();
    let mut writer = SealedWriter::new(env, keys, Kind::Data, layout::pack(id), 0).unwrap();
    let mut encoder = FrameEncoder::new(1).unwrap();
    let _ = writer.push(&mut encoder, &contents(), keys.digest().frame(&contents())).unwrap();
    let object = writer.finish(Vec::new());
    cluster.put_once(&object).await.unwrap();
    let pack = PackRef { live: 2, ..object.as_pack(id.to_bytes(), PackKind::Data) };
    let map = FileMap {
        packs: vec![pack.id],
        extents: vec![Extent::Zero { blocks: 2 }, Extent::Stored { blocks: 2, pack: 0, frame: 0, slot: 0 }],
        digests: contents().chunks(8192).map(|block| keys.digest().block(block)).collect(),
    };
    for limits in [Limits::default(), Limits { inline: 0, pack: 1 }] {
        // A chunk for each entry, so that there are some.
        let files = [("base", Node::Directory), (FILE, Node::File { len: FILE_LEN, map: MapPlace::Inline(map.encode()) })];
        let chunk = |(path, node): (&str, Node)| {
            let mut writer = TableWriter::default();
            writer.push(&FileEntry { path: path.into(), mode: 0o700, node });
            writer.finish().concat()
        };
        let tables = Tables::store(cluster, &[pack], files.map(chunk).into(), limits).await.unwrap();
        let manifest = manifest(env.new_id().unwrap());
        cluster.put_once(&Snapshot { manifest: &manifest, tables: &tables }.seal(cluster).unwrap()).await.unwrap();
    }
}

/// Files of the golden vault: name in the vault, bytes.
async fn write() -> Vec<(String, Vec<u8>)> {
    let (store, cluster) = vault().await;
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Drill, NAME, 0).unwrap();
    let mut encoder = FrameEncoder::new(1).unwrap();
    for frame in FRAMES {
        let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame)).unwrap();
    }
    cluster.put_once(&writer.finish(EXTRA.to_vec())).await.unwrap();
    write_backups(&cluster).await;
    let mut files = Vec::new();
    for object in store.list("").await.unwrap() {
        files.push((object.name.clone(), store.get(&object.name).await.unwrap().to_vec()));
    }
    files
}

#[tokio::test(flavor = "current_thread")]
async fn writing_gives_the_golden_bytes() {
    let written = write().await;
    assert_eq!(
        written.len(),
        11,
        "vault.json, cluster.json, a slot, an epoch, an object; a pack, two manifests and three packs of tables"
    );
    for (name, bytes) in written {
        let golden = std::fs::read(file(&name)).unwrap();
        assert!(bytes == golden, "{name} is written differently now; see testdata/format/README.md");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_golden_object_is_read() {
    let (_, cluster) = vault().await;
    let object = std::fs::read(file(&cluster.path(NAME))).unwrap();
    assert!(verify_keyless(&object).is_ok());
    let reader = ObjectReader::open_whole(cluster.keys(), Kind::Drill, NAME, &object).unwrap();
    let codecs: Vec<_> = reader.frames().iter().map(|f| f.codec).collect();
    assert_eq!(codecs, [Codec::None, Codec::None, Codec::Zstd]);
    for (number, frame) in (0..).zip(FRAMES) {
        assert_eq!(reader.decode_from(cluster.keys(), number, &object).unwrap(), frame);
    }
    assert_eq!(reader.extra(), EXTRA);
}

#[tokio::test(flavor = "current_thread")]
async fn the_golden_backups_are_read() {
    let (store, cluster) = vault().await;
    for name in names("c") {
        // Keys and epoch are there already.
        let bytes: Vec<u8> = std::fs::read(file(&name)).unwrap();
        store.put_once(&name, bytes.into()).await.unwrap();
    }
    let listing = snapshot::list(&cluster).await.unwrap();
    assert_eq!((listing.snapshots.len(), listing.damaged.len()), (2, 0));
    let mut outside = Vec::new();
    for snapshot in listing.snapshots {
        outside.push(snapshot.table_packs().count());
        assert_eq!(snapshot.packs().await.unwrap().len(), 1);
        let (mut files, mut paths) = (snapshot.files(), Vec::new());
        while let Some(entries) = files.next_chunk().await.unwrap() {
            paths.extend(entries.into_iter().map(|entry| entry.path));
        }
        assert_eq!(paths, ["base", FILE]);
    }
    assert_eq!(outside, [0, 3]);
}

/// `cargo test -p pgvault-core --test golden -- --ignored` writes the files anew, see testdata/format/README.md.
#[tokio::test(flavor = "current_thread")]
#[ignore = "writes into the source tree"]
async fn write_golden_files() {
    for (name, bytes) in write().await {
        std::fs::create_dir_all(file(&name).parent().unwrap()).unwrap();
        std::fs::write(file(&name), bytes).unwrap();
    }
}

fn expand<const N: usize>(ikm: &[u8], salt: &[u8], info: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    Hkdf::<Sha256>::new(Some(salt), ikm).expand(&info.concat(), &mut out).unwrap();
    out
}

fn decrypt(key: &[u8; 32], nonce: [u8; 12], aad: &[u8], sealed: &[u8]) -> Vec<u8> {
    let (body, tag) = sealed.split_last_chunk::<16>().unwrap();
    let mut body = body.to_vec();
    let cipher = Aes256Gcm::new(&(*key).into());
    cipher.decrypt_inout_detached(&Nonce::from(nonce), aad, body.as_mut_slice().into(), &Tag::from(*tag)).unwrap();
    body
}

fn nonce(domain: u32, counter: u64) -> [u8; 12] {
    [&domain.to_le_bytes()[..], &counter.to_le_bytes()].concat().try_into().unwrap()
}

fn base64(value: &serde_json::Value) -> Vec<u8> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(value.as_str().unwrap()).unwrap()
}

/// Crockford's base 32, the spelling of ULIDs.
fn ulid(text: &str) -> [u8; 16] {
    let digit = |c| "0123456789ABCDEFGHJKMNPQRSTVWXYZ".find(c).unwrap() as u128;
    text.chars().fold(0u128, |value, c| value << 5 | digit(c)).to_be_bytes()
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap()
}

/// Every file below `directory`, by its name in the vault, sorted.
fn names(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(file(directory)).unwrap().map(|entry| entry.unwrap());
    let below = |entry: std::fs::DirEntry| {
        let name = format!("{directory}/{}", entry.file_name().into_string().unwrap());
        if entry.path().is_dir() { names(&name) } else { vec![name] }
    };
    let mut names: Vec<String> = entries.flat_map(below).collect();
    names.sort();
    names
}

/// The only file below `directory`.
fn only(directory: &str) -> Vec<u8> {
    let names = names(directory);
    assert_eq!(names.len(), 1);
    std::fs::read(file(&names[0])).unwrap()
}

const PREFIX: &str = "c/main-7441234567890123456";

/// A reader that follows docs/format.md step by step, from the passphrase to the contents.
struct Reader {
    vault_id: [u8; 16],
    cluster_id: [u8; 16],
    epoch_id: [u8; 16],
    data_key: Vec<u8>,
    digest_key: [u8; 32],
}

/// Bytes taken from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        head
    }

    fn varint(&mut self) -> usize {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.take(1)[0];
            value |= usize::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return value;
            }
            shift += 7;
        }
    }

    fn string(&mut self) -> &'a [u8] {
        let n = self.varint();
        self.take(n)
    }
}

/// An object that the reader opened.
struct Opened {
    frames: Vec<Vec<u8>>,
    digests: Vec<Vec<u8>>,
    extra: Vec<u8>,
    size: usize,
    footer_len: usize,
    hash: Vec<u8>,
}

impl Reader {
    fn unlock() -> Self {
        let vault_document = std::fs::read(file("vault.json")).unwrap();
        let vault_id = ulid(json(&vault_document)["vault_id"].as_str().unwrap());
        let cluster_id: [u8; 16] =
            Sha256::digest([b"pgvault/v1/cluster\0", &7_441_234_567_890_123_456u64.to_le_bytes()[..], b"main"].concat())[..16]
                .try_into()
                .unwrap();

        // Slot: passphrase to master key.
        let slot = json(&only(&format!("{PREFIX}/keys")));
        let method = &slot["method"];
        let number = |key: &str| u32::try_from(method[key].as_u64().unwrap()).unwrap();
        let mut kek = [0; 32];
        let params = argon2::Params::new(number("memory_kib"), number("passes"), number("lanes"), Some(32)).unwrap();
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into(PASSPHRASE.as_bytes(), &base64(&method["salt"]), &mut kek)
            .unwrap();
        let aad = [b"pgvault/v1/slot", &vault_id[..], &cluster_id, &ulid(slot["key_id"].as_str().unwrap())].concat();
        let master = decrypt(&kek, [0; 12], &aad, &base64(&method["wrapped"]));
        assert_eq!(master.len(), 32);

        // The cluster's document and the slot name the key.
        let commitment: [u8; 32] = expand(&master, &[], &[b"pgvault/v1/master", &vault_id, &cluster_id]);
        let cluster = json(&std::fs::read(file(&format!("{PREFIX}/cluster.json"))).unwrap());
        assert_eq!((cluster["format"].as_str(), cluster["version"].as_u64()), (Some("pgvault cluster"), Some(1)));
        assert_eq!(base64(&cluster["commitment"]), commitment);
        assert_eq!(base64(&slot["commitment"]), commitment);

        // The slot's check.
        let mut unchecked = slot.as_object().unwrap().clone();
        let _ = unchecked.remove("sha256");
        let check = base64(&unchecked.insert("check".into(), "".into()).unwrap());
        let spell = |map: &serde_json::Map<String, serde_json::Value>| serde_json::to_string_pretty(map).unwrap() + "\n";
        let hash = Sha256::digest(spell(&unchecked)).iter().fold(String::new(), |hash, b| hash + &format!("{b:02x}"));
        let _ = unchecked.insert("sha256".into(), hash.into());
        let check_key: [u8; 32] = expand(&master, &[], &[b"pgvault/v1/slot-check", &vault_id, &cluster_id]);
        assert_eq!(blake3::keyed_hash(&check_key, spell(&unchecked).as_bytes()).as_bytes()[..], check);

        // Epoch: master key to data key.
        let epoch = json(&only(&format!("{PREFIX}/epochs")));
        let epoch_id = ulid(epoch["epoch_id"].as_str().unwrap());
        let epoch_key = expand(&master, &epoch_id, &[b"pgvault/v1/epoch", &vault_id, &cluster_id]);
        let opened = decrypt(&epoch_key, [0; 12], &epoch_id, &base64(&epoch["wrapped"]));
        let (data_key, bound) = opened.split_at(32);
        assert_eq!(bound, &Sha256::digest(&vault_document)[..]);

        let digest_key = expand(&master, &[], &[b"pgvault/v1/digest", &vault_id, &cluster_id]);
        Self { vault_id, cluster_id, epoch_id, data_key: data_key.into(), digest_key }
    }

    fn leaf(&self, block: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.digest_key, block).as_bytes()
    }

    fn digest(&self, raw: &[u8]) -> Vec<u8> {
        let leaves: Vec<u8> = raw.chunks(8192).flat_map(|block| self.leaf(block)).collect();
        self.leaf(&[&leaves[..], &(raw.len() as u64).to_le_bytes()].concat())[..16].to_vec()
    }

    fn open(&self, kind: u8, name: &str) -> Opened {
        let Self { vault_id, cluster_id, epoch_id, data_key, .. } = self;
        let object = std::fs::read(file(&format!("{PREFIX}/{name}"))).unwrap();
        let header = &object[..112];
        assert_eq!(header[..16], [&b"PGV1\x01\x00"[..], &[kind, 1], &[0; 8]].concat());
        assert_eq!(header[16..64], [*vault_id, *cluster_id, *epoch_id].concat());
        let salt = &header[64..96];
        let info = |purpose: &'static [u8]| [purpose, vault_id, cluster_id, &[kind], name.as_bytes()].concat();
        let commitment: [u8; 16] = expand(data_key, salt, &[&info(b"pgvault/v1/commit")]);
        assert_eq!(header[96..], commitment);
        let key = expand(data_key, salt, &[&info(b"pgvault/v1/object")]);
        let aad = |number: u64, codec: u8, raw_len: usize| {
            [header, &number.to_le_bytes(), &[codec], &(raw_len as u64).to_le_bytes()].concat()
        };

        let tail = &object[object.len() - 48..];
        assert_eq!(tail[12..16], *b"1VGP");
        assert_eq!(tail[16..], Sha256::digest(&object[..object.len() - 32])[..]);
        let footer_offset = usize::try_from(u64::from_le_bytes(tail[..8].try_into().unwrap())).unwrap();
        let footer_len = u32::from_le_bytes(tail[8..12].try_into().unwrap()) as usize;
        assert_eq!(footer_offset + footer_len + 48, object.len());
        let sealed = &object[footer_offset..footer_offset + footer_len];
        let footer = decrypt(&key, nonce(2, 0), &aad(0, 0, footer_len - 16), sealed);

        let mut footer = Bytes(&footer);
        let (mut frames, mut digests, mut offset) = (Vec::new(), Vec::new(), 112);
        for number in 0..footer.varint() as u64 {
            let (sealed_len, raw_len, codec) = (footer.varint(), footer.varint(), footer.take(1)[0]);
            let plain = decrypt(&key, nonce(1, number), &aad(number, codec, raw_len), &object[offset..offset + sealed_len]);
            let raw = if codec == 0 { plain } else { zstd::bulk::decompress(&plain, raw_len).unwrap() };
            digests.push(footer.take(16).to_vec());
            assert_eq!(digests.last(), Some(&self.digest(&raw)));
            frames.push(raw);
            offset += sealed_len;
        }
        assert_eq!(offset, footer_offset);
        let extra = footer.string().to_vec();
        assert!(footer.0.is_empty());
        Opened { frames, digests, extra, size: object.len(), footer_len, hash: tail[16..].to_vec() }
    }

    /// Opens the pack that a pack entry names.
    fn pack(&self, kind: u8, entry: &mut Bytes<'_>) -> ([u8; 16], Opened) {
        let id: [u8; 16] = entry.take(16).try_into().unwrap();
        assert_eq!(entry.take(1), [kind]);
        let text = (0..26).rev().map(|at| {
            let digit = u128::from_be_bytes(id) >> (at * 5) & 31;
            char::from(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"[usize::try_from(digit).unwrap()])
        });
        let text: String = text.collect();
        let opened = self.open(kind, &format!("pack/{:02x}/{text}.pack", Sha256::digest(&text)[0]));
        assert_eq!((entry.varint(), entry.varint(), entry.varint()), (opened.size, opened.footer_len, opened.frames.len()));
        // How much of it is used: both blocks, or every frame.
        assert_eq!(entry.varint(), if kind == 1 { 2 } else { opened.frames.len() });
        assert_eq!(entry.take(32), opened.hash);
        assert!(opened.extra.is_empty());
        (id, opened)
    }
}

#[test]
fn a_reader_made_from_the_documentation_reads_it() {
    let opened = Reader::unlock().open(10, NAME);
    assert_eq!(opened.frames, FRAMES);
    assert_eq!(opened.extra, EXTRA);
}

/// From the manifest to a file's contents.
#[test]
fn a_reader_made_from_the_documentation_restores_the_backups() {
    let reader = Reader::unlock();
    let snapshots = names(&format!("{PREFIX}/snap"));
    assert_eq!(snapshots.len(), 2);
    for (name, outside) in snapshots.iter().zip([0, 3]) {
        let object = reader.open(3, name.strip_prefix(&format!("{PREFIX}/")).unwrap());
        let manifest = json(&object.frames[0]);
        assert!(name.ends_with(&format!("/{}.snap", manifest["id"].as_str().unwrap())) && object.extra.is_empty());
        let mut index = Bytes(&object.frames[1]);
        let (pack_chunks, file_chunks, table_packs) = (index.varint(), index.varint(), index.varint());
        assert_eq!((pack_chunks, file_chunks, table_packs), (1, 2, outside));
        let mut chunks = Vec::new();
        for _ in 0..table_packs {
            let (_, pack) = reader.pack(2, &mut index);
            let digests: Vec<_> = (0..index.varint()).map(|_| index.take(16).to_vec()).collect();
            assert_eq!(digests, pack.digests);
            chunks.extend(pack.frames);
        }
        assert!(index.0.is_empty());
        assert_eq!(object.frames.len(), if outside == 0 { 5 } else { 2 });
        chunks.extend(object.frames[2..].iter().cloned());
        assert_eq!(chunks.len(), pack_chunks + file_chunks);

        let mut entries = Bytes(&chunks[0]);
        let (id, pack) = reader.pack(1, &mut entries);
        assert!(entries.0.is_empty());

        let mut directory = Bytes(&chunks[1]);
        assert_eq!((directory.string(), directory.varint(), directory.take(1)), (&b"base"[..], 0o700, &[0][..]));
        assert!(directory.0.is_empty());
        let mut entry = Bytes(&chunks[2]);
        assert_eq!((entry.string(), entry.varint(), entry.take(1)), (FILE.as_bytes(), 0o700, &[2][..]));
        let (len, mut map) = (entry.varint(), Bytes(entry.string()));
        assert!(entry.0.is_empty());
        assert_eq!((len as u64, map.varint(), map.take(16)), (FILE_LEN, 1, &id[..]));

        let (mut restored, mut blocks) = (Vec::new(), Vec::new());
        for _ in 0..map.varint() {
            let head = map.varint();
            if head & 1 == 0 {
                restored.resize(restored.len() + (head >> 1) * 8192, 0);
                continue;
            }
            let (number, frame, slot) = (map.varint(), map.varint(), map.varint());
            assert_eq!(number, 0);
            let stored = &pack.frames[frame][slot * 8192..(slot + (head >> 1)) * 8192];
            restored.extend_from_slice(stored);
            blocks.extend(stored.chunks(8192));
        }
        for block in blocks {
            assert_eq!(map.take(8), &reader.leaf(block)[..8]);
        }
        assert!(map.0.is_empty());
        restored.truncate(len);
        let zeroes = restored.iter().take_while(|byte| **byte == 0).count();
        assert_eq!((zeroes, &restored[zeroes..]), (2 * 8192, &contents()[..8292]));
    }
}

/// A newer minor version adds what an older reader can do without: it is read.
#[tokio::test(flavor = "current_thread")]
async fn an_object_of_a_newer_minor_version_is_read() {
    let (_, cluster) = vault().await;
    let (header, key) = cluster.keys().new_object(cluster.env(), Kind::Drill, NAME).unwrap();
    let mut object = header.encode().to_vec();
    object[5] = 7;
    let aad = [&object[..], &[0; 9], &2u64.to_le_bytes()].concat();
    let mut footer = [0, 0];
    let tag = key.cipher().seal(nonce(2, 0), &aad, &mut footer);
    object.extend([&footer[..], &tag].concat());
    object.extend(pgvault_core::format::object::Tail::encode_prefix(112, 18));
    let hash = Sha256::digest(&object);
    object.extend(hash);
    assert!(verify_keyless(&object).is_ok());
    let reader = ObjectReader::open_whole(cluster.keys(), Kind::Drill, NAME, &object).unwrap();
    assert!(reader.frames().is_empty() && reader.extra().is_empty());
    object[5] = 8;
    assert!(ObjectReader::open_whole(cluster.keys(), Kind::Drill, NAME, &object).is_err());
}
