//! Whoever looks at a vault behind everybody's back, and knows what must be there.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use pgvault_core::vault::hold::Scope;
use pgvault_core::vault::session::READ_HOURS;
use pgvault_core::vault::{Cluster, layout, snapshot};
use ulid::Ulid;

use crate::place::{Place, SEGMENT, contents, names, wal};
use crate::programs::{COPY, Ledger, Shared};

/// A backup that was seen.
struct Seen {
    stored_at: Timestamp,
    finished_at: Timestamp,
    whole: bool,
    /// Where it begins and ends.
    segment: u64,
    packs: Vec<Ulid>,
}

/// A hold on a stretch of time, since it was seen to be in force.
struct Held {
    since: Timestamp,
    /// The backups that were there then, as they were.
    backups: BTreeSet<(Ulid, Timestamp)>,
    /// Segments of the stretch that were there then or came since.
    segments: BTreeSet<u64>,
}

/// Looks at one vault.
pub(crate) struct Witness {
    pub(crate) cluster: Cluster,
    side: usize,
    window: Option<i64>,
    /// Every backup that was ever seen.
    seen: BTreeMap<Ulid, Seen>,
    ranges: BTreeMap<Ulid, Held>,
    /// The segments when it looked last, and from which on they were needed.
    before: (BTreeSet<u64>, Option<u64>),
    why: String,
}

impl Witness {
    pub(crate) fn new(cluster: Cluster, side: usize, window: Option<i64>, seed: u64) -> Self {
        let why = format!("seed {seed}, {}", if side == COPY { "copy" } else { "source" });
        Self { cluster, side, window, seen: BTreeMap::new(), ranges: BTreeMap::new(), before: Default::default(), why }
    }

    pub(crate) async fn look(&mut self, place: &Place, ledger: &Shared) {
        let there = names(&self.cluster, layout::dir::PACK).await;
        let segments: BTreeSet<u64> = wal(&self.cluster, 1).await.into_iter().collect();
        let present = self.backups(&there, &segments).await;
        let now = place.now();
        self.window(now, &present, &segments);
        let mut ledger = ledger.borrow_mut();
        self.holds(now, &ledger, &present, &segments);
        // Whether or not the manifest is still there.
        let why = &self.why;
        let reading = &mut ledger.sides[self.side].reading;
        reading.retain(|(since, ..)| now.duration_since(*since).as_hours() < READ_HOURS);
        for (since, packs, from) in &*reading {
            let lost: Vec<&Ulid> = packs.difference(&there).collect();
            assert!(lost.is_empty(), "{lost:?} are gone, and have been read since {since} ({why})");
            // What follows may have expired before: it is promised to whom the window or a hold promises it.
            assert!(segments.contains(from), "segment {from} is gone, and somebody restores from it since {since} ({why})");
        }
    }

    /// What is listed has its packs and its WAL.
    async fn backups(&mut self, there: &BTreeSet<Ulid>, segments: &BTreeSet<u64>) -> BTreeSet<Ulid> {
        let why = &self.why;
        let mut present = BTreeSet::new();
        for object in self.cluster.store().list(&self.cluster.path(layout::dir::SNAP)).await.unwrap() {
            let id = layout::id_of(&object.name).unwrap();
            // In a copy a backup may expire and come again.
            if self.seen.get(&id).is_none_or(|seen| seen.stored_at != object.last_modified) {
                let opened = snapshot::open(&self.cluster, id, None).await.unwrap();
                let mut packs: Vec<Ulid> = opened.table_packs().map(|pack| Ulid::from_bytes(pack.id)).collect();
                packs.extend(opened.packs().await.unwrap().iter().map(|pack| Ulid::from_bytes(pack.id)));
                let manifest = &opened.manifest;
                let seen = Seen {
                    stored_at: object.last_modified,
                    finished_at: manifest.finished_at,
                    whole: manifest.bad_pages.is_empty(),
                    segment: manifest.start_lsn.0 / SEGMENT,
                    packs,
                };
                let _ = self.seen.insert(id, seen);
            }
            let seen = &self.seen[&id];
            let lost: Vec<&Ulid> = seen.packs.iter().filter(|pack| !there.contains(pack)).collect();
            assert!(lost.is_empty(), "{id} lost {lost:?} ({why})");
            assert!(segments.contains(&seen.segment), "{id} lost its WAL, segment {} ({why})", seen.segment);
            let _ = present.insert(id);
        }
        present
    }

