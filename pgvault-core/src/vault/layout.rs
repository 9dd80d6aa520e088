//! Names of objects. They carry no content, sort by time or position, and are never used twice.

use std::fmt;

use sha2::{Digest, Sha256};
use ulid::Ulid;

use crate::postgres::{SystemId, TimelineId};
use crate::store::Class;
use crate::{Error, ErrorKind, Result};

/// The vault's own document.
pub const VAULT_DOCUMENT: &str = "vault.json";
/// Prefix of all clusters.
pub const CLUSTERS: &str = "c/";

/// Names relative to a cluster's prefix, each with a trailing slash.
pub mod dir {
    /// Key slots.
    pub const KEYS: &str = "keys/";
    /// Data key epochs.
    pub const EPOCHS: &str = "epochs/";
    /// Packs of data frames and of maps.
    pub const PACK: &str = "pack/";
    /// Manifests: the commit points.
    pub const SNAP: &str = "snap/";
    /// WAL, one folder per timeline.
    pub const WAL: &str = "wal/";
    /// Writers' intents.
    pub const SESSION: &str = "session/";
    /// Who did what.
    pub const AUDIT: &str = "audit/";
    /// Receipts of restore drills.
    pub const DRILL: &str = "drill/";
    /// What a first pass of garbage collection found.
    pub const GC: &str = "gc/";
    /// Legal holds, and their removals.
    pub const HOLD: &str = "hold/";
    /// Named restore points.
    pub const MARK: &str = "mark/";
    /// Small configuration files.
    pub const ARTIFACT: &str = "artifact/";
    /// Packs of contents and catalogs of filestores. Not among the others: an older program would take them for garbage.
    pub const FILES: &str = "files/pack/";
    /// Capture passes over filestores, one folder for each.
    pub const PASS: &str = "files/pass/";
}

/// One PostgreSQL cluster: the name from the configuration and the identity from `initdb`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName {
    /// The configured name.
    pub name: String,
    /// The system identifier.
    pub system_id: SystemId,
}

impl ClusterName {
    /// A cluster name.
    ///
    /// # Errors
    /// When `name` is not 1 to 64 characters of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    pub fn new(name: &str, system_id: SystemId) -> Result<Self> {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || name.is_empty() || name.len() > 64 || !name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) {
            return Err(Error::new(ErrorKind::Usage, "cluster.name", format!("`{name}` cannot name a cluster"))
                .with_hint("use 1 to 64 letters, digits, dots, underscores or dashes, and start with a letter or digit"));
        }
        Ok(Self { name: name.into(), system_id })
    }

    /// Reads the directory name that [`ClusterName::prefix`] makes.
    pub fn parse(directory: &str) -> Option<Self> {
        let (name, system_id) = directory.rsplit_once('-')?;
        Self::new(name, system_id.parse().ok()?).ok()
    }

    /// The prefix of everything the cluster owns.
    pub fn prefix(&self) -> String {
        format!("{CLUSTERS}{self}/")
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.name, self.system_id)
    }
}

/// The cluster's own document, relative to the cluster.
pub const CLUSTER_DOCUMENT: &str = "cluster.json";

/// True for the name, relative to a cluster, of a clear document; everything else there is sealed.
pub fn is_clear(relative: &str) -> bool {
    relative == CLUSTER_DOCUMENT || relative.starts_with(dir::KEYS) || relative.starts_with(dir::EPOCHS)
}

/// What an object is for, by its full name.
pub fn class_of(name: &str) -> Class {
    let Some((_, relative)) = name.strip_prefix(CLUSTERS).and_then(|rest| rest.split_once('/')) else {
        return if name == VAULT_DOCUMENT { Class::Meta } else { Class::Transient };
    };
    match relative.split_inclusive('/').next() {
        Some(dir::PACK) => Class::Data,
        Some(_) if relative.starts_with(dir::FILES) => Class::Data,
        Some(dir::WAL) => Class::Wal,
        // A session's end is its deadline. Who deletes one early gains nothing before garbage is collected, days later.
        // A plan deletes nothing by itself.
        Some(dir::SESSION | dir::GC) => Class::Transient,
        _ => Class::Meta,
    }
}

/// The cluster's own document: the commit point of its creation.
pub fn cluster_document(cluster: &ClusterName) -> String {
    format!("{}{CLUSTER_DOCUMENT}", cluster.prefix())
}

/// Prefix of a cluster's key slots.
pub fn keys(cluster: &ClusterName) -> String {
    format!("{}{}", cluster.prefix(), dir::KEYS)
}

/// A key slot.
pub fn key_slot(cluster: &ClusterName, id: Ulid) -> String {
    format!("{}{id}.json", keys(cluster))
}

/// Prefix of a cluster's data key epochs.
pub fn epochs(cluster: &ClusterName) -> String {
    format!("{}{}", cluster.prefix(), dir::EPOCHS)
}

/// A data key epoch.
pub fn epoch(cluster: &ClusterName, id: Ulid) -> String {
    format!("{}{id}.json", epochs(cluster))
}

/// A pack, relative to the cluster. The shard spreads requests over 256 prefixes.
pub fn pack(id: Ulid) -> String {
    let shard = Sha256::digest(id.to_string()).first().copied().unwrap_or(0);
    format!("{}{shard:02x}/{id}.pack", dir::PACK)
}

