//! What the database held at every position of its WAL, by the order of commits.
//!
//! A [`Recording`] is a logical slot with PostgreSQL's own `test_decoding`: it gives every committed change of `ir_attachment`, transaction
//! by transaction in the order of their commits, with the position at which each commit record ends. [`Truth`] is what was there when the
//! recording began, and these changes.
//!
//! A transaction counts at position T when its commit record ends at or before T. Recovery to `recovery_target_lsn = T` with
//! `recovery_target_inclusive = true` also replays a record that *begins* at T.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use pgvault_core::postgres::{Connection, Lsn, ResultSet, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};

use crate::odoo::Odoo;
use crate::series::is_local;
use crate::worker::AttachmentId;

/// A row of `ir_attachment`, as far as it says where the content is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// `binary` or `url`.
    pub kind: String,
    /// The name of a file or of an object elsewhere.
    pub store_fname: Option<String>,
    /// SHA-1 of the content.
    pub checksum: Option<String>,
    /// Size in bytes.
    pub file_size: Option<i64>,
    /// True when the content is in the row.
    pub in_database: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Put(AttachmentId, Row),
    Delete(AttachmentId),
    Truncate,
}

/// A committed transaction that touched attachments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// Where its commit record ends.
    pub lsn: Lsn,
    /// Its number.
    pub xid: u32,
    changes: Vec<Change>,
}

/// All rows by id.
pub type Rows = BTreeMap<AttachmentId, Row>;

/// The names of files that rows refer to; those of objects elsewhere are left out.
pub fn local_names(rows: &Rows) -> BTreeSet<String> {
    rows.values().filter_map(|row| row.store_fname.clone()).filter(|name| is_local(name)).collect()
}

/// See the [module documentation](self).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truth {
    began: Lsn,
    initial: Rows,
    commits: Vec<Commit>,
}

impl Truth {
    /// Where the recording began; before it nothing is known.
    pub fn began(&self) -> Lsn {
        self.began
    }

    /// The transactions, in the order of their commits.
    pub fn commits(&self) -> &[Commit] {
        &self.commits
    }

    /// The rows at a position.
    pub fn rows_at(&self, lsn: Lsn) -> Rows {
        let mut rows = self.initial.clone();
        for commit in self.commits.iter().take_while(|commit| commit.lsn <= lsn) {
            apply(&mut rows, &commit.changes);
        }
        rows
    }

    /// The names of files that rows refer to at a position.
    pub fn referenced_at(&self, lsn: Lsn) -> BTreeSet<String> {
        local_names(&self.rows_at(lsn))
    }

    /// The names of files that rows refer to at any position up to this one.
    pub fn referenced_until(&self, lsn: Lsn) -> BTreeSet<String> {
        self.states().take_while(|(at, _)| *at <= lsn).flat_map(|(_, rows)| local_names(&rows)).collect()
    }

    /// Every state that there was, each with the position where it began.
    pub fn states(&self) -> impl Iterator<Item = (Lsn, Rows)> {
        let first = std::iter::once((self.began, self.initial.clone()));
        first.chain(self.commits.iter().scan(self.initial.clone(), |rows, commit| {
            apply(rows, &commit.changes);
            Some((commit.lsn, rows.clone()))
        }))
    }
}

fn apply(rows: &mut Rows, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Put(id, row) => {
                let _ = rows.insert(*id, row.clone());
            }
            Change::Delete(id) => {
                let _ = rows.remove(id);
            }
            Change::Truncate => rows.clear(),
        }
    }
}

const ROWS: &str = "select id, type, store_fname, checksum, file_size, db_datas is not null from ir_attachment";

/// The rows that a new transaction sees.
///
/// # Errors
/// When the query fails.
pub async fn rows(connection: &mut Connection) -> Result<Rows> {
    parse_rows(&connection.simple_query(ROWS).await?)
}

fn parse_rows(sets: &[ResultSet]) -> Result<Rows> {
    let mut rows = Rows::new();
    for row in sets.first().map(|set| set.rows.as_slice()).unwrap_or_default() {
        let text = |column| row.text(column).map(|text| text.map(str::to_owned));
        let found = Row {
            kind: text(1)?.unwrap_or_default(),
            store_fname: text(2)?,
            checksum: text(3)?,
            file_size: text(4)?.and_then(|size| size.parse().ok()),
            in_database: row.required(5)? == "t",
        };
        let _ = rows.insert(row.required(0)?.parse().unwrap_or_default(), found);
    }
    Ok(rows)
}

/// A slot that keeps what happens to attachments. One that is dropped without [`finish`](Recording::finish) leaves its slot to the
/// end of the server, or of the database.
#[derive(Debug)]
pub struct Recording {
    odoo: Odoo,
    slot: String,
    began: Lsn,
    initial: Rows,
}

