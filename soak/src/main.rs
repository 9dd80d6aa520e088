//! A soak of `pgvault wal stream`: load, faults of every kind, and again and again a restore from the vault alone.
//!
//! `cargo xtask soak` builds pgvault and starts this. A primary and a standby, clients that write down what was acknowledged,
//! and a stream into a vault on a disk of its own. In turns the stream is asynchronous and commits wait for it. Events come from
//! a seed; after each the stream must catch up. When hosts are lost, the vault alone gives the new primary, and what is missing is
//! compared with what may be: nothing that had waited for the vault; of the rest nothing older than the flush interval, a PUT and
//! the outage.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a development tool talks to a terminal")]

mod events;
mod ledger;
mod pair;
mod place;
mod random;
mod report;
mod soak;
mod stream;
mod writers;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use pgvault_verify::process::Install;

#[derive(Debug, Parser)]
#[command(name = "pgvault-soak")]
struct Arguments {
    /// The pgvault to test
    #[arg(long)]
    program: PathBuf,
    /// How long
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// Major version of PostgreSQL
    #[arg(long)]
    pg: Option<u32>,
    /// Seed of another run, to have the same events
    #[arg(long)]
    seed: Option<u64>,
    /// Leave the files
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let seed = arguments.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish() % 1_000_000);
    let interrupted = Arc::new(AtomicBool::new(false));
    listen(interrupted.clone())?;
    let install = Install::find(arguments.pg, &[])?;
    // Parts are small and many; backups are what takes room.
    let place = place::Place::new(&arguments.program, arguments.keep, 4 + arguments.minutes / 8)?;
    println!("soak of {} minutes, seed {seed}", arguments.minutes);
    if !place.has_disk() {
        println!("without root there is no disk for the vault alone: it is never full, frozen or away");
    }
    let soak = soak::Soak::new(install, place, random::Random::new(seed), interrupted)?;
    soak.run(Duration::from_secs(arguments.minutes * 60))
}

/// The first signal ends the run in order: nothing is left behind.
fn listen(interrupted: Arc<AtomicBool>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime for signals")?;
    let guard = runtime.enter();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    drop(guard);
    let _ = std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        eprintln!("soak: interrupted, stopping everything");
        interrupted.store(true, Ordering::SeqCst);
    });
    Ok(())
}
