//! What packs are called. Nobody else makes such a name, and it is never used again.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use sha2::{Digest, Sha256};
use ulid::Ulid;

use crate::Result;
use crate::env::Env;

/// Gives each pack its name.
pub(crate) trait NamePacks: fmt::Debug + Send + Sync {
    /// The next one.
    fn next(&self) -> Result<Ulid>;
}

/// Names without order, of which nobody finds the next.
#[derive(Debug)]
pub(crate) struct FreshNames(pub(crate) Env);

impl NamePacks for FreshNames {
    fn next(&self) -> Result<Ulid> {
        self.0.new_id()
    }
}

/// The names of a session's packs, in the order in which they are begun.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackNames(pub(crate) Ulid);

impl PackNames {
    /// Name `number`. Nobody else makes it: the session's own name is random.
    pub(crate) fn name(self, number: u32) -> Ulid {
        let hash = Sha256::new().chain_update(b"pgvault pack\0").chain_update(self.0.to_bytes()).chain_update(number.to_le_bytes());
        let mut random = [0; 16];
        random.copy_from_slice(hash.finalize().get(..16).unwrap_or(&[0; 16]));
        Ulid::from_parts(self.0.timestamp_ms(), u128::from_le_bytes(random))
    }
}

/// Gives the packs of a session their names.
#[derive(Debug)]
pub(crate) struct SessionNames {
    names: PackNames,
    next: AtomicU32,
}

impl SessionNames {
    pub(crate) fn new(session: Ulid) -> Self {
        Self { names: PackNames(session), next: AtomicU32::new(0) }
    }
}

impl NamePacks for SessionNames {
    fn next(&self) -> Result<Ulid> {
        Ok(self.names.name(self.next.fetch_add(1, Ordering::Relaxed)))
    }
}