impl Recording {
    /// Begins to record. Nobody may write at this moment.
    ///
    /// # Errors
    /// When PostgreSQL cannot make the slot: `wal_level = logical` is needed.
    pub async fn start(odoo: &Odoo) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let slot = format!("odoosim_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let create = format!("select lsn from pg_create_logical_replication_slot({}, 'test_decoding')", quote_literal(&slot));
        let began = odoo.ask(&create).await?.unwrap_or_default().parse().map_err(unreadable)?;
        let initial = parse_rows(&odoo.monitor().query(ROWS).await?)?;
        Ok(Self { odoo: odoo.clone(), slot, began, initial })
    }

    /// Ends the recording: what was committed until now, and drops the slot.
    ///
    /// # Errors
    /// When PostgreSQL fails, or says something that cannot be understood.
    pub async fn finish(self) -> Result<Truth> {
        let slot = quote_literal(&self.slot);
        let changes = format!(
            "select lsn, xid, data from pg_logical_slot_get_changes({slot}, null, null, 'include-xids', '1', 'skip-empty-xacts', '1')"
        );
        let sets = self.odoo.monitor().query(&changes).await?;
        let mut commits = Vec::new();
        let mut changes = Vec::new();
        for row in sets.first().map(|set| set.rows.as_slice()).unwrap_or_default() {
            let data = row.required(2)?;
            if data.starts_with("BEGIN") {
                changes.clear();
            } else if data.starts_with("COMMIT") {
                let lsn = row.required(0)?.parse().map_err(unreadable)?;
                let xid = row.required(1)?.parse().unwrap_or_default();
                if !changes.is_empty() {
                    commits.push(Commit { lsn, xid, changes: std::mem::take(&mut changes) });
                }
            } else if let Some(change) = data.strip_prefix("table public.ir_attachment: ") {
                changes.push(parse(change)?);
            }
        }
        let _ = self.odoo.ask(&format!("select pg_drop_replication_slot({slot})")).await?;
        Ok(Truth { began: self.began, initial: self.initial, commits })
    }
}

fn unreadable(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Source, "odoosim.decoding", format!("logical decoding says something unexpected: {what}"))
}

/// Reads what `test_decoding` says of a change after the name of the table: `INSERT: id[integer]:1 name[text]:'it''s' size[integer]:null`.
fn parse(change: &str) -> Result<Change> {
    if change.starts_with("TRUNCATE") {
        return Ok(Change::Truncate);
    }
    let (verb, tuple) = change.split_once(": ").ok_or_else(|| unreadable(change))?;
    let values = columns(tuple).ok_or_else(|| unreadable(change))?;
    let get = |name: &str| values.get(name).cloned().flatten();
    let id = get("id").and_then(|id| id.parse().ok()).ok_or_else(|| unreadable(change))?;
    match verb {
        "INSERT" | "UPDATE" => {
            let row = Row {
                kind: get("type").unwrap_or_default(),
                store_fname: get("store_fname"),
                checksum: get("checksum"),
                file_size: get("file_size").and_then(|size| size.parse().ok()),
                in_database: get("db_datas").is_some(),
            };
            Ok(Change::Put(id, row))
        }
        "DELETE" => Ok(Change::Delete(id)),
        _ => Err(unreadable(change)),
    }
}

fn columns(mut tuple: &str) -> Option<BTreeMap<&str, Option<String>>> {
    let mut values = BTreeMap::new();
    while !tuple.is_empty() {
        let (name, rest) = tuple.split_once('[')?;
        let (_, rest) = rest.split_once("]:")?;
        let (value, rest) = if let Some(quoted) = rest.strip_prefix('\'') {
            let (value, rest) = unquote(quoted)?;
            (Some(value), rest.strip_prefix(' ').unwrap_or(rest))
        } else {
            let (value, rest) = rest.split_once(' ').unwrap_or((rest, ""));
            ((value != "null").then(|| value.to_owned()), rest)
        };
        let _ = values.insert(name, value);
        tuple = rest;
    }
    Some(values)
}

/// The text up to the closing quote, where two stand for one, and what follows.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (before, after) = rest.split_once('\'')?;
        value.push_str(before);
        match after.strip_prefix('\'') {
            Some(more) => {
                value.push('\'');
                rest = more;
            }
            None => return Some((value, after)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_read_as_test_decoding_writes_it() {
        let said = "INSERT: id[integer]:7 name[character varying]:'it''s [a]: b' type[character varying]:'binary' \
                    db_datas[bytea]:null store_fname[character varying]:'ab/abc' file_size[integer]:3 checksum[character varying]:'abc'";
        let row = Row {
            kind: "binary".to_owned(),
            store_fname: Some("ab/abc".to_owned()),
            checksum: Some("abc".to_owned()),
            file_size: Some(3),
            in_database: false,
        };
        assert_eq!(parse(said).unwrap(), Change::Put(7, row));
        assert_eq!(parse("DELETE: id[integer]:7").unwrap(), Change::Delete(7));
        assert_eq!(parse("TRUNCATE: (no-flags)").unwrap(), Change::Truncate);
        for bad in ["", "INSERT: id", "UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:2", "INSERT: id[integer]:'1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
