//! How long a commit takes that waits for a receiver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::super::cluster::Cluster;
use super::super::tools;
use super::archive::{Ended, wait_for};
use super::{empty, pgvault, store};
use crate::run::run_quietly;

/// Numbers of clients that insert at the same time.
pub(super) const CLIENTS: [u32; 2] = [1, 16];

/// Commits of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Latency {
    pub(super) clients: u32,
    /// Milliseconds.
    pub(super) median: f64,
    pub(super) p99: f64,
    pub(super) per_second: f64,
    /// Objects that were stored for each commit.
    pub(super) puts: f64,
}

/// Who is waited for; nobody without a command.
struct Receiver {
    name: String,
    /// As the server knows it.
    application: &'static str,
    make: Option<Make>,
}

type Make = Box<dyn Fn(&Cluster) -> Result<Command>>;

const SLOT: &str = "pgvault";

pub(super) fn measure(
    cluster: &Cluster,
    builds: &[(String, PathBuf)],
    rounds: u32,
    seconds: u32,
) -> Result<Vec<(String, Vec<Latency>)>> {
    let script = tools::written(cluster, "insert.sql", "insert into commits (pad) values (md5(random()::text));\n")?;
    let mut receivers = Vec::new();
    for (name, _) in builds {
        let (init, run) = (name.clone(), name.clone());
        let make = move |cluster: &Cluster| {
            let _ = run_quietly(&mut pgvault(cluster, &init, ".sync", &["init"]))?;
            Ok(pgvault(cluster, &run, ".sync", &["wal", "stream"]))
        };
        receivers.push(Receiver { name: name.clone(), application: "pgvault", make: Some(Box::new(make)) });
    }
    let name = "pg_receivewal";
    let make = move |cluster: &Cluster| {
        let mut command = cluster.program(name);
        command
            .args(["-U", "postgres", "-h"])
            .arg(cluster.root())
            .args(["--synchronous", "-S", SLOT, "-D"])
            .arg(store(cluster, name));
        Ok(command)
    };
    receivers.push(Receiver { name: name.to_owned(), application: "pg_receivewal", make: Some(Box::new(make)) });
    receivers.push(Receiver { name: "nobody".to_owned(), application: "", make: None });
    let mut all: Vec<(String, Vec<Latency>)> = receivers.iter().map(|receiver| (receiver.name.clone(), Vec::new())).collect();
    for round in 0..rounds as usize {
        for turn in 0..receivers.len() {
            let number = (round + turn) % receivers.len();
            let latencies = receivers[number].measure(cluster, &script, seconds);
            all[number].1.extend(latencies.with_context(|| format!("commit with {}", receivers[number].name))?);
        }
    }
    Ok(all)
}

impl Receiver {
    fn measure(&self, cluster: &Cluster, script: &Path, seconds: u32) -> Result<Vec<Latency>> {
        let store = empty(cluster, &self.name)?;
        let _ = cluster.sql("CHECKPOINT")?;
        let mut child = None;
        if let Some(make) = &self.make {
            let _ = cluster.sql(&format!("SELECT pg_create_physical_replication_slot('{SLOT}', true)"))?;
            let log = fs::File::create(cluster.root().join(format!("{}.log", self.name)))?;
            let mut command = make(cluster)?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            child = Some(Ended(command.spawn().context("start it")?));
        }
        Self::name_it(cluster, self.application)?;
        if child.is_some() {
            let attached = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'";
            wait_for(|| cluster.sql(attached).is_ok_and(|count| count == "1"))?;
        }
        let latencies = CLIENTS.iter().map(|clients| self.insert(cluster, script, *clients, seconds, &store)).collect();
        Self::name_it(cluster, "")?;
        if child.take().is_some() {
            wait_for(|| cluster.sql("SELECT count(*) FROM pg_replication_slots WHERE active").is_ok_and(|count| count == "0"))?;
            let _ = cluster.sql(&format!("SELECT pg_drop_replication_slot('{SLOT}')"))?;
        }
        fs::remove_dir_all(store)?;
        latencies
    }

    fn name_it(cluster: &Cluster, name: &str) -> Result<()> {
        let _ = cluster.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"))?;
        cluster.sql("SELECT pg_reload_conf()").map(drop)
    }

    #[expect(clippy::cast_precision_loss, reason = "printed with three digits")]
    fn insert(&self, cluster: &Cluster, script: &Path, clients: u32, seconds: u32, store: &Path) -> Result<Latency> {
        let logs = cluster.folder("pgbench.logs")?;
        let bench = |seconds: u32, log: bool| {
            let mut command = cluster.program("pgbench");
            command.args(["-n", "-M", "prepared", "-U", "postgres", "-h"]).arg(cluster.root()).arg("-f").arg(script);
            command.args(["-c", &clients.to_string(), "-j", &clients.min(2).to_string(), "-T", &seconds.to_string()]);
            if log {
                command.arg("-l").arg(format!("--log-prefix={}/log", logs.display()));
            }
            run_quietly(command.arg("postgres"))
        };
        let _ = bench(1, false)?;
        let before = tools::size_of(store)?;
        let wal_before = wal_files(store);
        let _ = bench(seconds, true)?;
        let puts = (tools::size_of(store)?.objects - before.objects) + (wal_files(store) - wal_before);
        let mut times: Vec<f64> = Vec::new();
        for entry in fs::read_dir(&logs)?.flatten() {
            for line in fs::read_to_string(entry.path())?.lines() {
                let micros = line.split(' ').nth(2).and_then(|field| field.parse::<f64>().ok());
                times.push(micros.with_context(|| format!("not a line of pgbench's log: {line}"))? / 1000.0);
            }
        }
        times.sort_by(f64::total_cmp);
        if times.is_empty() {
            bail!("pgbench has committed nothing");
        }
        let latency = Latency {
            clients,
            median: times[times.len() / 2],
            p99: times[times.len() * 99 / 100],
            per_second: times.len() as f64 / f64::from(seconds),
            puts: puts as f64 / times.len() as f64,
        };
        println!("  {:14} {clients:2} clients: median {:7.2} ms, p99 {:7.2} ms", self.name, latency.median, latency.p99);
        Ok(latency)
    }
}

/// Files below folders called `wal`, which [`tools::size_of`] does not count.
fn wal_files(folder: &Path) -> u64 {
    let mut count = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let inner = entry.path();
            count +=
                if entry.file_name() == "wal" { tools::size_of(&inner).map_or(0, |size| size.objects) } else { wal_files(&inner) };
        }
    }
    count
}
