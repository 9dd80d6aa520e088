//! What cuts the copy of a cluster off from the world of its original, whatever it is started in.

use std::fmt::Write as _;

/// What a restored cluster must not do, whatever its configuration says. Given on the command line, these settings win
/// over `postgresql.conf` and `postgresql.auto.conf`, and no file of the restored directory changes.
pub(crate) const SETTINGS: [(&str, &str); 25] = [
    // It must not write into the archive of the cluster it is a copy of, nor tidy that up.
    ("archive_mode", "off"),
    ("archive_command", ""),
    ("archive_library", ""),
    ("archive_cleanup_command", ""),
    ("recovery_end_command", ""),
    // It must not follow, hold back or hold up the original's other servers.
    ("primary_conninfo", ""),
    ("primary_slot_name", ""),
    ("synchronous_standby_names", ""),
    ("max_logical_replication_workers", "0"),
    // It must not run the original's jobs. Without the extension the setting is an unused name.
    ("cron.launch_active_jobs", "off"),
    // It must not touch the original's files: Debian's configuration names the original's pid file and certificates.
    ("external_pid_file", ""),
    ("ssl", "off"),
    ("unix_socket_permissions", "0700"),
    ("unix_socket_group", ""),
    // It has to fit beside whatever else this machine does, and to start on a machine of another size.
    ("shared_buffers", "64MB"),
    ("huge_pages", "off"),
    ("hot_standby", "on"),
    ("restart_after_crash", "off"),
    // Its messages have to arrive here, in English, and on a machine without the original's locales.
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("lc_messages", "C"),
    ("lc_monetary", "C"),
    ("lc_numeric", "C"),
    ("lc_time", "C"),
    ("cluster_name", "pgvault"),
];

/// Who may connect to a copy: those who reach its socket, and over the loopback interface those who know a password.
pub(crate) const HBA: &str = "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 scram-sha-256\n";

/// Recovery stops unless these are at least what they were on the original; `pg_control` knows.
const AT_LEAST: [&str; 5] =
    ["max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_xacts", "max_locks_per_xact"];

/// A configuration for a directory without one, as large as the control file demands; `controldata` is what `pg_controldata` says about it
/// in English. Where that is not to be had, recovery still works wherever the defaults are large enough, and says so where they are not.
pub(crate) fn minimal_configuration(controldata: &str) -> String {
    let mut text = "# made by pgvault: the data directory has no postgresql.conf\n".to_owned();
    for line in controldata.lines() {
        let Some((name, value)) = line.strip_suffix('\r').unwrap_or(line).split_once(" setting:") else { continue };
        let name = match name {
            name if !AT_LEAST.contains(&name) => continue,
            "max_prepared_xacts" => "max_prepared_transactions",
            "max_locks_per_xact" => "max_locks_per_transaction",
            name => name,
        };
        let _ = writeln!(text, "{name} = {}", value.trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_control_file_demands_is_configured() {
        let said = "wal_level setting:                    replica\nmax_connections setting:              100\r\nmax_prepared_xacts setting:           7\n\
                    max_locks_per_xact setting:           64\ntrack_commit_timestamp setting:       off\n";
        let text = minimal_configuration(said);
        assert!(
            text.ends_with("\nmax_connections = 100\nmax_prepared_transactions = 7\nmax_locks_per_transaction = 64\n"),
            "{text}"
        );
        assert!(!text.contains("wal_level"), "{text}");
        assert_eq!(minimal_configuration("").lines().count(), 1);
    }
}
