//! Makes up a backup of many files with one content, larger than any disk here: `logical VAULT PASSPHRASE_FILE FILE NAME COUNT`.
//!
//! The maps are there, one section after the other, with the digests that the pages of FILE have, and so are the tables and the
//! manifest. The data packs are files of the right length without contents. What compares pages with this backup finds them
//! unchanged. `cargo xtask bench memory` uses it.

#![expect(clippy::unwrap_used, reason = "a program for measurements may end with a panic")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pgvault_core::crypto::sealed::{FrameEncoder, SealedWriter};
use pgvault_core::crypto::slot::Unlock;
use pgvault_core::env::Env;
use pgvault_core::format::file_table::{FileEntry, MapPlace, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap, PackId};
use pgvault_core::format::object::Kind;
use pgvault_core::format::pack_table::{PackKind, PackRef};
use pgvault_core::store::{Settings, Store};
use pgvault_core::vault::snapshot::{Manifest, Snapshot};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault, layout};
use ulid::Ulid;

const PAGE: usize = 8192;
const REGION: u64 = 32 * PAGE as u64;
const SECTION: u64 = 32 << 20;

/// Frames of a data pack: regions that do not compress.
const FRAMES: u32 = 124;

/// The size at which packs of maps are closed.
const META: usize = 16 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, passphrase, file, name, count] = arguments.as_slice() else { panic!("VAULT PASSPHRASE_FILE FILE NAME COUNT") };
    let store = Store::open(&format!("file://{folder}"), Settings::default()).unwrap();
    let vault = Vault::open(store, Env::default()).await.unwrap();
    let passphrase = fs::read_to_string(passphrase).unwrap().trim_end().to_owned();
    let cluster = vault.clusters().await.unwrap().remove(0);
    let cluster = vault.unlock(&cluster, &Unlock::Passphrase(passphrase.into())).await.unwrap();
    let mut made = Made { folder: Path::new(folder), cluster, packs: Vec::new(), data: None, meta: None };
    made.files(&fs::File::open(file).unwrap(), name, count.parse().unwrap()).await;
}

struct Made<'a> {
    folder: &'a Path,
    cluster: Cluster,
    packs: Vec<PackRef>,
    /// The data pack that is being filled, and the frames in it.
    data: Option<(PackId, u32)>,
    meta: Option<(PackId, SealedWriter)>,
}

impl Made<'_> {
    async fn files(&mut self, content: &fs::File, name: &str, count: u32) {
        let len = content.metadata().unwrap().len();
        let mut digests = Vec::new();
        let mut page = vec![0; PAGE];
        for at in (0..len).step_by(PAGE) {
            content.read_exact_at(&mut page, at).unwrap();
            digests.push(self.cluster.keys().digest().block(&page));
        }
        let mut encoder = FrameEncoder::new(1).unwrap();
        let mut table = TableWriter::default();
        for number in 0..count {
            let mut sections = Vec::new();
            for digests in digests.chunks(usize::try_from(SECTION).unwrap() / PAGE) {
                let map = self.section(digests);
                sections.push(self.store_map(&mut encoder, &map).await);
            }
            let node = Node::File { len, map: MapPlace::of_sections(sections) };
            table.push(&FileEntry { path: format!("{name}.{number:04}"), mode: 0o600, node });
        }
        self.close_meta().await;
        self.close_data();
        self.commit(table.finish(), len * u64::from(count)).await;
    }

    /// The map of regions that were stored one after the other.
    fn section(&mut self, digests: &[[u8; 8]]) -> FileMap {
        let mut map = FileMap { digests: digests.to_vec(), ..FileMap::default() };
        for _ in digests.chunks(32) {
            let (pack, frame) = match self.data {
                Some((pack, frames)) if frames < FRAMES => (pack, frames),
                _ => {
                    self.close_data();
                    (self.cluster.env().new_id().unwrap().to_bytes(), 0)
                }
            };
            self.data = Some((pack, frame + 1));
            if map.packs.last() != Some(&pack) {
                map.packs.push(pack);
            }
            let pack = u32::try_from(map.packs.len() - 1).unwrap();
            map.extents.push(Extent::Stored { blocks: 32, pack, frame, slot: 0 });
        }
        map
    }

    /// A data pack of the right length.
    fn close_data(&mut self) {
        let Some((id, frames)) = self.data.take() else { return };
        let size = u64::from(frames) * (REGION + 16) + 4096;
        let path = self.folder.join(self.cluster.path(&layout::pack(Ulid::from_bytes(id))));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create_new(path).unwrap().set_len(size).unwrap();
        let pack = PackRef { id, kind: PackKind::Data, size, footer_len: 3000, frames, live: frames * 32, sha256: [0; 32] };
        self.packs.push(pack);
    }

    async fn store_map(&mut self, encoder: &mut FrameEncoder, map: &FileMap) -> (PackId, u32) {
        let bytes = map.encode();
        let keys = self.cluster.keys().clone();
        let (id, writer) = self.meta.get_or_insert_with(|| {
            let id = self.cluster.env().new_id().unwrap();
            let writer = SealedWriter::new(self.cluster.env(), &keys, Kind::Meta, layout::pack(id), META + (1 << 20)).unwrap();
            (id.to_bytes(), writer)
        });
        let frame = writer.push(encoder, &bytes, keys.digest().frame(&bytes)).unwrap();
        let (id, is_full) = (*id, writer.len() >= META);
        if is_full {
            self.close_meta().await;
        }
        (id, frame)
    }

    async fn close_meta(&mut self) {
        let Some((id, writer)) = self.meta.take() else { return };
        let object = writer.finish(Vec::new());
        self.cluster.put_once(&object).await.unwrap();
        self.packs.push(PackRef { live: object.frames, ..object.as_pack(id, PackKind::Meta) });
    }

    async fn commit(&mut self, table: Vec<Vec<u8>>, bytes: u64) {
        self.packs.sort();
        let tables = Tables::store(&self.cluster, &self.packs, table, Limits::default()).await.unwrap();
        let now = self.cluster.env().now();
        let json = serde_json::json!({
            "id": self.cluster.env().new_id().unwrap(), "kind": "full", "parent": null, "source": "local",
            "cluster": self.cluster.name().name, "system_id": self.cluster.name().system_id.to_string(),
            "server_version": "15", "major": 15, "from_standby": false, "timeline": 1, "start_lsn": "0/1000028", "stop_lsn": "0/1000100",
            "started_at": now, "finished_at": now, "wal_segment_size": 16 << 20, "block_size": PAGE, "data_checksums": true,
            "backup_label": "", "tablespaces": [], "bad_pages": [], "labels": {}, "warnings": [], "files": 0, "source_bytes": bytes,
            "changed_bytes": 0, "stored_bytes": 0, "restore_amplification": 1.0, "objects_put": 0, "version": "0",
        });
        let manifest: Manifest = serde_json::from_value(json).unwrap();
        let object = Snapshot { manifest: &manifest, tables: &tables }.seal(&self.cluster).unwrap();
        self.cluster.put_once(&object).await.unwrap();
    }
}
