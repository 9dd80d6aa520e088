//! Receipts of restore drills: what was restored, to which moment, what was checked, how long it took.
//!
//! ```text
//! drill/<ulid>.<outcome>.<backup>     the ULID is the drill's; a drill that never chose a backup ends at the outcome
//! ```
//!
//! A receipt is sealed like everything else, and signed besides: with an Ed25519 key that is derived from the cluster's master key, so
//! that a report that left the vault can be checked by somebody who has only the public key. The signature is over the receipt as JSON
//! without white space and with sorted keys.
//!
//! Receipts are created once, locked like manifests, and never expire: each is a few kilobytes.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ulid::Ulid;

use super::{Cluster, layout};
use crate::crypto::signature;
use crate::format::object::Kind;
use crate::postgres::{Lsn, SystemId, TimelineId};
use crate::{Error, ErrorKind, Result};

/// Receipts read at once.
const PARALLEL: usize = 8;

/// How a drill ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Everything was restored, started, and passed every check.
    Passed,
    /// What was checked passed, but not everything was: no proof of the backup.
    Partial,
    /// Something is wrong.
    Failed,
}

impl Outcome {
    /// As in names of receipts.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Partial => "partial",
            Self::Failed => "failed",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Passed, Self::Partial, Self::Failed].into_iter().find(|outcome| outcome.as_str() == text)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Passed,
    /// Worth knowing; the drill passes all the same.
    Warned,
    /// The drill fails.
    Failed,
    /// Not done, for the reason that is given.
    Skipped,
}

/// One check of a drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, for example `page-checksums`.
    pub name: String,
    /// What it came to.
    pub verdict: Verdict,
    /// In one sentence, for people.
    pub message: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Figures and names that the sentence is made from.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub evidence: Value,
}

/// A part of the way back, and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name: `open`, `plan`, `fetch`, `start`, `replay`, `promote`, `checks`.
    pub name: String,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// The point that recovery reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The end of the last record that was replayed.
    pub lsn: Lsn,
    /// The timeline it lies on.
    pub timeline: TimelineId,
    /// When the last transaction that is in it ended, if one did after the backup.
    pub time: Option<Timestamp>,
}

/// What a disaster now would take, by the speed of this drill: the newest backup and all the WAL behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Projection {
    /// All of it, in milliseconds.
    pub total_ms: u64,
    /// Without the WAL: what it would take from a new base backup.
    pub base_ms: u64,
    /// Replaying the WAL.
    pub wal_ms: u64,
    /// Bytes of that WAL.
    pub wal_bytes: u64,
}

/// A figure that people recognise: the newest order, the number of invoices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// The database.
    pub database: String,
    /// What it is.
    pub label: String,
    /// Its value, as text.
    pub value: String,
}

/// What a drill has found. No floating point numbers: they have more than one way to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The drill's id, also its name.
    pub id: Ulid,
    /// The configured cluster name.
    pub cluster: String,
    /// The cluster's identity.
    pub system_id: SystemId,
    /// How it ended.
    pub outcome: Outcome,
    /// What was left out, when the outcome is [`Outcome::Partial`], in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// What ran the server: `process` or `docker`, and with what.
    pub runner: String,
    /// User and host that ran the drill.
    pub by: String,
    /// When it began, by this machine's clock.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The backup it started from.
    pub backup_id: Option<Ulid>,
    /// When that backup was complete.
    pub backup_finished_at: Option<Timestamp>,
    /// The target, as given.
    pub target: String,
    /// Where recovery ended.
    pub reached: Option<Point>,
    /// Seed of whatever was chosen at random.
    pub seed: u64,
    /// The parts of the way back in their order.
    pub phases: Vec<Phase>,
    /// From the first request until the database was open for its users: what a disaster would have taken. Milliseconds.
    pub rto_ms: u64,
    /// What was promised, in milliseconds.
    pub rto_target_ms: Option<u64>,
    /// Bytes of the files that were restored.
    pub restored_bytes: u64,
    /// Bytes of WAL that were replayed.
    pub replayed_bytes: u64,
    /// What a disaster now would take; absent when the drill did not come that far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection: Option<Projection>,
    /// Every check in its order.
    pub checks: Vec<Check>,
    /// Figures that people recognise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<Fact>,
    /// The base backup that was made of the restored cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted_to: Option<Ulid>,
    /// The version of pgvault.
    pub version: String,
}

