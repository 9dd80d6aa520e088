//! T30: every kind of object, changed in every part of it, and what becomes of it.
//!
//! Whoever can write to the bucket can change anything in it, and can give what they changed a hash that fits. So each
//! change is made twice: as bit rot makes it, and as an attacker does, with the clear hash at the end computed anew.
//!
//! What cannot be noticed from the vault alone is asserted too, so that nobody believes otherwise: see
//! [`what_a_vault_alone_cannot_tell`].

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use pgvault_core::ErrorKind;
use pgvault_core::backup::{BackupOptions, backup};
use pgvault_core::env::Env;
use pgvault_core::format::document;
use pgvault_core::format::object::{Codec, HEADER_LEN, Kind, TAIL_LEN};
use pgvault_core::inspect::{Report, Severity};
use pgvault_core::testing::{Objects, objects_of};
use pgvault_core::vault::{Cluster, Vault, audit, keyring, layout, snapshot};
use pgvault_core::wal::fetch::contents;
use pgvault_core::wal::object::WalName;
use pgvault_core::wal::push::push;
use sha2::{Digest, Sha256};
use ulid::Ulid;

use crate::place::{from_objects, sample};
use crate::source::{Key, SECRETS, Source, errors, folder, report, runtime, store};

/// A vault with at least two objects of each kind.
struct Victim {
    source: Source,
    objects: Objects,
    second: Ulid,
    /// One object of each kind that matters to the first backup, and a sibling.
    kinds: BTreeMap<&'static str, (String, String)>,
}

impl Victim {
    async fn new(source: Source) -> Self {
        let memory = from_objects(&source.grown().await).await;
        let cluster = source.open(store(memory.clone())).await.unwrap();
        let _ = keyring::record_creation(&cluster).await.unwrap();
        for segment in &source.segments {
            let _ = push(&cluster, segment).await.unwrap();
        }
        // With packs of its own.
        let all = BackupOptions { full: true, ..source.backup_options(false) };
        let second = backup(&cluster, &all).await.unwrap().id;
        let _ = keyring::start_epoch(&cluster).await.unwrap();
        let _ = push(&cluster, &source.more_wal()).await.unwrap();
        source.archive_the_rest(&cluster).await;
        for name in ["00000002.history", "00000003.history"] {
            let path = source.folder.path().join(name);
            let ancestors = "1\t0/F0000000\tno recovery target specified\n2\t0/F1000000\tno recovery target specified\n";
            let lines = if name.starts_with("00000002") { &ancestors[..=ancestors.find("\n2").unwrap()] } else { ancestors };
            std::fs::write(&path, lines).unwrap();
            let _ = push(&cluster, &path).await.unwrap();
        }
        let objects = objects_of(&*memory).await;
        let prefix = source.name.prefix();
        let named = |what: &str| objects.keys().filter(|n| n.starts_with(&format!("{prefix}{what}"))).cloned().collect::<Vec<_>>();
        let mut kinds = BTreeMap::new();
        let mut add = |kind, one: String, other: String| assert!(one != other && kinds.insert(kind, (one, other)).is_none());
        // The operator's slot is the victim of one row, the second key's of another.
        let slots = cluster.vault().slots(cluster.name()).await.unwrap();
        let slot =
            |key: &Key| layout::key_slot(cluster.name(), slots.iter().find(|s| s.describe() == key.recipient).unwrap().key_id);
        add("own slot", slot(&source.key), slot(&source.other));
        add("other slot", slot(&source.other), slot(&source.key));
        let epochs = named("epochs/");
        add("epoch", epochs[0].clone(), epochs[1].clone());
        let first = snapshot::open(&cluster, source.first, None).await.unwrap();
        let mine: Vec<String> =
            first.packs().await.unwrap().iter().map(|p| cluster.path(&layout::pack(Ulid::from_bytes(p.id)))).collect();
        for (label, kind) in [("data pack", Kind::Data), ("meta pack", Kind::Meta)] {
            let all: Vec<String> = named("pack/").into_iter().filter(|n| objects[n][6] == kind as u8).collect();
            let one = all.iter().find(|n| mine.contains(n)).unwrap_or_else(|| panic!("the backup has no {label}"));
            add(label, one.clone(), all.iter().find(|n| !mine.contains(n)).unwrap().clone());
        }
        add("snapshot", cluster.path(&layout::snapshot(source.first)), cluster.path(&layout::snapshot(second)));
        let wal = named("wal/00000001/");
        add("wal", wal[0].clone(), wal[1].clone());
        // Of the timeline that another one descends from: its absence shows.
        add("history", named("wal/00000002/")[0].clone(), named("wal/00000003/")[0].clone());
        let (session, audit) = (named("session/"), named("audit/"));
        add("session", session[0].clone(), session[1].clone());
        add("audit", audit[0].clone(), audit[1].clone());
        Self { source, objects, second, kinds }
    }

