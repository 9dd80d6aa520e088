//! `cargo xtask bench stores`: what a network and a store cost, beside a directory.
//!
//! The same build backs up and restores one cluster into a directory and into an S3 server on this machine, each of whose requests
//! takes some milliseconds longer. Server and network take their share of the same processors, and it is printed: where they
//! are a machine of their own, that much is gained.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use pgvault_provision::registry::S3S_FS;

use super::cluster::{Account, Cluster};
use super::report::judge;
use super::{delay, ensure_space, measure, s3, tools};
use crate::run::run_quietly;

#[derive(Args)]
pub(crate) struct Stores {
    /// Size of the generated cluster
    #[arg(long, default_value_t = 2)]
    gib: u32,
    /// Times that everything is run
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Milliseconds that each request to the S3 server takes longer
    #[arg(long, default_value_t = 20)]
    latency_ms: u64,
    /// Folder to work in; a cluster of the same size that an earlier --keep left there is used again
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-bench")]
    folder: PathBuf,
    /// Instead: take so many backups, a little changed between any two, and count the requests of a restore of the last
    #[arg(long)]
    snapshots: Option<u32>,
    /// Leave the generated cluster for the next run
    #[arg(long)]
    keep: bool,
}

/// Requests of a restore for each 32 MiB that the vault stores.
const REQUESTS: f64 = 3.0;

impl Stores {
    pub(super) fn run(&self) -> Result<()> {
        let bin = crate::postgres::ensure(15)?;
        let (built, s3s_fs) = (super::build()?, S3S_FS.built()?);
        ensure_space(&self.folder, u64::from(self.gib) << 30)?;
        let cluster = Cluster::start(&self.folder, &bin, self.gib, Account::find()?)?;
        let _ = fs::remove_dir_all(cluster.root().join("s3"));
        let server = s3::Server::start(&s3s_fs, cluster.root())?;
        let slow = delay::start(server.address(), Duration::from_millis(self.latency_ms))?;
        let near = "directory";
        let far = format!("s3-{}ms", self.latency_ms);
        let tools = [
            tools::pgvault(&cluster, near, &built, tools::Vault::directory(&cluster, near))?,
            tools::pgvault(&cluster, "s3", &built, tools::Vault::s3(&server, "s3", server.address()))?,
            tools::pgvault(&cluster, &far, &built, tools::Vault::s3(&server, &far, slow))?,
        ];
        let report = match self.snapshots {
            Some(snapshots) => requests(&cluster, &tools[1], snapshots).map(|()| None),
            None => measure(&cluster, &tools, self.rounds.max(1)).map(Some),
        };
        let taken = server.cpu_time();
        drop((tools, server));
        cluster.stop()?;
        if !self.keep {
            fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        }
        if let Some(report) = report? {
            report.print();
        }
        println!("the S3 server took {:.1} s of the processors in all", taken?.as_secs_f64());
        Ok(())
    }
}

/// Takes a vault with many snapshots, and counts what restoring the last of them asks for.
fn requests(cluster: &Cluster, tool: &tools::Tool, snapshots: u32) -> Result<()> {
    tool.prepare(cluster)?;
    for number in 0..snapshots {
        if number > 0 {
            let _ = cluster.sql("update pgbench_accounts set abalance = abalance + 1 where random() < 0.001")?;
            let _ = cluster.sql("checkpoint")?;
        }
        let _ = tool.backup(cluster)?;
    }
    let stored = tools::size_without_wal(&tool.store)?;
    let target = cluster.folder("restored")?;
    let restore = tool.restore.as_ref().context("the tool restores")?;
    let said = run_quietly(restore(cluster, &target)?.args(["--output", "json"]))?;
    let said: serde_json::Value = serde_json::from_str(said.trim().lines().last().unwrap_or_default())?;
    let count = |name: &str| said["requests"][name].as_f64().with_context(|| format!("no number of {name}: {said}"));
    let (get, head, list) = (count("get")?, count("head")?, count("list")?);
    #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
    let units = |bytes: u64| bytes as f64 / f64::from(32 << 20);
    let each = (get + head + list) / units(stored.bytes);
    println!(
        "{snapshots} snapshots: {:.0} MiB in {} objects; the restore of the last read {:.0} MiB with {get} GET, {head} HEAD, {list} LIST",
        units(stored.bytes) * 32.0,
        stored.objects,
        count("bytes_received")? / f64::from(1 << 20)
    );
    judge(each < REQUESTS, &format!("{each:.2} requests for each 32 MiB stored; under {REQUESTS} wanted"));
    fs::remove_dir_all(&target).with_context(|| format!("remove {}", target.display()))
}
