//! Every document that a row of Odoo's attachments refers to can be had from the vault, with the content that its name promises.
//!
//! The copy says what it refers to; packs are fetched, opened and compared, and nothing is written. What the source had lost before is no
//! fault of the backup and warned of; what lies behind the watermark was never promised.

use std::sync::Arc;

use pgvault_core::filestore::database::references;
use pgvault_core::filestore::fetch::{FetchOptions, Sink, Wish, fetch};
use pgvault_core::filestore::instance::Database;
use pgvault_core::filestore::pass;
use pgvault_core::progress::Silent;
use pgvault_core::wal::catalog::read_history;
use pgvault_core::{ErrorKind, Result};
use serde_json::json;

use super::{Found, Restored};

/// One content in so many is fetched when a drill takes a sample; all are looked up.
const SAMPLE: u32 = 20;

/// Looks for the documents of `database`. Nothing to say when the vault has captured none of it.
///
/// # Errors
/// When the server or the store cannot be asked.
pub(super) async fn fetchable(restored: &Restored<'_>, database: &str) -> Result<Option<Found>> {
    let cluster = restored.recovered.cluster();
    let mut sql = restored.connect(database).await?;
    let row = sql
        .query_one(
            "SELECT (SELECT oid FROM pg_database WHERE datname = current_database()), \
             (SELECT value FROM public.ir_config_parameter WHERE key = 'database.uuid')",
        )
        .await?;
    let identity = Database {
        name: database.to_owned(),
        oid: row.required(0)?.parse().unwrap_or(0),
        uuid: row.text(1)?.unwrap_or_default().to_owned(),
        series: None,
    };
    let Some(mut known) = pass::load(cluster, &identity.folder(cluster.keys().digest())).await? else {
        sql.close().await;
        return Ok(None);
    };
    let references = references(&mut sql).await?;
    sql.close().await;
    let (timeline, lsn) = restored.recovered.position();
    let history = read_history(cluster, timeline).await?;
    let complete = known.pass.covers(timeline, lsn, history.as_ref());
    let one_in = if restored.deep { 1 } else { SAMPLE };
    let options = FetchOptions { sink: Sink::Nowhere { one_in }, workers: restored.workers.max(1), progress: Arc::new(Silent) };
    let local = references.local;
    let fetched = match fetch(&mut known.catalog, Wish::Referenced(references), &options).await {
        Ok(fetched) => fetched,
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
            return Ok(Some(Found::failed(
                format!("documents cannot be had from the vault: {error}"),
                json!({ "code": error.code() }),
            )));
        }
        Err(error) => return Err(error),
    };
    let evidence = json!({
        "referenced": local, "contents_read": fetched.files, "bytes_read": fetched.bytes, "never_captured": fetched.unknown,
        "bad_at_source": fetched.bad_at_source, "first_missing": fetched.missing.iter().take(super::NAMED).collect::<Vec<_>>(),
        "remote": fetched.remote, "complete": complete, "watermark": known.pass.watermark().map(|(_, mark)| mark),
    });
    let read = fetched.files;
    Ok(Some(match (fetched.unknown, fetched.bad_at_source) {
        (0, 0) => Found::passed(format!("all {local} documents are in the vault, {read} of them read"), evidence),
        (0, bad) => Found::warned(format!("{bad} of {local} documents were missing or damaged at the source already"), evidence),
        (unknown, _) if complete => Found::failed(format!("{unknown} of {local} documents were never captured"), evidence),
        (unknown, _) => {
            let up_to = known.pass.watermark().map_or_else(|| "nowhere".to_owned(), |(_, mark)| format!("{:.0}", mark.at));
            Found::warned(format!("{unknown} of {local} documents are not captured yet: they are safe up to {up_to}"), evidence)
        }
    }))
}