    /// Opens a changed vault, with the operator's key, else with the other one.
    async fn open(&self, objects: &Objects) -> pgvault_core::Result<Cluster> {
        self.source.open(store(from_objects(objects).await)).await
    }

    async fn open_with_other(&self, objects: &Objects) -> pgvault_core::Result<Cluster> {
        let vault = Vault::open(store(from_objects(objects).await), Env::default()).await?;
        vault.unlock(&self.source.name, &self.source.other.unlock()).await
    }
}

pub(crate) fn flipped(bytes: &Bytes, at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

/// The clear hash at the end, computed anew.
pub(crate) fn rehashed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 32;
    let digest: [u8; 32] = Sha256::digest(&bytes[..end]).into();
    bytes[end..].copy_from_slice(&digest);
    bytes
}

fn is_document(name: &str) -> bool {
    std::path::Path::new(name).extension().is_some_and(|e| e == "json")
}

/// Every change of one object that a row of the matrix makes; `None` deletes it.
pub(crate) fn changes(name: &str, original: &Bytes, sibling: &Bytes) -> Vec<(String, Option<Vec<u8>>)> {
    let len = original.len();
    let mut changes: Vec<(String, Option<Vec<u8>>)> = Vec::new();
    if is_document(name) {
        for at in [0, len / 3, len / 2, len - 3, len - 1] {
            changes.push((format!("bit flipped at {at}"), Some(flipped(original, at))));
        }
        // With a hash that fits: an attacker's own spelling of it.
        let mut map = document::verify("test", original).unwrap();
        let _ = map.insert("created_at".into(), "2020-01-01T00:00:00Z".into());
        changes.push(("another date, hash made to fit".into(), Some(document::encode(&map).unwrap())));
    } else {
        let footer = usize::try_from(u64::from_le_bytes(original[len - 48..len - 40].try_into().unwrap())).unwrap();
        let parts = [
            ("magic", 0),
            ("major version", 4),
            ("minor version", 5),
            ("kind", 6),
            ("suite", 7),
            ("features", 8),
            ("vault id", 16),
            ("cluster id", 32),
            ("epoch id", 48),
            ("salt", 64),
            ("commitment", 96),
            ("first frame", HEADER_LEN),
            ("middle frame", usize::midpoint(HEADER_LEN, footer)),
            ("footer", footer),
            ("footer's tag", len - TAIL_LEN - 1),
            ("footer offset", len - TAIL_LEN),
            ("footer length", len - TAIL_LEN + 8),
            ("end magic", len - TAIL_LEN + 12),
        ];
        assert!(footer > HEADER_LEN && footer < len - TAIL_LEN, "{name}: the footer is at {footer} of {len}");
        for (part, at) in parts {
            changes.push((format!("bit flipped in {part}, hash made to fit"), Some(rehashed(flipped(original, at)))));
        }
        for (part, at) in [("first frame", HEADER_LEN), ("footer", footer), ("hash", len - 1)] {
            changes.push((format!("bit flipped in {part}"), Some(flipped(original, at))));
        }
    }
    changes.push(("one byte cut off".into(), Some(original[..len - 1].to_vec())));
    changes.push(("half cut off".into(), Some(original[..len / 2].to_vec())));
    changes.push(("emptied".into(), Some(Vec::new())));
    changes.push(("one byte added".into(), Some([original, &b"x"[..]].concat())));
    changes.push(("a sibling in its place".into(), Some(sibling.to_vec())));
    changes.push(("deleted".into(), None));
    changes
}

