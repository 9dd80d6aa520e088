//! Every operation, with a fault at every request that it makes.
//!
//! A case runs one operation over a copy of the vault, whose store fails at call k in one of the ways of [`Fault`], once
//! or from there on. Then the store is healthy again, and whatever the operation said:
//!
//! - everything that was in the vault is there, byte for byte;
//! - every backup that is listed restores to the source's files, byte for byte; what was acknowledged is listed;
//! - the check finds no error; what an interrupted operation may leave is a warning, word for word known here;
//! - running the operation again succeeds.
//!
//! And about what it said: a single fault that passes is survived; a failure of the store is never taken for the absence
//! of anything (T1); nothing runs for ever (H19).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use pgvault_core::backup::backup;
use pgvault_core::env::Env;
use pgvault_core::inspect::Severity;
use pgvault_core::postgres::WalFileName;
use pgvault_core::store::Store;
use pgvault_core::testing::{Fault, FaultyStore, ListOrder, Objects, objects_of};
use pgvault_core::vault::{Cluster, Vault, keyring, snapshot};
use pgvault_core::wal::fetch::{Fetched, contents, fetch};
use pgvault_core::wal::push::{Pushed, push};
use pgvault_core::{Error, ErrorKind, Result};
use ulid::Ulid;

use crate::place::{Copy, from_objects, sample};
use crate::source::{Key, Source, errors, folder, options, report, runtime, store};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    BackupLocal,
    BackupRemote,
    Push,
    Fetch,
    /// Of a segment that is missing between others.
    FetchInGap,
    /// Of the segment after the last.
    FetchBehindEnd,
    List,
    Check,
    Restore,
    KeyAdd,
    KeyRevoke,
    KeyRotate,
    NewDataKey,
}
use Operation as Op;

/// A fault at a call, once or from it on.
#[derive(Debug, Clone, Copy)]
struct Case {
    fault: Fault,
    at: usize,
    onwards: bool,
}

impl Case {
    fn all(calls: usize, ways: &[(Fault, bool)]) -> Vec<Self> {
        let ways = ways.iter().flat_map(|&(fault, onwards)| (1..=calls).map(move |at| Self { fault, at, onwards }));
        ways.collect()
    }
}

const EVERY_WAY: [(Fault, bool); 10] = [
    (Fault::Fail, false),
    (Fault::Fail, true),
    (Fault::Deny, false),
    (Fault::Deny, true),
    (Fault::Hang, true),
    (Fault::Lie, false),
    (Fault::Lie, true),
    (Fault::Tear, false),
    (Fault::Short, false),
    (Fault::Duplicate, true),
];

/// A backup takes a second: the ways that differ for it. `PGVAULT_TEST_FULL=1` takes every way.
const BACKUP_WAYS: [(Fault, bool); 4] = [(Fault::Fail, true), (Fault::Deny, false), (Fault::Lie, false), (Fault::Lie, true)];
const REMOTE_WAYS: [(Fault, bool); 2] = [(Fault::Fail, true), (Fault::Lie, true)];

struct Matrix<'a> {
    source: &'a Source,
    operation: Operation,
    base: Objects,
    /// The key that some operations add.
    new_key: Key,
    /// The slot of the second key.
    old_slot: Ulid,
}

/// What an operation that succeeded promises.
#[derive(Debug)]
enum Done {
    Nothing,
    Backup(Ulid),
    Segment,
    Fetched(Fetched),
}

impl<'a> Matrix<'a> {
    async fn new(source: &'a Source, operation: Operation) -> Self {
        let mut base = match operation {
            Op::Create => Objects::new(),
            Op::Fetch | Op::FetchInGap | Op::FetchBehindEnd | Op::List | Op::Check | Op::Restore => source.grown().await,
            _ => source.base.clone(),
        };
        if operation == Op::FetchInGap {
            let missing = format!("{}.wal", file_name(&source.segments[1]));
            base.retain(|name, _| !name.ends_with(&missing));
        }
        let mut old_slot = Ulid(0);
        if operation != Op::Create {
            let cluster = source.open(store(from_objects(&base).await)).await.unwrap();
            let slots = cluster.vault().slots(cluster.name()).await.unwrap();
            old_slot = slots.iter().find(|slot| slot.describe() == source.other.recipient).unwrap().key_id;
        }
        Self { source, operation, base, new_key: Key::new(), old_slot }
    }

