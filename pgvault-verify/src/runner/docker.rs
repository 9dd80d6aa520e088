//! A server in a container, for drills on a machine that has Docker or Podman and need not have PostgreSQL.
//!
//! The copy is restored on this machine and mounted into the container, under the same path and with nothing else of this machine. The
//! container has no network, no capabilities, no way to gain any, a root file system that it cannot write to, and as much memory and as
//! many processes as it is allowed. It runs `postgres` itself: the entrypoint of an image would want to make a cluster or to change owners.
//! Clients reach it through a Unix socket in a folder that both sides see.
//!
//! - `client`: which service, and how its errors are told;
//! - [`image`]: which image, whether it is fit, and how to make one;
//! - `sandbox`: what a container is allowed; `container`: from its creation to its removal;
//! - `server`: the server in one;
//! - `leftovers`: containers of drills that died.
//!
//! What runs here is reached by the service's socket and by paths: the service has to be on this machine and to see its files.

mod client;
mod container;
pub mod image;
mod leftovers;
mod sandbox;
mod server;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use pgvault_core::{Error, ErrorKind, Result};
use tempfile::TempDir;

use self::client::Engine;
use self::image::Image;
use self::leftovers::{Lock, Mark};
use self::sandbox::{Limits, Sandbox};
use self::server::Contained;
use super::{Needs, Runner, Running, Site};
use crate::isolation;
use crate::process::{Account, private_folder};
use crate::task::blocking;

/// Short runs in a container: what an image is, what a control file says.
const SHORT: Duration = Duration::from_secs(60);

/// Bytes that a server needs beside its shared buffers to do anything at all.
const BESIDE_BUFFERS: u64 = 64 * 1024 * 1024;

/// Where and how containers are run.
#[derive(Debug, Clone)]
pub struct DockerOptions {
    /// The socket of the service. Without it: that of `DOCKER_HOST` when it names one, Docker's, Podman's of root, Podman's of this user.
    pub socket: Option<PathBuf>,
    /// The image. Without it: the one of the cluster's major version that was built as [`image::containerfile`] says, else the official one.
    pub image: Option<String>,
    /// Bytes of memory that a container may use, its page cache and shared memory included; no limit without it.
    pub memory: Option<u64>,
    /// Processes that a container may have. A parallel query needs some, a server about ten.
    pub processes: u32,
    /// True to run a cluster on an image with musl. Such an image sorts text unlike the one with glibc that the cluster's indexes were most
    /// probably built on: right only for a cluster that ran on musl itself, or has no collations but `C` and those of ICU.
    pub accept_musl: bool,
}

impl Default for DockerOptions {
    fn default() -> Self {
        Self { socket: None, image: None, memory: None, processes: 1024, accept_musl: false }
    }
}

/// Runs copies in containers.
#[derive(Debug)]
pub struct DockerRunner {
    options: DockerOptions,
    account: Account,
    prepared: Option<(Engine, Image)>,
}

impl DockerRunner {
    /// Asks nothing of the service yet.
    ///
    /// # Errors
    /// When root finds no account that could own a server's files.
    pub fn new(options: DockerOptions) -> Result<Self> {
        Ok(Self { options, account: Account::unprivileged()?, prepared: None })
    }

    fn prepared(&self) -> Result<&(Engine, Image)> {
        self.prepared.as_ref().ok_or_else(|| Error::new(ErrorKind::Failed, "drill.runner", "the runner was not prepared"))
    }

    fn sandbox(&self, engine: &Engine, image: &Image, user: (u32, u32)) -> Sandbox {
        let limits = Limits { memory: self.options.memory, processes: self.options.processes };
        Sandbox::new(&image.id, user, limits).in_user_namespace(engine.user_namespace()).hiding(&image.volumes)
    }
}

#[async_trait]
impl Runner for DockerRunner {
    fn describe(&self) -> String {
        match &self.prepared {
            None => "docker".to_owned(),
            Some((engine, image)) => format!("docker, {image} on {engine}"),
        }
    }

    async fn prepare(&mut self, needs: &Needs) -> Result<()> {
        if let Some(memory) = self.options.memory
            && memory < needs.shared_buffers.saturating_add(BESIDE_BUFFERS)
        {
            let mib = |bytes: u64| bytes / (1024 * 1024);
            let message = format!(
                "a container with {} MiB of memory cannot run a server with {} MiB of shared buffers",
                mib(memory),
                mib(needs.shared_buffers)
            );
            let hint = format!("allow it {} MiB at least", mib(needs.shared_buffers.saturating_add(BESIDE_BUFFERS)));
            return Err(Error::new(ErrorKind::Usage, "drill.memory", message).with_hint(hint));
        }
        let engine = Engine::connect(self.options.socket.as_deref()).await?;
        leftovers::sweep(&engine).await?;
        let image = match &self.options.image {
            Some(name) => Image::had(&engine, name).await?,
            None => Image::usual(&engine, needs.major).await?,
        };
        let user = (self.account.uid(), self.account.gid());
        let sandbox = self.sandbox(&engine, &image, user).marked(&Mark::of_this_process("prepare", None)?);
        let image = image.judged(&engine, sandbox, needs.major, self.options.accept_musl).await?;
        tracing::info!(image = %image, service = %engine, "a drill runs in a container");
        self.prepared = Some((engine, image));
        Ok(())
    }

