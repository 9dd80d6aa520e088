//! Faults in an order that a seed gives: what no list of cases thinks of, and what can be run again.
//!
//! A test that runs an operation once for every place a fault can be in sees one fault at a time. Real stores fail in bursts,
//! only for some requests, or from some moment on. A [`Schedule`] makes such a history out of a number. The number is all
//! that a failing test has to print:
//!
//! ```
//! # use pgvault_core::testing::Schedule;
//! let (mut first, mut again) = (Schedule::new(4711), Schedule::new(4711));
//! println!("{first}");
//! for _ in 0..1000 {
//!     assert_eq!(first.next("put"), again.next("put"));
//! }
//! ```
//!
//! With several requests in flight, which of them is the n-th is up to the scheduler of the tasks; what happens to the n-th is not.

use std::fmt;

use super::Fault;

/// Numbers in an order that a seed gives (SplitMix64): the same on every machine and in every version.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `sides - 1`; 0 when there are no sides.
    pub fn below(&mut self, sides: usize) -> usize {
        // Far fewer sides than numbers: the bias does not matter to a test.
        let sides = u64::try_from(sides).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.roll() % sides).unwrap_or(0)
    }

    /// True in so many of a thousand cases.
    pub fn permille(&mut self, part: usize) -> bool {
        self.below(1000) < part
    }

    /// One of several; `None` when there are none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len()))
    }
}

/// Which faults happen to which calls; see the [module documentation](self).
#[derive(Debug, Clone)]
pub struct Schedule {
    seed: u64,
    dice: Dice,
    /// Calls of a thousand that begin a burst of faults.
    permille: usize,
    kinds: Vec<Fault>,
    /// Longest burst.
    burst: usize,
    /// Only calls of this kind.
    only: Option<&'static str>,
    /// From this call on every one fails in this way.
    end: Option<(usize, Fault)>,
    running: Option<(Fault, usize)>,
    calls: usize,
}

/// What a schedule may be limited to.
const VERBS: [&str; 4] = ["put", "get", "head", "list"];

impl Schedule {
    /// The schedule of a seed.
    pub fn new(seed: u64) -> Self {
        Self::of(seed, &Fault::ALL)
    }

    /// The schedule of a seed that draws from these faults only.
    pub fn of(seed: u64, from: &[Fault]) -> Self {
        let mut dice = Dice::new(seed);
        // From a rare fault to one in three calls: with few attempts, hardly anything gets through more.
        let permille = [5, 20, 60, 120, 330].get(dice.below(5)).copied().unwrap_or(5);
        let mut kinds: Vec<Fault> = from.iter().copied().filter(|_| dice.permille(350)).collect();
        if kinds.is_empty() {
            kinds.extend(dice.pick(from).copied());
        }
        let burst = 1 + dice.below(6);
        let only = if dice.permille(250) { dice.pick(&VERBS).copied() } else { None };
        let end = if dice.permille(250) { Some((1 + dice.below(120), dice.pick(&kinds).copied())) } else { None };
        let end = end.and_then(|(at, kind)| Some((at, kind?)));
        Self { seed, dice, permille, kinds, burst, only, end, running: None, calls: 0 }
    }

    /// The number that gives the same schedule again.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What happens to the next call, whose kind is the first word of what [`FaultyStore::calls`](super::FaultyStore::calls) notes.
    pub fn next(&mut self, verb: &str) -> Option<Fault> {
        self.calls += 1;
        // The same number of rolls for every call, so that one more request does not give another history.
        let (begins, kind, length) = (self.dice.permille(self.permille), self.dice.roll(), self.dice.below(self.burst));
        if self.only.is_some_and(|only| only != verb) {
            return None;
        }
        if let Some((_, fault)) = self.end.filter(|(at, _)| self.calls >= *at) {
            return Some(fault);
        }
        if let Some((fault, left)) = self.running.take() {
            self.running = (left > 1).then(|| (fault, left - 1));
            return Some(fault);
        }
        let fault = begins.then(|| self.kinds.get(usize::try_from(kind % self.kinds.len().max(1) as u64).unwrap_or(0))).flatten();
        self.running = fault.map(|fault| (*fault, length)).filter(|(_, left)| *left > 0);
        fault.copied()
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} of 1000 {} calls begin a burst of up to {} of {:?}",
            self.seed,
            self.permille,
            self.only.unwrap_or("of all"),
            self.burst,
            self.kinds
        )?;
        match self.end {
            Some((at, fault)) => write!(f, "; from call {at} on each is {fault:?}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn faults(seed: u64) -> Vec<Option<Fault>> {
        let mut schedule = Schedule::new(seed);
        (0..400).map(|call| schedule.next(VERBS[call % VERBS.len()])).collect()
    }

    #[test]
    fn a_seed_gives_the_same_faults_again_and_another_gives_others() {
        let all: BTreeSet<Vec<Option<Fault>>> = (0..200).map(faults).collect();
        assert!(all.len() > 180, "{}", all.len());
        for seed in 0..200 {
            assert_eq!(faults(seed), faults(seed));
            assert_eq!(Schedule::new(seed).to_string(), Schedule::new(seed).to_string());
        }
        // The numbers of the reference implementation for seed 1234567.
        let mut dice = Dice::new(1_234_567);
        assert_eq!([dice.roll(), dice.roll()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[test]
    fn every_fault_occurs_alone_in_bursts_and_for_good() {
        let (mut seen, mut bursts, mut endless, mut quiet) = (BTreeSet::new(), 0, 0, 0);
        for seed in 0..500 {
            let faults = faults(seed);
            seen.extend(faults.iter().flatten().map(|fault| format!("{fault:?}")));
            bursts += usize::from(faults.windows(2).any(|pair| pair[0].is_some() && pair[0] == pair[1]));
            endless += usize::from(faults[200..].iter().all(Option::is_some));
            quiet += usize::from(faults.iter().flatten().count() == 0);
        }
        assert_eq!(seen.len(), Fault::ALL.len(), "{seen:?}");
        assert!(bursts > 250 && endless > 30 && quiet < 250, "{bursts} {endless} {quiet}");
    }

    #[test]
    fn a_schedule_draws_only_from_what_it_may() {
        for seed in 0..100 {
            let mut schedule = Schedule::of(seed, &[Fault::Fail, Fault::Lie]);
            assert!((0..300).filter_map(|_| schedule.next("get")).all(|fault| matches!(fault, Fault::Fail | Fault::Lie)));
        }
    }
}
