//! The operating system account that a server runs as.

use std::fs;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::{Error, Result, io_error};

/// Who runs the server and owns its files.
///
/// PostgreSQL refuses to run as root, so root hands its servers to an unprivileged account. Anybody else runs them as
/// themselves and needs no change of identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    name: String,
    uid: u32,
    gid: u32,
    /// True when this process has to become the account first.
    switch: bool,
}

impl Account {
    /// The account for new servers: this process's own, or for root `postgres`, else `nobody`.
    ///
    /// # Errors
    ///
    /// For root on a system that has neither account.
    pub fn unprivileged() -> Result<Self> {
        let uid = rustix::process::geteuid().as_raw();
        if uid != 0 {
            return Ok(Self { name: name_of(uid), uid, gid: rustix::process::getegid().as_raw(), switch: false });
        }
        ["postgres", "nobody"].into_iter().find_map(Self::named).ok_or_else(|| {
            Error::Account(
                "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it as".to_owned(),
            )
        })
    }

    /// The account that has to run a server on this data directory: PostgreSQL insists on being its owner.
    ///
    /// A directory of root has no such account; it gets the [unprivileged](Self::unprivileged) one, which has to be made
    /// its owner first ([`own`](Self::own)).
    ///
    /// # Errors
    ///
    /// When the directory belongs to somebody that this process cannot become.
    pub fn owner_of(pgdata: &Path) -> Result<Self> {
        let meta = fs::metadata(pgdata).map_err(io_error("read the owner of", pgdata))?;
        let own = Self::unprivileged()?;
        if meta.uid() == own.uid || (own.switch && meta.uid() == 0) {
            return Ok(own);
        }
        if !own.switch {
            return Err(Error::Account(format!(
                "{} belongs to {}: a server on it must be started by its owner or by root, not by {}",
                pgdata.display(),
                name_of(meta.uid()),
                own.name
            )));
        }
        Ok(Self { name: name_of(meta.uid()), uid: meta.uid(), gid: meta.gid(), switch: true })
    }

    fn named(name: &str) -> Option<Self> {
        let (uid, gid) = accounts().find(|(found, ..)| found == name).map(|(_, uid, gid)| (uid, gid))?;
        Some(Self { name: name.to_owned(), uid, gid, switch: true })
    }

    /// Its name, or its number when it has none.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its user id.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Its primary group id.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Makes `command` run as this account. Supplementary groups are dropped with the identity.
    pub fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if self.switch {
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Gives a file or a whole folder to this account, where this process may.
    ///
    /// Symbolic links are given away themselves, never what they point to: a link may lead into a production cluster.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or changed.
    pub fn own(&self, path: &Path) -> Result<()> {
        if !self.switch {
            return Ok(());
        }
        lchown(path, Some(self.uid), Some(self.gid)).map_err(io_error("change the owner of", path))?;
        if fs::symlink_metadata(path).map_err(io_error("read", path))?.is_dir() {
            for entry in fs::read_dir(path).map_err(io_error("list", path))? {
                self.own(&entry.map_err(io_error("list", path))?.path())?;
            }
        }
        Ok(())
    }

    /// Fails when this account cannot enter a folder above `path`: the server's own message would be
    /// "could not access directory: Permission denied", without saying which.
    ///
    /// # Errors
    ///
    /// Names the folder.
    pub fn check_can_reach(&self, path: &Path) -> Result<()> {
        if !self.switch {
            return Ok(());
        }
        let path = std::path::absolute(path).map_err(io_error("resolve", path))?;
        for folder in path.ancestors().skip(1) {
            let meta = fs::metadata(folder).map_err(io_error("read the permissions of", folder))?;
            let bit = if meta.uid() == self.uid {
                0o100
            } else if meta.gid() == self.gid {
                0o010
            } else {
                0o001
            };
            if meta.mode() & bit == 0 {
                return Err(Error::Account(format!(
                    "the account {} that runs PostgreSQL cannot enter {}, which is above {}; use another folder, or allow it with `chmod o+x {}`",
                    self.name,
                    folder.display(),
                    path.display(),
                    folder.display()
                )));
            }
        }
        Ok(())
    }
}

fn name_of(uid: u32) -> String {
    accounts().find(|(_, found, _)| *found == uid).map_or_else(|| uid.to_string(), |(name, ..)| name)
}

/// Local accounts. Those of a directory service are not needed: `postgres` and `nobody` are local everywhere, and any
/// other account is found by the owner of its files.
fn accounts() -> impl Iterator<Item = (String, u32, u32)> {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            Some((name, fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .collect();
    found.into_iter()
}
