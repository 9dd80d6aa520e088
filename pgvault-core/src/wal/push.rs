//! `archive_command`: one finished file into the vault.

use std::path::Path;

use super::object;
use crate::postgres::WalFileName;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// What became of a pushed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the vault because of this call.
    Stored,
    /// It was there already, with the same contents.
    AlreadyThere,
}

/// Puts the file at `path` into the vault; returns only when it is durable there.
///
/// # Errors
/// [`ErrorKind::Conflict`] when it belongs to another cluster or differs from what is stored under its name;
/// [`ErrorKind::Usage`] when its name is not one that PostgreSQL archives.
pub async fn push(cluster: &Cluster, path: &Path) -> Result<Pushed> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let file: WalFileName =
        name.parse().map_err(|e: crate::postgres::ParseError| Error::new(ErrorKind::Usage, "wal.name", e.to_string()))?;
    let raw = tokio::fs::read(path).await.map_err(|e| Error::io("read", path, e))?;
    let (owner, raw) = (cluster.clone(), std::sync::Arc::new(raw));
    let contents = raw.clone();
    let sealed = tokio::task::spawn_blocking(move || object::seal_file(&owner, file, &contents))
        .await
        .map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
    let mut stored = false;
    let mut chunks =
        raw.chunks(if sealed.len() > 1 { usize::try_from(object::MAX_RAW).unwrap_or(usize::MAX) } else { raw.len().max(1) });
    for sealed in &sealed {
        stored |= object::put(cluster, sealed, chunks.next().unwrap_or(&[])).await?;
    }
    Ok(if stored { Pushed::Stored } else { Pushed::AlreadyThere })
}
