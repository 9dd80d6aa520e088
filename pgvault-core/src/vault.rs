//! The vault: a place in an object store, and the clusters in it.
//!
//! A [`Vault`] needs no key: it can list, scrub and tell which clusters there are. [`Vault::unlock`] gives a [`Cluster`],
//! which can read and write sealed objects. Nothing in a vault is ever overwritten; see [`store`](crate::store) for how a PUT whose
//! answer was lost is settled, and [`layout`] for the names.

pub mod artifact;
pub mod audit;
pub mod census;
pub mod drill;
pub mod features;
pub mod gc;
pub mod hold;
mod init;
pub mod keyring;
pub mod layout;
pub mod maps;
pub mod mark;
pub(crate) mod past;
pub mod prune;
pub mod session;
pub mod snapshot;
pub mod tables;
pub mod undelete;
mod unlock;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use ulid::Ulid;

use crate::crypto::keys::{ClusterKeys, Identity, cluster_id};
use crate::crypto::sealed::{FrameEncoder, ObjectReader, SealedObject, SealedWriter};
use crate::env::Env;
use crate::format::document;
use crate::format::object::{HEADER_LEN, Kind, TAIL_LEN, Tail};
use crate::postgres::SystemId;
use crate::store::probe::probe;
use crate::store::{Put, Store};
use crate::{Error, ErrorKind, Result};
use features::Purpose;
use layout::{ClusterName, VAULT_DOCUMENT};

/// The code of the error that says that there is no vault here yet; a bucket that does not exist is another matter.
const NO_VAULT: &str = "vault.none";

const VAULT_FORMAT: &str = "PGV1";
const SUITE: &str = "aes256gcm-hkdfsha256-blake3";

/// `vault.json`: what a reader must know before it reads anything else. Create-once, no secrets.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultDocument {
    /// Always `PGV1`.
    pub format: String,
    /// Format version; another major is refused.
    pub major: u32,
    /// Format version; information.
    pub minor: u32,
    /// The vault's id.
    pub vault_id: Ulid,
    /// When it was made, by the maker's clock; information only.
    pub created_at: jiff::Timestamp,
    /// Cipher suite.
    pub suite: String,
    /// Features that a program must know before it reads, writes or deletes; see [`features`].
    pub features: BTreeMap<String, Vec<String>>,
}

/// An opened vault.
#[derive(Debug, Clone)]
pub struct Vault {
    store: Store,
    env: Env,
    document: Arc<VaultDocument>,
    document_sha256: [u8; 32],
}

