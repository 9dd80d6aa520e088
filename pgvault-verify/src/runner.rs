//! What a restored cluster is started in.
//!
//! A [`Runner`] takes a [`Copy`](Site) that was restored onto this machine and gives a running server back, cut off from everything
//! that the copy's original belongs to. Drills see no difference between a local process and a container: the server is reached
//! through a socket in a folder of the site, its programs are run beside it, and it ends when it is told to.
//!
//! - [`process`]: a server of the right major version that is installed here, run by an unprivileged account.
//! - [`docker`]: a container without a network, through the API that Docker and Podman share.

pub(crate) mod command;
pub mod docker;
pub mod process;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::{Error, Result};

/// A restored cluster on this machine's disk. All of it lies below one folder, which nothing else uses.
#[derive(Debug, Clone)]
pub struct Site {
    /// The folder. A container sees it under the same path.
    pub folder: PathBuf,
    /// The data directory, in it.
    pub pgdata: PathBuf,
    /// Locations of its tablespaces, in the folder as well.
    pub tablespaces: Vec<PathBuf>,
    /// Name of the drill, to find by it what was left behind.
    pub name: String,
    /// The superuser that the server is asked as.
    pub user: String,
}

/// What is needed to run the copy of a cluster.
#[derive(Debug, Clone)]
pub struct Needs {
    /// Major version of PostgreSQL.
    pub major: u32,
    /// Bytes of shared buffers that the server will have.
    pub shared_buffers: u64,
}

/// Runs servers.
#[async_trait]
pub trait Runner: Send + Sync {
    /// What it is, for reports: `process`, or `docker` with the image.
    fn describe(&self) -> String;

    /// Makes sure that it can run such a cluster before anything is restored.
    ///
    /// # Errors
    /// When a program, an image or a right is missing; says what to do.
    async fn prepare(&mut self, needs: &Needs) -> Result<()>;

    /// User and group that have to own the files of the copy.
    fn owner(&self) -> (u32, u32);

    /// Starts a server on the copy and returns at once: it may recover for hours.
    ///
    /// `settings` are given on the command line and win over the copy's own configuration.
    ///
    /// # Errors
    /// When it cannot be started.
    async fn start(&self, site: &Site, settings: &[(String, String)]) -> Result<Box<dyn Running>>;
}

/// How a server has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// In words: `exit code 1`, `killed by signal 9`, `out of memory`.
    pub how: String,
    /// True when it is known that memory was not enough.
    pub out_of_memory: bool,
    /// True for an orderly shutdown.
    pub orderly: bool,
}

/// What a program has come to.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Exit code; none when it was killed or took too long.
    pub code: Option<i32>,
    /// The end of what it wrote to both of its outputs.
    pub output: String,
}

impl Ran {
    /// True for exit code 0.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

/// A server. Dropping it ends it at once.
#[async_trait]
pub trait Running: Send + Sync {
    /// How to connect as the superuser.
    fn connection(&self) -> ConnInfo;

    /// How it has ended; nothing while it runs.
    async fn ended(&mut self) -> Option<Ended>;

    /// The last lines of its log.
    async fn log_tail(&mut self) -> String;

    /// Runs one of PostgreSQL's client programs (`pg_dump`) where the server is, with the environment that leads to it, and throws its
    /// standard output away.
    ///
    /// # Errors
    /// When it cannot be run at all.
    async fn program(&mut self, name: &str, arguments: &[String], limit: Duration) -> Result<Ran>;

    /// Stops the server in an orderly way, with a checkpoint.
    ///
    /// # Errors
    /// When it does not end.
    async fn stop(&mut self, limit: Duration) -> Result<()>;

    /// Removes what is left of the server, and ends it first when it still runs. Nothing but dropping it comes after. A drop removes as
    /// much, but cannot say that it failed.
    ///
    /// # Errors
    /// When something is left that the next drill has to find.
    async fn remove(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Why a server that was being asked does not answer any more.
pub(crate) async fn why(running: &mut dyn Running, error: &Error) -> String {
    // The connection breaks a moment before the end of the process can be seen.
    for _ in 0..50 {
        if let Some(ended) = running.ended().await {
            return if ended.out_of_memory {
                format!("the server ran out of memory: {}; give the drill more (`drill.memory`)", ended.how)
            } else {
                format!("the server ended: {}", ended.how)
            };
        }
        if !error.is_transient() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    error.to_string()
}
