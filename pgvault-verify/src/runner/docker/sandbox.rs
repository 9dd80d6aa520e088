//! What a container of a drill is allowed: nothing but to run its program on the copy.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::models::{ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, RestartPolicy, RestartPolicyNameEnum};
use pgvault_core::{Error, ErrorKind, Result};

use super::client::Engine;
use super::container::{Container, Said};
use super::leftovers::Mark;
use super::text;

/// Bytes of `/dev/shm`: parallel workers of a query pass their rows there, and those of a whole drill fit.
const SHARED_MEMORY: i64 = 256 * 1024 * 1024;

/// Folders that programs expect to be able to write to; in memory, and empty.
const SCRATCH: [&str; 2] = ["/tmp", "/run"];

/// `noexec` is among Docker's own: said for Podman's sake.
const SCRATCH_OPTIONS: &str = "rw,nosuid,nodev,noexec,size=64m,mode=1777";

/// What it may use of the machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes.
    pub(super) memory: Option<u64>,
    pub(super) processes: u32,
}

/// The description of a container.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    image: String,
    user: (u32, u32),
    limits: Limits,
    user_namespace: Option<&'static str>,
    hidden: Vec<String>,
    name: Option<String>,
    labels: HashMap<String, String>,
    search: Option<String>,
    seen: Vec<PathBuf>,
    folder: Option<PathBuf>,
    command: Vec<String>,
}

impl Sandbox {
    /// Of an image, for a user and a group of this machine.
    pub(super) fn new(image: &str, user: (u32, u32), limits: Limits) -> Self {
        Self {
            image: image.to_owned(),
            user,
            limits,
            user_namespace: None,
            hidden: Vec::new(),
            name: None,
            labels: HashMap::new(),
            search: None,
            seen: Vec::new(),
            folder: None,
            command: Vec::new(),
        }
    }

    /// For a service whose containers would know this user by another number.
    pub(super) fn in_user_namespace(mut self, name: Option<&'static str>) -> Self {
        self.user_namespace = name;
        self
    }

    /// Volumes that the image declares: a container would get an empty one of each, on disk and to be removed.
    pub(super) fn hiding(mut self, volumes: &[String]) -> Self {
        self.hidden = volumes.to_vec();
        self
    }

    pub(super) fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    pub(super) fn marked(mut self, mark: &Mark) -> Self {
        self.labels.clone_from(&mark.labels);
        self
    }

    /// The search path for programs.
    pub(super) fn searching(mut self, path: &str) -> Self {
        self.search = Some(path.to_owned());
        self
    }

    /// Shows a folder of this machine, under its own path.
    ///
    /// # Errors
    /// When the API has no way to name it.
    pub(super) fn seeing(mut self, folder: &Path) -> Result<Self> {
        if text(folder)?.contains(':') {
            let message = format!("{} has a colon in its name, which Docker takes for the end of a path", folder.display());
            return Err(Error::new(ErrorKind::Usage, "drill.path", message).with_hint("restore the copy into another folder"));
        }
        if !folder.is_absolute() {
            let message = format!("{} is not an absolute path, which Docker asks for", folder.display());
            return Err(Error::new(ErrorKind::Usage, "drill.path", message));
        }
        // One in another is seen with it.
        if !self.seen.iter().any(|seen| folder.starts_with(seen)) {
            self.seen.push(folder.to_path_buf());
        }
        Ok(self)
    }

