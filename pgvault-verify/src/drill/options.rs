//! What a drill is asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use pgvault_core::postgres::{Lsn, TimelineId};
use pgvault_core::progress::SharedProgress;
use pgvault_core::restore::target::Target;
use pgvault_core::restore::window::windows;
use pgvault_core::vault::{Cluster, snapshot};
use pgvault_core::wal::catalog::Catalog;
use pgvault_core::{Error, Result};
use ulid::Ulid;

use crate::checks::Assertion;
use crate::seed::scatter;

/// The point that a drill restores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// This one.
    Target(Target),
    /// Some moment of the recoverable window, chosen by the drill's seed.
    Random,
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Target(target) => target.fmt(f),
            Self::Random => f.write_str("random"),
        }
    }
}

impl FromStr for Wish {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "random" { Ok(Self::Random) } else { text.parse().map(Self::Target) }
    }
}

/// How a drill is held.
#[derive(Debug)]
pub struct DrillOptions {
    /// When the way back began: the time it takes is counted from here.
    pub began: Instant,
    /// The point to restore.
    pub wish: Wish,
    /// Start from this backup.
    pub backup: Option<Ulid>,
    /// Follow this timeline.
    pub timeline: Option<TimelineId>,
    /// The copy is made in a folder of its own in this one.
    pub base: PathBuf,
    /// Use no more of its space than so many bytes.
    pub room: Option<u64>,
    /// The superuser of the cluster.
    pub user: String,
    /// Settings of the copy's server, for example a larger `shared_buffers`.
    pub settings: Vec<(String, String)>,
    /// Reads and compares everything, instead of a sample.
    pub deep: bool,
    /// zstd level of a base backup that is made of the copy.
    pub level: i32,
    /// Threads of the restore, connections of the checks.
    pub workers: usize,
    /// Seed of everything that is chosen at random.
    pub seed: u64,
    /// Longest time for replay, and for each check.
    pub timeout: Duration,
    /// What is promised.
    pub rto: Option<Duration>,
    /// The user's own checks.
    pub assertions: Vec<Assertion>,
    /// Filestores of Odoo databases to compare with what they refer to, by the name of the database.
    pub filestores: BTreeMap<String, PathBuf>,
    /// Makes a base backup of the copy when everything has passed.
    pub promote_to_backup: bool,
    /// Told about progress.
    pub progress: SharedProgress,
}

impl DrillOptions {
    /// Bytes of shared buffers that the copy's server will have.
    pub(super) fn shared_buffers(&self) -> u64 {
        let of = |settings: &[(&str, &str)]| {
            settings.iter().rev().find(|(name, _)| *name == "shared_buffers").map(|(_, value)| memory(value))
        };
        let own: Vec<(&str, &str)> = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        of(&own).or_else(|| of(&crate::isolation::SETTINGS)).flatten().unwrap_or(0)
    }
}

/// Memory as PostgreSQL reads it: a number with kB, MB, GB or TB, of blocks of 8 kB without one.
fn memory(value: &str) -> Option<u64> {
    let value = value.trim();
    let digits = value.len() - value.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = value.split_at_checked(digits)?;
    let factor: u64 = match unit.trim() {
        "" => 8 << 10,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// Some moment between the end of the oldest backup and the last transaction, on the newest timeline; nothing when no backup is there.
pub(crate) async fn random_target(cluster: &Cluster, seed: u64) -> Result<Option<Target>> {
    let manifests: Vec<_> = snapshot::list(cluster).await?.snapshots.into_iter().map(|snapshot| snapshot.manifest).collect();
    let Some(size) = manifests.first().map(|manifest| manifest.wal_segment_size) else { return Ok(None) };
    let catalog = Catalog::load(cluster, size, Lsn::INVALID).await?;
    let windows = windows(cluster, &catalog, &manifests).await?;
    let Some(window) = windows.iter().max_by_key(|window| (window.timeline, window.last)) else { return Ok(None) };
    Ok(Some(Target::Time(between(window.first, window.last, seed))))
}

/// A moment from `first` to `last`, both included.
fn between(first: Timestamp, last: Timestamp, seed: u64) -> Timestamp {
    let span = u64::try_from(last.duration_since(first).as_micros().max(0)).unwrap_or(0);
    let chosen = if span == u64::MAX { seed } else { scatter(seed) % (span + 1) };
    first.checked_add(SignedDuration::from_micros(i64::try_from(chosen).unwrap_or(0))).unwrap_or(last).min(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_moments_lie_in_the_window_and_all_over_it() {
        let first: Timestamp = "2026-11-22T06:00:00Z".parse().unwrap();
        let last: Timestamp = "2026-11-22T07:00:00Z".parse().unwrap();
        let mut quarters = [0; 4];
        for seed in 0..400 {
            let moment = between(first, last, seed);
            assert!(first <= moment && moment <= last, "{seed}: {moment}");
            let minutes = moment.duration_since(first).as_mins().min(59);
            quarters[usize::try_from(minutes / 15).unwrap()] += 1;
            assert_eq!(moment, between(first, last, seed));
        }
        assert!(quarters.iter().all(|count| *count > 60), "{quarters:?}");
        assert_eq!(between(first, first, 7), first);
    }

    #[test]
    fn memory_is_read_as_postgresql_reads_it() {
        let read: Vec<Option<u64>> =
            ["64MB", " 2 GB", "16384", "x", "5 apples", "99999999999999999999TB"].into_iter().map(memory).collect();
        assert_eq!(read, [Some(64 << 20), Some(2 << 30), Some(128 << 20), None, None, None]);
    }

    #[test]
    fn wishes_parse() {
        assert_eq!("random".parse::<Wish>().unwrap(), Wish::Random);
        assert_eq!("latest".parse::<Wish>().unwrap(), Wish::Target(Target::Latest));
        assert!("sometime".parse::<Wish>().is_err());
    }
}
