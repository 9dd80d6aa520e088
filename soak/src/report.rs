//! One line for each event, and the summary.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use crate::events::Event;
use crate::ledger::{Ledger, Missing};
use crate::stream::Sample;

/// Growth that is none: a stream that had to hold its four segments once keeps room for them.
const SLACK: u64 = 32 << 20;

/// What a stream may take at any time: four segments, raw and sealed, and the open one.
const MOST: u64 = 384 << 20;

/// How long must have been looked for growth to show.
const LONG: Duration = Duration::from_secs(480);

/// What was seen.
#[derive(Debug)]
pub(crate) struct Report {
    began: Instant,
    events: BTreeMap<Event, u32>,
    violations: Vec<String>,
    comparisons: u32,
    lost: usize,
    /// The oldest that was lost, beyond the outage that it happened in.
    oldest: Duration,
}

impl Report {
    pub(crate) fn new() -> Self {
        let (events, violations) = (BTreeMap::new(), Vec::new());
        Self { began: Instant::now(), events, violations, comparisons: 0, lost: 0, oldest: Duration::ZERO }
    }

    pub(crate) fn say(&self, text: fmt::Arguments<'_>) {
        println!("{:8.1}  {text}", self.began.elapsed().as_secs_f64());
    }

    pub(crate) fn event(&mut self, event: Event, text: fmt::Arguments<'_>) {
        *self.events.entry(event).or_default() += 1;
        self.say(text);
    }

    pub(crate) fn violation(&mut self, text: &str) {
        self.say(format_args!("VIOLATION: {text}"));
        self.violations.push(text.lines().next().unwrap_or_default().to_owned());
    }

    pub(crate) fn detail(what: &str, text: &str) {
        println!("--- {what} ends with\n{text}\n---");
    }

    pub(crate) fn compared(&mut self, missing: &Missing, outage: Duration) {
        self.comparisons += 1;
        self.lost += missing.allowed;
        self.oldest = self.oldest.max(missing.oldest.saturating_sub(outage));
    }

    pub(crate) fn held(&self) -> bool {
        self.violations.is_empty()
    }

    pub(crate) fn finish(&mut self, ledger: &Ledger, samples: &[Sample]) {
        println!("\nsummary");
        self.memory(samples);
        let events: Vec<String> = self.events.iter().map(|(event, count)| format!("{event:?} {count}")).collect();
        println!("  events: {}", events.join(", "));
        let (synchronous, asynchronous) = ledger.counts();
        println!("  acknowledged commits: {synchronous} that waited for the vault, {asynchronous} that did not");
        println!(
            "  {} comparisons: {} commits that had not waited were lost with their host, the oldest {:.1} s before it, outages aside",
            self.comparisons,
            self.lost,
            self.oldest.as_secs_f64()
        );
        for violation in &self.violations {
            println!("  VIOLATION: {violation}");
        }
        println!("  {}", if self.held() { "everything held" } else { "NOT EVERYTHING HELD" });
    }

    fn memory(&mut self, samples: &[Sample]) {
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return };
        let third = last.at.duration_since(first.at) / 3;
        let early: Vec<&Sample> = samples.iter().filter(|sample| sample.at <= first.at + third).collect();
        let late: Vec<&Sample> = samples.iter().filter(|sample| sample.at + third >= last.at).collect();
        for (name, part) in [("first", &early), ("last", &late)] {
            let (low, middle, high) = spread(part, |sample| sample.rss);
            let (_, files, most) = spread(part, |sample| sample.descriptors);
            println!(
                "  the stream in the {name} third: memory {} / {} / {} MiB (min / median / max), {files} descriptors, at most {most}",
                low >> 20,
                middle >> 20,
                high >> 20
            );
        }
        let most = samples.iter().map(|sample| sample.rss).max().unwrap_or(0);
        if most > MOST {
            self.violation(&format!("the stream took {} MiB of memory", most >> 20));
        }
        if last.at.duration_since(first.at) >= LONG {
            self.judge("the stream's memory", &early, &late);
        }
        let mut lives: BTreeMap<i32, Vec<&Sample>> = BTreeMap::new();
        for sample in samples {
            lives.entry(sample.pid).or_default().push(sample);
        }
        for life in lives.values() {
            let (Some(first), Some(last)) = (life.first(), life.last()) else { continue };
            if last.at.duration_since(first.at) >= LONG {
                let third = life.len() / 3;
                self.judge("the memory of one stream", &life[..third], &life[life.len() - third..]);
            }
        }
    }

    fn judge(&mut self, what: &str, early: &[&Sample], late: &[&Sample]) {
        let ((_, early, _), (_, late, _)) = (spread(early, |sample| sample.rss), spread(late, |sample| sample.rss));
        if late > early + early / 4 + SLACK {
            self.violation(&format!(
                "{what} grew from {} to {} MiB, in medians of the first and the last third",
                early >> 20,
                late >> 20
            ));
        }
    }
}

/// Smallest, middle and largest.
fn spread(samples: &[&Sample], value: impl Fn(&Sample) -> u64) -> (u64, u64, u64) {
    let mut values: Vec<u64> = samples.iter().map(|sample| value(sample)).collect();
    values.sort_unstable();
    let at = |index: usize| values.get(index).copied().unwrap_or(0);
    (at(0), at(values.len() / 2), at(values.len().saturating_sub(1)))
}
