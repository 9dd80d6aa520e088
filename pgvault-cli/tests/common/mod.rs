//! What the tests against real servers share: a throwaway cluster, its vault and configuration, and the built program.
//!
//! pgvault runs as the account of the server, as it does in an `archive_command`. Everything lies in one temporary
//! folder that is removed with the [`Site`], but for the vault, which is where the run has its store ([`Vaults`]).

#![allow(dead_code, unreachable_pub, clippy::print_stderr, clippy::unwrap_used, clippy::expect_used, clippy::missing_errors_doc)]
#![expect(clippy::case_sensitive_file_extension_comparisons, reason = "names of objects are what they are")]

pub mod drills;
pub mod odoo;
mod vault;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Account, Install, Outcome, Server, ServerBuilder};
use serde_json::Value;
use tempfile::TempDir;

pub use vault::{VAULT, Vaults};

/// True when the slow variants are wanted too.
pub fn full() -> bool {
    std::env::var_os("PGVAULT_TEST_FULL").is_some_and(|value| value == "1")
}

/// Waits for a condition; fails the test when it does not come true in time.
#[track_caller]
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {timeout:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// How a run of pgvault ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub line: String,
}

impl Ran {
    /// Fails the test unless the exit code is this one.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n--- stdout\n{}\n--- stderr\n{}", self.line, self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}\n{}", self.line, self.stderr);
        self
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }

    /// Fails the test unless standard error has this text.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert!(all.contains(text), "{} does not say `{text}`:\n{all}", self.line);
        self
    }

    /// The summary: the last line of standard output.
    #[track_caller]
    pub fn json(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{}: {error} in\n{}\n{}", self.line, self.stdout, self.stderr))
    }
}

/// A child that ends with its owner; what it wrote is printed when the test has failed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    log: Option<PathBuf>,
}

impl Running {
    pub fn new(child: Child) -> Self {
        Self { child, log: None }
    }

    /// Asks it to end, and waits.
    pub fn terminate(self) -> Option<i32> {
        self.signal(rustix::process::Signal::TERM);
        self.ended(Duration::from_secs(20))
    }

    /// Waits for it to end by itself.
    pub fn ended(mut self, timeout: Duration) -> Option<i32> {
        let mut code = None;
        wait_until("a child has ended", timeout, || {
            let ended = self.child.try_wait().expect("wait for a child");
            code = ended.and_then(|status| status.code());
            ended.is_some()
        });
        code
    }

    /// Ends it at once.
    pub fn kill9(mut self) {
        self.child.kill().expect("kill a child");
        let _ = self.child.wait();
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        self.log.as_deref().and_then(|log| fs::read_to_string(log).ok()).unwrap_or_default()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The most memory that it has had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("VmHWM in kB") << 10
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).expect("signal a child");
    }

    /// Asks the endpoint that a stream has announced in its log: the status code and the body.
    #[track_caller]
    pub fn http(&self, path: &str) -> (u16, String) {
        use std::io::{Read, Write};
        let mut address = None;
        wait_until("the endpoint is announced", Duration::from_secs(20), || {
            let log = self.log();
            address = log.split("http://").nth(1).and_then(|rest| rest.split('/').next()).map(ToOwned::to_owned);
            address.is_some()
        });
        let mut socket = std::net::TcpStream::connect(address.unwrap_or_default()).expect("connect to the endpoint");
        write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask the endpoint");
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer).expect("an answer of the endpoint");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        (head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status code"), body.to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(log) = self.log.as_deref().filter(|_| std::thread::panicking()) {
            eprintln!("--- {}\n{}", log.display(), self.log());
        }
    }
}

/// One folder with a program, a configuration and a vault; several clusters can be in it.
pub struct Site {
    pub install: Install,
    pub account: Account,
    /// Where the vault is, and what can be done to it.
    pub vaults: Vaults,
    folder: TempDir,
    config: PathBuf,
    counter: AtomicU32,
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Site").field("folder", &self.folder.path()).finish_non_exhaustive()
    }
}

impl Site {
    /// With the vault in the store of this run.
    pub fn new() -> Self {
        Self::with_vaults(Vaults::new)
    }

    /// With the vault in a directory, for what only a directory has.
    pub fn in_directory() -> Self {
        Self::with_vaults(Vaults::in_directory)
    }

