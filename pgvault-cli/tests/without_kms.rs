//! A build without the clients of key services: `cargo test -p pgvault-cli --no-default-features --test without_kms`.

#![cfg(not(feature = "kms"))]
#![expect(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Output};

fn run(folder: &std::path::Path, environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgvault"));
    let _ = command.env_clear().envs(environment.iter().copied()).current_dir(folder);
    command.args(arguments).output().unwrap()
}

/// It says which feature is missing, before anything is created; and it reads, lists and checks slots that others made.
#[test]
fn a_key_service_that_was_not_built_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let vault = folder.path().join("vault");
    let text = format!("[vault]\nurl = 'file://{}'\n[cluster.main]\n", vault.display());
    std::fs::write(folder.path().join("pgvault.toml"), text).unwrap();
    for (key, feature) in [
        ("aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1", "kms-aws"),
        ("azure-kv:https://backups.vault.azure.net/keys/k", "kms-azure"),
        ("gcp-kms:projects/p/locations/l/keyRings/r/cryptoKeys/k", "kms-gcp"),
        ("vault-transit:transit/k", "kms-transit"),
    ] {
        let output = run(folder.path(), &[("PGVAULT_VAULT__KMS", key)], &["init", "--system-id", "7"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("kms.not_built") && said.contains(&format!("--features {feature}")), "{said}");
        assert!(!vault.exists());
    }

    let passphrase = [("PGVAULT_VAULT_PASSPHRASE", "correct horse")];
    assert!(run(folder.path(), &passphrase, &["init", "--system-id", "7"]).status.success());
    let keys = vault.join("c/main-7/keys");
    let own = std::fs::read_dir(&keys).unwrap().next().unwrap().unwrap().path();
    let mut slot: pgvault_core::crypto::slot::SlotDocument =
        pgvault_core::format::document::parse("key slot", &std::fs::read(own).unwrap()).unwrap();
    slot.key_id = ulid::Ulid(1);
    slot.method = pgvault_core::crypto::slot::Method::Kms {
        key: "vault-transit:transit/k".into(),
        key_version: String::new(),
        slot_key: "vault:v1:AAAA".into(),
        wrapped: "AAAA".into(),
    };
    std::fs::write(keys.join(format!("{}.json", slot.key_id)), pgvault_core::format::document::encode(&slot).unwrap()).unwrap();
    let listed = run(folder.path(), &[], &["key", "list"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("vault-transit:transit/k"));
    assert!(run(folder.path(), &passphrase, &["status"]).status.success());
}
