//! Restored data directories, started without a trace in them and without a way out of them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::server::{Launch, Server};
use super::{Account, Error, Install, Result, io_error, run, without_libpq_environment};
use crate::isolation;

/// Describes how to start a restored data directory.
#[derive(Debug, Clone)]
pub struct Adopt {
    install: Install,
    pgdata: PathBuf,
    options: Vec<(String, String)>,
    user: String,
    tcp: bool,
    port: Option<u16>,
    timeout: Duration,
    folder_in: Option<PathBuf>,
}

impl Adopt {
    pub(super) fn new(install: &Install, pgdata: PathBuf) -> Self {
        Self {
            install: install.clone(),
            pgdata,
            options: Vec::new(),
            user: "postgres".to_owned(),
            tcp: false,
            port: None,
            timeout: Duration::from_secs(60),
            folder_in: None,
        }
    }

    /// A setting that wins over the restored configuration and over the isolation.
    #[must_use]
    pub fn option(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.push((name.into(), value.into()));
        self
    }

    /// The name of the cluster's superuser; `postgres` unless said otherwise.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = user.into();
        self
    }

    /// Listens on 127.0.0.1 as well; there, clients need the passwords they had on the original.
    #[must_use]
    pub fn tcp(mut self, on: bool) -> Self {
        self.tcp = on;
        self
    }

    /// Keeps its socket and its log in a folder of its own in this one, unless the path would be too long for a socket.
    #[must_use]
    pub fn folder_in(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder_in = Some(folder.into());
        self
    }

    /// Uses this port, instead of a free one.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// How long starting and stopping may take; a minute unless said otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Starts the server and waits until it accepts connections. For a directory that still has WAL to replay,
    /// [`launch`](Self::launch) is the better choice: how long that takes has nothing to do with starting.
    ///
    /// # Errors
    ///
    /// With the end of the server's log.
    pub fn start(self) -> Result<Server> {
        let mut server = self.prepare()?;
        server.start()?;
        Ok(server)
    }

    /// Starts the server and returns at once; go on with [`Server::wait_until_paused_or_promoted`].
    ///
    /// # Errors
    ///
    /// When the directory cannot be a server's, or the program cannot be started.
    pub fn launch(self) -> Result<Server> {
        let mut server = self.prepare()?;
        server.launch()?;
        Ok(server)
    }

    fn prepare(self) -> Result<Server> {
        let pgdata = std::path::absolute(&self.pgdata).map_err(io_error("resolve", &self.pgdata))?;
        let version = pgdata.join("PG_VERSION");
        let found = fs::read_to_string(&version).map_err(io_error("read", &version))?.trim().to_owned();
        let wanted = self.install.version().major();
        if found != wanted.to_string() {
            return Err(Error::Version { pgdata, found, bin: self.install.bin().to_path_buf(), wanted });
        }
        let account = Account::owner_of(&pgdata)?;
        account.check_can_reach(&pgdata)?;
        if is_roots(&pgdata)? {
            hand_over(&account, &pgdata)?;
        }
        let mut launch = Launch::new(self.install, account, self.timeout, self.folder_in.as_deref())?;
        let hba = launch.write("pg_hba.conf", isolation::HBA)?;
        let ident = launch.write("pg_ident.conf", "")?;
        if !pgdata.join("postgresql.conf").is_file() {
            // Debian keeps the configuration outside of the data directory, where a physical backup does not see it.
            let text = minimal_configuration(&launch, &pgdata);
            let file = launch.write("postgresql.conf", &text)?;
            launch.options.push(("config_file".to_owned(), file.display().to_string()));
        }
        // A configuration that was restored together with the data may name the original's directory.
        for (name, path) in [("data_directory", &pgdata), ("hba_file", &hba), ("ident_file", &ident)] {
            launch.options.push((name.to_owned(), path.display().to_string()));
        }
        launch.options.extend(isolation::SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())));
        launch.options.extend(self.options);
        launch.user = self.user;
        launch.tcp = self.tcp;
        launch.fixed_port = self.port;
        Ok(Server::new(launch, pgdata))
    }
}

fn is_roots(path: &Path) -> Result<bool> {
    Ok(fs::metadata(path).map_err(io_error("read the owner of", path))?.uid() == 0)
}

/// A restore by root leaves files of root, tablespaces included. What a tablespace link points to is handed over only
/// when it is root's as well: then no server can be running on it.
///
/// # Errors
/// When a file cannot be given away.
pub(crate) fn hand_over(account: &Account, pgdata: &Path) -> Result<()> {
    account.own(pgdata)?;
    let links = pgdata.join("pg_tblspc");
    let Ok(entries) = fs::read_dir(&links) else { return Ok(()) };
    for entry in entries {
        let link = entry.map_err(io_error("list", &links))?.path();
        let target = fs::canonicalize(&link).map_err(io_error("follow", &link))?;
        if is_roots(&target)? {
            account.own(&target)?;
        }
    }
    Ok(())
}

/// A configuration for a directory without one, as large as the control file demands.
fn minimal_configuration(launch: &Launch, pgdata: &Path) -> String {
    let said = launch.install.program("pg_controldata").and_then(|program| {
        let mut command = Command::new(program);
        command.arg("-D").arg(pgdata).env("LC_ALL", "C").current_dir(launch.folder());
        run(launch.account.apply(without_libpq_environment(&mut command)))
    });
    isolation::minimal_configuration(&said.unwrap_or_default())
}
