//! Which files of a data directory are relations, and which block of its relation a page of such a file is.
//!
//! Page checksums include the block number within the *relation*, and a relation continues in a new file each gigabyte: a checker
//! that starts counting at zero in `16384.1` calls every page of it corrupt (T14). A checker that takes `pg_internal.init` for a
//! relation calls that corrupt. Names are those of `src/common/relpath.c`, and the rules for parsing them are those of
//! `parse_filename_for_nontemp_relation` (`src/backend/storage/file/reinit.c`) and `looks_like_temp_rel_name`
//! (`src/backend/storage/file/fd.c`).

/// The tablespace of `base/`.
pub const PG_DEFAULT_TABLESPACE: u32 = 1663;

/// The tablespace of `global/`.
pub const PG_GLOBAL_TABLESPACE: u32 = 1664;

/// A part of a relation that has files of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The data.
    Main,
    /// The free space map.
    FreeSpaceMap,
    /// The visibility map.
    VisibilityMap,
    /// What an unlogged relation is reset to after a crash; the one fork of it that a backup keeps (T26).
    Init,
}

/// A file that holds pages of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// The tablespace's OID.
    pub tablespace: u32,
    /// The database's OID; 0 for the catalogs that all databases share.
    pub database: u32,
    /// The number of the file, which is not the relation's OID once it was rewritten.
    pub relfilenode: u32,
    /// Which fork.
    pub fork: Fork,
    /// The number of the file in the fork, from 0: `16384`, `16384.1` and so on.
    pub segment: u32,
    /// True for a temporary relation of some session, which a backup leaves out.
    pub is_temporary: bool,
}

