//! The garbage collection of the filestore, which Odoo's daily autovacuum job runs.
//!
//! Until 19: `LOCK ir_attachment IN SHARE MODE`, for which it waits ten seconds at most and then gives up; all names of the checklist;
//! for each that no row refers to, unlink the file; for each, unlink the mark. What is not on the checklist is never looked at.
//!
//! 20: no lock on the table. Only marks older than the grace. The rows that refer to a name are locked; a name without rows goes in five
//! steps, so that a writer who marks it meanwhile gets it back: rename the mark, look at its time, rename the file, look for a new mark,
//! unlink the file and the mark. What an interrupted run left renamed is not moved back: Odoo names the file to be moved by a
//! relative path, which leads nowhere.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use jiff::SignedDuration;
use pgvault_core::postgres::{Connection, ServerError, quote_literal};
use pgvault_core::{Error, Result};

use crate::filestore::{GC_SUFFIX, Mark, WRITE_SUFFIX, suffixed};
use crate::ledger::Step;
use crate::odoo::Odoo;
use crate::pause::Pause;

/// How a run of the garbage collection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collection {
    /// It went through the checklist.
    Done {
        /// Names that it looked up.
        checked: usize,
        /// Files that it removed.
        removed: usize,
    },
    /// The lock was not to be had within the time.
    GaveUp,
    /// A row that it wanted to lock was changed meanwhile; the transaction was rolled back, the rest of the checklist is left.
    Conflict,
}

/// `lock_not_available`, with which `lock_timeout` ends a wait.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// `serialization_failure`.
const SERIALIZATION_FAILURE: &str = "40001";

fn is_state(error: &Error, state: &str) -> bool {
    ServerError::of(error).is_some_and(|server| server.sqlstate == state)
}

/// Runs the garbage collection once, and then notes the run in `ir_cron`, unless it gave up.
///
/// # Errors
/// What the server or the disk says, but for the ways in which it ends that [`Collection`] has.
pub async fn collect(odoo: &Odoo, pause: &Pause) -> Result<Collection> {
    let mut connection = odoo.lease(pause).await?;
    let location = "select value from ir_config_parameter where key = 'ir_attachment.location'";
    if first_column(&mut connection, location).await?.contains("db") {
        return Ok(Collection::Done { checked: 0, removed: 0 });
    }
    let mut run = Run { odoo, pause, connection };
    let ended = if odoo.series().locks_for_gc() { run.locking().await } else { run.by_age().await };
    let collection = match ended {
        Ok((checked, removed)) => Collection::Done { checked, removed },
        Err(error) if is_state(&error, LOCK_NOT_AVAILABLE) => Collection::GaveUp,
        Err(error) if is_state(&error, SERIALIZATION_FAILURE) => Collection::Conflict,
        Err(error) => return Err(error),
    };
    if matches!(collection, Collection::Done { .. }) {
        run.note().await?;
    } else {
        let _ = run.sql("gc: roll back", "rollback").await?;
    }
    odoo.give_back(run.connection);
    Ok(collection)
}

async fn first_column(connection: &mut Connection, sql: &str) -> Result<BTreeSet<String>> {
    let sets = connection.simple_query(sql).await?;
    let rows = sets.last().map(|set| set.rows.as_slice()).unwrap_or_default();
    rows.iter().map(|row| row.required(0).map(str::to_owned)).collect()
}

/// True unless there was nothing of that name.
fn there(result: io::Result<()>, doing: &str, path: &Path) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(doing, path, error)),
    }
}

struct Run<'a> {
    odoo: &'a Odoo,
    pause: &'a Pause,
    connection: Connection,
}

