//! `cargo xtask bench`: pgvault beside pgBackRest and `pg_basebackup`, on one cluster, in turns.
//!
//! A time means little on a machine whose load changes, so every round runs every tool, each round in another order, and
//! what counts is the ratio of two tools within a round. The budgets are those of the design (docs/benchmarks.md).

mod cluster;
mod days;
mod delay;
mod measure;
mod memory;
mod replay;
mod report;
mod s3;
mod stores;
mod tools;
mod wal;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::packages::ensure_programs;
use crate::run::{cargo, program, run, run_quietly, target};
use cluster::Cluster;
use report::{Report, Row};
use tools::Tool;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    other: Option<Other>,
    /// Size of the generated cluster
    #[arg(long, default_value_t = 4)]
    gib: u32,
    /// Times that every tool is run
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Another build of pgvault to run in the same turns, to measure a change against it
    #[arg(long, value_name = "NAME=FILE")]
    also: Vec<String>,
    /// Run only pgvault: for work on pgvault itself
    #[arg(long)]
    no_peers: bool,
    /// Folder to work in; a cluster of the same size that an earlier --keep left there is used again
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-bench")]
    folder: PathBuf,
    /// Leave the generated cluster for the next run
    #[arg(long)]
    keep: bool,
}

/// What else is measured.
#[derive(Subcommand)]
enum Other {
    /// Compare a month of incrementals with pgBackRest's block incrementals
    Days(days::Days),
    /// Print the memory that a million files and a terabyte of maps take
    Memory(memory::Memory),
    /// Compare recovery fed by `wal fetch` with recovery fed by `cp`
    Replay(replay::Replay),
    /// Compare backup and restore in an S3 server behind a network with latency with those in a directory
    Stores(stores::Stores),
    /// Compare WAL archiving and synchronous commits with pgBackRest and `pg_receivewal`
    Wal(wal::WalBench),
}

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        match &self.other {
            Some(Other::Days(days)) => return days.run(),
            Some(Other::Memory(memory)) => return memory.run(),
            Some(Other::Replay(replay)) => return replay.run(),
            Some(Other::Stores(stores)) => return stores.run(),
            Some(Other::Wal(bench)) => return bench.run(),
            None => {}
        }
        let rounds = self.rounds.max(1);
        let bin = crate::postgres::ensure(15)?;
        if !self.no_peers {
            ensure_programs(&[("pgbackrest", "pgbackrest")], "pgvault is measured against it")?;
        }
        let built = build()?;
        ensure_space(&self.folder, u64::from(self.gib) << 30)?;
        let account = cluster::Account::find()?;
        let cluster = Cluster::start(&self.folder, &bin, self.gib, account)?;
        let pgvault = |name: &str, binary: &Path| tools::pgvault(&cluster, name, binary, tools::Vault::directory(&cluster, name));
        let mut tools = vec![pgvault("pgvault", &built)?];
        for also in &self.also {
            let (name, file) = also.split_once('=').context("--also takes NAME=FILE")?;
            tools.push(pgvault(name, Path::new(file))?);
        }
        if !self.no_peers {
            tools.push(tools::pgvault_remote(&cluster, &built)?);
            tools.push(tools::pgbackrest(&cluster, None)?);
            tools.push(tools::pg_basebackup(&cluster));
        }
        let report = measure(&cluster, &tools, rounds);
        drop(tools);
        cluster.stop()?;
        if !self.keep {
            fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        }
        report?.print();
        Ok(())
    }
}

/// The program that is measured.
fn build() -> Result<PathBuf> {
    println!("building pgvault with the release profile");
    run(cargo().args(["build", "--release", "--quiet", "--package", "pgvault-cli"]))?;
    Ok(target().join("release/pgvault"))
}

fn measure(cluster: &Cluster, tools: &[Tool], rounds: u32) -> Result<Report> {
    let mut report = Report::new(cluster.facts()?, tools.iter().map(|tool| tool.name.clone()).collect());
    for round in 0..rounds as usize {
        for turn in 0..tools.len() {
            // Another tool goes first each round; all of a round see about the same machine.
            let number = (round + turn) % tools.len();
            let tool = &tools[number];
            tool.prepare(cluster)?;
            let before = tool.stored()?;
            settle()?;
            let measured = tool.backup(cluster)?;
            let after = tool.stored()?;
            report.backup(number, Row { measured, bytes: after.bytes - before.bytes, objects: after.objects - before.objects });
        }
        for turn in 0..tools.len() {
            let number = (round + turn) % tools.len();
            let tool = &tools[number];
            if tool.restore.is_none() {
                continue;
            }
            let target = cluster.folder("restored")?;
            settle()?;
            let measured = tool.restore(cluster, &target)?;
            let bytes = tools::size_of(&target)?.bytes;
            report.restore(number, Row { measured, bytes, objects: 0 });
            fs::remove_dir_all(&target)?;
        }
        for tool in tools {
            tool.clear()?;
        }
    }
    Ok(report)
}

/// What the tool before left to be written would be paid by the next one.
fn settle() -> Result<()> {
    run(&mut program("sync", [] as [&str; 0]))
}

/// The cluster, three backups, one restored copy and some WAL exist at the same time.
fn ensure_space(folder: &Path, cluster: u64) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let stat = rustix::fs::statvfs(folder).with_context(|| format!("look at the file system of {}", folder.display()))?;
    let (free, needed) = (stat.f_bavail * stat.f_frsize, cluster * 5);
    if free < needed {
        bail!("{} has {} GiB free; this benchmark needs {}", folder.display(), free >> 30, needed >> 30);
    }
    Ok(())
}

/// One line about the machine.
fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = run_quietly(&mut program("uname", ["-r"])).unwrap_or_default();
    format!("{} x {}, Linux {}", cores, model.as_deref().unwrap_or("unknown CPU"), kernel.trim())
}
