//! Segments ahead of replay.
//!
//! PostgreSQL asks for one segment at a time, and waits. Meanwhile [`follow`] fetches those that come next into a
//! [`cache`] on the local disk, several at once, with the vault opened once for all of them. `restore_command` takes them
//! from there without opening the vault at all.
//!
//! Nothing is decided here. Only a whole segment that is one whole object is ever cached: what is assembled from parts,
//! what is missing and what is damaged is left to the vault itself, at the moment the server asks. A prefetcher that
//! fails or dies makes recovery slower, and changes nothing else.

pub mod cache;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::object::{self, WalName};
use crate::postgres::{SegmentName, SegmentSize, WalFileName, WalSegNo};
use crate::vault::{Cluster, Vault};
use crate::{Error, ErrorKind, Result};
use cache::Owner;

/// The most that one server's cache holds.
pub const MAX_BYTES: u64 = 256 << 20;

/// How often the cache is looked at for what the server wants now.
const POLL: Duration = Duration::from_millis(5);

/// The same, when the server has not asked for a while.
const LAZY_POLL: Duration = Duration::from_millis(50);

/// How often server, folder and vault are looked after.
const CARE: Duration = Duration::from_millis(500);

/// The same for the vault.
const VAULT_CARE: Duration = Duration::from_secs(5);

/// How long a segment that was not in the vault is taken for missing.
const ABSENT: Duration = Duration::from_secs(1);

/// Segments that cannot be fetched, one after the other, until prefetching is given up.
const FAILURES: u32 = 3;

/// How to prefetch.
#[derive(Debug, Clone, Copy)]
pub struct PrefetchOptions {
    /// Segments ahead of the one that was asked for; see [`PrefetchOptions::ahead_of`].
    pub ahead: u64,
    /// How many are fetched at the same time.
    pub parallel: usize,
    /// Ends when the server has asked for nothing for so long.
    pub idle: Duration,
}

impl PrefetchOptions {
    /// How many segments of this size may lie in the cache when `wanted` are configured. None when segments are too large to
    /// be one object.
    pub fn ahead_of(wanted: u32, size: SegmentSize) -> u64 {
        if size.bytes() > object::MAX_RAW { 0 } else { u64::from(wanted).min(MAX_BYTES / size.bytes()) }
    }
}

/// Why prefetching ended.
#[derive(Debug)]
pub enum Ended {
    /// Everything that the archive has was handed out.
    EndOfArchive,
    /// The server asked for nothing any more.
    Idle,
    /// The server asked for another timeline.
    Timeline,
    /// The server's `pg_wal` is gone, or its recovery is over.
    Recovered,
    /// The cache was removed.
    CacheGone,
    /// It was told to.
    Stopped,
    /// Another vault lies at the same place.
    OtherVault,
    /// The disk is full.
    DiskFull,
    /// The vault, or the cache, fails.
    Failed(Error),
}

impl Ended {
    /// True when the next one should not be tried at once.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::DiskFull | Self::Failed(_))
    }
}

