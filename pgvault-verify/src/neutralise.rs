//! Makes a copy of an Odoo database harmless.
//!
//! A copy is production's twin: the same mail servers, the same keys of payment providers, the same jobs that wake up once a minute. In
//! one transaction, on a server that nobody else reaches:
//!
//! ```text
//! identity    another uuid and secret, another address, no licence        (it is not production any more)
//! endpoints   whatever reaches somebody outside is switched off           (for every version, whatever is installed)
//! modules     the statements that the installed modules bring themselves  (captured with `odoo-bin neutralize --stdout`)
//! assertions  nothing of it is live                                       (also what a module has switched on again)
//! ```
//!
//! Modules bring statements for what only they know; those that bring none are why the second step does not rely on the third, and why
//! the last does not trust either. When an assertion does not hold, nothing is committed.
//!
//! The one job that stays on is Odoo's own housekeeping. It collects garbage in the filestore, which is why a copy needs
//! [one of its own](pgvault_core::filestore::separate).

mod endpoints;
mod identity;
mod statements;

use std::collections::BTreeMap;

use pgvault_core::env::Env;
use pgvault_core::postgres::{Connection, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};
use serde::Serialize;

use endpoints::ENDPOINTS;

/// What was made harmless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Neutralised {
    /// `database.uuid` of production.
    pub uuid_before: Option<String>,
    /// `database.uuid` of the copy.
    pub uuid: String,
    /// By kind of what reaches outside: `crons`, `mail_servers`, `webhooks`. Those that the database has no table for are absent.
    pub found: BTreeMap<&'static str, Count>,
    /// Statements of the modules that were run.
    pub module_statements: usize,
    /// What no statement can make harmless, in sentences.
    pub warnings: Vec<String>,
}

/// How many there are of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Rows.
    pub all: u64,
    /// Rows that would have reached outside.
    pub live: u64,
    /// Rows that were changed.
    pub disabled: u64,
}

/// Makes the database of this session harmless, or leaves it as it was. `module_sql` are the statements of its installed modules, as
/// `odoo-bin neutralize --stdout` prints them.
///
/// # Errors
/// [`ErrorKind::Unfit`] with the code `neutralise.live` when something is still live, with what it is; `neutralise.module_sql` with the
/// statement that failed; `neutralise.not_odoo`, and `neutralise.schema` when a table is not as any known version has it.
pub async fn neutralise(sql: &mut Connection, env: &Env, module_sql: Option<&str>) -> Result<Neutralised> {
    let statements = module_sql.map(statements::split).transpose()?.unwrap_or_default();
    // A database may have this as its default; a copy is to be written.
    let _ = sql
        .simple_query(
            "SET default_transaction_read_only = off; SET search_path = public, pg_catalog; SET standard_conforming_strings = on",
        )
        .await?;
    let _ = sql.simple_query("BEGIN").await?;
    let done = work(sql, env, &statements).await;
    match done {
        Ok(done) => {
            let _ = sql.simple_query("COMMIT").await?;
            Ok(done)
        }
        Err(error) => {
            // The connection may be gone; the transaction is then as well.
            let _ = sql.simple_query("ROLLBACK").await;
            Err(error)
        }
    }
}

