//! A vault without a server: a store with the clock of the test, and backups of a few made-up packs, stored in the order in which a
//! real one stores them and through the same functions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use jiff::{SignedDuration, Timestamp};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use pgvault_core::clock::{Clock, FixedClock};
use pgvault_core::crypto::sealed::{FrameEncoder, SealedWriter};
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::{Env, Random};
use pgvault_core::format::object::Kind;
use pgvault_core::format::pack_table::{PackKind, PackRef};
use pgvault_core::postgres::{Lsn, SegmentName, SystemId, TimelineId, WalFileName, WalSegNo};
use pgvault_core::store::{Settings, Store, StoreOptions};
use pgvault_core::testing::{Dice, TimedStore};
use pgvault_core::vault::audit::{self, Event};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::session::{self, Purpose, Session};
use pgvault_core::vault::snapshot::{self, BackupKind, BadPage, Manifest, Snapshot, SourceKind};
use pgvault_core::vault::tables::{Limits, Tables};
use pgvault_core::vault::{Cluster, Vault, layout};
use pgvault_core::wal::object::{WalName, seal_file};
use pgvault_core::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use ulid::Ulid;

/// Bytes of a segment, and how far apart two backups are.
pub(crate) const SEGMENT: u64 = 1 << 20;

/// A vault in memory, and what time it is.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) clock: Arc<FixedClock>,
    pub(crate) store: Arc<dyn ObjectStore>,
    name: ClusterName,
    secret: String,
    seed: u64,
}

/// Randomness that a seed gives: names decide what comes before what.
#[derive(Debug)]
pub(crate) struct Seeded(Mutex<Dice>);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Mutex::new(Dice::new(seed)))
    }
}

impl Random for Seeded {
    fn fill(&self, out: &mut [u8]) -> Result<()> {
        let mut dice = self.0.lock().unwrap();
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&dice.roll().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

/// No waits: whoever wants repetitions repeats.
pub(crate) fn options() -> StoreOptions {
    StoreOptions { attempts: 1, ..StoreOptions::default() }
}

impl Place {
    pub(crate) async fn new() -> Self {
        Self::of_seed(0).await
    }

    /// With the names that a seed gives.
    pub(crate) async fn of_seed(seed: u64) -> Self {
        Self::at(Arc::new(FixedClock::new("2026-01-05T00:00:00Z".parse().unwrap())), seed).await
    }

    /// With a clock that it may share with others.
    pub(crate) async fn at(clock: Arc<FixedClock>, seed: u64) -> Self {
        let store: Arc<dyn ObjectStore> = Arc::new(TimedStore::new(Arc::new(InMemory::new()), clock.clone()));
        let key = age::x25519::Identity::generate();
        let secret = age::secrecy::ExposeSecret::expose_secret(&key.to_string()).to_owned();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        let place = Self { clock, store, name, secret, seed };
        let plain = Store::new(place.store.clone(), "memory:///", options());
        let (vault, _) = Vault::create(plain, place.env()).await.unwrap();
        assert!(vault.create_cluster(&place.name, &[Wrap::Recipient(key.to_public().to_string())]).await.unwrap());
        place
    }

    fn env(&self) -> Env {
        Env::new(self.clock.clone(), Arc::new(Seeded::new(self.seed)))
    }

    pub(crate) async fn cluster(&self) -> Cluster {
        self.over(self.store.clone(), self.env()).await.unwrap()
    }

    /// The cluster through another store, for a program with a clock of its own.
    pub(crate) async fn over(&self, store: Arc<dyn ObjectStore>, env: Env) -> Result<Cluster> {
        assert!(Settings::default().immutability.is_none());
        let vault = Vault::open(Store::new(store, "memory:///", options()), env).await?;
        vault.unlock(&self.name, &Unlock::Identity(self.secret.clone().into())).await
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub(crate) fn pass(&self, hours: i64) {
        self.clock.set(self.now() + SignedDuration::from_hours(hours));
    }
}

/// What a made-up backup is like.
#[derive(Debug, Clone)]
pub(crate) struct Sketch {
    pub(crate) timeline: u32,
    /// The segment it begins in; it ends in the same.
    pub(crate) segment: u64,
    /// Packs that it stores.
    pub(crate) packs: u32,
    pub(crate) bad: bool,
    /// When its manifest claims that it began and ended; twice the time of its end when not given.
    pub(crate) claims: Option<(Timestamp, Timestamp)>,
}

impl Sketch {
    pub(crate) fn at(segment: u64) -> Self {
        Self { timeline: 1, segment, packs: 2, bad: false, claims: None }
    }
}

/// Pack `number` of a session, so that whoever goes on with it finds it.
fn pack_name(session: Ulid, number: u32) -> Ulid {
    let hash = Sha256::new().chain_update(session.to_bytes()).chain_update(number.to_le_bytes()).finalize();
    let mut random = [0; 16];
    random.copy_from_slice(&hash[..16]);
    Ulid::from_parts(session.timestamp_ms(), u128::from_le_bytes(random))
}

async fn store_pack(cluster: &Cluster, id: Ulid, text: &str) -> Result<PackRef> {
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Data, layout::pack(id), 4096)?;
    let digest = cluster.keys().digest().frame(text.as_bytes());
    let _ = writer.push(&mut FrameEncoder::new(1)?, text.as_bytes(), digest)?;
    let object = writer.finish(Vec::new());
    cluster.put_once(&object).await?;
    Ok(PackRef { live: 1, ..object.as_pack(id.to_bytes(), PackKind::Data) })
}

/// A backup on its way: each step is what a real one does in this order.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) id: Ulid,
    session: Session,
    packs: BTreeMap<[u8; 16], PackRef>,
}

impl Writing {
    /// Announces itself, and takes all packs but one of the newest backup and all that interrupted ones left.
    pub(crate) async fn begin(cluster: &Cluster) -> Result<Self> {
        Self::begin_sharing(cluster, None).await
    }

