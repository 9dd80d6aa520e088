//! The check judges every object for itself: what one of them is does not keep it from the others.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/fixed.rs"]
mod fixed;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use pgvault_core::crypto::sealed::{FrameEncoder, SealedWriter};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::format::document;
use pgvault_core::format::object::Kind;
use pgvault_core::inspect::{CheckOptions, Finding, Severity, check};
use pgvault_core::postgres::{Lsn, SystemId, TimelineId, WalFileName};
use pgvault_core::progress::Silent;
use pgvault_core::store::Store;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::snapshot::{BackupKind, Manifest, Snapshot, SourceKind};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault, audit, keyring, layout};
use pgvault_core::wal::object::seal_file;
use serde_json::json;
use sha2::{Digest, Sha256};
use ulid::Ulid;

/// A cluster with its creation recorded.
async fn cluster() -> Cluster {
    let (vault, _) = Vault::create(Store::in_memory(), fixed::env("check")).await.unwrap();
    let name = ClusterName::new("main", SystemId(7)).unwrap();
    let key = age::x25519::Identity::generate();
    assert!(vault.create_cluster(&name, &[Wrap::Recipient(key.to_public().to_string())]).await.unwrap());
    let secret = age::secrecy::ExposeSecret::expose_secret(&key.to_string()).to_owned();
    let cluster = vault.unlock(&name, &Unlock::Identity(secret.into())).await.unwrap();
    assert!(keyring::record_creation(&cluster).await.unwrap());
    cluster
}

/// A manifest of a backup of these file table chunks.
fn manifest(cluster: &Cluster) -> Manifest {
    let now = cluster.env().now();
    Manifest {
        id: cluster.env().new_id().unwrap(),
        kind: BackupKind::Full,
        parent: None,
        source: SourceKind::Local,
        cluster: "main".into(),
        system_id: SystemId(7),
        server_version: "18.1".into(),
        major: 18,
        from_standby: false,
        timeline: TimelineId(1),
        start_lsn: Lsn(0x0100_0028),
        stop_lsn: Lsn(0x0100_0100),
        started_at: now,
        finished_at: now,
        wal_segment_size: (1_u32 << 20).try_into().unwrap(),
        block_size: 8192,
        data_checksums: true,
        backup_label: String::new(),
        tablespaces: Vec::new(),
        bad_pages: Vec::new(),
        labels: BTreeMap::new(),
        warnings: Vec::new(),
        census: None,
        files: 0,
        source_bytes: 0,
        changed_bytes: 0,
        stored_bytes: 0,
        objects_put: 1,
        restore_amplification: 1.0,
        version: "test".into(),
    }
}

/// Commits a backup and records it.
async fn commit(cluster: &Cluster, file_table: &[Vec<u8>]) -> Ulid {
    let manifest = manifest(cluster);
    let tables = Tables::store(cluster, &[], file_table.to_vec(), Limits::default()).await.unwrap();
    let snapshot = Snapshot { manifest: &manifest, tables: &tables };
    cluster.put_once(&snapshot.seal(cluster).unwrap()).await.unwrap();
    audit::record(cluster, audit::Event::BackupCommitted { backup_id: manifest.id }).await.unwrap();
    manifest.id
}

async fn findings(cluster: &Cluster) -> Vec<Finding> {
    let options = CheckOptions { sizes_only: false, progress: Arc::new(Silent) };
    check(cluster, &options).await.unwrap().findings
}

