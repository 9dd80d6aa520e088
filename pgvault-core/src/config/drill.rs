//! `[cluster.NAME.drill]`: where restore drills are held, what they have to prove, and how fast it should be.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::load;
use crate::{Error, ErrorKind, Result};

/// What a drill runs the restored cluster in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunnerKind {
    /// A PostgreSQL that is installed on this machine.
    #[default]
    Process,
    /// A container, by the Docker API: Docker Engine or Podman.
    Docker,
    /// The pod that pgvault runs in, as a process beside it.
    Kubernetes,
}

/// `[cluster.NAME.drill]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrillConfig {
    /// What runs the copy.
    pub runner: RunnerKind,
    /// Folder that copies are made in; the system's temporary one when not given.
    pub folder: Option<PathBuf>,
    /// The superuser of the cluster.
    pub user: String,
    /// Image of the container; the official one of the major version when not given.
    pub image: Option<String>,
    /// Socket of the Docker API.
    pub socket: Option<PathBuf>,
    /// Memory of the container.
    #[serde(deserialize_with = "load::optional_size")]
    pub memory: Option<u64>,
    /// Takes an image with musl: right only for a cluster that runs on musl itself.
    pub accept_musl: bool,
    /// Folders with programs of PostgreSQL, besides the usual ones.
    pub programs: Vec<PathBuf>,
    /// Settings of the copy's server, as in `postgresql.conf`.
    pub settings: BTreeMap<String, String>,
    /// Longest time for replay, and for each check.
    #[serde(deserialize_with = "load::duration")]
    pub timeout: Duration,
    /// How long a restore may take: what is promised to those who wait for it.
    #[serde(deserialize_with = "load::optional_duration")]
    pub rto: Option<Duration>,
    /// Whether backups count the rows of tables that stand still, for drills to compare.
    pub count_rows: bool,
    /// Checks of the operator's own.
    pub check: Vec<DrillCheck>,
}

impl Default for DrillConfig {
    fn default() -> Self {
        Self {
            runner: RunnerKind::Process,
            folder: None,
            user: "postgres".into(),
            image: None,
            socket: None,
            memory: None,
            accept_musl: false,
            programs: Vec::new(),
            settings: BTreeMap::new(),
            timeout: Duration::from_secs(24 * 3600),
            rto: None,
            count_rows: true,
            check: Vec::new(),
        }
    }
}

/// `[[cluster.NAME.drill.check]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillCheck {
    /// Its name in reports.
    pub name: String,
    /// The database it is about; each one when not given.
    pub database: Option<String>,
    /// A statement: every row of its answer must begin with true.
    pub sql: Option<String>,
    /// A program and its arguments: it must end with 0.
    pub command: Option<Vec<String>>,
    /// Longest time it may take.
    #[serde(default = "ten_minutes", deserialize_with = "load::duration")]
    pub timeout: Duration,
    /// Only warn when it does not hold.
    #[serde(default)]
    pub warn: bool,
}

fn ten_minutes() -> Duration {
    Duration::from_secs(600)
}

/// What a [`DrillCheck`] asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asks {
    /// A statement.
    Sql(String),
    /// A program and its arguments.
    Command(Vec<String>),
}

impl DrillCheck {
    /// What it asks: one of the two.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when it asks neither or both.
    pub fn asks(&self) -> Result<Asks> {
        match (&self.sql, &self.command) {
            (Some(sql), None) => Ok(Asks::Sql(sql.clone())),
            (None, Some(command)) if !command.is_empty() => Ok(Asks::Command(command.clone())),
            _ => {
                let why = format!("the drill's check `{}` needs either `sql` or `command`", self.name);
                Err(Error::new(ErrorKind::Usage, "config.drill_check", why))
            }
        }
    }
}