    fn with_vaults(vaults: impl FnOnce(&Path) -> Vaults) -> Self {
        let install = Install::for_tests().expect("PostgreSQL for the tests");
        let account = Account::unprivileged().expect("an account for servers");
        let folder = tempfile::Builder::new()
            .prefix("pgvault-it-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .expect("a folder in /tmp");
        // The build's own folder need not be one that the server's account can enter.
        fs::copy(env!("CARGO_BIN_EXE_pgvault"), folder.path().join("pgvault")).expect("copy the program");
        let passphrase = folder.path().join("passphrase");
        fs::write(&passphrase, "correct horse battery staple\n").expect("write the passphrase");
        fs::set_permissions(&passphrase, fs::Permissions::from_mode(0o600)).expect("protect the passphrase");
        account.own(folder.path()).expect("give the folder away");
        let config = folder.path().join("pgvault.toml");
        let vaults = vaults(folder.path());
        Self { install, account, vaults, folder, config, counter: AtomicU32::new(1) }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in the folder that was not used before.
    pub fn fresh(&self, prefix: &str) -> PathBuf {
        self.path(format!("{prefix}{}", self.counter.fetch_add(1, Ordering::Relaxed)))
    }

    /// A new folder of the server's account.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("create a folder");
        self.account.own(&path).expect("give a folder away");
        path
    }

    /// Writes a file of the server's account.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("write a file");
        self.account.own(&path).expect("give a file away");
        path
    }

    /// A cluster with its data in `main`; small, and with a socket that stays where it is over restarts.
    pub fn cluster(&self, name: &str) -> ServerBuilder {
        Server::builder(&self.install)
            .pgdata(self.path(name))
            .port(5432)
            .timeout(Duration::from_secs(120))
            .config("shared_buffers = 16MB\nmax_wal_senders = 10\nwal_level = replica\nmax_wal_size = 1GB")
            .config("wal_keep_size = 1GB\ntrack_commit_timestamp = on")
    }

    /// Lines for [`Site::cluster`] that archive with `wal push`.
    pub fn archiving(&self) -> String {
        format!(
            "archive_mode = on\narchive_command = '{} --config {} wal push \"%p\"'",
            self.path("pgvault").display(),
            self.config.display()
        )
    }

    /// Writes the configuration for a server, which may not run yet.
    pub fn configure(&self, server: &Server) {
        self.configure_text(VAULT, &server.conninfo(), Some(server.pgdata()));
    }

    pub fn configure_text(&self, vault: &str, connection: &str, pgdata: Option<&Path>) {
        let pgdata = pgdata.map_or_else(String::new, |path| format!("pgdata = \"{}\"\n", path.display()));
        if self.vaults.directory(vault).is_some() {
            let _ = self.directory(vault);
        }
        let passphrase = format!("passphrase_file = \"{}\"", self.path("passphrase").display());
        let cluster = format!("[cluster.main]\nconnection = \"{connection}\"\n{pgdata}");
        let _ = self.write("pgvault.toml", self.vaults.config(vault, &passphrase, &cluster));
    }

    /// Gives the cluster's `[cluster.main.wal]` these lines, and no others.
    pub fn wal_settings(&self, lines: &str) {
        let text = fs::read_to_string(&self.config).expect("read the configuration");
        let before = text.split("\n[cluster.main.wal]").next().unwrap_or_default();
        let _ = self.write("pgvault.toml", format!("{before}\n[cluster.main.wal]\n{lines}\n"));
    }

    /// Makes a cluster, its configuration and its vault, and starts it.
    pub fn start(&self, builder: ServerBuilder) -> Server {
        let mut server = builder.create().expect("initdb");
        self.configure(&server);
        server.start().expect("start the server");
        self.pgv(&["init"]).ok();
        server
    }

