//! T30 for WAL that is not in whole segments: parts, as a stream leaves them when it stops, and `.partial` files, as a
//! promotion archives them.
//!
//! A vault may hold the same bytes twice. What recovery would read must be refused when it was changed; what it passes over
//! is damage of the store, which the check names, and hurts nobody.

use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use pgvault_core::ErrorKind;
use pgvault_core::inspect::Severity;
use pgvault_core::postgres::{SegmentName, WalFileName, scan_segment};
use pgvault_core::testing::{Objects, objects_of};
use pgvault_core::vault::{Cluster, layout, snapshot};
use pgvault_core::wal::fetch::contents;
use pgvault_core::wal::object::{self, WalName};
use pgvault_core::wal::push::push;

use crate::place::{from_objects, sample};
use crate::source::{Source, errors, folder, report, runtime, store};
use crate::tamper::{assert_reported, changes};

/// What an object is to the first backup and to what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// One of the parts that make up the segment that the backup needs.
    Needed,
    /// A part that a longer one, or the segment itself, makes superfluous.
    Superseded,
    /// The end of the WAL, of which nothing else is there.
    Partial,
}

/// A row of the matrix.
#[derive(Debug)]
struct Row {
    role: Role,
    name: WalName,
    sibling: WalName,
    /// The same bytes, sealed at another time.
    again: Bytes,
}

struct Victim {
    source: Source,
    objects: Objects,
    rows: Vec<Row>,
    /// Segments, and what recovery must read of each.
    truth: Vec<(SegmentName, Vec<u8>)>,
    /// Behind the end of the WAL.
    after: SegmentName,
}

impl Victim {
    async fn new(source: Source) -> Self {
        let memory = from_objects(&source.grown().await).await;
        let cluster = source.open(store(memory.clone())).await.unwrap();
        let first = snapshot::open(&cluster, source.first, None).await.unwrap().manifest;
        let file = |path: &std::path::Path| path.file_name().unwrap().to_str().unwrap().parse::<SegmentName>().unwrap();
        let (size, mut truth) = (first.wal_segment_size, Vec::new());
        for name in objects_of(&*memory).await.keys() {
            if let Some(WalName::File(WalFileName::Segment(segment))) = WalName::parse(name) {
                truth.push((segment, contents(&cluster, WalFileName::Segment(segment)).await.unwrap().unwrap()));
            }
        }
        let ([(one, bytes), (two, whole), ..], [last, after, ..]) = (&truth[..], &source.segments[3..]) else {
            panic!("there are too few segments");
        };
        let (one, two, last_name) = (*one, *two, file(last));
        let start = object::segment_start(one, size).unwrap();
        assert!(start <= first.start_lsn && first.stop_lsn < start.advance(size.bytes()), "the backup lies in one segment");

        // The backup's own segment in two parts, cut in the middle of what it needs, and a shorter part from before.
        let stop = first.start_lsn.0.midpoint(first.stop_lsn.0) - start.0;
        let (cut, earlier, end) =
            (u32::try_from(stop).unwrap(), u32::try_from(stop).unwrap() - 16, u32::try_from(size.bytes()).unwrap());
        let part = |segment, bytes: &[u8], from: u32, to: u32| {
            let scan = scan_segment(&bytes[..to as usize], object::segment_start(segment, size).unwrap(), size).unwrap();
            let sealed = object::seal_part(&cluster, segment, from, &bytes[from as usize..to as usize], &scan).unwrap();
            assert_eq!(WalName::parse(&sealed.name), Some(WalName::Part { segment, from, to }));
            sealed
        };
        // The last segment, as a promotion archives it, and one of a segment that is there.
        let mut partials = Vec::new();
        for path in [last, &source.segments[0]] {
            let copy = source.folder.path().join(format!("{}.partial", file(path)));
            let _ = std::fs::copy(path, &copy).unwrap();
            let _ = push(&cluster, &copy).await.unwrap();
            partials.push(WalName::File(WalFileName::Partial(file(path))));
        }
        let partial_bytes = std::fs::read(last).unwrap();
        let partial_again = object::seal_file(&cluster, WalFileName::Partial(last_name), &partial_bytes).unwrap().remove(0);
        let parts = [(one, bytes, 0, cut), (one, bytes, cut, end), (one, bytes, 0, earlier), (two, whole, 0, end / 2)];
        for (segment, bytes, from, to) in parts {
            cluster.put_once(&part(segment, bytes, from, to)).await.unwrap();
        }
        let row = |role, at: usize, sibling: usize| {
            let (segment, bytes, from, to) = parts[at];
            let (other, _, other_from, other_to) = parts[sibling];
            let again = part(segment, bytes, from, to).bytes;
            let name = WalName::Part { segment, from, to };
            Row { role, name, sibling: WalName::Part { segment: other, from: other_from, to: other_to }, again }
        };
        let rows = vec![
            // In place of the longer part the one from before: replayed, as far as that goes.
            row(Role::Needed, 0, 2),
            row(Role::Needed, 1, 0),
            row(Role::Superseded, 2, 0),
            row(Role::Superseded, 3, 0),
            Row { role: Role::Partial, name: partials[0], sibling: partials[1], again: partial_again.bytes },
        ];
        let after = file(after);
        let mut objects = objects_of(&*memory).await;
        let _ = objects.remove(&cluster.path(&WalName::File(WalFileName::Segment(one)).object())).unwrap();
        truth.push((last_name, partial_bytes));
        Self { source, objects, rows, truth, after }
    }

