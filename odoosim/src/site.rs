//! A PostgreSQL server and a data directory in which several databases of Odoo live, and the manager that makes and removes them.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use pgvault_core::postgres::{Connection, Mode, quote_identifier, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::process::{Install, Server, ServerBuilder};
use tempfile::TempDir;
use tokio::sync::Mutex;
use walkdir::WalkDir;

use crate::ledger::Step;
use crate::odoo::{Odoo, Rules, connection_to};
use crate::pause::Pause;
use crate::schema;
use crate::series::Series;

/// A server for simulations: fast, because it need not survive anything, and with logical decoding.
///
/// # Errors
/// When PostgreSQL is not installed.
pub fn server() -> Result<ServerBuilder> {
    let lines = [
        "fsync = off",
        "full_page_writes = off",
        "wal_level = logical",
        "max_replication_slots = 64",
        "max_wal_senders = 20",
        "max_connections = 200",
        "shared_buffers = 64MB",
        // Nothing but the participants takes locks.
        "autovacuum = off",
        "checkpoint_timeout = '1h'",
        "max_wal_size = '4GB'",
    ];
    let builder = Server::builder(&Install::for_tests()?);
    Ok(lines.into_iter().fold(builder, ServerBuilder::config))
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Site {
    conninfo: String,
    data_dir: PathBuf,
    /// Of these series a template exists.
    templates: Mutex<BTreeSet<Series>>,
    /// Before the folder that its data is in: dropped first.
    server: Option<Server>,
    folder: Option<TempDir>,
}

impl Site {
    /// A site on a throwaway server of its own; gone when it is dropped. Blocks: call it outside of asynchronous code.
    ///
    /// All of it is in memory where there is `/dev/shm`: thousands of histories make millions of small files.
    ///
    /// # Errors
    /// When the server cannot be started or the data directory not be made.
    pub fn start() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let folder = tempfile::Builder::new()
            .prefix("odoosim-")
            // The server's account must reach its data.
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(&parent)
            .map_err(|error| Error::io("create a folder in", &parent, error))?;
        let server = server()?.pgdata(folder.path().join("pgdata")).start()?;
        let mut site = Self::on(&server.conninfo(), &folder.path().join("odoo"));
        site.server = Some(server);
        site.folder = Some(folder);
        Ok(site)
    }

    /// A site on a server that runs, with this data directory. `conninfo` is in libpq's keywords.
    pub fn on(conninfo: &str, data_dir: &Path) -> Self {
        Self {
            conninfo: conninfo.to_owned(),
            data_dir: data_dir.to_path_buf(),
            templates: Mutex::default(),
            server: None,
            folder: None,
        }
    }

    /// The server that was started with the site.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// A folder for other things of the test, on the same file system, of a site that was [started](Self::start).
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(TempDir::path)
    }

    /// How to reach the server: libpq's keywords.
    pub fn conninfo(&self) -> &str {
        &self.conninfo
    }

    /// The folder with `filestore/`.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    async fn maintenance(&self, sql: &str) -> Result<()> {
        let mut connection = Connection::connect(&connection_to(&self.conninfo, "postgres")?, Mode::Sql).await?;
        let result = connection.simple_query(sql).await.map(drop);
        connection.close().await;
        result
    }

    /// Ends all sessions of a database, as the manager does before it touches one.
    async fn disconnect(&self, name: &str) -> Result<()> {
        // Waits up to a minute for each: a session that still ends would be in the way.
        let sql = format!("select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = {}", quote_literal(name));
        self.maintenance(&sql).await
    }

    fn filestore_of(&self, name: &str) -> PathBuf {
        self.data_dir.join("filestore").join(name)
    }

    /// Makes a database with the tables and rows of [`schema`], and no attachment.
    ///
    /// # Errors
    /// When there is one of that name, or PostgreSQL refuses.
    pub async fn create(&self, name: &str, series: Series, rules: Rules) -> Result<Odoo> {
        let template = format!("odoosim_template_{}", series.major());
        let mut templates = self.templates.lock().await;
        if !templates.contains(&series) {
            self.maintenance(&format!("create database {template} template template0")).await?;
            let mut connection = Connection::connect(&connection_to(&self.conninfo, &template)?, Mode::Sql).await?;
            let _ = connection.simple_query(&schema::create(series)).await?;
            connection.close().await;
            self.disconnect(&template).await?;
            let _ = templates.insert(series);
        }
        self.maintenance(&format!("create database {} template {template}", quote_identifier(name))).await?;
        drop(templates);
        // The identity of a database is its own, not its template's.
        let mut connection = Connection::connect(&connection_to(&self.conninfo, name)?, Mode::Sql).await?;
        let _ = connection
            .simple_query(
                "update ir_config_parameter set value = gen_random_uuid()::text where key in ('database.uuid', 'database.secret')",
            )
            .await?;
        connection.close().await;
        Odoo::open(&self.conninfo, name, &self.data_dir, series, rules).await
    }

    /// Drops a database through the manager: its sessions, itself, then at once its whole filestore.
    ///
    /// # Errors
    /// When PostgreSQL or the disk refuses.
    pub async fn drop_database(&self, odoo: &Odoo, pause: &Pause) -> Result<()> {
        self.disconnect(odoo.name()).await?;
        let _: Step = pause.here("drop the database").await;
        self.maintenance(&format!("drop database {}", quote_identifier(odoo.name()))).await?;
        let _: Step = pause.here("remove the filestore").await;
        odoo.filestore().remove()
    }

    /// Renames a database through the manager: the database, then its filestore. Its identity stays. What was recorded about the old
    /// name stays with the old handle, whose connection is gone.
    ///
    /// # Errors
    /// When PostgreSQL or the disk refuses.
    pub async fn rename_database(&self, odoo: &Odoo, to: &str, pause: &Pause) -> Result<Odoo> {
        self.disconnect(odoo.name()).await?;
        let _: Step = pause.here("rename the database").await;
        let sql = format!("alter database {} rename to {}", quote_identifier(odoo.name()), quote_identifier(to));
        self.maintenance(&sql).await?;
        let _: Step = pause.here("move the filestore").await;
        let (old, new) = (self.filestore_of(odoo.name()), self.filestore_of(to));
        if old.exists() {
            fs::rename(&old, &new).map_err(|error| Error::io("rename", &old, error))?;
        }
        Odoo::open(&self.conninfo, to, &self.data_dir, odoo.series(), odoo.rules().clone()).await
    }

    /// Duplicates a database through the manager: the database, a new identity, its neutralisation if wanted, then a copy of the
    /// filestore. Returns the original, connected anew, and the copy.
    ///
    /// # Errors
    /// When PostgreSQL or the disk refuses, or the copy has a filestore already.
    pub async fn duplicate_database(&self, odoo: &Odoo, to: &str, neutralize: bool, pause: &Pause) -> Result<(Odoo, Odoo)> {
        self.disconnect(odoo.name()).await?;
        let _: Step = pause.here("copy the database").await;
        let sql = format!("create database {} template {}", quote_identifier(to), quote_identifier(odoo.name()));
        self.maintenance(&sql).await?;
        let _: Step = pause.here("renew the identity").await;
        let mut connection = Connection::connect(&connection_to(&self.conninfo, to)?, Mode::Sql).await?;
        let _ = connection.simple_query(schema::NEW_IDENTITY).await?;
        if neutralize {
            let _: Step = pause.here("neutralize").await;
            let _ = connection.simple_query(&schema::neutralize(odoo.series())).await?;
        }
        connection.close().await;
        let _: Step = pause.here("copy the filestore").await;
        copy_tree(&self.filestore_of(odoo.name()), &self.filestore_of(to))?;
        let open = |name: &str| {
            let (name, rules) = (name.to_owned(), odoo.rules().clone());
            async move { Odoo::open(&self.conninfo, &name, &self.data_dir, odoo.series(), rules).await }
        };
        Ok((open(odoo.name()).await?, open(to).await?))
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    if !from.exists() {
        return Ok(());
    }
    if to.exists() {
        let message = format!("{} exists already", to.display());
        return Err(Error::new(ErrorKind::Conflict, "odoo.filestore_exists", message).with_hint("remove it, or use another name"));
    }
    for entry in WalkDir::new(from) {
        let entry = entry.map_err(|error| Error::io("list", from, error.into()))?;
        let Ok(below) = entry.path().strip_prefix(from) else { continue };
        let target = to.join(below);
        let copied =
            if entry.file_type().is_dir() { fs::create_dir_all(&target) } else { fs::copy(entry.path(), &target).map(drop) };
        copied.map_err(|error| Error::io("copy to", &target, error))?;
    }
    Ok(())
}
