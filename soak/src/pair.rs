//! Two servers that take turns as primary and standby.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pgvault_verify::process::{Install, Mode, Server};

use crate::place::{Place, quiet};

/// How long a server may take to come, to go, and to follow.
const PATIENCE: Duration = Duration::from_secs(120);

/// The two servers; both are stopped when this is dropped.
#[derive(Debug)]
pub(crate) struct Pair {
    servers: [Server; 2],
    primary: usize,
}

impl Pair {
    /// Makes both and starts the first.
    pub(crate) fn new(place: &Place, install: &Install) -> Result<Self> {
        let build = |name: &str, port| {
            Server::builder(install)
                .pgdata(place.path(name))
                .port(port)
                .timeout(PATIENCE)
                .config("shared_buffers = 32MB\nmax_wal_senders = 10\nwal_level = replica\nmax_connections = 60")
                .config("wal_keep_size = 1GB\nmax_wal_size = 256MB\nwal_sender_timeout = 10s\nwal_receiver_timeout = 10s")
                .config("wal_retrieve_retry_interval = 500ms\nhot_standby = on\nfsync = off\ntrack_commit_timestamp = on\nlog_checkpoints = off")
                .config(format!(
                    "primary_conninfo = 'host={} port=5432 user=postgres application_name=standby'",
                    place.address().display()
                ))
                .create()
        };
        let mut pair = Self { servers: [build("one", 5432)?, build("two", 5433)?], primary: 0 };
        pair.primary().start()?;
        pair.lead(place)?;
        pair.sql("create table ledger (w int, n int, pad text, primary key (w, n)); create table bulk (pad text)")?;
        Ok(pair)
    }

    pub(crate) fn primary(&mut self) -> &mut Server {
        &mut self.servers[self.primary]
    }

    pub(crate) fn standby(&mut self) -> &mut Server {
        &mut self.servers[1 - self.primary]
    }

    /// Clients and the stream find the primary.
    pub(crate) fn lead(&mut self, place: &Place) -> Result<()> {
        let server = &self.servers[self.primary];
        place.lead_to(server.socket_dir(), server.port(), server.pgdata())
    }

    /// Runs SQL on the primary; nothing of it waits for the vault.
    pub(crate) fn sql(&self, text: &str) -> Result<String> {
        Ok(self.servers[self.primary].psql(&format!("set synchronous_commit = local;\n{text}"))?)
    }

    /// The other server takes over.
    pub(crate) fn promote(&mut self, place: &Place) -> Result<()> {
        let _ = self.standby().psql("select pg_promote(true, 60)")?;
        self.primary = 1 - self.primary;
        self.lead(place)
    }

    /// Takes the host of the primary away, and that of the standby.
    pub(crate) fn lose(&mut self) -> Result<()> {
        self.primary().kill9()?;
        self.empty(self.primary)?;
        if self.standby().is_running() {
            self.standby().kill9()?;
        }
        self.empty(1 - self.primary)
    }

    fn empty(&self, server: usize) -> Result<()> {
        let pgdata = self.servers[server].pgdata();
        fs::remove_dir_all(pgdata).with_context(|| format!("remove {}", pgdata.display()))
    }

    /// The server that is not the primary becomes a standby of it, from what it has or from nothing.
    pub(crate) fn rebuild(&mut self, place: &Place, install: &Install, rewind: bool) -> Result<&'static str> {
        let other = 1 - self.primary;
        if self.servers[other].is_running() {
            self.servers[other].stop(Mode::Immediate)?;
        }
        let pgdata = self.servers[other].pgdata().to_path_buf();
        let address = place.address();
        let mut how = "pg_basebackup";
        if rewind && pgdata.join("PG_VERSION").is_file() {
            // What it compares is the control file, which hears of a promotion with the first checkpoint after it.
            let _ = self.sql("checkpoint")?;
            let mut command = place.command(&install.program("pg_rewind")?);
            command.arg("--target-pgdata").arg(&pgdata).arg("--source-server");
            command.arg(format!("host={} port=5432 user=postgres dbname=postgres", address.display()));
            // A rewind may be impossible, for one when the servers parted before the last common checkpoint was kept.
            if quiet(&mut command).is_ok() {
                how = "pg_rewind";
            }
        }
        if how == "pg_basebackup" {
            if pgdata.exists() {
                self.empty(other)?;
            }
            let mut command = place.command(&install.program("pg_basebackup")?);
            command.args(["-X", "stream", "-c", "fast", "-N", "-U", "postgres", "-p", "5432", "-h"]).arg(&address);
            quiet(command.arg("-D").arg(&pgdata))?;
        }
        fs::write(pgdata.join("standby.signal"), "")?;
        place.account.own(&pgdata.join("standby.signal"))?;
        self.servers[other].start()?;
        self.wait_for_standby()?;
        Ok(how)
    }

    /// Waits until the standby has what the primary has now: one on another branch looks as if it were streaming, again and again.
    pub(crate) fn wait_for_standby(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let position = self.sql("select pg_current_wal_lsn()")?;
        let query = format!(
            "select coalesce(max(replay_lsn) >= '{position}', false) from pg_stat_replication where application_name = 'standby'"
        );
        while self.sql(&query)? != "t" {
            if Instant::now() >= deadline {
                bail!("the standby does not follow; its log ends with\n{}", self.standby().log_tail());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}
