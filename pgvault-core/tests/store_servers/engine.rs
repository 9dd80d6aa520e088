//! WAL, backups and restores over a connection on which anything may go wrong.

use std::time::Duration;

use futures::{StreamExt, stream};
use pgvault_core::store::StoreOptions;
use pgvault_core::testing::Dice;
use pgvault_core::testing::proxy::{Canned, Speed, Wire};
use pgvault_teststores::Kind;

use crate::runtime;
use crate::wire::Behind;
use crate::world::{Case, Told, World};

/// What may pass, of each sort one.
fn faults() -> Vec<Wire> {
    vec![
        Wire::Reset,
        Wire::Garbage,
        Wire::Blackhole,
        Wire::ResetRequest { after: 3000 },
        Wire::LoseAnswer,
        Wire::ResetAnswer { after: 300 },
        Wire::CutAnswer { after: 30_000 },
        Wire::StallAnswer { after: 300 },
        Wire::HalfHeaders,
        Wire::Duplicate,
        Wire::Answer(Canned::s3(503, "SlowDown")),
        Wire::Answer(Canned::empty(429)),
        Wire::AnswerAfter(Canned::s3(500, "InternalError")),
        Wire::AnswerAfter(Canned::s3(200, "InternalError")),
    ]
}

/// One run of the program with a fault in so many of a thousand requests.
async fn run(kind: Kind, world: &World, seed: u64, permille: usize) -> Told {
    let options = StoreOptions {
        attempts: 4,
        request_timeout: Duration::from_secs(4),
        backoff: Duration::from_millis(5),
        first_byte_timeout: Duration::from_millis(500),
        idle_timeout: Duration::from_millis(500),
        ..StoreOptions::default()
    };
    let behind = Behind::with(kind, options).await;
    for (name, bytes) in &world.base {
        behind.direct.put_once(name, bytes.clone()).await.unwrap();
    }
    behind.proxy.speed(Speed { latency: Duration::from_millis(1), bytes_per_second: None });
    behind.proxy.random(seed, permille, &faults());
    let why = format!("{kind}, seed {seed}, {permille} of 1000");
    let mut case = Case { world, store: behind.through.clone(), dice: Dice::new(!seed), told: Told::default(), why };
    case.run(8).await;
    assert!(!behind.proxy.happened().is_empty(), "{}: {}", case.why, behind.proxy);
    behind.proxy.heal();
    case.afterwards(behind.direct.clone()).await;
    behind.clear();
    case.told
}

fn runs(kind: Kind, quick: u64, full: u64) {
    let all = std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1");
    runtime().block_on(async {
        let world = World::new().await;
        let (mut done, mut errors, mut backups) = (0, 0, 0);
        let seeds = 0..if all { full } else { quick };
        let permille = |seed: u64| [30, 100, 300][usize::try_from(seed % 3).unwrap()];
        let mut cases = stream::iter(seeds).map(|seed| run(kind, &world, seed, permille(seed))).buffer_unordered(5);
        while let Some(told) = cases.next().await {
            done += told.done;
            errors += told.errors;
            backups += told.backups.len();
        }
        assert!(done > errors && backups > 0, "{kind}: {done} done, {errors} failed, {backups} backups");
    });
}

/// Against a server that looks at signatures and lengths as Amazon's does.
#[test]
fn whatever_goes_wrong_on_the_way_to_ceph_what_is_listed_restores() {
    runs(Kind::Rgw, 12, 120);
}

/// Another server words its refusals in another way.
#[test]
#[ignore = "needs s3s-fs, which `cargo xtask test --stores all` builds"]
fn whatever_goes_wrong_on_the_way_to_s3s_what_is_listed_restores() {
    runs(Kind::S3sFs, 12, 120);
}