    fn owner(&self) -> (u32, u32) {
        (self.account.uid(), self.account.gid())
    }

    async fn start(&self, site: &Site, settings: &[(String, String)]) -> Result<Box<dyn Running>> {
        let (engine, image) = self.prepared()?;
        let place = {
            let site = site.clone();
            blocking(move || Place::made(&site)).await?
        };
        let mark = Mark::of_this_process(&site.name, Some(place.folder.path()))?;
        let base = self
            .sandbox(engine, image, (place.account.uid(), place.account.gid()))
            .marked(&mark)
            .searching(&image.search)
            .seeing(&site.folder)?
            .seeing(place.folder.path())?
            .working_in(place.folder.path());
        let mut options = place.options(site)?;
        if !site.pgdata.join("postgresql.conf").is_file() {
            // Debian keeps the configuration outside of the data directory, where a physical backup does not see it.
            let arguments = ["-D".to_owned(), text(&site.pgdata)?];
            let said = base.clone().running("pg_controldata", &arguments).to_its_end(engine, SHORT).await?;
            let file = place.write("postgresql.conf", &isolation::minimal_configuration(&said.stdout))?;
            options.push(("config_file".to_owned(), text(&file)?));
        }
        options.extend(isolation::SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())));
        options.extend(settings.iter().cloned());
        let mut arguments = vec!["-D".to_owned(), text(&site.pgdata)?];
        arguments.extend(options.into_iter().flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]));
        let sandbox = base.running("postgres", &arguments).named(&mark.container);
        Ok(Box::new(Contained::started(engine, &sandbox, site, place, self.options.memory).await?))
    }
}

/// What a server needs beside its data directory.
#[derive(Debug)]
pub(super) struct Place {
    /// Owns the copy's files, and runs the server.
    account: Account,
    /// Holds the socket and the files of access, and can be entered by the account only.
    folder: TempDir,
    #[expect(dead_code, reason = "closing it says that the drill is over")]
    lock: Lock,
}

impl Place {
    /// Hands the copy over to the account that is to run it, and makes a folder for the socket: in the site's, or below `/tmp` where a
    /// socket's path would be too long.
    fn made(site: &Site) -> Result<Self> {
        let account = Account::owner_of(&site.pgdata)?;
        for path in std::iter::once(&site.pgdata).chain(&site.tablespaces) {
            // A restore by root leaves files of root.
            let owner = fs::metadata(path).map_err(|e| Error::io("read the owner of", path, e))?.uid();
            if owner == 0 {
                account.own(path)?;
            }
        }
        check_can_enter(&account, site)?;
        let folder = private_folder(&account, Some(&site.folder))?;
        let lock = Lock::taken(folder.path())?;
        Ok(Self { account, folder, lock })
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(|e| Error::io("set the permissions of", &path, e))?;
        self.account.own(&path)?;
        Ok(path)
    }

    /// Where the server is, and who may connect to it.
    fn options(&self, site: &Site) -> Result<Vec<(String, String)>> {
        let hba = self.write("pg_hba.conf", isolation::HBA)?;
        let ident = self.write("pg_ident.conf", "")?;
        let named = [
            ("port", server::PORT.to_string()),
            ("listen_addresses", String::new()),
            ("unix_socket_directories", text(self.folder.path())?),
            // A configuration that was restored together with the data may name the original's files.
            ("data_directory", text(&site.pgdata)?),
            ("hba_file", text(&hba)?),
            ("ident_file", text(&ident)?),
        ];
        Ok(named.map(|(name, value)| (name.to_owned(), value)).into())
    }
}

/// Fails when the site's folder does not hold all of it, or the account cannot enter a folder on the way from there to the data. Those above do not count: in the container they
/// are others.
fn check_can_enter(account: &Account, site: &Site) -> Result<()> {
    for path in std::iter::once(&site.pgdata).chain(&site.tablespaces) {
        if !path.starts_with(&site.folder) {
            let message = format!("{} is not in {}, and the container sees nothing else", path.display(), site.folder.display());
            return Err(Error::new(ErrorKind::Failed, "drill.path", message));
        }
        for folder in path.ancestors().skip(1).take_while(|folder| folder.starts_with(&site.folder)) {
            let meta = fs::metadata(folder).map_err(|e| Error::io("read the permissions of", folder, e))?;
            let bit = match () {
                () if meta.uid() == account.uid() => 0o100,
                () if meta.gid() == account.gid() => 0o010,
                () => 0o001,
            };
            if meta.mode() & bit == 0 {
                let message =
                    format!("the user {} that runs PostgreSQL in the container cannot enter {}", account.uid(), folder.display());
                return Err(Error::new(ErrorKind::Usage, "server.account", message)
                    .with_hint(format!("give {} to the owner of the copy, or allow it with `chmod o+x`", folder.display())));
            }
        }
    }
    Ok(())
}

/// A path in a setting or in a request.
fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Error::new(ErrorKind::Usage, "drill.path", format!("{} is not UTF-8, which the Docker API asks for", path.display()))
    })
}
