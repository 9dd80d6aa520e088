//! Files by their paths, packed: a million of them take some 100 MB, a third of what they take one by one.
//!
//! A backup has two such tables, the parent's and its own.

use crate::Result;
use crate::format::Cursor;
use crate::format::file_table::{self, FileEntry, TableWriter};

/// Bytes of one block of lines.
const BLOCK: usize = 1 << 20;

/// Entries of a file table, each as the line that the table has for it.
#[derive(Debug, Default)]
pub(super) struct Entries {
    lines: Vec<Vec<u8>>,
    /// Block and offset of each entry.
    index: Vec<(u32, u32)>,
}

impl Entries {
    pub(super) fn push(&mut self, entry: &FileEntry) {
        if self.lines.last().is_none_or(|block| block.len() >= BLOCK) {
            self.lines.push(Vec::with_capacity(BLOCK + BLOCK / 16));
        }
        let number = self.lines.len().saturating_sub(1);
        let Some(block) = self.lines.last_mut() else { return };
        self.index.push((u32::try_from(number).unwrap_or(u32::MAX), u32::try_from(block.len()).unwrap_or(u32::MAX)));
        file_table::encode_entry(entry, block);
    }

    /// Sorts by path, which [`Entries::find`] and [`Entries::into_chunks`] ask for; of two with one path one is kept.
    pub(super) fn sort(&mut self) {
        let Self { lines, index } = self;
        index.sort_by(|a, b| path_at(lines, *a).cmp(path_at(lines, *b)));
        index.dedup_by(|a, b| path_at(lines, *a) == path_at(lines, *b));
    }

    /// The entry with this path, of sorted ones.
    pub(super) fn find(&self, path: &str) -> Result<Option<FileEntry>> {
        let found = self.index.binary_search_by(|at| path_at(&self.lines, *at).cmp(path.as_bytes()));
        let at = found.ok().and_then(|number| self.index.get(number));
        Ok(at.map(|at| file_table::parse_entry(&mut Cursor::new("file table", line_at(&self.lines, *at)))).transpose()?)
    }

    /// The chunks of a table of sorted entries.
    pub(super) fn into_chunks(self) -> Vec<Vec<u8>> {
        let mut writer = TableWriter::default();
        for at in &self.index {
            let rest = line_at(&self.lines, *at);
            let mut cursor = Cursor::new("file table", rest);
            if file_table::parse_entry(&mut cursor).is_ok() {
                writer.push_line(rest.get(..rest.len() - cursor.remaining()).unwrap_or_default());
            }
        }
        writer.finish()
    }
}

/// The bytes from an entry's line on.
fn line_at(lines: &[Vec<u8>], (block, offset): (u32, u32)) -> &[u8] {
    lines.get(block as usize).and_then(|block| block.get(offset as usize..)).unwrap_or_default()
}

fn path_at(lines: &[Vec<u8>], at: (u32, u32)) -> &[u8] {
    Cursor::new("file table", line_at(lines, at)).bytes().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::file_table::{MapPlace, Node, parse_chunk};

    #[test]
    fn entries_are_found_and_written_in_order_whatever_order_they_came_in() {
        let entry = |n: u32| FileEntry {
            path: format!("base/{}/{n}", n % 7),
            mode: 0o600,
            node: Node::File { len: n.into(), map: MapPlace::Inline(vec![7; (n % 50) as usize]) },
        };
        let mut entries = Entries::default();
        for n in (0..40_000).rev().chain([5]) {
            entries.push(&entry(n));
        }
        entries.sort();
        assert_eq!(entries.find("base/3/3").unwrap(), Some(entry(3)));
        assert_eq!(entries.find("base/3/4").unwrap(), None);
        let read: Vec<_> = entries.into_chunks().iter().flat_map(|chunk| parse_chunk(chunk).unwrap()).collect();
        assert_eq!(read.len(), 40_000);
        assert!(read.is_sorted_by(|a, b| a.path < b.path));
    }
}
