//! `cargo xtask fuzz`: the parsers of the vault format and of PostgreSQL's files against inputs nobody wrote.

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::packages;
use crate::run::{program, run, run_quietly, succeeds, which, workspace};

#[derive(Args)]
pub(crate) struct Fuzz {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this target
    target: Option<String>,
}

impl Fuzz {
    pub(crate) fn run(&self) -> Result<()> {
        let root = workspace();
        if !root.join("fuzz/Cargo.toml").is_file() {
            bail!("there are no fuzz targets: fuzz/Cargo.toml does not exist");
        }
        packages::ensure_programs(&[("c++", "g++")], "libFuzzer is compiled from C++")?;
        ensure_nightly()?;
        if !succeeds(&mut program("cargo", ["fuzz", "--version"])) {
            println!("installing cargo-fuzz with cargo install");
            run(&mut program("cargo", ["install", "--locked", "cargo-fuzz"]))?;
        }
        let list = run_quietly(program("cargo", ["+nightly", "fuzz", "list"]).current_dir(&root))?;
        let targets: Vec<&str> =
            list.split_whitespace().filter(|name| self.target.as_deref().is_none_or(|wanted| wanted == *name)).collect();
        if targets.is_empty() {
            bail!(
                "no fuzz target named `{}`; there are: {}",
                self.target.as_deref().unwrap_or_default(),
                list.split_whitespace().collect::<Vec<_>>().join(" ")
            );
        }
        let limit = format!("-max_total_time={}", self.seconds);
        for target in &targets {
            println!("fuzz {target}: {} s", self.seconds);
            run(program("cargo", ["+nightly", "fuzz", "run", target, "--", &limit]).current_dir(&root))
                .with_context(|| format!("fuzz target {target}; the input is in fuzz/artifacts/{target}"))?;
        }
        println!("fuzz: {} targets, {} s each, no failure", targets.len(), self.seconds);
        Ok(())
    }
}

/// The sanitizers that cargo-fuzz needs are nightly options.
fn ensure_nightly() -> Result<()> {
    if succeeds(&mut program("cargo", ["+nightly", "--version"])) {
        return Ok(());
    }
    if which("rustup").is_none() {
        bail!("fuzzing needs a nightly toolchain, and there is no rustup to install one with");
    }
    println!("installing the nightly toolchain with rustup");
    run(&mut program("rustup", ["toolchain", "install", "nightly", "--profile", "minimal"]))
}
