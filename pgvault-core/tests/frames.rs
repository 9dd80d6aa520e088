//! Sealed objects: whatever goes in comes out, and nothing else ever does.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use std::sync::OnceLock;

use pgvault_core::crypto::keys::ClusterKeys;
use pgvault_core::crypto::sealed::{FrameEncoder, ObjectReader, SealedWriter, verify_keyless};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::format::object::{Codec, HEADER_LEN, Kind, TAIL_LEN};
use pgvault_core::format::{BLOCK, FormatError, MAX_FRAME, REGION_BLOCKS};
use pgvault_core::postgres::SystemId;
use pgvault_core::store::Store;
use pgvault_core::vault::Vault;
use pgvault_core::vault::layout::ClusterName;
use proptest::prelude::*;

const NAME: &str = "pack/00/01KAJ0000000000000000000AA.pack";

struct World {
    env: Env,
    /// Two clusters of one vault, and the first one's namesake in another vault.
    keys: [ClusterKeys; 3],
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let env = fixed::env("frames");
            let mut keys = Vec::new();
            let (one, _) = Vault::create(Store::in_memory(), env.clone()).await.unwrap();
            let (other, _) = Vault::create(Store::in_memory(), env.clone()).await.unwrap();
            for (vault, name) in [(&one, "main"), (&one, "second"), (&other, "main")] {
                let name = ClusterName::new(name, SystemId(7)).unwrap();
                assert!(vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap());
                let cluster = vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.unwrap();
                keys.push((**cluster.keys()).clone());
            }
            World { env, keys: keys.try_into().unwrap() }
        })
    })
}

fn keys() -> &'static ClusterKeys {
    &world().keys[0]
}

fn seal(kind: Kind, name: &str, frames: &[Vec<u8>], extra: &[u8]) -> Vec<u8> {
    let mut writer = SealedWriter::new(&world().env, keys(), kind, name, 0).unwrap();
    let mut encoder = FrameEncoder::new(1).unwrap();
    for (number, frame) in frames.iter().enumerate() {
        assert_eq!(writer.is_empty(), number == 0);
        assert_eq!(writer.push(&mut encoder, frame, keys().digest().frame(frame)).unwrap() as usize, number);
    }
    let object = writer.finish(extra.to_vec());
    assert_eq!(object.name, name);
    object.bytes.to_vec()
}

