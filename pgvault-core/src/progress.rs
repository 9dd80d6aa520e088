//! How far a long operation is, told to whoever wants to show it. The engine itself prints nothing.

use std::sync::Arc;

/// Receives progress. Calls come from many threads.
pub trait Progress: Send + Sync + std::fmt::Debug {
    /// A phase begins; `total` is its size in bytes when that is known.
    fn phase(&self, name: &'static str, total: Option<u64>);
    /// So many more bytes are done.
    fn advance(&self, bytes: u64);
}

/// Ignores everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _name: &'static str, _total: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
}

/// A shared receiver.
pub type SharedProgress = Arc<dyn Progress>;
