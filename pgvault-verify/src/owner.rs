//! Who owns the files of a copy.

use std::fs;
use std::os::unix::fs::lchown;
use std::path::Path;

use pgvault_core::{Error, Result};

/// User and group that own the files of a copy.
pub(crate) type Owner = (u32, u32);

/// Gives a file, or a folder with everything in it, to the account that runs the server. Links are given away themselves.
///
/// # Errors
/// When a file cannot be changed.
pub(crate) fn own(path: &Path, owner: Owner) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    lchown(path, Some(owner.0), Some(owner.1)).map_err(|e| Error::io("change the owner of", path, e))?;
    if fs::symlink_metadata(path).map_err(|e| Error::io("read", path, e))?.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| Error::io("list", path, e))? {
            own(&entry.map_err(|e| Error::io("list", path, e))?.path(), owner)?;
        }
    }
    Ok(())
}
