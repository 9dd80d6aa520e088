//! The catalogue is whole, and what it names can be used here.

use std::time::Duration;

use pgvault_core::Result;
use serde_json::{Value, json};

use super::{Found, Restored, all_databases, ask, databases, listed};
use crate::runner::Running;

/// How long the dump of one database's schema may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// Dumps the definition of everything: `pg_dump --schema-only` reads the whole catalogue and resolves every dependency in it.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn dump(restored: &Restored<'_>, running: &mut dyn Running) -> Result<Found> {
    let databases = databases(restored).await?;
    let mut failed = Vec::new();
    for database in &databases {
        let arguments = ["--schema-only".to_owned(), "--no-password".to_owned(), format!("--dbname={}", conninfo_value(database))];
        let ran = match running.program("pg_dump", &arguments, PATIENCE).await {
            Ok(ran) => ran,
            Err(error) => return Ok(Found::missing(format!("pg_dump cannot be run: {error}"))),
        };
        if !ran.succeeded() {
            failed.push(format!("{database}: {}", ran.output.lines().next_back().unwrap_or("pg_dump said nothing")));
        }
    }
    let globals = running.program("pg_dumpall", &["--globals-only".to_owned(), "--no-password".to_owned()], PATIENCE).await;
    match globals {
        Ok(ran) if !ran.succeeded() => failed.push(format!("roles and tablespaces: {}", ran.output)),
        Ok(_) => {}
        Err(error) => failed.push(format!("roles and tablespaces: {error}")),
    }
    let evidence = json!({ "databases": databases, "failed": listed(&failed) });
    Ok(match failed.first() {
        Some(first) => Found::failed(format!("the catalogue cannot be dumped: {first}"), evidence),
        None => Found::passed(format!("the schemas of {}, roles and tablespaces dump", databases.join(", ")), evidence),
    })
}

/// A database's name as a connection string: alone, a name with `=` in it would be one.
fn conninfo_value(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', r"\\").replace('\'', r"\'"))
}

/// Collects the rows of a statement over all databases, each as `database: text`.
async fn over(restored: &Restored<'_>, databases: &[String], statement: &str) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for database in databases {
        let mut sql = restored.connect(database).await?;
        for row in &ask(&mut sql, statement).await?.rows {
            all.push(format!("{database}: {}", row.text(0)?.unwrap_or_default()));
        }
        sql.close().await;
    }
    Ok(all)
}

fn warn_if_any(found: &[String], none: &str, some: &str) -> Found {
    match found.first() {
        None => Found::passed(none, Value::Null),
        Some(first) => Found::warned(format!("{} {some}: {first}", found.len()), listed(found)),
    }
}

/// Indexes that PostgreSQL does not use: a `CREATE INDEX CONCURRENTLY` that failed leaves one.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn indexes(restored: &Restored<'_>) -> Result<Found> {
    let statement = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT (indisvalid AND indisready AND indislive) \
                     AND NOT EXISTS (SELECT FROM pg_class WHERE oid = indexrelid AND relkind = 'I') ORDER BY 1";
    let found = over(restored, &databases(restored).await?, statement).await?;
    Ok(warn_if_any(&found, "no index is invalid", "indexes are invalid"))
}

/// Constraints that were never checked against the rows that were there.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn constraints(restored: &Restored<'_>) -> Result<Found> {
    let statement = "SELECT conrelid::regclass::text || ' ' || conname FROM pg_constraint WHERE NOT convalidated ORDER BY 1";
    let found = over(restored, &databases(restored).await?, statement).await?;
    Ok(warn_if_any(&found, "every constraint is validated", "constraints are not validated"))
}

/// Text that was sorted by another version of the C library or of ICU than the one here: its indexes may be in the wrong order, for the
/// copy, or for the place that a disaster is restored to.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn collations(restored: &Restored<'_>) -> Result<Found> {
    let of_databases = "SELECT datname || ' was made with ' || datcollversion || ', here is ' || coalesce(pg_database_collation_actual_version(oid), 'none') \
                        FROM pg_database WHERE datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) AND datcollversion IS NOT NULL ORDER BY 1";
    let mut found = over(restored, &["postgres".to_owned()], of_databases).await?;
    let of_collations = "SELECT quote_ident(collname) || ' was made with ' || collversion || ', here is ' || coalesce(pg_collation_actual_version(oid), 'none') \
                         FROM pg_collation WHERE collversion IS DISTINCT FROM pg_collation_actual_version(oid) AND collversion IS NOT NULL \
                         AND EXISTS (SELECT FROM pg_depend d WHERE d.refobjid = pg_collation.oid AND d.refclassid = 'pg_collation'::regclass) ORDER BY 1";
    found.extend(over(restored, &databases(restored).await?, of_collations).await?);
    Ok(match found.first() {
        None => Found::passed("every collation is of the version that indexes were made with", Value::Null),
        Some(first) => Found::warned(
            format!(
                "{} collations are of another version here, so indexes on text may have to be rebuilt after a restore like this: {first}",
                found.len()
            ),
            listed(&found),
        ),
    })
}

/// Extensions whose files are not here: functions of these fail as soon as they are called.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn extensions(restored: &Restored<'_>) -> Result<Found> {
    let databases = all_databases(restored).await?;
    let missing = "SELECT extname || ' ' || extversion FROM pg_extension \
                   WHERE NOT EXISTS (SELECT FROM pg_available_extensions WHERE name = extname) ORDER BY 1";
    let missing = over(restored, &databases, missing).await?;
    let other = "SELECT extname || ' ' || extversion FROM pg_extension WHERE EXISTS (SELECT FROM pg_available_extensions WHERE name = extname) \
                 AND NOT EXISTS (SELECT FROM pg_available_extension_versions WHERE name = extname AND version = extversion) ORDER BY 1";
    let other = over(restored, &databases, other).await?;
    // A library that is there but does not load shows when it is loaded.
    let broken = "SELECT DISTINCT probin FROM pg_proc WHERE probin IS NOT NULL AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'c')";
    let mut unloadable = Vec::new();
    for database in &databases {
        let mut sql = restored.connect(database).await?;
        for row in &ask(&mut sql, broken).await?.rows {
            let Some(library) = row.text(0)? else { continue };
            if let Err(error) = sql.simple_query(&format!("LOAD {}", pgvault_core::postgres::quote_literal(library))).await {
                unloadable.push(format!("{database}: {library}: {error}"));
            }
        }
        sql.close().await;
    }
    let evidence = json!({ "missing": listed(&missing), "other_version": listed(&other), "unloadable": listed(&unloadable) });
    Ok(match (missing.first().or(unloadable.first()), other.first()) {
        (Some(first), _) => Found::failed(
            format!(
                "{} extensions cannot be used here, and could not after a disaster: {first}",
                missing.len().max(unloadable.len())
            ),
            evidence,
        ),
        (None, Some(first)) => {
            Found::warned(format!("{} extensions are of versions that are not packaged here: {first}", other.len()), evidence)
        }
        (None, None) => Found::passed("the files of every extension are here, and load", evidence),
    })
}