    async fn open(&self, objects: &Objects) -> Cluster {
        self.source.open(store(from_objects(objects).await)).await.unwrap()
    }

    /// What recovery reads, from the first segment to the end: all of it, but for `lost`.
    async fn assert_recovers(&self, cluster: &Cluster, lost: Option<SegmentName>, why: &str) {
        for (segment, truth) in self.truth.iter().filter(|(segment, _)| Some(*segment) != lost) {
            let read = contents(cluster, WalFileName::Segment(*segment)).await;
            let read = read.unwrap_or_else(|e| panic!("{why}: {segment} cannot be read: {e:?}"));
            assert!(read.as_ref() == Some(truth), "{why}: {segment} is not what it was");
        }
        // And it ends as it should: an error here would keep a server from coming up.
        assert_eq!(contents(cluster, WalFileName::Segment(self.after)).await.unwrap(), None, "{why}");
    }

    async fn case(&self, row: &Row, change: &str, objects: Objects) {
        let why = format!("{:?}: {change}", row.name);
        let first = self.source.first;
        let cluster = self.open(&objects).await;
        let object = cluster.path(&row.name.object());
        let found = report(&cluster).await;
        let (deleted, same) = (change == "deleted", change == "sealed at another time");
        let (WalName::Part { segment, .. } | WalName::File(WalFileName::Segment(segment) | WalFileName::Partial(segment))) =
            row.name
        else {
            panic!("{why}: not WAL");
        };
        match row.role {
            _ if same => assert!(found.findings.is_empty(), "{why}: {:?}", found.findings),
            // A part that is not there has no finding of its own; the backup that needs it has.
            Role::Needed if deleted => {
                assert_reported(&found, &cluster.path(&layout::snapshot(first)), &[first], Severity::Error, &why);
            }
            // Behind the end of the WAL nothing is missed; see `what_a_vault_alone_cannot_tell`.
            Role::Superseded | Role::Partial if deleted => assert_eq!(errors(&found), Vec::<String>::new(), "{why}"),
            Role::Superseded => {
                assert_reported(&found, &object, &[], Severity::Error, &why);
                let hurt = found.findings.iter().find(|f| f.object == object && !f.hurts.is_empty());
                assert!(hurt.is_none(), "{why}: recovery passes over it: {hurt:?}");
            }
            Role::Needed | Role::Partial => assert_reported(&found, &object, &[first], Severity::Error, &why),
        }
        // The clear hash is for those who have no key.
        let harmless = same || change == "bit flipped in hash" || row.role == Role::Superseded;
        self.assert_recovers(&cluster, (!harmless).then_some(segment), &why).await;
        if !harmless {
            let fetched = contents(&cluster, WalFileName::Segment(segment)).await;
            if deleted && row.role == Role::Partial {
                // The archive ends before it, and nothing says otherwise.
                assert_eq!(fetched.unwrap(), None, "{why}");
            } else {
                let error = fetched.err().unwrap_or_else(|| panic!("{why}: recovery gets a damaged segment, or is told to end"));
                assert!([ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()), "{why}: {error:?}");
            }
        }
        if row.role == Role::Partial {
            let asked = contents(&cluster, WalFileName::Partial(segment)).await;
            match asked {
                Ok(Some(bytes)) => assert!(harmless && Some(&bytes) == self.truth.last().map(|(_, bytes)| bytes), "{why}"),
                Ok(None) => assert!(deleted, "{why}"),
                Err(error) => assert!(!harmless && !deleted && error.kind() != ErrorKind::Storage, "{why}: {error:?}"),
            }
        }
        if row.role == Role::Needed && !harmless {
            let target = folder();
            match self.source.restore(&cluster, first, target.path(), false).await {
                // A restore writes no WAL: it looks at what there is, and at what the end says of itself. The rest is what
                // recovery refuses, above.
                Ok(_) => assert!(!deleted, "{why}: restored without its WAL"),
                Err(error) => {
                    let expected: &[ErrorKind] =
                        if deleted { &[ErrorKind::OutsideWindow] } else { &[ErrorKind::Corrupt, ErrorKind::Unsupported] };
                    assert!(expected.contains(&error.kind()), "{why}: {error:?}");
                    assert!(!target.path().join("global/pg_control").exists(), "{why}");
                }
            }
        } else if ["deleted", "emptied"].contains(&change) {
            self.source.assert_restores(&cluster, first, &why).await;
        }
    }
}

