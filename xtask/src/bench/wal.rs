//! `cargo xtask bench wal`: WAL into a store, beside pgBackRest and `pg_receivewal`, on one server, in turns.
//!
//! First the same segments are archived by every contestant, again and again, into an empty store each time; then single-row inserts
//! wait for one receiver after the other. As with backups, what counts is the ratio of two contestants within a round.

mod archive;
mod commit;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::cluster::{Account, Cluster};
use super::report::median;
use super::{machine, tools};
use crate::packages::ensure_programs;
use crate::run::{cargo, program, run, run_quietly, target};

#[derive(Args)]
pub(crate) struct WalBench {
    /// Segments of 16 MiB that are archived
    #[arg(long, default_value_t = 64)]
    segments: u64,
    /// Times that every contestant runs
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of inserts for each receiver and number of clients; 0 leaves commits out
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Another build of pgvault to run in the same turns, to measure a change against it
    #[arg(long, value_name = "NAME=FILE")]
    also: Vec<String>,
    /// Run only pgvault and `pg_receivewal`: for work on pgvault itself
    #[arg(long)]
    no_peers: bool,
    /// Folder to work in; it must be empty
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-bench-wal")]
    folder: PathBuf,
}

/// Segments are kept by a slot; the archiver has nothing to do until it is told. `fsync` stays on: commits are measured.
const SETTINGS: &str = "
listen_addresses = ''
wal_level = replica
max_wal_senders = 10
shared_buffers = 256MB
max_wal_size = 32GB
checkpoint_timeout = 1h
autovacuum = off
archive_mode = on
archive_command = ''
";

impl WalBench {
    pub(crate) fn run(&self) -> Result<()> {
        let bin = crate::postgres::ensure(15)?;
        if !self.no_peers {
            ensure_programs(&[("pgbackrest", "pgbackrest")], "pgvault is measured against it")?;
        }
        println!("building pgvault with the release profile");
        run(cargo().args(["build", "--release", "--quiet", "--package", "pgvault-cli"]))?;
        let mut builds = vec![("pgvault".to_owned(), target().join("release/pgvault"))];
        for also in &self.also {
            let (name, file) = also.split_once('=').context("--also takes NAME=FILE")?;
            builds.push((name.to_owned(), PathBuf::from(file)));
        }
        super::ensure_space(&self.folder, self.segments << 24)?;
        let cluster = Cluster::create(&self.folder, &bin, Account::find()?, SETTINGS)?;
        let measured = self.measure(&cluster, &builds);
        cluster.stop()?;
        fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        measured?.print();
        Ok(())
    }

    fn measure(&self, cluster: &Cluster, builds: &[(String, PathBuf)]) -> Result<WalReport> {
        for (name, file) in builds {
            configure(cluster, name, file)?;
        }
        println!("writing {} segments", self.segments);
        let wanted = archive::write(cluster, self.segments)?;
        let mut report = WalReport {
            facts: format!(
                "PostgreSQL {}, {} segments of 16 MiB written by pgbench",
                cluster.sql("SHOW server_version")?,
                wanted.len()
            ),
            archive: Vec::new(),
            commits: Vec::new(),
        };
        let contestants = archive::contestants(cluster, builds, !self.no_peers)?;
        report.archive = contestants.iter().map(|contestant| (contestant.name.clone(), Vec::new())).collect();
        for round in 0..self.rounds as usize {
            for turn in 0..contestants.len() {
                let number = (round + turn) % contestants.len();
                super::settle()?;
                let speed = contestants[number].archive(cluster, &wanted)?;
                report.archive[number].1.push(speed);
            }
        }
        // Nothing keeps the segments any longer.
        let _ = cluster.sql("SELECT pg_drop_replication_slot('base')")?;
        if self.seconds > 0 {
            report.commits = commit::measure(cluster, builds, self.rounds, self.seconds)?;
        }
        Ok(report)
    }
}

/// Copies a build and writes its configuration.
fn configure(cluster: &Cluster, name: &str, binary: &Path) -> Result<()> {
    let copy = cluster.root().join(format!("{name}.bin"));
    let _ = fs::copy(binary, &copy).with_context(|| format!("copy {}", binary.display()))?;
    let passphrase = tools::written(cluster, "passphrase", "the benchmark's passphrase\n")?;
    for (suffix, synchronous) in [("", false), (".sync", true)] {
        let text = format!(
            "[vault]\nurl = \"file://{}\"\npassphrase_file = \"{}\"\n\n[cluster.main]\nconnection = \"host={} user=postgres dbname=postgres\"\n\n\
             [cluster.main.wal]\nsynchronous = {synchronous}\n",
            store(cluster, name).display(),
            passphrase.display(),
            cluster.root().display(),
        );
        let _ = tools::written(cluster, &format!("{name}{suffix}.toml"), &text)?;
    }
    Ok(())
}

/// Where a contestant stores.
fn store(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.root().join(format!("{}.store", name.replace(' ', "-")))
}

/// An empty store.
fn empty(cluster: &Cluster, name: &str) -> Result<PathBuf> {
    let store = store(cluster, name);
    let name = store.file_name().and_then(std::ffi::OsStr::to_str).context("the store has no name")?;
    cluster.folder(name)
}

/// A command of a build of pgvault.
fn pgvault(cluster: &Cluster, name: &str, suffix: &str, arguments: &[&str]) -> std::process::Command {
    let mut command = cluster.account.command(cluster.root().join(format!("{name}.bin")));
    command.arg("--config").arg(cluster.root().join(format!("{name}{suffix}.toml"))).args(arguments);
    command
}

