//! The operator's own checks: statements whose answer must be true, and programs that must succeed.

use std::process::Command;
use std::time::{Duration, Instant};

use pgvault_core::Result;
use pgvault_core::postgres::{Connection, Host};
use pgvault_core::vault::drill::Verdict;
use serde_json::json;

use super::{Found, Restored, databases};
use crate::runner::command::run_and_listen;

/// A check of the operator's.
#[derive(Debug, Clone)]
pub struct Assertion {
    /// Its name, for reports.
    pub name: String,
    /// The database it is about; every one that is not a template when there is none.
    pub database: Option<String>,
    /// What is asked.
    pub question: Question,
    /// Longest time it may take.
    pub limit: Duration,
    /// False: it only warns.
    pub must_hold: bool,
}

/// What is asked.
#[derive(Debug, Clone)]
pub enum Question {
    /// Every row of the answer must begin with true, and there must be one.
    Sql(String),
    /// A program and its arguments; it finds the copy by `PGHOST`, `PGPORT`, `PGUSER` and `PGDATABASE`, and must end with 0.
    Program(Vec<String>),
}

/// Asks it of each database that it is about.
pub(super) async fn ask(restored: &Restored<'_>, assertion: &Assertion) -> Vec<(Option<String>, Instant, Result<Found>)> {
    let began = Instant::now();
    let names = match &assertion.database {
        Some(name) => vec![name.clone()],
        None => match databases(restored).await {
            Ok(names) => names,
            Err(error) => return vec![(None, began, Err(error))],
        },
    };
    let mut answers = Vec::new();
    for database in names {
        let began = Instant::now();
        let found = match &assertion.question {
            Question::Sql(statement) => sql(restored, &database, statement, assertion.limit).await,
            Question::Program(words) => program(restored, &database, words, assertion.limit).await,
        };
        let found = found.map(|found| {
            let decides = assertion.must_hold || found.verdict != Verdict::Failed;
            if decides { found } else { Found::warned(found.message, found.evidence) }
        });
        answers.push((Some(database), began, found));
    }
    answers
}

async fn sql(restored: &Restored<'_>, database: &str, statement: &str, limit: Duration) -> Result<Found> {
    let mut sql =
        Connection::connect(&super::in_database(&restored.connection, database), pgvault_core::postgres::Mode::Sql).await?;
    sql.set_idle_timeout(None);
    let asked = tokio::time::timeout(limit, sql.simple_query(statement)).await;
    let sets = match asked {
        Err(_) => return Ok(Found::failed(format!("it took longer than {} s", limit.as_secs()), json!({ "sql": statement }))),
        // The server says what is wrong with it, and goes on; a broken connection is the server's end.
        Ok(Err(error)) if sql.is_idle() => return Ok(Found::failed(error.to_string(), json!({ "sql": statement }))),
        Ok(answer) => answer?,
    };
    let rows = sets.into_iter().rev().find(|set| !set.columns.is_empty()).unwrap_or_default().rows;
    let answers: Vec<String> = rows.iter().take(20).map(|row| row.text(0).ok().flatten().unwrap_or("NULL").to_owned()).collect();
    let holds = !rows.is_empty() && rows.iter().all(|row| matches!(row.text(0), Ok(Some("t" | "true"))));
    let evidence = json!({ "sql": statement, "answer": answers });
    sql.close().await;
    Ok(if holds {
        Found::passed("it holds", evidence)
    } else if rows.is_empty() {
        Found::failed("it does not hold: the answer has no rows", evidence)
    } else {
        Found::failed(format!("it does not hold: the answer is {}", answers.join(", ")), evidence)
    })
}

async fn program(restored: &Restored<'_>, database: &str, words: &[String], limit: Duration) -> Result<Found> {
    let Some((program, arguments)) = words.split_first() else {
        return Ok(Found::failed("no program is named", json!(null)));
    };
    let mut command = Command::new(program);
    let _ = command.args(arguments);
    for (name, _) in std::env::vars_os() {
        // Nothing leads to production.
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            let _ = command.env_remove(name);
        }
    }
    if let Some(endpoint) = restored.connection.endpoints.first() {
        let host = match &endpoint.host {
            Host::Unix(folder) => folder.to_string_lossy().into_owned(),
            Host::Tcp(name) => name.clone(),
        };
        let _ = command.env("PGHOST", host).env("PGPORT", endpoint.port.to_string());
    }
    let _ = command.env("PGUSER", &restored.connection.user).env("PGDATABASE", database);
    let ran = match run_and_listen(command, limit).await {
        Ok(ran) => ran,
        Err(error) => return Ok(Found::failed(error.to_string(), json!({ "command": words }))),
    };
    let evidence = json!({ "command": words, "exit_code": ran.code, "output": ran.output });
    Ok(match ran.code {
        Some(0) => Found::passed(format!("{program} succeeded"), evidence),
        Some(code) => Found::failed(
            format!("{program} ended with {code}: {}", ran.output.lines().next_back().unwrap_or("it said nothing")),
            evidence,
        ),
        None => Found::failed(format!("{program}: {}", ran.output), evidence),
    })
}
