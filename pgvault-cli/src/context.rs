//! From arguments and configuration to an opened cluster.

use std::path::{Path, PathBuf};

use pgvault_core::config::{self, ClusterConfig, Config, Job, VaultConfig};
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, SystemId};
use pgvault_core::store::Store;
use pgvault_core::vault::{Cluster, Vault, layout};
use pgvault_core::{Error, ErrorKind, Result};

use crate::args::{ArtifactCommand, Cli, ClusterArgs, Command, FilestoreCommand, VerifyCommand, WalCommand};
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
    /// The copy that is read instead of the vault.
    from: Option<String>,
}

/// A vault that can be read: the configured one, or a copy by its name.
pub(crate) type Place<'a> = Option<&'a str>;

impl Context {
    /// Reads the configuration.
    pub(crate) fn load(cli: &Cli) -> Result<Self> {
        let file = match &cli.config {
            Some(file) => Some(file.clone()),
            None => DEFAULT_FILES.iter().map(PathBuf::from).find(|file| file.is_file()),
        };
        let config = config::load(file.as_deref(), environment())?;
        let file = file.map(|file| std::path::absolute(&file).map_err(|e| Error::io("resolve", &file, e))).transpose()?;
        let from = from_of(&cli.command).map(ToOwned::to_owned);
        if let Some(name) = &from {
            let _ = config.copy(name)?;
        }
        Ok(Self { config, file, job: job_of(&cli.command), meter: cli.meter.clone(), from })
    }

    /// The vault that the command is about: the configured one, or the copy that `--from` names.
    pub(crate) fn place(&self) -> Place<'_> {
        self.from.as_deref()
    }

    /// Where to look for what is to be restored, in this order.
    pub(crate) fn places(&self) -> Vec<Place<'_>> {
        match self.place() {
            // Whoever names a copy means no other.
            Some(copy) => vec![Some(copy)],
            None => std::iter::once(None).chain(self.config.vault.fallback.iter().map(|name| Some(name.as_str()))).collect(),
        }
    }

    /// How a vault is reached and opened.
    pub(crate) fn vault_config(&self, place: Place<'_>) -> Result<&VaultConfig> {
        place.map_or(Ok(&self.config.vault), |name| self.config.copy(name))
    }

    /// The configured cluster.
    pub(crate) fn cluster<'a>(&'a self, args: &'a ClusterArgs) -> Result<(&'a str, &'a ClusterConfig)> {
        self.config.cluster(args.cluster.as_deref())
    }

    /// The store of the vault.
    pub(crate) fn store(&self) -> Result<Store> {
        self.store_at(self.place())
    }

    /// The store of a vault.
    pub(crate) fn store_at(&self, place: Place<'_>) -> Result<Store> {
        let config = self.vault_config(place)?;
        let opened = config.store_settings(self.job).and_then(|settings| Store::open(&config.url, settings));
        let store = opened.map_err(|error| named(place, error))?;
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
        self.vault_at(self.place()).await
    }

    /// A vault, without keys.
    pub(crate) async fn vault_at(&self, place: Place<'_>) -> Result<Vault> {
        Vault::open(self.store_at(place)?, Env::default()).await.map_err(|error| named(place, error))
    }

    /// The cluster with its keys. `system_id` is what the caller knows of it, besides the arguments.
    pub(crate) async fn open(&self, args: &ClusterArgs, system_id: Option<SystemId>) -> Result<Cluster> {
        self.open_at(self.place(), args, system_id).await
    }

    /// As [`Context::open`], in the vault that is meant.
    pub(crate) async fn open_at(&self, place: Place<'_>, args: &ClusterArgs, system_id: Option<SystemId>) -> Result<Cluster> {
        let (name, _) = self.cluster(args)?;
        let vault = self.vault_at(place).await?;
        let opened = async {
            let cluster = vault.find_cluster(name, args.system_id.or(system_id)).await?;
            vault.unlock(&cluster, &self.vault_config(place)?.unlock()?).await
        };
        opened.await.map_err(|error| named(place, error))
    }

    /// The server that a cluster's configuration leads to.
    pub(crate) fn connection(config: &ClusterConfig) -> Result<ConnInfo> {
        ConnInfo::parse(&config.connection, &|name| std::env::var(name).ok())
    }
}

/// Says of an error which copy it is about.
fn named(place: Place<'_>, error: Error) -> Error {
    match place {
        Some(copy) => error.context(format!("copy {copy}")),
        None => error,
    }
}

/// The copy that a command reads from.
fn from_of(command: &Command) -> Option<&str> {
    let from = match command {
        Command::List(args)
        | Command::Status(args)
        | Command::Filestore(FilestoreCommand::List(args))
        | Command::Artifact(ArtifactCommand::List(args)) => &args.place.from,
        Command::Artifact(ArtifactCommand::Get(args)) => &args.place.from,
        Command::Verify(args) => match &args.command {
            Some(VerifyCommand::Report(args)) => &args.place.from,
            _ => &args.place.from,
        },
        Command::Check(args) => &args.place.from,
        Command::Scrub(args) => &args.place.from,
        Command::Restore(args) => &args.place.from,
        Command::Export(args) => &args.place.from,
        Command::Wal(WalCommand::Fetch(args)) => &args.place.from,
        Command::Wal(WalCommand::Prefetch(args)) => &args.fetch.place.from,
        Command::Wal(WalCommand::Check(args)) => &args.copy,
        _ => return None,
    };
    from.as_deref()
}

/// Whose limits a command has.
fn job_of(command: &Command) -> Job {
    match command {
        Command::Backup(_) | Command::Filestore(_) => Job::Backup,
        Command::Wal(_) => Job::Wal,
        Command::Restore(_) | Command::Export(_) | Command::Verify(_) => Job::Restore,
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