/// What somebody reading the report must learn.
pub(crate) fn assert_reported(report: &Report, object: &str, hurts: &[Ulid], severity: Severity, why: &str) {
    let about: Vec<_> = report.findings.iter().filter(|f| f.object == object && f.severity == severity).collect();
    assert!(!about.is_empty(), "{why}: the check does not name {object}: {:?}", report.findings);
    let named: Vec<Ulid> = about.iter().flat_map(|f| f.hurts.clone()).collect();
    assert!(hurts.iter().all(|id| named.contains(id)), "{why}: the check does not say that {hurts:?} is hurt: {about:?}");
}

impl Victim {
    async fn case(&self, kind: &str, change: &str, objects: Objects) {
        let why = format!("{kind}: {change}");
        let first = self.source.first;
        let object = self.kinds[kind].0.clone();
        let opened = self.open(&objects).await;
        let cluster = match opened {
            Ok(cluster) => cluster,
            Err(error) => {
                // Keys and epochs are read before anything else: nothing can be read, let alone restored.
                assert!(["own slot", "epoch"].contains(&kind), "{why}: the vault does not open: {error:?}");
                let expected: &[ErrorKind] = match (kind, change) {
                    ("own slot", "deleted" | "a sibling in its place") => &[ErrorKind::WrongKey],
                    _ => &[ErrorKind::Corrupt, ErrorKind::Unsupported],
                };
                assert!(expected.contains(&error.kind()), "{why}: {error:?}");
                let id = layout::id_of(&object).unwrap().to_string();
                assert!(
                    error.kind() == ErrorKind::WrongKey || change == "deleted" || error.to_string().contains(&id),
                    "{why}: {error}"
                );
                if kind == "epoch" {
                    return;
                }
                // The holder of another key is not locked out, and is told.
                let other = self.open_with_other(&objects).await.unwrap_or_else(|e| panic!("{why}: the other key: {e:?}"));
                return assert_reported(&report(&other).await, &object, &[], Severity::Error, &why);
            }
        };
        let found = report(&cluster).await;
        match (kind, change) {
            // Nothing of value is lost with it, and nothing says that it should be there: see below.
            ("session", "deleted") => assert_eq!(errors(&found), Vec::<String>::new(), "{why}"),
            ("audit", "deleted") => {}
            ("data pack" | "meta pack" | "snapshot", _) => {
                if kind == "snapshot" && change == "deleted" {
                    assert!(snapshot::open(&cluster, first, None).await.is_err(), "{why}");
                }
                assert_reported(&found, &object, &[first], Severity::Error, &why);
            }
            ("wal", "deleted") => {
                // A segment that is not there has no finding of its own; the backup that needs it has.
                assert_reported(&found, &cluster.path(&layout::snapshot(first)), &[first], Severity::Error, &why);
            }
            ("wal", _) => assert_reported(&found, &object, &[first], Severity::Error, &why),
            // When an epoch was made is information only, and not part of what is sealed; its key is.
            ("epoch", "another date, hash made to fit") => assert!(found.findings.is_empty(), "{why}: {found:?}"),
            ("epoch", _) => assert!(found.has_errors(), "{why}: {found:?}"),
            _ => assert_reported(&found, &object, &[], Severity::Error, &why),
        }
        match kind {
            // The clear hash is for those who have no key; whoever has one compares more, and gets the right bytes.
            "data pack" | "meta pack" | "snapshot" if change == "bit flipped in hash" => {
                self.source.assert_restores(&cluster, first, &why).await;
            }
            // Where a data pack ends is known from the manifest; what somebody added behind it is not read.
            "data pack" if change == "one byte added" => {
                self.source.assert_restores(&cluster, first, &why).await;
            }
            "wal" | "history" if change == "bit flipped in hash" => {
                let WalName::File(file) = WalName::parse(&object).unwrap() else { panic!("{object} is a part") };
                let healthy = self.open(&self.objects).await.unwrap();
                assert_eq!(contents(&cluster, file).await.unwrap(), contents(&healthy, file).await.unwrap(), "{why}");
            }
            "data pack" | "meta pack" | "snapshot" => {
                let target = folder();
                let restored = self.source.restore(&cluster, first, target.path(), false).await;
                let error = restored.err().unwrap_or_else(|| panic!("{why}: the damaged backup is restored"));
                let expected = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::NotFound, ErrorKind::OutsideWindow];
                assert!(expected.contains(&error.kind()), "{why}: {error:?}");
                assert!(!target.path().join("global/pg_control").exists(), "{why}: the damaged restore could be started");
            }
            "wal" | "history" => {
                let name = WalName::parse(&object).unwrap();
                let WalName::File(file) = name else { panic!("{object} is a part") };
                let fetched = contents(&cluster, file).await;
                let error = fetched.err().unwrap_or_else(|| panic!("{why}: recovery gets a damaged file"));
                assert!([ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()), "{why}: {error:?}");
            }
            _ => {}
        }
    }
}

