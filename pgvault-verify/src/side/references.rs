//! What the attachments of a database refer to: the documents that belong to this moment.
//!
//! Source: Odoo's `ir_attachment`. `store_fname` is where the content lies, `checksum` its SHA-1, `file_size` its bytes. Many rows may
//! refer to one file. What the set has is asked page by page in one snapshot, so that neither a large one needs memory nor a page misses
//! what another has.

use pgvault_core::postgres::{Connection, Row};
use pgvault_core::{Error, ErrorKind, Result};
use serde::Serialize;

/// Files that are asked for at once; about 1 MiB.
const PAGE: usize = 10_000;

/// A file that rows refer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// Its name, as the rows have it: `3f/3f7a...` for a file of the filestore, and whatever other modules make of it.
    pub store_fname: String,
    /// The SHA-1 that the rows say its content has; the smallest when they disagree.
    pub checksum: Option<String>,
    /// The bytes that the rows say it has; the most when they disagree.
    pub file_size: Option<u64>,
    /// How many rows refer to it.
    pub rows: u64,
    /// How many different checksums they have. With two, one of them is wrong.
    pub checksums: u64,
}

/// Where attachments lie, and how many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// `local` for the filestore by its scheme of names, `other` for other local names, `db` for content in the database, `url` for links,
    /// `binary` for those without content, else what stands before `://`.
    pub place: String,
    /// Rows.
    pub rows: u64,
    /// Bytes, as far as the rows say.
    pub bytes: u64,
}

/// The set of references of one database, in the order of their names.
#[derive(Debug)]
pub struct References {
    sql: Connection,
    is_over: bool,
}

impl References {
    /// Opens the set, with a session that nothing else uses.
    pub(super) async fn open(mut sql: Connection) -> Result<Self> {
        if sql.query_one("SELECT to_regclass('public.ir_attachment') IS NOT NULL").await?.required(0)? != "t" {
            return Err(Error::new(ErrorKind::Failed, "side.no_attachments", "the database has no table `ir_attachment`"));
        }
        // Older tables of Odoo have no checksum yet; what is asked for is what there is.
        let _ = sql
            .simple_query(
                "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; \
                 DECLARE pgvault_references NO SCROLL CURSOR FOR \
                 SELECT store_fname, min(checksum), max(file_size), count(*), count(DISTINCT checksum) \
                 FROM public.ir_attachment WHERE store_fname IS NOT NULL GROUP BY 1 ORDER BY 1",
            )
            .await?;
        Ok(Self { sql, is_over: false })
    }

    /// The next of them; none when all have been given.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn next_page(&mut self) -> Result<Vec<Reference>> {
        if self.is_over {
            return Ok(Vec::new());
        }
        let mut sets = self.sql.simple_query(&format!("FETCH {PAGE} FROM pgvault_references")).await?;
        let rows = sets.pop().unwrap_or_default().rows;
        self.is_over = rows.len() < PAGE;
        rows.iter().map(reference).collect()
    }

    /// Where the attachments lie, in the snapshot of the set. Contents are not measured: that would read them.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn census(&mut self) -> Result<Vec<Place>> {
        let mut sets = self
            .sql
            .simple_query(
                "SELECT CASE WHEN store_fname ~ '^[0-9a-f]{2,3}/[0-9a-f]{40}$' THEN 'local' \
                 WHEN store_fname ~ '^[a-z0-9_]+://' THEN split_part(store_fname, '://', 1) \
                 WHEN store_fname IS NOT NULL THEN 'other' WHEN db_datas IS NOT NULL THEN 'db' ELSE coalesce(type, 'none') END, \
                 count(*), coalesce(sum(file_size), 0)::bigint FROM public.ir_attachment GROUP BY 1 ORDER BY 1",
            )
            .await?;
        let rows = sets.pop().unwrap_or_default().rows;
        rows.iter()
            .map(|row| {
                let number = |column| Ok::<_, Error>(row.required(column)?.parse::<u64>().unwrap_or(0));
                Ok(Place { place: row.required(0)?.to_owned(), rows: number(1)?, bytes: number(2)? })
            })
            .collect()
    }

    /// Ends the session.
    pub async fn close(self) {
        self.sql.close().await;
    }
}

fn reference(row: &Row) -> Result<Reference> {
    let number = |column| Ok::<_, Error>(row.text(column)?.and_then(|text| text.parse::<u64>().ok()));
    Ok(Reference {
        store_fname: row.required(0)?.to_owned(),
        checksum: row.text(1)?.map(ToOwned::to_owned),
        file_size: number(2)?,
        rows: number(3)?.unwrap_or(0),
        checksums: number(4)?.unwrap_or(0),
    })
}