    /// Runs a program as the server's account.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.current_dir(self.folder()).env("HOME", self.folder()).env("TZ", "UTC").env("LC_ALL", "C.UTF-8");
        self.account.apply(&mut command);
        command
    }

    pub fn pgvault(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(self.path("pgvault"));
        command.arg("--config").arg(&self.config).args(arguments);
        command
    }

    /// Runs pgvault to its end.
    pub fn pgv(&self, arguments: &[&str]) -> Ran {
        run(self.pgvault(arguments))
    }

    /// Runs pgvault and gives the summary; it must succeed.
    #[track_caller]
    pub fn summary(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--output", "json"];
        all.extend(arguments);
        self.pgv(&all).ok().json()
    }

    /// Takes a backup.
    #[track_caller]
    pub fn backup(&self, source: &str) -> Value {
        self.summary(&["backup", "--source", source])
    }

    /// Restores into a new directory.
    #[track_caller]
    pub fn restore(&self, to: &str, more: &[&str]) -> PathBuf {
        let pgdata = self.fresh("restored");
        self.restore_into(&pgdata, to, more).ok();
        pgdata
    }

    pub fn restore_into(&self, pgdata: &Path, to: &str, more: &[&str]) -> Ran {
        let mut arguments = vec!["restore", "--to", to, "--pgdata", pgdata.to_str().expect("a path in UTF-8")];
        arguments.extend(more);
        self.pgv(&arguments)
    }

    /// Starts a restored directory and waits for the end of recovery.
    #[track_caller]
    pub fn recover(&self, pgdata: &Path) -> (Server, Outcome) {
        let mut server = self.launch(pgdata);
        match server.wait_until_paused_or_promoted(Duration::from_secs(120)) {
            Ok(outcome) => (server, outcome),
            Err(error) => panic!("recovery of {}: {error}", pgdata.display()),
        }
    }

    /// Starts a restored directory without waiting.
    pub fn launch(&self, pgdata: &Path) -> Server {
        Server::adopt(&self.install, pgdata)
            .option("fsync", "off")
            .option("shared_buffers", "16MB")
            .launch()
            .expect("launch a restored server")
    }

    /// Restores, recovers, and gives the server.
    #[track_caller]
    pub fn restore_to(&self, to: &str, more: &[&str]) -> (Server, Outcome) {
        let pgdata = self.restore(to, more);
        self.recover(&pgdata)
    }

    /// Starts `wal stream`; its output goes to files for the moment when a test fails.
    pub fn stream(&self) -> Running {
        self.stream_with(&[])
    }

    /// As [`Site::stream`], with more arguments.
    pub fn stream_with(&self, more: &[&str]) -> Running {
        let log = self.fresh("stream.log");
        let file = fs::File::create(&log).expect("create a log");
        let errors = file.try_clone().expect("open a log twice");
        let mut command = self.pgvault(&["wal", "stream"]);
        command.args(more);
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        Running { child: command.spawn().expect("start wal stream"), log: Some(log) }
    }

    /// Names of the WAL objects of a timeline in the vault, without those being written.
    pub fn wal_objects(&self, timeline: u32) -> Vec<String> {
        let folder = format!("/wal/{timeline:08X}/");
        // Sorted, because they share what comes before the last slash.
        let names = self.vaults.names();
        names.iter().filter_map(|name| Some(name.split_once(&folder)?.1.to_owned())).collect()
    }

    /// Committed backups in the vault.
    pub fn snapshots(&self) -> usize {
        self.vaults.names().iter().filter(|name| name.ends_with(".snap")).count()
    }

    /// How far the vault's WAL of a timeline reaches without a hole, according to the names of its objects alone.
    pub fn vault_end(&self, timeline: u32, segment_size: u64) -> Option<Lsn> {
        let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
        let mut parts: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        for name in self.wal_objects(timeline) {
            let Some(number) = name.get(..24).and_then(|segment| segment_number(segment, segment_size)) else { continue };
            if name.ends_with(".wal") {
                let _ = ends.insert(number, segment_size);
            } else if let Some(range) = name.strip_suffix(".part").and_then(|name| name.get(25..)) {
                let (from, to) = range.split_once('-').expect("a range");
                let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal digits");
                parts.entry(number).or_default().push((hex(from), hex(to)));
            }
        }
        for (number, mut ranges) in parts {
            ranges.sort_unstable();
            let end = ranges.into_iter().fold(0, |end, (from, to)| if from <= end { end.max(to) } else { end });
            let known = ends.entry(number).or_default();
            *known = end.max(*known);
        }
        let mut numbers = ends.into_iter();
        let (mut number, mut covered) = numbers.next()?;
        for (next, next_covered) in numbers {
            if covered < segment_size || next != number + 1 {
                break;
            }
            (number, covered) = (next, next_covered);
        }
        Some(Lsn(number * segment_size + covered))
    }
}

/// The number of a segment, from its name.
pub fn segment_number(name: &str, segment_size: u64) -> Option<u64> {
    let high = u64::from_str_radix(name.get(8..16)?, 16).ok()?;
    let low = u64::from_str_radix(name.get(16..24)?, 16).ok()?;
    Some(high * ((1 << 32) / segment_size) + low)
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Ran {
    let line = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{line}: {error}"));
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        line,
    }
}

