//! The server that an archive is loaded into.

use std::io::{PipeWriter, Write};
use std::process::Stdio;

use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, Connection, Mode, quote_identifier, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::process::Install;
use tokio::process::Command;

use super::blocking;
use super::script::{Script, can_be_restricted};
use crate::commands::libpq::{said, words};
use crate::output::Printer;

/// The server, and the database that is going to be there.
pub(super) struct Server {
    pub(super) connection: ConnInfo,
    pub(super) database: String,
}

impl Server {
    /// Makes sure that the server has no such database, and gives its major version.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] with the code `import.database_exists` when it has, and when it cannot be asked.
    pub(super) async fn ensure_free(&self) -> Result<u32> {
        let mut sql = self.connect().await?;
        let major = sql.server_major()?;
        let statement = format!("SELECT count(*) FROM pg_catalog.pg_database WHERE datname = {}", quote_literal(&self.database));
        let count = sql.query_one(&statement).await?;
        sql.close().await;
        if count.required(0)? == "0" {
            return Ok(major);
        }
        let why = format!("the server already has a database `{}`, and nothing is loaded over one", self.database);
        Err(Error::new(ErrorKind::Usage, "import.database_exists", why).with_hint("give it another name: --database NEWNAME"))
    }

    /// Makes the database as Odoo makes one: empty, and ordered by code points, which no update of the system's collations changes.
    ///
    /// # Errors
    /// When it cannot be made; it is there then only if somebody else has made it.
    pub(super) async fn create(&self) -> Result<()> {
        let mut sql = self.connect().await?;
        let name = quote_identifier(&self.database);
        let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C'");
        let made = sql.simple_query(&create).await;
        sql.close().await;
        made.map(|_| ()).map_err(|e| e.context("create the database"))
    }

    /// Gives `psql` what `feed` writes. One statement that fails is enough to fail.
    ///
    /// # Errors
    /// `import.dump` with what `psql` says; what `feed` says.
    pub(super) async fn load(
        &self,
        printer: &Printer,
        feed: impl FnOnce(&mut Script<PipeWriter>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let failed = |what: &str, e: std::io::Error| Error::new(ErrorKind::Failed, "import.dump", format!("{what} `psql`: {e}"));
        // The newest there is: it talks to every older server, and knows what dumps of today have in them.
        let program = blocking(|| Ok(Install::find(None, &[]).and_then(|install| install.client("psql"))?)).await?;
        let version = Command::new(&program).arg("--version").output().await.map_err(|e| failed("start", e))?;
        let restricts = can_be_restricted(&String::from_utf8_lossy(&version.stdout));
        let key = restricts.then(|| Env::default().new_id()).transpose()?.map(|id| id.to_string());
        if key.is_none() {
            printer.warn("`psql` is too old to take statements alone: what `dump.sql` tells it to run on this machine, it runs");
        }
        let (words, password) = words(&self.connection, &self.database);
        let (input, out) = std::io::pipe().map_err(|e| failed("make a pipe for", e))?;
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG")) {
                let _ = command.env_remove(name);
            }
        }
        if let Some(password) = password {
            let _ = command.env("PGPASSWORD", password);
        }
        // `-X`: what somebody has in `.psqlrc` is not meant for this.
        let _ = command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "--no-password", "--file=-", "--dbname", &words]);
        let _ = command.stdin(input).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn().map_err(|e| failed("start", e))?;
        // Ours would keep the pipe open when `psql` has died.
        drop(command);
        let work = move || write(out, key.as_deref(), feed);
        let (fed, ended) = tokio::join!(blocking(work), child.wait_with_output());
        let ended = ended.map_err(|e| failed("wait for", e))?;
        // A dump that was cut off looks to `psql` like one that ended.
        fed?;
        if ended.status.success() {
            return Ok(());
        }
        let why = format!("`psql` ended with {}: {}", ended.status, said(&ended.stderr));
        Err(Error::new(ErrorKind::Failed, "import.dump", why)
            .with_hint("`<stdin>:N` is a line of dump.sql, give or take one; the database was dropped again"))
    }

    /// Drops the database that this run has made.
    pub(super) async fn drop_it(&self) {
        let dropped = async {
            let mut sql = self.connect().await?;
            let _ = sql.simple_query(&format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote_identifier(&self.database))).await?;
            sql.close().await;
            Ok::<_, Error>(())
        };
        if let Err(error) = dropped.await {
            tracing::warn!(%error, database = self.database, "the database that could not be loaded was not dropped");
        }
    }

    /// A session in the database.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub(super) async fn connect_to_it(&self) -> Result<Connection> {
        self.connect_as(Some(self.database.clone())).await
    }

    async fn connect(&self) -> Result<Connection> {
        self.connect_as(self.connection.dbname.clone().or_else(|| Some("postgres".to_owned()))).await
    }

    async fn connect_as(&self, dbname: Option<String>) -> Result<Connection> {
        let connection = ConnInfo { dbname, ..self.connection.clone() };
        let mut sql =
            Connection::connect(&connection, Mode::Sql).await.map_err(|e| e.context("connect to the server of --into"))?;
        sql.set_idle_timeout(None);
        Ok(sql)
    }
}

/// Writes the script, and around it what keeps `psql` to statements.
fn write(mut out: PipeWriter, key: Option<&str>, feed: impl FnOnce(&mut Script<PipeWriter>) -> Result<()>) -> Result<()> {
    // A reader that has gone has its own reason, which is not ours to tell.
    let ours = |written: std::io::Result<()>| match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Failed, "import.dump", format!("write to `psql`: {e}")))
        }
        _ => Ok(()),
    };
    if let Some(key) = key {
        ours(writeln!(out, "\\restrict {key}"))?;
    }
    let mut script = Script::new(out);
    feed(&mut script)?;
    let finished = script.finish().and_then(|mut out| key.map_or(Ok(()), |key| writeln!(out, "\n\\unrestrict {key}")));
    ours(finished)
}

/// The version of the module `base`; what was loaded must be a database of Odoo.
///
/// # Errors
/// [`ErrorKind::Unfit`] with the code `import.not_odoo` when it is none.
pub(super) async fn version_of_base(sql: &mut Connection) -> Result<Option<String>> {
    let is_odoo = "SELECT to_regclass('public.ir_module_module') IS NOT NULL AND to_regclass('public.ir_attachment') IS NOT NULL";
    if sql.query_one(is_odoo).await?.required(0)? != "t" {
        return Err(Error::new(ErrorKind::Unfit, "import.not_odoo", "what `dump.sql` makes is no database of Odoo"));
    }
    let row = sql.query_one("SELECT max(latest_version) FROM public.ir_module_module WHERE name = 'base'").await?;
    Ok(row.text(0)?.map(ToOwned::to_owned))
}
