//! Servers: started, shared by the tests of a run, and the places in them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::client::{Client, Key};
use crate::guard::{Process, Work};
use crate::{Place, gcs, kinds, place};

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A directory.
    Local,
    /// Azurite.
    Azurite,
    /// Ceph's object gateway.
    Rgw,
    /// `LocalStack`.
    Localstack,
    /// The stand-in for Google's.
    Gcs,
    /// s3rver, which overwrites.
    S3rver,
    /// Garage, which overwrites.
    Garage,
    /// s3s-fs, which ignores locks.
    S3sFs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Local, Self::Azurite, Self::Rgw, Self::Localstack, Self::Gcs, Self::S3rver, Self::Garage, Self::S3sFs];

    /// Those that pgvault must work on.
    pub const SUPPORTED: [Self; 5] = [Self::Local, Self::Azurite, Self::Rgw, Self::Localstack, Self::Gcs];

    /// Its name, as in `PGVAULT_TEST_STORE`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Azurite => "azurite",
            Self::Rgw => "rgw",
            Self::Localstack => "localstack",
            Self::Gcs => "gcs",
            Self::S3rver => "s3rver",
            Self::Garage => "garage",
            Self::S3sFs => "s3s-fs",
        }
    }

    /// The variable that says where a server of this kind runs.
    pub fn variable(self) -> String {
        format!("PGVAULT_TEST_STORE_{}", self.name().replace('-', "_").to_uppercase())
    }

    /// The kind that the whole suite runs on: `PGVAULT_TEST_STORE`, else a directory.
    pub fn of_this_run() -> Result<Self> {
        match std::env::var("PGVAULT_TEST_STORE") {
            Ok(name) => name.parse().map_err(|why: String| anyhow::anyhow!("PGVAULT_TEST_STORE: {why}")),
            Err(_) => Ok(Self::Local),
        }
    }

    /// True for those that speak Amazon's protocol.
    pub fn is_s3(self) -> bool {
        matches!(self, Self::Rgw | Self::Localstack | Self::S3rver | Self::Garage | Self::S3sFs)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| format!("`{text}` is none of {}", names()))
    }
}

/// Who uses a bucket. Only a server that knows users tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// May do everything.
    Owner,
    /// Creates and reads, and takes nothing away: `backup` and `wal`.
    Writer,
    /// Reads: `restore`.
    Restorer,
    /// Deletes what is not held: `expire` and `gc`.
    Pruner,
}

impl Role {
    /// Its name, and that of its user.
    pub fn name(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Writer => "writer",
            Self::Restorer => "restorer",
            Self::Pruner => "pruner",
        }
    }
}

/// The same server behind TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// Its address.
    pub endpoint: String,
    /// The authority that signed its certificate, in PEM.
    pub ca_file: PathBuf,
}

/// All there is to know about a running server, so that other processes can use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// What it is.
    pub kind: Kind,
    /// Its address, with the account where that is a part of it.
    pub endpoint: String,
    /// Where it can be reached with TLS, too.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The region that signatures name.
    pub region: String,
    /// Its users. There is always an owner.
    pub keys: BTreeMap<Role, Key>,
}

impl Info {
    pub(crate) fn new(kind: Kind, endpoint: String, owner: Key) -> Self {
        Self { kind, endpoint, tls: None, region: "us-east-1".to_owned(), keys: [(Role::Owner, owner)].into() }
    }

    /// The key of a user.
    pub fn key(&self, role: Role) -> Result<&Key> {
        self.keys.get(&role).with_context(|| format!("{} has no user {}", self.kind, role.name()))
    }

    /// A client for requests of a user's own making.
    pub fn client(&self, role: Role) -> Result<Client> {
        match self.kind {
            Kind::Local => bail!("a directory has no client"),
            Kind::Azurite => Client::azure(&self.endpoint, self.key(role)?),
            Kind::Gcs => Client::anonymous(&self.endpoint),
            _ => Client::aws(&self.endpoint, None, &self.region, self.key(role)?),
        }
    }
}

/// What ends with a server.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) processes: Vec<Process>,
    /// Where they work; after them, because they end in this order.
    #[expect(dead_code, reason = "dropping it removes the folder")]
    pub(crate) work: Option<Work>,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    info: Info,
    /// The bucket in which [`Server::place`] gives out prefixes.
    common: OnceLock<String>,
    counter: AtomicU32,
    /// Nothing for a server of another process.
    running: Option<Running>,
}

impl Server {
    /// Installs what is missing and starts a server.
    pub fn start(kind: Kind) -> Result<Self> {
        let (info, running) = match kind {
            Kind::Local => bail!("a directory needs no server"),
            Kind::Azurite => retried(kinds::azurite::start)?,
            Kind::Rgw => retried(kinds::rgw::start)?,
            Kind::Localstack => retried(kinds::localstack::start)?,
            Kind::Gcs => gcs::start()?,
            Kind::S3rver => retried(kinds::s3rver::start)?,
            Kind::Garage => retried(kinds::garage::start)?,
            Kind::S3sFs => retried(kinds::s3s::start)?,
        };
        Ok(Self::from_info(info, Some(running)))
    }

    /// Installs what a server needs, without starting it.
    pub fn install(kind: Kind) -> Result<()> {
        match kind {
            Kind::Local | Kind::Gcs => Ok(()),
            Kind::Azurite => kinds::azurite::install().map(drop),
            Kind::Rgw => kinds::rgw::install().map(drop),
            Kind::Localstack => kinds::localstack::install().map(drop),
            Kind::S3rver => kinds::s3rver::install().map(drop),
            Kind::Garage => kinds::garage::install().map(drop),
            Kind::S3sFs => kinds::s3s::install().map(drop),
        }
    }

