//! `cargo xtask bench replay`: how fast a server recovers when pgvault hands it its WAL, beside the same recovery fed with
//! `cp` from a local directory.
//!
//! One base backup and its WAL, recovered again and again: by `cp` of the raw segments, by `wal fetch` from a vault in a
//! directory, and by `wal fetch` from a vault in an S3 server on this machine behind a network with latency. Every round runs
//! all of them, in another order; what counts is the ratio within a round.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pgvault_provision::registry::S3S_FS;

use super::cluster::Account;
use super::report::median;
use super::{delay, machine, s3, settle};
use crate::run::{program, run_quietly, target};

/// Part of the speed of `cp` that is wanted.
const SPEED: f64 = 0.8;

#[derive(Args)]
pub(crate) struct Replay {
    /// Segments of 16 MiB to replay
    #[arg(long, default_value_t = 96)]
    segments: usize,
    /// Times that every way is run
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Milliseconds that each request to the S3 server takes longer
    #[arg(long, default_value_t = 20)]
    latency_ms: u64,
    /// Scale of pgbench: how many different pages the WAL touches
    #[arg(long, default_value_t = 30)]
    scale: u32,
    /// Also with so many segments fetched ahead; 0 for none
    #[arg(long)]
    prefetch: Vec<u32>,
    /// Folder to work in
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-replay")]
    folder: PathBuf,
}

/// One way to get WAL.
struct Way {
    name: String,
    restore_command: String,
    variables: Vec<(String, String)>,
    seconds: Vec<f64>,
}

struct Bench<'a> {
    options: &'a Replay,
    root: PathBuf,
    bin: PathBuf,
    account: Account,
}

impl Replay {
    pub(super) fn run(&self) -> Result<()> {
        let bin = crate::postgres::ensure(15)?;
        let _ = super::build()?;
        let server = S3S_FS.built()?;
        super::ensure_space(&self.folder, (self.segments as u64 * 3) << 24)?;
        if let Some(child) = fs::read_dir(&self.folder)?.flatten().next() {
            bail!("{} is not empty ({}); give another --folder, or empty it", self.folder.display(), child.path().display());
        }
        let account = Account::find()?;
        account.own(&self.folder)?;
        let bench = Bench { options: self, root: self.folder.clone(), bin, account };
        let done = bench.run(&server);
        fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        done
    }
}

