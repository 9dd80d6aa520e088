//! A running server, and the ways it can end.

use std::fmt;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{
    Account, Adopt, Error, Install, Result, ServerBuilder, command_line, finished, io_error, tail, without_libpq_environment,
};

/// A Unix socket's path has at most 107 bytes; the name in the folder takes `/.s.PGSQL.65535`.
const LONGEST_FOLDER: usize = 107 - 15;

/// How often states are looked at. Starting an empty server takes about 50 ms.
const POLL: Duration = Duration::from_millis(15);

/// How many lines of the log an error shows.
const LOG_LINES: usize = 25;

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Waits until every client is gone.
    Smart,
    /// Ends the clients, writes a checkpoint.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// Where recovery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// At its target, open for reading (`recovery_target_action = pause`).
    Paused,
    /// Open for writing, on a new timeline or after crash recovery.
    Promoted,
    /// At its target, and the server has stopped (`recovery_target_action = shutdown`).
    ShutDown,
}

/// What a server is started with, apart from its data directory.
pub(super) struct Launch {
    pub(super) install: Install,
    pub(super) account: Account,
    /// Holds the socket, the log and, of a temporary cluster, the data; removed with the server.
    folder: TempDir,
    pub(super) options: Vec<(String, String)>,
    pub(super) user: String,
    pub(super) password: Option<String>,
    pub(super) tcp: bool,
    pub(super) fixed_port: Option<u16>,
    timeout: Duration,
}