impl Vault {
    /// Creates a vault, or opens the one that is already there; tells which.
    ///
    /// The store is probed first: it must do what a vault relies on, see [`probe`](crate::store::probe).
    ///
    /// # Errors
    /// When the store overwrites, cannot be reached, or holds a vault of a newer format or one that this version must not write
    /// to.
    pub async fn create(store: Store, env: Env) -> Result<(Self, bool)> {
        let store = store.with_classes(layout::class_of);
        match Self::open(store.clone(), env.clone()).await {
            Ok(vault) => {
                vault.ensure_may(Purpose::Write)?;
                if !features::has_for_writers(&vault.document.features, features::SINGLE_WRITER) {
                    let report = probe(&vault.store, &vault.env).await?;
                    report.ensure()?;
                    if report.first_version_counts() && !vault.store.settles_by_versions() {
                        return Err(versions_came_later(vault.store.location()));
                    }
                }
                Ok((vault, false))
            }
            Err(error) if error.code() == NO_VAULT => {
                let report = probe(&store, &env).await?;
                report.ensure()?;
                if report.first_version_counts() {
                    Self::make(store.settling_by_versions(), env, features::for_writers(features::FIRST_VERSION)).await
                } else {
                    Self::make(store, env, features::none()).await
                }
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Vault::create`], on a store that overwrites. It is written into the vault that only one program at a time may
    /// write to it; what two do at the same moment may then be lost, and neither notices.
    ///
    /// # Errors
    /// As [`Vault::create`]; [`ErrorKind::Usage`] when there is a vault that several may write to.
    pub async fn create_for_single_writer(store: Store, env: Env) -> Result<(Self, bool)> {
        let store = store.with_classes(layout::class_of);
        let (vault, created) = match Self::open(store.clone(), env.clone()).await {
            Ok(vault) => (vault, false),
            Err(error) if error.code() == NO_VAULT => {
                let store = store.looking_first();
                let report = probe(&store, &env).await?;
                // That it overwrites is known. Everything else counts all the same.
                if report.failures().any(|check| !check.is_overwriting()) {
                    report.ensure()?;
                }
                Self::make(store, env, features::for_writers(features::SINGLE_WRITER)).await?
            }
            Err(error) => return Err(error),
        };
        vault.ensure_may(Purpose::Write)?;
        if features::has_for_writers(&vault.document.features, features::SINGLE_WRITER) {
            return Ok((vault, created));
        }
        Err(Error::new(ErrorKind::Usage, "vault.several_writers", "there is a vault already that several may write to")
            .with_hint("leave --single-writer out"))
    }

    /// Writes the vault's document, unless somebody else does at the same moment.
    async fn make(store: Store, env: Env, features: BTreeMap<String, Vec<String>>) -> Result<(Self, bool)> {
        let document = VaultDocument {
            format: VAULT_FORMAT.into(),
            major: 1,
            minor: 0,
            vault_id: env.new_id()?,
            created_at: env.now(),
            suite: SUITE.into(),
            features,
        };
        let bytes = Bytes::from(document::encode(&document)?);
        // Not read again: what is on top at this moment may be another's, who has not yet found out that he came second.
        match store.put_new(VAULT_DOCUMENT, bytes.clone()).await? {
            Put::Created | Put::Same => Ok((Self::of_document(store, env, &bytes)?, true)),
            Put::Different(kept) => Ok((Self::of_document(store, env, &kept)?, false)),
        }
    }

    /// Opens a vault. When it has features that this version would have to know to write, nothing can be written through it.
    ///
    /// # Errors
    /// [`ErrorKind::NoVault`] when there is none, [`ErrorKind::Unsupported`] when it is of a newer format, or has features that
    /// this version would have to know to read.
    pub async fn open(store: Store, env: Env) -> Result<Self> {
        let store = store.with_classes(layout::class_of);
        let Some(bytes) = store.get_if_exists(VAULT_DOCUMENT).await? else {
            return Err(Error::new(ErrorKind::NoVault, NO_VAULT, format!("there is no vault at {}", store.location()))
                .with_hint("check vault.url, or create the vault with `pgvault init`"));
        };
        let vault = Self::of_document(store, env, &bytes)?;
        if !vault.store.settles_by_versions() {
            return Ok(vault);
        }
        // Only now is it known that the first version counts.
        let agreed = vault.store.get_agreed(VAULT_DOCUMENT).await?.unwrap_or(bytes);
        Self::of_document(vault.store, vault.env, &agreed)
    }

    fn of_document(store: Store, env: Env, bytes: &[u8]) -> Result<Self> {
        let document: VaultDocument = document::parse("vault.json", bytes)?;
        if document.format != VAULT_FORMAT || document.major != 1 || document.suite != SUITE {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "vault.newer",
                format!(
                    "the vault is of format {} {}.{}, suite {}",
                    document.format, document.major, document.minor, document.suite
                ),
            )
            .with_hint("use the pgvault version that created it, or a newer one"));
        }
        features::ensure(&document.features, Purpose::Read)?;
        // In the store, where no writer gets past it.
        let has = |feature| features::has_for_writers(&document.features, feature);
        let store = if has(features::SINGLE_WRITER) { store.looking_first() } else { store };
        let store = if has(features::FIRST_VERSION) { store.settling_by_versions() } else { store };
        let store = match features::ensure(&document.features, Purpose::Write) {
            Ok(()) => store,
            Err(refusal) => store.refusing_writes(&refusal),
        };
        Ok(Self { store, env, document: Arc::new(document), document_sha256: Sha256::digest(bytes).into() })
    }

    /// Makes sure that this version knows every feature that it must know for `purpose`. What reads and writes need not ask; what
    /// collects garbage does.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it does not.
    pub fn ensure_may(&self, purpose: Purpose) -> Result<()> {
        features::ensure(&self.document.features, purpose)
    }

    /// The vault's document.
    pub fn document(&self) -> &VaultDocument {
        &self.document
    }

    /// The store underneath.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Time, randomness and ids.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Every cluster that has a prefix in the vault, sorted.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn clusters(&self) -> Result<Vec<ClusterName>> {
        let mut names: Vec<ClusterName> =
            self.store.list_directories(layout::CLUSTERS).await?.iter().filter_map(|dir| ClusterName::parse(dir)).collect();
        names.sort();
        Ok(names)
    }

    /// Finds the cluster called `name`; `system_id` decides when an older incarnation of it is also in the vault.
    ///
    /// # Errors
    /// [`ErrorKind::NoVault`] when there is none, [`ErrorKind::Usage`] when the choice is not clear.
    pub async fn find_cluster(&self, name: &str, system_id: Option<SystemId>) -> Result<ClusterName> {
        let mut found: Vec<ClusterName> = self.clusters().await?;
        let known: Vec<String> = found.iter().map(ToString::to_string).collect();
        found.retain(|c| c.name == name && system_id.is_none_or(|id| c.system_id == id));
        match (found.len(), found.pop()) {
            (1, Some(cluster)) => Ok(cluster),
            (0, _) => {
                let what = system_id.map_or(String::new(), |id| format!(" with system identifier {id}"));
                Err(Error::new(ErrorKind::NoVault, "cluster.none", format!("the vault holds no cluster `{name}`{what}")).with_hint(
                    if known.is_empty() {
                        "run `pgvault init`".into()
                    } else {
                        format!("run `pgvault init`; the vault holds: {}", known.join(", "))
                    },
                ))
            }
            _ => Err(Error::new(
                ErrorKind::Usage,
                "cluster.ambiguous",
                format!("the vault holds several clusters called `{name}`: {}", known.join(", ")),
            )
            .with_hint("choose one with --system-id")),
        }
    }

    fn identity(&self, cluster: &ClusterName) -> Identity {
        Identity {
            vault_id: self.document.vault_id.to_bytes(),
            cluster_id: cluster_id(&cluster.name, cluster.system_id.0),
            vault_document: self.document_sha256,
        }
    }
}

/// Why a vault that several may write to cannot stay on a bucket that has begun to keep versions.
pub(crate) fn versions_came_later(location: &str) -> Error {
    let why = format!(
        "the bucket of {location} keeps versions and accepts several of one name at the same moment, which the vault does not know"
    );
    Error::new(ErrorKind::Unsupported, "store.first_version", why).with_hint(
        "versioning was switched on after the vault was made: make sure that only one program writes to it, and make a new vault on a \
         bucket that has versions from the start",
    )
}

/// Makes the absence of something that a committed backup names the damage that it is.
pub(crate) fn lost(path: &str, error: Error) -> Error {
    if error.kind() != ErrorKind::NotFound {
        return error;
    }
    Error::new(ErrorKind::Corrupt, "pack.missing", format!("{path} is missing from the vault")).with_hint(
        "run `pgvault check` to see which backups it hurts; restore the object from the store's versions or a vault copy",
    )
}

/// A cluster whose keys are open.
#[derive(Debug, Clone)]
pub struct Cluster {
    vault: Vault,
    name: ClusterName,
    keys: Arc<ClusterKeys>,
}

impl Cluster {
    /// The vault it lies in.
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Its name and system identifier.
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// Its keys.
    pub fn keys(&self) -> &Arc<ClusterKeys> {
        &self.keys
    }

    /// Makes sure that a server is the one whose backups these are. To be asked on every connect.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when it is another.
    pub fn ensure_is(&self, system_id: SystemId) -> Result<()> {
        if system_id == self.name.system_id {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Conflict,
            "source.foreign",
            format!("the server has system identifier {system_id}, but {} is meant", self.name),
        )
        .with_hint("check the connection settings; after initdb or pg_upgrade run `pgvault init` again"))
    }

    /// The store underneath.
    pub fn store(&self) -> &Store {
        &self.vault.store
    }

    /// Time, randomness and ids.
    pub fn env(&self) -> &Env {
        &self.vault.env
    }

    /// The full name of an object whose name relative to the cluster is `relative`.
    pub fn path(&self, relative: &str) -> String {
        format!("{}{relative}", self.name.prefix())
    }

    /// Stores a sealed object; see [`Store::put_new`].
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put(&self, object: &SealedObject) -> Result<Put> {
        self.store().put_new(&self.path(&object.name), object.bytes.clone()).await
    }

    /// Stores a sealed object under a name that nobody else can have chosen.
    ///
    /// # Errors
    /// When the store fails, or another object has the name all the same.
    pub async fn put_once(&self, object: &SealedObject) -> Result<()> {
        self.store().put_once(&self.path(&object.name), object.bytes.clone()).await
    }

    /// Seals a value as a one-frame JSON object and stores it under a name of its own.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_json<T: Serialize>(&self, kind: Kind, name: &str, value: &T) -> Result<()> {
        let json = serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
        let mut writer = SealedWriter::new(self.env(), &self.keys, kind, name, json.len() + 512)?;
        let _ = writer.push(&mut FrameEncoder::new(1)?, &json, self.keys.digest().frame(&json))?;
        self.put_once(&writer.finish(Vec::new())).await
    }

    /// Reads a value that [`Cluster::put_json`] stored.
    ///
    /// # Errors
    /// When it does not exist or was changed.
    pub async fn get_json<T: serde::de::DeserializeOwned>(&self, kind: Kind, name: &str) -> Result<T> {
        let path = self.path(name);
        let bytes = self.store().get(&path).await?;
        let opened = ObjectReader::open_whole(&self.keys, kind, name, &bytes);
        let json =
            opened.and_then(|reader| reader.decode_from(&self.keys, 0, &bytes)).map_err(|e| Error::from(e).context(&path))?;
        serde_json::from_slice(&json).map_err(|e| Error::new(ErrorKind::Corrupt, "object.json", format!("{path}: {e}")))
    }

    /// Opens a stored object without fetching all of it. `size` saves a request when it is known.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it does not exist, [`ErrorKind::Corrupt`] when it was changed.
    pub async fn open(&self, kind: Kind, name: &str, size: Option<u64>) -> Result<StoredObject> {
        const SMALL: u64 = 256 << 10;
        // Of maps, most are wanted: a restore reads them all.
        let small = if kind == Kind::Meta { 2 << 20 } else { SMALL };
        let path = self.path(name);
        let corrupt = |e: crate::format::FormatError| Error::from(e).context(&path);
        let size = match size {
            Some(size) => size,
            None => self.store().head(&path).await?.size,
        };
        if size < (HEADER_LEN + TAIL_LEN) as u64 || size > crate::format::MAX_OBJECT {
            return Err(Error::new(ErrorKind::Corrupt, "object.size", format!("{path}: {size} bytes cannot be a PGV1 object")));
        }
        let (head, tail) = if size <= small {
            let whole = self.store().get(&path).await?;
            (whole.clone(), whole)
        } else {
            let head = self.store().get_range(&path, 0..SMALL / 2).await?;
            let mut tail = self.store().get_range(&path, size - SMALL / 4..size).await?;
            let parsed = Tail::parse(tail.get(tail.len().saturating_sub(TAIL_LEN)..).unwrap_or(&[]), size).map_err(corrupt)?;
            if size - parsed.footer_offset > tail.len() as u64 {
                tail = self.store().get_range(&path, parsed.footer_offset..size).await?;
            }
            (head, tail)
        };
        let reader = ObjectReader::open(&self.keys, kind, name, size, &head, &tail).map_err(corrupt)?;
        Ok(StoredObject { cluster: self.clone(), path, reader: Arc::new(reader), head })
    }
}

/// An object whose frame table is open; frames are fetched when asked for.
#[derive(Debug, Clone)]
pub struct StoredObject {
    cluster: Cluster,
    path: String,
    reader: Arc<ObjectReader>,
    head: Bytes,
}

impl StoredObject {
    /// The frame table and keys.
    pub fn reader(&self) -> &ObjectReader {
        &self.reader
    }

    /// Number of frames.
    pub fn frame_count(&self) -> u32 {
        u32::try_from(self.reader.frames().len()).unwrap_or(u32::MAX)
    }

    /// Fetches all of it, so that its frames need no request any more.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn hold(&mut self) -> Result<()> {
        self.head = self.cluster.store().get(&self.path).await?;
        Ok(())
    }

    /// Bytes of it that are in memory.
    pub(crate) fn held(&self) -> usize {
        self.head.len()
    }

    /// Fetches, checks and decodes one frame.
    ///
    /// # Errors
    /// When the store fails or the frame was changed.
    pub async fn frame(&self, number: u32) -> Result<Vec<u8>> {
        let corrupt = |e: crate::format::FormatError| Error::from(e).context(&self.path);
        let Some(entry) = self.reader.frames().get(number as usize) else {
            return Err(Error::new(ErrorKind::Corrupt, "object.frame", format!("{}: there is no frame {number}", self.path)));
        };
        let end = entry.offset + u64::from(entry.sealed_len);
        let sealed = match (usize::try_from(entry.offset), usize::try_from(end)) {
            (Ok(start), Ok(end)) if end <= self.head.len() => self.head.slice(start..end),
            _ => self.cluster.store().get_range(&self.path, entry.offset..end).await?,
        };
        self.reader.decode(&self.cluster.keys, number, &sealed).map_err(corrupt)
    }

    /// Fetches, checks and decodes `count` frames from `first` on, one after the other. Nothing is fetched when they decode to
    /// more than `limit` bytes.
    ///
    /// # Errors
    /// As [`StoredObject::frame`], and when the frames are not there or decode to too much.
    pub async fn frames(&self, first: u32, count: u32, limit: u64) -> Result<Vec<u8>> {
        let all = self.reader.frames();
        let wanted =
            (first as usize).checked_add(count as usize).and_then(|end| all.get(first as usize..end)).ok_or_else(|| {
                let why = format!("{}: there are no {count} frames from {first} on", self.path);
                Error::new(ErrorKind::Corrupt, "object.frame", why)
            })?;
        let size: u64 = wanted.iter().map(|frame| u64::from(frame.raw_len)).sum();
        if size > limit {
            let why = format!("{}: {count} frames decode to {size} bytes; what they hold has at most {limit}", self.path);
            return Err(Error::new(ErrorKind::Corrupt, "object.frames", why));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        for number in first..first.saturating_add(count) {
            bytes.extend_from_slice(&self.frame(number).await?);
        }
        Ok(bytes)
    }
}
