//! Single requests over a store that follows a schedule, against a model of what a store promises.
//!
//! The clock is stopped: what waits for a timeout waits no time, so that a store that hangs costs nothing, and a thousand hours
//! of retries are a second.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use object_store::memory::InMemory;
use pgvault_core::store::{Put, Store, StoreOptions};
use pgvault_core::testing::{Dice, Fault, FaultyStore, ListOrder, Schedule, objects_of};
use pgvault_core::{Error, ErrorKind};

use crate::seeds;

/// What is known of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    /// It is there, with these bytes.
    There(Bytes),
    /// An attempt at one of these has failed: any of them may be there, or none.
    Perhaps(BTreeSet<Bytes>),
    /// It was deleted, or is there with these bytes: the deletion failed.
    Deleting(BTreeSet<Bytes>),
}

struct Model {
    known: BTreeMap<String, Known>,
    dice: Dice,
    store: Store,
    why: String,
}

const NAMES: [&str; 12] = ["a/1", "a/2", "a/3", "a/b/1", "a/b/2", "ab/1", "b/1", "b/2", "c/d/e/1", "c/d/e/2", "c/d/f", "z"];
const PREFIXES: [&str; 6] = ["a/", "a/b/", "b/", "c/", "c/d/e/", "none/"];

impl Model {
    fn name(&mut self) -> String {
        (*self.dice.pick(&NAMES).unwrap()).to_owned()
    }

    /// The error is one that this trouble may cause, and says what to do.
    fn judge(&self, doing: &str, error: &Error) {
        let allowed = match error.kind() {
            ErrorKind::Storage => true,
            // Only of a refusal.
            ErrorKind::Failed => error.code() == "store.denied",
            ErrorKind::Immutable => error.code() == "store.delete_refused",
            _ => false,
        };
        assert!(allowed && (error.hint().is_some() || error.code() == "store.conflict"), "{doing}: {error:?} ({})", self.why);
    }

    /// What may be read under a name; `None` for nothing.
    fn may_be(&self, name: &str) -> Vec<Option<Bytes>> {
        match self.known.get(name) {
            None => vec![None],
            Some(Known::There(bytes)) => vec![Some(bytes.clone())],
            Some(Known::Perhaps(all) | Known::Deleting(all)) => all.iter().cloned().map(Some).chain([None]).collect(),
        }
    }

    fn expect(&self, doing: &str, name: &str, found: Option<&Bytes>) {
        assert!(self.may_be(name).iter().any(|bytes| bytes.as_ref() == found), "{doing} {name}: {found:?} ({})", self.why);
    }

