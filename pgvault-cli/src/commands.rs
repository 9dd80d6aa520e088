//! One file per command.

use pgvault_core::{Error, ErrorKind};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) mod artifact;
pub(crate) mod backup;
pub(crate) mod completions;
pub(crate) mod copy;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod du;
pub(crate) mod expire;
pub(crate) mod export;
pub(crate) mod filestore;
pub(crate) mod gc;
pub(crate) mod hold;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod key;
mod libpq;
pub(crate) mod list;
pub(crate) mod mark;
pub(crate) mod restore;
pub(crate) mod status;
pub(crate) mod undelete;
pub(crate) mod verify;
pub(crate) mod wal;

/// Gives this error when the program is told to stop: what runs beside it is then dropped, with its servers and its folders.
pub(crate) async fn interrupted(code: &'static str, message: &str) -> Error {
    let failed = |e: std::io::Error| Error::new(ErrorKind::Failed, "signal", format!("listen for signals: {e}"));
    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => return failed(error),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Error::new(ErrorKind::Failed, code, message)
}