/// Every file below a folder; what vanishes meanwhile is left out.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return found };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files_below(&path)),
            Ok(_) => found.push(path),
            Err(_) => {}
        }
    }
    found
}

/// What a folder holds: for each name the mode and the contents, the target of a link, or that it is a folder.
pub fn tree(folder: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    fn walk(folder: &Path, prefix: &str, found: &mut BTreeMap<String, (u32, Vec<u8>)>) {
        for entry in fs::read_dir(folder).expect("list a folder").flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let path = entry.path();
            let meta = fs::symlink_metadata(&path).expect("stat a file");
            if meta.is_symlink() {
                let target = fs::read_link(&path).expect("read a link").to_string_lossy().into_owned();
                let _ = found.insert(name, (0o120_000, target.into_bytes()));
            } else if meta.is_dir() {
                let _ = found.insert(name.clone(), (meta.mode(), b"folder".to_vec()));
                walk(&path, &format!("{name}/"), found);
            } else {
                let _ = found.insert(name, (meta.mode(), fs::read(&path).expect("read a file")));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, "", &mut found);
    found
}

/// Fails the test with the names that differ.
#[track_caller]
pub fn assert_same_tree(one: &Path, other: &Path) {
    let (left, right) = (tree(one), tree(other));
    let mut differing = Vec::new();
    for name in left.keys().chain(right.keys().filter(|name| !left.contains_key(*name))) {
        match (left.get(name), right.get(name)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) if a.0 != b.0 => differing.push(format!("{name}: mode {:o} and {:o}", a.0, b.0)),
            (Some(a), Some(b)) => differing.push(format!("{name}: {} and {} bytes differ", a.1.len(), b.1.len())),
            (Some(_), None) => differing.push(format!("{name}: only in the first")),
            _ => differing.push(format!("{name}: only in the second")),
        }
    }
    assert!(differing.is_empty(), "{} and {} differ:\n{}", one.display(), other.display(), differing.join("\n"));
}

/// A statement's answer.
#[track_caller]
pub fn sql(server: &Server, text: &str) -> String {
    server.psql(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// A position, as the server tells it.
#[track_caller]
pub fn lsn(server: &Server, expression: &str) -> Lsn {
    sql(server, &format!("select {expression}")).parse().expect("an LSN")
}

/// Ends the open segment and waits until the archiver has stored it.
#[track_caller]
pub fn switch_and_archive(server: &Server) -> String {
    // A transaction first: an empty segment is not switched.
    let name = sql(server, "select pg_create_restore_point('switch') is null; select pg_walfile_name(pg_current_wal_insert_lsn())");
    let name = name.lines().last().unwrap_or_default().to_owned();
    let _ = sql(server, "select pg_switch_wal()");
    wait_until(&format!("{name} is archived"), Duration::from_secs(60), || {
        sql(server, &format!("select coalesce(last_archived_wal, '') >= '{name}' from pg_stat_archiver")) == "t"
    });
    name
}

/// A client program in the background.
pub fn client(server: &Server, program: &str, arguments: &[&str]) -> Running {
    let mut command = server.client(program).expect("a client program");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Running::new(command.spawn().expect("start a client"))
}

/// Fails the test when a relation of any database is damaged.
#[track_caller]
pub fn amcheck(server: &Server) {
    let databases =
        sql(server, "select string_agg(datname, E'\\x1f') from pg_database where datallowconn and datname !~ '^template'");
    // A name may hold a line end.
    for database in databases.split('\x1f') {
        let _ = server.psql_in(database, "create extension if not exists amcheck").expect("amcheck in every database");
    }
    amcheck_read_only(server);
}

/// As [`amcheck`], on a server that cannot be written to: the extension must be there.
#[track_caller]
pub fn amcheck_read_only(server: &Server) {
    let mut command = server.client("pg_amcheck").expect("pg_amcheck");
    command.args(["--all", "--heapallindexed", "--exclude-database=template*"]);
    let ran = run(command);
    assert_eq!(ran.code, Some(0), "{}\n{}{}", ran.line, ran.stdout, ran.stderr);
}

/// Reproducible random numbers; the seed is printed, and can be given in `PGVAULT_TEST_SEED`.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let given = std::env::var("PGVAULT_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| jiff::Timestamp::now().as_microsecond().unsigned_abs());
        eprintln!("PGVAULT_TEST_SEED={seed}");
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number from `from` up to, and without, `to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        from + self.0 % (to - from)
    }
}
