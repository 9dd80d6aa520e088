//! `file://`: a directory. Every write is fsynced before it is acknowledged.

use std::sync::Arc;

use object_store::local::LocalFileSystem;

use super::{Backend, wrong};
use crate::{Error, Result};

pub(in crate::store) fn open(url: &url::Url) -> Result<Backend> {
    let path = url.to_file_path().map_err(|()| wrong(format!("vault.url `{url}` is not the address of a local directory")))?;
    if !path.is_dir() {
        std::fs::create_dir(&path).map_err(|e| Error::io("create the vault directory", &path, e))?;
    }
    let local = LocalFileSystem::new_with_prefix(&path).map_err(|e| wrong(format!("open {}: {e}", path.display())))?;
    Ok(Backend { inner: Arc::new(local.with_fsync(true)), guard: None, directory: Some(path), one_wins_by_contract: true })
}