/// True when the segment behind `segment` is a whole object of the vault. Needs no key.
///
/// # Errors
/// When the store fails.
pub async fn has_next(
    vault: &Vault,
    cluster: &crate::vault::layout::ClusterName,
    segment: SegmentName,
    size: SegmentSize,
) -> Result<bool> {
    let next = neighbour(segment, size, 1)?;
    let name = format!("{}{}", cluster.prefix(), WalName::File(WalFileName::Segment(next)).object());
    match vault.store().head(&name).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn neighbour(segment: SegmentName, size: SegmentSize, by: u64) -> Result<SegmentName> {
    Ok(SegmentName::new(segment.timeline, WalSegNo(number(segment, size)?.saturating_add(by)), size))
}

fn number(segment: SegmentName, size: SegmentSize) -> Result<u64> {
    Ok(segment.segment_number(size).map_err(|e| Error::new(ErrorKind::Failed, "wal.name", e.to_string()))?.0)
}

/// What became of one segment.
enum Got {
    Cached,
    /// There is no such object.
    Absent,
    DiskFull,
    Failed(Error),
}

/// Keeps the cache filled ahead of the segment that was asked for last, beginning behind `from`, until there is a reason to end
/// or `stop` is done. Then the cache is removed.
pub async fn follow(
    cluster: &Cluster,
    owner: Owner,
    from: SegmentName,
    options: PrefetchOptions,
    stop: impl Future<Output = ()>,
) -> Ended {
    let size = owner.cache().server().segment_size;
    let mut owner = Arc::new(owner);
    let ended = match number(from, size) {
        Err(error) => Ended::Failed(error),
        Ok(asked) => {
            let window = Window {
                cluster,
                owner: &owner,
                options,
                from,
                size,
                asked,
                known: BTreeSet::new(),
                absent: None,
                failures: 0,
                running: JoinSet::new(),
                slots: Arc::new(Semaphore::new(options.parallel.max(1))),
                names: BTreeMap::new(),
            };
            tokio::select! {
                ended = window.run() => ended,
                () = stop => Ended::Stopped,
            }
        }
    };
    // What is being decoded cannot be interrupted, and would be written after the cache was removed.
    loop {
        owner = match Arc::try_unwrap(owner) {
            Ok(owner) => break owner.finish(ended.is_failure()),
            Err(shared) => shared,
        };
        tokio::time::sleep(POLL).await;
    }
    ended
}

/// The segments from the one that was asked for up to the last that is wanted.
struct Window<'a> {
    cluster: &'a Cluster,
    owner: &'a Arc<Owner>,
    options: PrefetchOptions,
    /// The first that was asked for; names the timeline.
    from: SegmentName,
    size: SegmentSize,
    asked: u64,
    /// Those that were begun, and maybe failed: none is tried twice.
    known: BTreeSet<u64>,
    /// The first that is not in the vault, and when this was seen.
    absent: Option<(u64, Instant)>,
    failures: u32,
    running: JoinSet<(u64, Got)>,
    slots: Arc<Semaphore>,
    names: BTreeMap<u64, SegmentName>,
}