    /// The newest backup is there, all that the window needs, and the WAL that follows.
    fn window(&mut self, now: Timestamp, present: &BTreeSet<Ulid>, segments: &BTreeSet<u64>) {
        let why = &self.why;
        let newest = |of: &dyn Fn(&Seen) -> bool| {
            self.seen.iter().filter(|(_, seen)| of(seen)).max_by_key(|(id, seen)| (seen.stored_at, **id)).map(|(id, _)| *id)
        };
        let mut needed: BTreeSet<Ulid> = newest(&|_| true).into_iter().collect();
        if let Some(hours) = self.window {
            let begin = now - SignedDuration::from_hours(hours);
            needed.extend(self.seen.iter().filter(|(_, seen)| seen.stored_at > begin).map(|(id, _)| *id));
            needed.extend(newest(&|seen| seen.stored_at <= begin));
            // T29: the newest whole one is needed when the newest is not.
            needed.extend(newest(&|seen| seen.stored_at <= begin && seen.whole));
        }
        let lost: Vec<&Ulid> = needed.difference(present).collect();
        assert!(lost.is_empty(), "the window lost {lost:?} ({why})");
        let from = needed.iter().map(|id| self.seen[id].segment).min();
        // A backup that comes late to a copy comes without the WAL between it and the next, which follows: what was there is looked at.
        let (last, needed_from) = &self.before;
        let since = needed_from.zip(from).map(|(before, now)| before.max(now));
        let lost: Vec<&u64> = last.iter().filter(|n| since.is_some_and(|since| **n >= since) && !segments.contains(n)).collect();
        assert!(lost.is_empty(), "the window lost WAL {lost:?} ({why})");
        if self.side != COPY {
            let stored: BTreeSet<u64> = self.seen.values().map(|seen| seen.segment).collect();
            let lost: Vec<&u64> = stored.iter().filter(|n| from.is_some_and(|from| **n >= from) && !segments.contains(n)).collect();
            assert!(lost.is_empty(), "the window lost WAL {lost:?} ({why})");
        }
        self.before = (segments.clone(), from);
    }

    fn holds(&mut self, now: Timestamp, ledger: &Ledger, present: &BTreeSet<Ulid>, segments: &BTreeSet<u64>) {
        let why = &self.why;
        let holds = &ledger.sides[self.side].holds;
        self.ranges.retain(|hold, _| holds.contains_key(hold));
        for (hold, scope) in holds {
            let (from, to) = match *scope {
                Scope::Backup { backup_id } => {
                    assert!(present.contains(&backup_id), "{backup_id} is gone, and {hold} holds it ({why})");
                    continue;
                }
                Scope::Range { from, to } => (from, to),
            };
            if now < from {
                continue;
            }
            let held = self.ranges.entry(*hold).or_insert_with(|| Held {
                since: now,
                backups: present.iter().map(|id| (*id, self.seen[id].stored_at)).collect(),
                segments: segments.clone(),
            });
            // Of what was gone already nothing is brought back.
            let counts = |id: &Ulid, seen: &Seen| seen.stored_at > held.since || held.backups.contains(&(*id, seen.stored_at));
            let candidates: Vec<(&Ulid, &Seen)> = self.seen.iter().filter(|(id, seen)| counts(id, seen)).collect();
            let newest = |whole: bool| {
                let before = candidates.iter().filter(|(_, seen)| seen.finished_at <= from && (seen.whole || !whole));
                before.max_by_key(|(id, seen)| (seen.finished_at, **id)).copied()
            };
            let inside = candidates.iter().filter(|(_, seen)| seen.finished_at > from && seen.finished_at <= to).copied();
            let needed: Vec<(&Ulid, &Seen)> = newest(false).into_iter().chain(newest(true)).chain(inside).collect();
            let lost: Vec<&Ulid> = needed.iter().map(|(id, _)| *id).filter(|id| !present.contains(id)).collect();
            assert!(lost.is_empty(), "{lost:?} are gone, and {hold} holds {from} to {to} ({why})");
            // Where the server was at the end of the stretch.
            let last = ledger.positions.iter().take_while(|(at, _)| *at <= to).last().map_or(0, |(_, segment)| *segment);
            let first = needed.iter().map(|(_, seen)| seen.segment).min().unwrap_or(u64::MAX);
            let is_needed = |segment: &&u64| (first..=last).contains(*segment);
            let lost: Vec<&u64> = held.segments.iter().filter(is_needed).filter(|n| !segments.contains(n)).collect();
            assert!(lost.is_empty(), "WAL {lost:?} is gone, and {hold} holds {from} to {to} ({why})");
            held.segments.extend(segments.iter().filter(is_needed));
        }
    }

    /// What is listed is what its writer stored, byte for byte.
    pub(crate) async fn compare(&self, ledger: &Shared) {
        for id in names(&self.cluster, layout::dir::SNAP).await {
            for (pack, bytes) in contents(&self.cluster, id).await.unwrap_or_else(|e| panic!("{id}: {e:?} ({})", self.why)) {
                let ledger = ledger.borrow();
                assert_eq!(ledger.packs[&pack].as_bytes(), bytes, "{pack} of {id} ({})", self.why);
            }
        }
    }
}