impl Receipt {
    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.verdict == Verdict::Failed)
    }
}

/// A receipt with its signature, as it is stored and as reports carry it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignedReceipt {
    /// What was signed.
    pub receipt: Receipt,
    /// Ed25519, base64.
    pub signature: String,
    /// The key that verifies it, base64.
    pub public_key: String,
}

impl SignedReceipt {
    /// Signs a receipt.
    ///
    /// # Errors
    /// When the receipt cannot be written as JSON.
    pub fn new(cluster: &Cluster, receipt: Receipt) -> Result<Self> {
        let key = cluster.keys().receipt_key()?;
        let signature = BASE64.encode(key.sign(&canonical(&receipt)?));
        Ok(Self { receipt, signature, public_key: BASE64.encode(key.public()) })
    }

    /// Verifies the signature against the key that the receipt itself names; who has the vault's key compares that, too.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it does not hold.
    pub fn verify(&self) -> Result<()> {
        let bad = |why: &str| Error::new(ErrorKind::Corrupt, "drill.signature", format!("the receipt {}: {why}", self.receipt.id));
        let decode = |text: &str| BASE64.decode(text).map_err(|_| bad("its signature or its key is not base64"));
        if signature::verify(&decode(&self.public_key)?, &canonical(&self.receipt)?, &decode(&self.signature)?) {
            Ok(())
        } else {
            Err(bad("the signature does not hold: it was changed, or signed by another key")
                .with_hint("`pgvault list` shows what the vault has"))
        }
    }
}

/// The bytes that are signed.
fn canonical(receipt: &Receipt) -> Result<Vec<u8>> {
    let json = |e: serde_json::Error| Error::new(ErrorKind::Failed, "json", e.to_string());
    let value = serde_json::to_value(receipt).map_err(json)?;
    serde_json::to_vec(&sorted(value)).map_err(json)
}

/// The same value, whose objects are written in the order of their keys whatever map this build of `serde_json` has.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<String, Value> = fields.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(fields.into_iter().collect())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Stores a receipt.
///
/// # Errors
/// When the store fails.
pub async fn record(cluster: &Cluster, signed: &SignedReceipt) -> Result<()> {
    let receipt = &signed.receipt;
    let name = layout::drill(receipt.id, receipt.outcome.as_str(), receipt.backup_id);
    cluster.put_json(Kind::Drill, &name, signed).await
}

/// What the name of a receipt says. It is sealed with the receipt: one that was given another name cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// The drill.
    pub id: Ulid,
    /// How it ended.
    pub outcome: Outcome,
    /// The backup it started from.
    pub backup_id: Option<Ulid>,
}

