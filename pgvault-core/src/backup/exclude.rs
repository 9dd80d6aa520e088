//! What of a data directory does not belong in a backup.
//!
//! Source: "Making a Base Backup Using the Low Level API" in the PostgreSQL documentation, and `excludeFiles` and
//! `excludeDirContents` in `src/backend/backup/basebackup.c`.

use std::collections::BTreeSet;

use crate::postgres::{Fork, RelationFile};

/// Directories that are kept, empty.
const EMPTY_DIRECTORIES: [&str; 8] =
    ["pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans", "pg_wal"];

/// Files at the top that belong to the running server, to another backup, or to an earlier recovery.
const TOP_FILES: [&str; 12] = [
    "backup_label",
    "backup_label.old",
    "backup_manifest",
    "current_logfiles",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
    "tablespace_map.old",
];

/// True when the contents of the directory at `path` are left out.
pub(super) fn is_emptied(path: &str) -> bool {
    EMPTY_DIRECTORIES.contains(&path) || path.starts_with("pg_wal/")
}

/// True when the file or directory at `path` is left out.
pub(super) fn is_excluded(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    TOP_FILES.contains(&path)
        || path.starts_with("pgvault.restore-")
        || name.starts_with("pgsql_tmp")
        // The file may carry the writer's process number behind its name (T14).
        || name == "pg_internal.init"
        || name.starts_with("pg_internal.init.")
        || RelationFile::parse(path).is_some_and(|relation| relation.is_temporary)
}

/// Relations of one directory that have an init fork: unlogged ones, whose other forks are reset after a crash anyway.
pub(super) fn unlogged<'a>(paths: impl Iterator<Item = &'a str>) -> BTreeSet<u32> {
    paths.filter_map(RelationFile::parse).filter(|r| r.fork == Fork::Init).map(|r| r.relfilenode).collect()
}

/// True when the file is a fork of an unlogged relation that a backup leaves out (T26).
pub(super) fn is_unlogged_fork(path: &str, unlogged: &BTreeSet<u32>) -> bool {
    RelationFile::parse(path).is_some_and(|r| r.fork != Fork::Init && unlogged.contains(&r.relfilenode))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T26: unlogged relations keep their init fork only, temporary ones are left out.
    #[test]
    fn t26_unlogged_and_temporary_relations_are_left_out_but_init_forks_kept() {
        let files = ["base/5/16384", "base/5/16384.1", "base/5/16384_fsm", "base/5/16384_init", "base/5/16390", "base/5/t3_16400"];
        let unlogged = unlogged(files.into_iter());
        let kept: Vec<_> = files.into_iter().filter(|f| !is_excluded(f) && !is_unlogged_fork(f, &unlogged)).collect();
        assert_eq!(kept, ["base/5/16384_init", "base/5/16390"]);
    }

    #[test]
    fn the_servers_own_files_are_left_out() {
        for path in [
            "postmaster.pid",
            "backup_label",
            "base/pgsql_tmp/pgsql_tmp12.0",
            "base/5/pg_internal.init",
            "global/pg_internal.init.77",
        ] {
            assert!(is_excluded(path), "{path}");
        }
        for path in ["PG_VERSION", "base/5/pg_filenode.map", "my_backup_label", "sub/postmaster.pid", "global/pg_control"] {
            assert!(!is_excluded(path), "{path}");
        }
        assert!(is_emptied("pg_wal") && is_emptied("pg_wal/archive_status") && !is_emptied("base"));
    }
}