/// Everything that was measured.
struct WalReport {
    facts: String,
    archive: Vec<(String, Vec<archive::Speed>)>,
    commits: Vec<(String, Vec<commit::Latency>)>,
}

/// What is wanted of `wal stream`, compressed and encrypted.
const SEGMENTS_PER_SECOND: f64 = 20.0;

impl WalReport {
    fn print(&self) {
        println!("\n{}\n{}", machine(), self.facts);
        for peer in [("pgbackrest", "version"), ("pg_receivewal", "--version")] {
            if let Ok(version) = run_quietly(&mut program(peer.0, [peer.1])) {
                println!("{}", version.trim());
            }
        }
        println!("\narchiving                segments/s (all)                   CPU s/GiB   bytes of raw   first after s");
        for (name, speeds) in &self.archive {
            let all: Vec<String> = speeds.iter().map(|speed| format!("{:.1}", speed.per_second)).collect();
            println!(
                "{name:22}  {:10.1}   {:28}   {:9.2}   {:12.3}   {:13.2}",
                median(speeds.iter().map(|speed| speed.per_second)),
                all.join(" "),
                median(speeds.iter().map(|speed| speed.cpu_per_gib)),
                median(speeds.iter().map(|speed| speed.stored)),
                median(speeds.iter().map(|speed| speed.first)),
            );
        }
        if let Some((first, base)) = self.archive.first() {
            for (name, speeds) in &self.archive[1..] {
                let faster = ratio(base, speeds, |speed| speed.per_second);
                let cheaper = ratio(speeds, base, |speed| speed.cpu_per_gib);
                println!("{first} archives {faster:.2} times as fast as {name}, which takes {cheaper:.2} times its CPU");
            }
            let speed = median(base.iter().map(|speed| speed.per_second));
            let verdict = if speed >= SEGMENTS_PER_SECOND { "PASS" } else { "BELOW BUDGET" };
            println!("  {verdict}  {first}: {speed:.1} segments/s; {SEGMENTS_PER_SECOND} wanted");
        }
        if !self.commits.is_empty() {
            println!(
                "\ncommits                  clients   median ms (all)              p99 ms (all)                 commits/s   PUTs/commit"
            );
        }
        for (name, latencies) in &self.commits {
            for clients in commit::CLIENTS {
                let of = |value: fn(&commit::Latency) -> f64| {
                    latencies.iter().filter(|latency| latency.clients == clients).map(value).collect::<Vec<f64>>()
                };
                let list = |values: &[f64]| values.iter().map(|value| format!("{value:.2}")).collect::<Vec<_>>().join(" ");
                let (middle, worst) = (of(|latency| latency.median), of(|latency| latency.p99));
                println!(
                    "{name:22}  {clients:8}   {:6.2}  {:18}   {:6.2}  {:18}   {:9.0}   {:11.2}",
                    median(middle.iter().copied()),
                    list(&middle),
                    median(worst.iter().copied()),
                    list(&worst),
                    median(of(|latency| latency.per_second)),
                    median(of(|latency| latency.puts)),
                );
            }
        }
        if let Some((first, base)) = self.commits.first() {
            for (name, latencies) in &self.commits[1..] {
                for clients in commit::CLIENTS {
                    let of = |latencies: &[commit::Latency]| -> Vec<commit::Latency> {
                        latencies.iter().filter(|latency| latency.clients == clients).copied().collect()
                    };
                    let (ours, theirs) = (of(base), of(latencies));
                    let (middle, worst) = (ratio(&ours, &theirs, |l| l.median), ratio(&ours, &theirs, |l| l.p99));
                    println!(
                        "{clients:2} clients: a commit with {first} takes {middle:.2} times as long as with {name}, p99 {worst:.2} times"
                    );
                }
            }
        }
        println!("\n{}", self.json());
    }

    /// All of it on one line, for scripts. Names are our own and need no escaping.
    fn json(&self) -> String {
        let mut text = String::from("{\"archive\":{");
        for (number, (name, speeds)) in self.archive.iter().enumerate() {
            let _ = write!(text, "{}\"{name}\":[", if number > 0 { "," } else { "" });
            for (number, speed) in speeds.iter().enumerate() {
                let comma = if number > 0 { "," } else { "" };
                let _ = write!(
                    text,
                    "{comma}{{\"segments_per_second\":{:.2},\"cpu_seconds_per_gib\":{:.3},\"stored_ratio\":{:.4}}}",
                    speed.per_second, speed.cpu_per_gib, speed.stored
                );
            }
            text.push(']');
        }
        text.push_str("},\"commits\":{");
        for (number, (name, latencies)) in self.commits.iter().enumerate() {
            let _ = write!(text, "{}\"{name}\":[", if number > 0 { "," } else { "" });
            for (number, latency) in latencies.iter().enumerate() {
                let comma = if number > 0 { "," } else { "" };
                let _ = write!(
                    text,
                    "{comma}{{\"clients\":{},\"median_ms\":{:.3},\"p99_ms\":{:.3},\"commits_per_second\":{:.1},\"puts_per_commit\":{:.4}}}",
                    latency.clients, latency.median, latency.p99, latency.per_second, latency.puts
                );
            }
            text.push(']');
        }
        text.push_str("}}");
        text
    }
}

/// The median over rounds of `a` divided by `b`.
fn ratio<T>(a: &[T], b: &[T], value: impl Fn(&T) -> f64) -> f64 {
    median(a.iter().zip(b).map(|(a, b)| value(a) / value(b)))
}