/// A pack of a filestore, relative to the cluster.
pub fn files_pack(id: Ulid) -> String {
    let shard = Sha256::digest(id.to_string()).first().copied().unwrap_or(0);
    format!("{}{shard:02x}/{id}.pack", dir::FILES)
}

/// The folder of packs of filestores whose names' hash begins with `shard`, relative to the cluster.
pub fn files_shard(shard: u8) -> String {
    format!("{}{shard:02x}/", dir::FILES)
}

/// The folder of the capture passes over one filestore, relative to the cluster.
pub fn passes(instance: &str) -> String {
    format!("{}{instance}/", dir::PASS)
}

/// A capture pass of a session, relative to the cluster.
pub fn pass(instance: &str, id: Ulid, session: Ulid) -> String {
    format!("{}{id}.{session}", passes(instance))
}

/// A snapshot's manifest, relative to the cluster.
pub fn snapshot(id: Ulid) -> String {
    format!("{}{id}.snap", dir::SNAP)
}

/// A session, relative to the cluster; `what` is what can be known of it without reading it.
pub fn session(id: Ulid, what: &str) -> String {
    format!("{}{id}.{what}", dir::SESSION)
}

/// An audit record of an event, relative to the cluster.
pub fn audit(id: Ulid, event: &str) -> String {
    format!("{}{id}.{event}", dir::AUDIT)
}

/// The receipt of a restore drill that ended with `outcome`, relative to the cluster.
pub fn drill(id: Ulid, outcome: &str, backup: Option<Ulid>) -> String {
    match backup {
        Some(backup) => format!("{}{id}.{outcome}.{backup}", dir::DRILL),
        None => format!("{}{id}.{outcome}", dir::DRILL),
    }
}

/// What follows the id in the name of a record: the event of an audit record, what a session is for.
pub fn what_of(name: &str) -> Option<&str> {
    name.rsplit('/').next()?.split_once('.').map(|(_, event)| event)
}

/// A plan of garbage collection, relative to the cluster.
pub fn gc_plan(id: Ulid) -> String {
    format!("{}{id}.plan", dir::GC)
}

/// A hold, or the removal of one, relative to the cluster.
pub fn hold(id: Ulid) -> String {
    format!("{}{id}", dir::HOLD)
}

/// The record of a named restore point, relative to the cluster.
pub fn mark(id: Ulid) -> String {
    format!("{}{id}.mark", dir::MARK)
}

/// A version of a small configuration file, relative to the cluster.
pub fn artifact(id: Ulid) -> String {
    format!("{}{id}", dir::ARTIFACT)
}

/// The folder of packs whose names' hash begins with `shard`, relative to the cluster.
pub fn pack_shard(shard: u8) -> String {
    format!("{}{shard:02x}/", dir::PACK)
}

/// The folder of a timeline's WAL, relative to the cluster.
pub fn wal_timeline(timeline: TimelineId) -> String {
    format!("{}{}/", dir::WAL, timeline.hex())
}

/// Reads the ULID out of an object's file name, whatever its extension.
pub fn id_of(name: &str) -> Option<Ulid> {
    let file = name.rsplit('/').next()?;
    Ulid::from_string(file.split('.').next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H17: names are compared as a whole, never by looking for a substring in a key.
    #[test]
    fn h17_hostile_cluster_names_round_trip_or_are_refused() {
        for name in ["main", "x.tmp.y", "a-b-1", "1", "A_b.c-"] {
            let cluster = ClusterName::new(name, SystemId(7)).unwrap();
            assert_eq!(ClusterName::parse(&cluster.to_string()), Some(cluster));
        }
        for name in ["", "a/b", "..", ".x", "é", "a b", "a%", &"x".repeat(65)] {
            assert!(ClusterName::new(name, SystemId(7)).is_err(), "{name}");
        }
    }

    /// What history depends on is locked where locks are asked for, and nothing else.
    #[test]
    fn every_kind_of_object_has_a_class() {
        let cluster = ClusterName::new("a.b", SystemId(7)).unwrap();
        let class = |relative: String| class_of(&format!("{}{relative}", cluster.prefix()));
        assert_eq!(class(pack(Ulid(1))), Class::Data);
        assert_eq!(class(format!("{}x.wal", wal_timeline(TimelineId(1)))), Class::Wal);
        assert_eq!(class(snapshot(Ulid(1))), Class::Meta);
        assert_eq!((class(files_pack(Ulid(1))), class(pass("00", Ulid(1), Ulid(2)))), (Class::Data, Class::Meta));
        assert_eq!(class(audit(Ulid(1), "restored")), Class::Meta);
        assert_eq!((class(mark(Ulid(1))), class(artifact(Ulid(1)))), (Class::Meta, Class::Meta));
        assert_eq!(class(CLUSTER_DOCUMENT.into()), Class::Meta);
        assert_eq!((class_of(&key_slot(&cluster, Ulid(1))), class_of(&epoch(&cluster, Ulid(1)))), (Class::Meta, Class::Meta));
        assert_eq!(class(session(Ulid(1), "witness")), Class::Transient);
        assert_eq!((class_of(VAULT_DOCUMENT), class_of("probe/x")), (Class::Meta, Class::Transient));
    }

    #[test]
    fn packs_spread_over_shards() {
        let shards: std::collections::BTreeSet<String> =
            (0..2000u128).map(|n| pack(Ulid(n)).split('/').nth(1).unwrap().to_owned()).collect();
        assert!(shards.len() > 250, "{}", shards.len());
    }
}