impl Listed {
    fn parse(name: &str) -> Option<Self> {
        let id = layout::id_of(name)?;
        let (outcome, backup) = match layout::what_of(name)?.split_once('.') {
            Some((outcome, backup)) => (outcome, Some(Ulid::from_string(backup).ok()?)),
            None => (layout::what_of(name)?, None),
        };
        Some(Self { id, outcome: Outcome::parse(outcome)?, backup_id: backup })
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the store fails, the receipt was changed, or its signature is not by this cluster's key.
    pub async fn read(&self, cluster: &Cluster) -> Result<SignedReceipt> {
        let name = layout::drill(self.id, self.outcome.as_str(), self.backup_id);
        let signed: SignedReceipt = cluster.get_json(Kind::Drill, &name).await?;
        let foreign = |why: &str| Error::new(ErrorKind::Corrupt, "drill.receipt", format!("{}: {why}", cluster.path(&name)));
        if signed.public_key != BASE64.encode(cluster.keys().receipt_key()?.public()) {
            return Err(foreign("it was signed by another key"));
        }
        signed.verify()?;
        let receipt = &signed.receipt;
        if (receipt.id, receipt.outcome, receipt.backup_id) != (self.id, self.outcome, self.backup_id) {
            return Err(foreign("its name says something else than it does"));
        }
        Ok(signed)
    }
}

/// The drills of a cluster, oldest first. Nothing is read.
///
/// # Errors
/// When the store fails.
pub async fn list(cluster: &Cluster) -> Result<Vec<Listed>> {
    let listed = cluster.store().list(&cluster.path(layout::dir::DRILL)).await?;
    Ok(listed.iter().filter_map(|object| Listed::parse(&object.name)).collect())
}

/// Reads some of them; those that were changed are left out, `check` names them.
///
/// # Errors
/// When the store fails.
pub async fn read_all(cluster: &Cluster, drills: &[Listed]) -> Result<Vec<SignedReceipt>> {
    let mut reading = stream::iter(drills.to_vec()).map(|drill| async move { drill.read(cluster).await }).buffered(PARALLEL);
    let mut receipts = Vec::new();
    while let Some(read) = reading.next().await {
        match read {
            Ok(receipt) => receipts.push(receipt),
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound) => {
                tracing::warn!(%error, "a receipt of a restore drill cannot be used");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(receipts)
}

/// The newest drill that passed and whose receipt can be read.
///
/// # Errors
/// When the store fails.
pub async fn last_passed(cluster: &Cluster) -> Result<Option<SignedReceipt>> {
    for drill in list(cluster).await?.iter().rev().filter(|drill| drill.outcome == Outcome::Passed) {
        if let Some(receipt) = read_all(cluster, std::slice::from_ref(drill)).await?.pop() {
            return Ok(Some(receipt));
        }
    }
    Ok(None)
}

/// For each backup that a drill has proven, when the newest of them ended.
///
/// # Errors
/// When the store fails.
pub async fn verified(cluster: &Cluster) -> Result<BTreeMap<Ulid, Timestamp>> {
    let mut newest: BTreeMap<Ulid, Listed> = BTreeMap::new();
    for drill in list(cluster).await?.into_iter().filter(|drill| drill.outcome == Outcome::Passed) {
        if let Some(backup) = drill.backup_id {
            let _ = newest.insert(backup, drill);
        }
    }
    let newest: Vec<Listed> = newest.into_values().collect();
    let receipts = read_all(cluster, &newest).await?;
    let mut verified = BTreeMap::new();
    for SignedReceipt { receipt, .. } in receipts {
        // A backup that was made of a drill is proven by the same drill.
        for backup in receipt.backup_id.into_iter().chain(receipt.promoted_to) {
            let at = verified.entry(backup).or_insert(receipt.finished_at);
            *at = receipt.finished_at.max(*at);
        }
    }
    Ok(verified)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::store::Store;
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;

    async fn cluster() -> Cluster {
        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        let _ = vault.create_cluster(&name, &[Wrap::Passphrase("correct horse".into())]).await.unwrap();
        vault.unlock(&name, &Unlock::Passphrase("correct horse".into())).await.unwrap()
    }

    async fn record(cluster: &Cluster, receipt: Receipt) -> Result<SignedReceipt> {
        let signed = SignedReceipt::new(cluster, receipt)?;
        super::record(cluster, &signed).await?;
        Ok(signed)
    }

    fn receipt(id: u128, outcome: Outcome, backup: Option<Ulid>) -> Receipt {
        let at: Timestamp = "2026-11-22T06:00:00Z".parse().unwrap();
        let check = Check {
            name: "recovery".into(),
            verdict: Verdict::Passed,
            message: "it recovered".into(),
            duration_ms: 12,
            evidence: serde_json::json!({ "b": 1, "a": { "d": [2, { "f": 1, "e": null }], "c": "x" } }),
        };
        Receipt {
            id: Ulid(id),
            cluster: "main".into(),
            system_id: SystemId(7),
            outcome,
            left_out: Vec::new(),
            runner: "process".into(),
            by: "me@here".into(),
            started_at: at,
            finished_at: at,
            backup_id: backup,
            backup_finished_at: Some(at),
            target: "latest".into(),
            reached: Some(Point { lsn: Lsn(0x1000), timeline: TimelineId(1), time: Some(at) }),
            seed: 7,
            phases: vec![Phase { name: "fetch".into(), duration_ms: 5 }],
            rto_ms: 9,
            rto_target_ms: None,
            restored_bytes: 1,
            replayed_bytes: 2,
            projection: Some(Projection { total_ms: 5, base_ms: 3, wal_ms: 2, wal_bytes: 9 }),
            checks: vec![check],
            facts: Vec::new(),
            promoted_to: None,
            version: "0".into(),
        }
    }

    #[tokio::test]
    async fn what_passed_proves_its_backup_and_nothing_else_does() {
        let cluster = cluster().await;
        assert!(last_passed(&cluster).await.unwrap().is_none() && verified(&cluster).await.unwrap().is_empty());
        for (id, outcome, backup) in [
            (1, Outcome::Passed, Some(Ulid(101))),
            (2, Outcome::Failed, Some(Ulid(102))),
            (3, Outcome::Partial, Some(Ulid(103))),
            (4, Outcome::Failed, None),
        ] {
            let _ = record(&cluster, receipt(id, outcome, backup)).await.unwrap();
        }
        let mut rolled = receipt(5, Outcome::Passed, Some(Ulid(101)));
        rolled.promoted_to = Some(Ulid(105));
        let _ = record(&cluster, rolled.clone()).await.unwrap();
        assert_eq!(verified(&cluster).await.unwrap().into_keys().collect::<Vec<_>>(), [Ulid(101), Ulid(105)]);
        assert_eq!(last_passed(&cluster).await.unwrap().unwrap().receipt, rolled);
        let listed = list(&cluster).await.unwrap();
        assert_eq!(listed.iter().map(|drill| drill.id.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(listed[3].backup_id, None);
    }

    /// A receipt that somebody renamed, or wrote without the key, proves nothing.
    #[tokio::test]
    async fn a_forged_receipt_is_not_believed() {
        let cluster = cluster().await;
        let failed = record(&cluster, receipt(1, Outcome::Failed, Some(Ulid(101)))).await.unwrap();
        let store = cluster.store();
        let from = cluster.path(&layout::drill(Ulid(1), "failed", Some(Ulid(101))));
        let to = cluster.path(&layout::drill(Ulid(1), "passed", Some(Ulid(101))));
        let bytes = store.get(&from).await.unwrap();
        store.put_once(&to, bytes).await.unwrap();
        assert!(last_passed(&cluster).await.unwrap().is_none());
        // Sealed by the right key, but of another content than its name and its signature say.
        let mut changed = failed;
        changed.receipt.outcome = Outcome::Passed;
        assert_eq!(changed.verify().unwrap_err().code(), "drill.signature");
        cluster.put_json(Kind::Drill, &layout::drill(Ulid(2), "passed", Some(Ulid(101))), &changed).await.unwrap();
        assert!(last_passed(&cluster).await.unwrap().is_none());
        let honest = SignedReceipt::new(&cluster, receipt(3, Outcome::Passed, None)).unwrap();
        honest.verify().unwrap();
        // What was written and read again is signed all the same.
        let again: SignedReceipt = serde_json::from_str(&serde_json::to_string_pretty(&honest).unwrap()).unwrap();
        again.verify().unwrap();
    }
}
