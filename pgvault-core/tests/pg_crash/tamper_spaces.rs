//! T30 for a backup with tablespaces: its packs hold pages that a restore writes to several places, and none of them may
//! get a wrong one.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;

use futures::{FutureExt, StreamExt, stream};
use pgvault_core::ErrorKind;
use pgvault_core::backup::backup;
use pgvault_core::format::file_table::Node;
use pgvault_core::format::map::{self, Extent, FileMap};
use pgvault_core::format::object::Kind;
use pgvault_core::inspect::Severity;
use pgvault_core::testing::{Objects, objects_of};
use pgvault_core::vault::{Cluster, layout, snapshot};
use tempfile::TempDir;
use ulid::Ulid;

use crate::place::{from_objects, sample};
use crate::source::{Source, Tree, errors, folder, report, runtime, store, tree};
use crate::tamper::{assert_reported, changes, flipped, rehashed};

struct Victim {
    source: Source,
    objects: Objects,
    /// The tablespace on the server, and what is in it.
    space: TempDir,
    contents: Tree,
    /// The backup that has it.
    id: Ulid,
}

impl Victim {
    fn new() -> Self {
        let mut source = Source::new();
        let space = folder();
        source.server.account().own(space.path()).unwrap();
        source.server.psql(&format!("create tablespace elsewhere location '{}'", space.path().display())).unwrap();
        source
            .server
            .psql(
                "create table large tablespace elsewhere as select n, repeat(md5(n::text), 20) from generate_series(1, 3000) n;
                 create table small tablespace elsewhere as select 1 as n; vacuum freeze large, small; checkpoint",
            )
            .unwrap();
        let (objects, id) = runtime().block_on(async {
            let memory = from_objects(&source.base).await;
            let cluster = source.open(store(memory.clone())).await.unwrap();
            let id = backup(&cluster, &source.backup_options(true)).await.unwrap().id;
            source.archive_the_rest(&cluster).await;
            (objects_of(&*memory).await, id)
        });
        source.truth = tree(source.server.pgdata());
        let contents = tree(space.path());
        assert!(contents.len() > 2, "{contents:?}");
        Self { source, objects, space, contents, id }
    }

    async fn open(&self, objects: &Objects) -> Cluster {
        self.source.open(store(from_objects(objects).await)).await.unwrap()
    }

    /// Restores into two new directories; whatever came of it, the server's own are not touched.
    async fn restore(&self, cluster: &Cluster, why: &str) -> Result<(), pgvault_core::Error> {
        let (target, place) = (folder(), folder());
        let mapping = BTreeMap::from([(self.space.path().to_str().unwrap().to_owned(), place.path().to_path_buf())]);
        let restored = self.source.restore_with(cluster, self.id, target.path(), false, mapping).await;
        assert!(tree(self.space.path()) == self.contents, "{why}: the tablespace of the server was touched");
        if restored.is_ok() {
            self.source.assert_restored(target.path(), why);
            assert_eq!(tree(place.path()), self.contents, "{why}: the tablespace is not what it was");
        } else {
            assert!(!target.path().join("global/pg_control").exists(), "{why}: the damaged restore could be started");
        }
        restored.map(drop)
    }

