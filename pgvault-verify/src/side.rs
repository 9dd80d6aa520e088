//! A restored data directory, started where it lies to be asked and ended again.
//!
//! ```text
//! files are written -> start, isolated -> paused at the target -> asked (which database, which documents)
//!                                                                  |-> leave:   in recovery still; the next start goes to the same target
//!                                                                  '-> promote: open for writing, isolated still -> release
//! ```
//!
//! A drill's copy is thrown away. This one is somebody's: what cuts it off from the world while it is asked ([isolation](crate::process))
//! is given on the command line and leaves with the server, and what the directory says of its recovery stays as it was.
//!
//! A directory that becomes a copy is [sealed](seal()) until it is harmless: nobody else's start of it succeeds.

mod references;
mod seal;
mod stop;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgvault_core::postgres::{ConnInfo, Connection, Mode};
use pgvault_core::restore::plan::{Plan, Stop};
use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill::Point;
use pgvault_core::{Error, ErrorKind, Result};
use tempfile::TempDir;

pub use crate::odoo::{HalfUpgraded, OdooDatabase};
pub use references::{Place, Reference, References};
pub use seal::{is_sealed, seal};

use crate::odoo::identify;
use crate::process::{Account, Install, private_folder};
use crate::recovery::feed::Feed;
use crate::recovery::recover;
use crate::runner::process::ProcessRunner;
use crate::runner::{Needs, Runner, Running, Site};
use crate::task::blocking;

/// How long the server may take to promote, and to stop.
const PATIENCE: Duration = Duration::from_secs(600);

/// How to start a restored directory.
#[derive(Debug, Clone)]
pub struct SideOptions {
    /// Folders with programs of PostgreSQL besides the usual ones.
    pub programs: Vec<PathBuf>,
    /// Where the socket, the log and WAL on its way lie meanwhile; the system's temporary folder when not given.
    pub folder: Option<PathBuf>,
    /// The superuser of the cluster.
    pub user: String,
    /// Settings of the server, as in `postgresql.conf`.
    pub settings: Vec<(String, String)>,
    /// Longest time for replay.
    pub timeout: Duration,
}

impl Default for SideOptions {
    fn default() -> Self {
        Self {
            programs: Vec::new(),
            folder: None,
            user: "postgres".into(),
            settings: Vec::new(),
            timeout: Duration::from_secs(24 * 3600),
        }
    }
}

/// A restored cluster that is paused at its target: it can be read, and not be written.
pub struct Side {
    server: Started,
    reached: Point,
    /// A restart from here would not find the target again; see [`stop`].
    ends_at_checkpoint: bool,
}

/// A copy that was promoted: it can be written, and nobody else reaches it. Dropping it ends the server and leaves the directory sealed.
pub struct Promoted {
    server: Started,
}

/// The server and what it needs as long as it runs. In the order in which they go.
struct Started {
    running: Box<dyn Running>,
    /// Removed when the server has ended, however that came.
    _trace: Trace,
    install: Install,
    pgdata: PathBuf,
    feed: Feed,
    _folder: TempDir,
}

/// What every start leaves in the directory: its command line. `pg_ctl restart` would give the next server the isolation of this one.
struct Trace(PathBuf);

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "the command line of an isolated server was not removed");
        }
    }
}