async fn work(sql: &mut Connection, env: &Env, statements: &[statements::Statement<'_>]) -> Result<Neutralised> {
    if !exists(sql, "ir_module_module").await? || !exists(sql, "ir_config_parameter").await? {
        return Err(Error::new(ErrorKind::Usage, "neutralise.not_odoo", "the database is not one of Odoo's"));
    }
    let uuid_before = identity::parameter(sql, "database.uuid").await?;
    let uuid = identity::replace(sql, env).await?;
    let mut found = BTreeMap::new();
    for endpoint in &ENDPOINTS {
        if let Some(count) = endpoint.disable(sql).await? {
            let _ = found.insert(endpoint.kind, count);
        }
    }
    endpoints::add_sink(sql).await?;
    identity::set(sql, "database.is_neutralized", "true").await?;
    run(sql, statements).await?;
    // Triggers that wait for the end of the transaction have their say before the assertions.
    let _ = sql.simple_query("SET CONSTRAINTS ALL IMMEDIATE").await?;
    ensure_harmless(sql, uuid_before.as_deref()).await?;
    let uuid = identity::parameter(sql, "database.uuid").await?.unwrap_or(uuid);
    let warnings = warnings(sql).await?;
    Ok(Neutralised { uuid_before, uuid, found, module_statements: statements.len(), warnings })
}

/// Runs the statements of the modules.
async fn run(sql: &mut Connection, statements: &[statements::Statement<'_>]) -> Result<()> {
    for statement in statements {
        if let Err(error) = sql.simple_query(statement.text).await {
            let said = format!("line {} of the modules' statements, `{}`: {error}", statement.line, statement.beginning());
            return Err(Error::new(ErrorKind::Failed, "neutralise.module_sql", said)
                .with_hint("they must be of the same version and the same modules as the database; nothing was changed")
                .with_source(error));
        }
    }
    Ok(())
}

/// The assertions: nothing reaches outside, and the copy says what it is.
async fn ensure_harmless(sql: &mut Connection, uuid_before: Option<&str>) -> Result<()> {
    let mut live = Vec::new();
    for endpoint in &ENDPOINTS {
        live.extend(endpoint.what_is_live(sql).await?);
    }
    if exists(sql, "ir_mail_server").await? && !endpoints::has_sink(sql).await? {
        live.push("no mail server that leads nowhere: Odoo would take the one of its command line".to_owned());
    }
    let flag = identity::parameter(sql, "database.is_neutralized").await?;
    if !flag.as_deref().is_some_and(|flag| flag.eq_ignore_ascii_case("true")) {
        live.push("`database.is_neutralized` is not true".to_owned());
    }
    if uuid_before.is_some() && identity::parameter(sql, "database.uuid").await?.as_deref() == uuid_before {
        live.push("`database.uuid` is production's".to_owned());
    }
    if live.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unfit, "neutralise.live", format!("the copy is not harmless: {}", live.join("; "))).with_hint(
        "a statement of a module or a trigger switches it on again; nothing was changed, and the copy must not be used as it is",
    ))
}

/// What lies in an object store is production's, and no statement gives the copy another.
async fn warnings(sql: &mut Connection) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    if exists(sql, "ir_attachment").await? {
        let mut sets = sql
            .simple_query(
                "SELECT split_part(store_fname, '://', 1), count(*) FROM public.ir_attachment WHERE store_fname ~ '^[a-z0-9_]+://' GROUP BY 1 ORDER BY 1",
            )
            .await?;
        for row in sets.pop().unwrap_or_default().rows {
            warnings.push(format!(
                "{} attachments lie in `{}://`, which is production's: start Odoo without its credentials, or it deletes there what the \
                 copy does not refer to (`DISABLE_ATTACHMENT_STORAGE=1`)",
                row.required(1)?,
                row.required(0)?
            ));
        }
    }
    Ok(warnings)
}

/// True when the schema `public` has this table.
async fn exists(sql: &mut Connection, table: &str) -> Result<bool> {
    let name = quote_literal(&format!("public.{table}"));
    Ok(sql.query_one(&format!("SELECT to_regclass({name}) IS NOT NULL")).await?.required(0)? == "t")
}

/// The columns of a table in `public`; none when there is no such table.
async fn columns(sql: &mut Connection, table: &str) -> Result<Vec<String>> {
    let statement = format!(
        "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass({}) AND attnum > 0 AND NOT attisdropped",
        quote_literal(&format!("public.{table}"))
    );
    let rows = sql.simple_query(&statement).await?.pop().unwrap_or_default().rows;
    rows.iter().map(|row| row.required(0).map(ToOwned::to_owned)).collect()
}

/// A count that the server gives.
async fn count(sql: &mut Connection, statement: &str) -> Result<u64> {
    Ok(sql.query_one(statement).await?.required(0)?.parse().unwrap_or(0))
}
