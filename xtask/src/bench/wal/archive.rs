//! How fast segments that are there are archived.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::super::cluster::Cluster;
use super::super::measure::cpu_time;
use super::super::tools;
use super::{empty, pgvault, store};
use crate::run::run_quietly;

/// How often a store is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The longest that one contestant may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// What archiving cost once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    /// Segments a second, from the first that was stored to the last.
    pub(super) per_second: f64,
    pub(super) cpu_per_gib: f64,
    /// Bytes stored for each byte of WAL.
    pub(super) stored: f64,
    /// Seconds from the start to the first stored segment.
    pub(super) first: f64,
}

/// Writes WAL as pgbench does, kept by the slot `base`; gives the names of the whole segments.
pub(super) fn write(cluster: &Cluster, segments: u64) -> Result<BTreeSet<String>> {
    let mut init = cluster.program("pgbench");
    let _ = run_quietly(init.args(["-i", "-q", "-s", "40", "-U", "postgres", "-h"]).arg(cluster.root()).arg("postgres"))?;
    let _ = cluster.sql("CREATE TABLE commits (id bigserial PRIMARY KEY, pad text)")?;
    let _ = cluster.sql("SELECT pg_switch_wal()")?;
    let _ = cluster.sql("CHECKPOINT")?;
    let _ = cluster.sql("SELECT pg_create_physical_replication_slot('base', true)")?;
    let first = cluster.sql("SELECT pg_walfile_name(restart_lsn) FROM pg_replication_slots WHERE slot_name = 'base'")?;
    let done = format!("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) >= {} FROM pg_replication_slots", segments << 24);
    while cluster.sql(&done)? != "t" {
        let mut load = cluster.program("pgbench");
        load.args(["-n", "-c", "8", "-j", "2", "-T", "5", "-U", "postgres", "-h"]).arg(cluster.root()).arg("postgres");
        let _ = run_quietly(load.env("PGOPTIONS", "-c synchronous_commit=off"))?;
        // Whole pages again, as after every checkpoint of a real server.
        let _ = cluster.sql("CHECKPOINT")?;
    }
    let _ = cluster.sql("SELECT pg_switch_wal()")?;
    let open =
        cluster.sql("SELECT pg_logical_emit_message(false, '', '') IS NULL, pg_walfile_name(pg_current_wal_insert_lsn())")?;
    let open = open.rsplit('|').next().unwrap_or_default().to_owned();
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(cluster.pgdata().join("pg_wal"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() == 24 && name >= first && name < open {
            let _ = names.insert(name);
        }
    }
    let _ = cluster.sql("CHECKPOINT")?;
    Ok(names)
}

/// How a contestant is run.
enum Way {
    /// A process of ours that streams from the slot of this name.
    Stream(Make),
    /// The server's archiver, with this `archive_command`.
    Command(String),
}

type Make = Box<dyn Fn(&Cluster) -> Command>;

/// One contestant.
pub(super) struct Contestant {
    pub(super) name: String,
    /// Run once into an empty store; not measured.
    init: Option<Make>,
    way: Way,
}

/// The slot of those that stream.
const SLOT: &str = "pgvault";

pub(super) fn contestants(cluster: &Cluster, builds: &[(String, PathBuf)], peers: bool) -> Result<Vec<Contestant>> {
    let mut all = Vec::new();
    for (name, _) in builds {
        let (init, run) = (name.clone(), name.clone());
        all.push(Contestant {
            name: name.clone(),
            init: Some(Box::new(move |cluster| pgvault(cluster, &init, "", &["init"]))),
            way: Way::Stream(Box::new(move |cluster| pgvault(cluster, &run, "", &["wal", "stream"]))),
        });
    }
    if peers {
        let (name, binary) = &builds[0];
        let name = format!("{name} wal push");
        super::configure(cluster, &name, binary)?;
        let init = name.clone();
        let file = |end: &str| cluster.root().join(format!("{name}{end}")).display().to_string();
        let command = format!("\"{}\" --config \"{}\" wal push \"%p\"", file(".bin"), file(".toml"));
        all.push(Contestant {
            name: name.clone(),
            init: Some(Box::new(move |cluster| pgvault(cluster, &init, "", &["init"]))),
            way: Way::Command(command),
        });
        all.push(pgbackrest(cluster)?);
    }
    for (name, compress) in [("pg_receivewal", None), ("pg_receivewal lz4", Some("--compress=lz4"))] {
        all.push(Contestant {
            name: name.to_owned(),
            init: None,
            way: Way::Stream(Box::new(move |cluster| {
                let mut command = cluster.program("pg_receivewal");
                command.args(["-U", "postgres", "-h"]).arg(cluster.root()).args(["-S", SLOT, "-D"]).arg(store(cluster, name));
                command.args(compress);
                command
            })),
        });
    }
    Ok(all)
}

/// pgBackRest: asynchronous, a process per core, zstd level 1, its cipher.
fn pgbackrest(cluster: &Cluster) -> Result<Contestant> {
    let name = "pgbackrest";
    let state = cluster.folder("pgbackrest.state")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let text = format!(
        "[global]\nrepo1-path={}\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=the-benchmarks-passphrase\n\
         compress-type=zst\ncompress-level=1\nprocess-max={cores}\narchive-async=y\n\
         lock-path={state}\nlog-path={state}\nspool-path={state}\nlog-level-file=off\nlog-level-console=warn\n\n\
         [main]\npg1-path={}\npg1-socket-path={}\npg1-user=postgres\n",
        store(cluster, name).display(),
        cluster.pgdata().display(),
        cluster.root().display(),
        state = state.display()
    );
    let config = tools::written(cluster, "pgbackrest.conf", &text)?;
    let command = format!("pgbackrest --config={} --stanza=main archive-push %p", config.display());
    Ok(Contestant {
        name: name.to_owned(),
        init: Some(Box::new(move |cluster| {
            let _ = cluster.folder("pgbackrest.state");
            let mut command = cluster.account.command("pgbackrest");
            command.arg(format!("--config={}", config.display())).args(["--stanza=main", "stanza-create"]);
            command
        })),
        way: Way::Command(command),
    })
}

impl Contestant {
    /// Archives the wanted segments into an empty store.
    pub(super) fn archive(&self, cluster: &Cluster, wanted: &BTreeSet<String>) -> Result<Speed> {
        let store = empty(cluster, &self.name)?;
        if let Some(init) = &self.init {
            let _ = run_quietly(&mut init(cluster))?;
        }
        let speed = match &self.way {
            Way::Stream(make) => self.stream(cluster, make, &store, wanted),
            Way::Command(command) => Self::command(cluster, command, &store, wanted),
        };
        let speed = speed.with_context(|| format!("archive with {}", self.name))?;
        println!("  {:20} {:6.1} segments/s", self.name, speed.per_second);
        fs::remove_dir_all(store)?;
        Ok(speed)
    }

    fn stream(&self, cluster: &Cluster, make: &Make, store: &Path, wanted: &BTreeSet<String>) -> Result<Speed> {
        let _ = cluster.sql(&format!("SELECT pg_copy_physical_replication_slot('base', '{SLOT}')"))?;
        let log = fs::File::create(cluster.root().join(format!("{}.log", self.name)))?;
        let mut command = make(cluster);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = Ended(command.spawn().context("start it")?);
        let began = Instant::now();
        let watched = watch(store, wanted, began, || {
            if let Some(status) = child.0.try_wait()? {
                bail!("it ended with {status}; see {}.log", self.name);
            }
            Ok(())
        })?;
        let cpu = cpu_time(i32::try_from(child.0.id())?)?;
        drop(child);
        wait_for(|| cluster.sql("SELECT count(*) FROM pg_replication_slots WHERE active").is_ok_and(|count| count == "0"))?;
        let _ = cluster.sql(&format!("SELECT pg_drop_replication_slot('{SLOT}')"))?;
        watched.speed(cpu, store, wanted)
    }

    fn command(cluster: &Cluster, command: &str, store: &Path, wanted: &BTreeSet<String>) -> Result<Speed> {
        // Another contestant has archived what is wanted; what was written before it was never archived, and is not to be.
        let status = cluster.pgdata().join("pg_wal/archive_status");
        for entry in fs::read_dir(&status)?.flatten() {
            let path = entry.path();
            let name = path.file_stem().and_then(std::ffi::OsStr::to_str).unwrap_or_default();
            fs::rename(&path, path.with_extension(if wanted.contains(name) { "ready" } else { "done" }))?;
        }
        let archiver: i32 = cluster.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'")?.parse()?;
        let before = cpu_time(archiver)?;
        let set = |command: &str| {
            let _ = cluster.sql(&format!("ALTER SYSTEM SET archive_command = '{command}'"))?;
            cluster.sql("SELECT pg_reload_conf()").map(drop)
        };
        let began = Instant::now();
        set(command)?;
        // Processes that leave the archiver are looked at as long as they live.
        let mut aside: BTreeMap<i32, Duration> = BTreeMap::new();
        let watched = watch(store, wanted, began, || {
            look_aside(&mut aside);
            Ok(())
        });
        if watched.is_ok() {
            // All is stored, and the archiver hears of it one by one.
            wait_for(|| {
                look_aside(&mut aside);
                wanted.iter().all(|name| status.join(format!("{name}.done")).exists())
            })?;
        }
        set("")?;
        let cpu = cpu_time(archiver)?.saturating_sub(before) + aside.values().sum::<Duration>();
        wait_for(|| {
            let mut left = BTreeMap::new();
            look_aside(&mut left);
            left.is_empty()
        })?;
        watched?.speed(cpu, store, wanted)
    }
}

/// Ends when dropped.
pub(super) struct Ended(pub(super) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let until = Instant::now() + Duration::from_secs(20);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time of each process of an asynchronous pgBackRest, itself only.
fn look_aside(seen: &mut BTreeMap<i32, Duration>) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let name = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let name = String::from_utf8_lossy(&name);
        if !name.starts_with("pgbackrest") || !(name.contains("archive-push:async") || name.contains("archive-push:local")) {
            continue;
        }
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((_, fields)) = stat.rsplit_once(')') else { continue };
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        let _ = seen.insert(pid, Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()));
    }
}

