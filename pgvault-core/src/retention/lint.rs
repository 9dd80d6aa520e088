//! Does a policy do what it is for? Asked before anything is deleted, of the configuration alone.

use std::time::Duration;

use serde::Serialize;

use super::policy::Policy;
use crate::config::{KeepWal, RetentionConfig};
use crate::store::probe::Outcome;
use crate::store::retention::Immutability;

/// Longest that a lock may outlast the window before it is told: the two days of a session, and as much again.
const SPARE: Duration = Duration::from_secs(4 * 86_400);

const DAY: Duration = Duration::from_secs(86_400);

/// Something that somebody should know about a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// A stable name.
    pub name: &'static str,
    /// How bad it is.
    pub outcome: Outcome,
    /// What was seen.
    pub what: String,
    /// What to do.
    pub fix: &'static str,
}

/// Examines a policy and the locks that go with it.
pub fn lint(config: &RetentionConfig, immutability: Option<Immutability>) -> Vec<Remark> {
    let mut remarks = Vec::new();
    let mut say = |name, outcome, what: String, fix| remarks.push(Remark { name, outcome, what, fix });
    if let Err(error) = Policy::of(config) {
        // Having none is a choice; one that cannot be read is a mistake.
        let outcome = if error.code() == "retention.none" && config.need.is_none() { Outcome::Warned } else { Outcome::Failed };
        say("policy", outcome, error.to_string(), "say what to keep in [cluster.NAME.retention], for example window = \"14d\"");
        return remarks;
    }
    match (config.need, config.window) {
        (Some(need), None) => say(
            "need",
            Outcome::Failed,
            format!(
                "every moment of {} is needed, and there is no window: counts keep backups, and no stretch of time",
                days(need)
            ),
            "set retention.window",
        ),
        (Some(need), Some(window)) if window < need => say(
            "need",
            Outcome::Failed,
            format!("every moment of {} is needed, and the window is {}", days(need), days(window)),
            "make retention.window as long as retention.need",
        ),
        (None, None) => say(
            "window",
            Outcome::Warned,
            "there is no window: whoever may write to the vault can push real backups out by making more".to_owned(),
            "set retention.window: what the store got within it is kept, whatever is added",
        ),
        _ => {}
    }
    if let (Some(window), Some(immutability)) = (config.window, immutability) {
        let retain = immutability.retain;
        if retain < window.saturating_add(DAY) {
            say(
                "locks",
                Outcome::Warned,
                format!(
                    "objects are locked for {}, and the window is {}: what it needs may be deleted before",
                    days(retain),
                    days(window)
                ),
                "make vault.immutability.retain a day longer than retention.window",
            );
        } else if retain > window.saturating_add(SPARE) {
            say(
                "locks",
                Outcome::Warned,
                format!(
                    "objects are locked for {}, and the window is {}: what expires frees no space until then",
                    days(retain),
                    days(window)
                ),
                "make vault.immutability.retain a day longer than retention.window, and no more",
            );
        }
    }
    let generations = [(config.daily, 1), (config.weekly, 7), (config.monthly, 31), (config.yearly, 366)];
    let reach = generations.iter().map(|(count, each)| u64::from(count.unwrap_or(0)) * each).max().unwrap_or(0);
    if config.wal == KeepWal::All
        && config.window.is_some_and(|window| Duration::from_secs(reach * 86_400) > window.saturating_mul(4))
    {
        say(
            "wal",
            Outcome::Warned,
            format!("backups of up to {reach} days are kept, with all WAL since the oldest of them"),
            "with retention.wal = \"window\" the old ones are restored to their own moment, and their WAL is freed",
        );
    }
    remarks
}

fn days(duration: Duration) -> String {
    let hours = duration.as_secs() / 3600;
    if hours.is_multiple_of(24) { format!("{} days", hours / 24) } else { format!("{hours} hours") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::retention::LockMode;

    fn of(window: Option<u64>, need: Option<u64>, retain: Option<u64>) -> Vec<(&'static str, Outcome)> {
        let time = |days: u64| Duration::from_secs(days * 86_400);
        let config =
            RetentionConfig { window: window.map(time), need: need.map(time), keep_last: Some(3), ..RetentionConfig::default() };
        let locks = retain.map(|days| Immutability { mode: LockMode::Compliance, retain: time(days) });
        lint(&config, locks).into_iter().map(|remark| (remark.name, remark.outcome)).collect()
    }

    #[test]
    fn a_policy_that_does_not_do_what_it_is_for_is_named() {
        assert_eq!(of(Some(14), None, None), []);
        assert_eq!(of(Some(14), Some(14), Some(15)), []);
        assert_eq!(of(Some(14), Some(15), None), [("need", Outcome::Failed)]);
        assert_eq!(of(None, Some(1), None), [("need", Outcome::Failed)]);
        assert_eq!(of(None, None, None), [("window", Outcome::Warned)]);
        assert_eq!(of(Some(14), None, Some(14)), [("locks", Outcome::Warned)]);
        assert_eq!(of(Some(14), None, Some(90)), [("locks", Outcome::Warned)]);
        let none = lint(&RetentionConfig::default(), None);
        assert_eq!((none[0].name, none[0].outcome), ("policy", Outcome::Warned));
        let needed = RetentionConfig { need: Some(DAY), ..RetentionConfig::default() };
        assert_eq!(lint(&needed, None)[0].outcome, Outcome::Failed);
        let old = RetentionConfig { yearly: Some(5), window: Some(14 * DAY), ..RetentionConfig::default() };
        assert_eq!(lint(&old, None)[0].name, "wal");
    }
}
