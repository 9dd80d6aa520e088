//! `cargo xtask soak`: hours of load and faults against `wal stream`. The run itself is in the package `pgvault-soak`, so that the other
//! commands need not wait for the engine to be compiled before they start.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};
use clap::Args;

use crate::run::{cargo, program, run, target};
use crate::{packages, postgres};

#[derive(Args)]
pub(crate) struct Soak {
    /// How long
    #[arg(long, default_value_t = 120)]
    minutes: u64,
    /// PostgreSQL version, 15 to 19
    #[arg(long, default_value_t = 15)]
    pg: u32,
    /// Seed of an earlier run, to have the same events
    #[arg(long)]
    seed: Option<u64>,
    /// Test a build of the dev profile, which is there sooner
    #[arg(long)]
    dev: bool,
    /// Leave the files
    #[arg(long)]
    keep: bool,
}

impl Soak {
    pub(crate) fn run(&self) -> Result<()> {
        packages::ensure_programs(&[("cc", "gcc")], "some dependencies compile C code")?;
        let folder = postgres::ensure(self.pg)?;
        println!("using {} from {}", postgres::version_line(&folder)?, folder.display());
        let profile = if self.dev { "dev" } else { "release" };
        println!("building pgvault ({profile})");
        run(cargo().args(["build", "--quiet", "--profile", profile, "-p", "pgvault-cli"]))?;
        run(cargo().args(["build", "--quiet", "-p", "pgvault-soak"]))?;
        let target = target();
        let built = if self.dev { "debug/pgvault" } else { "release/pgvault" };
        let mut soak = program(target.join("debug/pgvault-soak"), ["--program"]);
        soak.arg(target.join(built)).args(["--minutes", &self.minutes.to_string(), "--pg", &self.pg.to_string()]);
        soak.args(self.seed.map(|seed| format!("--seed={seed}"))).args(self.keep.then_some("--keep"));
        // Replaces this process: the soak owns the terminal, its signals and its exit code.
        let error = soak.env(format!("PGVAULT_PG_BIN_{}", self.pg), &folder).exec();
        Err(error).context("start target/debug/pgvault-soak")
    }
}
