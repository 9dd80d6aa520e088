//! `pgvault demo`, as its users run it.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use serde_json::Value;

/// The table comes back exactly, and nothing else is left of the demo.
#[test]
fn the_demo_gets_every_order_back_and_leaves_nothing_behind() {
    let parent = tempfile::Builder::new().prefix("pgvault-test-").tempdir_in("/tmp").unwrap();
    // The account that runs the servers has to get through.
    std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_pgvault"))
        .args(["demo", "--seconds", "2", "--output", "json"])
        .env("TMPDIR", parent.path())
        // Settings of a vault that is none of the demo's business.
        .env("PGVAULT_VAULT__URL", "file:///nonexistent/vault")
        .env("PGVAULT_VAULT_PASSPHRASE", "another")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(0), "{said}");
    let summary: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(summary["result"], "passed", "{summary}");
    assert_eq!(summary["committed"], summary["restored"]);
    assert_eq!(summary["confirmed_to_clients"], summary["restored"]["rows"]);
    assert!(summary["placed_after_target"].as_u64().unwrap() > 0, "{summary}");
    let left: Vec<_> = std::fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}
