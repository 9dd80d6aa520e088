//! The stages that every byte of a backup, a restore or a WAL segment passes through, each alone on one thread.

#![expect(clippy::unwrap_used, reason = "a benchmark may end with a panic")]

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pgvault_benches::{Generator, PAGE, REGION_PAGES, region};
use pgvault_core::crypto::aead::{Aead, AesGcm};
use pgvault_core::crypto::digest::DigestKey;
use pgvault_core::crypto::keys::{ClusterKeys, EpochDocument, Identity, MasterKey};
use pgvault_core::crypto::sealed::{FrameDecoder, FrameEncoder, ObjectReader, SealedWriter};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::format::file_table::{self, FileEntry, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap};
use pgvault_core::format::object::Kind;
use pgvault_core::format::pack_table::{self, PackKind, PackRef};
use pgvault_core::postgres::{SegmentHeader, SystemId, WalFileName, page, scan_segment};
use pgvault_core::store::Store;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_core::wal::object::seal_file;

const NAME: &str = "pack/00/bench.pack";
const REGION: u64 = (PAGE * REGION_PAGES) as u64;

fn keys(env: &Env) -> ClusterKeys {
    let identity = Identity { vault_id: [1; 16], cluster_id: [2; 16], vault_document: [3; 32] };
    let master = MasterKey::generate(env).unwrap();
    let epoch = EpochDocument::create(env, &identity, &master).unwrap();
    ClusterKeys::open(identity, master, &[epoch]).unwrap()
}

/// Sixteen different regions: one alone would stay in the cache.
fn regions() -> Vec<Vec<u8>> {
    (0..16).map(|n| region(n, u32::try_from(n).unwrap() * 32)).collect()
}

fn pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("region");
    let _ = group.throughput(Throughput::Bytes(REGION));
    let mut summed = region(1, 0);
    for (block, page) in (0..).zip(summed.chunks_mut(PAGE)) {
        let sum = page::checksum(page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        assert!(page::verify(page, block, 8192).is_acceptable());
    }
    let _ = group.bench_function("page checksums", |b| {
        b.iter(|| (0..).zip(summed.chunks(PAGE)).all(|(block, page)| page::verify(page, block, 8192).is_acceptable()));
    });
    let digest = DigestKey::new([7; 32]);
    let mut blocks = Vec::new();
    let _ = group.bench_function("digests", |b| {
        b.iter(|| {
            blocks.clear();
            digest.frame_with_blocks(black_box(&summed), |d| blocks.push(d))
        });
    });
    let regions = regions();
    for level in [1, 3] {
        let mut encoder = FrameEncoder::new(level).unwrap();
        let mut number = 0;
        let _ = group.bench_function(format!("zstd {level}"), |b| {
            b.iter(|| {
                number = (number + 1) % regions.len();
                let _ = black_box(encoder.encode(&regions[number], [0; 16]).unwrap());
            });
        });
    }
    let cipher = AesGcm::new(&[5; 32]);
    let mut sealed = summed.clone();
    let _ = group.bench_function("seal", |b| b.iter(|| cipher.seal([0; 12], b"associated", &mut sealed)));
    group.finish();
}

fn frames(c: &mut Criterion) {
    let env = Env::default();
    let keys = keys(&env);
    let regions = regions();
    let mut group = c.benchmark_group("frames");
    let _ = group.throughput(Throughput::Bytes(REGION * regions.len() as u64));
    let pack = || {
        let mut encoder = FrameEncoder::new(1).unwrap();
        let mut writer = SealedWriter::new(&env, &keys, Kind::Data, NAME, 4 << 20).unwrap();
        for region in &regions {
            let _ = writer.push(&mut encoder, region, keys.digest().frame(region)).unwrap();
        }
        writer
    };
    let _ = group.bench_function("digest, compress, seal, append", |b| b.iter(pack));
    let _ = group.bench_function("finish with the object's hash", |b| {
        b.iter_batched(pack, |writer| writer.finish(Vec::new()), BatchSize::LargeInput);
    });
    let object = pack().finish(Vec::new());
    let reader = ObjectReader::open_whole(&keys, Kind::Data, NAME, &object.bytes).unwrap();
    let mut decoder = FrameDecoder::new().unwrap();
    let _ = group.bench_function("decode", |b| {
        b.iter(|| {
            for (number, entry) in (0..).zip(reader.frames()) {
                let start = usize::try_from(entry.offset).unwrap();
                let sealed = &object.bytes[start..start + entry.sealed_len as usize];
                let _ = black_box(reader.decode_with(&keys, number, sealed, &mut decoder).unwrap());
            }
        });
    });
    let _ = group.bench_function("open an object", |b| {
        b.iter(|| ObjectReader::open_whole(&keys, Kind::Data, NAME, &object.bytes).unwrap());
    });
    group.finish();
}

