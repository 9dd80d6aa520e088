//! Databases that are gone: their documents are kept for as long as a backup can bring them back, and no longer.

use std::collections::BTreeSet;

use super::catalog::Catalog;
use super::instance::Database;
use super::pass::{self, Known, Pass, PassKind};
use crate::postgres::{ConnInfo, Connection, Mode};
use crate::vault::Cluster;
use crate::vault::session::{Purpose, Session};
use crate::{Error, ErrorKind, Result};

/// Notes which databases of captured filestores the server has no more; gives them. A standby, which may be behind, is asked nothing.
///
/// # Errors
/// [`ErrorKind::Source`] when the server cannot be asked, [`ErrorKind::Conflict`] when it is another one; otherwise when the store fails.
pub async fn note(cluster: &Cluster, connection: &ConnInfo) -> Result<Vec<Database>> {
    let folders = pass::instances(cluster).await?;
    if folders.is_empty() {
        return Ok(Vec::new());
    }
    let mut sql = Connection::connect(connection, Mode::Sql).await?;
    let row = sql
        .query_one(
            "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()), pg_catalog.pg_is_in_recovery(), \
             (SELECT pg_catalog.string_agg(oid::text, ' ') FROM pg_catalog.pg_database), \
             (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint",
        )
        .await?;
    let wrong = |what: &str| Error::new(ErrorKind::Source, "source.answer", format!("the server does not say its {what}"));
    cluster.ensure_is(row.required(0)?.parse().map_err(|_| wrong("system identifier"))?)?;
    if row.required(1)? == "t" {
        return Ok(Vec::new());
    }
    let there: BTreeSet<u32> = row.required(2)?.split(' ').filter_map(|oid| oid.parse().ok()).collect();
    let now =
        row.required(3)?.parse().ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).ok_or_else(|| wrong("time"))?;
    sql.close().await;
    let mut dropped = Vec::new();
    for folder in folders {
        let Some(known) = pass::load(cluster, &folder).await? else { continue };
        if known.pass.kind == PassKind::Dropped || there.contains(&known.pass.database.oid) {
            continue;
        }
        let Known { pass, catalog, heads, .. } = known;
        let database = pass.database.clone();
        let follows = heads.iter().map(|head| head.id).collect();
        Box::pin(close(cluster, pass, &catalog, follows, now)).await?;
        dropped.push(database);
    }
    Ok(dropped)
}

async fn close(cluster: &Cluster, last: Pass, catalog: &Catalog, follows: Vec<ulid::Ulid>, now: jiff::Timestamp) -> Result<()> {
    let id = cluster.env().new_id()?;
    let session = Session::begin(cluster, Purpose::Filestore, id).await?;
    let pass = Pass {
        id,
        session: session.id,
        kind: PassKind::Dropped,
        started_at: now,
        ended_at: now,
        new_files: 0,
        new_bytes: 0,
        stored_bytes: 0,
        tripwire: None,
        follows,
        ..last
    };
    pass::commit(cluster, &pass, catalog).await
}
