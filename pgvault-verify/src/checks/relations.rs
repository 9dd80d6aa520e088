//! Tables can be read, and heaps and B-trees are what they should be.

use std::collections::VecDeque;
use std::sync::Arc;

use pgvault_core::postgres::{Connection, quote_identifier};
use pgvault_core::{ErrorKind, Result};
use serde_json::json;
use tokio::sync::Mutex;

use super::{Found, NAMED, Restored, all_databases, ask, databases, listed};
use crate::seed::scatter;

/// Bytes of one relation that a sample reads, about: smaller ones are read as a whole.
const SAMPLE_OF_ONE: u64 = 32 << 20;

/// How much of all relations a sample of tables is, and the least of it. Every value of these is taken out of its row.
const SAMPLE_OF_TABLES: (u64, u64) = (16, 64 << 20);

/// The same for the structure of heaps and B-trees.
const SAMPLE_OF_STRUCTURE: (u64, u64) = (8, 128 << 20);

/// What is left of a sample.
#[derive(Debug)]
struct Budget {
    left: u64,
}

impl Budget {
    /// Everything when nothing is left out; else a part of these relations, but not less than the least.
    fn new(relations: &[Relation], is_whole: bool, (part, least): (u64, u64)) -> Self {
        let all: u64 = relations.iter().map(|relation| relation.bytes).sum();
        Self { left: if is_whole { u64::MAX } else { (all / part).max(least) } }
    }