/// The same object as a later major version would write it, as far as anybody without that version can tell.
async fn make_newer(cluster: &Cluster, relative: &str) {
    let name = cluster.path(relative);
    let mut bytes = cluster.store().get(&name).await.unwrap().to_vec();
    bytes[4] = 2;
    let end = bytes.len() - 32;
    let hash = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&hash);
    cluster.store().delete(&name).await.unwrap();
    cluster.store().put_once(&name, bytes.into()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn objects_of_a_newer_version_are_named_and_everything_else_is_checked() {
    let cluster = cluster().await;
    let good = commit(&cluster, &[]).await;
    // A whole history and one of a newer version; the WAL itself is missing, which is to be found all the same.
    let histories = ["00000002.history", "00000003.history"].map(|name| -> WalFileName { name.parse().unwrap() });
    for history in histories {
        let contents = b"1\t0/F0000000\tno recovery target specified\n";
        cluster.put_once(&seal_file(&cluster, history, contents).unwrap()[0]).await.unwrap();
    }
    assert!(findings(&cluster).await.iter().all(|f| f.problem.contains("needs WAL") && f.hurts == [good]));

    // An entry of a type that this version does not know, and an object of another major version.
    let entry = [&[1, b'x', 0, 9][..]].concat();
    let new_entry = commit(&cluster, &[entry]).await;
    let new_major = commit(&cluster, &[]).await;
    make_newer(&cluster, &layout::snapshot(new_major)).await;
    make_newer(&cluster, "wal/00000003/00000003.history").await;
    let event = layout::audit(cluster.env().new_id().unwrap(), "backup-blessed");
    let record = json!({ "event": "backup-blessed", "saint": 7, "at": "2030-01-01T00:00:00Z", "by": "me@here" });
    cluster.put_json(Kind::Audit, &event, &record).await.unwrap();
    let slot_id = cluster.env().new_id().unwrap();
    let slot = document::encode(&json!({ "version": 2, "key_id": slot_id })).unwrap();
    cluster.store().put_once(&layout::key_slot(cluster.name(), slot_id), slot.into()).await.unwrap();
    let not_judged = [
        (cluster.path(&layout::snapshot(new_entry)), Severity::Error, vec![new_entry]),
        (cluster.path(&layout::snapshot(new_major)), Severity::Error, vec![new_major]),
        (cluster.path("wal/00000003/00000003.history"), Severity::Error, vec![]),
        (cluster.path(&event), Severity::Warning, vec![]),
        (layout::key_slot(cluster.name(), slot_id), Severity::Error, vec![]),
    ];

    // Damage of each kind, met after what cannot be judged.
    let known_event = layout::audit(cluster.env().new_id().unwrap(), "backup-committed");
    cluster.put_json(Kind::Audit, &known_event, &json!({ "event": "backup-committed" })).await.unwrap();
    let lost = cluster.env().new_id().unwrap();
    audit::record(&cluster, audit::Event::BackupCommitted { backup_id: lost }).await.unwrap();
    audit::record(&cluster, audit::Event::KeyAdded { key_id: lost }).await.unwrap();
    let garbage = cluster.path(&layout::pack(cluster.env().new_id().unwrap()));
    cluster.store().put_once(&garbage, Bytes::from_static(b"garbage")).await.unwrap();
    let damaged = [
        cluster.path(&known_event),
        cluster.path(&layout::snapshot(lost)),
        layout::key_slot(cluster.name(), lost),
        garbage,
        // Its WAL.
        cluster.path(&layout::snapshot(good)),
    ];

    let found = findings(&cluster).await;
    for (object, severity, hurts) in &not_judged {
        let about: Vec<_> = found.iter().filter(|f| f.object == *object && f.problem.contains("cannot be judged")).collect();
        assert!(about.len() == 1 && about[0].severity == *severity, "{object}: {found:#?}");
        assert!(hurts.iter().all(|id| about[0].hurts.contains(id)), "{about:?}");
    }
    let event_finding = found.iter().find(|f| f.object == cluster.path(&event)).unwrap();
    assert!(event_finding.problem.contains("`backup-blessed`"), "{event_finding:?}");
    for object in &damaged {
        let about: Vec<_> = found.iter().filter(|f| f.object == *object).collect();
        assert!(about.len() == 1 && about[0].severity == Severity::Error, "{object}: {found:#?}");
        assert!(!about[0].problem.contains("cannot be judged"), "{about:?}");
    }
    // The creation is known to be recorded, whatever else is in the log.
    assert!(!keyring::record_creation(&cluster).await.unwrap());
}

/// The log of an older version's cluster is readable, whatever newer ones wrote into it.
#[tokio::test(flavor = "current_thread")]
async fn every_known_event_is_read_back() {
    let cluster = cluster().await;
    let id = Ulid(7);
    let restored = || audit::Event::Restored { backup_id: id, target: "latest".into(), pgdata: "/x".into() };
    let gap = audit::Event::WalGap { timeline: TimelineId(2), from: Lsn(0x1_0000_0028), to: Lsn(0x1_0100_0000) };
    for event in [audit::Event::EpochStarted { epoch_id: id }, restored(), audit::Event::KeyRevoked { key_id: id }, gap] {
        let there = async || {
            let name = serde_json::to_value(&event).unwrap()["event"].as_str().unwrap().to_owned();
            audit::of(&cluster, &[&name]).await.unwrap().iter().any(|record| record.event == event)
        };
        assert!(!there().await);
        audit::record(&cluster, event.clone()).await.unwrap();
        assert!(there().await);
    }
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Audit, "audit/x", 0).unwrap();
    let _ = writer.push(&mut FrameEncoder::new(1).unwrap(), b"{", cluster.keys().digest().frame(b"{")).unwrap();
    cluster.put_once(&writer.finish(Vec::new())).await.unwrap();
    let about = cluster.path("audit/x");
    assert!(findings(&cluster).await.iter().any(|f| f.object == about && f.severity == Severity::Error));
}
