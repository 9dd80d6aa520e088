//! Work that blocks, away from the threads that must not.

use pgvault_core::{Error, ErrorKind, Result};

/// Runs it on a thread for such work.
///
/// # Errors
/// Its own, and when it panicked.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}