/// The map of a relation file of 1 GiB.
fn file_map() -> FileMap {
    let mut generator = Generator::new(3);
    let mut map = FileMap { packs: (0..8).map(|n| [n; 16]).collect(), ..FileMap::default() };
    for number in 0..4096 {
        map.extents.push(Extent::Stored { blocks: 32, pack: number / 512, frame: number % 512, slot: 0 });
        map.digests.extend((0..32).map(|_| generator.number().to_le_bytes()));
    }
    map
}

fn tables(c: &mut Criterion) {
    let map = file_map();
    let encoded = map.encode();
    assert_eq!(FileMap::parse(&encoded, 1 << 30).unwrap(), map);
    let _ = c.bench_function("map of 1 GiB, encode", |b| b.iter(|| map.encode()));
    let _ = c.bench_function("map of 1 GiB, parse", |b| b.iter(|| FileMap::parse(&encoded, 1 << 30).unwrap()));

    let packs: Vec<PackRef> = (0..10_000u128)
        .map(|n| PackRef {
            id: n.to_be_bytes(),
            kind: PackKind::Data,
            size: 32 << 20,
            footer_len: 6000,
            frames: 260,
            live: 8000,
            sha256: [9; 32],
        })
        .collect();
    let encoded = pack_table::encode_chunk(&packs);
    let _ = c.bench_function("table of 10,000 packs, parse", |b| b.iter(|| pack_table::parse_chunk(&encoded).unwrap()));

    let mut writer = TableWriter::default();
    let entry = |number: u32| FileEntry {
        path: format!("base/16384/{number}"),
        mode: 0o600,
        node: Node::File { len: 8192, map: MapPlace::of_sections([([1; 16], number)]) },
    };
    (100_000..200_000).for_each(|number| writer.push(&entry(number)));
    let chunks = writer.finish();
    let _ = c.bench_function("table of 100,000 files, parse", |b| {
        b.iter(|| chunks.iter().map(|chunk| file_table::parse_chunk(chunk).unwrap().len()).sum::<usize>());
    });
}

async fn cluster(system_id: SystemId) -> Cluster {
    let passphrase: secrecy::SecretString = "benchmark".into();
    let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
    let name = ClusterName::new("bench", system_id).unwrap();
    let _ = vault.create_cluster(&name, &[Wrap::Passphrase(passphrase.clone())]).await.unwrap();
    vault.unlock(&name, &Unlock::Passphrase(passphrase)).await.unwrap()
}

fn wal(c: &mut Criterion) {
    let name = "000000010000000000000009";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../testdata/postgres/{name}.zst"));
    let bytes = zstd::decode_all(&std::fs::read(path).unwrap()[..]).unwrap();
    let mut group = c.benchmark_group("WAL");
    let _ = group.throughput(Throughput::Bytes(bytes.len() as u64));
    let header = SegmentHeader::parse(&bytes).unwrap();
    let _ = group.bench_function("scan a segment", |b| {
        b.iter(|| scan_segment(&bytes, header.start, header.segment_size).unwrap());
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cluster = runtime.block_on(cluster(header.system_identifier));
    let file: WalFileName = name.parse().unwrap();
    let _ = group.bench_function("seal a segment", |b| b.iter(|| seal_file(&cluster, file, &bytes).unwrap()));
    group.finish();
}

criterion_group!(benches, pages, frames, tables, wal);
criterion_main!(benches);