impl Bench<'_> {
    fn run(&self, s3: &Path) -> Result<()> {
        let _ = fs::copy(target().join("release/pgvault"), self.root.join("pgvault")).context("copy pgvault")?;
        let system_id = self.generate()?;
        let s3 = s3::Server::start(s3, &self.root)?;
        let slow = delay::start(s3.address(), Duration::from_millis(self.options.latency_ms))?;
        self.fill_vault("file", &format!("file://{}/vault", self.root.display()), &[], &system_id)?;
        self.fill_vault("s3", &s3::url("vault"), &s3::variables(s3.address()), &system_id)?;
        let mut ways = self.ways(slow);
        for round in 0..self.options.rounds.max(1) as usize {
            for turn in 0..ways.len() {
                let number = (round + turn) % ways.len();
                let seconds = self.recover(&ways[number])?;
                println!("  {:26} {seconds:6.2} s", ways[number].name);
                ways[number].seconds.push(seconds);
            }
        }
        self.report(&ways)
    }

    fn ways(&self, s3: SocketAddr) -> Vec<Way> {
        let fetch = |config: &str| {
            format!("{} --config {} wal fetch \"%f\" \"%p\"", self.root.join("pgvault").display(), self.root.join(config).display())
        };
        let way = |name: String, restore_command: String, variables: Vec<(String, String)>| Way {
            name,
            restore_command,
            variables,
            seconds: Vec::new(),
        };
        let latency = self.options.latency_ms;
        let mut ways = vec![
            way("cp".into(), format!("cp {}/\"%f\" \"%p\"", self.root.join("raw").display()), Vec::new()),
            way(format!("pgvault, S3 + {latency} ms"), fetch("s3.toml"), s3::variables(s3)),
            way("pgvault, directory".into(), fetch("file.toml"), Vec::new()),
        ];
        for ahead in &self.options.prefetch {
            let mut variables = s3::variables(s3);
            variables.push(("PGVAULT_CLUSTER__MAIN__WAL__PREFETCH".to_owned(), ahead.to_string()));
            ways.push(way(format!("S3 + {latency} ms, {ahead} ahead"), fetch("s3.toml"), variables));
        }
        ways
    }

    fn command(&self, name: &str) -> Command {
        self.account.command(self.bin.join(name))
    }

    fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path)?;
        self.account.own(&path)?;
        Ok(path)
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::write(&path, text)?;
        self.account.own(&path)?;
        Ok(path)
    }

    fn control(&self, data: &Path, arguments: &[&str], variables: &[(String, String)]) -> Result<()> {
        let mut control = self.command("pg_ctl");
        control.arg("-D").arg(data).arg("-l").arg(data.with_extension("log")).args(["-s", "-t", "300"]).args(arguments);
        control.envs(variables.iter().cloned()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = control.status().context("start pg_ctl")?;
        if !status.success() {
            bail!("pg_ctl {} ended with {status}; see {}", arguments.join(" "), data.with_extension("log").display());
        }
        Ok(())
    }

    /// A base backup in `base`, and the WAL that follows it in `raw`. Gives the system identifier.
    fn generate(&self) -> Result<String> {
        println!("generating {} segments of WAL", self.options.segments);
        let (data, raw, base) = (self.root.join("data"), self.folder("raw")?, self.root.join("base"));
        let mut initdb = self.command("initdb");
        initdb.args(["--data-checksums", "-U", "postgres", "-A", "trust", "--locale=C.UTF-8", "-E", "UTF8", "-N", "-D"]);
        run_quietly(initdb.arg(&data))?;
        let conf = data.join("postgresql.conf");
        let settings = format!(
            "{}\nlisten_addresses = ''\nunix_socket_directories = '{}'\nshared_buffers = 256MB\nautovacuum = off\nfsync = off\n\
             archive_mode = on\narchive_command = 'cp %p {}/%f'\n",
            fs::read_to_string(&conf)?,
            self.root.display(),
            raw.display()
        );
        fs::write(&conf, settings)?;
        self.control(&data, &["-w", "start"], &[])?;
        let made = self.fill(&data, &raw, &base);
        let stopped = self.control(&data, &["-w", "stop", "-m", "fast"], &[]);
        let system_id = made?;
        stopped?;
        fs::remove_dir_all(&data)?;
        Ok(system_id)
    }

    fn fill(&self, data: &Path, raw: &Path, base: &Path) -> Result<String> {
        let client = |name: &str, arguments: &[&str]| {
            let mut command = self.command(name);
            command.args(["-U", "postgres", "-h"]).arg(&self.root).args(arguments);
            run_quietly(&mut command)
        };
        let _ = client("pgbench", &["-i", "-q", "-s", &self.options.scale.to_string(), "postgres"])?;
        let base = base.to_string_lossy().into_owned();
        let _ = client("pg_basebackup", &["-X", "none", "-c", "fast", "-D", &base])?;
        let count = || -> Result<usize> { Ok(fs::read_dir(raw)?.count()) };
        let before = count()?;
        while count()? < before + self.options.segments {
            let _ = client("pgbench", &["-n", "-c", "8", "-T", "3", "postgres"])?;
        }
        let _ = client("psql", &["-XqAt", "-c", "select pg_switch_wal()", "postgres"])?;
        let current = client("psql", &["-XqAt", "-c", "select pg_walfile_name(pg_current_wal_lsn() - 1)", "postgres"])?;
        let last = raw.join(current.trim());
        let began = Instant::now();
        while !last.is_file() && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut control = self.command("pg_controldata");
        let text = run_quietly(control.arg(data))?;
        let id = text.lines().find_map(|line| line.strip_prefix("Database system identifier:"));
        Ok(id.context("pg_controldata names no system identifier")?.trim().to_owned())
    }

    /// A vault with all the WAL.
    fn fill_vault(&self, name: &str, url: &str, variables: &[(String, String)], system_id: &str) -> Result<()> {
        let passphrase = self.write("passphrase", "the benchmark's passphrase\n")?;
        let text = format!(
            "[vault]\nurl = \"{url}\"\npassphrase_file = \"{}\"\n\n[cluster.main.wal]\npush_batch = 1000\nprefetch_dir = \"{}\"\n",
            passphrase.display(),
            self.folder("cache")?.display()
        );
        let config = self.write(&format!("{name}.toml"), &text)?;
        let pgvault = |arguments: &[&str]| {
            let mut command = self.account.command(self.root.join("pgvault"));
            command.arg("--config").arg(&config).args(arguments).envs(variables.iter().cloned());
            run_quietly(&mut command)
        };
        // The S3 server of this benchmark lets several of many writers win; there is one.
        let one_writer: &[&str] = if variables.is_empty() { &[] } else { &["--single-writer"] };
        let _ = pgvault(&[&["init", "--system-id", system_id], one_writer].concat())?;
        let raw = self.root.join("raw");
        let mut names: Vec<String> = fs::read_dir(&raw)?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.len() == 24)
            .collect();
        names.sort();
        // As PostgreSQL marks what waits, so that one call stores all of it.
        let status = self.folder("raw/archive_status")?;
        for name in &names {
            fs::write(status.join(format!("{name}.ready")), "")?;
        }
        let first = raw.join(names.first().context("there is no WAL")?);
        // A call does not wait for the others for ever.
        while !pgvault(&["--output", "json", "wal", "push", &first.to_string_lossy()])?.contains("\"others_stored\":0") {}
        fs::remove_dir_all(status)?;
        Ok(())
    }

    /// Seconds from the start of a server to the end of its WAL.
    fn recover(&self, way: &Way) -> Result<f64> {
        let data = self.root.join("recovered");
        let log = data.with_extension("log");
        let mut copy = self.account.command("cp");
        run_quietly(copy.arg("-a").arg(self.root.join("base")).arg(&data))?;
        let _ = self.write("recovered/recovery.signal", "")?;
        let settings =
            format!("archive_mode = off\nhot_standby = off\nrestore_command = '{}'\n", way.restore_command.replace('\'', "''"));
        let _ = self.write("recovered/postgresql.auto.conf", &settings)?;
        // What was copied shall not be written back while it is measured.
        settle()?;
        let _ = fs::remove_file(&log);
        let began = Instant::now();
        self.control(&data, &["-W", "start"], &way.variables)?;
        let seconds = loop {
            let text = fs::read_to_string(&log).unwrap_or_default();
            if text.contains("redo done at") {
                break began.elapsed().as_secs_f64();
            }
            if text.contains("FATAL") || began.elapsed() > Duration::from_secs(1800) {
                let _ = self.control(&data, &["-W", "stop", "-m", "immediate"], &[]);
                bail!("{} does not recover:\n{text}", way.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = fs::read_to_string(&log)?;
        let restored = text.matches("restored log file").count();
        if restored < self.options.segments {
            bail!("{} has replayed {restored} segments only", way.name);
        }
        let _ = self.control(&data, &["-w", "stop", "-m", "immediate"], &[]);
        fs::remove_dir_all(&data)?;
        Ok(seconds)
    }

    fn report(&self, ways: &[Way]) -> Result<()> {
        println!("\n{}\n{}", machine(), run_quietly(&mut program(self.bin.join("postgres"), ["--version"]))?.trim());
        println!("recovery of {} segments of 16 MiB, pgbench scale {}", self.options.segments, self.options.scale);
        println!("\n{:26}  seconds  (rounds)               ms a segment  speed of cp", "");
        for way in ways {
            let rounds: Vec<String> = way.seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
            let ratio = median(ways[0].seconds.iter().zip(&way.seconds).map(|(cp, own)| cp / own));
            let seconds = median(way.seconds.iter().copied());
            #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
            let each = seconds * 1000.0 / self.options.segments as f64;
            println!("{:26}  {seconds:7.2}  {:20}  {each:12.1}  {ratio:6.3}", way.name, rounds.join(" "));
        }
        let ratio = median(ways[0].seconds.iter().zip(&ways[1].seconds).map(|(cp, own)| cp / own));
        super::report::judge(ratio >= SPEED, &format!("{}: {ratio:.2} of the speed of cp; at least {SPEED} wanted", ways[1].name));
        Ok(())
    }
}