impl RelationFile {
    /// Tells what `path`, relative to the data directory and with `/` between its parts, holds; `None` when it is not a relation.
    pub fn parse(path: &str) -> Option<Self> {
        let (directory, name) = path.rsplit_once('/')?;
        let mut parts = directory.split('/');
        let (tablespace, database) = match (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next()) {
            ("global", None, ..) => (PG_GLOBAL_TABLESPACE, 0),
            ("base", Some(database), None, ..) => (PG_DEFAULT_TABLESPACE, oid(database)?),
            ("pg_tblspc", Some(tablespace), Some(version), Some(database), None) if is_version_directory(version) => {
                (oid(tablespace)?, oid(database)?)
            }
            _ => return None,
        };
        let (name, is_temporary) = match name.strip_prefix('t') {
            None => (name, false),
            Some(rest) => {
                let (backend, name) = rest.split_once('_')?;
                // The number of a session, from 0 on in newer versions.
                if backend.is_empty() || !backend.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                (name, true)
            }
        };
        let (name, segment) = match name.split_once('.') {
            None => (name, 0),
            Some((name, segment)) => (name, oid(segment)?),
        };
        let (relfilenode, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((number, "fsm")) => (number, Fork::FreeSpaceMap),
            Some((number, "vm")) => (number, Fork::VisibilityMap),
            Some((number, "init")) => (number, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { tablespace, database, relfilenode: oid(relfilenode)?, fork, segment, is_temporary })
    }

    /// The block number, within its relation's fork, of the page at `index` in this file.
    ///
    /// `segment_blocks` is [`ControlFile::relation_segment_blocks`](super::ControlFile::relation_segment_blocks). `None` when no
    /// relation can have such a block.
    pub fn block_number(self, index: u32, segment_blocks: u32) -> Option<u32> {
        self.segment.checked_mul(segment_blocks)?.checked_add(index)
    }
}

/// A number from 1 to 4294967295 without leading zeroes: OIDs, file numbers and segment numbers alike.
fn oid(text: &str) -> Option<u32> {
    let canonical = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    if canonical { text.parse().ok() } else { None }
}

/// `PG_15_202209061`: the directory of one major version in a tablespace.
fn is_version_directory(name: &str) -> bool {
    name.strip_prefix("PG_")
        .and_then(|rest| rest.split_once('_'))
        .is_some_and(|(major, catalog)| oid(major).is_some() && oid(catalog).is_some())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn main(tablespace: u32, database: u32, relfilenode: u32) -> RelationFile {
        RelationFile { tablespace, database, relfilenode, fork: Fork::Main, segment: 0, is_temporary: false }
    }

    #[test]
    fn relation_files_are_recognised() {
        let expected = [
            ("base/5/16384", main(1663, 5, 16384)),
            ("base/5/16384.2", RelationFile { segment: 2, ..main(1663, 5, 16384) }),
            ("base/5/16384_fsm", RelationFile { fork: Fork::FreeSpaceMap, ..main(1663, 5, 16384) }),
            ("base/5/16384_vm.1", RelationFile { fork: Fork::VisibilityMap, segment: 1, ..main(1663, 5, 16384) }),
            ("base/5/16384_init", RelationFile { fork: Fork::Init, ..main(1663, 5, 16384) }),
            ("global/1262", main(1664, 0, 1262)),
            ("pg_tblspc/16400/PG_15_202209061/5/16384.1", RelationFile { segment: 1, ..main(16400, 5, 16384) }),
            ("base/5/t3_16384", RelationFile { is_temporary: true, ..main(1663, 5, 16384) }),
            ("base/5/t0_16384_fsm", RelationFile { is_temporary: true, fork: Fork::FreeSpaceMap, ..main(1663, 5, 16384) }),
            ("base/4294967295/4294967295", main(1663, u32::MAX, u32::MAX)),
        ];
        for (path, file) in expected {
            assert_eq!(RelationFile::parse(path), Some(file), "{path}");
        }
    }

    /// T14: these were taken for relations, and their bytes for corrupt pages.
    #[test]
    fn t14_other_files_are_not_relations() {
        for path in [
            "",
            "PG_VERSION",
            "16384",
            "base/5/PG_VERSION",
            "base/5/pg_internal.init",
            "base/5/pg_internal.init.123",
            "base/5/pg_filenode.map",
            "global/pg_control",
            "global/pg_filenode.map",
            "global/pg_internal.init.123",
            "global/config_exec_params",
            "base/pgsql_tmp/pgsql_tmp123.0",
            "base/5/16384.",
            "base/5/16384.0",
            "base/5/16384.01",
            "base/5/16384.1.1",
            "base/5/16384.1_fsm",
            "base/5/16384_",
            "base/5/16384_fsm_vm",
            "base/5/_fsm",
            "base/5/016384",
            "base/5/4294967296",
            "base/5/+1",
            "base/5/t_1",
            "base/5/tx_1",
            "base/5/t3_",
            "base/x/1",
            "base/0/1",
            "base/5/6/1",
            "base//1",
            "global/5/1",
            "/base/5/1",
            "base/5/",
            "pg_xact/0000",
            "pg_multixact/members/0000",
            "pg_wal/000000010000000000000001",
            "pg_tblspc/16400/5/16384",
            "pg_tblspc/16400/PG_15/5/16384",
            "pg_tblspc/16400/PG_15_x/5/16384",
            "pg_tblspc/16400/PG_15_202209061/pgsql_tmp/1",
            "pg_tblspc/x/PG_15_202209061/5/16384",
        ] {
            assert_eq!(RelationFile::parse(path), None, "{path}");
        }
    }

    /// T14: pages of later files continue the count.
    #[test]
    fn t14_block_numbers_continue_over_segments() {
        let file = RelationFile::parse("base/5/16384.2").unwrap();
        assert_eq!(file.block_number(5, 131_072), Some(262_149));
        let last = RelationFile::parse("base/5/16384.32768").unwrap();
        assert_eq!(last.block_number(0, 131_072), None);
    }

    proptest! {
        #[test]
        fn any_path_never_panics(path in "(base|global|pg_tblspc)?[/0-9a-z_.]{0,40}") {
            let _ = RelationFile::parse(&path);
        }
    }
}
