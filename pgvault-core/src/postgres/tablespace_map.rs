//! `tablespace_map`: which directory each tablespace of a base backup links to.
//!
//! One line for each tablespace, `OID PATH`. A restore that maps tablespaces elsewhere rewrites the file, because PostgreSQL makes the
//! links from it at the first start. Escaping is that of `do_pg_backup_start` (`src/backend/access/transam/xlog.c`) and of
//! `read_tablespace_map` (`xlogrecovery.c`): a backslash before a newline, a carriage return or a backslash of the path.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::ParseError;

/// A tablespace and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceMapEntry {
    /// The tablespace's OID: the name of the link in `pg_tblspc`.
    pub oid: u32,
    /// What the link points to.
    pub path: PathBuf,
}

/// The contents of a `tablespace_map`, in the order of the file. Empty when the cluster has no tablespaces of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TablespaceMap {
    /// One for each tablespace.
    pub entries: Vec<TablespaceMapEntry>,
}

impl TablespaceMap {
    /// Reads a `tablespace_map`.
    ///
    /// # Errors
    /// When a line is not an OID, a space and a path; when an OID occurs twice; when the last line is not terminated. A relative path
    /// (`allow_in_place_tablespaces`) is accepted here and judged by the restore.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let mut entries: Vec<TablespaceMapEntry> = Vec::new();
        let mut line = Vec::new();
        let mut escaped = false;
        for byte in bytes {
            match byte {
                b'\n' | b'\r' if !escaped => {
                    // A carriage return that a newline follows, as a file edited elsewhere may have.
                    if !line.is_empty() {
                        let entry = Self::entry(&std::mem::take(&mut line))?;
                        if entries.iter().any(|other| other.oid == entry.oid) {
                            return Err(bad(format!("tablespace {} occurs twice", entry.oid)));
                        }
                        entries.push(entry);
                    }
                }
                b'\\' if !escaped => escaped = true,
                _ => {
                    line.push(*byte);
                    escaped = false;
                }
            }
        }
        if line.is_empty() && !escaped { Ok(Self { entries }) } else { Err(bad("the last line is not terminated".to_owned())) }
    }

    fn entry(line: &[u8]) -> Result<TablespaceMapEntry, ParseError> {
        let malformed = || bad(format!("`{}` is not an OID and a path", String::from_utf8_lossy(line)));
        let space = line.iter().position(|b| *b == b' ').ok_or_else(malformed)?;
        let (oid, path) = line.split_at_checked(space).ok_or_else(malformed)?;
        let path = path.get(1..).filter(|p| !p.is_empty() && !p.contains(&0)).ok_or_else(malformed)?;
        let oid = std::str::from_utf8(oid).ok().filter(|o| o.bytes().all(|b| b.is_ascii_digit()));
        let oid = oid.and_then(|o| o.parse().ok()).filter(|o| *o > 0).ok_or_else(malformed)?;
        Ok(TablespaceMapEntry { oid, path: PathBuf::from(OsString::from_vec(path.to_vec())) })
    }

    /// The file's contents, as the server writes them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            bytes.extend_from_slice(entry.oid.to_string().as_bytes());
            bytes.push(b' ');
            for byte in entry.path.as_os_str().as_bytes() {
                if matches!(byte, b'\n' | b'\r' | b'\\') {
                    bytes.push(b'\\');
                }
                bytes.push(*byte);
            }
            bytes.push(b'\n');
        }
        bytes
    }
}

fn bad(why: String) -> ParseError {
    ParseError::new("tablespace_map", why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: &[u8] = include_bytes!("../../../testdata/postgres/tablespace_map.15");

    #[test]
    fn a_real_map_is_read_and_written_back() {
        let map = TablespaceMap::parse(REAL).unwrap();
        let found: Vec<_> = map.entries.iter().map(|e| (e.oid, e.path.to_str().unwrap())).collect();
        assert_eq!(found, [(16402, "/tmp/pgf/ts\\3"), (16400, "/tmp/pgf/ts1"), (16401, "/tmp/pgf/ts 2")]);
        assert_eq!(map.to_bytes(), REAL);
        assert_eq!(TablespaceMap::parse(b"").unwrap(), TablespaceMap::default());
    }

    #[test]
    fn line_ends_and_damage() {
        assert_eq!(TablespaceMap::parse(b"1 /a\r\n2 /b\r\n").unwrap().entries.len(), 2);
        let cases: [&[u8]; 11] = [
            b"1 /a",
            b"1 /a\\\n",
            b"1\n",
            b"1 \n",
            b" /a\n",
            b"x /a\n",
            b"-1 /a\n",
            b"+1 /a\n",
            b"0 /a\n",
            b"4294967296 /a\n",
            b"1 a\0b\n",
        ];
        for bad in cases {
            assert!(TablespaceMap::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        assert!(TablespaceMap::parse(b"1 /a\n1 /b\n").is_err(), "twice");
    }

    proptest! {
        /// T25: any path survives, whatever is in it.
        #[test]
        fn t25_any_path_round_trips(paths in proptest::collection::vec(proptest::collection::vec(1u8..=255, 1..30), 0..6)) {
            let entries = (1u32..).zip(paths).map(|(oid, p)| TablespaceMapEntry { oid, path: OsString::from_vec(p).into() }).collect();
            let map = TablespaceMap { entries };
            prop_assert_eq!(TablespaceMap::parse(&map.to_bytes()).unwrap(), map);
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = TablespaceMap::parse(&bytes);
        }
    }
}