    /// The data pack and the byte in it where the pages of a file in the tablespace begin, and the meta pack of its map.
    async fn places(&self, cluster: &Cluster) -> (String, usize, String, usize) {
        let snapshot = snapshot::open(cluster, self.id, None).await.unwrap();
        let mut table = snapshot.files();
        while let Some(entries) = table.next_chunk().await.unwrap() {
            for entry in entries.into_iter().filter(|entry| entry.path.starts_with("pg_tblspc/")) {
                let Node::File { len, map } = entry.node else { continue };
                let Some((pack, first)) = map.locate(0) else { continue };
                let meta = layout::pack(Ulid::from_bytes(pack));
                let object = cluster.open(Kind::Meta, &meta, None).await.unwrap();
                let meta_at = object.reader().frames()[first as usize].offset;
                let map = FileMap::parse(&object.frame(first).await.unwrap(), map::section_len(len, 0)).unwrap();
                let Some(Extent::Stored { pack, frame, .. }) = map.extents.last().copied() else { continue };
                let data = layout::pack(Ulid::from_bytes(map.packs[pack as usize]));
                let object = cluster.open(Kind::Data, &data, None).await.unwrap();
                let data_at = object.reader().frames()[frame as usize].offset;
                let place = |at: u64| usize::try_from(at).unwrap() + 7;
                return (cluster.path(&data), place(data_at), cluster.path(&meta), place(meta_at));
            }
        }
        panic!("no file of the tablespace has a map of its own");
    }

    async fn case(&self, kind: Kind, name: &str, change: &str, objects: Objects) {
        let why = format!("{kind:?} pack with a tablespace: {change}");
        let cluster = self.open(&objects).await;
        let found = report(&cluster).await;
        assert_reported(&found, name, &[self.id], Severity::Error, &why);
        let restored = self.restore(&cluster, &why).await;
        // As for every other pack: a reader with the key needs no clear hash, and does not read behind a data pack's end.
        let harmless = change == "bit flipped in hash" || (kind == Kind::Data && change == "one byte added");
        match restored {
            Ok(()) => assert!(harmless, "{why}: the damaged backup is restored"),
            Err(error) => {
                let expected = [ErrorKind::Corrupt, ErrorKind::Unsupported];
                assert!(!harmless && expected.contains(&error.kind()), "{why}: {error:?}");
            }
        }
        // The backup from before the tablespace has packs of its own.
        let hurt = found.findings.iter().filter(|f| f.object == name).any(|f| f.hurts.contains(&self.source.first));
        assert!(!hurt, "{why}: {:?}", found.findings);
    }
}

#[test]
fn t30_every_change_of_a_pack_with_a_tablespace_is_noticed() {
    let victim = &Victim::new();
    runtime().block_on(async {
        let healthy = victim.open(&victim.objects).await;
        assert_eq!(errors(&report(&healthy).await), Vec::<String>::new());
        victim.restore(&healthy, "unchanged").await.unwrap();
        let (data, data_at, meta, meta_at) = victim.places(&healthy).await;
        let before = snapshot::open(&healthy, victim.source.first, None).await.unwrap().packs().await.unwrap();
        let mut cases = Vec::new();
        for (kind, name, at) in [(Kind::Data, &data, data_at), (Kind::Meta, &meta, meta_at)] {
            let original = &victim.objects[name];
            // The sibling: the same place of the backup before, an older state of most of the files.
            let older = before.iter().map(|pack| healthy.path(&layout::pack(Ulid::from_bytes(pack.id))));
            let older = older.into_iter().find(|name| victim.objects[name][6] == kind as u8).unwrap();
            assert_ne!(*name, older);
            let mut all = changes(name, original, &victim.objects[&older]);
            all.push(("bit flipped in the tablespace".into(), Some(flipped(original, at))));
            all.push(("bit flipped in the tablespace, hash made to fit".into(), Some(rehashed(flipped(original, at)))));
            for (change, bytes) in all {
                let mut objects = victim.objects.clone();
                match bytes {
                    Some(bytes) => drop(objects.insert(name.clone(), bytes.into())),
                    None => drop(objects.remove(name)),
                }
                cases.push((kind, name, change, objects));
            }
        }
        let cases = sample(cases, 16);
        let count = cases.len();
        let outcomes = stream::iter(cases).map(|(kind, name, change, objects)| async move {
            AssertUnwindSafe(victim.case(kind, name, &change, objects)).catch_unwind().await.is_ok()
        });
        let failed = outcomes.buffer_unordered(4).filter(|ok| std::future::ready(!ok)).count().await;
        assert_eq!(failed, 0, "of {count} cases; each is named above");
    });
}