impl Side {
    /// Starts the server on `pgdata`, which [`restore`](fn@pgvault_core::restore::restore) has written for this plan, and waits until it is
    /// paused at the target. The plan must be [pinned](Plan::pin): at the end of WAL nothing pauses.
    ///
    /// Run by root, the directory is given to the account that is to run the server.
    ///
    /// # Errors
    /// `side.not_pinned`; when the programs are missing; `side.recovery` when the target is not reached, with what kept it from that.
    pub async fn start(cluster: &Cluster, plan: &Plan, pgdata: &Path, options: &SideOptions) -> Result<Self> {
        if plan.stop == Stop::End {
            return Err(Error::new(ErrorKind::Usage, "side.not_pinned", "a server without a target does not pause at its end"));
        }
        let manifest = &plan.snapshot.manifest;
        let mut runner = ProcessRunner::new(options.programs.clone())?;
        runner.prepare(&Needs { major: manifest.major, shared_buffers: 0 }).await?;
        let install = runner.install()?.clone();
        let (directory, parent) = (pgdata.to_path_buf(), options.folder.clone());
        let (account, folder) = blocking(move || {
            let account = Account::owner_of(&directory)?;
            // Files that root has written into a directory of the server's account are still root's.
            crate::process::hand_over(&account, &directory)?;
            let folder = private_folder(&account, parent.as_deref())?;
            Ok((account, folder))
        })
        .await?;
        let owner = (account.uid(), account.gid());
        let feed = Feed::start(cluster, folder.path().join("wal"), manifest.wal_segment_size, plan.wal_end, owner)?;
        let site = Site {
            folder: folder.path().to_path_buf(),
            pgdata: pgdata.to_path_buf(),
            tablespaces: Vec::new(),
            name: String::new(),
            user: options.user.clone(),
        };
        let mut settings = vec![
            // The directory's own would have to find a key as the server's account, which need not be ours.
            ("restore_command".to_owned(), feed.command()),
            ("recovery_target_action".to_owned(), "pause".to_owned()),
            // None by the clock while it is paused: see `stop`.
            ("checkpoint_timeout".to_owned(), "1d".to_owned()),
        ];
        settings.extend(options.settings.iter().cloned());
        let running = runner.start(&site, &settings).await?;
        let mut server = Started {
            running,
            _trace: Trace(pgdata.join("postmaster.opts")),
            install,
            pgdata: pgdata.to_path_buf(),
            feed,
            _folder: folder,
        };
        let recovered = match recover(&mut *server.running, plan, &server.feed, options.timeout).await {
            Ok(recovered) => recovered,
            Err(failed) => {
                tracing::debug!(evidence = %failed.evidence, "recovery beside production failed");
                let directory = server.pgdata.display().to_string();
                server.end().await?;
                return Err(Error::new(ErrorKind::Failed, "side.recovery", format!("recover {directory}: {}", failed.message)));
            }
        };
        recovered.sql.close().await;
        let ends_at_checkpoint = stop::ends_at_checkpoint(plan, pgdata, manifest.wal_segment_size);
        Ok(Self { server, reached: recovered.point, ends_at_checkpoint })
    }

    /// Where recovery has stopped.
    pub fn reached(&self) -> &Point {
        &self.reached
    }

    /// A session in a database. Nothing limits its statements; it cannot write.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn connect(&self, database: &str) -> Result<Connection> {
        self.server.connect(database).await
    }

    /// The databases that can be connected to, but for the templates, by name. One that somebody had begun to drop is none.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn databases(&self) -> Result<Vec<String>> {
        self.server.databases().await
    }

    /// Those of them that are Odoo's, with who they are.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn odoo_databases(&self) -> Result<Vec<OdooDatabase>> {
        self.server.odoo_databases().await
    }

    /// What the attachments of a database refer to.
    ///
    /// # Errors
    /// When the server cannot be asked, or the database has no attachments' table.
    pub async fn references(&self, database: &str) -> Result<References> {
        References::open(self.connect(database).await?).await
    }

    /// Stops the server and leaves the directory in recovery: whoever starts it next recovers to the same target, and goes on as the
    /// directory says.
    ///
    /// # Errors
    /// When it does not stop in ten minutes; it is then ended at once, which loses nothing.
    pub async fn leave(mut self) -> Result<()> {
        if !self.ends_at_checkpoint {
            self.server.running.stop(PATIENCE).await?;
        }
        self.server.end().await
    }

    /// Opens the copy for writing, on a timeline of its own. It is [sealed](seal()) before, and stays so until it is
    /// [released](Promoted::release).
    ///
    /// # Errors
    /// When it cannot be sealed, or does not leave recovery in ten minutes.
    pub async fn promote(self) -> Result<Promoted> {
        let Self { server, .. } = self;
        let directory = server.pgdata.clone();
        blocking(move || seal(&directory)).await?;
        let mut sql = server.connect("postgres").await?;
        let answer = sql.query_one(&format!("SELECT pg_promote(true, {})", PATIENCE.as_secs())).await?;
        if answer.required(0)? != "t" {
            return Err(Error::new(ErrorKind::Failed, "side.promotion", "the copy did not leave recovery in ten minutes"));
        }
        sql.close().await;
        Ok(Promoted { server })
    }
}

