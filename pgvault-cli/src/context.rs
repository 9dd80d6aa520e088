//! From arguments and configuration to an opened cluster.

use std::path::{Path, PathBuf};

use pgvault_core::config::{self, ClusterConfig, Config, Job};
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, SystemId};
use pgvault_core::store::Store;
use pgvault_core::vault::{Cluster, Vault, layout};
use pgvault_core::{Error, ErrorKind, Result};

use crate::args::{Cli, ClusterArgs, Command};
use crate::output::Meter;

/// Places that are looked at when no file is named.
const DEFAULT_FILES: [&str; 2] = ["pgvault.toml", "/etc/pgvault/pgvault.toml"];

/// The configuration and where it came from.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) file: Option<PathBuf>,
    job: Job,
    meter: Meter,
}

impl Context {
    /// Reads the configuration.
    pub(crate) fn load(cli: &Cli) -> Result<Self> {
        let file = match &cli.config {
            Some(file) => Some(file.clone()),
            None => DEFAULT_FILES.iter().map(PathBuf::from).find(|file| file.is_file()),
        };
        let config = config::load(file.as_deref(), environment())?;
        let file = file.map(|file| std::path::absolute(&file).map_err(|e| Error::io("resolve", &file, e))).transpose()?;
        Ok(Self { config, file, job: job_of(&cli.command), meter: cli.meter.clone() })
    }

    /// The configured cluster.
    pub(crate) fn cluster<'a>(&'a self, args: &'a ClusterArgs) -> Result<(&'a str, &'a ClusterConfig)> {
        self.config.cluster(args.cluster.as_deref())
    }

    /// The store of the vault.
    pub(crate) fn store(&self) -> Result<Store> {
        let store = Store::open(&self.config.vault.url, self.config.vault.store_settings(self.job)?)?;
        self.meter.watch(&store);
        Ok(store)
    }

    /// The store with what its vault says of it, whether or not there is a vault.
    pub(crate) async fn store_of_vault(&self) -> Result<Store> {
        let store = self.store()?;
        match Vault::open(store.clone(), Env::default()).await {
            Ok(vault) => Ok(vault.store().clone()),
            Err(error) if error.is_transient() => Err(error),
            // Not there yet, hidden, or damaged: the names tell what its objects are for all the same.
            Err(_) => Ok(store.with_classes(layout::class_of)),
        }
    }

    /// The vault, without keys.
    pub(crate) async fn vault(&self) -> Result<Vault> {
        Vault::open(self.store()?, Env::default()).await
    }

    /// The cluster with its keys. `system_id` is what the caller knows of it, besides the arguments.
    pub(crate) async fn open(&self, args: &ClusterArgs, system_id: Option<SystemId>) -> Result<Cluster> {
        let (name, _) = self.cluster(args)?;
        let vault = self.vault().await?;
        let cluster = vault.find_cluster(name, args.system_id.or(system_id)).await?;
        vault.unlock(&cluster, &self.config.vault.unlock()?).await
    }

    /// The server that a cluster's configuration leads to.
    pub(crate) fn connection(config: &ClusterConfig) -> Result<ConnInfo> {
        ConnInfo::parse(&config.connection, &|name| std::env::var(name).ok())
    }
}

/// Whose limits a command has.
fn job_of(command: &Command) -> Job {
    match command {
        Command::Backup(_) => Job::Backup,
        Command::Wal(_) => Job::Wal,
        Command::Restore(_) => Job::Restore,
        Command::Check(_) | Command::Scrub(_) => Job::Check,
        _ => Job::Other,
    }
}

/// The variables that are text; others cannot be meant for pgvault.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// The system identifier in a data directory's `pg_control`, when it can be read.
pub(crate) fn system_id_of(pgdata: &Path) -> Option<SystemId> {
    let bytes = std::fs::read(pgdata.join("global/pg_control")).ok()?;
    Some(pgvault_core::postgres::ControlFile::parse(&bytes).ok()?.system_identifier)
}

/// A ULID given on the command line.
pub(crate) fn parse_id(text: &str) -> Result<ulid::Ulid> {
    ulid::Ulid::from_string(text).map_err(|_| Error::new(ErrorKind::Usage, "usage.id", format!("`{text}` is not an id")))
}
