//! What happened, in one order: every step of everybody, and from which to which step each file was whole.
//!
//! Only one participant acts at a time, so a counter is a total order. A step begins when its number is given out and lasts until
//! somebody begins the next one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::series::Series;

/// The number of a step; 0 is before the first.
pub type Step = u64;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub step: Step,
    /// Whose it was: `worker 1`, `gc`, or what a participant is called.
    pub who: String,
    /// What was about to be done.
    pub what: String,
}

/// From when to when a file was whole and right on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// The step that completed it.
    pub from: Step,
    /// The step that removed or damaged it; none while it is there.
    pub to: Option<Step>,
}

#[derive(Debug)]
struct Inner {
    series: Series,
    last: Step,
    log: Vec<Entry>,
    /// By path, because several names can lead to one file.
    files: BTreeMap<String, Vec<Interval>>,
    /// Of files outside the sha1 scheme: what is right.
    expected: BTreeMap<String, String>,
}

/// See the [module documentation](self). Clones are the same ledger.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Mutex<Inner>>);

impl Inner {
    fn intervals(&self, store_fname: &str) -> &[Interval] {
        self.files.get(&self.series.path_of(store_fname)).map(Vec::as_slice).unwrap_or_default()
    }
}

impl Ledger {
    /// An empty ledger; the series says which names lead to the same file.
    pub fn new(series: Series) -> Self {
        let (log, files, expected) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self(Arc::new(Mutex::new(Inner { series, last: 0, log, files, expected })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a step.
    pub fn begin(&self, who: &str, what: &str) -> Step {
        let mut inner = self.inner();
        inner.last += 1;
        let step = inner.last;
        inner.log.push(Entry { step, who: who.to_owned(), what: what.to_owned() });
        step
    }

    /// The step that goes on now.
    pub fn now(&self) -> Step {
        self.inner().last
    }

    /// All steps so far.
    pub fn log(&self) -> Vec<Entry> {
        self.inner().log.clone()
    }

    /// How often somebody began a step of this kind.
    pub fn count(&self, what: &str) -> usize {
        self.inner().log.iter().filter(|entry| entry.what == what).count()
    }

    /// When the file of this `store_fname` was whole.
    pub fn intervals(&self, store_fname: &str) -> Vec<Interval> {
        self.inner().intervals(store_fname).to_vec()
    }

    /// The paths of all files that were ever whole.
    pub fn names(&self) -> Vec<String> {
        self.inner().files.keys().cloned().collect()
    }

    /// True when the file was whole and right all the time from the beginning of step `from` to the end of step `to`.
    pub fn was_on_disk(&self, store_fname: &str, from: Step, to: Step) -> bool {
        let inner = self.inner();
        // A file that the step `from` itself completes was not there when it began.
        let whole = |interval: &Interval| interval.from < from.max(1) && interval.to.is_none_or(|end| end > to);
        inner.intervals(store_fname).iter().any(whole)
    }

    /// True when the file was whole and right at some moment between the beginning of step `from` and the end of step `to`.
    pub fn was_ever_on_disk(&self, store_fname: &str, from: Step, to: Step) -> bool {
        let inner = self.inner();
        // The step that removes a file begins with the file in its place.
        let there = |interval: &Interval| interval.from <= to && interval.to.is_none_or(|end| end >= from);
        inner.intervals(store_fname).iter().any(there)
    }

    /// True when the file is whole and right now.
    pub fn is_on_disk(&self, store_fname: &str) -> bool {
        self.inner().intervals(store_fname).last().is_some_and(|last| last.to.is_none())
    }

    /// Says what is right for a name that is not its content's SHA-1.
    pub(crate) fn expect(&self, store_fname: &str, sha1: &str) {
        let mut inner = self.inner();
        let path = inner.series.path_of(store_fname);
        let _ = inner.expected.insert(path, sha1.to_owned());
    }

    /// Takes down what the file is like after a change: its SHA-1, or nothing when it is gone.
    pub(crate) fn observe(&self, store_fname: &str, sha1: Option<&str>) {
        let mut inner = self.inner();
        let step = inner.last;
        let path = inner.series.path_of(store_fname);
        let wanted = inner.expected.get(&path).map(String::as_str).or_else(|| path.rsplit('/').next()).unwrap_or_default();
        let right = sha1.is_some_and(|sha1| sha1 == wanted);
        let intervals = inner.files.entry(path).or_default();
        match intervals.last_mut().filter(|last| last.to.is_none()) {
            None if right => intervals.push(Interval { from: step, to: None }),
            Some(open) if !right => open.to = Some(step),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_from_the_step_that_completed_it_until_the_step_that_removed_it() {
        let ledger = Ledger::new(Series::V18);
        let name = "11/11f6ad8ec52a2984abaafd7c3b516503785c2072";
        let sha1 = "11f6ad8ec52a2984abaafd7c3b516503785c2072";
        for step in 1..=9 {
            assert_eq!(ledger.begin("test", "step"), step);
            match step {
                2 => ledger.observe(name, Some("0000")),
                3 => ledger.observe(name, Some(sha1)),
                6 => ledger.observe(name, None),
                _ => {}
            }
        }
        assert_eq!(ledger.intervals(name), [Interval { from: 3, to: Some(6) }]);
        assert!(ledger.was_on_disk(name, 4, 5));
        assert!(!ledger.was_on_disk(name, 3, 5) && !ledger.was_on_disk(name, 4, 6));
        assert!(ledger.was_ever_on_disk(name, 1, 3) && ledger.was_ever_on_disk(name, 6, 9));
        assert!(!ledger.was_ever_on_disk(name, 1, 2) && !ledger.was_ever_on_disk(name, 7, 9));
        assert!(!ledger.is_on_disk(name));
    }

    #[test]
    fn a_name_outside_the_scheme_is_right_as_it_was_planted() {
        let ledger = Ledger::new(Series::V18);
        ledger.expect("import/a.pdf", "abc");
        ledger.begin("test", "write");
        ledger.observe("import/a.pdf", Some("abc"));
        // The collection of garbage finds the path, and not the name, on the checklist.
        assert!(ledger.is_on_disk("import/a.pdf") && ledger.is_on_disk("import/apdf"));
    }
}
