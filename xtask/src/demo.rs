//! `cargo xtask demo`: from a clone to a proven restore with one command.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};
use clap::Args;

use crate::run::{cargo, program, run, target};
use crate::{packages, postgres};

#[derive(Args)]
pub(crate) struct Demo {
    /// Passed on to `pgvault demo`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<()> {
        packages::ensure_programs(&[("cc", "gcc")], "some dependencies compile C code")?;
        let (version, folder) = postgres::ensure_any()?;
        println!("using {} from {}", postgres::version_line(&folder)?, folder.display());
        println!("building pgvault (release)");
        run(cargo().args(["build", "--release", "-p", "pgvault-cli"]))?;
        let target = target();
        // Replaces this process: the demo owns the terminal, its signals and its exit code.
        let error = program(target.join("release/pgvault"), ["demo"])
            .args(&self.arguments)
            .env(format!("PGVAULT_PG_BIN_{version}"), &folder)
            .exec();
        Err(error).context("start target/release/pgvault")
    }
}