pub(super) fn wait_for(mut condition: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > until {
            bail!("waited {PATIENCE:?} in vain");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// When the first and the last segment were there.
struct Watched {
    first: Duration,
    first_count: usize,
    all: Duration,
}

/// Looks at a store until it has all.
fn watch(store: &Path, wanted: &BTreeSet<String>, began: Instant, mut look: impl FnMut() -> Result<()>) -> Result<Watched> {
    let mut first = None;
    loop {
        look()?;
        let count = stored(store).into_iter().filter(|name| wanted.contains(name)).count();
        let now = began.elapsed();
        if count > 0 {
            let (first, first_count) = *first.get_or_insert((now, count));
            if count == wanted.len() {
                return Ok(Watched { first, first_count, all: now });
            }
        }
        if now > PATIENCE {
            bail!("{count} of {} segments after {PATIENCE:?}", wanted.len());
        }
        std::thread::sleep(LOOK);
    }
}

/// Names of the segments that a store holds, whatever the contestant adds to them.
fn stored(folder: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.append(&mut stored(&entry.path()));
        } else if let Some(segment) = name.get(..24)
            && is_whole(name.get(24..).unwrap_or_default())
        {
            let _ = names.insert(segment.to_owned());
        }
    }
    names
}

/// What follows a segment's name in the name of a file that holds all of it.
fn is_whole(ending: &str) -> bool {
    // pgBackRest: -SHA1.zst; pgvault: .wal; pg_receivewal: nothing, or .lz4.
    matches!(ending, "" | ".wal" | ".lz4")
        || (ending.len() == 45 && ending.starts_with('-') && ending.strip_suffix(".zst").is_some())
}

impl Watched {
    #[expect(clippy::cast_precision_loss, reason = "printed with three digits")]
    fn speed(&self, cpu: Duration, store: &Path, wanted: &BTreeSet<String>) -> Result<Speed> {
        let gib = wanted.len() as f64 / 64.0;
        let bytes = tools::size_of(store)?.bytes;
        Ok(Speed {
            per_second: (wanted.len() - self.first_count) as f64 / self.all.saturating_sub(self.first).as_secs_f64(),
            cpu_per_gib: cpu.as_secs_f64() / gib,
            stored: bytes as f64 / (wanted.len() as f64 * f64::from(1 << 24)),
            first: self.first.as_secs_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_segments_count() {
        for whole in ["", ".wal", ".lz4", "-0123456789012345678901234567890123456789.zst"] {
            assert!(is_whole(whole), "{whole}");
        }
        for other in [".partial", ".lz4.partial", ".00000000-00000100.part", ".wal#1", "-0123.zst.pgbackrest.tmp"] {
            assert!(!is_whole(other), "{other}");
        }
    }
}
