//! Development commands. `cargo xtask --help` lists them; each has its own file.
//!
//! A fresh Debian machine with Rust and a C compiler is enough to start from: a command installs what it needs, says so
//! before it does, and where it may not install it prints what is missing and ends with status 1.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a development tool talks to a terminal")]

mod bench;
mod demo;
mod fuzz;
mod postgres;
mod setup;
mod soak;
mod stores;
mod test;

use clap::{Parser, Subcommand};
use pgvault_provision::{packages, run};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development commands of pgvault")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build pgvault and run `pgvault demo` against a throwaway PostgreSQL
    Demo(demo::Demo),
    /// Compare backup and restore with pgBackRest and `pg_basebackup` on one generated cluster
    Bench(bench::Bench),
    /// Run everything that CI runs
    Test(test::Test),
    /// Run the fuzz targets, each for a given time
    Fuzz(fuzz::Fuzz),
    /// Hours of load, faults and lost servers against `wal stream`, and restores from the vault alone
    Soak(soak::Soak),
    /// Servers of object stores: install them, or run them
    Stores(stores::Stores),
    /// Install what the other commands need, and show where it is
    Setup(setup::Setup),
}

fn main() -> std::process::ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(demo) => demo.run(),
        Command::Bench(bench) => bench.run(),
        Command::Test(test) => test.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Soak(soak) => soak.run(),
        Command::Stores(stores) => stores.run(),
        Command::Setup(setup) => setup.run(),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