    pub(super) fn working_in(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_path_buf());
        self
    }

    pub(super) fn running(mut self, program: &str, arguments: &[String]) -> Self {
        self.command = vec![program.to_owned()];
        self.command.extend_from_slice(arguments);
        self
    }

    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Runs it, removes it and gives what it said.
    ///
    /// # Errors
    /// When it cannot be run, or takes longer than `limit`.
    pub(super) async fn to_its_end(&self, engine: &Engine, limit: Duration) -> Result<Said> {
        let mut container = Container::created(engine, self).await?;
        let said = container.to_its_end(limit).await;
        container.remove().await?;
        said
    }

    /// As the API wants it.
    pub(super) fn body(&self) -> ContainerCreateBody {
        let binds: Vec<String> = self
            .seen
            .iter()
            // `Z`: where SELinux watches, these files are given to this container. Elsewhere it says nothing.
            .map(|folder| format!("{0}:{0}:Z", folder.display()))
            .collect();
        let hidden =
            self.hidden.iter().map(String::as_str).filter(|volume| !self.seen.iter().any(|seen| seen == Path::new(volume)));
        let scratch = SCRATCH.into_iter().chain(hidden).map(|folder| (folder.to_owned(), SCRATCH_OPTIONS.to_owned())).collect();
        let memory = self.limits.memory.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        let host = HostConfig {
            binds: Some(binds),
            tmpfs: Some(scratch),
            network_mode: Some("none".to_owned()),
            readonly_rootfs: Some(true),
            privileged: Some(false),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges".to_owned()]),
            memory,
            // The same: none of it is swapped out.
            memory_swap: memory,
            pids_limit: Some(i64::from(self.limits.processes)),
            shm_size: Some(SHARED_MEMORY),
            userns_mode: self.user_namespace.map(str::to_owned),
            restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
            // Whatever the service's own is, which may be one that cannot be read; and a long recovery logs every segment.
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                config: Some(HashMap::from([("max-size".to_owned(), "16m".to_owned())])),
            }),
            ..HostConfig::default()
        };
        let mut environment = vec!["HOME=/tmp".to_owned()];
        environment.extend(self.search.iter().map(|path| format!("PATH={path}")));
        let (program, arguments) = self.command.split_first().map_or((None, None), |(program, rest)| (Some(program), Some(rest)));
        ContainerCreateBody {
            image: Some(self.image.clone()),
            user: Some(format!("{}:{}", self.user.0, self.user.1)),
            entrypoint: program.map(|program| vec![program.clone()]),
            cmd: arguments.map(<[String]>::to_vec),
            env: Some(environment),
            working_dir: self.folder.as_ref().map(|folder| folder.display().to_string()).or_else(|| Some("/".to_owned())),
            labels: Some(self.labels.clone()),
            network_disabled: Some(true),
            // For whoever stops it by hand: an orderly shutdown that does not wait for clients.
            stop_signal: Some("SIGINT".to_owned()),
            // An image's own would be run beside the server.
            healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
            attach_stdin: Some(false),
            open_stdin: Some(false),
            tty: Some(false),
            host_config: Some(host),
            ..ContainerCreateBody::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_allowed_nothing_but_its_folders() {
        let limits = Limits { memory: Some(1 << 30), processes: 100 };
        let sandbox = Sandbox::new("sha256:1", (7, 8), limits)
            .hiding(&["/var/lib/postgresql/data".to_owned(), "/srv/site".to_owned()])
            .searching("/bin")
            .seeing(Path::new("/srv/site"))
            .unwrap()
            .seeing(Path::new("/srv/site/pgvault-1"))
            .unwrap()
            .seeing(Path::new("/tmp/pgvault-2"))
            .unwrap()
            .running("postgres", &["-D".to_owned(), "/srv/site/data".to_owned()]);
        let body = sandbox.body();
        assert_eq!(body.user.as_deref(), Some("7:8"));
        assert_eq!(body.entrypoint, Some(vec!["postgres".to_owned()]));
        assert_eq!(body.cmd, Some(vec!["-D".to_owned(), "/srv/site/data".to_owned()]));
        let host = body.host_config.unwrap();
        assert_eq!(host.binds.unwrap(), ["/srv/site:/srv/site:Z", "/tmp/pgvault-2:/tmp/pgvault-2:Z"]);
        let mut scratch: Vec<_> = host.tmpfs.unwrap().into_keys().collect();
        scratch.sort();
        assert_eq!(scratch, ["/run", "/tmp", "/var/lib/postgresql/data"]);
        assert_eq!((host.memory, host.memory_swap, host.pids_limit), (Some(1 << 30), Some(1 << 30), Some(100)));
        assert_eq!((host.network_mode.as_deref(), host.readonly_rootfs, host.privileged), (Some("none"), Some(true), Some(false)));
        assert_eq!(host.cap_drop.unwrap(), ["ALL"]);
        assert_eq!(host.security_opt.unwrap(), ["no-new-privileges"]);
        assert_eq!(host.userns_mode, None);

        let kept = Sandbox::new("x", (7, 8), Limits { memory: None, processes: 1 })
            .in_user_namespace(Some("keep-id"))
            .body()
            .host_config
            .unwrap();
        assert_eq!((kept.userns_mode.as_deref(), kept.memory, kept.memory_swap), (Some("keep-id"), None, None));

        assert!(sandbox.clone().seeing(Path::new("work")).unwrap_err().to_string().contains("work is not an absolute path"));
        let error = sandbox.seeing(Path::new("/srv/a:b")).unwrap_err();
        assert!(error.to_string().contains("/srv/a:b has a colon"), "{error}");
    }
}
