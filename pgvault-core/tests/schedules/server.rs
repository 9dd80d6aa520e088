//! A server that is none: it answers what a base backup asks, with a small cluster that never changes.
//!
//! A real one takes a second for each backup; thousands of histories of faults want a hundredth. The WAL and the control file are a
//! real cluster's (testdata/postgres), the rest is made up. What a real server does is tested with real ones (`pg_crash`).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgvault_core::postgres::{ConnInfo, SegmentHeader, SystemId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SEGMENT: u64 = 1 << 20;
const FIRST: u64 = 8;

/// The names of the segments, in a row from 0/800000 on.
pub(crate) const ROW: [&str; 5] = [
    "000000010000000000000008",
    "000000010000000000000009",
    "00000001000000000000000A",
    "00000001000000000000000B",
    "00000001000000000000000C",
];

const LABEL: &str = "START WAL LOCATION: 0/800028 (file 000000010000000000000008)\nCHECKPOINT LOCATION: 0/800060\n\
    BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-21 09:29:11 UTC\nLABEL: pgvault\nSTART TIMELINE: 1\n";

/// What it holds.
#[derive(Debug)]
pub(crate) struct Data {
    pub(crate) system_id: SystemId,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) segments: Vec<Vec<u8>>,
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(name)
}

impl Data {
    fn new() -> Self {
        let unpack =
            |name: &&str| zstd::stream::decode_all(std::fs::File::open(testdata(&format!("{name}.zst"))).unwrap()).unwrap();
        let segments: Vec<Vec<u8>> = ROW.iter().map(unpack).collect();
        let system_id = SegmentHeader::parse(&segments[0]).unwrap().system_identifier;
        let heap = std::fs::read(testdata("heap_5_16384")).unwrap();
        let mut dice = pgvault_core::testing::Dice::new(7);
        let mut noise = |len: usize| (0..len).map(|_| dice.roll().to_le_bytes()[0]).collect::<Vec<u8>>();
        let files = [
            ("global/pg_control", std::fs::read(testdata("pg_control.15")).unwrap()),
            ("PG_VERSION", b"15\n".to_vec()),
            ("global/pg_filenode.map", noise(512)),
            ("base/5/PG_VERSION", b"15\n".to_vec()),
            // Two pages for several regions' worth, new pages, and what is no relation.
            ("base/5/16384", heap.repeat(20)),
            ("base/5/16385", vec![0; 3 * 8192]),
            ("base/5/16386", Vec::new()),
            ("pg_xact/0000", noise(8192)),
            ("notes about it.txt", noise(300 << 10)),
        ];
        Self { system_id, files: files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect(), segments }
    }
}

/// A listening server; it ends with the runtime.
#[derive(Debug)]
pub(crate) struct Server {
    port: u16,
    pub(crate) data: Arc<Data>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let data = Arc::new(Data::new());
        let shared = data.clone();
        drop(tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                // A client may go away in the middle.
                drop(tokio::spawn(serve(client, shared.clone())));
            }
        }));
        Self { port, data }
    }

    pub(crate) fn connection(&self) -> ConnInfo {
        let text = format!("host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable", self.port);
        ConnInfo::parse(&text, &|_| None).unwrap()
    }
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &u32::try_from(body.len() + 4).unwrap().to_be_bytes(), body].concat()
}

fn row(values: &[Option<&str>]) -> Vec<u8> {
    let count = u16::try_from(values.len()).unwrap().to_be_bytes();
    let mut names = count.to_vec();
    let mut fields = count.to_vec();
    for value in values {
        names.extend_from_slice(b"x\0");
        // Table, column, type text, any length, no modifier, as text.
        names.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]);
        match value {
            None => fields.extend_from_slice(&[0xFF; 4]),
            Some(text) => {
                fields.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
                fields.extend_from_slice(text.as_bytes());
            }
        }
    }
    [message(b'T', &names), message(b'D', &fields)].concat()
}

fn complete(tag: &str) -> Vec<u8> {
    message(b'C', format!("{tag}\0").as_bytes())
}

fn answer(values: &[Option<&str>]) -> Vec<u8> {
    [row(values), complete("SELECT 1"), message(b'Z', b"I")].concat()
}

fn copy(kind: u8, body: &[u8]) -> Vec<u8> {
    message(b'd', &[&[kind][..], body].concat())
}

