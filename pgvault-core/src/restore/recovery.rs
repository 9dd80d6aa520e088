//! What makes PostgreSQL recover to the target when it is started with nothing else.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::plan::{Plan, Stop};

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
    pub fn setting(&self) -> String {
        let word = |text: &str| format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%"));
        let mut command = word(&self.program.to_string_lossy());
        for argument in &self.global_arguments {
            let _ = write!(command, " {}", word(argument));
        }
        command.push_str(" wal fetch");
        for argument in &self.arguments {
            let _ = write!(command, " {}", word(argument));
        }
        command.push_str(r#" "%f" "%p""#);
        command
    }
}

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

/// The contents of `postgresql.auto.conf`: what was there, without settings of an earlier recovery, and those of this one.
pub(super) fn auto_conf(existing: &str, plan: &Plan, command: &RestoreCommand, action: TargetAction, archive_off: bool) -> String {
    let kept = existing.lines().filter(|line| {
        let name = line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default();
        let replaced = OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours));
        let switched_off = archive_off && name.eq_ignore_ascii_case("archive_mode");
        !replaced && !switched_off
    });
    let mut text: String = kept.flat_map(|line| [line, "\n"]).collect();
    let mut set = |name: &str, value: &str| {
        let _ = writeln!(text, "{name} = '{}'", value.replace('\\', r"\\").replace('\'', "''"));
    };
    set("restore_command", &command.setting());
    set("recovery_target_timeline", &plan.timeline.to_string());
    match &plan.stop {
        Stop::End => {}
        Stop::Consistent => set("recovery_target", "immediate"),
        Stop::Time { time } => {
            // PostgreSQL refuses the letter Z; it takes a numeric offset.
            set("recovery_target_time", &time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string());
            set("recovery_target_inclusive", "true");
        }
        Stop::Lsn { lsn, inclusive } => {
            set("recovery_target_lsn", &lsn.to_string());
            set("recovery_target_inclusive", if *inclusive { "true" } else { "false" });
        }
    }
    if plan.stop != Stop::End {
        set("recovery_target_action", action.as_str());
    }
    if archive_off {
        set("archive_mode", "off");
    }
    text
}

/// Settings in `postgresql.conf` that would fight with ours; PostgreSQL refuses two recovery targets.
pub(super) fn conflicting_settings(pgdata: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(pgdata.join("postgresql.conf")).unwrap_or_default();
    let mut found: Vec<String> = text
        .lines()
        .map(|line| {
            line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default().to_ascii_lowercase()
        })
        .filter(|name| name.starts_with("recovery_target"))
        .collect();
    found.sort();
    found.dedup();
    found
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
            command.setting(),
            r#"'/opt/it'\''s 100%%/pgvault' '--config' '/etc/a b.toml' wal fetch '--cluster' 'main' "%f" "%p""#
        );
    }
}