    /// True when so many bytes are still in it; then they are taken.
    fn take(&mut self, bytes: u64) -> bool {
        let left = self.left.checked_sub(bytes);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

/// A relation of a database.
#[derive(Debug, Clone)]
struct Relation {
    database: String,
    /// Quoted, with its schema.
    name: String,
    oid: u32,
    bytes: u64,
}

/// Reads tables, every column of them.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn read(restored: &Restored<'_>) -> Result<Found> {
    let mut tables = Vec::new();
    for database in databases(restored).await? {
        // Partitioned tables have no rows of their own, foreign ones none here; a materialised view may never have been filled.
        tables.extend(relations(restored, &database, "c.relkind = 'r' OR (c.relkind = 'm' AND c.relispopulated)").await?);
    }
    let total = tables.len();
    shuffle(&mut tables, restored.seed);
    let mut budget = Budget::new(&tables, restored.deep, SAMPLE_OF_TABLES);
    let mut bytes = 0_u64;
    let mut jobs = VecDeque::new();
    for table in tables {
        let share = if restored.deep { table.bytes } else { table.bytes.min(SAMPLE_OF_ONE) };
        if !budget.take(share) {
            continue;
        }
        bytes += share;
        let sample = if share < table.bytes {
            // Of pages: a whole page is read or none of it.
            let percent = (share * 10_000 / table.bytes.max(1)).max(1);
            format!(" TABLESAMPLE SYSTEM ({}.{:02}) REPEATABLE ({})", percent / 100, percent % 100, restored.seed % 1_000_000)
        } else {
            String::new()
        };
        // As text, which takes every value out of its row, and out of the TOAST table.
        let statement = format!("SELECT count(*), sum(length(t::text)) FROM ONLY {} AS t{sample}", table.name);
        jobs.push_back((table, statement));
    }
    let read = jobs.len();
    let (rows, failed) = run(restored, jobs).await?;
    let rows: u64 = rows.iter().filter_map(|row| row.parse::<u64>().ok()).sum();
    let what = if restored.deep { "every row of every table" } else { "a sample by the drill's seed" };
    let evidence =
        json!({ "tables": total, "read": read, "rows": rows, "bytes": bytes, "deep": restored.deep, "failed": listed(&failed) });
    Ok(match failed.first() {
        Some(first) => Found::failed(format!("{} of {read} tables cannot be read: {first}", failed.len()), evidence),
        None => Found::passed(format!("{rows} rows of {read} of {total} tables read, {what}"), evidence),
    })
}

/// Examines heaps and B-trees by `amcheck`, which is installed in the copy.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn amcheck(restored: &Restored<'_>) -> Result<Found> {
    let (toast, tree) = if restored.deep {
        ("check_toast => true", "bt_index_parent_check(index => $oid, heapallindexed => true, rootdescend => true)")
    } else {
        ("check_toast => false", "bt_index_check(index => $oid, heapallindexed => false)")
    };
    let mut all = Vec::new();
    for database in all_databases(restored).await? {
        let mut sql = restored.connect(&database).await?;
        let there = ask(&mut sql, "SELECT FROM pg_available_extensions WHERE name = 'amcheck'").await?;
        if there.rows.is_empty() {
            return Ok(Found::missing(
                "amcheck is not installed beside the server that runs the copy (Debian has it in postgresql-NN, Red Hat in postgresql-contrib)",
            ));
        }
        // In a schema of its own: the copy may have something of that name.
        let _ = sql
            .simple_query(
                "CREATE SCHEMA IF NOT EXISTS pgvault_drill; CREATE EXTENSION IF NOT EXISTS amcheck WITH SCHEMA pgvault_drill",
            )
            .await?;
        let schema = ask(
            &mut sql,
            "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'amcheck'",
        )
        .await?;
        let schema = schema.rows.first().map(|row| row.required(0).map(quote_identifier)).transpose()?.unwrap_or_default();
        sql.close().await;
        let heaps = relations(restored, &database, "c.relkind IN ('r', 'm', 't') AND c.relam = 2").await?;
        let live = "c.relkind = 'i' AND c.relam = 403 AND EXISTS (SELECT FROM pg_index x WHERE x.indexrelid = c.oid AND x.indisvalid AND x.indisready)";
        let trees = relations(restored, &database, live).await?;
        all.extend(heaps.into_iter().map(|heap| (heap, true, schema.clone())));
        all.extend(trees.into_iter().map(|tree| (tree, false, schema.clone())));
    }
    let count = |heaps: bool| all.iter().filter(|(_, is_heap, _)| *is_heap == heaps).count();
    let (heaps, trees) = (count(true), count(false));
    all.sort_by_key(|(relation, ..)| scatter(restored.seed ^ u64::from(relation.oid)));
    let relations: Vec<Relation> = all.iter().map(|(relation, ..)| relation.clone()).collect();
    let mut budget = Budget::new(&relations, restored.deep, SAMPLE_OF_STRUCTURE);
    let block = u64::from(restored.recovered.snapshot.manifest.block_size.max(1));
    let mut jobs = VecDeque::new();
    let (mut some_heaps, mut some_trees) = (0_u64, 0_u64);
    for (relation, is_heap, schema) in all {
        let oid = relation.oid;
        if is_heap {
            let blocks = (!restored.deep && relation.bytes > SAMPLE_OF_ONE).then(|| blocks(&relation, block, restored.seed));
            if !budget.take(if blocks.is_some() { SAMPLE_OF_ONE } else { relation.bytes }) {
                continue;
            }
            some_heaps += 1;
            let range = blocks.map(|(first, last)| format!(", startblock => {first}, endblock => {last}")).unwrap_or_default();
            let statement = format!(
                "SELECT count(*), string_agg(format('block %s offset %s: %s', blkno, offnum, msg), '; ') FROM \
                 {schema}.verify_heapam(relation => {oid}::oid::regclass, {toast}, on_error_stop => true{range})"
            );
            jobs.push_back((relation, statement));
        } else if budget.take(relation.bytes) {
            some_trees += 1;
            let call = tree.replace("$oid", &format!("{oid}::oid::regclass"));
            jobs.push_back((relation, format!("SELECT 0, {schema}.{call}")));
        }
    }
    let (found, mut failed) = run(restored, jobs).await?;
    failed.extend(found.into_iter().filter(|found| found != "0"));
    let evidence = json!({
        "heaps": heaps, "btrees": trees, "examined_heaps": some_heaps, "examined_btrees": some_trees, "deep": restored.deep, "failed": listed(&failed),
    });
    let how =
        if restored.deep { "every row indexed, every parent right" } else { "structure and order, a sample by the drill's seed" };
    Ok(match failed.first() {
        Some(first) => Found::failed(format!("{} relations are damaged: {first}", failed.len()), evidence),
        None => {
            Found::passed(format!("{some_heaps} of {heaps} heaps and {some_trees} of {trees} B-trees are sound ({how})"), evidence)
        }
    })
}

