//! One database of a restored cluster, into another server.
//!
//! `pg_dump` writes to a pipe that `pg_restore` reads: nothing lies on a disk in between. What the database is made with (encoding,
//! collation) is what it had. Owners and rights are those of whoever restores, because the roles of one cluster need not be in another.

use std::process::Stdio;

use pgvault_core::postgres::{ConnInfo, Connection, Host, Mode, RootCert, quote_identifier, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::side::Promoted;
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::process::Command;

/// Bytes of a program's complaints that an error shows.
const SHOWN: usize = 2000;

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
                let said = String::from_utf8_lossy(&output.stderr);
                let end = said.char_indices().rev().nth(SHOWN).map_or(0, |(at, _)| at);
                let why = format!("`{program}` ended with {}: {}", output.status, said.get(end..).unwrap_or_default().trim());
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

/// The connection in libpq's keywords for another database, and the password, which is nobody's business in a list of processes.
fn words(connection: &ConnInfo, database: &str) -> (String, Option<String>) {
    let mut words: Vec<(&str, String)> = Vec::new();
    let each = |show: &dyn Fn(&pgvault_core::postgres::Endpoint) -> String| {
        connection.endpoints.iter().map(show).collect::<Vec<_>>().join(",")
    };
    words.push((
        "host",
        each(&|endpoint| match &endpoint.host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        }),
    ));
    if connection.endpoints.iter().any(|endpoint| endpoint.hostaddr.is_some()) {
        words.push(("hostaddr", each(&|endpoint| endpoint.hostaddr.map_or_else(String::new, |address| address.to_string()))));
    }
    words.push(("port", each(&|endpoint| endpoint.port.to_string())));
    words.push(("user", connection.user.clone()));
    words.push(("dbname", database.to_owned()));
    words.push(("application_name", connection.application_name.clone()));
    words.push(("sslmode", connection.ssl.mode.to_string()));
    match &connection.ssl.root {
        RootCert::File(path) => words.push(("sslrootcert", path.display().to_string())),
        RootCert::System => words.push(("sslrootcert", "system".into())),
        RootCert::Absent(_) => {}
    }
    if let Some(client) = &connection.ssl.client {
        words.push(("sslcert", client.cert.display().to_string()));
        words.push(("sslkey", client.key.display().to_string()));
    }
    words.push(("channel_binding", connection.channel_binding.to_string()));
    words.push(("target_session_attrs", connection.target_session_attrs.to_string()));
    if let Some(options) = &connection.options {
        words.push(("options", options.clone()));
    }
    if let Some(passfile) = &connection.passfile {
        words.push(("passfile", passfile.display().to_string()));
    }
    let value = |text: &str| format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"));
    let line: Vec<String> = words.iter().map(|(word, text)| format!("{word}={}", value(text))).collect();
    let password = connection.password.as_ref().map(|password| password.expose_secret().to_owned());
    (line.join(" "), password)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_passed_on_without_its_password() {
        let none = |_: &str| None;
        let connection = ConnInfo::parse("postgresql://odoo:s3cret@db.example:5433/postgres?sslmode=require", &none).unwrap();
        let (line, password) = words(&connection, r"it's a\b = c");
        assert!(line.contains("host='db.example' port='5433' user='odoo'"), "{line}");
        assert!(line.contains(r"dbname='it\'s a\\b = c'"), "{line}");
        assert!(line.contains("sslmode='require'") && !line.contains("s3cret"), "{line}");
        assert_eq!(password.as_deref(), Some("s3cret"));
    }
}
