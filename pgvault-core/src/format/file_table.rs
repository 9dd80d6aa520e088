//! The file table of a snapshot: every file, directory and link of the data directory, sorted by path.
//!
//! Small files carry their map inline; the map of a larger one is a frame of a meta pack. Tables are cut into chunks of
//! at most one frame, so that a million files are read in bounded memory.

use super::map::PackId;
use super::{Cursor, FormatError, MAX_FRAME, put_string, put_varint};

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A tablespace link under `pg_tblspc`; the target is its location at backup time.
    Tablespace {
        /// Where the link pointed.
        location: String,
    },
    /// A regular file.
    File {
        /// Length in bytes.
        len: u64,
        /// Where its map is.
        map: MapPlace,
    },
}

/// Where a file's map is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapPlace {
    /// The map's own bytes.
    Inline(Vec<u8>),
    /// Consecutive frames of a meta pack, which hold the map's bytes one after the other.
    Frames {
        /// The meta pack.
        pack: PackId,
        /// The first frame.
        first: u32,
        /// How many frames.
        count: u32,
    },
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Path relative to the data directory, `/` between its parts; tablespace contents lie under `pg_tblspc/<oid>/`.
    pub path: String,
    /// Unix permission bits.
    pub mode: u32,
    /// What it is.
    pub node: Node,
}

/// Collects entries into chunks of at most one frame each.
#[derive(Debug, Default)]
pub struct TableWriter {
    chunks: Vec<Vec<u8>>,
    open: Vec<u8>,
}

impl TableWriter {
    /// Appends an entry; callers append in path order.
    pub fn push(&mut self, entry: &FileEntry) {
        let mut line = Vec::with_capacity(entry.path.len() + 32);
        put_string(&mut line, entry.path.as_bytes());
        put_varint(&mut line, u64::from(entry.mode));
        match &entry.node {
            Node::Directory => line.push(0),
            Node::Tablespace { location } => {
                line.push(1);
                put_string(&mut line, location.as_bytes());
            }
            Node::File { len, map: MapPlace::Inline(map) } => {
                line.push(2);
                put_varint(&mut line, *len);
                put_string(&mut line, map);
            }
            Node::File { len, map: MapPlace::Frames { pack, first, count } } => {
                line.push(3);
                put_varint(&mut line, *len);
                line.extend_from_slice(pack);
                put_varint(&mut line, u64::from(*first));
                put_varint(&mut line, u64::from(*count));
            }
        }
        if self.open.len() + line.len() > MAX_FRAME {
            self.chunks.push(std::mem::take(&mut self.open));
        }
        self.open.extend_from_slice(&line);
    }

    /// The chunks, in order.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.open.is_empty() {
            self.chunks.push(self.open);
        }
        self.chunks
    }
}

/// Reads one chunk of the table.
///
/// Paths that could lead outside a restore's target are refused here, before anything is planned with them.
///
/// # Errors
/// When an entry is malformed, its path is absolute, empty or climbs, or the entries are not in order.
pub fn parse_chunk(bytes: &[u8]) -> Result<Vec<FileEntry>, FormatError> {
    let mut cursor = Cursor::new("file table", bytes);
    let mut entries: Vec<FileEntry> = Vec::new();
    while cursor.remaining() > 0 {
        let path = cursor.string()?.to_owned();
        if !is_plain_path(&path) {
            return Err(cursor.error(format!("has the path `{}`, which could leave the target", path.escape_debug())));
        }
        if entries.last().is_some_and(|last| last.path >= path) {
            return Err(cursor.error("is not sorted"));
        }
        let mode: u32 = cursor.number()?;
        if mode > 0o7777 {
            return Err(cursor.error("has impossible permission bits"));
        }
        let node = match cursor.u8()? {
            0 => Node::Directory,
            1 => Node::Tablespace { location: cursor.string()?.to_owned() },
            2 => Node::File { len: cursor.varint()?, map: MapPlace::Inline(cursor.bytes()?.to_vec()) },
            3 => Node::File {
                len: cursor.varint()?,
                map: MapPlace::Frames { pack: cursor.array()?, first: cursor.number()?, count: cursor.number()? },
            },
            other => return Err(FormatError::unsupported("file table", format!("unknown entry type {other}"))),
        };
        entries.push(FileEntry { path, mode, node });
    }
    Ok(entries)
}

/// True for a relative path of plain components.
pub fn is_plain_path(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node() -> impl Strategy<Value = Node> {
        prop_oneof![
            Just(Node::Directory),
            any::<String>().prop_map(|location| Node::Tablespace { location }),
            (any::<u64>(), any::<Vec<u8>>()).prop_map(|(len, map)| Node::File { len, map: MapPlace::Inline(map) }),
            (any::<u64>(), any::<[u8; 16]>(), any::<u32>(), any::<u32>())
                .prop_map(|(len, pack, first, count)| Node::File { len, map: MapPlace::Frames { pack, first, count } }),
        ]
    }

    proptest! {
        /// T25: names with quotes, brackets, hashes, spaces, backslashes and UTF-8.
        #[test]
        fn t25_tables_with_hostile_names_round_trip(entries in prop::collection::btree_map("[\\PC&&[^/\0]]{1,20}(/[\\\\=\\[#\" é]{1,5}x)?", (0u32..0o7777, node()), 0..40)) {
            let entries: Vec<_> = entries.into_iter().filter(|(p, _)| is_plain_path(p)).map(|(path, (mode, node))| FileEntry { path, mode, node }).collect();
            let mut writer = TableWriter::default();
            for entry in &entries { writer.push(entry); }
            let read: Vec<_> = writer.finish().iter().flat_map(|c| parse_chunk(c).unwrap()).collect();
            prop_assert_eq!(read, entries);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = parse_chunk(&bytes);
        }
    }

    #[test]
    fn paths_that_leave_the_target_are_refused() {
        for path in ["", "/etc/passwd", "../x", "base/../../x", "base//x", "a/./b", "a\0b"] {
            let mut writer = TableWriter::default();
            writer.push(&FileEntry { path: path.into(), mode: 0o600, node: Node::Directory });
            assert!(parse_chunk(&writer.finish()[0]).is_err(), "{path:?}");
        }
    }
}
