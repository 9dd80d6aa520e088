//! One database of Odoo with its filestore.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pgvault_core::clock::{Clock, FixedClock};
use pgvault_core::postgres::{ConnInfo, Connection, Mode};
use pgvault_core::{Error, ErrorKind, Result};

use crate::filestore::Filestore;
use crate::ledger::Ledger;
use crate::pause::{Monitor, Pause};
use crate::series::Series;
use crate::worker::Worker;

/// What can be set apart from the series.
#[derive(Debug, Clone)]
pub struct Rules {
    /// How long the garbage collection until 19 waits for its lock; 10 s in Odoo. Real time.
    pub lock_timeout: Duration,
    /// How old a mark must be for the garbage collection of the 20 series; 1800 s in Odoo. By the injected clock.
    pub grace: SignedDuration,
    /// How many names the garbage collection looks up at once; 1000 in Odoo.
    pub gc_chunk: usize,
    /// Whether a writer marks a name before it looks whether the content is there. No series does: the mark comes after the early
    /// return for a content that is there, and so a collection of the 20 series can remove what somebody just refers to anew.
    pub marks_existing: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            lock_timeout: Duration::from_secs(10),
            grace: SignedDuration::from_secs(1800),
            gc_chunk: 1000,
            marks_existing: false,
        }
    }
}

struct Inner {
    /// libpq's keywords, without the database.
    server: String,
    name: String,
    data_dir: PathBuf,
    series: Series,
    rules: Rules,
    filestore: Filestore,
    ledger: Ledger,
    clock: Arc<FixedClock>,
    monitor: Monitor,
    /// Connections that nobody uses: a new one costs as much as a whole transaction of a hundred statements.
    pool: Arc<Mutex<Vec<Connection>>>,
}

/// A running Odoo: a database, its filestore, its time. Clones are the same one.
#[derive(Clone)]
pub struct Odoo(Arc<Inner>);

impl fmt::Debug for Odoo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Odoo").field("name", &self.0.name).field("series", &self.0.series).finish_non_exhaustive()
    }
}

/// Where a database of this name is, in the form that [`Connection::connect`] takes.
pub(crate) fn connection_to(server: &str, database: &str) -> Result<ConnInfo> {
    let quoted = database.replace('\\', "\\\\").replace('\'', "\\'");
    ConnInfo::parse(&format!("{server} dbname='{quoted}'"), &|_| None)
        .map_err(|error| Error::new(ErrorKind::Usage, "source.conninfo", error.to_string()))
}

impl Odoo {
    /// Odoo on a database that is there, made by [`schema::create`](crate::schema::create) or restored.
    ///
    /// `server` is a connection string in libpq's keywords, without a database. What lies in the filestore already counts as having been
    /// there from the beginning.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn open(server: &str, name: &str, data_dir: &Path, series: Series, rules: Rules) -> Result<Self> {
        let monitor = Monitor::new(Connection::connect(&connection_to(server, name)?, Mode::Sql).await?);
        Self::assemble(server, name, data_dir, series, rules, monitor, Arc::default())
    }

    fn assemble(
        server: &str,
        name: &str,
        data_dir: &Path,
        series: Series,
        rules: Rules,
        monitor: Monitor,
        pool: Arc<Mutex<Vec<Connection>>>,
    ) -> Result<Self> {
        let ledger = Ledger::new(series);
        let filestore = Filestore::new(data_dir.join("filestore").join(name), series, ledger.clone());
        filestore.observe_all()?;
        // Any moment; later than the rows of the schema.
        let clock = Arc::new(FixedClock::new(Timestamp::constant(1_780_000_000, 0)));
        let (server, name, data_dir) = (server.to_owned(), name.to_owned(), data_dir.to_path_buf());
        Ok(Self(Arc::new(Inner { server, name, data_dir, series, rules, filestore, ledger, clock, monitor, pool })))
    }

    /// The name of the database.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The folder that holds the filestores of all databases.
    pub fn data_dir(&self) -> &Path {
        &self.0.data_dir
    }

    /// Its series.
    pub fn series(&self) -> Series {
        self.0.series
    }

    /// What was set.
    pub fn rules(&self) -> &Rules {
        &self.0.rules
    }

    /// Its files.
    pub fn filestore(&self) -> &Filestore {
        &self.0.filestore
    }

    /// What happened so far.
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    /// Its time, by which marks and rows are dated.
    pub fn clock(&self) -> &Arc<FixedClock> {
        &self.0.clock
    }

    /// Who waits for locks in the database.
    pub fn monitor(&self) -> &Monitor {
        &self.0.monitor
    }

    /// The server, as [`open`](Self::open) takes it.
    pub fn server(&self) -> &str {
        &self.0.server
    }

    /// The time.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// Lets time pass.
    pub fn advance(&self, by: SignedDuration) {
        self.0.clock.set(self.now().saturating_add(by).unwrap_or_else(|_| self.now()));
    }

    /// How to connect to the database.
    ///
    /// # Errors
    /// When the connection string is wrong.
    pub fn conninfo(&self) -> Result<ConnInfo> {
        connection_to(&self.0.server, &self.0.name)
    }

    /// A new connection to the database.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn connect(&self) -> Result<Connection> {
        Connection::connect(&self.conninfo()?, Mode::Sql).await
    }

    /// A worker that is alone: it never waits for its turn.
    ///
    /// # Errors
    /// When the server refuses the connection.
    pub async fn worker(&self) -> Result<Worker> {
        Worker::connect(self, &Pause::alone("worker", &self.0.ledger)).await
    }

    /// Runs the garbage collection, alone.
    ///
    /// # Errors
    /// As [`gc::collect`](crate::gc::collect).
    pub async fn collect(&self) -> Result<crate::gc::Collection> {
        Box::pin(crate::gc::collect(self, &Pause::alone("gc", &self.0.ledger))).await
    }

    /// A connection for a participant, new or used before.
    pub(crate) async fn lease(&self, pause: &Pause) -> Result<Connection> {
        let pooled = self.0.pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match pooled {
            Some(connection) if connection.is_idle() => connection,
            _ => self.connect().await?,
        };
        pause.speaks_through(connection.backend_pid());
        self.0.monitor.know(connection.backend_pid());
        Ok(connection)
    }

    /// Keeps a connection without a transaction for the next participant.
    pub(crate) fn give_back(&self, connection: Connection) {
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    /// Runs SQL and gives the first column of the first row.
    ///
    /// # Errors
    /// When it fails.
    pub async fn ask(&self, sql: &str) -> Result<Option<String>> {
        let sets = self.0.monitor.query(sql).await?;
        let row = sets.last().and_then(|set| set.rows.first());
        Ok(row.map(|row| row.text(0)).transpose()?.flatten().map(str::to_owned))
    }

    /// Empties the table of attachments and the filestore, for the next history, and forgets what happened. Faster than a new database.
    ///
    /// # Errors
    /// When something else uses them.
    pub async fn cleared(self) -> Result<Self> {
        self.0.filestore.remove()?;
        let _ = self.ask("truncate ir_attachment restart identity").await?;
        let it = &self.0;
        Self::assemble(&it.server, &it.name, &it.data_dir, it.series, it.rules.clone(), it.monitor.clone(), it.pool.clone())
    }
}