impl Launch {
    /// The folder is made in `parent`, when that can be reached and its path is short enough for a socket.
    pub(super) fn new(install: Install, account: Account, timeout: Duration, parent: Option<&Path>) -> Result<Self> {
        let folder = private_folder(&account, parent)?;
        Ok(Self {
            install,
            account,
            folder,
            options: Vec::new(),
            user: "postgres".to_owned(),
            password: None,
            tcp: false,
            fixed_port: None,
            timeout,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file that only the server's account (and root) can read.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder().join(name);
        fs::write(&path, text).map_err(io_error("write", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io_error("set the permissions of", &path))?;
        self.account.own(&path)?;
        Ok(path)
    }
}

/// A folder that only the account can enter, with a path short enough for a socket.
pub(crate) fn private_folder(account: &Account, parent: Option<&Path>) -> Result<TempDir> {
    let wanted = parent.map_or_else(std::env::temp_dir, Path::to_path_buf);
    // `/pgvault-` and six random letters.
    let fits = wanted.as_os_str().len() + 15 <= LONGEST_FOLDER && account.check_can_reach(&wanted.join("x")).is_ok();
    let parent = if fits { wanted } else { PathBuf::from("/tmp") };
    let folder = tempfile::Builder::new()
        .prefix("pgvault-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(&parent)
        .map_err(io_error("create a folder in", &parent))?;
    account.own(folder.path())?;
    Ok(folder)
}

/// A PostgreSQL server that this process started.
///
/// Dropping it stops the server at once and removes its temporary files, the data of a cluster without a directory of
/// its own included.
pub struct Server {
    launch: Launch,
    pgdata: PathBuf,
    port: u16,
    running: Option<Running>,
}

struct Running {
    child: Child,
    command: String,
    /// Where in the log this run begins.
    log_from: u64,
}

/// What `postmaster.pid` says about the server's state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not there yet, or in recovery before the point where it can be read.
    Starting,
    /// In recovery and, with `hot_standby = off`, not to be read.
    Standby,
    /// Accepts connections.
    Ready,
}

impl Server {
    /// Describes a new cluster.
    pub fn builder(install: &Install) -> ServerBuilder {
        ServerBuilder::new(install)
    }

    /// Describes how to start a restored data directory, isolated from the cluster it is a copy of.
    ///
    /// Libraries that the configuration preloads are loaded: replay may need them. What they do on their own once the
    /// copy is promoted is theirs; of the well-known ones, `pg_cron` is kept from running jobs.
    pub fn adopt(install: &Install, pgdata: impl Into<PathBuf>) -> Adopt {
        Adopt::new(install, pgdata.into())
    }

    pub(super) fn new(launch: Launch, pgdata: PathBuf) -> Self {
        let port = launch.fixed_port.unwrap_or(5432);
        Self { launch, pgdata, port, running: None }
    }

    /// Starts the server, when it was stopped, and waits until it accepts connections.
    ///
    /// # Errors
    ///
    /// With the end of the server's log.
    pub fn start(&mut self) -> Result<()> {
        let mut attempts = 5;
        loop {
            self.launch()?;
            let timeout = self.launch.timeout;
            match self.wait_for("starting", timeout, |state| state != State::Starting) {
                // Between looking for a free port and taking it, somebody else may take it.
                Err(Error::Ended { log, .. })
                    if attempts > 1 && self.launch.tcp && self.launch.fixed_port.is_none() && log.contains("could not bind") =>
                {
                    attempts -= 1;
                }
                other => return other,
            }
        }
    }

    /// Starts the server without waiting for it.
    pub(super) fn launch(&mut self) -> Result<()> {
        if self.is_running() {
            return Err(Error::State { pgdata: self.pgdata.clone(), state: "running" });
        }
        self.running = None;
        self.port = match self.launch.fixed_port {
            Some(port) => port,
            None => free_port()?,
        };
        let folder = self.launch.folder();
        let mut command = Command::new(self.launch.install.program("postgres")?);
        command.arg("-D").arg(&self.pgdata);
        let listen = if self.launch.tcp { "127.0.0.1" } else { "" };
        let own = [
            ("port", self.port.to_string()),
            ("unix_socket_directories", folder.display().to_string()),
            ("listen_addresses", listen.to_owned()),
        ];
        let own = own.iter().map(|(name, value)| (*name, value.as_str()));
        let options = self.launch.options.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in own.chain(options) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let path = self.log();
        let log = fs::OpenOptions::new().create(true).append(true).open(&path).map_err(io_error("open", &path))?;
        let log_from = log.metadata().map_err(io_error("read the size of", &path))?.len();
        let errors = log.try_clone().map_err(io_error("open", &path))?;
        command.current_dir(folder).stdin(Stdio::null()).stdout(log).stderr(errors);
        self.launch.account.apply(without_libpq_environment(&mut command));
        let line = command_line(&command);
        let child = command.spawn().map_err(|source| Error::Spawn { command: line.clone(), source })?;
        self.running = Some(Running { child, command: line, log_from });
        Ok(())
    }

    /// Stops the server and waits until it has ended.
    ///
    /// # Errors
    ///
    /// When it is not running, or takes longer than the builder's timeout.
    pub fn stop(&mut self, mode: Mode) -> Result<()> {
        self.stop_within(mode, self.launch.timeout)
    }

    /// As [`stop`](Self::stop), with another limit.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop).
    pub fn stop_within(&mut self, mode: Mode, timeout: Duration) -> Result<()> {
        self.signal(match mode {
            Mode::Smart => Signal::TERM,
            Mode::Fast => Signal::INT,
            Mode::Immediate => Signal::QUIT,
        })?;
        let status = self.wait_for_end("stopping", timeout)?;
        if mode != Mode::Immediate && !status.success() {
            // Somebody else was faster, or it broke while it was told to stop.
            return Err(self.ended_error(status, "stopping"));
        }
        self.running = None;
        Ok(())
    }

    /// Stops the server and starts it again.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop) and [`start`](Self::start).
    pub fn restart(&mut self, mode: Mode) -> Result<()> {
        self.stop(mode)?;
        self.start()
    }

    /// Kills every process of the server, as the end of its machine would, and waits until none is left. What the
    /// operating system holds of its writes survives.
    ///
    /// # Errors
    ///
    /// When it is not running.
    pub fn kill9(&mut self) -> Result<()> {
        let pid = self.pid().ok_or_else(|| self.not_running())?;
        // Stopped first: a postmaster that sees its children die would begin to clean up after them.
        self.signal(Signal::STOP)?;
        let children = children_of(pid);
        self.signal(Signal::KILL)?;
        for child in children.iter().filter_map(|child| Pid::from_raw(*child)) {
            // One that has ended on its own meanwhile is what was wanted.
            let _ = kill_process(child, Signal::KILL);
        }
        self.wait_for_end("killing", Duration::from_secs(30))?;
        self.running = None;
        // The shared memory of the old processes must be free before a new server starts.
        let deadline = Instant::now() + Duration::from_secs(10);
        while children.iter().any(|child| is_alive(*child)) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits for the end of recovery: at the target, or past all WAL.
    ///
    /// # Errors
    ///
    /// When the server ends with an error (a target that is not in the WAL, a failed `restore_command`), when it pauses for
    /// another reason than its target, or after `timeout`.
    pub fn wait_until_paused_or_promoted(&mut self, timeout: Duration) -> Result<Outcome> {
        const WAITING: &str = "recovering";
        const RECOVERY_STATE: &str =
            "select case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() else 'promoted' end";
        let deadline = Instant::now() + timeout;
        let mut refused = 0;
        loop {
            if let Some(status) = self.ended()? {
                // "shutdown" is an orderly end; everything else leaves a status.
                return if status.success() { Ok(Outcome::ShutDown) } else { Err(self.ended_error(status, WAITING)) };
            }
            // "ready" also means a standby that can be read; only the server itself knows the difference.
            if self.state() == State::Ready {
                match self.psql(RECOVERY_STATE) {
                    Ok(state) if state == "promoted" => return Ok(Outcome::Promoted),
                    Ok(state) if state == "paused" && self.log_of_this_run().contains("insufficient parameter settings") => {
                        return Err(Error::Undersized { pgdata: self.pgdata.clone(), log: self.log_tail() });
                    }
                    Ok(state) if state == "paused" => return Ok(Outcome::Paused),
                    Ok(_) => refused = 0,
                    // Once is a promotion between two looks; always is a superuser of another name, or the like.
                    Err(_) if refused < 20 => refused += 1,
                    Err(error) => return Err(error),
                }
            }
            if Instant::now() >= deadline {
                return Err(self.timeout_error(WAITING, timeout));
            }
            std::thread::sleep(POLL * 4);
        }
    }

    /// Runs SQL in the database `postgres` and gives the result, unaligned and without headers or the last line end.
    ///
    /// # Errors
    ///
    /// With what `psql` said, after the first statement that fails.
    pub fn psql(&self, sql: &str) -> Result<String> {
        self.psql_in("postgres", sql)
    }

    /// As [`psql`](Self::psql), in another database. Each statement is its own transaction.
    ///
    /// # Errors
    ///
    /// As [`psql`](Self::psql).
    pub fn psql_in(&self, database: &str, sql: &str) -> Result<String> {
        let mut command = self.client("psql")?;
        // Not as an argument: a name with `=` would be taken for connection parameters.
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-f", "-"]).env("PGDATABASE", database);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|source| Error::Spawn { command: command_line(&command), source })?;
        let stdin = child.stdin.take();
        let output = std::thread::scope(|scope| {
            // Written beside reading the answer: each side could otherwise wait for the other with a full pipe. After a
            // failed statement psql reads no further, and its own message is the one to show.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(sql.as_bytes())));
            child.wait_with_output()
        });
        let output = output.map_err(|source| Error::Spawn { command: command_line(&command), source })?;
        let mut answer = finished(&command, &output)?;
        if answer.ends_with('\n') {
            answer.pop();
        }
        Ok(answer)
    }

    /// A client program (`psql`, `pg_dump`, `pgbench`) that finds this server by its environment.
    ///
    /// # Errors
    ///
    /// [`Error::NoProgram`] when no installation has it.
    pub fn client(&self, program: &str) -> Result<Command> {
        let mut command = Command::new(self.launch.install.client(program)?);
        without_libpq_environment(&mut command);
        command.env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string()).env("PGUSER", &self.launch.user);
        command.env("PGDATABASE", "postgres").env("PGCONNECT_TIMEOUT", "10");
        if let Some(password) = &self.launch.password {
            command.env("PGPASSWORD", password);
        }
        Ok(command)
    }

    /// Where clients find the server, in libpq's keywords and through its socket. The password is not part of it.
    pub fn conninfo(&self) -> String {
        let quote = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let plain = |value: &str| value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
        let value = |text: &str| if plain(text) { text.to_owned() } else { quote(text) };
        let host = self.socket_dir().to_string_lossy();
        format!("host={} port={} user={} dbname=postgres", value(&host), self.port, value(&self.launch.user))
    }

    /// The superuser's name.
    pub fn user(&self) -> &str {
        &self.launch.user
    }

    /// The superuser's password, when the cluster was made with one.
    pub fn password(&self) -> Option<&str> {
        self.launch.password.as_deref()
    }

    /// The data directory.
    pub fn pgdata(&self) -> &Path {
        &self.pgdata
    }

    /// The folder of the socket.
    pub fn socket_dir(&self) -> &Path {
        self.launch.folder()
    }

    /// The port: part of the socket's name, and the TCP port when there is one.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The programs it runs with.
    pub fn install(&self) -> &Install {
        &self.launch.install
    }

    /// The account it runs as.
    pub fn account(&self) -> &Account {
        &self.launch.account
    }

    /// The process id of the postmaster, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.child.id())
    }

    /// How the server ended by itself, or nothing while it runs.
    ///
    /// # Errors
    ///
    /// When it was stopped, or never started.
    pub fn how_it_ended(&mut self) -> Result<Option<ExitStatus>> {
        self.ended()
    }

    /// True while the server process exists.
    pub fn is_running(&mut self) -> bool {
        matches!(self.ended(), Ok(None))
    }

    /// The log of all its runs.
    pub fn log(&self) -> PathBuf {
        self.launch.folder().join("server.log")
    }

    /// The last lines of the log of the current run.
    pub fn log_tail(&self) -> String {
        tail(&self.log_of_this_run(), LOG_LINES)
    }

    /// The end of the log of the current run, 64 KiB at most: a long recovery logs every segment.
    fn log_of_this_run(&self) -> String {
        const MOST: u64 = 64 * 1024;
        let from = self.running.as_ref().map_or(0, |running| running.log_from);
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = fs::File::open(self.log())?;
            let size = file.metadata()?.len();
            file.seek(SeekFrom::Start(from.max(size.saturating_sub(MOST))))?;
            let mut bytes = Vec::new();
            file.take(MOST).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read()
            .map_or_else(|error| format!("(the log cannot be read: {error})"), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The state according to the file that the server keeps about itself. This is what `pg_ctl --wait` goes by, and
    /// needs neither a client program nor a password.
    fn state(&self) -> State {
        let text = fs::read_to_string(self.pgdata.join("postmaster.pid")).unwrap_or_default();
        let mut lines = text.lines();
        // A restored directory may carry the file of its original.
        let is_ours = lines.next().and_then(|line| line.trim().parse().ok()) == self.pid();
        match lines.nth(6).map(str::trim) {
            Some("ready") if is_ours => State::Ready,
            Some("standby") if is_ours => State::Standby,
            _ => State::Starting,
        }
    }

    fn wait_for(&mut self, what: &'static str, timeout: Duration, enough: impl Fn(State) -> bool) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended()? {
                return Err(self.ended_error(status, what));
            }
            if enough(self.state()) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.timeout_error(what, timeout));
            }
            std::thread::sleep(POLL);
        }
    }

