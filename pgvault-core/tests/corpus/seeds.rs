//! Inputs for the fuzzers to start from, made by the writers themselves.

use std::os::unix::ffi::OsStringExt;

use pgvault_core::crypto::keys::{ClusterKeys, EpochDocument, Identity, MasterKey};
use pgvault_core::crypto::sealed::{FrameEncoder, SealedWriter};
use pgvault_core::crypto::slot::{Method, SlotDocument, Wrap};
use pgvault_core::format::file_run::{self, Content, Entry, Filter, Piece, RunEncoder, RunHead, RunRef, State};
use pgvault_core::format::file_table::{FileEntry, MapPlace, MapRun, Node, TableWriter};
use pgvault_core::format::map::{Extent, FileMap};
use pgvault_core::format::object::{Codec, Footer, FrameEntry, Kind};
use pgvault_core::format::pack_table::{self, PackKind, PackRef};
use pgvault_core::format::table_index::{TableIndex, TablePack};
use pgvault_core::format::{BLOCK, document};
use pgvault_core::postgres::{TablespaceMap, TablespaceMapEntry};

#[path = "fixed.rs"]
mod fixed;

const IDENTITY: Identity = Identity { vault_id: [1; 16], cluster_id: [2; 16], vault_document: [3; 32] };

type Seed = (&'static str, String, Vec<u8>);

fn postgres(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../testdata/postgres/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn segment(name: &str) -> Vec<u8> {
    zstd::stream::decode_all(&postgres(&format!("{name}.zst"))[..]).unwrap()
}

/// Every seed: target, file name, contents.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    objects(&mut seeds);
    tables(&mut seeds);
    filestores(&mut seeds);
    documents(&mut seeds);
    names(&mut seeds);
    wal(&mut seeds);
    wal_rows(&mut seeds);
    texts(&mut seeds);
    seeds
}

fn prefixed(number: u64, bytes: &[u8]) -> Vec<u8> {
    [&number.to_le_bytes()[..], bytes].concat()
}

fn filestores(seeds: &mut Vec<Seed>) {
    let pack = |id: u8, kind| PackRef { id: [id; 16], kind, size: 1 << 20, footer_len: 90, frames: 8, live: 0, sha256: [id; 32] };
    let sha1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
    let piece = |id: u8, len| Piece { pack: [id; 16], frame: 3, offset: 5, len };
    let content = |pieces: Vec<Piece>| Content {
        size: pieces.iter().map(|piece| piece.len).sum(),
        mode: 0o644,
        sha1: file_run::promised_sha1(sha1).unwrap(),
        pieces,
    };
    let states = [
        (format!("da/{sha1}"), State::Present(content(vec![piece(0, 100)]))),
        ("db/own".into(), State::Present(content(vec![piece(1, 4 << 20 >> 1), piece(2, 7)]))),
        (format!("dc/{sha1}"), State::Gone(content(vec![]), 1_767_225_600_000)),
        (format!("dd/{sha1}"), State::Lost(content(vec![piece(0, 1)]), 1)),
        ("de/missing".into(), State::Missing(2)),
        ("df/damaged".into(), State::Damaged(3)),
        ("e/forgotten".into(), State::Forgotten),
    ];
    let mut encoder = RunEncoder::default();
    let mut head = RunHead { filter: Filter::for_names(7), ..RunHead::default() };
    for (name, state) in states {
        head.filter.add(&name);
        assert!(encoder.push(&Entry { name, since: 1_767_225_600_000, state }).is_none());
    }
    let chunk = encoder.take().unwrap();
    head.firsts = vec![chunk.first];
    head.packs = (0..3).map(|id| pack(id, PackKind::Data)).collect();
    head.before = vec![pack(9, PackKind::Meta)];
    let run = RunRef { pack: pack(9, PackKind::Meta), head: 1, entries: 7 };
    for (name, bytes) in [
        ("chunk", chunk.bytes),
        ("head", head.encode()),
        ("runs", file_run::encode_runs(&[run.clone(), run])),
        ("packs", file_run::encode_packs(&head.packs)),
    ] {
        seeds.push(("filestore_run", name.into(), bytes));
    }
}

fn objects(seeds: &mut Vec<Seed>) {
    let env = fixed::env("seeds");
    let master = MasterKey::generate(&env).unwrap();
    let epoch = EpochDocument::create(&env, &IDENTITY, &master).unwrap();
    let keys = ClusterKeys::open(IDENTITY, master, &[epoch]).unwrap();
    for (kind, frames, extra) in [
        (Kind::Data, vec![vec![7; 100]], &b""[..]),
        (Kind::Meta, vec![vec![], vec![0; 9000], (0..=255).collect()], b""),
        (Kind::Wal, vec![], br#"{"file":"00000002.history"}"#),
        (Kind::Audit, vec![b"{}".to_vec()], b""),
    ] {
        let mut writer = SealedWriter::new(&env, &keys, kind, "x", 0).unwrap();
        let mut encoder = FrameEncoder::new(1).unwrap();
        for frame in &frames {
            let _ = writer.push(&mut encoder, frame, keys.digest().frame(frame)).unwrap();
        }
        let object = writer.finish(extra.to_vec()).bytes;
        seeds.push(("object_header", format!("{kind:?}").to_lowercase(), object.to_vec()));
    }
    for (name, lens, extra) in [
        ("empty", vec![], &b""[..]),
        ("one", vec![(116, 100, Codec::None)], b""),
        ("three", vec![(16, 0, Codec::None), (50, 262_144, Codec::Zstd), (4_194_320, 4_194_304, Codec::None)], b"extra"),
        ("many", vec![(200_000, 262_144, Codec::Zstd); 60], b"{}"),
    ] {
        let mut offset = 112;
        let entry = |&(sealed_len, raw_len, codec): &(u32, u32, Codec)| {
            let entry = FrameEntry { offset, sealed_len, raw_len, codec, digest: [9; 16] };
            offset += u64::from(sealed_len);
            entry
        };
        let footer = Footer { frames: lens.iter().map(entry).collect(), extra: extra.to_vec() };
        seeds.push(("footer", name.into(), prefixed(offset, &footer.encode())));
    }
}

fn tables(seeds: &mut Vec<Seed>) {
    let stored = |blocks, frame, slot| Extent::Stored { blocks, pack: 0, frame, slot };
    for (name, len, packs, extents) in [
        ("empty", 0, 0u8, vec![]),
        ("zeroes", 5 << 30, 0, vec![Extent::Zero { blocks: 655_360 }]),
        ("small", 100, 1, vec![stored(1, 300, 31)]),
        ("mixed", 40 * BLOCK as u64 - 1, 2, vec![stored(32, 0, 0), Extent::Zero { blocks: 3 }, stored(5, 70_000, 20)]),
    ] {
        let count: u32 = extents.iter().map(|e| if matches!(e, Extent::Stored { .. }) { e.blocks() } else { 0 }).sum();
        let map = FileMap { packs: (0..packs).map(|p| [p; 16]).collect(), extents, digests: vec![[0xA5; 8]; count as usize] };
        seeds.push(("file_map", name.into(), prefixed(len, &map.encode())));
    }
    let pack = |id: u8| PackRef {
        id: [id; 16],
        kind: if id.is_multiple_of(2) { PackKind::Data } else { PackKind::Meta },
        size: 33_000_000,
        footer_len: 70_000,
        frames: 3000,
        live: 2900,
        sha256: [id; 32],
    };
    for count in [0, 1, 5] {
        let packs: Vec<_> = (0..count).map(pack).collect();
        seeds.push(("manifest", format!("packs_{count}"), [&[0][..], &pack_table::encode_chunk(&packs)].concat()));
    }
    let held = |id: u8, frames| TablePack { pack: pack(id), digests: vec![[id; 16]; frames] };
    for (name, pack_chunks, file_chunks, packs) in [("index", 1, 2, vec![]), ("index_packs", 2, 5, vec![held(1, 4), held(2, 3)])] {
        let index = TableIndex { pack_chunks, file_chunks, packs };
        seeds.push(("manifest", name.into(), [&[3][..], &index.encode()].concat()));
    }
    let mut writer = TableWriter::default();
    for (path, node) in [
        ("PG_VERSION", Node::File { len: 3, map: MapPlace::Inline(vec![0, 1, 2]) }),
        ("base", Node::Directory),
        (
            "base/5/16384",
            Node::File {
                len: 1 << 30,
                map: MapPlace::Sections(vec![
                    MapRun { pack: [7; 16], first: 3, count: 30 },
                    MapRun { pack: [8; 16], first: 0, count: 2 },
                ]),
            },
        ),
        ("pg_tblspc/16400", Node::Tablespace { location: "/srv/ts 1".into() }),
        ("pg_tblspc/16400/PG_15/a\\b=[#\" é", Node::Directory),
    ] {
        writer.push(&FileEntry { path: path.into(), mode: 0o600, node });
    }
    seeds.push(("manifest", "files".into(), [&[1][..], &writer.finish().concat()].concat()));
    let manifest = br#"{"id":"01KAJ0000000000000000000AA","kind":"incremental","parent":"01KAJ0000000000000000000AB","source":"local","cluster":"main","system_id":"7441234567890123456","server_version":"15.20","major":15,"from_standby":false,"timeline":1,"start_lsn":"0/E00028","stop_lsn":"0/E00138","started_at":"2026-11-21T09:29:11Z","finished_at":"2026-11-21T09:29:12.5Z","wal_segment_size":1048576,"block_size":8192,"data_checksums":true,"backup_label":"START WAL LOCATION: 0/E00028\n","tablespaces":[{"oid":16400,"location":"/srv/ts"}],"bad_pages":[{"path":"base/5/16384","block":1,"reason":"x"}],"labels":{"k":"v"},"warnings":[],"files":1000,"source_bytes":1,"changed_bytes":1,"stored_bytes":1,"objects_put":3,"version":"0.1.0"}"#;
    seeds.push(("manifest", "json".into(), [&[2][..], manifest].concat()));
}

fn documents(seeds: &mut Vec<Seed>) {
    let env = fixed::env("documents");
    let identity = IDENTITY;
    let master = MasterKey::generate(&env).unwrap();
    let wrap = Wrap::Passphrase("correct horse".into());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let passphrase = runtime.block_on(SlotDocument::create(&env, &identity, &master, &wrap, "ops")).unwrap();
    // Sealing for a recipient takes the system's randomness; a seed need not open.
    let method = Method::X25519 {
        recipient: "age1yrq7chxpdvxm54hcfzdxfdc8wqkc3lhtmgm6d8vspjfn4q0uhyqqw0n8tj".into(),
        wrapped: "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSA=".into(),
    };
    let recipient = SlotDocument { method, ..passphrase.clone() };
    let method = Method::Kms {
        key: "azure-kv:https://backups.vault.azure.net/keys/pgvault".into(),
        key_version: "78deebed173b48e48f55abf87ed4cf71".into(),
        slot_key: "khwIe26NuAZazS7upywDBpGRmRNMW5".into(),
        wrapped: "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSA=".into(),
    };
    let service = SlotDocument { method, ..passphrase.clone() };
    let later = Method::Other(serde_json::from_str(r#"{ "type": "tpm", "pcrs": [1, 7], "wrapped": "AA==" }"#).unwrap());
    let later = SlotDocument { method: later, ..passphrase.clone() };
    let epoch = EpochDocument::create(&env, &identity, &master).unwrap();
    let vault = serde_json::json!({
        "format": "PGV1", "major": 1, "minor": 0, "vault_id": "01KAJ0000000000000000000AA", "created_at": "2026-11-21T09:29:11Z",
        "suite": "aes256gcm-hkdfsha256-blake3", "features": { "read": [], "write": [], "gc": ["later"] },
    });
    let other = serde_json::json!({ "z": [1, -1, 1.5, true, null, { "é\"\\\u{1}": "" }], "a": {} });
    for (name, bytes) in [
        ("vault", document::encode(&vault).unwrap()),
        ("slot_passphrase", document::encode(&passphrase).unwrap()),
        ("slot_x25519", document::encode(&recipient).unwrap()),
        ("slot_kms", document::encode(&service).unwrap()),
        ("slot_later", document::encode(&later).unwrap()),
        ("epoch", document::encode(&epoch).unwrap()),
        ("other", document::encode(&other).unwrap()),
    ] {
        seeds.push(("document", name.into(), bytes));
    }
}

fn names(seeds: &mut Vec<Seed>) {
    for (name, text) in [
        ("aws_arn", "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"),
        ("aws_alias", "aws-kms:alias/team/backups"),
        ("azure", "azure-kv:https://backups.vault.azure.net/keys/pgvault/78deebed173b48e48f55abf87ed4cf71"),
        ("gcp", "gcp-kms:projects/example.com:p/locations/global/keyRings/r_1/cryptoKeys/k"),
        ("transit", "vault-transit:https://[::1]:8200/team/transit/pgvault"),
        ("transit_short", "vault-transit:transit/pgvault"),
    ] {
        seeds.push(("kms_name", name.into(), text.as_bytes().to_vec()));
    }
}

/// WAL with pages of 1 KiB, so that short inputs cross pages; checksums are right.
struct SmallPages {
    bytes: Vec<u8>,
    start: u64,
    previous: u64,
}

impl SmallPages {
    const BLOCK: usize = 1024;

    fn page(&mut self, remaining: usize) {
        let from = self.bytes.len();
        let flags = u16::from(remaining > 0) | if from == 0 { 2 } else { 0 };
        self.bytes.extend(0xD110u16.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend((self.start + from as u64).to_le_bytes());
        self.bytes.extend((remaining as u64).to_le_bytes());
        if from == 0 {
            self.bytes.extend(0x1234u64.to_le_bytes());
            self.bytes.extend((1u32 << 20).to_le_bytes());
            self.bytes.extend(1024u32.to_le_bytes());
        }
    }

    fn record(&mut self, resource_manager: u8, info: u8, xid: u32, data: &[u8]) {
        if self.bytes.len().is_multiple_of(Self::BLOCK) {
            self.page(0);
        }
        let at = self.start + self.bytes.len() as u64;
        let mut record = u32::try_from(24 + data.len()).unwrap().to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(self.previous.to_le_bytes());
        record.extend([info, resource_manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(data), &record);
        record.extend(crc.to_le_bytes());
        record.extend(data);
        self.previous = at;
        for (done, byte) in record.iter().enumerate() {
            if self.bytes.len().is_multiple_of(Self::BLOCK) {
                self.page(record.len() - done);
            }
            self.bytes.push(*byte);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }
}

fn wal(seeds: &mut Vec<Seed>) {
    for (name, lengths) in [
        ("000000010000000000000008", &[2_000][..]),
        ("000000010000000000000009", &[0x2E0, 12_000]),
        ("00000001000000000000000A", &[8_300, 100]),
        ("00000001000000000000000B", &[8_300, 30]),
        ("000000010000000000000011.partial", &[0x100]),
        ("000000020000000000000011", &[0x400]),
    ] {
        let bytes = segment(name);
        for length in lengths {
            if *length > 1000 {
                seeds.push(("wal_page", format!("{name}_{length}_made_right"), prefixed(0x40, &bytes[..1000])));
            }
            seeds.push(("wal_page", format!("{name}_{length}"), prefixed(0, &bytes[..*length])));
        }
    }
    for (name, start) in [("low", 1u64 << 20), ("high", u64::MAX << 20)] {
        let mut pages = SmallPages { bytes: Vec::new(), start, previous: 8 };
        pages.record(10, 0, 3, &[1; 100]);
        pages.record(1, 0, 4, &[&[255, 8][..], &1_000_000i64.to_le_bytes()].concat());
        pages.record(10, 0, 5, &[1; 2500]);
        let mut point = [0; 72];
        point[8..14].copy_from_slice(b"deploy");
        pages.record(0, 0x70, 0, &[&[255, 72][..], &point].concat());
        pages.record(10, 0, 5, &vec![1; 4 * 1000 - 100]);
        seeds.push(("wal_page", format!("small_pages_{name}_cut"), prefixed(0, &pages.bytes[..pages.bytes.len() - 1500])));
        pages.record(0, 0x40, 0, &[]);
        seeds.push(("wal_page", format!("small_pages_{name}"), prefixed(0, &pages.bytes)));
        seeds.push(("wal_page", format!("small_pages_{name}_made_right"), prefixed(0x40, &pages.bytes[..1024])));
        seeds.push(("wal_page", format!("small_pages_{name}_elsewhere"), prefixed(0x80 | (start << 8), &pages.bytes[..200])));
    }
}

/// The `wal_page` seeds again, cut.
fn wal_rows(seeds: &mut Vec<Seed>) {
    let pages: Vec<Seed> = seeds.iter().filter(|(target, ..)| *target == "wal_page").cloned().collect();
    for (_, name, mut bytes) in pages {
        // Pieces of 1000 bytes; the second check begins at 40.
        bytes[1..4].copy_from_slice(&[0xE7, 3, 40]);
        seeds.push(("wal_check", name, bytes));
    }
}

fn texts(seeds: &mut Vec<Seed>) {
    let label = postgres("backup_label.15");
    let incremental = [&label[..], b"INCREMENTAL FROM LSN: 0/0A000028\nINCREMENTAL FROM TLI: 1\n"].concat();
    let odd = TablespaceMapEntry { oid: 7, path: std::ffi::OsString::from_vec(b"/\n\r\\\xff x".to_vec()).into() };
    for (name, kind, bytes) in [
        ("label", 0u8, label),
        ("label_newline", 0, postgres("backup_label.newline.15")),
        ("label_incremental", 0, incremental),
        ("tablespaces", 1, postgres("tablespace_map.15")),
        ("tablespaces_odd", 1, TablespaceMap { entries: vec![odd] }.to_bytes()),
        ("history", 2, postgres("00000002.history")),
        ("history_back", 2, b"# x\n\n1\t0/5000000\tx\n2\t0/3000000\tno recovery target specified\n16\tA/B\n".to_vec()),
    ] {
        seeds.push(("backup_label", name.into(), [&[kind][..], &bytes].concat()));
    }
    let control = postgres("pg_control.15");
    for (version, insertions) in [(1300u32, &[][..]), (1700, &[]), (1800, &[(256, 1)]), (1902, &[(64, 8), (232, 4)])] {
        let mut bytes = control[..330].to_vec();
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        for (at, count) in insertions {
            let _: Vec<_> = bytes.splice(at..at, std::iter::repeat_n(0, *count)).collect();
        }
        seeds.push(("pg_control", format!("{version}"), [&[1][..], &bytes].concat()));
    }
    seeds.push(("pg_control", "real".into(), [&[0][..], &control[..320]].concat()));
    for (number, text) in [
        "wal/00000001/000000010000000000000005.wal",
        "000000010000000000000005.00000000-00000A00.part",
        "000000010000000000000005.partial",
        "000000010000000000000005.00000028.backup",
        "0000000A.history",
        "000000010000000000000005",
        "main-7441234567890123456",
        "x.tmp.y-1",
        "01KAJ0000000000000000000AA.pack",
        "lsn:16/B374D848",
        "xid:731",
        "name:before deploy",
        "latest",
        "2026-11-21 14:32:00+01",
        "2026-11-21T14:32:00.5-00:30",
        r#"{"file":"000000010000000000000009","segment_size":1048576,"start":"0/900000","end":"0/A00000","last_record":null,"transactions":{"first_time":"2026-11-21T09:29:11.11687Z","last_time":"2026-11-21T09:29:11.184817Z","last_lsn":"0/90B930","min_xid":726,"max_xid":735},"restore_points":[{"name":"x","lsn":"0/900278","time":"2026-11-21T09:29:11Z"}]}"#,
    ]
    .into_iter()
    .enumerate()
    {
        seeds.push(("wal_object_name", format!("{number:02}"), text.into()));
    }
}
