//! What makes PostgreSQL recover to the target when it is started with nothing else.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::plan::{Plan, Stop};
use crate::postgres::Lsn;

/// What the server does when it reaches the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetAction {
    /// Stays open for reading, until it is promoted (PostgreSQL's default).
    #[default]
    Pause,
    /// Becomes a primary on a new timeline.
    Promote,
    /// Shuts down.
    Shutdown,
}

impl TargetAction {
    fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// How PostgreSQL calls pgvault back for WAL.
#[derive(Debug, Clone)]
pub struct RestoreCommand {
    /// The pgvault program.
    pub program: PathBuf,
    /// Arguments before `wal fetch`, for example `--config /etc/pgvault/pgvault.toml`.
    pub global_arguments: Vec<String>,
    /// Arguments after it, for example `--cluster main`.
    pub arguments: Vec<String>,
}

impl RestoreCommand {
    /// The value of `restore_command`: shell words, quoted, with `%` doubled where it is not a placeholder.
    ///
    /// `until` is where recovery is going to end at the latest, unless it goes on to the end of WAL.
    pub fn setting(&self, until: Option<Lsn>) -> String {
        let word = |text: &str| format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%"));
        let mut command = word(&self.program.to_string_lossy());
        for argument in &self.global_arguments {
            let _ = write!(command, " {}", word(argument));
        }
        command.push_str(" wal fetch");
        for argument in &self.arguments {
            let _ = write!(command, " {}", word(argument));
        }
        if let Some(until) = until {
            let _ = write!(command, " --until {until}");
        }
        command.push_str(r#" "%f" "%p""#);
        command
    }
}

/// The ways to name a target; at most one may be set.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_time", "recovery_target_lsn", "recovery_target_xid", "recovery_target_name"];

/// Settings that steer recovery; earlier ones of these names are removed.
const OURS: [&str; 12] = [
    "restore_command",
    "recovery_target",
    "recovery_target_time",
    "recovery_target_lsn",
    "recovery_target_xid",
    "recovery_target_name",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "recovery_target_action",
    "recovery_end_command",
    "archive_cleanup_command",
    "primary_conninfo",
];

/// The contents of `postgresql.auto.conf`: what was there, byte for byte, without settings of an earlier recovery, and those of
/// this one.
pub(super) fn auto_conf(
    existing: &[u8],
    plan: &Plan,
    command: &RestoreCommand,
    action: TargetAction,
    archive_off: bool,
) -> Vec<u8> {
    let mut text = Vec::new();
    for line in existing.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        // Values may be in any encoding; names are ASCII.
        let name = String::from_utf8_lossy(line);
        let name = name.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default();
        let replaced = OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours));
        let switched_off = archive_off && name.eq_ignore_ascii_case("archive_mode");
        if !replaced && !switched_off {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
    let mut settings = String::new();
    let mut set = |name: &str, value: &str| {
        let _ = writeln!(settings, "{name} = '{}'", value.replace('\\', r"\\").replace('\'', "''"));
    };
    // Without a target PostgreSQL takes "no more WAL" for the end, and opens there.
    let until = (plan.stop != Stop::End).then_some(plan.wal_end);
    set("restore_command", &command.setting(until));
    set("recovery_target_timeline", &plan.timeline.to_string());
    let (target, value) = match &plan.stop {
        Stop::End => ("", String::new()),
        Stop::Consistent => ("recovery_target", "immediate".to_owned()),
        // PostgreSQL refuses the letter Z; it takes a numeric offset.
        Stop::Time { time } => ("recovery_target_time", time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string()),
        Stop::Lsn { lsn, .. } => ("recovery_target_lsn", lsn.to_string()),
    };
    // A target that postgresql.conf still carries from an earlier recovery would stop this one at the wrong place, or be refused
    // as a second target. This file is read last; the server wants the empty ones before the one that counts.
    for other in TARGETS.iter().filter(|name| **name != target) {
        set(other, "");
    }
    if plan.stop != Stop::End {
        set(target, &value);
        let inclusive = !matches!(plan.stop, Stop::Lsn { inclusive: false, .. });
        set("recovery_target_inclusive", if inclusive { "true" } else { "false" });
        set("recovery_target_action", action.as_str());
    }
    if archive_off {
        set("archive_mode", "off");
    }
    text.extend_from_slice(settings.as_bytes());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_restore_command_survives_hostile_paths() {
        let command = RestoreCommand {
            program: "/opt/it's 100%/pgvault".into(),
            global_arguments: vec!["--config".into(), "/etc/a b.toml".into()],
            arguments: vec!["--cluster".into(), "main".into()],
        };
        assert_eq!(
            command.setting(None),
            r#"'/opt/it'\''s 100%%/pgvault' '--config' '/etc/a b.toml' wal fetch '--cluster' 'main' "%f" "%p""#
        );
    }
}