impl Window<'_> {
    async fn run(mut self) -> Ended {
        let was_told_to_recover = self.owner.cache().server().is_told_to_recover();
        let mut asked_at = Instant::now();
        let mut cared_at = Instant::now();
        let mut vault_seen_at = Instant::now();
        let mut looking: Option<JoinHandle<bool>> = None;
        self.fill();
        loop {
            let poll = if asked_at.elapsed() < Duration::from_secs(1) { POLL } else { LAZY_POLL };
            tokio::select! {
                Some(done) = self.running.join_next() => {
                    // A task that panicked is one that failed; what it left pending is not waited for long.
                    let failed = |e: tokio::task::JoinError| (u64::MAX, Got::Failed(Error::new(ErrorKind::Failed, "task", e.to_string())));
                    if let Some(ended) = self.settle(done.unwrap_or_else(failed)) {
                        return ended;
                    }
                }
                () = tokio::time::sleep(poll) => {}
            }
            match self.owner.cache().asked() {
                Some(segment) if segment.timeline != self.from.timeline => return Ended::Timeline,
                Some(segment) => match number(segment, self.size) {
                    Ok(asked) if asked != self.asked => {
                        self.asked = asked;
                        asked_at = Instant::now();
                        // What was missing a while ago may have come.
                        self.absent = self.absent.filter(|(_, at)| at.elapsed() < ABSENT);
                        self.fill();
                    }
                    _ => {}
                },
                None => {}
            }
            if self.absent.is_some_and(|(absent, _)| absent <= self.asked.saturating_add(1)) && self.running.is_empty() {
                return Ended::EndOfArchive;
            }
            if asked_at.elapsed() >= self.options.idle {
                return Ended::Idle;
            }
            if cared_at.elapsed() >= CARE {
                cared_at = Instant::now();
                if let Some(ended) = self.care(was_told_to_recover) {
                    return ended;
                }
            }
            // T20: names are unique within a vault, not over one that was removed and made again at the same place.
            match looking.take() {
                Some(look) if look.is_finished() => match look.await {
                    Ok(false) => return Ended::OtherVault,
                    _ => vault_seen_at = Instant::now(),
                },
                Some(look) => looking = Some(look),
                None if vault_seen_at.elapsed() >= VAULT_CARE => {
                    let (vault, expected) = (self.cluster.vault().clone(), self.owner.vault());
                    looking = Some(tokio::spawn(async move { is_still(&vault, expected).await }));
                }
                None => {}
            }
        }
    }

    fn care(&self, was_told_to_recover: bool) -> Option<Ended> {
        let server = self.owner.cache().server();
        if !server.is_there() || (was_told_to_recover && !server.is_told_to_recover()) {
            return Some(Ended::Recovered);
        }
        (!self.owner.cache().is_there()).then_some(Ended::CacheGone)
    }

    /// Removes what is behind or too far ahead, and begins what is wanted.
    fn fill(&mut self) {
        let wanted = self.asked..=self.asked.saturating_add(self.options.ahead);
        self.known.retain(|number| wanted.contains(number));
        let (timeline, size) = (self.from.timeline, self.size);
        self.owner.retain(|segment| segment.timeline == timeline && number(segment, size).is_ok_and(|n| wanted.contains(&n)));
        for next in wanted.skip(1) {
            if self.absent.is_some_and(|(absent, _)| absent <= next) {
                return;
            }
            if !self.known.insert(next) {
                continue;
            }
            let segment = SegmentName::new(timeline, WalSegNo(next), size);
            let _ = self.names.insert(next, segment);
            if self.owner.expect(segment).is_err() {
                continue;
            }
            let (cluster, owner, slots) = (self.cluster.clone(), self.owner.clone(), self.slots.clone());
            let _ = self.running.spawn(async move {
                let Ok(_slot) = slots.acquire_owned().await else { return (next, Got::Absent) };
                (next, fetch(cluster, owner, segment).await)
            });
        }
    }

    fn settle(&mut self, (number, got): (u64, Got)) -> Option<Ended> {
        if let Some(segment) = self.names.remove(&number) {
            self.owner.expect_no_more(segment);
        }
        match got {
            Got::Cached => {
                self.failures = 0;
                // The server may have gone past it.
                if !(self.asked..=self.asked.saturating_add(self.options.ahead)).contains(&number) {
                    let asked = self.asked;
                    let (timeline, size, ahead) = (self.from.timeline, self.size, self.options.ahead);
                    self.owner.retain(|s| {
                        s.timeline == timeline
                            && s.segment_number(size).is_ok_and(|n| (asked..=asked.saturating_add(ahead)).contains(&n.0))
                    });
                }
                None
            }
            Got::Absent => {
                let _ = self.known.remove(&number);
                if self.absent.is_none_or(|(absent, _)| number < absent) {
                    self.absent = Some((number, Instant::now()));
                }
                None
            }
            Got::DiskFull => Some(Ended::DiskFull),
            Got::Failed(error) => {
                self.failures += 1;
                tracing::debug!(number, %error, "a segment cannot be prefetched");
                (self.failures >= FAILURES).then_some(Ended::Failed(error))
            }
        }
    }
}

/// False when the store says that another vault lies there now, or none; trouble says nothing.
async fn is_still(vault: &Vault, expected: ulid::Ulid) -> bool {
    match Vault::open(vault.store().clone(), vault.env().clone()).await {
        Ok(found) => found.document().vault_id == expected,
        Err(error) => error.is_transient(),
    }
}

async fn fetch(cluster: Cluster, owner: Arc<Owner>, segment: SegmentName) -> Got {
    let name = WalName::File(WalFileName::Segment(segment));
    let sealed = match cluster.store().get(&cluster.path(&name.object())).await {
        Ok(sealed) => sealed,
        Err(error) if error.kind() == ErrorKind::NotFound => return Got::Absent,
        Err(error) => return Got::Failed(error),
    };
    let stored = tokio::task::spawn_blocking(move || {
        let (_, bytes) = object::decode(&cluster, name, &sealed)?;
        drop(sealed);
        let _ = object::check_segment(&cluster, segment, &bytes)?;
        Ok(owner.put(segment, &bytes))
    });
    match stored.await {
        Ok(Ok(Ok(()))) => Got::Cached,
        Ok(Ok(Err(error))) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Got::DiskFull,
        Ok(Ok(Err(error))) => {
            Got::Failed(Error::new(ErrorKind::Failed, "io", format!("cache {segment}: {error}")).with_source(error))
        }
        Ok(Err(error)) => Got::Failed(error),
        Err(error) => Got::Failed(Error::new(ErrorKind::Failed, "task", error.to_string())),
    }
}