impl Promoted {
    /// A session in a database.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn connect(&self, database: &str) -> Result<Connection> {
        self.server.connect(database).await
    }

    /// The databases that can be connected to, but for the templates, by name. One that somebody had begun to drop is none.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn databases(&self) -> Result<Vec<String>> {
        self.server.databases().await
    }

    /// Those of them that are Odoo's, with who they are.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn odoo_databases(&self) -> Result<Vec<OdooDatabase>> {
        self.server.odoo_databases().await
    }

    /// One of PostgreSQL's client programs, of the server's version, with the environment that leads to a database.
    ///
    /// # Errors
    /// When no installation has it.
    pub fn client(&self, program: &str, database: &str) -> Result<Command> {
        let connection = self.server.running.connection();
        let mut command = Command::new(self.server.install.client(program)?);
        let _ = crate::process::without_libpq_environment(&mut command);
        if let Some(endpoint) = connection.endpoints.first() {
            if let pgvault_core::postgres::Host::Unix(folder) = &endpoint.host {
                let _ = command.env("PGHOST", folder);
            }
            let _ = command.env("PGPORT", endpoint.port.to_string());
        }
        let _ = command.env("PGUSER", &connection.user).env("PGDATABASE", database).env("PGCONNECT_TIMEOUT", "10");
        Ok(command)
    }

    /// The programs that it runs with.
    pub fn install(&self) -> &Install {
        &self.server.install
    }

    /// Stops the server and breaks the seal: from now on the directory is a cluster like any other.
    ///
    /// # Errors
    /// When it does not stop in ten minutes, or the seal cannot be broken. The directory is sealed then.
    pub async fn release(mut self) -> Result<()> {
        self.server.running.stop(PATIENCE).await?;
        let directory = self.server.pgdata.clone();
        self.server.end().await?;
        blocking(move || seal::unseal(&directory)).await
    }

    /// Stops the server and leaves the directory sealed.
    ///
    /// # Errors
    /// When it does not stop in ten minutes.
    pub async fn withhold(mut self) -> Result<()> {
        self.server.running.stop(PATIENCE).await?;
        self.server.end().await
    }
}

impl Started {
    async fn connect(&self, database: &str) -> Result<Connection> {
        let connection = ConnInfo { dbname: Some(database.to_owned()), ..self.running.connection() };
        let mut sql = Connection::connect(&connection, Mode::Sql).await?;
        sql.set_idle_timeout(None);
        // What a role or a database has set as its defaults is not meant for us.
        let _ = sql.simple_query("SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET row_security = off; SET search_path = public, pg_catalog").await?;
        Ok(sql)
    }

    async fn databases(&self) -> Result<Vec<String>> {
        let mut sql = self.connect("postgres").await?;
        let mut sets = sql
            .simple_query("SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND datconnlimit <> -2 AND NOT datistemplate ORDER BY datname")
            .await?;
        sql.close().await;
        sets.pop().unwrap_or_default().rows.iter().map(|row| row.required(0).map(ToOwned::to_owned)).collect()
    }

    async fn odoo_databases(&self) -> Result<Vec<OdooDatabase>> {
        let mut found = Vec::new();
        for database in self.databases().await? {
            let mut sql = self.connect(&database).await?;
            found.extend(identify(&mut sql, &database).await?);
            sql.close().await;
        }
        Ok(found)
    }

    /// Ends the server, if it still runs; waits where waiting disturbs nobody.
    async fn end(self) -> Result<()> {
        blocking(move || {
            drop(self);
            Ok(())
        })
        .await
    }
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side").field("pgdata", &self.server.pgdata).field("reached", &self.reached).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Promoted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Promoted").field("pgdata", &self.server.pgdata).finish_non_exhaustive()
    }
}