#[test]
fn t30_every_change_of_wal_in_pieces_is_noticed_where_it_is_needed() {
    let source = Source::new();
    runtime().block_on(async {
        let victim = &Victim::new(source).await;
        let healthy = victim.open(&victim.objects).await;
        assert_eq!(report(&healthy).await.findings, []);
        victim.assert_recovers(&healthy, None, "unchanged").await;
        victim.source.assert_restores(&healthy, victim.source.first, "unchanged").await;
        let path = |name: WalName| healthy.path(&name.object());
        let mut cases = Vec::new();
        for row in &victim.rows {
            let (name, sibling) = (path(row.name), path(row.sibling));
            let mut all = changes(&name, &victim.objects[&name], &victim.objects[&sibling]);
            all.push(("sealed at another time".into(), Some(row.again.to_vec())));
            // Their framing is the same; what differs is what becomes of them.
            let few = row.role == Role::Superseded && std::env::var_os("PGVAULT_TEST_FULL").is_none();
            let always = ["bit flipped in hash", "deleted", "emptied", "a sibling in its place", "sealed at another time"];
            for (n, (change, bytes)) in all.into_iter().enumerate() {
                if few && n % 5 != 0 && !always.contains(&change.as_str()) {
                    continue;
                }
                let mut objects = victim.objects.clone();
                match bytes {
                    Some(bytes) => drop(objects.insert(name.clone(), bytes.into())),
                    None => drop(objects.remove(&name)),
                }
                cases.push((row, change, objects));
            }
        }
        let cases = sample(cases, 40);
        let count = cases.len();
        let outcomes = stream::iter(cases).map(|(row, change, objects)| async move {
            // All of them, not the first: a hole in the wall shows its shape.
            AssertUnwindSafe(victim.case(row, &change, objects)).catch_unwind().await.is_ok()
        });
        let failed = outcomes.buffer_unordered(4).filter(|ok| std::future::ready(!ok)).count().await;
        assert_eq!(failed, 0, "of {count} cases; each is named above");
    });
}