impl Run<'_> {
    async fn sql(&mut self, what: &'static str, sql: &str) -> Result<BTreeSet<String>> {
        let _: Step = self.pause.here(what).await;
        first_column(&mut self.connection, sql).await
    }

    /// Which of these names rows refer to.
    async fn referenced(&mut self, marks: &[Mark], more: &str) -> Result<BTreeSet<String>> {
        let names: Vec<String> = marks.iter().map(|mark| quote_literal(&mark.store_fname)).collect();
        let sql = format!("select store_fname from ir_attachment where store_fname in ({}){more}", names.join(", "));
        self.sql("gc: look up", &sql).await
    }

    /// 14 to 19.
    async fn locking(&mut self) -> Result<(usize, usize)> {
        let timeout = self.odoo.rules().lock_timeout.as_millis();
        let begin = format!("begin isolation level repeatable read; set local lock_timeout to '{timeout}ms'");
        let _ = self.sql("gc: begin", &begin).await?;
        let _ = self.sql("gc: lock", "lock ir_attachment in share mode").await?;
        let _: Step = self.pause.here("gc: list").await;
        let marks = self.odoo.filestore().marks()?;
        let mut removed = 0;
        for chunk in marks.chunks(self.odoo.rules().gc_chunk.max(1)) {
            let kept = self.referenced(chunk, "").await?;
            for mark in chunk {
                if !kept.contains(&mark.store_fname) {
                    let _: Step = self.pause.here("gc: unlink").await;
                    // A mark without a file is logged and passed over.
                    removed += usize::from(self.odoo.filestore().unlink(&mark.store_fname)?);
                }
                let _: Step = self.pause.here("gc: unlink the mark").await;
                let _ = there(fs::remove_file(&mark.path), "unlink", &mark.path)?;
            }
        }
        let _ = self.sql("gc: commit", "commit").await?;
        Ok((marks.len(), removed))
    }

    /// 20.
    async fn by_age(&mut self) -> Result<(usize, usize)> {
        const TIMEOUTS: &str = "select coalesce(max(setting::int) / 1000, 0) from pg_settings where vartype = 'integer' and unit = 'ms' \
             and name in ('idle_in_transaction_session_timeout', 'transaction_timeout') and setting <> '0'";
        let timeout = first_column(&mut self.connection, TIMEOUTS).await?;
        let timeout: i64 = timeout.first().and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
        let grace = self.odoo.rules().grace.max(SignedDuration::from_secs(timeout.saturating_mul(2)));
        let grace = grace.min(SignedDuration::from_hours(7 * 24));
        let limit: SystemTime = self.odoo.now().saturating_sub(grace).unwrap_or_default().into();

        let _: Step = self.pause.here("gc: list").await;
        let (mut marks, mut removed) = (Vec::new(), 0);
        for mark in self.odoo.filestore().marks()? {
            if let Some(original) = mark.path.to_str().and_then(|path| path.strip_suffix(GC_SUFFIX)) {
                let moved_back = !Path::new(original).exists() && fs::rename(&mark.path, original).is_ok();
                if !moved_back {
                    let _ = there(fs::remove_file(&mark.path), "unlink", &mark.path)?;
                }
            } else if mark.touched < limit {
                let beside = suffixed(&self.odoo.filestore().path(&mark.store_fname), WRITE_SUFFIX);
                let _ = there(fs::remove_file(&beside), "unlink", &beside)?;
                marks.push(mark);
            }
        }
        for chunk in marks.chunks(self.odoo.rules().gc_chunk.max(1)) {
            let _ = self.sql("gc: begin", "begin isolation level repeatable read").await?;
            // In an order, unlike Odoo: where the rows lie differs from run to run, and so would the one that it waits for first.
            let kept = self.referenced(chunk, " order by id for update").await?;
            for mark in chunk {
                if kept.contains(&mark.store_fname) {
                    let _: Step = self.pause.here("gc: unlink the mark").await;
                    let _ = there(fs::remove_file(&mark.path), "unlink", &mark.path)?;
                } else {
                    removed += usize::from(self.remove(mark, limit).await?);
                }
            }
            let _ = self.sql("gc: commit", "commit").await?;
        }
        Ok((marks.len(), removed))
    }

    /// A name without rows, in the steps of the 20 series.
    async fn remove(&mut self, mark: &Mark, limit: SystemTime) -> Result<bool> {
        let filestore = self.odoo.filestore();
        let path = filestore.path(&mark.store_fname);
        let (renamed_mark, renamed) = (suffixed(&mark.path, GC_SUFFIX), suffixed(&path, GC_SUFFIX));
        let _: Step = self.pause.here("gc: rename the mark").await;
        if !there(fs::rename(&mark.path, &renamed_mark), "rename", &mark.path)? {
            return Ok(false);
        }
        let _: Step = self.pause.here("gc: look at its time").await;
        let touched = fs::metadata(&renamed_mark).and_then(|meta| meta.modified());
        if touched.map_err(|error| Error::io("read the time of", &renamed_mark, error))? >= limit {
            let _ = there(fs::rename(&renamed_mark, &mark.path), "rename", &renamed_mark)?;
            return Ok(false);
        }
        let _: Step = self.pause.here("gc: rename").await;
        let _ = there(fs::rename(&path, &renamed), "rename", &path)?;
        filestore.observe(&mark.store_fname)?;
        let _: Step = self.pause.here("gc: look for a new mark").await;
        if mark.path.exists() {
            let _ = there(fs::rename(&renamed, &path), "rename", &renamed)?;
            filestore.observe(&mark.store_fname)?;
            let _ = there(fs::remove_file(&renamed_mark), "unlink", &renamed_mark)?;
            return Ok(false);
        }
        let _: Step = self.pause.here("gc: unlink").await;
        let removed = there(fs::remove_file(&renamed), "unlink", &renamed)?;
        let _: Step = self.pause.here("gc: unlink the mark").await;
        let _ = there(fs::remove_file(&renamed_mark), "unlink", &renamed_mark)?;
        Ok(removed)
    }

    /// What the scheduler of jobs writes after a run.
    async fn note(&mut self) -> Result<()> {
        let now = self.odoo.now().strftime("%Y-%m-%d %H:%M:%S").to_string();
        let sql = format!(
            "update ir_cron set lastcall = '{now}', nextcall = timestamp '{now}' + interval '1 day' where id = \
             (select res_id from ir_model_data where module = 'base' and name = 'autovacuum_job' and model = 'ir.cron')"
        );
        self.sql("gc: note the run", &sql).await.map(drop)
    }
}
