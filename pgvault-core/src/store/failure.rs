//! One failed request, and what it means for whoever asked.

use std::fmt;
use std::time::Duration;

use super::answer::{Answer, Verdict, causes};
use crate::{Error, ErrorKind};

const LATER: &str = "the store may answer later; nothing is lost, run the command again";
const DENIED: &str = "check the credentials and rights for the vault";
const DELETE: &str = "only the pruner's credentials may delete, and not before retention ends";

/// One failed request.
#[derive(Debug)]
pub(super) struct Failure(object_store::Error);

impl Failure {
    pub(super) fn new(error: object_store::Error) -> Self {
        Self(error)
    }

    pub(super) fn timeout(after: Duration) -> Self {
        Self(object_store::Error::Generic { store: "pgvault", source: format!("no answer within {after:?}").into() })
    }

    fn verdict(&self) -> Option<Verdict> {
        Answer::of(&self.0).map(Answer::verdict)
    }

    /// The store says that there is no such object.
    pub(super) fn is_absence(&self) -> bool {
        match self.verdict() {
            Some(verdict) => verdict == Verdict::Missing,
            None => matches!(self.0, object_store::Error::NotFound { .. }),
        }
    }

    /// The store says that the name exists already.
    pub(super) fn is_taken(&self) -> bool {
        matches!(self.0, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
    }

    /// The other side's certificate is not trusted, which waiting does not change.
    fn is_untrusted(&self) -> bool {
        causes(&self.0).any(|cause| cause.downcast_ref::<rustls::Error>().is_some_and(|e| matches!(e, rustls::Error::InvalidCertificate(_))))
            // Below the HTTP client the error is hidden in one of the operating system's kind.
            || causes(&self.0).any(|cause| cause.to_string().contains("invalid peer certificate"))
    }

    /// Repeating the request cannot help.
    pub(super) fn is_permanent(&self) -> bool {
        use object_store::Error as E;
        match self.verdict() {
            Some(verdict) => !matches!(verdict, Verdict::Transient | Verdict::Skewed),
            None => {
                self.is_untrusted()
                    || matches!(
                        self.0,
                        E::NotFound { .. }
                            | E::InvalidPath { .. }
                            | E::NotSupported { .. }
                            | E::NotImplemented { .. }
                            | E::PermissionDenied { .. }
                            | E::Unauthenticated { .. }
                            | E::UnknownConfigurationKey { .. }
                    )
            }
        }
    }

    /// What the caller hears. `ahead` is how far the store's clock is ahead of ours, in milliseconds.
    pub(super) fn into_error(self, doing: &str, name: &str, ahead: Option<i64>) -> Error {
        use object_store::Error as E;
        let answer = Answer::of(&self.0);
        let what = answer.map_or_else(|| self.0.to_string(), ToString::to_string);
        let message = format!("{doing} {name}: {what}");
        let (kind, code, hint) = match (answer.map(Answer::verdict), &self.0) {
            (Some(Verdict::Transient), _) if answer.is_some_and(Answer::is_throttling) => {
                (ErrorKind::Storage, "store.throttled", "the store asks for fewer requests: lower vault.limits.requests")
            }
            (Some(Verdict::Transient), _) => match answer.map(|a| a.code.as_str()) {
                Some("ExpiredToken" | "TokenRefreshRequired") => {
                    (ErrorKind::Failed, "store.expired", "the credentials have expired: renew them")
                }
                _ => (ErrorKind::Storage, "store.failed", LATER),
            },
            (Some(Verdict::Skewed), _) => (ErrorKind::Failed, "store.clock", ""),
            (Some(Verdict::Denied), _) | (None, E::PermissionDenied { .. }) if doing == "delete" => {
                (ErrorKind::Immutable, "store.delete_refused", DELETE)
            }
            (Some(Verdict::Denied), _) | (None, E::PermissionDenied { .. } | E::Unauthenticated { .. }) => {
                (ErrorKind::Failed, "store.denied", DENIED)
            }
            (Some(Verdict::Immutable), _) => (ErrorKind::Immutable, "store.locked", "retention or a hold protects the object"),
            (Some(Verdict::NoBucket), _) => {
                (ErrorKind::NoVault, "store.no_bucket", "check vault.url; pgvault does not create buckets or containers")
            }
            (Some(Verdict::Archived), _) => {
                (ErrorKind::Failed, "store.archived", "bring the object back from its archive tier first, then repeat the command")
            }
            (Some(Verdict::BehindEnd), _) => (ErrorKind::Corrupt, "object.short", ""),
            (Some(Verdict::Unsupported), _) | (None, E::InvalidPath { .. } | E::NotSupported { .. } | E::NotImplemented { .. }) => {
                (ErrorKind::Unsupported, "store.unsupported", "")
            }
            (Some(Verdict::Wrong), _) => (ErrorKind::Failed, "store.refused", "look the code up in the provider's documentation"),
            (Some(Verdict::Missing), _) | (None, E::NotFound { .. }) => (ErrorKind::NotFound, "object.not_found", ""),
            (None, E::AlreadyExists { .. } | E::Precondition { .. }) => (ErrorKind::Storage, "store.conflict", ""),
            (None, _) if self.is_untrusted() => {
                (ErrorKind::Failed, "store.untrusted", "name the file with the store's certificate authority in vault.ca_file")
            }
            (None, _) => (ErrorKind::Storage, "store.failed", LATER),
        };
        let error = Error::new(kind, code, message).with_source(self.0);
        match (code, ahead) {
            ("store.clock", Some(ahead)) => {
                error.with_hint(format!("set this machine's clock: the store's is {} s ahead of it", ahead / 1000))
            }
            ("store.clock", None) => error.with_hint("set this machine's clock"),
            _ if hint.is_empty() => error,
            _ => error.with_hint(hint),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Answer::of(&self.0) {
            Some(answer) => answer.fmt(f),
            None => self.0.fmt(f),
        }
    }
}