#[test]
fn t30_every_change_of_every_kind_of_object_is_noticed() {
    let source = Source::new();
    runtime().block_on(async {
        let victim = Victim::new(source).await;
        let clean = report(&victim.open(&victim.objects).await.unwrap()).await;
        assert_eq!(errors(&clean), Vec::<String>::new());
        let mut cases = Vec::new();
        for (kind, (name, sibling)) in &victim.kinds {
            let (original, other) = (&victim.objects[name], &victim.objects[sibling]);
            // Their framing is that of the kinds before; what differs is what the check makes of them.
            let few = ["session", "audit", "history"].contains(kind) && std::env::var_os("PGVAULT_TEST_FULL").is_none();
            for (n, (change, bytes)) in changes(name, original, other).into_iter().enumerate() {
                if few && n % 5 != 0 && !["deleted", "emptied", "a sibling in its place"].contains(&change.as_str()) {
                    continue;
                }
                let mut objects = victim.objects.clone();
                match bytes {
                    Some(bytes) => drop(objects.insert(name.clone(), bytes.into())),
                    None => drop(objects.remove(name)),
                }
                cases.push((*kind, change, objects));
            }
            let mut swapped = victim.objects.clone();
            let _ = swapped.insert(name.clone(), other.clone());
            let _ = swapped.insert(sibling.clone(), original.clone());
            cases.push((*kind, "swapped with a sibling".into(), swapped));
        }
        let began = std::time::Instant::now();
        let cases = sample(cases, 40);
        let count = cases.len();
        let victim = &victim;
        let outcomes = stream::iter(cases).map(|(kind, change, objects)| async move {
            // All of them, not the first: a hole in the wall shows its shape.
            AssertUnwindSafe(victim.case(kind, &change, objects)).catch_unwind().await.is_ok()
        });
        let failed = outcomes.buffer_unordered(4).filter(|ok| std::future::ready(!ok)).count().await;
        eprintln!("{count} cases in {:.1} s", began.elapsed().as_secs_f64());
        assert_eq!(failed, 0, "cases failed; each is named above");
    });
}

#[test]
fn t30_a_changed_vault_document_opens_nothing() {
    let source = Source::new();
    runtime().block_on(async {
        let original = source.base[layout::VAULT_DOCUMENT].clone();
        // The sibling: the document of another vault.
        let elsewhere = store(from_objects(&Objects::new()).await);
        let _ = Vault::create(elsewhere.clone(), Env::default()).await.unwrap();
        let sibling = elsewhere.get(layout::VAULT_DOCUMENT).await.unwrap();
        for (change, bytes) in changes(layout::VAULT_DOCUMENT, &original, &sibling) {
            let mut objects = source.base.clone();
            let _ = objects.remove(layout::VAULT_DOCUMENT);
            let deleted = bytes.is_none();
            objects.extend(bytes.map(|bytes| (layout::VAULT_DOCUMENT.to_owned(), bytes.into())));
            let error = source.open(store(from_objects(&objects).await)).await.err();
            let error = error.unwrap_or_else(|| panic!("{change}: the vault opens all the same"));
            // Of another vault: the keys do not fit. With a date of its own: the epochs notice.
            let expected: &[ErrorKind] =
                if deleted { &[ErrorKind::NoVault] } else { &[ErrorKind::Corrupt, ErrorKind::WrongKey, ErrorKind::Unsupported] };
            assert!(expected.contains(&error.kind()), "{change}: {error:?}");
        }
    });
}

