//! The files of the backup are on the disk, each as long as it should be, and no others.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pgvault_core::Result;
use pgvault_core::format::file_table::Node;
use pgvault_core::vault::snapshot::OpenSnapshot;
use serde_json::json;

use super::{Found, listed};

/// What a restore writes besides the backup.
const OWN: [&str; 4] = ["backup_label", "recovery.signal", "tablespace_map", "postgresql.auto.conf"];

/// Compares what was written with the backup's file table.
///
/// # Errors
/// When the table cannot be read.
pub(crate) async fn base_files(snapshot: &OpenSnapshot, pgdata: &Path) -> Result<Found> {
    let mut wrong = Vec::new();
    let mut known: BTreeSet<PathBuf> = OWN.iter().map(PathBuf::from).collect();
    let (mut files, mut bytes) = (0_u64, 0_u64);
    let mut table = snapshot.files();
    while let Some(entries) = table.next_chunk().await? {
        for entry in entries {
            let path = pgdata.join(&entry.path);
            if let Node::File { len, .. } = entry.node {
                files += 1;
                bytes += len;
                // The settings of recovery are appended to this one.
                let grows = entry.path == "postgresql.auto.conf";
                match fs::metadata(&path) {
                    Ok(meta) if meta.len() == len || (grows && meta.len() >= len) => {}
                    Ok(meta) => wrong.push(format!("{} has {} bytes instead of {len}", entry.path, meta.len())),
                    Err(error) => wrong.push(format!("{}: {error}", entry.path)),
                }
            }
            let _ = known.insert(PathBuf::from(entry.path));
        }
    }
    let mut strangers = Vec::new();
    find_strangers(pgdata, Path::new(""), &known, &mut strangers);
    wrong.extend(strangers.into_iter().map(|path| format!("{} is not in the backup", path.display())));
    let evidence = json!({ "files": files, "bytes": bytes, "wrong": listed(&wrong) });
    Ok(if wrong.is_empty() {
        Found::passed(format!("all {files} files of the backup are there, each of its length, and no others"), evidence)
    } else {
        Found::failed(
            format!("{} files are not as the backup has them: {}", wrong.len(), wrong.first().cloned().unwrap_or_default()),
            evidence,
        )
    })
}

/// Files that nobody knows. Links are not followed: what is behind them is looked at by its own path.
fn find_strangers(root: &Path, below: &Path, known: &BTreeSet<PathBuf>, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(root.join(below)) else { return };
    for entry in entries.flatten() {
        let path = below.join(entry.file_name());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => find_strangers(root, &path, known, found),
            Ok(kind) if kind.is_file() && !known.contains(&path) => found.push(path),
            _ => {}
        }
    }
}
