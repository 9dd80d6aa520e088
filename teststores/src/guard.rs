//! Child processes that end with this one, however it ends.
//!
//! A test program may be killed, and statics are never dropped. So every server runs below a small shell that waits for the end
//! of its standard input, which only this process holds open: then it ends the server. The last of them removes the folder
//! in which they worked.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `$3...` with its output in the file `$2`; `$1` is the folder. Says the number of the server first.
const GUARD: &str = r#"
folder=$1 log=$2; shift 2
: >"$folder/alive.$$"
"$@" </dev/null >>"$log" 2>&1 &
server=$!
echo "$server"
read -r _
kill "$server" 2>/dev/null
waited=0
# A sleep in the foreground makes the shell notice that the server has ended.
while kill -0 "$server" 2>/dev/null && [ "$waited" -lt 100 ]; do sleep 0.1; waited=$((waited + 1)); done
kill -9 "$server" 2>/dev/null
rm -f "$folder/alive.$$"
"#;

/// Removes the folder `$1` when no server works in it any more.
const SWEEP: &str = r#"
read -r _
waited=0
while [ -n "$(ls "$1" | grep '^alive\.')" ] && [ "$waited" -lt 150 ]; do sleep 0.1; waited=$((waited + 1)); done
rm -rf -- "$1"
"#;

/// A temporary folder that is removed when it is dropped, or with this process.
#[derive(Debug)]
pub(crate) struct Work {
    folder: PathBuf,
    sweeper: Child,
}

impl Work {
    pub(crate) fn new(name: &str) -> Result<Self> {
        // The shell removes it: it also does when this process has no time to.
        let folder = tempfile::Builder::new().prefix(&format!("pgvault-{name}-")).tempdir().context("create a folder")?.keep();
        // The server of a test runs as another account, and may be shown a certificate in here.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).context("set permissions")?;
        let sweeper = shell(SWEEP).arg(&folder).spawn().context("start sh")?;
        Ok(Self { folder, sweeper })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// A new folder in it.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Starts a server; what it writes goes into `name.log`.
    pub(crate) fn start(&self, name: &str, server: &Command) -> Result<Process> {
        let log = self.folder.join(format!("{name}.log"));
        let mut guard = shell(GUARD);
        guard.arg(&self.folder).arg(&log).arg(server.get_program()).args(server.get_args());
        for (name, value) in server.get_envs() {
            match value {
                Some(value) => guard.env(name, value),
                None => guard.env_remove(name),
            };
        }
        if let Some(folder) = server.get_current_dir() {
            guard.current_dir(folder);
        }
        let mut guard = guard.stdout(Stdio::piped()).spawn().with_context(|| format!("start {name}"))?;
        let mut line = String::new();
        let said = guard.stdout.take().context("no output of the guard")?;
        let _ = BufReader::new(said).read_line(&mut line).context("read the number of a process")?;
        let pid = line.trim().parse().with_context(|| format!("{name} has no process number: {line:?}"))?;
        Ok(Process { name: name.to_owned(), pid, log, guard })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}

/// A server below its guard; ends when it is dropped, or with this process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    pid: u32,
    log: PathBuf,
    guard: Child,
}

impl Process {
    /// The number of the server's process.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Fails when the server has ended.
    pub(crate) fn ensure_running(&self) -> Result<()> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        match state {
            None | Some('Z' | 'X') => bail!("{} has ended:\n{}", self.name, self.said()),
            Some(_) => Ok(()),
        }
    }

    /// The end of what it has written.
    pub(crate) fn said(&self) -> String {
        let text = fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// A shell that only the end of its input ends: not the terminal's Ctrl-C, which goes to a process group.
fn shell(script: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    shell
}

/// A port of the loopback interface that is free now. Another process may take it before its user does: whoever starts a server
/// on one tries again with another.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context("find a free port")?.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn exists(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_server_and_its_folder_go_when_they_are_dropped() {
        let work = Work::new("guard").unwrap();
        let folder = work.path().to_path_buf();
        let mut server = Command::new("sh");
        server.args(["-c", "echo started with $WORD; exec sleep 1000"]).env("WORD", "something");
        let process = work.start("sleeper", &server).unwrap();
        let pid = process.pid();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while !process.said().contains("started with something") {
            assert!(std::time::Instant::now() < deadline, "{}", process.said());
        }
        process.ensure_running().unwrap();
        drop(process);
        assert!(!exists(pid));
        drop(work);
        assert!(!folder.exists());
    }

    #[test]
    fn a_server_that_ends_by_itself_is_noticed() {
        let work = Work::new("guard").unwrap();
        let mut server = Command::new("sh");
        let process = work.start("quitter", server.args(["-c", "echo no port for me; exit 3"])).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while process.ensure_running().is_ok() {
            assert!(std::time::Instant::now() < deadline);
        }
        assert!(process.ensure_running().unwrap_err().to_string().contains("no port for me"));
    }
}