/// The limits, word for word: a vault cannot miss what nothing in it mentions. Retention on the store's side, or a copy
/// of the vault elsewhere, is what protects against these.
#[test]
fn what_a_vault_alone_cannot_tell() {
    let source = Source::new();
    runtime().block_on(async {
        let victim = Victim::new(source).await;
        let prefix = victim.source.name.prefix();
        let cluster = victim.open(&victim.objects).await.unwrap();
        let snap = cluster.path(&layout::snapshot(victim.second));
        // The newest backup without its record: noticed.
        let mut objects = victim.objects.clone();
        let _ = objects.remove(&snap);
        let found = report(&victim.open(&objects).await.unwrap()).await;
        assert_reported(&found, &snap, &[victim.second], Severity::Error, "deleted snapshot");
        // A record without its backup: a warning.
        let mut records = Vec::new();
        for name in victim.objects.keys().filter(|name| name.starts_with(&format!("{prefix}audit/"))) {
            let relative = name.strip_prefix(&prefix).unwrap();
            let record: audit::Record = cluster.get_json(Kind::Audit, relative).await.unwrap();
            if record.event == (audit::Event::BackupCommitted { backup_id: victim.second }) {
                records.push(name.clone());
            }
        }
        assert_eq!(records.len(), 1);
        let mut objects = victim.objects.clone();
        let _ = objects.remove(&records[0]);
        let found = report(&victim.open(&objects).await.unwrap()).await;
        assert_eq!(errors(&found), Vec::<String>::new());
        assert_reported(&found, &snap, &[], Severity::Warning, "deleted record");
        // Both: not noticed.
        let _ = objects.remove(&snap);
        let found = report(&victim.open(&objects).await.unwrap()).await;
        assert!(found.findings.is_empty(), "{:?}", found.findings);
        // The end of the WAL, behind the last backup: not noticed. One in the middle: noticed.
        let wal: Vec<String> =
            victim.objects.keys().filter(|name| name.starts_with(&format!("{prefix}wal/00000001/"))).cloned().collect();
        let last_pushed = wal.iter().rev().find(|name| name.rsplit('.').next() == Some("wal")).unwrap();
        let mut shorter = victim.objects.clone();
        let _ = shorter.remove(last_pushed);
        let found = report(&victim.open(&shorter).await.unwrap()).await;
        assert!(found.findings.is_empty(), "{:?}", found.findings);
        let mut torn = victim.objects.clone();
        let _ = torn.remove(&wal[wal.len() / 2]);
        let found = report(&victim.open(&torn).await.unwrap()).await;
        let gap = errors(&found);
        assert!(gap.len() == 1 && gap[0].contains("is missing") && gap[0].contains(&victim.source.first.to_string()), "{gap:?}");
    });
}

#[test]
fn nothing_that_is_stored_shows_what_it_holds() {
    let source = Source::new();
    runtime().block_on(async {
        // The words are there to be found, in the files and in the WAL.
        let mut found = [0; SECRETS.len()];
        for entry in walkdir::WalkDir::new(source.server.pgdata()).into_iter().map(Result::unwrap) {
            if entry.file_type().is_file() {
                let bytes = std::fs::read(entry.path()).unwrap();
                for (n, secret) in SECRETS.iter().enumerate() {
                    found[n] += usize::from(contains(&bytes, secret));
                }
            }
        }
        assert!(found.iter().all(|n| *n > 0), "{found:?}");
        let objects = source.grown().await;
        let cluster = source.open(store(from_objects(&objects).await)).await.unwrap();
        let mut stored_raw = 0;
        for (name, bytes) in &objects {
            for secret in SECRETS.iter().chain(&["postgresql.conf", "PG_VERSION", "base/", "pg_xact", "START WAL LOCATION"]) {
                assert!(!contains(bytes, secret) && !name.contains(secret), "{name} shows `{secret}`");
            }
            let relative = name.strip_prefix(&source.name.prefix()).filter(|name| name.starts_with("pack/"));
            if let Some(relative) = relative.filter(|_| bytes[6] == Kind::Data as u8) {
                let pack = cluster.open(Kind::Data, relative, None).await.unwrap();
                stored_raw += pack.reader().frames().iter().filter(|frame| frame.codec == Codec::None).count();
            }
        }
        assert!(stored_raw > 0, "every frame was compressed; the test must see one that is not");
    });
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}
