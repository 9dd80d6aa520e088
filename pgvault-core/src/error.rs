//! One error type for the engine.
//!
//! The rules:
//!
//! - [`ErrorKind`] is a *decision of the caller*: retry, choose another target, fix the configuration, page somebody.
//!   It maps one to one to the exit codes of the command line.
//! - [`Error::code`] is stable and greppable (`wal.diverged`); the message is not an interface.
//! - The message says what failed and on which object; [`Error::hint`] says what to do next.
//! - Errors of lower layers are attached as the source, never re-worded.

use std::error::Error as StdError;
use std::fmt;

/// Result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request or the configuration is wrong; repeating it cannot help.
    Usage,
    /// The operation failed for a reason none of the other kinds names (local I/O, a refused precondition).
    Failed,
    /// The named object, backup or segment does not exist, and this was proven.
    NotFound,
    /// An object of that name exists with other content (split brain, foreign cluster).
    Conflict,
    /// Stored bytes are not what was written: bit rot, tampering, truncation, substitution.
    Corrupt,
    /// The recovery target lies outside what the vault can restore.
    OutsideWindow,
    /// PostgreSQL cannot be reached, refused the login, or lacks a required setting.
    Source,
    /// There is no vault, or no such cluster in it, at the configured place.
    NoVault,
    /// Another writer holds what this operation needs.
    Locked,
    /// None of the vault's key slots opens with the configured key.
    WrongKey,
    /// The store refused because the object is under retention.
    Immutable,
    /// The object store failed or timed out; the same call may succeed later.
    Storage,
    /// Written by a newer pgvault, or a PostgreSQL feature that is not supported.
    Unsupported,
    /// What was restored did not pass a check that it has to pass before it is used.
    Unfit,
}

/// An error of the engine; see the [module documentation](self) for its rules.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: ErrorKind,
    code: &'static str,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync + 'static>>,
}

impl Error {
    /// A new error. `code` is a dotted lower-case name that never changes once released.
    pub fn new(kind: ErrorKind, code: &'static str, message: impl Into<String>) -> Self {
        Self { inner: Box::new(Inner { kind, code, message: message.into(), hint: None, source: None }) }
    }

    /// Adds what the reader of the message should do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = Some(hint.into());
        self
    }

    /// Attaches the lower-level cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync + 'static>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// Prefixes the message with what was being done, in the present tense (`restore base/5/16384`).
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.inner.message = format!("{doing}: {}", self.inner.message);
        self
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// The stable name of this failure.
    pub fn code(&self) -> &'static str {
        self.inner.code
    }

    /// What to do next, when there is something to do.
    pub fn hint(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }

    /// True when the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self.inner.kind, ErrorKind::Storage | ErrorKind::Source | ErrorKind::Locked)
    }

    /// A local file operation failed.
    pub fn io(doing: impl fmt::Display, path: &std::path::Path, source: std::io::Error) -> Self {
        let message = format!("{doing} {}: {source}", path.display());
        Self::new(ErrorKind::Failed, "io", message).with_source(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.inner.kind)
            .field("code", &self.inner.code)
            .field("message", &self.inner.message)
            .field("hint", &self.inner.hint)
            .field("source", &self.inner.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.inner.source.as_ref().map(|s| s.as_ref() as &(dyn StdError + 'static))
    }
}