    async fn step(&mut self) {
        let name = self.name();
        match self.dice.below(10) {
            0..=2 => self.put(&name).await,
            3 => match self.store.get_if_exists(&name).await {
                Ok(found) => self.expect("get", &name, found.as_ref()),
                Err(error) => self.judge("get", &error),
            },
            4 => self.range(&name).await,
            5 => match self.store.head(&name).await {
                Ok(info) => {
                    let right = self.may_be(&name).iter().flatten().any(|bytes| bytes.len() as u64 == info.size);
                    assert!(right, "head {name}: {info:?} ({})", self.why);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => self.expect("head", &name, None),
                Err(error) => self.judge("head", &error),
            },
            6 => self.list().await,
            7 => self.levels().await,
            8 => self.race(&name).await,
            _ => self.delete(&name).await,
        }
    }

    async fn put(&mut self, name: &str) {
        let bytes = Bytes::from(format!("{name} {}", "x".repeat(self.dice.below(3) * 20)));
        match self.store.put_new(name, bytes.clone()).await {
            Ok(Put::Created) => {
                // What was there for sure stays.
                let before = self.may_be(name);
                assert!(before.iter().any(|b| b.is_none() || b.as_ref() == Some(&bytes)), "created over {before:?} ({})", self.why);
                let _ = self.known.insert(name.to_owned(), Known::There(bytes));
            }
            Ok(Put::Same) => {
                // Carried out twice, a new one is found to be there already.
                let _ = self.known.insert(name.to_owned(), Known::There(bytes));
            }
            Ok(Put::Different(kept)) => {
                assert!(kept != bytes);
                self.expect("put over", name, Some(&kept));
                let _ = self.known.insert(name.to_owned(), Known::There(kept));
            }
            Err(error) => {
                self.judge("put", &error);
                let mut may: BTreeSet<Bytes> = self.may_be(name).into_iter().flatten().collect();
                if !matches!(self.known.get(name), Some(Known::There(_))) {
                    let _ = may.insert(bytes);
                    let _ = self.known.insert(name.to_owned(), Known::Perhaps(may));
                }
            }
        }
    }

    /// Of several writers at once one wins, as far as it can be known, and all who know anything agree.
    async fn race(&mut self, name: &str) {
        let bodies: Vec<Bytes> = (0..3).map(|n| Bytes::from(format!("{name} of racer {n}, {}", self.dice.roll()))).collect();
        let puts = join_all(bodies.iter().map(|bytes| self.store.put_new(name, bytes.clone()))).await;
        let mut kept: BTreeSet<Bytes> = BTreeSet::new();
        for (bytes, put) in bodies.iter().zip(puts) {
            match put {
                Ok(Put::Created | Put::Same) => drop(kept.insert(bytes.clone())),
                Ok(Put::Different(other)) => drop(kept.insert(other)),
                Err(error) => self.judge("race", &error),
            }
        }
        assert!(kept.len() <= 1, "{name}: {kept:?} ({})", self.why);
        let before = self.may_be(name);
        match kept.pop_first() {
            Some(bytes) => {
                let known = before.contains(&None) && bodies.contains(&bytes) || before.contains(&Some(bytes.clone()));
                assert!(known, "{name}: {bytes:?} ({})", self.why);
                let _ = self.known.insert(name.to_owned(), Known::There(bytes));
            }
            None if before.contains(&None) => {
                let all = before.into_iter().flatten().chain(bodies).collect();
                let _ = self.known.insert(name.to_owned(), Known::Perhaps(all));
            }
            None => {}
        }
    }

    async fn range(&mut self, name: &str) {
        let (from, len) = (self.dice.below(8) as u64, 1 + self.dice.below(20) as u64);
        let wanted = |bytes: &Bytes| (from + len <= bytes.len() as u64).then(|| slice(bytes, from, len));
        let may = self.may_be(name);
        match self.store.get_range(name, from..from + len).await {
            Ok(found) => {
                assert!(
                    may.iter().flatten().any(|bytes| wanted(bytes).as_ref() == Some(&found)),
                    "range of {name}: {found:?} ({})",
                    self.why
                );
            }
            Err(error) if error.kind() == ErrorKind::NotFound => self.expect("range", name, None),
            // Only where the object really ends before.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                assert!(may.iter().flatten().any(|bytes| wanted(bytes).is_none()), "range of {name}: {error:?} ({})", self.why);
            }
            Err(error) => self.judge("range", &error),
        }
    }

    async fn list(&mut self) {
        let prefix = *self.dice.pick(&PREFIXES).unwrap();
        let after = self.dice.permille(400).then(|| self.name());
        match self.store.list_after(prefix, after.as_deref()).await {
            Ok(listed) => {
                let inside = |name: &str| name.starts_with(prefix) && after.as_deref().is_none_or(|after| name > after);
                let found: BTreeMap<&str, u64> = listed.iter().map(|object| (object.name.as_str(), object.size)).collect();
                assert!(
                    listed.iter().map(|object| &object.name).is_sorted() && found.len() == listed.len(),
                    "{listed:?} ({})",
                    self.why
                );
                for name in NAMES {
                    let may: Vec<Option<u64>> =
                        self.may_be(name).iter().map(|bytes| bytes.as_ref().map(|b| b.len() as u64)).collect();
                    let seen = found.get(name).copied();
                    let right = if inside(name) { may.contains(&seen) } else { seen.is_none() };
                    assert!(right, "list {prefix} after {after:?}: {name} is {seen:?}, {may:?} ({})", self.why);
                }
            }
            Err(error) => self.judge("list", &error),
        }
    }

    async fn levels(&mut self) {
        let prefix = *self.dice.pick(&["a/", "c/", "c/d/", "none/"]).unwrap();
        match self.store.list_directories(prefix).await {
            Ok(found) => {
                for name in NAMES {
                    let level = name.strip_prefix(prefix).and_then(|rest| rest.split_once('/')).map(|(level, _)| level.to_owned());
                    if let (Some(level), Some(Known::There(_))) = (level, self.known.get(name)) {
                        assert!(found.contains(&level), "{level} of {name} is missing in {found:?} ({})", self.why);
                    }
                }
            }
            Err(error) => self.judge("levels", &error),
        }
    }

    async fn delete(&mut self, name: &str) {
        match self.store.delete(name).await {
            Ok(()) => drop(self.known.remove(name)),
            Err(error) => {
                self.judge("delete", &error);
                let may: BTreeSet<Bytes> = self.may_be(name).into_iter().flatten().collect();
                if !may.is_empty() {
                    let _ = self.known.insert(name.to_owned(), Known::Deleting(may));
                }
            }
        }
    }
}

