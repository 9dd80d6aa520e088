//! The folder of a demo: data directories, vault, configuration and passphrase.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pgvault_core::config::{self, Config};
use pgvault_core::crypto::slot::Wrap;
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, ControlFile};
use pgvault_core::restore::RestoreCommand;
use pgvault_core::store::{Settings, Store};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::process::{Account, Install, Server};
use tempfile::TempDir;

const CLUSTER: &str = "demo";

/// Runs what blocks.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}

/// Where the engine finds a server. Nothing of the caller's environment takes part.
pub(super) fn connection(server: &Server) -> Result<ConnInfo> {
    ConnInfo::parse(&server.conninfo(), &|_| None)
}

/// Stops a server and removes its socket folder.
pub(super) async fn end(server: Server) -> Result<()> {
    blocking(move || {
        drop(server);
        Ok(())
    })
    .await
}

/// A folder that the servers' account owns and only it and root can enter.
pub(super) struct Workspace {
    folder: TempDir,
    account: Account,
}

impl Workspace {
    pub(super) fn create() -> Result<Self> {
        let account = Account::unprivileged()?;
        let wanted = std::env::temp_dir();
        let parent = if account.check_can_reach(&wanted.join("x")).is_ok() { wanted } else { PathBuf::from("/tmp") };
        let folder = tempfile::Builder::new()
            .prefix("pgvault-demo-")
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&parent)
            .map_err(|e| Error::io("create a folder in", &parent, e))?;
        account.own(folder.path())?;
        Ok(Self { folder, account })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// The original cluster.
    pub(super) fn pgdata(&self) -> PathBuf {
        self.path().join("original")
    }

    /// The restored cluster.
    pub(super) fn restored(&self) -> PathBuf {
        self.path().join("restored")
    }

    fn vault(&self) -> PathBuf {
        self.path().join("vault")
    }

    fn configuration(&self) -> PathBuf {
        self.path().join("pgvault.toml")
    }

    /// Makes the original cluster and starts it.
    pub(super) async fn start_server(&self, install: &Install) -> Result<Server> {
        let builder = Server::builder(install).pgdata(self.pgdata());
        blocking(move || Ok(builder.start()?)).await
    }

    /// Writes the configuration and does what `pgvault init` does.
    pub(super) async fn init(&self, server: &Server) -> Result<Cluster> {
        let passphrase = self.path().join("passphrase");
        let random = u128::from_le_bytes(Env::default().random()?);
        self.write(&passphrase, &format!("{random:032x}\n"))?;
        self.write(&self.configuration(), &self.configuration_text(&passphrase, &server.conninfo()))?;
        let config = self.config()?;
        let control = server.pgdata().join("global/pg_control");
        let bytes = fs::read(&control).map_err(|e| Error::io("read", &control, e))?;
        let control = ControlFile::parse(&bytes).map_err(|e| Error::new(ErrorKind::Source, "source.control", e.to_string()))?;
        let name = ClusterName::new(CLUSTER, control.system_identifier)?;
        let (vault, _) = Vault::create(Store::open(&config.vault.url, Settings::default())?, Env::default()).await?;
        let key = config.vault.passphrase_source().map(|source| source.read()).transpose()?;
        let _ = vault.create_cluster(&name, &key.map(Wrap::Passphrase).into_iter().collect::<Vec<_>>()).await?;
        vault.unlock(&name, &config.vault.unlock()?).await
    }

    fn configuration_text(&self, passphrase: &Path, conninfo: &str) -> String {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let path = |path: &Path| quoted(&path.to_string_lossy());
        format!(
            "[vault]\nurl = {}\npassphrase_file = {}\n\n[cluster.{CLUSTER}]\nconnection = {}\npgdata = {}\n",
            quoted(&format!("file://{}", self.vault().display())),
            path(passphrase),
            quoted(conninfo),
            path(&self.pgdata()),
        )
    }

    fn config(&self) -> Result<Config> {
        config::load(Some(&self.configuration()), std::iter::empty())
    }

    /// How the restored server calls this program, as its own account.
    pub(super) fn restore_command(&self, cluster: &Cluster) -> Result<RestoreCommand> {
        let exe = std::env::current_exe()
            .map_err(|e| Error::new(ErrorKind::Failed, "io", format!("find the path of this program: {e}")))?;
        let program = if self.account.check_can_reach(&exe).is_ok() {
            exe
        } else {
            // Built by root in root's home, for example.
            let copy = self.path().join("pgvault");
            let _ = fs::copy(&exe, &copy).map_err(|e| Error::io("copy this program to", &copy, e))?;
            self.account.own(&copy)?;
            copy
        };
        let config = ["--config".to_owned(), self.configuration().to_string_lossy().into_owned()];
        let arguments = vec!["--cluster".into(), CLUSTER.into(), "--system-id".into(), cluster.name().system_id.to_string()];
        // Settings of a real vault in the environment would win over the file.
        let ours = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).filter(|name| name.starts_with("PGVAULT_"));
        let mut unset: Vec<String> = ours.flat_map(|name| ["-u".to_owned(), name]).collect();
        if unset.is_empty() {
            return Ok(RestoreCommand { program, global_arguments: config.into(), arguments });
        }
        unset.push(program.to_string_lossy().into_owned());
        unset.extend(config);
        Ok(RestoreCommand { program: "/usr/bin/env".into(), global_arguments: unset, arguments })
    }

    /// Lets the restored server read the vault, whatever this process's umask.
    pub(super) fn hand_over_vault(&self) -> Result<()> {
        Ok(self.account.own(&self.vault())?)
    }

    fn write(&self, path: &Path, text: &str) -> Result<()> {
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| Error::io("create", path, e))?;
        file.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e))?;
        Ok(self.account.own(path)?)
    }

    /// Leaves the folder where it is.
    pub(super) fn keep(self) -> PathBuf {
        self.folder.keep()
    }

    /// Removes everything.
    pub(super) fn remove(self) -> Result<()> {
        let path = self.folder.keep();
        let mut attempts = 10;
        loop {
            match fs::remove_dir_all(&path) {
                Ok(()) => return Ok(()),
                // An interrupted upload may still be ending.
                Err(_) if attempts > 0 => {
                    attempts -= 1;
                    std::thread::sleep(std::time::Duration::from_millis(200));
                }
                Err(e) => return Err(Error::io("remove", &path, e)),
            }
        }
    }
}