    /// As [`Writing::begin`], and with `some` takes so much of the newest backup as its number decides.
    pub(crate) async fn begin_sharing(cluster: &Cluster, some: Option<u8>) -> Result<Self> {
        let id = cluster.env().new_id()?;
        let session = Session::begin(cluster, Purpose::Backup, id).await?;
        let mut writing = Self { id, session, packs: BTreeMap::new() };
        let listed = cluster.store().list(&cluster.path(layout::dir::SNAP)).await?;
        for object in listed.into_iter().rev() {
            let Some(id) = layout::id_of(&object.name) else { continue };
            match snapshot::open(cluster, id, Some(object.size)).await {
                Ok(parent) => {
                    let there: BTreeSet<String> =
                        cluster.store().list(&cluster.path(layout::dir::PACK)).await?.into_iter().map(|o| o.name).collect();
                    let packs = parent.packs().await?;
                    let known = packs.into_iter().filter(|p| there.contains(&cluster.path(&layout::pack(Ulid::from_bytes(p.id)))));
                    let shared = known.enumerate().filter(|(at, pack)| match some {
                        None => *at > 0,
                        Some(number) => pack.id[15].wrapping_mul(31).wrapping_add(number) % 2 == 0,
                    });
                    writing.packs.extend(shared.map(|(_, pack)| (pack.id, pack)));
                    break;
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for left in session::unfinished(cluster, &writing.session, Purpose::Backup).await? {
            for number in 0..4 {
                let id = pack_name(left, number);
                let Some(bytes) = cluster.store().get_if_exists(&cluster.path(&layout::pack(id))).await? else { break };
                let object = cluster.open(Kind::Data, &layout::pack(id), Some(bytes.len() as u64)).await?;
                let _ = object.frame(0).await?;
                let tail = pgvault_core::format::object::Tail::parse(&bytes[bytes.len() - 48..], bytes.len() as u64)
                    .map_err(Error::from)?;
                let pack = PackRef {
                    id: id.to_bytes(),
                    kind: PackKind::Data,
                    size: bytes.len() as u64,
                    footer_len: tail.footer_len,
                    frames: 1,
                    live: 1,
                    sha256: tail.sha256,
                };
                let _ = writing.packs.insert(pack.id, pack);
            }
        }
        Ok(writing)
    }

    /// What [`Writing::store`] stores under this number, and where.
    pub(crate) fn pack(&self, number: u32) -> (Ulid, String) {
        (pack_name(self.session.id, number), format!("{} {number}", self.id))
    }

    pub(crate) async fn store(&mut self, cluster: &Cluster, number: u32) -> Result<()> {
        let (id, text) = self.pack(number);
        let pack = store_pack(cluster, id, &text).await?;
        let _ = self.packs.insert(pack.id, pack);
        Ok(())
    }

    pub(crate) async fn commit(self, cluster: &Cluster, sketch: &Sketch) -> Result<Manifest> {
        let packs: Vec<PackRef> = self.packs.into_values().collect();
        // Tables in packs of their own, as a large backup has them.
        let limits = if sketch.segment.is_multiple_of(2) { Limits::default() } else { Limits { inline: 0, pack: 1 << 20 } };
        let tables = Tables::store(cluster, &packs, Vec::new(), limits).await?;
        let (start, now) = (sketch.segment * SEGMENT, cluster.env().now());
        let claims = sketch.claims.unwrap_or((now, now));
        let bad = BadPage { path: "base/1/2".into(), block: 3, reason: "checksum".into() };
        let manifest = Manifest {
            id: self.id,
            kind: BackupKind::Incremental,
            parent: None,
            source: SourceKind::Local,
            cluster: "main".into(),
            system_id: SystemId(7),
            server_version: "18.1".into(),
            major: 18,
            from_standby: false,
            timeline: TimelineId(sketch.timeline),
            start_lsn: Lsn(start + 40),
            stop_lsn: Lsn(start + 400),
            started_at: claims.0,
            finished_at: claims.1,
            wal_segment_size: u32::try_from(SEGMENT).unwrap().try_into().unwrap(),
            block_size: 8192,
            data_checksums: true,
            backup_label: String::new(),
            tablespaces: Vec::new(),
            bad_pages: if sketch.bad { vec![bad] } else { Vec::new() },
            labels: BTreeMap::new(),
            warnings: Vec::new(),
            census: None,
            files: 0,
            source_bytes: 0,
            changed_bytes: 0,
            stored_bytes: 0,
            objects_put: 1,
            restore_amplification: 1.0,
            version: "test".into(),
        };
        let object = Snapshot { manifest: &manifest, tables: &tables }.seal(cluster)?;
        self.session.ensure_live(cluster).await?;
        cluster.put_once(&object).await?;
        let _ = audit::record(cluster, Event::BackupCommitted { backup_id: self.id }).await;
        Ok(manifest)
    }
}

/// A whole backup, with the WAL that makes it consistent.
pub(crate) async fn backup(cluster: &Cluster, sketch: Sketch) -> Result<Ulid> {
    let mut writing = Writing::begin(cluster).await?;
    for number in 0..sketch.packs {
        writing.store(cluster, number).await?;
    }
    put_wal(cluster, sketch.timeline, sketch.segment).await?;
    Ok(writing.commit(cluster, &sketch).await?.id)
}

fn segment_name(timeline: u32, number: u64) -> SegmentName {
    SegmentName::new(TimelineId(timeline), WalSegNo(number), u32::try_from(SEGMENT).unwrap().try_into().unwrap())
}

/// Retention goes by names and times, and copies by what is sealed: no server would know such a segment.
pub(crate) async fn put_wal(cluster: &Cluster, timeline: u32, number: u64) -> Result<()> {
    let name = WalName::File(WalFileName::Segment(segment_name(timeline, number))).object();
    let text = format!("segment {number}").into_bytes();
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Wal, name, 4096)?;
    let _ = writer.push(&mut FrameEncoder::new(1)?, &text, cluster.keys().digest().frame(&text))?;
    cluster.put(&writer.finish(Vec::new())).await.map(drop)
}

pub(crate) async fn put_history(cluster: &Cluster, timeline: u32, text: &str) {
    let sealed = seal_file(cluster, WalFileName::History(TimelineId(timeline)), text.as_bytes()).unwrap();
    cluster.put_once(&sealed[0]).await.unwrap();
}

/// The segments that are there, by number.
pub(crate) async fn wal(cluster: &Cluster, timeline: u32) -> Vec<u64> {
    let folder = cluster.path(&layout::wal_timeline(TimelineId(timeline)));
    let size = u32::try_from(SEGMENT).unwrap().try_into().unwrap();
    let listed = cluster.store().list(&folder).await.unwrap();
    let number = |name: &str| match WalName::parse(name)? {
        WalName::File(WalFileName::Segment(segment)) => Some(segment.segment_number(size).unwrap().0),
        _ => None,
    };
    listed.iter().filter_map(|object| number(&object.name)).collect()
}

pub(crate) async fn names(cluster: &Cluster, folder: &str) -> BTreeSet<Ulid> {
    let listed = cluster.store().list(&cluster.path(folder)).await.unwrap();
    listed.iter().filter_map(|object| layout::id_of(&object.name)).collect()
}

pub(crate) async fn backups(cluster: &Cluster) -> BTreeSet<Ulid> {
    names(cluster, layout::dir::SNAP).await
}

/// The packs that a backup needs, each read to its last byte.
pub(crate) async fn read_all(cluster: &Cluster, id: Ulid) -> Result<BTreeSet<Ulid>> {
    let mut packs: BTreeSet<Ulid> = contents(cluster, id).await?.into_keys().collect();
    packs.extend(snapshot::open(cluster, id, None).await?.table_packs().map(|pack| Ulid::from_bytes(pack.id)));
    Ok(packs)
}

/// What a backup consists of: the bytes of each pack.
pub(crate) async fn contents(cluster: &Cluster, id: Ulid) -> Result<BTreeMap<Ulid, Vec<u8>>> {
    let mut packs = BTreeMap::new();
    for pack in snapshot::open(cluster, id, None).await?.packs().await? {
        let id = Ulid::from_bytes(pack.id);
        let object = cluster.open(Kind::Data, &layout::pack(id), Some(pack.size)).await?;
        let mut bytes = Vec::new();
        for number in 0..object.frame_count() {
            bytes.extend(object.frame(number).await?);
        }
        let _ = packs.insert(id, bytes);
    }
    Ok(packs)
}
