//! One database of a restored cluster, into another server.
//!
//! `pg_dump` writes to a pipe that `pg_restore` reads: nothing lies on a disk in between. What the database is made with (encoding,
//! collation) is what it had. Owners and rights are those of whoever restores, because the roles of one cluster need not be in another.

use std::process::Stdio;

use pgvault_core::postgres::{ConnInfo, Connection, Mode, quote_identifier, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::side::Promoted;
use serde_json::Value;
use tokio::process::Command;

use crate::commands::libpq::{said, words};

/// Where a database goes.
#[derive(Debug)]
pub(super) struct Destination {
    /// The server.
    pub(super) connection: ConnInfo,
    /// What the database is called there.
    pub(super) name: String,
}

impl Destination {
    /// Makes sure that the server has no such database, and gives the server's major version.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] with the code `restore.database_exists` when it has, and when it cannot be asked.
    pub(super) async fn ensure_free(&self) -> Result<u32> {
        let mut sql = self.connect().await?;
        let major = sql.server_major()?;
        let statement = format!("SELECT count(*) FROM pg_catalog.pg_database WHERE datname = {}", quote_literal(&self.name));
        let count = sql.query_one(&statement).await?;
        sql.close().await;
        if count.required(0)? == "0" { Ok(major) } else { Err(self.exists()) }
    }

    fn exists(&self) -> Error {
        let why = format!("the server already has a database `{}`, and nothing is restored over one", self.name);
        Error::new(ErrorKind::Usage, "restore.database_exists", why).with_hint("give the copy another name: --as NEWNAME")
    }

    /// Makes the database and fills it from that of the copy; one that cannot be filled is dropped again.
    ///
    /// # Errors
    /// When it exists, cannot be made, or one of the programs fails.
    pub(super) async fn take(&self, promoted: &Promoted, database: &str) -> Result<()> {
        let properties = properties(promoted, database).await?;
        let mut sql = self.connect().await?;
        let create = format!("CREATE DATABASE {} TEMPLATE template0 {properties}", quote_identifier(&self.name));
        if let Err(error) = sql.simple_query(&create).await {
            // Somebody was faster than the restore.
            let there = self.ensure_free().await;
            return Err(there.err().unwrap_or(error).context("create the database"));
        }
        let filled = self.fill(promoted, database).await;
        if filled.is_err() {
            let dropped = sql.simple_query(&format!("DROP DATABASE {} WITH (FORCE)", quote_identifier(&self.name))).await;
            if let Err(error) = dropped {
                tracing::warn!(%error, database = self.name, "the database that could not be filled was not dropped");
            }
        }
        sql.close().await;
        filled
    }

    async fn fill(&self, promoted: &Promoted, database: &str) -> Result<()> {
        let failed = |what: &str, e: std::io::Error| Error::new(ErrorKind::Failed, "restore.dump", format!("{what}: {e}"));
        let mut dump = Command::from(promoted.client("pg_dump", database)?);
        // Between two processes on one machine compression is only work.
        let _ = dump.args(["--format=custom", "--compress=0", "--no-password"]);
        let _ = dump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut dumping = dump.spawn().map_err(|e| failed("start `pg_dump`", e))?;
        let pipe: Stdio = match dumping.stdout.take().map(TryInto::try_into) {
            Some(Ok(pipe)) => pipe,
            Some(Err(e)) => return Err(failed("read from `pg_dump`", e)),
            None => return Err(Error::new(ErrorKind::Failed, "restore.dump", "`pg_dump` has no output")),
        };
        let mut load = Command::from(promoted.client("pg_restore", database)?);
        for name in ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE"] {
            let _ = load.env_remove(name);
        }
        let (words, password) = words(&self.connection, &self.name);
        let _ = load.args(["--exit-on-error", "--no-owner", "--no-privileges", "--no-password", "--dbname", &words]);
        if let Some(password) = password {
            let _ = load.env("PGPASSWORD", password);
        }
        let _ = load.stdin(pipe).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let loading = load.spawn().map_err(|e| failed("start `pg_restore`", e))?;
        // Ours would keep the pipe open when `pg_dump` has died.
        drop(load);
        let (dumped, loaded) = tokio::try_join!(dumping.wait_with_output(), loading.wait_with_output())
            .map_err(|e| failed("wait for `pg_dump` and `pg_restore`", e))?;
        // When the reader gives up, the writer complains of that; what the reader says is the reason.
        for (program, output) in [("pg_restore", &loaded), ("pg_dump", &dumped)] {
            if !output.status.success() {
                let why = format!("`{program}` ended with {}: {}", output.status, said(&output.stderr));
                return Err(Error::new(ErrorKind::Failed, "restore.dump", why).with_hint("the database was dropped again"));
            }
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Connection> {
        let dbname = self.connection.dbname.clone().or_else(|| Some("postgres".to_owned()));
        let connection = ConnInfo { dbname, ..self.connection.clone() };
        let mut sql =
            Connection::connect(&connection, Mode::Sql).await.map_err(|e| e.context("connect to the server of --into"))?;
        sql.set_idle_timeout(None);
        Ok(sql)
    }
}

/// What `CREATE DATABASE` needs to make a database of the same kind. Asked as JSON, because the columns differ between versions.
async fn properties(promoted: &Promoted, database: &str) -> Result<String> {
    let mut sql = promoted.connect("postgres").await?;
    let statement = format!(
        "SELECT pg_encoding_to_char(encoding), to_jsonb(d) FROM pg_catalog.pg_database d WHERE datname = {}",
        quote_literal(database)
    );
    let row = sql.query_one(&statement).await?;
    let known: Value = serde_json::from_str(row.required(1)?)
        .map_err(|e| Error::new(ErrorKind::Source, "source.protocol", format!("the server's JSON: {e}")))?;
    let text = |name: &str| known.get(name).and_then(Value::as_str);
    let mut words = vec![format!("ENCODING {}", quote_literal(row.required(0)?))];
    for (keyword, column) in [("LC_COLLATE", "datcollate"), ("LC_CTYPE", "datctype")] {
        words.extend(text(column).map(|value| format!("{keyword} {}", quote_literal(value))));
    }
    let locale = text("datlocale").or_else(|| text("daticulocale"));
    match (text("datlocprovider"), locale) {
        (Some("i"), Some(locale)) => words.push(format!("LOCALE_PROVIDER icu ICU_LOCALE {}", quote_literal(locale))),
        (Some("b"), Some(locale)) => words.push(format!("LOCALE_PROVIDER builtin BUILTIN_LOCALE {}", quote_literal(locale))),
        _ => {}
    }
    sql.close().await;
    Ok(words.join(" "))
}
