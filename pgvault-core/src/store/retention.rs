//! Write once, read many: until when an object may be neither deleted nor overwritten, by anybody.
//!
//! A lock is set with the PUT that creates an object, so that none is ever there without it. Later it can only be made to last
//! longer. `compliance` binds everybody, the owner of the account included; `governance` can be lifted by whoever has a
//! permission for that, which no role of pgvault needs.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::{Error, ErrorKind, Result};

/// How strong a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockMode {
    /// Nobody can lift or shorten it. Azure: `Locked`. GCS: locked.
    Compliance,
    /// Whoever has a special permission can. Azure: `Unlocked`. GCS: unlocked.
    Governance,
}

impl LockMode {
    /// The name that S3 and GCS use.
    pub(super) fn s3(self) -> &'static str {
        match self {
            Self::Compliance => "COMPLIANCE",
            Self::Governance => "GOVERNANCE",
        }
    }

    /// The name that Azure uses.
    pub(super) fn azure(self) -> &'static str {
        match self {
            Self::Compliance => "Locked",
            Self::Governance => "Unlocked",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_uppercase().as_str() {
            "COMPLIANCE" | "LOCKED" => Some(Self::Compliance),
            "GOVERNANCE" | "UNLOCKED" => Some(Self::Governance),
            _ => None,
        }
    }
}

/// Longest time between the PUT of an object and the commit that needs it: a session's. A new object is locked for so much
/// longer, so that a commit does not have to make the lock of each pack longer by the minutes that the backup took.
const LEAD: Duration = Duration::from_secs(48 * 3600);

/// What is asked of every object that history depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Immutability {
    /// How strong.
    pub mode: LockMode,
    /// For how long from the newest backup that needs it; two days longer from its PUT.
    pub retain: Duration,
}

impl Immutability {
    /// The lock of an object that is written at `now`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when the end would lie outside the calendar.
    pub fn lock_of_new(&self, now: Timestamp) -> Result<Lock> {
        Self { retain: self.retain.saturating_add(LEAD), ..*self }.lock(now)
    }

    /// The lock that an object which is still needed at `now` has at least.
    ///
    /// # Errors
    /// As [`Immutability::lock_of_new`].
    pub fn lock(&self, now: Timestamp) -> Result<Lock> {
        let ends = SignedDuration::try_from(self.retain).ok().and_then(|retain| now.checked_add(retain).ok());
        // Stores keep whole seconds. Rounded up, so that what is read back is never earlier than what was asked for.
        let until = ends.and_then(|until| Timestamp::from_second(until.as_second().checked_add(1)?).ok());
        until.map(|until| Lock { mode: self.mode, until }).ok_or_else(|| {
            Error::new(
                ErrorKind::Usage,
                "vault.immutability",
                format!("a retention of {:?} has no end in the calendar", self.retain),
            )
        })
    }
}

/// A lock on one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Lock {
    /// How strong.
    pub mode: LockMode,
    /// Until when, by the store's clock.
    pub until: Timestamp,
}

impl Lock {
    /// True when this lock protects at least as long, and as strongly, as `wanted`.
    pub fn covers(&self, wanted: &Self) -> bool {
        self.until >= wanted.until && (self.mode == LockMode::Compliance || wanted.mode == LockMode::Governance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_on_a_whole_second_and_not_too_early() {
        let immutability = Immutability { mode: LockMode::Governance, retain: Duration::from_secs(60) };
        let now: Timestamp = "2026-11-21T10:00:00.5Z".parse().unwrap();
        let lock = immutability.lock(now).unwrap();
        assert_eq!(lock.until.to_string(), "2026-11-21T10:01:01Z");
        assert!(Immutability { retain: Duration::from_secs(u64::MAX), ..immutability }.lock(now).is_err());
        let stronger = Lock { mode: LockMode::Compliance, ..lock };
        assert!(stronger.covers(&lock) && !lock.covers(&stronger) && lock.covers(&lock));
    }
}
