//! Does the store keep what a vault relies on? Asked of the store, never taken from its name or its answers' status.
//!
//! Servers were seen that answer 200 to a create-only PUT and overwrite, and others that accept a lock and drop it. So each
//! promise is tried on objects of no use below `probe/`: created twice, locked and read back, deleted, overwritten.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::env::Env;
use crate::store::guard::BucketRules;
use crate::store::probe::{Check, Outcome, ProbeReport, probe};
use crate::store::retention::Lock;
use crate::store::{Put, Store};
use crate::vault::{layout, versions_came_later};
use crate::{Error, ErrorKind, Result};

/// Clocks that differ by more than this deserve a look.
const SKEW: SignedDuration = SignedDuration::from_mins(2);

/// How long the lock of a probe lasts: nobody waits for it, and it must not outlive the examination by much.
const PROBE_LOCK: SignedDuration = SignedDuration::from_mins(2);

/// Examines a store. With `read_only` nothing is written, and what only writing shows is passed over.
///
/// # Errors
/// When the store cannot be reached at all, or nothing can be written and that was not said. A promise that is not kept is no
/// error; it is in the report.
pub async fn examine_store(store: &Store, env: &Env, read_only: bool) -> Result<ProbeReport> {
    let mut report = if read_only {
        let listed = store.list_directories("").await?;
        let mut report = ProbeReport::new(store);
        let seen = format!("the store answers, {} entries at the top; nothing was written", listed.len());
        report.checks.push(Check::new("reachable", Outcome::Passed, seen, ""));
        report
    } else {
        let mut report = probe(store, env).await?;
        if report.first_version_counts() && vault_is_there(store).await? && !store.settles_by_versions() {
            let error = versions_came_later(store.location());
            let fix = "make sure that only one program writes, and make a new vault on a bucket that has versions from the start";
            add(&mut report, "first_version", Outcome::Failed, error.to_string(), fix);
        }
        rights(store, env, &mut report).await?;
        locks(store, env, &mut report).await?;
        report
    };
    if store.can_keep() {
        let rules = store.bucket_rules().await;
        bucket(store, rules, &mut report)?;
    }
    skew(store, &mut report);
    Ok(report)
}

async fn vault_is_there(store: &Store) -> Result<bool> {
    Ok(store.get_if_exists(layout::VAULT_DOCUMENT).await?.is_some())
}

fn add(report: &mut ProbeReport, name: &'static str, outcome: Outcome, evidence: impl Into<String>, fix: &'static str) {
    report.checks.push(Check::new(name, outcome, evidence, fix));
}

/// The clock in the answers of a store in a cloud; [`probe`] compares the one in its listings.
fn skew(store: &Store, report: &mut ProbeReport) {
    let Some(ahead) = store.clock_ahead() else { return };
    if ahead.abs() > SKEW {
        let evidence = format!("the store's clock is {} s ahead of this machine's", ahead.as_secs());
        add(report, "request_clock", Outcome::Warned, evidence, "set this machine's clock: S3 refuses requests at 15 minutes");
    }
}