    fn segment(&self) -> &'a PathBuf {
        match self.operation {
            Op::FetchInGap => &self.source.segments[1],
            _ => &self.source.segments[0],
        }
    }

    /// The operation itself, over an opened cluster.
    async fn run(&self, cluster: &Cluster, place: &Path) -> Result<Done> {
        let source = self.source;
        Ok(match self.operation {
            Op::Create | Op::List => unreachable!("they open the vault themselves"),
            Op::BackupLocal | Op::BackupRemote => {
                let options = source.backup_options(self.operation == Op::BackupLocal);
                Done::Backup(backup(cluster, &options).await?.id)
            }
            Op::Push => {
                let _: Pushed = push(cluster, self.segment()).await?;
                Done::Segment
            }
            Op::Fetch | Op::FetchInGap => {
                Done::Fetched(fetch(cluster, wal_file(self.segment()), &place.join("RECOVERYXLOG"), None).await?)
            }
            Op::FetchBehindEnd => {
                let file: WalFileName = "0000000100000000000000F0".parse().unwrap();
                Done::Fetched(fetch(cluster, file, &place.join("RECOVERYXLOG"), None).await?)
            }
            Op::Check => {
                let options =
                    pgvault_core::inspect::CheckOptions { sizes_only: false, progress: Arc::new(pgvault_core::progress::Silent) };
                let report = pgvault_core::inspect::check(cluster, &options).await?;
                assert_eq!(errors(&report), Vec::<String>::new(), "a failing store is not damage");
                Done::Nothing
            }
            Op::Restore => {
                // What an earlier attempt left is completed, never taken for whole.
                let delta = fs::read_dir(place).unwrap().next().is_some();
                let _ = source.restore(cluster, source.first, place, delta).await?;
                Done::Nothing
            }
            Op::KeyAdd => {
                let _ = keyring::add(cluster, &self.new_key.wrap(), "new").await?;
                Done::Nothing
            }
            Op::KeyRevoke => {
                // Running it again after the answer was lost finds nothing to do.
                match keyring::revoke(cluster, self.old_slot).await {
                    Err(error) if error.code() == "key.unknown" => {}
                    other => other?,
                }
                Done::Nothing
            }
            Op::KeyRotate => {
                match keyring::rotate(cluster, self.old_slot, &self.new_key.wrap(), "new").await {
                    Err(error) if error.code() == "key.unknown" => {}
                    other => drop(other?),
                }
                Done::Nothing
            }
            Op::NewDataKey => {
                let _ = keyring::start_epoch(cluster).await?;
                Done::Nothing
            }
        })
    }

    /// Opens what the operation needs and runs it; the fault is armed when its own requests begin.
    async fn attempt(&self, faulty: &FaultyStore, store: Store, case: Option<Case>, place: &Path) -> Result<Done> {
        let arm = || match case {
            Some(case) => faulty.inject(case.fault, case.at, case.onwards),
            None => faulty.heal(),
        };
        match self.operation {
            Op::Create => {
                arm();
                let (vault, _) = Vault::create(store, Env::default()).await?;
                let wraps = [self.source.key.wrap(), self.source.other.wrap()];
                let _ = vault.create_cluster(&self.source.name, &wraps).await?;
                let cluster = vault.unlock(&self.source.name, &self.source.key.unlock()).await?;
                let _ = keyring::record_creation(&cluster).await?;
                Ok(Done::Nothing)
            }
            Op::List => {
                arm();
                let cluster = self.source.open(store).await?;
                assert_eq!(snapshot::list(&cluster).await?.snapshots.len(), 1, "a part of the list is not the list");
                Ok(Done::Nothing)
            }
            _ => {
                let cluster = self.source.open(store).await?;
                arm();
                self.run(&cluster, place).await
            }
        }
    }

    async fn case(&self, case: Case) {
        let why = format!("{:?} with {case:?}", self.operation);
        let memory = from_objects(&self.base).await;
        let faulty = FaultyStore::new(memory.clone()).with_order(ListOrder::Shuffled(case.at as u64));
        let place = folder();
        let timeout = Duration::from_millis(if case.fault == Fault::Hang { 60 } else { 20_000 });
        let over = Store::new(Arc::new(faulty.clone()), "memory:///", options(timeout));
        let attempt = self.attempt(&faulty, over, Some(case), place.path());
        let said = tokio::time::timeout(Duration::from_secs(60), attempt).await;
        let said = said.unwrap_or_else(|_| panic!("{why}: did not end (H19): {:?}", faulty.calls().last()));
        let at = faulty.calls().get(case.at - 1).cloned();
        let why = format!("{why} ({})", at.as_deref().unwrap_or("never reached"));
        self.judge(&said, case, &why);
        faulty.heal();
        let changed = self.nothing_lost(&memory, &why).await;
        if self.operation == Op::Create {
            return self.created_again(&faulty, &memory, &why).await;
        }
        let cluster = self.source.open(store(memory.clone())).await.unwrap_or_else(|e| panic!("{why}: open: {e:?}"));
        if changed {
            self.healthy(&cluster, &said, &why).await;
        }
        self.left_behind(&cluster, &said, place.path(), &why).await;
        if said.is_err() && self.operation != Op::FetchInGap {
            let again = self.attempt(&faulty, store(memory.clone()), None, place.path()).await;
            let again = again.unwrap_or_else(|e| panic!("{why}: a second run fails too: {e:?}"));
            let cluster = self.source.open(store(memory.clone())).await.unwrap();
            let again = Ok(again);
            if self.nothing_lost(&memory, &why).await {
                self.healthy(&cluster, &again, &why).await;
            }
            self.left_behind(&cluster, &again, place.path(), &why).await;
        }
    }

    /// Is the answer the right one for this fault?
    fn judge(&self, said: &Result<Done>, case: Case, why: &str) {
        match said {
            Ok(Done::Fetched(Fetched::EndOfArchive)) => {
                assert_eq!(self.operation, Op::FetchBehindEnd, "{why}: a fault was taken for the end of the archive");
            }
            Ok(_) => assert_ne!(self.operation, Op::FetchInGap, "{why}: a segment out of nothing"),
            Err(error) if self.operation == Op::FetchInGap && error.code() == "wal.gap" => {}
            Err(error) => {
                let survives = case.fault.is_harmless() || (!case.onwards && !matches!(case.fault, Fault::Deny | Fault::Hang));
                assert!(!survives, "{why}: one passing fault is not survived: {error:?}");
                let expected: &[ErrorKind] = match case.fault {
                    Fault::Deny => &[ErrorKind::Failed, ErrorKind::Immutable],
                    _ => &[ErrorKind::Storage],
                };
                assert!(expected.contains(&error.kind()), "{why}: {error:?}");
                assert!(error.hint().is_some() || case.fault == Fault::Deny, "{why}: says not what to do: {error:?}");
            }
        }
    }

    /// Nothing that was there is gone or different; only a revoked slot may be gone. Tells whether anything was added or
    /// removed.
    async fn nothing_lost(&self, memory: &Copy, why: &str) -> bool {
        let now = objects_of(memory).await;
        let slot = format!("keys/{}.json", self.old_slot);
        let may_revoke = matches!(self.operation, Op::KeyRevoke | Op::KeyRotate);
        for (name, bytes) in &self.base {
            match now.get(name) {
                Some(found) => assert!(found == bytes, "{why}: {name} was overwritten"),
                None => assert!(may_revoke && name.ends_with(&slot), "{why}: {name} is gone"),
            }
        }
        now != self.base
    }

    /// Everything that is listed restores; the check finds nothing but what an interruption may leave.
    async fn healthy(&self, cluster: &Cluster, said: &Result<Done>, why: &str) {
        let report = report(cluster).await;
        for finding in &report.findings {
            let problem = finding.problem.as_str();
            let known = match finding.severity {
                // A first backup without an archiver, and a later one: the WAL between them was never asked for.
                Severity::Error => {
                    let backup = matches!(self.operation, Op::BackupLocal | Op::BackupRemote);
                    let gap = problem.starts_with("WAL from ") && problem.contains("is missing: no backup before it");
                    gap && (backup || self.operation == Op::FetchInGap)
                }
                // Nothing archives here, so what lies between two backups is not there.
                Severity::Warning if problem.ends_with("this is as it was set up") => true,
                Severity::Warning => [
                    "has no record in the audit log; the backup was interrupted right after its commit, or the record was deleted",
                    "was sealed by another master key; an `init` that died or came second leaves such a one",
                    "is of another master key and opens nothing; an `init` that died or came second leaves such a one",
                    "was revoked, but is still there and opens the cluster; revoke it again",
                ]
                .contains(&problem),
            };
            assert!(known, "{why}: the check finds {finding:?}");
        }
        let listed: BTreeSet<Ulid> = snapshot::list(cluster).await.unwrap().snapshots.iter().map(|s| s.manifest.id).collect();
        assert!(listed.contains(&self.source.first), "{why}: the first backup is not listed");
        if let Ok(Done::Backup(id)) = said {
            assert!(listed.contains(id), "{why}: {id} was acknowledged and is not listed");
        }
        // The first one's objects were compared byte for byte above.
        for id in listed.iter().filter(|id| **id != self.source.first) {
            self.source.assert_restores(cluster, *id, why).await;
        }
    }

    /// What the operation left outside of snapshots.
    async fn left_behind(&self, cluster: &Cluster, said: &Result<Done>, place: &Path, why: &str) {
        let raw = fs::read(self.segment()).unwrap();
        match self.operation {
            Op::Push => {
                let stored = contents(cluster, wal_file(self.segment())).await.unwrap();
                match (said, stored) {
                    (Ok(_), None) => panic!("{why}: an acknowledged segment is not there"),
                    (_, Some(bytes)) => assert!(bytes == raw, "{why}: the segment differs"),
                    (Err(_), None) => {}
                }
            }
            Op::Fetch | Op::FetchInGap | Op::FetchBehindEnd => {
                let names: Vec<_> = fs::read_dir(place).unwrap().map(|e| e.unwrap().file_name()).collect();
                if matches!(said, Ok(Done::Fetched(Fetched::Written))) {
                    assert!(fs::read(place.join("RECOVERYXLOG")).unwrap() == raw, "{why}: another segment was written");
                } else {
                    assert!(names.is_empty(), "{why}: left {names:?}");
                }
            }
            Op::Restore if said.is_ok() => self.source.assert_restored(place, why),
            Op::Restore => assert!(!place.join("global/pg_control").exists(), "{why}: a broken restore could be started"),
            Op::KeyAdd | Op::KeyRevoke | Op::KeyRotate => {
                let opens = async |key: &Key| {
                    let vault = Vault::open(store_of(cluster), Env::default()).await.unwrap();
                    vault.unlock(cluster.name(), &key.unlock()).await
                };
                assert!(opens(&self.source.key).await.is_ok(), "{why}: the operator is locked out");
                let (old, new) = (opens(&self.source.other).await, opens(&self.new_key).await);
                for refused in [&old, &new] {
                    if let Err(error) = refused {
                        assert_eq!(error.kind(), ErrorKind::WrongKey, "{why}: {error:?}");
                    }
                }
                match (self.operation, said.is_ok()) {
                    (Op::KeyAdd, ok) => assert!(old.is_ok() && (new.is_ok() || !ok), "{why}: {old:?} {new:?}"),
                    (Op::KeyRevoke, ok) => assert!(!ok || old.is_err(), "{why}: revoked, and still opens"),
                    // H11: at every moment the old or the new key opens the vault.
                    (_, false) => assert!(old.is_ok() || new.is_ok(), "{why}: neither key opens the vault"),
                    (_, true) => assert!(new.is_ok() && old.is_err(), "{why}: {old:?} {new:?}"),
                }
            }
            _ => {}
        }
    }

    /// Whatever an interrupted `init` left, the next one makes a vault that every configured key opens.
    async fn created_again(&self, faulty: &FaultyStore, memory: &Arc<Copy>, why: &str) {
        let again = self.attempt(faulty, store(memory.clone()), None, Path::new("/")).await;
        let _ = again.unwrap_or_else(|e| panic!("{why}: a second init fails too: {e:?}"));
        let vault = Vault::open(store(memory.clone()), Env::default()).await.unwrap();
        for key in [&self.source.other, &self.source.key] {
            let cluster = vault.unlock(&self.source.name, &key.unlock()).await.unwrap_or_else(|e| panic!("{why}: {e:?}"));
            let segment = &self.source.segments[0];
            let _ = push(&cluster, segment).await.unwrap();
            let stored = contents(&cluster, wal_file(segment)).await.unwrap().unwrap();
            assert!(stored == fs::read(segment).unwrap(), "{why}");
            assert_eq!(errors(&report(&cluster).await), Vec::<String>::new(), "{why}");
        }
    }
}

