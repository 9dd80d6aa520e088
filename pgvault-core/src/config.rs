//! The one configuration file, and the environment variables that stand for its keys.
//!
//! Every key has a twin: `PGVAULT_` and the key's path in capitals, nested by two underscores
//! (`PGVAULT_CLUSTER__MAIN__WAL__SLOT`). A value of the environment wins over the file. Secrets can be given directly, by
//! `_FILE` or by `_COMMAND`; none is ever printed. Unknown keys are errors, so that a misspelt retention is not ignored.

mod drill;
mod kms;
mod load;
mod odoo;
mod secret;
mod store;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

pub use drill::{Asks, DrillCheck, DrillConfig, RunnerKind};
pub use kms::{KmsOptions, VaultAuth};
pub use load::{load, load_text};
pub use odoo::{Blackout, OdooConfig, OdooMode};
pub use secret::SecretSource;
pub use store::{AzureConfig, ByClass, GcsConfig, ImmutabilityConfig, Job, JobLimits, LimitsConfig, S3Config};

use crate::{Error, ErrorKind, Result};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where backups go.
    pub vault: VaultConfig,
    /// Other vaults that hold copies of it, by name.
    #[serde(default)]
    pub copies: BTreeMap<String, VaultConfig>,
    /// The clusters, by name.
    #[serde(default)]
    pub cluster: BTreeMap<String, ClusterConfig>,
}

/// `[vault]`, and `[copies.NAME]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultConfig {
    /// Address of the vault.
    pub url: String,
    /// The passphrase itself; better given by one of the next two.
    pub passphrase: Option<secrecy::SecretString>,
    /// File whose first line is the passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// Shell command that prints the passphrase.
    pub passphrase_command: Option<String>,
    /// File with age identities (`AGE-SECRET-KEY-1...`).
    pub identity_file: Option<PathBuf>,
    /// Shell command that prints age identities.
    pub identity_command: Option<String>,
    /// age recipients that `init` gives a key slot.
    #[serde(default)]
    pub recipients: Vec<String>,
    /// A key in a key service (`aws-kms:arn:...`); opens the vault when neither an identity nor a passphrase is configured.
    pub kms: Option<String>,
    /// How to reach it.
    #[serde(default)]
    pub kms_options: KmsOptions,
    /// Lets plain HTTP through: for a store on this machine.
    #[serde(default)]
    pub allow_http: bool,
    /// Certificates that are trusted besides the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// Address of a proxy; `HTTPS_PROXY` and `NO_PROXY` when not given.
    pub proxy: Option<String>,
    /// Locks on what history depends on; none when not given.
    pub immutability: Option<ImmutabilityConfig>,
    /// What may be taken from the store.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// Storage classes or access tiers.
    #[serde(default)]
    pub storage_class: ByClass<String>,
    /// Tags of objects.
    #[serde(default)]
    pub tags: ByClass<BTreeMap<String, String>>,
    /// What only S3 knows.
    #[serde(default)]
    pub s3: S3Config,
    /// What only Azure knows.
    #[serde(default)]
    pub azure: AzureConfig,
    /// What only Google knows.
    #[serde(default)]
    pub gcs: GcsConfig,
    /// Copies that a restore and `wal fetch` ask for what the vault does not give, in this order. Not for a copy itself.
    #[serde(default)]
    pub fallback: Vec<String>,
}

/// `[cluster.NAME]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// libpq keywords or URI; standard `PG*` variables fill what is missing.
    #[serde(default)]
    pub connection: String,
    /// The data directory, when it is on this machine: the local source is then the default.
    pub pgdata: Option<PathBuf>,
    /// zstd level of data; 1 is the measured default.
    #[serde(default = "default_level")]
    pub compression_level: i32,
    /// Threads for compression and encryption; as many as there are cores when not given.
    pub workers: Option<usize>,
    /// WAL settings.
    #[serde(default)]
    pub wal: WalConfig,
    /// Retention settings.
    #[serde(default)]
    pub retention: RetentionConfig,
    /// Restore drills.
    #[serde(default)]
    pub drill: DrillConfig,
    /// Odoo's filestores.
    #[serde(default)]
    pub odoo: OdooConfig,
}

fn default_level() -> i32 {
    1
}

