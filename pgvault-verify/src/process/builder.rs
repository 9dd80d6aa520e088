//! New clusters.

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::server::{Launch, Server};
use super::{Account, Error, Install, Result, io_error, run, without_libpq_environment};

/// How clients of a new cluster prove who they are.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// Not at all: whoever can enter the socket folder, or reach the TCP port, is the superuser.
    #[default]
    Trust,
    /// By SCRAM-SHA-256 with this password of the superuser.
    Scram(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trust => "Trust",
            Self::Scram(_) => "Scram(..)",
        })
    }
}

/// Describes a new cluster; [`start`](Self::start) makes it.
#[derive(Debug, Clone)]
pub struct ServerBuilder {
    install: Install,
    pgdata: Option<PathBuf>,
    checksums: bool,
    wal_segment_mib: u32,
    locale: String,
    auth: Auth,
    user: String,
    config: Vec<String>,
    initdb: Vec<String>,
    tcp: bool,
    port: Option<u16>,
    timeout: Duration,
}

impl ServerBuilder {
    pub(super) fn new(install: &Install) -> Self {
        Self {
            install: install.clone(),
            pgdata: None,
            checksums: true,
            wal_segment_mib: 16,
            locale: "C.UTF-8".to_owned(),
            auth: Auth::Trust,
            user: "postgres".to_owned(),
            config: Vec::new(),
            initdb: Vec::new(),
            tcp: false,
            port: None,
            timeout: Duration::from_secs(60),
        }
    }

    /// Keeps the data directory here instead of in a temporary folder, and leaves it there when the server is dropped.
    /// It must be missing or empty.
    #[must_use]
    pub fn pgdata(mut self, path: impl Into<PathBuf>) -> Self {
        self.pgdata = Some(path.into());
        self
    }

    /// Page checksums; on unless said otherwise, on every version.
    #[must_use]
    pub fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// The size of a WAL segment, a power of two from 1 to 1024; 16 unless said otherwise.
    #[must_use]
    pub fn wal_segment_mib(mut self, size: u32) -> Self {
        self.wal_segment_mib = size;
        self
    }

    /// The locale of the cluster; `C.UTF-8` unless said otherwise.
    #[must_use]
    pub fn locale(mut self, locale: impl Into<String>) -> Self {
        self.locale = locale.into();
        self
    }

    /// How clients log in.
    #[must_use]
    pub fn auth(mut self, auth: Auth) -> Self {
        self.auth = auth;
        self
    }

    /// The name of the superuser; `postgres` unless said otherwise.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = user.into();
        self
    }

    /// A line of `postgresql.conf`, where a backup of the cluster takes it along.
    #[must_use]
    pub fn config(mut self, line: impl Into<String>) -> Self {
        self.config.push(line.into());
        self
    }

    /// Another argument of `initdb`.
    #[must_use]
    pub fn initdb(mut self, argument: impl Into<String>) -> Self {
        self.initdb.push(argument.into());
        self
    }

    /// Listens on 127.0.0.1 as well as on the socket. With [`Auth::Trust`], every user of the machine is then superuser.
    #[must_use]
    pub fn tcp(mut self, on: bool) -> Self {
        self.tcp = on;
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

    /// Makes the cluster and starts it.
    ///
    /// # Errors
    ///
    /// With what `initdb` or the server said.
    pub fn start(self) -> Result<Server> {
        let mut server = self.create()?;
        server.start()?;
        Ok(server)
    }

    /// Makes the cluster without starting it.
    ///
    /// # Errors
    ///
    /// With what `initdb` said.
    pub fn create(self) -> Result<Server> {
        let account = Account::unprivileged()?;
        let mut launch = Launch::new(self.install.clone(), account.clone(), self.timeout, None)?;
        let pgdata = match self.pgdata {
            Some(pgdata) => {
                let pgdata = std::path::absolute(&pgdata).map_err(io_error("resolve", &pgdata))?;
                account.check_can_reach(&pgdata)?;
                // Made here, because the account may not write where this process may.
                fs::create_dir_all(&pgdata).map_err(io_error("create", &pgdata))?;
                // Looked at before the owner changes: what is in there is not ours to give away.
                if fs::read_dir(&pgdata).map_err(io_error("list", &pgdata))?.next().is_some() {
                    let source = std::io::ErrorKind::DirectoryNotEmpty.into();
                    return Err(Error::Io { doing: "make a cluster in", path: pgdata, source });
                }
                account.own(&pgdata)?;
                pgdata
            }
            None => launch.folder().join("data"),
        };
        let mut initdb = Command::new(self.install.program("initdb")?);
        initdb.arg("-D").arg(&pgdata).arg("-U").arg(&self.user).args(["-N", "-E", "UTF8"]);
        initdb.arg(format!("--locale={}", self.locale)).arg(format!("--wal-segsize={}", self.wal_segment_mib));
        if self.checksums {
            initdb.arg("--data-checksums");
        } else if self.install.version().major() >= 18 {
            initdb.arg("--no-data-checksums");
        }
        let password = match &self.auth {
            Auth::Trust => {
                initdb.args(["-A", "trust"]);
                None
            }
            Auth::Scram(password) => {
                let file = launch.write("password", password)?;
                initdb.args(["-A", "scram-sha-256"]).arg("--pwfile").arg(file);
                Some(password.clone())
            }
        };
        initdb.args(&self.initdb).current_dir(launch.folder());
        run(account.apply(without_libpq_environment(&mut initdb)))?;
        if password.is_some() {
            let file = launch.folder().join("password");
            fs::remove_file(&file).map_err(io_error("remove", &file))?;
        }
        if !self.config.is_empty() {
            let path = pgdata.join("postgresql.conf");
            let mut file = fs::OpenOptions::new().append(true).open(&path).map_err(io_error("open", &path))?;
            file.write_all(format!("{}\n", self.config.join("\n")).as_bytes()).map_err(io_error("write", &path))?;
        }
        launch.user = self.user;
        launch.password = password;
        launch.tcp = self.tcp;
        launch.fixed_port = self.port;
        Ok(Server::new(launch, pgdata))
    }
}