    /// The server that the whole process uses: the one that [`Kind::variable`] describes, else one that ends with the process.
    pub fn shared(kind: Kind) -> Result<Arc<Self>> {
        static SHARED: Mutex<BTreeMap<Kind, Arc<Server>>> = Mutex::new(BTreeMap::new());
        // Held while a server starts: whoever else wants it waits for it.
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = shared.get(&kind) {
            return Ok(Arc::clone(server));
        }
        let server = Arc::new(match std::env::var(kind.variable()) {
            Ok(text) => {
                let info: Info = serde_json::from_str(&text).with_context(|| kind.variable())?;
                ensure!(info.kind == kind, "{} describes {}", kind.variable(), info.kind);
                Self::from_info(info, None)
            }
            Err(_) => Self::start(kind).with_context(|| format!("start {kind}"))?,
        });
        let _ = shared.insert(kind, Arc::clone(&server));
        Ok(server)
    }

    fn from_info(info: Info, running: Option<Running>) -> Self {
        Self { info, common: OnceLock::new(), counter: AtomicU32::new(1), running }
    }

    /// How to reach it.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Fails when one of its processes has ended. Of a server of another process nothing is known.
    pub fn ensure_running(&self) -> Result<()> {
        self.running.iter().flat_map(|running| &running.processes).try_for_each(Process::ensure_running)
    }

    /// The numbers of its processes, for a test that stops or kills one.
    pub fn pids(&self) -> Vec<u32> {
        self.running.iter().flat_map(|running| &running.processes).map(Process::pid).collect()
    }

    /// A prefix that nobody else uses, in a bucket without versions and locks that the tests of this process share.
    pub fn place(&self) -> Result<Place> {
        let bucket = if let Some(bucket) = self.common.get() {
            bucket.clone()
        } else {
            let made = self.make_bucket(false)?;
            // Two threads may have made one each; the first one's is taken.
            self.common.get_or_init(|| made).clone()
        };
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        Place::new(&self.info, &bucket, &format!("vault-{number}"))
    }

    /// A prefix in a new bucket, with Object Lock (and so with versions) where that is wanted.
    pub fn bucket(&self, lock: bool) -> Result<Place> {
        Place::new(&self.info, &self.make_bucket(lock)?, "vault")
    }

    /// A prefix in a new bucket that keeps what is overwritten and deleted.
    pub fn versioned_bucket(&self) -> Result<Place> {
        let place = Place::new(&self.info, &self.make(false, true)?, "vault")?;
        if self.info.kind.is_s3() {
            let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
            let _ = place.client()?.call("PUT", &format!("/{}?versioning", place.bucket()), &[], body)?;
        }
        Ok(place)
    }

    /// A prefix in a new bucket, whose policy tells the users of [`Role`] apart.
    pub fn bucket_for_roles(&self, lock: bool) -> Result<Place> {
        let bucket = self.make_bucket(lock)?;
        ensure!(self.info.keys.len() > 1, "{} does not tell users apart", self.info.kind);
        let policy = place::policy(&bucket);
        let _ = self.info.client(Role::Owner)?.call("PUT", &format!("/{bucket}?policy"), &[], policy)?;
        Place::new(&self.info, &bucket, "vault")
    }

    fn make_bucket(&self, lock: bool) -> Result<String> {
        self.make(lock, false)
    }

    fn make(&self, lock: bool, versions: bool) -> Result<String> {
        // Unlike that of any other process, and of an earlier bucket of this one.
        let name = format!("pgvault-{}-{:x}", std::process::id(), jiff::Timestamp::now().as_nanosecond());
        let client = self.info.client(Role::Owner)?;
        let _ = match self.info.kind {
            Kind::Local => bail!("a directory has no buckets"),
            Kind::Azurite => {
                ensure!(!lock && !versions, "Azurite keeps neither locks nor versions");
                client.call("PUT", &format!("/{name}?restype=container"), &[], "")?
            }
            Kind::Gcs => {
                let target = format!("/storage/v1/b?project=test&enableObjectRetention={lock}");
                let body = serde_json::json!({ "name": name, "versioning": { "enabled": versions } });
                client.call("POST", &target, &[("content-type", "application/json")], body.to_string())?
            }
            _ => {
                let headers: &[(&str, &str)] = if lock { &[("x-amz-bucket-object-lock-enabled", "true")] } else { &[] };
                client.call("PUT", &format!("/{name}"), headers, "")?
            }
        };
        Ok(name)
    }
}

/// A port that was free may be taken a moment later: then another one is tried.
fn retried(start: impl Fn() -> Result<(Info, Running)>) -> Result<(Info, Running)> {
    for _ in 0..2 {
        match start() {
            Err(error)
                if ["address already in use", "eaddrinuse"]
                    .iter()
                    .any(|text| format!("{error:#}").to_lowercase().contains(text)) => {}
            other => return other,
        }
    }
    start()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_found_by_its_name_and_its_variable_has_only_letters() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
        assert_eq!(Kind::S3sFs.variable(), "PGVAULT_TEST_STORE_S3S_FS");
        assert!("minio".parse::<Kind>().unwrap_err().contains("azurite, rgw"));
    }
}
