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
use super::{delay, ensure_space, measure, s3, tools};

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
    /// Leave the generated cluster for the next run
    #[arg(long)]
    keep: bool,
}

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
        let report = measure(&cluster, &tools, self.rounds.max(1));
        let taken = server.cpu_time();
        drop((tools, server));
        cluster.stop()?;
        if !self.keep {
            fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        }
        report?.print();
        println!("the S3 server took {:.1} s of the processors in all", taken?.as_secs_f64());
        Ok(())
    }
}
