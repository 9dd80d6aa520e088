//! The pgvault engine: PostgreSQL base backups and WAL, encrypted, in an object store that is only ever added to, and
//! the way back to any moment in between.
//!
//! It is a library: it prints nothing, ends no process, keeps no global state and starts no runtime. Call it inside a
//! multi-threaded tokio runtime. The `pgvault` command is one program around it; `examples/embed.rs` is another, in 150
//! lines.
//!
//! # The flow
//!
//! ```text
//! backup   server or data directory -> regions -> verify, digest, compress, seal -> packs -> manifest
//! WAL      replication slot or archive_command -> segments -> objects -> catalog
//! restore  target -> plan -> packs -> files -> recovery settings -> PostgreSQL -> wal::fetch
//! ```
//!
//! - [`vault`]: a place in a store. A [`Vault`](vault::Vault) is opened without a key and can tell which clusters it
//!   holds; [`unlock`](vault::Vault::unlock) gives a [`Cluster`](vault::Cluster), which everything else takes.
//! - [`backup`]: takes a base backup. It is committed by its manifest, the last object that is written.
//! - [`wal`]: [`stream`](wal::stream) and [`push`](wal::push) bring WAL in, [`catalog`](wal::catalog) knows what is there and what
//!   is missing, [`fetch`](wal::fetch) hands it to a recovering server.
//! - [`restore`]: makes a [`plan`](restore::plan) for a [`target`](restore::target) and carries it out.
//! - [`inspect`]: verifies what is stored, with the key or without.
//! - [`postgres`]: PostgreSQL's files and protocol. [`format`](mod@format) and [`crypto`]: the vault's bytes.
//! - [`config`]: the configuration file, for programs that want to share it with the command.
//! - [`env`](mod@env), [`clock`], [`progress`]: what a caller can replace.
//!
//! # A vault in memory
//!
//! ```
//! use pgvault_core::crypto::slot::{Unlock, Wrap};
//! use pgvault_core::env::Env;
//! use pgvault_core::postgres::SystemId;
//! use pgvault_core::vault::layout::ClusterName;
//! use pgvault_core::store::Store;
//! use pgvault_core::vault::{Vault, snapshot};
//!
//! # #[tokio::main]
//! # async fn main() -> pgvault_core::Result<()> {
//! let (vault, created) = Vault::create(Store::in_memory(), Env::default()).await?;
//! assert!(created);
//!
//! // A cluster is a name and the system identifier that initdb gave it. Each has its own keys.
//! let name = ClusterName::new("main", SystemId(7_400_000_000_000_000_001))?;
//! vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await?;
//!
//! let cluster = vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await?;
//! assert!(snapshot::list(&cluster).await?.snapshots.is_empty());
//!
//! let refused = vault.unlock(&name, &Unlock::Passphrase("wrong".into())).await.unwrap_err();
//! assert_eq!(refused.kind(), pgvault_core::ErrorKind::WrongKey);
//! # Ok(())
//! # }
//! ```
//!
//! # A backup and a restore
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use pgvault_core::backup::{BackupOptions, CensusOptions, backup};
//! use pgvault_core::postgres::ConnInfo;
//! use pgvault_core::progress::Silent;
//! use pgvault_core::restore::plan::{PlanOptions, plan};
//! use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
//! use pgvault_core::vault::Cluster;
//!
//! async fn back_up_and_restore(cluster: &Cluster) -> pgvault_core::Result<()> {
//!     let options = BackupOptions {
//!         connection: ConnInfo::parse("host=/run/postgresql user=pgvault", &|name| std::env::var(name).ok())?,
//!         pgdata: Some("/var/lib/postgresql/15/main".into()), // None: by BASE_BACKUP, without access to the files
//!         level: 1,
//!         workers: 4,
//!         labels: Default::default(),
//!         strict: true,
//!         spread_checkpoint: false,
//!         archive_patience: None,
//!         as_of: None,
//!         full: false,
//!         census: Some(CensusOptions::default()),
//!         progress: Arc::new(Silent),
//!     };
//!     let manifest = backup(cluster, &options).await?;
//!     assert!(manifest.bad_pages.is_empty());
//!
//!     let target = "2026-11-21T14:32:00+01:00".parse()?;
//!     let plan = plan(cluster, &target, PlanOptions::default()).await?;
//!     let options = RestoreOptions {
//!         pgdata: "/srv/restored".into(),
//!         delta: false,
//!         tablespace_mapping: Default::default(),
//!         restore_command: RestoreCommand {
//!             program: "/usr/local/bin/pgvault".into(),
//!             global_arguments: vec!["--config".into(), "/etc/pgvault/pgvault.toml".into()],
//!             arguments: vec!["--cluster".into(), "main".into()],
//!         },
//!         action: TargetAction::Pause,
//!         archive_off: true,
//!         workers: 4,
//!         progress: Arc::new(Silent),
//!     };
//!     restore(cluster, &plan, &options).await?;
//!     Ok(()) // PostgreSQL, started on /srv/restored, recovers to the target.
//! }
//! ```
//!
//! # Errors
//!
//! Every fallible call gives [`Error`]. Its [`kind`](Error::kind) is what a caller decides by, its [`code`](Error::code) is stable
//! and fit for logs and alerts, its message names the object, its [`hint`](Error::hint) says what to do next. Whether the same
//! call may succeed later, [`is_transient`](Error::is_transient) tells. Nothing panics on what a disk, a network or a store says.
//!
//! # Features
//!
//! `kms-aws`, `kms-azure`, `kms-gcp` and `kms-transit` (`kms` for all): key slots that a key service opens. `testing`: a conformance suite for
//! stores, stores that fail on purpose, and a faulty network. None is on by default.
//!
//! The stores are a local directory, S3, Azure Blob, Google Cloud Storage and memory; any other that implements
//! `object_store`'s trait and refuses to create a name twice can be passed to [`Store::new`](store::Store::new).

pub mod backup;
pub mod clock;
pub mod config;
pub mod copy;
pub mod crypto;
pub mod env;
pub mod error;
pub mod filestore;
pub mod format;
pub mod inspect;
pub mod postgres;
pub mod progress;
pub mod restore;
pub mod retention;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod vault;
pub mod wal;

pub use error::{Error, ErrorKind, Result};