/// `[cluster.NAME.wal]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WalConfig {
    /// The replication slot that `wal stream` creates and keeps.
    pub slot: String,
    /// Longest time that new WAL stays out of the vault while streaming; 100 ms to 1 h.
    #[serde(deserialize_with = "load::flush_interval")]
    pub flush_interval: Duration,
    /// Store new WAL at once, because commits wait for it: for a server that has this stream in `synchronous_standby_names`.
    pub synchronous: bool,
    /// Directory for WAL that the store does not take at the moment. It holds WAL in clear text, as `pg_wal` does.
    pub spool: Option<PathBuf>,
    /// Bytes that the spool may hold.
    #[serde(deserialize_with = "load::size")]
    pub spool_limit: u64,
    /// What is confirmed to the server as durable.
    pub durability: Durability,
    /// A server that says nothing for so long, though asked, is taken for lost and connected to again; as PostgreSQL's
    /// `wal_receiver_timeout`; at least 1 s.
    #[serde(deserialize_with = "load::receive_timeout")]
    pub receive_timeout: Duration,
    /// Files that one `wal push` stores at most: the one that PostgreSQL names, and others that wait. 0 and 1 for that one alone.
    pub push_batch: u32,
    /// Segments that are fetched ahead of a recovering server; 0 for none.
    pub prefetch: u32,
    /// Folder that they lie in until then, outside of every data directory; below the system's temporary one when not given.
    pub prefetch_dir: Option<PathBuf>,
}

impl Default for WalConfig {
    fn default() -> Self {
        Self {
            slot: "pgvault".into(),
            flush_interval: Duration::from_secs(1),
            synchronous: false,
            spool: None,
            spool_limit: 1 << 30,
            durability: Durability::Vault,
            receive_timeout: Duration::from_secs(60),
            push_batch: 0,
            prefetch: 8,
            prefetch_dir: None,
        }
    }
}

/// What is confirmed to the server as durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// What is in the vault.
    #[default]
    Vault,
    /// What is in the spool, too: commits do not wait for the store, and are lost with this machine's disk.
    Spool,
}

/// `[cluster.NAME.retention]`: what [`Policy`](crate::retention::Policy) is made of. Nothing expires without any.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// How far back every moment must stay restorable.
    #[serde(deserialize_with = "load::optional_duration")]
    pub window: Option<Duration>,
    /// Keep so many of the newest backups.
    pub keep_last: Option<u32>,
    /// Keep the newest backup of each of so many days that have one.
    pub daily: Option<u32>,
    /// The same of weeks, which begin on Monday.
    pub weekly: Option<u32>,
    /// The same of months.
    pub monthly: Option<u32>,
    /// The same of years.
    pub yearly: Option<u32>,
    /// Where days begin, as in `Europe/Berlin`; UTC when not given.
    pub time_zone: Option<String>,
    /// Never fewer backups without damaged pages than so many; 1 when not given.
    pub min_backups: Option<u32>,
    /// Which WAL is kept beside what makes each backup consistent.
    pub wal: KeepWal,
    /// How far back somebody needs every moment to be restorable; `doctor` compares the window with it.
    #[serde(deserialize_with = "load::optional_duration")]
    pub need: Option<Duration>,
}

/// Which WAL is kept beside what makes each backup consistent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeepWal {
    /// All from the start of the oldest kept backup on: every moment since can be restored.
    #[default]
    All,
    /// All that the window needs. Of older backups only the moment of the backup itself can be restored.
    Window,
}

impl Config {
    /// The copy called `name`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is none.
    pub fn copy(&self, name: &str) -> Result<&VaultConfig> {
        self.copies.get(name).ok_or_else(|| {
            let known = self.copies.keys().cloned().collect::<Vec<_>>().join(", ");
            Error::new(ErrorKind::Usage, "config.copy", format!("the configuration has no copy `{name}`"))
                .with_hint(if known.is_empty() { "add a section such as [copies.east]".into() } else { format!("it has: {known}") })
        })
    }

    /// Makes sure that names of copies lead somewhere.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when one does not.
    fn ensure_copies(&self) -> Result<()> {
        for name in &self.vault.fallback {
            let _ = self.copy(name).map_err(|e| e.context("vault.fallback"))?;
        }
        match self.copies.iter().find(|(_, copy)| !copy.fallback.is_empty()) {
            None => Ok(()),
            Some((name, _)) => {
                let why = format!("copies.{name}.fallback: only [vault] has one");
                Err(Error::new(ErrorKind::Usage, "config.copy", why))
            }
        }
    }

    /// The cluster called `name`, or the only one.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is none, or several and no name was given.
    pub fn cluster(&self, name: Option<&str>) -> Result<(&str, &ClusterConfig)> {
        let known = || self.cluster.keys().cloned().collect::<Vec<_>>().join(", ");
        match name {
            Some(name) => self.cluster.get_key_value(name).map(|(n, c)| (n.as_str(), c)).ok_or_else(|| {
                Error::new(
                    ErrorKind::Usage,
                    "config.cluster",
                    format!("the configuration has no cluster `{name}`; it has: {}", known()),
                )
            }),
            None => match self.cluster.iter().next() {
                Some((name, cluster)) if self.cluster.len() == 1 => Ok((name, cluster)),
                Some(_) => Err(Error::new(ErrorKind::Usage, "config.cluster", "the configuration has several clusters")
                    .with_hint(format!("choose one with --cluster: {}", known()))),
                None => Err(Error::new(ErrorKind::Usage, "config.cluster", "the configuration has no cluster")
                    .with_hint("add a section such as [cluster.main]")),
            },
        }
    }
}
