//! Local, throwaway PostgreSQL servers.
//!
//! Restore drills without containers, `pgvault demo` and the tests all need the same thing: a real server, started from
//! an empty or a restored data directory, that is gone when nobody holds it any more.
//!
//! - [`Install`] finds the programs of a PostgreSQL major version.
//! - [`Server::builder`] makes a new cluster with `initdb`.
//! - [`Server::adopt`] starts a restored data directory and isolates it from the world that it was copied from: it does
//!   not archive, does not stream, runs no command of its configuration but `restore_command`, and listens on no port.
//!
//! A server is a child of this process. It is never looked up by port, name or pid file, so that nothing here can stop
//! a server that it did not start; dropping a [`Server`] stops it at once. Sockets lie in a private folder that only
//! root and the server's account can enter, which is why trusting every local connection is safe there. The server stays
//! in the process group of the caller: an interrupt from the terminal ends both.
//!
//! Everything blocks. From asynchronous code, call it inside `spawn_blocking`.

mod account;
mod adopt;
mod builder;
mod install;
mod server;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

pub use account::Account;
pub use adopt::Adopt;
pub(crate) use adopt::hand_over;
pub use builder::{Auth, ServerBuilder};
pub use install::{Install, Version};
pub(crate) use server::private_folder;
pub use server::{Mode, Outcome, Server};

/// Result of the operations of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a server could not be made, started, asked or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No programs of the wanted version on this machine.
    #[error(
        "PostgreSQL{} is not installed here; {} (looked in {})",
        .major.map(|major| format!(" {major}")).unwrap_or_default(),
        install::advice(*.major),
        list(.looked_in)
    )]
    NotInstalled {
        /// The version that was asked for.
        major: Option<u32>,
        /// Every folder that was tried.
        looked_in: Vec<PathBuf>,
    },
    /// The installation lacks a program, as server-only packages do.
    #[error("`{program}` is neither in {} nor in any other PostgreSQL installation", .folder.display())]
    NoProgram {
        /// The missing program.
        program: String,
        /// Where the installation has its programs.
        folder: PathBuf,
    },
    /// The server cannot run as this account, or the account cannot reach its files.
    #[error("{0}")]
    Account(String),
    /// A file operation failed.
    #[error("{doing} {}: {source}", .path.display())]
    Io {
        /// What was being done, in the present tense.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A program could not be started at all.
    #[error("start `{command}`: {source}")]
    Spawn {
        /// The command line.
        command: String,
        /// The cause.
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` ended with {status}\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of what it said.
        output: String,
    },
    /// The server ended while somebody was waiting for it.
    #[error("`{command}` ended with {status} while {waiting_for}; its log ends with\n{log}")]
    Ended {
        /// The command line of the server.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What was being waited for.
        waiting_for: &'static str,
        /// The last lines of the log.
        log: String,
    },
    /// The server did not get there in time.
    #[error("`{command}`: {waiting_for} took longer than {timeout:?}; its log ends with\n{log}")]
    Timeout {
        /// The command line of the server.
        command: String,
        /// What was being waited for.
        waiting_for: &'static str,
        /// How long.
        timeout: Duration,
        /// The last lines of the log.
        log: String,
    },
    /// The data directory was written by another major version.
    #[error("{} is of PostgreSQL {found}, and the programs in {} are of PostgreSQL {wanted}", .pgdata.display(), .bin.display())]
    Version {
        /// The data directory.
        pgdata: PathBuf,
        /// What its `PG_VERSION` says.
        found: String,
        /// The folder of the programs it was to be started with.
        bin: PathBuf,
        /// Their major version.
        wanted: u32,
    },
    /// Recovery stopped short of its target because the server is configured smaller than the one that wrote the WAL.
    #[error("recovery in {} paused because of insufficient parameter settings; the log ends with\n{log}", .pgdata.display())]
    Undersized {
        /// The data directory.
        pgdata: PathBuf,
        /// The last lines of the log, which name the parameters.
        log: String,
    },
    /// The operation needs a running server, or a stopped one.
    #[error("the server in {} is {state}", .pgdata.display())]
    State {
        /// Its data directory.
        pgdata: PathBuf,
        /// "running" or "not running".
        state: &'static str,
    },
}

impl From<Error> for pgvault_core::error::Error {
    fn from(error: Error) -> Self {
        use pgvault_core::error::ErrorKind;
        let (kind, code) = match &error {
            Error::NotInstalled { .. } | Error::NoProgram { .. } => (ErrorKind::Usage, "server.not_installed"),
            Error::Account(_) => (ErrorKind::Usage, "server.account"),
            Error::Io { .. } => (ErrorKind::Failed, "io"),
            Error::Spawn { .. } | Error::Command { .. } => (ErrorKind::Failed, "server.command"),
            Error::Ended { .. } => (ErrorKind::Failed, "server.ended"),
            Error::Timeout { .. } => (ErrorKind::Failed, "server.timeout"),
            Error::Version { .. } => (ErrorKind::Usage, "server.version"),
            Error::Undersized { .. } => (ErrorKind::Failed, "server.undersized"),
            Error::State { .. } => (ErrorKind::Failed, "server.state"),
        };
        Self::new(kind, code, error.to_string()).with_source(error)
    }
}

fn list(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { doing, path: path.to_path_buf(), source }
}

/// The command line as one would type it, for messages. Arguments hold no secrets: passwords travel in files.
fn command_line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let _ = write!(line, " {}", argument.to_string_lossy());
    }
    line
}

/// Variables that would lead a program of PostgreSQL to another server, database or option file than the one meant.
pub(crate) fn without_libpq_environment(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        // PGVAULT_* stays: a restore_command may be configured by it.
        if name.to_str().is_some_and(|name| name.starts_with("PG") && !name.starts_with("PGVAULT_")) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs to the end and gives standard output.
fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|source| Error::Spawn { command: command_line(command), source })?;
    finished(command, &output)
}

fn finished(command: &Command, output: &std::process::Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let said = stdout + &String::from_utf8_lossy(&output.stderr);
    Err(Error::Command { command: command_line(command), status: output.status, output: tail(&said, 20) })
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}
