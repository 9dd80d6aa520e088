//! The documents that belong to a restored database.

use std::path::Path;

use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::side::{OdooDatabase, Side};
use serde::Serialize;

/// What is to be fetched.
#[derive(Debug, Clone, Copy)]
pub(super) struct FilesWish<'a> {
    /// Where they are fetched from.
    pub(super) cluster: &'a Cluster,
    /// The database at the moment that is restored; it says what it refers to.
    pub(super) side: &'a Side,
    /// Whose documents.
    pub(super) databases: &'a [OdooDatabase],
    /// Where they go.
    pub(super) target: &'a Path,
    /// Missing ones are listed, and no error.
    pub(super) allow_missing: bool,
}

/// What was fetched.
#[derive(Debug, Default, Serialize)]
pub(super) struct FilesOutcome {
    /// Files that the databases refer to.
    pub(super) referenced: u64,
    /// Files that were written.
    pub(super) written: u64,
    /// Bytes of them.
    pub(super) bytes: u64,
    /// Files that are referred to and could not be had.
    pub(super) missing: u64,
}

/// Fetches the documents that the databases refer to. A database without any needs no vault of documents.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when there is one to fetch.
pub(super) async fn fetch(wish: FilesWish<'_>) -> Result<FilesOutcome> {
    for database in wish.databases {
        let mut references = wish.side.references(&database.name).await?;
        let census = references.census().await?;
        references.close().await;
        // What lies in an object store of Odoo's own is not the filestore's.
        if census.iter().any(|place| matches!(place.place.as_str(), "local" | "other") && place.rows > 0) {
            let why = format!(
                "the documents of `{}` cannot be fetched from {} to {}: not in this build yet",
                database.name,
                wish.cluster.name(),
                wish.target.display()
            );
            tracing::debug!(allow_missing = wish.allow_missing, "documents were asked for");
            return Err(Error::new(ErrorKind::Unsupported, "restore.no_filestore", why));
        }
    }
    Ok(FilesOutcome::default())
}
