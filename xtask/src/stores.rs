//! `cargo xtask stores`: servers of object stores, for a developer and for `cargo xtask test`. They are in the package `pgvault-teststores`, so
//! that the other commands need not wait for it to be compiled before they start.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};

use crate::packages;
use crate::run::{cargo, program, run, target};

/// Where vaults of the tests can be; and the others that `install` and `run` know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Store {
    /// A directory
    Local,
    /// Microsoft's emulator of Azure Blob
    Azurite,
    /// Ceph's object gateway: S3 for real; needs root
    Rgw,
    /// An emulator of S3 that honours Object Lock
    Localstack,
    /// Our own stand-in for Google Cloud Storage
    Gcs,
    /// All of them, and those that pgvault refuses; one takes a quarter of an hour to build
    All,
}

impl Store {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Azurite => "azurite",
            Self::Rgw => "rgw",
            Self::Localstack => "localstack",
            Self::Gcs => "gcs",
            Self::All => "all",
        }
    }

    /// The stores that these mean; a directory is always among them.
    pub(crate) fn expand(stores: &[Self]) -> Vec<Self> {
        let all = [Self::Local, Self::Azurite, Self::Rgw, Self::Localstack, Self::Gcs];
        all.into_iter().filter(|store| *store == Self::Local || stores.contains(store) || stores.contains(&Self::All)).collect()
    }
}

#[derive(Args)]
pub(crate) struct Stores {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Install servers: azurite, rgw, localstack, s3rver, s3s-fs, garage
    Install {
        #[arg(required = true)]
        stores: Vec<String>,
    },
    /// Start servers, show how to reach them, and end them at Ctrl-C
    Run {
        #[arg(required = true)]
        stores: Vec<String>,
    },
}

impl Stores {
    pub(crate) fn run(&self) -> Result<()> {
        let (what, stores) = match &self.what {
            What::Install { stores } => ("install", stores),
            What::Run { stores } => ("run", stores),
        };
        // Replaces this process: the servers own the terminal and its signals.
        let error = program(built()?, [what]).args(stores).exec();
        Err(error).context("start pgvault-stores")
    }
}

/// Installs what these stores need.
pub(crate) fn install(stores: &[Store]) -> Result<()> {
    let mut names: Vec<&str> = Store::expand(stores).into_iter().map(Store::name).collect();
    if stores.contains(&Store::All) {
        names.extend(["s3rver", "s3s-fs", "garage"]);
    }
    run(program(built()?, ["install"]).args(names))
}

fn built() -> Result<PathBuf> {
    packages::ensure_programs(&[("cc", "gcc")], "some dependencies compile C code")?;
    run(cargo().args(["build", "--quiet", "-p", "pgvault-teststores"]))?;
    Ok(target().join(BUILT))
}

const BUILT: &str = "debug/pgvault-stores";

/// Servers that end with this value, and with this process.
pub(crate) struct Servers {
    child: Child,
    variables: Vec<(String, String)>,
}

impl Servers {
    /// Starts them, which may install them first.
    pub(crate) fn start(names: &[&str]) -> Result<Self> {
        println!("starting {}", names.join(", "));
        // With all that is built for tests: of one package alone, the features of others would differ, and they would be compiled twice.
        packages::ensure_programs(&[("cc", "gcc")], "some dependencies compile C code")?;
        run(cargo().args(["test", "--quiet", "--workspace", "--no-run"]))?;
        let mut command = program(target().join(BUILT), ["serve"]);
        let child = command.args(names).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start pgvault-stores")?;
        let mut servers = Self { child, variables: Vec::new() };
        let said = servers.child.stdout.take().context("pgvault-stores has no output")?;
        for line in BufReader::new(said).lines() {
            match line.context("read what pgvault-stores says")? {
                line if line == "ready" => return Ok(servers),
                line => match line.split_once('=').filter(|(name, _)| name.starts_with("PGVAULT_TEST_STORE_")) {
                    Some((name, value)) => servers.variables.push((name.to_owned(), value.to_owned())),
                    None => println!("{line}"),
                },
            }
        }
        bail!("a server could not be started: {}", names.join(", "))
    }

    /// Tells tests where the servers are.
    pub(crate) fn tell<'a>(&self, tests: &'a mut Command) -> &'a mut Command {
        tests.envs(self.variables.iter().map(|(name, value)| (name, value)))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_named_or_all() {
        let names = |stores: &[Store]| Store::expand(stores).into_iter().map(Store::name).collect::<Vec<_>>();
        assert_eq!(names(&[]), ["local"]);
        assert_eq!(names(&[Store::Gcs, Store::Rgw]), ["local", "rgw", "gcs"]);
        assert_eq!(names(&[Store::All]), ["local", "azurite", "rgw", "localstack", "gcs"]);
        assert_eq!(Store::from_str("rgw", false), Ok(Store::Rgw));
    }
}