fn slice(bytes: &Bytes, from: u64, len: u64) -> Bytes {
    let from = usize::try_from(from).unwrap();
    bytes.slice(from..from + usize::try_from(len).unwrap())
}

/// A hundred requests under one schedule, and what is there when the store is healthy again. Gives how many faults there were.
async fn run(seed: u64) -> usize {
    let schedule = Schedule::new(seed);
    let memory = Arc::new(InMemory::new());
    let faulty = FaultyStore::new(memory.clone()).with_order(ListOrder::Shuffled(seed)).with_slowness(Duration::from_secs(7));
    let options = StoreOptions { attempts: 4, request_timeout: Duration::from_secs(20), ..StoreOptions::default() };
    let store = Store::new(Arc::new(faulty.clone()), "memory:///", options);
    let why = schedule.to_string();
    let mut model = Model { known: BTreeMap::new(), dice: Dice::new(!seed), store, why: why.clone() };
    faulty.follow(schedule);
    for _ in 0..100 {
        let began = tokio::time::Instant::now();
        model.step().await;
        // H19: each attempt and each look have their time.
        assert!(began.elapsed() < Duration::from_secs(8 * 20 + 60), "{:?} ({why})", began.elapsed());
    }
    let faults = faulty.happened().values().sum();
    faulty.heal();
    let left = objects_of(&*memory).await;
    for name in NAMES {
        model.expect("left", name, left.get(name));
    }
    assert!(left.keys().all(|name| NAMES.contains(&name.as_str())), "{left:?} ({why})");
    faults
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// T1, T24, H19: whatever happens, answers are right or errors are; nothing acknowledged is lost, nothing ends without an end.
#[test]
fn t1_no_history_of_faults_makes_a_store_lie() {
    let (mut faults, mut quiet, seeds) = (0, 0, seeds(1000));
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let happened = paused().block_on(run(seed));
        faults += happened;
        quiet += usize::from(happened == 0);
    }
    eprintln!("{count} schedules, {faults} faults, {quiet} schedules without any");
    assert!(count < 100 || faults as u64 > count * 5, "{faults} faults in {count} schedules");
}

/// T1: each fault, for each kind of request, once and for good: never "not found", never an empty listing.
#[test]
fn t1_no_fault_is_ever_taken_for_absence() {
    paused().block_on(async {
        for fault in Fault::ALL {
            for onwards in [false, true] {
                let memory = Arc::new(InMemory::new());
                let faulty = FaultyStore::new(memory.clone());
                let store = Store::new(Arc::new(faulty.clone()), "memory:///", StoreOptions::default());
                store.put_once("a/b/x", Bytes::from_static(b"xyz")).await.unwrap();
                for what in 0..7 {
                    faulty.inject(fault, 1, onwards);
                    let (found, error) = match what {
                        0 => told(store.get("a/b/x").await.map(|bytes| bytes == "xyz")),
                        1 => told(store.get_if_exists("a/b/x").await.map(|bytes| bytes.is_some_and(|bytes| bytes == "xyz"))),
                        2 => told(store.get_range("a/b/x", 1..3).await.map(|bytes| bytes == "yz")),
                        3 => told(store.head("a/b/x").await.map(|info| info.size == 3)),
                        4 => told(store.list("a/").await.map(|listed| listed.len() == 1)),
                        5 => told(store.list_after("a/", Some("a/a")).await.map(|listed| listed.len() == 1)),
                        _ => told(store.list_directories("a/").await.map(|levels| levels == ["b"])),
                    };
                    let why = format!("{fault:?}, onwards {onwards}, question {what}: {:?}", faulty.calls());
                    match error {
                        None => assert!(found, "{why}: a wrong answer"),
                        Some(error) => {
                            assert!(onwards || fault == Fault::Deny, "{why}: one passing fault is not survived: {error:?}");
                            let kind = if fault == Fault::Deny { ErrorKind::Failed } else { ErrorKind::Storage };
                            assert_eq!(error.kind(), kind, "{why}: {error:?}");
                        }
                    }
                    // T24: a refusal is not asked for again; anything else so often, and once more for the size.
                    let most = if fault == Fault::Deny { 1 } else { StoreOptions::default().attempts as usize + 1 };
                    assert!(faulty.calls().len() <= most, "{why}");
                }
            }
        }
    });
}

fn told(said: pgvault_core::Result<bool>) -> (bool, Option<Error>) {
    match said {
        Ok(right) => (right, None),
        Err(error) => (false, Some(error)),
    }
}