/// A member of an archive: a file, or a folder when its name ends with a slash.
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    let mode = if name.ends_with('/') { "0000700 " } else { "0000600 " };
    for (at, text) in [(100, mode.to_owned()), (124, format!("{:011o} ", content.len())), (136, "14524747000 ".to_owned())] {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    header[156] = if name.ends_with('/') { b'5' } else { b'0' };
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut all = [&header[..], content].concat();
    all.resize(all.len().next_multiple_of(512), 0);
    all
}

async fn serve(mut client: TcpStream, data: Arc<Data>) -> io::Result<()> {
    client.set_nodelay(true)?;
    let length = client.read_u32().await?;
    let mut startup = vec![0; length as usize - 4];
    let _ = client.read_exact(&mut startup).await?;
    let parameter = |name: &str, value: &str| message(b'S', format!("{name}\0{value}\0").as_bytes());
    let hello = [
        message(b'R', &[0; 4]),
        parameter("server_version", "15.20"),
        parameter("server_encoding", "UTF8"),
        message(b'K', &[0, 0, 0, 7, 0, 0, 0, 7]),
        message(b'Z', b"I"),
    ];
    client.write_all(&hello.concat()).await?;
    loop {
        let tag = client.read_u8().await?;
        let length = client.read_u32().await?;
        let mut body = vec![0; length as usize - 4];
        let _ = client.read_exact(&mut body).await?;
        if tag != b'Q' {
            return Ok(());
        }
        let query = String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned();
        let id = data.system_id.to_string();
        let said = match query.as_str() {
            "IDENTIFY_SYSTEM" => answer(&[Some(&id), Some("1"), Some("0/D00000"), None]),
            "SHOW wal_segment_size" => answer(&[Some("1MB")]),
            q if q.starts_with("CREATE_REPLICATION_SLOT") => answer(&[Some("slot"), Some("0/800028"), None, None]),
            q if q.starts_with("SET ") => [complete("SET"), message(b'Z', b"I")].concat(),
            q if q.starts_with("SELECT pg_is_in_recovery()") => {
                answer(&[Some("f"), Some("8192"), Some("on"), Some("202209061"), Some("131072")])
            }
            q if q.starts_with("SELECT extract(epoch") => answer(&[Some("1795253351000000")]),
            "BASE_BACKUP" => Vec::new(),
            q if q.starts_with("BASE_BACKUP") => base_backup(&data),
            q if q.starts_with("START_REPLICATION") => {
                let at = q.split(' ').find_map(|word| word.strip_prefix("0/")).unwrap();
                client.write_all(&wal(&data, u64::from_str_radix(at, 16).unwrap())).await?;
                continue;
            }
            other => panic!("the server of the tests does not know `{other}`"),
        };
        client.write_all(&said).await?;
    }
}

/// From 0/800028 to 0/900100.
fn base_backup(data: &Data) -> Vec<u8> {
    let position = |lsn: &str| [row(&[Some(lsn), Some("1")]), complete("SELECT")].concat();
    let mut all = position("0/800028");
    all.extend(row(&[None, None, Some("700")]));
    all.extend(complete("SELECT"));
    all.extend(message(b'H', &[0, 0, 0]));
    all.extend(copy(b'n', b"base.tar\0\0"));
    let mut archive = tar("backup_label", LABEL.as_bytes());
    for folder in ["global/", "base/", "base/5/", "pg_xact/", "pg_wal/", "pg_tblspc/"] {
        archive.extend(tar(folder, b""));
    }
    for (name, bytes) in data.files.iter().filter(|(name, _)| *name != "global/pg_control") {
        archive.extend(tar(name, bytes));
    }
    archive.extend(tar("global/pg_control", &data.files["global/pg_control"]));
    for chunk in archive.chunks(32 << 10) {
        all.extend(copy(b'd', chunk));
    }
    all.extend(message(b'c', b""));
    all.extend(position("0/900100"));
    all.extend(complete("BASE_BACKUP"));
    all.extend(message(b'Z', b"I"));
    all
}

/// All there is from a position on.
fn wal(data: &Data, from: u64) -> Vec<u8> {
    let all = data.segments.concat();
    let first = FIRST * SEGMENT;
    let end = first + all.len() as u64;
    let mut said = message(b'W', &[0, 0, 0]);
    let mut at = from;
    while at < end {
        let next = (at + (128 << 10)).min(end);
        let piece = &all[usize::try_from(at - first).unwrap()..usize::try_from(next - first).unwrap()];
        said.extend(copy(b'w', &[&at.to_be_bytes()[..], &end.to_be_bytes(), &[0; 8], piece].concat()));
        at = next;
    }
    said
}