    fn wait_for_end(&mut self, what: &'static str, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(self.timeout_error(what, timeout));
            }
            std::thread::sleep(POLL);
        }
    }

    /// How the server ended, or nothing while it runs.
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(running) = &mut self.running else { return Err(self.not_running()) };
        running.child.try_wait().map_err(|source| Error::Spawn { command: running.command.clone(), source })
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        // An ended child has been waited for: its number may be another process's by now.
        if !self.is_running() {
            return Err(self.not_running());
        }
        let Some(running) = &self.running else { return Err(self.not_running()) };
        kill_process(Pid::from_child(&running.child), signal)
            .map_err(|source| Error::Spawn { command: running.command.clone(), source: source.into() })
    }

    fn not_running(&self) -> Error {
        Error::State { pgdata: self.pgdata.clone(), state: "not running" }
    }

    fn command(&self) -> String {
        self.running.as_ref().map_or_else(|| "postgres".to_owned(), |running| running.command.clone())
    }

    fn ended_error(&self, status: ExitStatus, waiting_for: &'static str) -> Error {
        Error::Ended { command: self.command(), status, waiting_for, log: self.log_tail() }
    }

    fn timeout_error(&self, waiting_for: &'static str, timeout: Duration) -> Error {
        Error::Timeout { command: self.command(), waiting_for, timeout, log: self.log_tail() }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("version", self.launch.install.version())
            .field("pgdata", &self.pgdata)
            .field("port", &self.port)
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        let stopped = self.signal(Signal::QUIT).and_then(|()| self.wait_for_end("stopping", Duration::from_secs(10)));
        if stopped.is_err() {
            let _ = self.kill9();
        }
    }
}

/// A port that nobody listens on at the moment.
fn free_port() -> Result<u16> {
    let address = Path::new("127.0.0.1:0");
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io_error("find a free port on", address))?;
    Ok(listener.local_addr().map_err(io_error("find a free port on", address))?.port())
}

/// Children of a process, from /proc. Elsewhere there are none to be seen; they end by themselves once they miss the
/// postmaster.
fn children_of(pid: u32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|child| stat(*child).is_some_and(|(_, parent)| parent == pid))
        .collect()
}

fn is_alive(pid: i32) -> bool {
    // A zombie holds no shared memory, and in a container may never be collected.
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// State and parent of a process. The name before them is in parentheses and may contain anything.
fn stat(pid: i32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