/// All frames and the extra of an object, or the first refusal.
fn open(keys: &ClusterKeys, kind: Kind, name: &str, object: &[u8]) -> Result<(Vec<Vec<u8>>, Vec<u8>), FormatError> {
    let reader = ObjectReader::open_whole(keys, kind, name, object)?;
    let frames = 0..u32::try_from(reader.frames().len()).unwrap();
    let frames = frames.map(|number| reader.decode_from(keys, number, object)).collect::<Result<Vec<_>, _>>()?;
    Ok((frames, reader.extra().to_vec()))
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let region = BLOCK * REGION_BLOCKS;
    let len = prop_oneof![
        4 => 0usize..300,
        2 => prop::sample::select(vec![0, 1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, region - 1, region]),
        1 => 0..=region,
    ];
    (len, 0u8..4, any::<u64>()).prop_map(|(len, sort, seed)| match sort {
        0 => noise(len, seed),
        1 => vec![seed.to_le_bytes()[0]; len],
        // Compressible at the front, not at the end, and the other way round.
        2 => [vec![0; len / 2], noise(len - len / 2, seed)].concat(),
        _ => [noise(len / 2, seed), vec![0; len - len / 2]].concat(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// T9, T21: any sizes in any order, empty ones included.
    #[test]
    fn t9_t21_what_goes_in_comes_out(frames in prop::collection::vec(frame(), 0..8), extra in prop::collection::vec(any::<u8>(), 0..200)) {
        let object = seal(Kind::Data, NAME, &frames, &extra);
        prop_assert!(verify_keyless(&object).is_ok());
        prop_assert_eq!(open(keys(), Kind::Data, NAME, &object).unwrap(), (frames.clone(), extra));
        let reader = ObjectReader::open_whole(keys(), Kind::Data, NAME, &object).unwrap();
        for (entry, frame) in reader.frames().iter().zip(&frames) {
            prop_assert_eq!(entry.raw_len as usize, frame.len());
            // Stored raw when compression gains under 3 %: never larger than it was, tag aside.
            prop_assert!(entry.sealed_len as usize <= frame.len() + 16);
            prop_assert!(entry.codec == Codec::None || entry.sealed_len as usize <= frame.len() - frame.len() / 32 + 16);
        }
    }

    /// T9: bytes behind an object, in front of it or lost from its middle are noticed at any place.
    #[test]
    fn t9_added_and_lost_bytes_are_noticed(at in 0usize..2000, count in 1usize..100, value: u8) {
        let object = seal(Kind::Data, NAME, &[noise(500, 1), vec![7; 5000], noise(3, 2)], b"extra");
        let at = at % (object.len() + 1);
        let longer = [&object[..at], &vec![value; count], &object[at..]].concat();
        let shorter = [&object[..at], object.get(at + count..).unwrap_or(&[])].concat();
        for changed in [longer, shorter] {
            prop_assert!(changed == object || open(keys(), Kind::Data, NAME, &changed).is_err());
            prop_assert!(changed == object || verify_keyless(&changed).is_err());
        }
    }
}

/// T9, T21: the format's limits themselves.
#[test]
fn t9_t21_frames_end_exactly_at_the_limit() {
    for frame in [vec![0; MAX_FRAME], noise(MAX_FRAME, 3)] {
        let object = seal(Kind::Wal, NAME, std::slice::from_ref(&frame), b"");
        assert!(open(keys(), Kind::Wal, NAME, &object).unwrap().0 == [frame]);
    }
    let mut encoder = FrameEncoder::new(1).unwrap();
    assert!(encoder.encode(&vec![0; MAX_FRAME + 1], [0; 16]).is_err());
}

fn small() -> Vec<u8> {
    seal(Kind::Data, NAME, &[b"first".to_vec(), vec![], vec![b'x'; 300]], b"extra")
}

/// T30: an object is good under one name, as one kind and for one cluster only.
#[test]
fn t30_an_object_opens_only_where_it_was_written() {
    let object = small();
    assert!(open(keys(), Kind::Data, NAME, &object).is_ok());
    for name in ["", "pack/00/01KAJ0000000000000000000AB.pack", &NAME[1..], &format!("{NAME}x")] {
        assert!(open(keys(), Kind::Data, name, &object).is_err(), "{name}");
    }
    for kind in [Kind::Meta, Kind::Snapshot, Kind::Wal, Kind::Session, Kind::Audit, Kind::Drill] {
        assert!(open(keys(), kind, NAME, &object).is_err(), "{kind:?}");
        // Not even with a header that says so.
        let mut relabelled = object.clone();
        relabelled[6] = kind as u8;
        assert!(open(keys(), kind, NAME, &relabelled).is_err(), "{kind:?}");
    }
    for other in &world().keys[1..] {
        assert!(open(other, Kind::Data, NAME, &object).is_err());
        // Not even with a header that claims to be theirs.
        let mut moved = object.clone();
        moved[16..32].copy_from_slice(&other.identity().vault_id);
        moved[32..48].copy_from_slice(&other.identity().cluster_id);
        assert!(open(other, Kind::Data, NAME, &moved).is_err());
    }
}

/// T30: frames of two objects of one cluster, of the same lengths and places, cannot be exchanged; nor two of one object.
#[test]
fn t30_swapped_frames_are_refused() {
    let frames = |seed| vec![noise(100, seed), noise(100, seed + 1)];
    let one = seal(Kind::Data, NAME, &frames(10), b"");
    for other_name in [NAME, "pack/00/01KAJ0000000000000000000AB.pack"] {
        let other = seal(Kind::Data, other_name, &frames(20), b"");
        assert_eq!(one.len(), other.len());
        let frame = |number: usize| HEADER_LEN + number * 116..HEADER_LEN + (number + 1) * 116;
        let footer = frame(1).end..one.len() - TAIL_LEN;
        for part in [frame(0), frame(1), footer, 0..HEADER_LEN, HEADER_LEN..one.len(), HEADER_LEN..frame(1).end] {
            let mut swapped = one.clone();
            swapped[part.clone()].copy_from_slice(&other[part.clone()]);
            assert!(open(keys(), Kind::Data, NAME, &swapped).is_err(), "{part:?}");
        }
        let mut exchanged = one.clone();
        exchanged[frame(0)].copy_from_slice(&one[frame(1)]);
        exchanged[frame(1)].copy_from_slice(&one[frame(0)]);
        assert!(open(keys(), Kind::Data, NAME, &exchanged).is_err());
        let reader = ObjectReader::open_whole(keys(), Kind::Data, NAME, &one).unwrap();
        assert!(reader.decode(keys(), 0, &one[frame(1)]).is_err());
        assert!(reader.decode(keys(), 2, &one[frame(1)]).is_err());
    }
}

/// T9: an object that was cut anywhere is refused, with the key and without.
#[test]
fn t9_every_truncation_is_refused() {
    let object = small();
    for len in 0..object.len() {
        assert!(open(keys(), Kind::Data, NAME, &object[..len]).is_err(), "{len}");
        assert!(verify_keyless(&object[..len]).is_err(), "{len}");
    }
}

/// T30: no bit of an object can change unnoticed.
///
/// A holder of the key needs no hash: the 32 bytes of SHA-256 at the end are there for those without one.
#[test]
fn t30_every_flipped_bit_is_refused() {
    let object = small();
    for at in 0..object.len() {
        for bit in 0..8 {
            let mut flipped = object.clone();
            flipped[at] ^= 1 << bit;
            assert!(verify_keyless(&flipped).is_err(), "byte {at} bit {bit}, without the key");
            let in_hash = at >= object.len() - 32;
            assert_eq!(open(keys(), Kind::Data, NAME, &flipped).is_err(), !in_hash, "byte {at} bit {bit}, with the key");
        }
    }
}

/// T30: a forger without the key can make the tail right again, and gains nothing.
#[test]
fn t30_a_corrected_hash_does_not_help() {
    use sha2::{Digest, Sha256};
    let object = small();
    for at in 0..object.len() - 32 {
        let mut forged = object.clone();
        forged[at] ^= 0x10;
        let hash = Sha256::digest(&forged[..object.len() - 32]);
        let end = object.len() - 32;
        forged[end..].copy_from_slice(&hash);
        assert!(open(keys(), Kind::Data, NAME, &forged).is_err(), "byte {at}");
    }
}

/// Two objects of the same contents share nothing but the header's clear fields: no (key, nonce) pair serves twice.
#[test]
fn the_same_contents_never_look_the_same() {
    let (one, two) = (small(), small());
    assert_eq!(one[..64], two[..64]);
    assert_ne!(one[64..96], two[64..96], "salts");
    let same = one[96..one.len() - TAIL_LEN].iter().zip(&two[96..]).filter(|(a, b)| a == b).count();
    assert!(same < 20, "{same} equal bytes");
}
