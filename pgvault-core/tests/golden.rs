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
use pgvault_core::format::object::{Codec, Kind};
use pgvault_core::postgres::SystemId;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::store::Store;
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

/// Files of the golden vault: name in the vault, bytes.
async fn write() -> Vec<(String, Vec<u8>)> {
    let (store, cluster) = vault().await;
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Drill, NAME, 0).unwrap();
    let mut encoder = FrameEncoder::new(1).unwrap();
    for frame in FRAMES {
        let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame)).unwrap();
    }
    cluster.put_once(&writer.finish(EXTRA.to_vec())).await.unwrap();
    let mut files = Vec::new();
    for object in store.list("").await.unwrap() {
        files.push((object.name.clone(), store.get(&object.name).await.unwrap().to_vec()));
    }
    files
}

#[tokio::test(flavor = "current_thread")]
async fn writing_gives_the_golden_bytes() {
    let written = write().await;
    assert_eq!(written.len(), 5, "vault.json, cluster.json, a slot, an epoch, an object");
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

/// The only file below `directory`.
fn only(directory: &str) -> Vec<u8> {
    let mut entries = std::fs::read_dir(file(directory)).unwrap();
    let bytes = std::fs::read(entries.next().unwrap().unwrap().path()).unwrap();
    assert!(entries.next().is_none());
    bytes
}

/// Follows docs/format.md step by step, from the passphrase to the contents.
#[test]
fn a_reader_made_from_the_documentation_reads_it() {
    let prefix = "c/main-7441234567890123456";
    let vault_document = std::fs::read(file("vault.json")).unwrap();
    let vault_id = ulid(json(&vault_document)["vault_id"].as_str().unwrap());
    let cluster_id: [u8; 16] =
        Sha256::digest([b"pgvault/v1/cluster\0", &7_441_234_567_890_123_456u64.to_le_bytes()[..], b"main"].concat())[..16]
            .try_into()
            .unwrap();

    // Slot: passphrase to master key.
    let slot = json(&only(&format!("{prefix}/keys")));
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
    let cluster = json(&std::fs::read(file(&format!("{prefix}/cluster.json"))).unwrap());
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
    let epoch = json(&only(&format!("{prefix}/epochs")));
    let epoch_id = ulid(epoch["epoch_id"].as_str().unwrap());
    let epoch_key = expand(&master, &epoch_id, &[b"pgvault/v1/epoch", &vault_id, &cluster_id]);
    let opened = decrypt(&epoch_key, [0; 12], &epoch_id, &base64(&epoch["wrapped"]));
    let (data_key, bound) = opened.split_at(32);
    assert_eq!(bound, &Sha256::digest(&vault_document)[..]);

    // Object.
    let object = std::fs::read(file(&format!("{prefix}/{NAME}"))).unwrap();
    let header = &object[..112];
    assert_eq!(header[..16], *b"PGV1\x01\x00\x0A\x01\0\0\0\0\0\0\0\0");
    assert_eq!(header[16..64], [vault_id, cluster_id, epoch_id].concat());
    let salt = &header[64..96];
    let info = |purpose: &'static [u8]| [purpose, &vault_id, &cluster_id, &[10], NAME.as_bytes()].concat();
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
    let sealed = &object[footer_offset..footer_offset + footer_len];
    let footer = decrypt(&key, nonce(2, 0), &aad(0, 0, footer_len - 16), sealed);

    // Footer: all numbers of this one are below 128, so each varint is one byte.
    let digest_key = expand(&master, &[], &[b"pgvault/v1/digest", &vault_id, &cluster_id]);
    let digest = |raw: &[u8]| {
        let leaves: Vec<u8> = raw.chunks(8192).flat_map(|block| *blake3::keyed_hash(&digest_key, block).as_bytes()).collect();
        let root = [&leaves[..], &(raw.len() as u64).to_le_bytes()].concat();
        blake3::keyed_hash(&digest_key, &root).as_bytes()[..16].to_vec()
    };
    assert_eq!(footer[0] as usize, FRAMES.len());
    let (mut at, mut offset) = (1, 112);
    for (number, expected) in FRAMES.iter().enumerate() {
        let (sealed_len, raw_len, codec) = (footer[at] as usize, footer[at + 1] as usize, footer[at + 2]);
        let sealed = &object[offset..offset + sealed_len];
        let plain = decrypt(&key, nonce(1, number as u64), &aad(number as u64, codec, raw_len), sealed);
        let raw = if codec == 0 { plain } else { zstd::bulk::decompress(&plain, raw_len).unwrap() };
        assert_eq!(raw, *expected);
        assert_eq!(footer[at + 3..at + 19], digest(&raw));
        at += 19;
        offset += sealed_len;
    }
    assert_eq!(offset, footer_offset);
    assert_eq!(footer[at] as usize, EXTRA.len());
    assert_eq!(footer[at + 1..], *EXTRA);
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
