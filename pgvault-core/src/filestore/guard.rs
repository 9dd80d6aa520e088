//! A guard against Odoo's garbage collector (14 to 19): it cannot begin before the checklist was looked at.
//!
//! The collector takes `ir_attachment IN SHARE MODE` before it looks at its checklist. An idle transaction that holds the table `IN ROW
//! EXCLUSIVE MODE` keeps it waiting, and nothing else: rows are read and written as before, and with no snapshot and no transaction id
//! the transaction holds back no vacuum. Writers that come behind a waiting collector queue behind it, so as soon as somebody waits, the
//! files on the checklist are opened, which keeps their contents whatever happens to their names, and the lock is given back: at once when
//! they are open, after [`LONGEST`] in any case.
//!
//! It takes `UPDATE` on that one table (from 17 on `MAINTAIN`); `SELECT` is refused by the server.

use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::postgres::{ConnInfo, Connection, Mode};
use crate::{Error, ErrorKind, Result};

/// How long somebody may wait for the lock.
pub const LONGEST: Duration = Duration::from_secs(2);

/// How often it is looked whether somebody waits.
const POLL: Duration = Duration::from_millis(50);

/// What a guard tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The lock is held.
    Held,
    /// Somebody waits for it.
    Wanted,
    /// It was given back before it was said that the files are open, because somebody would have waited too long.
    Overrun,
    /// The connection is gone.
    Broken,
}

/// A lock that keeps the collector waiting. Dropping it gives it back.
#[derive(Debug)]
pub struct Guard {
    state: watch::Receiver<State>,
    release: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Guard {
    /// Takes the lock. While a collector runs, this waits for its end.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the server cannot be asked, or refuses the role the lock.
    pub async fn arm(connection: &ConnInfo, database: &str) -> Result<Self> {
        let to = ConnInfo { dbname: Some(database.to_owned()), ..connection.clone() };
        let mut sql = Connection::connect(&to, Mode::Sql).await?;
        let begin = "SET idle_in_transaction_session_timeout = 0; SET lock_timeout = 0; BEGIN ISOLATION LEVEL READ COMMITTED; \
                     LOCK TABLE public.ir_attachment IN ROW EXCLUSIVE MODE";
        let _ = sql.simple_query(begin).await.map_err(|error| {
            Error::new(ErrorKind::Source, "filestore.guard", format!("the guard on {database} cannot be set: {error}"))
                .with_hint(
                    "GRANT UPDATE ON ir_attachment TO the role (from PostgreSQL 17 on, GRANT MAINTAIN), or use mode = \"poll\"",
                )
                .with_source(error)
        })?;
        let (told, state) = watch::channel(State::Held);
        let (release, released) = oneshot::channel();
        let task = tokio::spawn(hold(sql, told, released));
        Ok(Self { state, release: Some(release), task })
    }

    /// Waits until somebody wants the lock, or a time has passed; true when somebody does.
    pub async fn wanted_within(&mut self, time: Duration) -> bool {
        timeout(time, self.state.wait_for(|state| *state != State::Held)).await.is_ok()
    }

    /// True while the collector cannot have begun.
    pub fn holds(&self) -> bool {
        matches!(*self.state.borrow(), State::Held | State::Wanted)
    }

    /// Gives the lock back: what has to be kept is open. True when it was held up to now.
    pub async fn give_back(mut self) -> bool {
        let held = self.holds();
        if let Some(release) = self.release.take() {
            let _ = release.send(());
        }
        let _ = (&mut self.task).await;
        held && !matches!(*self.state.borrow(), State::Overrun | State::Broken)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The server gives the lock back when the connection ends.
        self.task.abort();
    }
}

async fn hold(mut sql: Connection, told: watch::Sender<State>, mut released: oneshot::Receiver<()>) {
    let mut wanted: Option<Instant> = None;
    loop {
        tokio::select! {
            _ = &mut released => break,
            () = sleep(POLL) => {}
        }
        if let Some(since) = wanted {
            if since.elapsed() + POLL * 2 >= LONGEST {
                let _ = told.send_replace(State::Overrun);
                break;
            }
            continue;
        }
        match is_wanted(&mut sql).await {
            Ok(false) => {}
            Ok(true) => {
                wanted = Some(Instant::now());
                let _ = told.send_replace(State::Wanted);
            }
            Err(error) => {
                tracing::warn!(%error, "the guard against Odoo's garbage collector is lost");
                let _ = told.send_replace(State::Broken);
                return;
            }
        }
    }
    if sql.simple_query("COMMIT").await.is_err() {
        let _ = told.send_replace(State::Broken);
    }
    sql.close().await;
}

async fn is_wanted(sql: &mut Connection) -> Result<bool> {
    let row = sql
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE NOT granted AND relation = 'public.ir_attachment'::pg_catalog.regclass \
             AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))",
        )
        .await?;
    Ok(row.required(0)? == "t")
}