fn store_of(cluster: &Cluster) -> Store {
    cluster.store().clone()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn wal_file(path: &Path) -> WalFileName {
    file_name(path).parse().unwrap()
}

async fn run_matrix(source: &Source, operation: Operation, ways: &[(Fault, bool)], parallel: usize) {
    let began = std::time::Instant::now();
    let matrix = Matrix::new(source, operation).await;
    let memory = from_objects(&matrix.base).await;
    let faulty = FaultyStore::new(memory.clone());
    let place = folder();
    let over = store(Arc::new(faulty.clone()));
    let healthy: Result<Done, Error> = matrix.attempt(&faulty, over, None, place.path()).await;
    assert!(healthy.is_ok() || operation == Op::FetchInGap, "{operation:?}: {healthy:?}");
    let calls = faulty.calls().len();
    assert!(calls > 0, "{operation:?} makes no request");
    let full = std::env::var_os("PGVAULT_TEST_FULL").is_some();
    let cases = sample(Case::all(calls, if full { &EVERY_WAY } else { ways }), 24);
    let count = cases.len();
    stream::iter(cases).map(|case| matrix.case(case)).buffer_unordered(parallel).collect::<Vec<()>>().await;
    eprintln!("{operation:?}: {calls} requests, {count} cases in {:.1} s", began.elapsed().as_secs_f64());
}

#[test]
fn a_fault_at_every_request_of_every_operation_loses_nothing() {
    let source = Source::new();
    runtime().block_on(async {
        let quick = [Op::Create, Op::Push, Op::Fetch, Op::FetchInGap, Op::FetchBehindEnd, Op::List, Op::Check, Op::Restore];
        for operation in quick {
            run_matrix(&source, operation, &EVERY_WAY, 4).await;
        }
        // H11.
        for operation in [Op::KeyAdd, Op::KeyRevoke, Op::KeyRotate, Op::NewDataKey] {
            run_matrix(&source, operation, &EVERY_WAY, 4).await;
        }
    });
}

#[test]
fn a_fault_at_every_request_of_a_backup_leaves_no_broken_backup() {
    let source = Source::new();
    runtime().block_on(async {
        run_matrix(&source, Op::BackupLocal, &BACKUP_WAYS, 8).await;
        run_matrix(&source, Op::BackupRemote, &REMOTE_WAYS, 8).await;
    });
}
