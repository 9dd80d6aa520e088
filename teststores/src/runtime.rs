//! Asynchronous work for callers that are not, and for those that are and must not notice.

use std::future::Future;
use std::sync::{OnceLock, mpsc};

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Handle, Runtime};

/// The runtime of this crate: the stand-in and the gates live on it, and end with the process.
pub(crate) fn handle() -> Result<Handle> {
    static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();
    let made =
        RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(2).thread_name("stores").enable_all().build().ok());
    Ok(made.as_ref().context("start a runtime")?.handle().clone())
}

/// Waits for a result, inside of another runtime as well: the work is done on the threads of this crate's own.
pub(crate) fn wait<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    drop(handle()?.spawn(async move {
        let _ = sender.send(work.await);
    }));
    receiver.recv().context("a task has panicked")?
}
