//! The file table of a snapshot: every file, directory and link of the data directory, sorted by path.
//!
//! Small files carry their map inline; the sections of a larger one's are frames of meta packs. Tables are cut into chunks of
//! at most one frame, so that a million files are read in bounded memory.

use super::map::{PackId, sections};
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
    /// The sections of the map, in order: each is a frame of a meta pack.
    Sections(Vec<MapRun>),
}

/// Sections of a map that lie one after the other in one meta pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRun {
    /// The meta pack.
    pub pack: PackId,
    /// The frame of the first section.
    pub first: u32,
    /// How many sections.
    pub count: u32,
}

impl MapPlace {
    /// The meta pack and the frame that hold section `number`; `None` for a map that is inline, or has no such section.
    pub fn locate(&self, number: u32) -> Option<(PackId, u32)> {
        let Self::Sections(runs) = self else { return None };
        let mut left = number;
        for run in runs {
            if left < run.count {
                return Some((run.pack, run.first.checked_add(left)?));
            }
            left -= run.count;
        }
        None
    }

    /// Puts the places of sections, in order, into as few runs as there can be.
    pub fn of_sections(places: impl IntoIterator<Item = (PackId, u32)>) -> Self {
        let mut runs: Vec<MapRun> = Vec::new();
        for (pack, frame) in places {
            match runs.last_mut() {
                Some(run) if run.pack == pack && run.first.checked_add(run.count) == Some(frame) => run.count += 1,
                _ => runs.push(MapRun { pack, first: frame, count: 1 }),
            }
        }
        Self::Sections(runs)
    }
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
        encode_entry(entry, &mut line);
        self.push_line(&line);
    }

    /// Appends an entry that [`encode_entry`] wrote.
    pub(crate) fn push_line(&mut self, line: &[u8]) {
        if !self.open.is_empty() && self.open.len() + line.len() > MAX_FRAME {
            self.chunks.push(std::mem::take(&mut self.open));
        }
        self.open.extend_from_slice(line);
    }

    /// The chunks, in order.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.open.is_empty() {
            self.chunks.push(self.open);
        }
        self.chunks
    }
}

/// Writes one entry.
pub(crate) fn encode_entry(entry: &FileEntry, line: &mut Vec<u8>) {
    put_string(line, entry.path.as_bytes());
    put_varint(line, u64::from(entry.mode));
    match &entry.node {
        Node::Directory => line.push(0),
        Node::Tablespace { location } => {
            line.push(1);
            put_string(line, location.as_bytes());
        }
        Node::File { len, map: MapPlace::Inline(map) } => {
            line.push(2);
            put_varint(line, *len);
            put_string(line, map);
        }
        Node::File { len, map: MapPlace::Sections(runs) } => {
            line.push(3);
            put_varint(line, *len);
            put_varint(line, runs.len() as u64);
            for MapRun { pack, first, count } in runs {
                line.extend_from_slice(pack);
                put_varint(line, u64::from(*first));
                put_varint(line, u64::from(*count));
            }
        }
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
        let entry = parse_entry(&mut cursor)?;
        if entries.last().is_some_and(|last| last.path >= entry.path) {
            return Err(cursor.error("is not sorted"));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// Reads one entry.
pub(crate) fn parse_entry(cursor: &mut Cursor<'_>) -> Result<FileEntry, FormatError> {
    let path = cursor.string()?.to_owned();
    if !is_plain_path(&path) {
        return Err(cursor.error(format!("has the path `{}`, which could leave the target", path.escape_debug())));
    }
    let mode: u32 = cursor.number()?;
    if mode > 0o7777 {
        return Err(cursor.error("has impossible permission bits"));
    }
    let node = match cursor.u8()? {
        0 => Node::Directory,
        1 => Node::Tablespace { location: cursor.string()?.to_owned() },
        2 => Node::File { len: cursor.varint()?, map: MapPlace::Inline(cursor.bytes()?.to_vec()) },
        3 => sectioned(cursor)?,
        other => return Err(FormatError::unsupported("file table", format!("unknown entry type {other}"))),
    };
    Ok(FileEntry { path, mode, node })
}

/// Reads a file whose map lies in meta packs.
fn sectioned(cursor: &mut Cursor<'_>) -> Result<Node, FormatError> {
    let len = cursor.varint()?;
    let runs = cursor.count(18)?;
    let mut all = Vec::with_capacity(runs);
    let mut covered = 0u64;
    for _ in 0..runs {
        let run = MapRun { pack: cursor.array()?, first: cursor.number()?, count: cursor.number()? };
        covered += u64::from(run.count);
        if run.count == 0 || run.first.checked_add(run.count).is_none() {
            return Err(cursor.error("has a map with an impossible run of sections"));
        }
        all.push(run);
    }
    if covered != u64::from(sections(len)) {
        return Err(cursor.error(format!("places {covered} sections of the map of a file of {len} bytes")));
    }
    Ok(Node::File { len, map: MapPlace::Sections(all) })
}

/// True for a relative path of plain components.
pub fn is_plain_path(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::map::SECTION;

    fn node() -> impl Strategy<Value = Node> {
        prop_oneof![
            Just(Node::Directory),
            any::<String>().prop_map(|location| Node::Tablespace { location }),
            (any::<u64>(), any::<Vec<u8>>()).prop_map(|(len, map)| Node::File { len, map: MapPlace::Inline(map) }),
            prop::collection::vec((any::<[u8; 16]>(), any::<u16>(), 1u32..9), 0..4).prop_map(|runs| {
                let runs: Vec<_> =
                    runs.into_iter().map(|(pack, first, count)| MapRun { pack, first: first.into(), count }).collect();
                let len = runs.iter().map(|run| u64::from(run.count)).sum::<u64>() * SECTION;
                Node::File { len, map: MapPlace::Sections(runs) }
            }),
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

    /// T9: every section has one place, whatever runs they are written in, and a table that says otherwise is refused.
    #[test]
    fn t9_every_section_of_a_map_has_one_place() {
        let places: Vec<_> = [(1, 7), (1, 8), (2, 9), (1, 9), (1, 11)].map(|(pack, frame)| ([pack; 16], frame)).into();
        let map = MapPlace::of_sections(places.iter().copied());
        assert_eq!((0..6).map_while(|n| map.locate(n)).collect::<Vec<_>>(), places);
        let MapPlace::Sections(runs) = &map else { panic!("{map:?}") };
        assert_eq!(runs.len(), 4);
        let table = |len: u64, map: &MapPlace| {
            let mut writer = TableWriter::default();
            writer.push(&FileEntry { path: "a".into(), mode: 0o600, node: Node::File { len, map: map.clone() } });
            parse_chunk(&writer.finish().concat())
        };
        for (len, right) in [(4 * SECTION, false), (4 * SECTION + 1, true), (5 * SECTION, true), (5 * SECTION + 1, false)] {
            assert_eq!(table(len, &map).is_ok(), right, "{len}");
        }
        for run in [MapRun { pack: [1; 16], first: 0, count: 0 }, MapRun { pack: [1; 16], first: u32::MAX, count: 1 }] {
            let len = u64::from(run.count) * SECTION;
            assert!(table(len, &MapPlace::Sections(vec![run])).is_err(), "{run:?}");
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