fn bucket(store: &Store, rules: Result<BucketRules>, report: &mut ProbeReport) -> Result<()> {
    let rules = match rules {
        Ok(rules) => rules,
        // What a credential may not look at cannot be told; what cannot be reached is an error.
        Err(error) if !error.is_transient() => {
            add(report, "bucket", Outcome::Skipped, error.to_string(), "the credentials may not read the bucket's settings");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let wants_locks = store.immutability().is_some();
    let must = if wants_locks { Outcome::Failed } else { Outcome::Warned };
    match rules.versioning {
        Some(true) => add(report, "versioning", Outcome::Passed, "the bucket keeps old versions", ""),
        Some(false) => add(
            report,
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
                add(report, "object_lock", Outcome::Passed, evidence.to_lowercase(), "");
            }
            (true, true, None) => add(report, "object_lock", Outcome::Passed, "objects can be locked", ""),
            (true, false, None) => add(
                report,
                "object_lock",
                Outcome::Warned,
                "objects can be locked, and none is",
                "set vault.immutability, or a default retention of the bucket",
            ),
            (false, true, _) => add(
                report,
                "object_lock",
                Outcome::Failed,
                "vault.immutability is set, and the bucket has no Object Lock",
                "make a bucket with Object Lock; most stores cannot switch it on later",
            ),
            (false, false, _) => add(
                report,
                "object_lock",
                Outcome::Warned,
                "nothing is locked: whoever gets hold of credentials that may delete can destroy every backup",
                "use a bucket with Object Lock and set vault.immutability",
            ),
        }
    }
    if rules.expires_objects == Some(true) {
        add(
            report,
            "lifecycle",
            Outcome::Failed,
            "a lifecycle rule deletes current objects of the vault after some time",
            "remove the rule: backups would break without notice",
        );
    } else if rules.versioning == Some(true) && rules.expires_old_versions == Some(false) {
        add(
            report,
            "lifecycle",
            Outcome::Warned,
            "old versions are kept for ever: what pgvault deletes keeps costing",
            "add a lifecycle rule that expires noncurrent versions after some days",
        );
    } else if rules.expires_objects.is_some() {
        add(report, "lifecycle", Outcome::Passed, "no rule deletes what the vault needs", "");
    }
    for unknown in rules.unknown {
        add(report, "bucket", Outcome::Skipped, unknown, "");
    }
    Ok(())
}

fn probe_name(env: &Env) -> Result<String> {
    Ok(format!("probe/{}", env.new_id()?))
}

/// What may these credentials do that a writer's should not?
async fn rights(store: &Store, env: &Env, report: &mut ProbeReport) -> Result<()> {
    let name = probe_name(env)?;
    let first = Bytes::from_static(b"pgvault probe: may be deleted");
    if store.put_new(&name, first.clone()).await? != Put::Created {
        return Err(Error::new(ErrorKind::Conflict, "store.taken", format!("{name} was there already")));
    }
    match store.overwrite(&name, Bytes::from_static(b"pgvault probe: overwritten")).await {
        Ok(()) if store.get(&name).await? == first => {
            add(report, "overwrite", Outcome::Passed, "an overwrite is answered with success and not carried out", "");
        }
        Ok(()) => add(
            report,
            "overwrite",
            Outcome::Warned,
            "these credentials may overwrite objects",
            "with versions kept, `pgvault undelete` brings the first ones back; on S3 a policy can require If-None-Match",
        ),
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => add(report, "overwrite", Outcome::Passed, "overwriting is refused", ""),
    }
    // The probe's own objects were deleted before this one, or were not.
    if report.may_delete == Some(true) {
        let fix = "give the writer an identity that may not; only the pruner's needs to";
        add(report, "delete", Outcome::Warned, "these credentials may delete objects", fix);
        store.delete(&name).await?;
    } else {
        add(report, "delete", Outcome::Passed, "deleting is refused", "");
    }
    Ok(())
}

/// Is a lock that was set with a PUT there, and does it hold?
async fn locks(store: &Store, env: &Env, report: &mut ProbeReport) -> Result<()> {
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
            add(report, "locks", Outcome::Failed, format!("a locked object cannot be created: {error}"), "see docs/stores.md");
            return Ok(());
        }
    }
    let read = store.lock_of(&name).await;
    match read {
        Ok(Some(found)) if found.covers(&lock) => {
            add(report, "locks", Outcome::Passed, format!("a lock until {} was kept until {}", lock.until, found.until), "");
        }
        Ok(found) => {
            let seen = found.map_or_else(|| "none".to_owned(), |found| format!("one until {}", found.until));
            add(
                report,
                "locks",
                Outcome::Failed,
                format!("a lock until {} was accepted, and there is {seen}", lock.until),
                "this store accepts locks and drops them: use one that keeps them, or leave vault.immutability out",
            );
            return Ok(());
        }
        Err(error) if error.is_transient() => return Err(error),
        Err(error) => {
            add(report, "locks", Outcome::Failed, format!("the lock cannot be read back: {error}"), "see docs/stores.md");
            return Ok(());
        }
    }
    // As each backup does it to what it needs.
    let longer = Lock { until: until(PROBE_LOCK + SignedDuration::from_secs(30))?, ..lock };
    match store.keep_until(&name, &longer).await {
        Ok(()) => add(report, "extend_lock", Outcome::Passed, "a lock can be made longer", ""),
        Err(error) if error.is_transient() => return Err(error),
        Err(error) => {
            let fix =
                "backups need it at their end: give the writer the right (s3:PutObjectRetention, storage.objects.setRetention)";
            add(report, "extend_lock", Outcome::Failed, format!("a lock cannot be made longer: {error}"), fix);
        }
    }
    let shorter = Lock { until: until(SignedDuration::from_secs(30))?, ..lock };
    refused("shorten_lock", "a lock", "made shorter", store.set_lock(&name, &shorter).await, report)?;
    if let Some(version) = store.versions(&name).await.ok().and_then(|versions| versions.into_iter().find(|v| !v.is_delete_marker))
    {
        refused("delete_locked", "a locked version", "deleted", store.delete_version(&name, &version.id).await, report)?;
    }
    Ok(())
}

fn refused(name: &'static str, what: &str, done: &str, tried: Result<()>, report: &mut ProbeReport) -> Result<()> {
    match tried {
        Ok(()) => add(report, name, Outcome::Failed, format!("{what} was {done}"), "the store does not keep its locks"),
        Err(error) if error.is_transient() => return Err(error),
        Err(_) => add(report, name, Outcome::Passed, format!("{what} cannot be {done}"), ""),
    }
    Ok(())
}
