//! Keeps others from starting a copy before it is harmless.
//!
//! A copy that was promoted and not neutralised yet is production's twin: it mails customers as soon as anybody starts Odoo on it. So its
//! `postgresql.auto.conf` gets settings that give a server no way to be reached; a server without one refuses to start. Ours has its
//! socket from the command line, which wins. A process that is killed leaves the copy sealed.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::Path;

use pgvault_core::{Error, Result};

/// What is appended, and taken away again. The file is read last and its last line counts.
const SEAL: &str = "# pgvault: this copy is not harmless yet; without an address no server starts\n\
                    listen_addresses = ''\nunix_socket_directories = ''\n";

const FILE: &str = "postgresql.auto.conf";

/// Seals a directory that no server of others runs on; once more does nothing.
///
/// # Errors
/// When its configuration cannot be changed.
pub fn seal(pgdata: &Path) -> Result<()> {
    let path = pgdata.join(FILE);
    let mut text = read(&path)?;
    if !ends_with_seal(&text) {
        if text.last().is_some_and(|last| *last != b'\n') {
            text.push(b'\n');
        }
        text.extend_from_slice(SEAL.as_bytes());
        replace(&path, &text)?;
    }
    Ok(())
}

/// True for a directory that was sealed.
///
/// # Errors
/// When its configuration cannot be read.
pub fn is_sealed(pgdata: &Path) -> Result<bool> {
    Ok(ends_with_seal(&read(&pgdata.join(FILE))?))
}

/// Breaks the seal.
///
/// # Errors
/// When the configuration cannot be changed.
pub(super) fn unseal(pgdata: &Path) -> Result<()> {
    let path = pgdata.join(FILE);
    let text = read(&path)?;
    match text.strip_suffix(SEAL.as_bytes()) {
        Some(before) => replace(&path, before),
        None => Ok(()),
    }
}

fn ends_with_seal(text: &[u8]) -> bool {
    text.ends_with(SEAL.as_bytes())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|e| Error::io("read", path, e)),
    }
}

/// Whole or not at all, and durable: what comes next relies on it.
fn replace(path: &Path, text: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    let new = path.with_extension("conf.pgvault");
    let write = || {
        let owner = fs::metadata(folder)?;
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        if rustix::process::geteuid().is_root() {
            chown(&new, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|e| Error::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        for before in ["", "port = 5433\n", "port = 5433"] {
            fs::write(&path, before).unwrap();
            seal(folder.path()).unwrap();
            seal(folder.path()).unwrap();
            assert!(is_sealed(folder.path()).unwrap());
            unseal(folder.path()).unwrap();
            unseal(folder.path()).unwrap();
            assert!(!is_sealed(folder.path()).unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap().trim_end(), before.trim_end());
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
