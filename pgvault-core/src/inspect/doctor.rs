//! Does the store keep what a vault relies on? Asked of the store, never taken from its name or its answers' status.
//!
//! Servers were seen that answer 200 to a create-only PUT and overwrite, and others that accept a lock and drop it. So each
//! promise is tried on objects of no use below `probe/`: created twice, locked and read back, deleted, overwritten.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::env::Env;
use crate::store::guard::BucketRules;
use crate::store::retention::Lock;
use crate::store::{Put, Store};
use crate::{Error, ErrorKind, Result};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Passed,
    /// It could not be found out.
    Unknown,
    /// It works; somebody should know.
    Warning,
    /// A promise is not kept.
    Failed,
}

/// One promise and what was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Its stable name.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was seen.
    pub evidence: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// Clocks that differ by more than this make a store refuse requests: S3 allows 15 minutes.
const SKEW_FATAL: SignedDuration = SignedDuration::from_mins(10);

/// Clocks that differ by more than this deserve a look.
const SKEW_LARGE: SignedDuration = SignedDuration::from_secs(30);

/// How long the lock of a probe lasts: nobody waits for it, and it must not outlive the examination by much.
const PROBE_LOCK: SignedDuration = SignedDuration::from_mins(2);

#[derive(Debug, Default)]
struct Findings(Vec<Check>);

impl Findings {
    fn add(&mut self, name: &'static str, outcome: Outcome, evidence: impl Into<String>, advice: &str) {
        let advice = (!advice.is_empty()).then(|| advice.to_owned());
        self.0.push(Check { name, outcome, evidence: evidence.into(), advice });
    }
}

/// Examines a store. With `read_only` nothing is written, and what only writing shows stays unknown.
///
/// # Errors
/// When the store cannot be reached at all. A promise that is not kept is no error; it is in the checks.
pub async fn examine_store(store: &Store, env: &Env, read_only: bool) -> Result<Vec<Check>> {
    let mut findings = Findings::default();
    let listed = store.list_directories("").await?;
    findings.add("reachable", Outcome::Passed, format!("{} answers, {} entries at the top", store.location(), listed.len()), "");
    if read_only {
        findings.add(
            "create-only",
            Outcome::Unknown,
            "nothing was written",
            "run without --read-only, with the writer's credentials",
        );
    } else {
        create_only(store, env, &mut findings).await?;
        rights(store, env, &mut findings).await?;
        locks(store, env, &mut findings).await?;
    }
    if store.can_keep() {
        let rules = store.bucket_rules().await;
        bucket(store, rules, &mut findings)?;
    }
    clock(store, &mut findings);
    Ok(findings.0)
}

