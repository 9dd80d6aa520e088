//! R2: whatever request of a stream fails, in whatever way, the server is never told that something is durable which is not.
//!
//! A real server, the engine's stream in this process, and a store that fails at its k-th call, for every k.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use age::secrecy::ExposeSecret;
use object_store::memory::InMemory;
use pgvault_core::ErrorKind;
use pgvault_core::crypto::slot::{Unlock, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, Lsn, SegmentSize, TimelineHistory, TimelineId};
use pgvault_core::store::{Store, StoreOptions};
use pgvault_core::testing::{Fault, FaultyStore};
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::vault::{Cluster, Vault};
use pgvault_core::wal::catalog::Catalog;
use pgvault_core::wal::stream::{StreamOptions, stream};
use pgvault_verify::process::{Install, Server};

const MIB: u64 = 1 << 20;

fn quick() -> StoreOptions {
    StoreOptions {
        attempts: 2,
        request_timeout: Duration::from_millis(300),
        backoff: Duration::from_millis(5),
        ..StoreOptions::default()
    }
}

/// The same objects twice: through the store that fails, and directly.
struct Stores {
    faulty: FaultyStore,
    cluster: Cluster,
    direct: Cluster,
}

async fn stores(name: &ClusterName) -> Stores {
    let identity = age::x25519::Identity::generate();
    let unlock = Unlock::Identity(identity.to_string().expose_secret().to_owned().into());
    let inner = Arc::new(InMemory::new());
    let (vault, _) = Vault::create(Store::new(inner.clone(), "memory", quick()), Env::default()).await.unwrap();
    assert!(vault.create_cluster(name, &[Wrap::Recipient(identity.to_public().to_string())]).await.unwrap());
    let direct = vault.unlock(name, &unlock).await.unwrap();
    let faulty = FaultyStore::new(inner);
    let vault = Vault::open(Store::new(Arc::new(faulty.clone()), "faulty", quick()), Env::default()).await.unwrap();
    let cluster = vault.unlock(name, &unlock).await.unwrap();
    Stores { faulty, cluster, direct }
}

fn sql(server: &Server, text: &str) -> String {
    server.psql(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The end of what is in the store without a hole, from the first segment that is there.
async fn stored(cluster: &Cluster, size: SegmentSize) -> Lsn {
    let catalog = Catalog::load(cluster, size, Lsn::INVALID).await.unwrap();
    let Some(objects) = catalog.timelines.get(&TimelineId(1)) else { return Lsn::INVALID };
    let Some(first) = objects.present().into_iter().next() else { return Lsn::INVALID };
    let start = first.segment_number(size).unwrap().start(size);
    catalog.contiguous_end(&TimelineHistory::root(TimelineId(1)), start)
}

#[tokio::test(flavor = "multi_thread")]
async fn r2_a_fault_at_every_request_of_a_stream_confirms_nothing_that_is_not_stored() {
    let size = SegmentSize::try_from(1 << 20).unwrap();
    let server = Server::builder(&Install::for_tests().unwrap())
        .wal_segment_mib(1)
        .config("shared_buffers = 16MB\nwal_level = replica\nmax_wal_senders = 5\nautovacuum = off\nwal_keep_size = 256MB")
        .start()
        .unwrap();
    let _ = sql(&server, "create table t(id bigserial, pad text)");
    let system_id = sql(&server, "select system_identifier from pg_control_system()").parse().unwrap();
    let name = ClusterName::new("main", system_id).unwrap();
    let (mut cases, mut looks) = (0, 0);
    let full = std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1");
    for fault in Fault::ALL {
        for onwards in [false, true] {
            // What `every` leaves out, another fault has; all of them take half an hour.
            let every = if full { 1 } else { 9 };
            let shift = cases;
            for at in (1..=20usize).filter(|at| (at + shift).is_multiple_of(every)) {
                let label = format!("{fault:?} at call {at}{}", if onwards { " and after" } else { "" });
                let stores = stores(&name).await;
                stores.faulty.inject(fault, at, onwards);
                let connection = ConnInfo::parse(&server.conninfo(), &|_| None).unwrap();
                let (options, mut told) = StreamOptions::new(connection, "faults");
                let options = StreamOptions { flush_interval: Duration::from_millis(100), synchronous: at % 2 == 0, ..options };
                let state = options.state.subscribe();
                let (stop, stopped) = tokio::sync::watch::channel(false);
                let launch = || {
                    let (cluster, options, stopped) = (stores.cluster.clone(), options.clone(), stopped.clone());
                    tokio::spawn(async move { stream(&cluster, &options, stopped).await })
                };
                let mut streaming = launch();
                let began = Instant::now();
                let mut healed = false;
                let mut end = Lsn::INVALID;
                loop {
                    if end.is_invalid() {
                        let _ =
                            sql(&server, "insert into t(pad) select repeat(md5(random()::text), 30) from generate_series(1, 700)");
                    }
                    // Told first, stored second: what is stored only grows.
                    let told = sql(
                        &server,
                        "select coalesce(max(greatest(r.write_lsn, r.flush_lsn, r.replay_lsn)), '0/0') from pg_stat_replication r",
                    );
                    let told: Lsn = told.parse().unwrap();
                    let there = stored(&stores.direct, size).await;
                    assert!(told <= there, "{label}: the server was told {told}, there is WAL up to {there}");
                    // A stream that has just begun stands where the slot does, at a segment's start.
                    let durable = state.borrow().durable;
                    let there = stored(&stores.direct, size).await;
                    assert!(
                        durable <= there || (there.is_invalid() && durable.0.is_multiple_of(MIB)),
                        "{label}: {durable}, {there}"
                    );
                    looks += 1;
                    if !healed && began.elapsed() > Duration::from_millis(900) {
                        stores.faulty.heal();
                        healed = true;
                        end = sql(&server, "select pg_current_wal_flush_lsn()").parse().unwrap();
                    }
                    if healed && there >= end {
                        break;
                    }
                    if streaming.is_finished() {
                        // What trying again does not help ends it; whoever supervises it starts it again.
                        let error = (&mut streaming).await.unwrap().unwrap_err();
                        assert_eq!((fault, error.kind()), (Fault::Deny, ErrorKind::Failed), "{label}: {error}");
                        streaming = launch();
                    }
                    assert!(began.elapsed() < Duration::from_secs(60), "{label}: {there} of {end}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                stop.send(true).unwrap();
                streaming.await.unwrap().unwrap_or_else(|error| panic!("{label}: {error}"));
                while told.try_recv().is_ok() {}
                let _ = sql(&server, "select pg_drop_replication_slot('faults')");
                cases += 1;
            }
        }
    }
    eprintln!("{cases} cases, {looks} looks");
    assert!(looks > cases * 3);
}
