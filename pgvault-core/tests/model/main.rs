//! Several writers, pruners, a restorer and somebody with holds on one vault, and programs that copy it to another, which has pruners,
//! a policy and holds of its own. All are interleaved at every request, over stores that fail, on a clock that jumps: random histories,
//! each from a seed that is printed when it finds something.
//!
//! Whatever the history, of both vaults:
//!
//! - every backup that is listed has all its packs and its WAL, whatever became of it in the other vault, and in the end each is what
//!   its writer stored, byte for byte;
//! - what the window needs, what is held, as a backup or as a stretch of time, and what is being read is there, with its WAL;
//! - when time passes without writers, every orphan is collected, and no backup is; then a copy ships all that is missing.
//!
//! `PGVAULT_TEST_SCHEDULES=n` runs so many, from `PGVAULT_TEST_FIRST=n` on, and `PGVAULT_TEST_SEED=n` only that one.

#![allow(clippy::unwrap_used, clippy::print_stderr, dead_code, reason = "a test, and its helpers panic like it")]

#[path = "../retention/place.rs"]
mod place;
mod programs;
mod turnstile;
mod witness;
mod world;

use std::ops::Range;

/// The seeds of this run.
fn seeds(quick: u64) -> Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("PGVAULT_TEST_SEED") {
        return seed..seed + 1;
    }
    let full = std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1");
    let first = number("PGVAULT_TEST_FIRST").unwrap_or(0);
    first..first + number("PGVAULT_TEST_SCHEDULES").unwrap_or(if full { 10_000 } else { quick })
}

#[test]
fn no_history_of_writers_and_pruners_loses_a_byte_or_keeps_an_orphan() {
    let (began, seeds) = (std::time::Instant::now(), seeds(60));
    let count = seeds.end - seeds.start;
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let told = std::sync::Mutex::new(programs::Told::default());
    // Each history has a runtime of its own, so that its seed alone decides.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let _ = scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if !seeds.contains(&seed) {
                        break;
                    }
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    let one = runtime.block_on(world::history(seed));
                    told.lock().unwrap().add(&one);
                }
            });
        }
    });
    let told = told.into_inner().unwrap();
    eprintln!("{count} histories in {:.1} s: {told:?}", began.elapsed().as_secs_f64());
    // Histories in which nothing happens would show nothing.
    assert!(count < 60 || told.is_busy(), "{told:?}");
}
