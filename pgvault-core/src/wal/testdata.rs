//! A vault in memory, and real segments for it.

use std::path::Path;

use super::object;
use crate::crypto::slot::{Unlock, Wrap};
use crate::env::Env;
use crate::postgres::{SegmentHeader, scan_segment};
use crate::store::Store;
use crate::vault::layout::ClusterName;
use crate::vault::{Cluster, Vault};

/// Segments in a row, of 1 MiB, from 0/800000 on. See testdata/postgres/README.md.
pub(super) const ROW: [&str; 5] = [
    "000000010000000000000008",
    "000000010000000000000009",
    "00000001000000000000000A",
    "00000001000000000000000B",
    "00000001000000000000000C",
];

pub(super) fn file(name: &str) -> Vec<u8> {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(format!("{name}.zst"));
    zstd::stream::decode_all(std::fs::File::open(packed).unwrap()).unwrap()
}

pub(super) async fn cluster() -> Cluster {
    let header = SegmentHeader::parse(&file(ROW[0])).unwrap();
    let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
    let name = ClusterName::new("main", header.system_identifier).unwrap();
    assert!(vault.create_cluster(&name, &[Wrap::Passphrase("test".into())]).await.unwrap());
    vault.unlock(&name, &Unlock::Passphrase("test".into())).await.unwrap()
}

pub(super) async fn store(cluster: &Cluster, name: &str, bytes: &[u8]) {
    for sealed in object::seal_file(cluster, name.parse().unwrap(), bytes).unwrap() {
        assert!(object::put(cluster, &sealed, bytes).await.unwrap());
    }
}

pub(super) async fn store_part(cluster: &Cluster, name: &str, prefix: &[u8], from: usize) {
    let header = SegmentHeader::parse(prefix).unwrap();
    let scan = scan_segment(prefix, header.start, header.segment_size).unwrap();
    let part = u32::try_from(from).unwrap();
    let sealed = object::seal_part(cluster, name.parse().unwrap(), part, &prefix[from..], &scan).unwrap();
    assert!(object::put(cluster, &sealed, &prefix[from..]).await.unwrap());
}