/// Some blocks of a large heap, by the seed: the first and the last of them.
fn blocks(heap: &Relation, block: u64, seed: u64) -> (u64, u64) {
    let (all, some) = (heap.bytes / block, SAMPLE_OF_ONE / block);
    let first = scatter(seed ^ u64::from(heap.oid)) % (all.saturating_sub(some) + 1);
    (first, (first + some).min(all).saturating_sub(1))
}

fn shuffle(relations: &mut [Relation], seed: u64) {
    relations.sort_by_key(|relation| scatter(seed ^ u64::from(relation.oid)));
}

/// Relations of a database that have files; not those of other sessions' temporary schemas.
async fn relations(restored: &Restored<'_>, database: &str, which: &str) -> Result<Vec<Relation>> {
    let mut sql = restored.connect(database).await?;
    let rows = ask(
        &mut sql,
        &format!(
            "SELECT n.nspname, c.relname, c.oid, pg_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE ({which}) AND c.relpersistence <> 't' ORDER BY c.oid"
        ),
    )
    .await?;
    sql.close().await;
    rows.rows
        .iter()
        .map(|row| {
            Ok(Relation {
                database: database.to_owned(),
                name: format!("{}.{}", quote_identifier(row.required(0)?), quote_identifier(row.required(1)?)),
                oid: row.required(2)?.parse().unwrap_or_default(),
                bytes: row.text(3)?.and_then(|bytes| bytes.parse().ok()).unwrap_or_default(),
            })
        })
        .collect()
}

/// Runs statements over several sessions. Gives the first column of each answer (with the second, when the first is a count that is not
/// the rows of a table), and what failed.
async fn run(restored: &Restored<'_>, jobs: VecDeque<(Relation, String)>) -> Result<(Vec<String>, Vec<String>)> {
    let jobs = Arc::new(Mutex::new(jobs));
    let worker = || async {
        let (mut answers, mut failed) = (Vec::new(), Vec::new());
        let mut session: Option<(String, Connection)> = None;
        loop {
            let Some((relation, statement)) = jobs.lock().await.pop_front() else { break };
            let mut sql = match session.take() {
                Some((database, sql)) if database == relation.database => sql,
                _ => restored.connect(&relation.database).await?,
            };
            match sql.query_one(&statement).await {
                Ok(row) => {
                    let answer = row.required(0)?.to_owned();
                    match row.text(1)?.filter(|_| statement.contains("verify_heapam") && answer != "0") {
                        Some(problems) => {
                            let problems: String = problems.chars().take(200).collect();
                            failed.push(format!("{} in {}: {problems}", relation.name, relation.database));
                        }
                        None => answers.push(answer),
                    }
                    session = Some((relation.database, sql));
                }
                // The server reports it and goes on; a connection that breaks is another matter.
                Err(error) if error.kind() != ErrorKind::Storage && sql.is_idle() => {
                    if failed.len() < NAMED * 10 {
                        failed.push(format!("{} in {}: {error}", relation.name, relation.database));
                    }
                    session = Some((relation.database, sql));
                }
                Err(error) => return Err(error),
            }
        }
        Ok((answers, failed))
    };
    let workers = (0..restored.workers.max(1)).map(|_| worker());
    let (mut answers, mut failed) = (Vec::new(), Vec::new());
    for done in futures::future::join_all(workers).await {
        let (some, wrong) = done?;
        answers.extend(some);
        failed.extend(wrong);
    }
    failed.sort();
    Ok((answers, failed))
}
