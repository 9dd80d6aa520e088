//! The service that runs containers: Docker Engine, or Podman's.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bollard::{API_DEFAULT_VERSION, Docker};
use pgvault_core::{Error, ErrorKind, Result};

/// Seconds that an answer may take. Removing a container with many files in its layer takes some.
const PATIENCE: u64 = 120;

/// A service that has answered.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub(super) docker: Docker,
    pub(super) socket: PathBuf,
    /// As it calls itself: `Podman Engine 4.3.1`.
    name: String,
    /// True for one that runs as some user.
    rootless: bool,
    /// True for a Docker that gives its containers other user ids than this machine's.
    remaps: bool,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Engine {
    /// The service behind this socket, or the first one that answers.
    pub(super) async fn connect(socket: Option<&Path>) -> Result<Self> {
        let candidates = socket.map_or_else(usual_sockets, |socket| vec![socket.to_path_buf()]);
        let mut tried = Vec::new();
        for socket in candidates {
            match Self::at(&socket).await {
                Ok(engine) => return engine.checked(),
                Err(error) => tried.push(format!("{}: {error}", socket.display())),
            }
        }
        let message = format!("no Docker or Podman service answers: {}", tried.join("; "));
        Err(Error::new(ErrorKind::Usage, "drill.docker", message).with_hint(
            "start one (`systemctl start docker`, `systemctl start podman.socket`, or as a user `systemctl --user start podman.socket`), \
             name its socket in DOCKER_HOST=unix://PATH, or drill with the programs of this machine: `--runner process`",
        ))
    }

    async fn at(socket: &Path) -> Result<Self, bollard::errors::Error> {
        let path = socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&path, PATIENCE, API_DEFAULT_VERSION)?.negotiate_version().await?;
        let version = docker.version().await?;
        let component = version.components.as_deref().unwrap_or_default().first();
        let product = component.map_or_else(|| "Docker Engine".to_owned(), |component| component.name.clone());
        let product = if product == "Engine" { "Docker Engine".to_owned() } else { product };
        let name = format!("{product} {}", version.version.unwrap_or_default());
        let claims = docker.info().await.ok().and_then(|info| info.security_options).unwrap_or_default();
        let owner = std::fs::metadata(socket).map(|meta| meta.uid()).unwrap_or_default();
        let rootless = claims.iter().any(|claim| claim.contains("rootless")) || (owner != 0 && product.starts_with("Podman"));
        let remaps = claims.iter().any(|claim| claim.contains("name=userns"));
        Ok(Self { docker, socket: socket.to_path_buf(), name: name.trim_end().to_owned(), rootless, remaps })
    }

    /// How to tell it that a container has this machine's user ids, where that has to be told: it must be the owner of the copy's files.
    pub(super) fn user_namespace(&self) -> Option<&'static str> {
        match () {
            () if self.rootless => Some("keep-id"),
            () if self.remaps => Some("host"),
            () => None,
        }
    }

    /// Fails for a service whose containers cannot be given the owner of the copy's files.
    fn checked(self) -> Result<Self> {
        if !self.rootless {
            return Ok(self);
        }
        let owner = std::fs::metadata(&self.socket).map(|meta| meta.uid()).unwrap_or_default();
        let refused = if !self.name.starts_with("Podman") {
            "its containers see the files of this user as those of root, as whom PostgreSQL does not run"
        } else if owner != rustix::process::geteuid().as_raw() {
            "it belongs to another user, whose containers cannot own the files of this one"
        } else {
            return Ok(self);
        };
        let message = format!("{self} at {} runs without root: {refused}", self.socket.display());
        Err(Error::new(ErrorKind::Unsupported, "drill.docker", message).with_hint(
            "use a Docker or Podman service of root, Podman's of the user that runs pgvault, or the programs of this machine: `--runner process`",
        ))
    }

    /// An error of the service, with what was asked of it.
    pub(super) fn error(&self, doing: &str, source: bollard::errors::Error) -> Error {
        Error::new(ErrorKind::Failed, "drill.docker", format!("{doing} ({self}): {source}")).with_source(source)
    }
}

fn usual_sockets() -> Vec<PathBuf> {
    let named = std::env::var("DOCKER_HOST").ok().and_then(|host| host.strip_prefix("unix://").map(PathBuf::from));
    let mut sockets: Vec<PathBuf> = named.into_iter().collect();
    sockets.extend(["/var/run/docker.sock", "/run/podman/podman.sock"].map(PathBuf::from));
    if let Some(folder) = std::env::var_os("XDG_RUNTIME_DIR") {
        sockets.push(PathBuf::from(folder).join("podman/podman.sock"));
    }
    sockets
}

/// True for an answer with a container that has ended and was not tidied up yet: Podman calls it `stopped`, which Docker's API does not
/// know and the client cannot read. It passes.
pub(super) fn is_between(error: &bollard::errors::Error) -> bool {
    matches!(error, bollard::errors::Error::JsonDataError { message, .. } if message.contains("`stopped`"))
}

/// True when the service says that there is no such thing.
pub(super) fn is_absent(error: &bollard::errors::Error) -> bool {
    matches!(error, bollard::errors::Error::DockerResponseServerError { status_code: 404, .. })
}
