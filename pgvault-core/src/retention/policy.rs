//! What somebody wants to keep.

use std::time::Duration;

use jiff::SignedDuration;
use jiff::tz::TimeZone;

use crate::config::{KeepWal, RetentionConfig};
use crate::{Error, ErrorKind, Result};

/// A policy that says something. Its rules add up: a backup is kept for any of them.
#[derive(Debug, Clone)]
pub struct Policy {
    /// How far back every moment stays restorable.
    pub window: Option<SignedDuration>,
    /// So many of the newest backups.
    pub keep_last: u32,
    /// The newest backup of so many days, weeks, months and years.
    pub generations: [(Period, u32); 4],
    /// Where days begin.
    pub time_zone: TimeZone,
    /// Never fewer backups without damaged pages than so many; at least 1.
    pub min_backups: u32,
    /// Which WAL is kept.
    pub wal: KeepWal,
}

/// A stretch of the calendar of which one backup is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// A day.
    Day,
    /// A week from Monday on.
    Week,
    /// A month.
    Month,
    /// A year.
    Year,
}

impl Period {
    /// Which one a moment lies in; later ones are larger.
    pub(super) fn of(self, at: &jiff::Zoned) -> (i16, i16) {
        match self {
            Self::Day => (at.year(), at.day_of_year()),
            Self::Week => {
                let week = at.date().iso_week_date();
                (week.year(), week.week().into())
            }
            Self::Month => (at.year(), at.month().into()),
            Self::Year => (at.year(), 0),
        }
    }

    /// In a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Year => "year",
        }
    }
}

impl Policy {
    /// The policy of a configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is none: what may be deleted is never guessed. The same for a time zone that nobody knows.
    pub fn of(config: &RetentionConfig) -> Result<Self> {
        let count = |rule: Option<u32>| rule.unwrap_or(0);
        let generations = [
            (Period::Day, count(config.daily)),
            (Period::Week, count(config.weekly)),
            (Period::Month, count(config.monthly)),
            (Period::Year, count(config.yearly)),
        ];
        if config.window.is_none() && count(config.keep_last) == 0 && generations.iter().all(|(_, count)| *count == 0) {
            return Err(Error::new(ErrorKind::Usage, "retention.none", "no retention is configured, so nothing expires")
                .with_hint("say what to keep in [cluster.NAME.retention], for example window = \"14d\""));
        }
        let time_zone = match &config.time_zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|e| {
                Error::new(ErrorKind::Usage, "retention.time_zone", format!("retention.time_zone `{name}`: {e}"))
                    .with_hint("use a name such as Europe/Berlin, or leave it out for UTC")
            })?,
        };
        let window = config.window.map(signed).transpose()?;
        let min_backups = config.min_backups.unwrap_or(1).max(1);
        Ok(Self { window, keep_last: count(config.keep_last), generations, time_zone, min_backups, wal: config.wal })
    }
}

fn signed(window: Duration) -> Result<SignedDuration> {
    // Anything longer is for ever.
    let most = SignedDuration::from_hours(1000 * 366 * 24);
    SignedDuration::try_from(window)
        .map(|window| window.min(most))
        .map_err(|e| Error::new(ErrorKind::Usage, "retention.window", format!("retention.window: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t18_without_a_policy_nothing_is_guessed() {
        let error = Policy::of(&RetentionConfig::default()).unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "retention.none"));
        assert!(error.hint().is_some());
        // A minimum is no policy: it says what is not enough, and not what is.
        assert!(Policy::of(&RetentionConfig { min_backups: Some(3), ..RetentionConfig::default() }).is_err());
        let none = RetentionConfig { min_backups: Some(0), keep_last: Some(1), ..RetentionConfig::default() };
        assert_eq!(Policy::of(&none).unwrap().min_backups, 1);
        let nowhere = RetentionConfig { time_zone: Some("Mars/Base".into()), ..none };
        assert_eq!(Policy::of(&nowhere).unwrap_err().code(), "retention.time_zone");
    }
}
