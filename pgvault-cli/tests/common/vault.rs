//! Where the vaults of a test are, on whatever store the run is for, and what a test does to them behind pgvault's back.
//!
//! `PGVAULT_TEST_STORE` names the store (`local` without it); see `pgvault-teststores`. pgvault reaches a server through a gate of the test's
//! own, so that the store can go away, or refuse what is written, for this test alone.

#![allow(dead_code, unreachable_pub, clippy::print_stderr, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgvault_teststores::gate::Pass;
use pgvault_teststores::{Gate, Kind, Place, Server};

/// The name of the vault that every test has.
pub const VAULT: &str = "vault";

/// The vaults of one test: places by name, side by side.
#[derive(Debug)]
pub struct Vaults {
    first: Place,
    gate: Option<Gate>,
}

impl Vaults {
    /// On the store of this run; in `folder` when that is a directory.
    pub fn new(folder: &Path) -> Self {
        let kind = Kind::of_this_run().expect("PGVAULT_TEST_STORE");
        if kind == Kind::Local {
            return Self::in_directory(folder);
        }
        let server = Server::shared(kind).unwrap_or_else(|error| panic!("a server for the vaults: {error:#}"));
        let first = server.place().unwrap_or_else(|error| panic!("a place in {kind}: {error:#}"));
        let gate = Gate::open(first.endpoint().expect("an endpoint")).expect("a gate");
        Self { first, gate: Some(gate) }
    }

    /// In a directory, whatever the run is for: where the test is about what only a directory has.
    pub fn in_directory(folder: &Path) -> Self {
        Self { first: Place::directory(&folder.join(VAULT)), gate: None }
    }

    /// The directory of a vault; nothing for one in a server.
    pub fn directory(&self, name: &str) -> Option<PathBuf> {
        self.place(name).path()
    }

    /// A vault, as the test itself reaches it.
    pub fn place(&self, name: &str) -> Place {
        if name == VAULT { self.first.clone() } else { self.first.sibling(name) }
    }

    /// A configuration; `more` belongs to `[vault]`, `after` are other tables.
    pub fn config(&self, name: &str, more: &str, after: &str) -> String {
        let place = self.place(name);
        let place = match &self.gate {
            Some(gate) => place.through(gate).expect("a place behind the gate"),
            None => place,
        };
        place.config(more, after).expect("a configuration")
    }

    /// Takes the store away, or brings it back.
    pub fn set_away(&self, away: bool) {
        if let Some(gate) = &self.gate {
            return gate.set(if away { Pass::None } else { Pass::All });
        }
        let here = self.directory(VAULT).expect("a directory");
        let there = here.with_file_name("vault-away");
        let (from, to) = if away { (here, there) } else { (there, here) };
        fs::rename(from, to).expect("move the vault");
    }

    /// Takes the vault's WAL away from writers, or gives it back; it can be read all the time.
    pub fn refuse_wal(&self, refuse: bool) {
        if let Some(gate) = &self.gate {
            return gate.set(if refuse { Pass::NoWritesOf("/wal/".to_owned()) } else { Pass::All });
        }
        let root = self.directory(VAULT).expect("a directory");
        let parent = |name: &String| root.join(name).parent().map(Path::to_path_buf);
        let folders: BTreeSet<PathBuf> = self.names().iter().filter(|name| name.contains("/wal/")).filter_map(parent).collect();
        assert!(!folders.is_empty(), "there is no WAL yet");
        for folder in folders {
            fs::set_permissions(folder, fs::Permissions::from_mode(if refuse { 0o500 } else { 0o700 })).expect("set permissions");
        }
    }

    /// The names of all objects, sorted.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        self.first.names().unwrap_or_else(|error| panic!("list the vault: {error:#}"))
    }

    /// The one object whose name ends like this.
    #[track_caller]
    pub fn object(&self, end: &str) -> String {
        self.first.find(end).unwrap_or_else(|error| panic!("{error:#}"))
    }

    #[track_caller]
    pub fn read(&self, name: &str) -> Bytes {
        self.first.read(name).unwrap_or_else(|error| panic!("read {name}: {error:#}"))
    }

    /// Overwrites an object, as only somebody with more rights than pgvault could.
    #[track_caller]
    pub fn replace(&self, name: &str, bytes: impl Into<Bytes>) {
        self.first.replace(name, bytes).unwrap_or_else(|error| panic!("replace {name}: {error:#}"));
    }

    /// Changes a bit of a byte.
    #[track_caller]
    pub fn flip(&self, name: &str, at: usize) {
        let mut bytes = self.read(name).to_vec();
        bytes[at] ^= 0x10;
        self.replace(name, bytes);
    }

    /// Removes an object with everything beside it. Of a directory nothing is left, as of a prefix.
    #[track_caller]
    pub fn remove_folder_of(&self, name: &str) {
        let (folder, _) = name.rsplit_once('/').expect("an object in a folder");
        for name in self.names().iter().filter(|name| name.starts_with(&format!("{folder}/"))) {
            let _ = self.take(name);
        }
        if let Some(root) = self.directory(VAULT) {
            fs::remove_dir(root.join(folder)).expect("remove a folder");
        }
    }

    /// Removes an object and gives what it held, for [`Vaults::replace`] later on.
    #[track_caller]
    pub fn take(&self, name: &str) -> Bytes {
        let bytes = self.read(name);
        self.first.remove(name).unwrap_or_else(|error| panic!("remove {name}: {error:#}"));
        bytes
    }
}

impl Drop for Vaults {
    fn drop(&mut self) {
        // A directory goes with the test's folder; a server keeps everything in memory.
        if self.gate.is_some() && self.first.clear().is_err() {
            eprintln!("{} was not cleared", self.first.url());
        }
    }
}