async fn create_only(store: &Store, env: &Env, findings: &mut Findings) -> Result<()> {
    match store.probe_create_only(env).await {
        Ok(()) => findings.add("create-only", Outcome::Passed, "a name that is taken is refused", ""),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            findings.add("create-only", Outcome::Failed, error.to_string(), error.hint().unwrap_or_default());
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

fn clock(store: &Store, findings: &mut Findings) {
    let Some(ahead) = store.clock_ahead() else { return };
    let evidence = format!("the store's clock is {} s ahead of this machine's", ahead.as_secs());
    let (outcome, advice) = match ahead.abs() {
        skew if skew > SKEW_FATAL => (Outcome::Failed, "set this machine's clock: stores refuse requests from another time"),
        skew if skew > SKEW_LARGE => (Outcome::Warning, "set this machine's clock, with NTP for instance"),
        _ => (Outcome::Passed, ""),
    };
    findings.add("clock", outcome, evidence, advice);
}

fn bucket(store: &Store, rules: Result<BucketRules>, findings: &mut Findings) -> Result<()> {
    let rules = match rules {
        Ok(rules) => rules,
        // What a credential may not look at cannot be told; what cannot be reached is an error.
        Err(error) if !error.is_transient() => {
            findings.add("bucket", Outcome::Unknown, error.to_string(), "the credentials may not read the bucket's settings");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let wants_locks = store.immutability().is_some();
    let must = if wants_locks { Outcome::Failed } else { Outcome::Warning };
    match rules.versioning {
        Some(true) => findings.add("versioning", Outcome::Passed, "the bucket keeps old versions", ""),
        Some(false) => findings.add(
            "versioning",
            must,
            "the bucket keeps no old versions: what is deleted or overwritten is gone",
            "switch versioning on",
        ),
        None => {}
    }
    if let Some(locked) = rules.object_lock {
        match (locked, wants_locks, rules.default_lock) {
            (true, _, Some((mode, days))) => {
                let evidence = format!("objects can be locked; by itself the bucket locks each for {days} days ({mode:?})");
                findings.add("object-lock", Outcome::Passed, evidence.to_lowercase(), "");
            }
            (true, true, None) => findings.add("object-lock", Outcome::Passed, "objects can be locked", ""),
            (true, false, None) => findings.add(
                "object-lock",
                Outcome::Warning,
                "objects can be locked, and none is",
                "set vault.immutability, or a default retention of the bucket",
            ),
            (false, true, _) => findings.add(
                "object-lock",
                Outcome::Failed,
                "vault.immutability is set, and the bucket has no Object Lock",
                "make a bucket with Object Lock; most stores cannot switch it on later",
            ),
            (false, false, _) => findings.add(
                "object-lock",
                Outcome::Warning,
                "nothing is locked: whoever gets hold of credentials that may delete can destroy every backup",
                "use a bucket with Object Lock and set vault.immutability",
            ),
        }
    }
    if rules.expires_objects == Some(true) {
        findings.add(
            "lifecycle",
            Outcome::Failed,
            "a lifecycle rule deletes current objects of the vault after some time",
            "remove the rule: backups would break without notice",
        );
    } else if rules.versioning == Some(true) && rules.expires_old_versions == Some(false) {
        findings.add(
            "lifecycle",
            Outcome::Warning,
            "old versions are kept for ever: what pgvault deletes keeps costing",
            "add a lifecycle rule that expires noncurrent versions after some days",
        );
    } else if rules.expires_objects.is_some() {
        findings.add("lifecycle", Outcome::Passed, "no rule deletes what the vault needs", "");
    }
    for unknown in rules.unknown {
        findings.add("bucket", Outcome::Unknown, unknown, "");
    }
    Ok(())
}

fn probe_name(env: &Env) -> Result<String> {
    Ok(format!("probe/{}", env.new_id()?))
}

/// What may these credentials do that a writer's should not?
async fn rights(store: &Store, env: &Env, findings: &mut Findings) -> Result<()> {
    let name = probe_name(env)?;
    let first = Bytes::from_static(b"pgvault probe: may be deleted");
    if store.put_new(&name, first.clone()).await? != Put::Created {
        return Err(Error::new(ErrorKind::Conflict, "store.taken", format!("{name} was there already")));
    }
    match store.overwrite(&name, Bytes::from_static(b"pgvault probe: overwritten")).await {
        Ok(()) if store.get(&name).await? == first => {
            findings.add("overwrite", Outcome::Passed, "an overwrite is answered with success and not carried out", "");
        }
        Ok(()) => findings.add(
            "overwrite",
            Outcome::Warning,
            "these credentials may overwrite objects",
            "with versions kept, `pgvault undelete` brings the first ones back; on S3 a policy can require If-None-Match",
        ),
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => findings.add("overwrite", Outcome::Passed, "overwriting is refused", ""),
    }
    match store.delete(&name).await {
        Ok(()) => findings.add(
            "delete",
            Outcome::Warning,
            "these credentials may delete objects",
            "give the writer an identity that may not; only the pruner's needs to",
        ),
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => findings.add("delete", Outcome::Passed, "deleting is refused", ""),
    }
    Ok(())
}

/// Is a lock that was set with a PUT there, and does it hold?
async fn locks(store: &Store, env: &Env, findings: &mut Findings) -> Result<()> {
    let Some(immutability) = store.immutability() else { return Ok(()) };
    let name = probe_name(env)?;
    let now = store.now();
    let until = |after: SignedDuration| -> Result<Timestamp> {
        let whole = now.checked_add(after).and_then(|at| Timestamp::from_second(at.as_second()));
        whole.map_err(|e| Error::new(ErrorKind::Failed, "clock", e.to_string()))
    };
    let lock = Lock { mode: immutability.mode, until: until(PROBE_LOCK)? };
    match store.put_locked(&name, Bytes::from_static(b"pgvault probe: locked for two minutes"), lock).await {
        Ok(()) => {}
        Err(error) if error.is_transient() => return Err(error),
        Err(error) => {
            findings.add("locks", Outcome::Failed, format!("a locked object cannot be created: {error}"), "see docs/stores.md");
            return Ok(());
        }
    }
    let read = store.lock_of(&name).await;
    match read {
        Ok(Some(found)) if found.covers(&lock) => {
            findings.add("locks", Outcome::Passed, format!("a lock until {} was kept until {}", lock.until, found.until), "");
        }
        Ok(found) => {
            let seen = found.map_or_else(|| "none".to_owned(), |found| format!("one until {}", found.until));
            findings.add(
                "locks",
                Outcome::Failed,
                format!("a lock until {} was accepted, and there is {seen}", lock.until),
                "this store accepts locks and drops them: use one that keeps them, or leave vault.immutability out",
            );
            return Ok(());
        }
        Err(error) if error.is_transient() => return Err(error),
        Err(error) => {
            findings.add("locks", Outcome::Failed, format!("the lock cannot be read back: {error}"), "see docs/stores.md");
            return Ok(());
        }
    }
    let shorter = Lock { until: until(SignedDuration::from_secs(30))?, ..lock };
    refused("shorten-lock", "a lock", "made shorter", store.set_lock(&name, &shorter).await, findings)?;
    if let Some(version) = store.versions(&name).await.ok().and_then(|versions| versions.into_iter().find(|v| !v.is_delete_marker))
    {
        refused("delete-locked", "a locked version", "deleted", store.delete_version(&name, &version.id).await, findings)?;
    }
    Ok(())
}

fn refused(name: &'static str, what: &str, done: &str, tried: Result<()>, findings: &mut Findings) -> Result<()> {
    match tried {
        Ok(()) => findings.add(name, Outcome::Failed, format!("{what} was {done}"), "the store does not keep its locks"),
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => findings.add(name, Outcome::Passed, format!("{what} cannot be {done}"), ""),
    }
    Ok(())
}
