//! A PostgreSQL server in a container.

use std::time::Duration;

use async_trait::async_trait;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::ContainerState;
use futures::StreamExt;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::{Error, ErrorKind, Result};

use super::client::Engine;
use super::container::{Container, has_ended};
use super::sandbox::Sandbox;
use super::{Place, text};
use crate::runner::{Ended, Ran, Running, Site};

/// Each server has a folder of its own for its socket.
pub(super) const PORT: u16 = 5432;

/// How many lines of the log an error shows.
const LOG_LINES: u32 = 25;

/// How many of them are searched for why it ended.
const SEARCHED: u32 = 100;

/// Bytes of a program's output that are kept.
const KEPT: usize = 4096;

/// How often in a row the service may fail to answer before the server is given up.
const SILENCES: u32 = 5;

/// The exit code of a program that signal 9 ended.
const KILLED: i64 = 128 + 9;

/// Says its own number first, so that it can be killed, and then becomes the program. What that writes to its standard output is of no use,
/// and may be as large as the database.
const BECOME: &str = r#"echo "$$" >&2; exec "$0" "$@" >/dev/null"#;

/// A server.
pub(super) struct Contained {
    container: Container,
    connection: ConnInfo,
    environment: Vec<String>,
    /// Bytes that it may use, as the service says.
    memory: Option<u64>,
    ended: Option<Ended>,
    silences: u32,
    /// After the container, because they go in this order.
    #[expect(dead_code, reason = "dropping it removes the folder and gives its lock back")]
    place: Place,
}

impl Contained {
    /// Starts it on a site. `asked` is the memory that it was to be limited to.
    pub(super) async fn started(engine: &Engine, sandbox: &Sandbox, site: &Site, place: Place, asked: Option<u64>) -> Result<Self> {
        let folder = text(place.folder.path())?;
        let quoted = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let connection = format!("host={} port={PORT} user={} dbname=postgres", quoted(&folder), quoted(&site.user));
        let connection = ConnInfo::parse(&connection, &|_| None)?;
        let environment = vec![
            format!("PGHOST={folder}"),
            format!("PGPORT={PORT}"),
            format!("PGUSER={}", site.user),
            "PGDATABASE=postgres".to_owned(),
            "PGCONNECT_TIMEOUT=10".to_owned(),
            "HOME=/tmp".to_owned(),
        ];
        let mut container = Container::created(engine, sandbox).await?;
        let memory = container.memory().await?;
        if let Err(error) = container.start().await {
            container.remove().await?;
            return Err(error);
        }
        if let (Some(bytes), None) = (asked, memory) {
            tracing::warn!(bytes, service = %engine, "the service does not limit memory: a Podman without root cannot do that everywhere");
        }
        tracing::info!(container = %container.id, drill = %site.name, "a container was started");
        Ok(Self { container, connection, environment, memory, ended: None, silences: 0, place })
    }

    /// In words, from the container's last state.
    async fn told(&self, state: &ContainerState) -> Ended {
        let code = state.exit_code.unwrap_or(-1);
        let ended = |how: String| Ended { how, out_of_memory: false, orderly: code == 0 };
        let log = if code == 0 { String::new() } else { self.last_words(SEARCHED).await };
        let killed = log.lines().any(|line| line.contains("(PID ") && line.contains("was terminated by signal 9"));
        // A service may not notice it: Podman 4.3 looks for its monitor's note in another folder. In a container, nobody else kills.
        if state.oom_killed == Some(true) || (killed && self.memory.is_some()) {
            let limit = self.memory.map_or_else(String::new, |bytes| format!(" of {} MiB", bytes / (1024 * 1024)));
            let how = format!("out of memory: a process needed more than the container's limit{limit}, and was killed");
            return Ended { how, out_of_memory: true, orderly: false };
        }
        match code {
            KILLED => ended("killed by signal 9: by hand, or by the kernel because memory was not enough".to_owned()),
            129..=192 => ended(format!("killed by signal {}", code - 128)),
            _ if killed => ended(format!(
                "exit code {code}, after one of its processes was killed by signal 9, as the kernel does when the machine is out of memory"
            )),
            _ => match state.error.as_deref() {
                Some(error) if !error.is_empty() => ended(format!("exit code {code}: {error}")),
                _ => ended(format!("exit code {code}")),
            },
        }
    }

    async fn last_words(&self, lines: u32) -> String {
        self.container.log(Some(lines)).await.map_or_else(|error| format!("(the log cannot be read: {error})"), |(_, all)| all)
    }

    async fn looked_at(&mut self) -> Result<Option<Ended>> {
        match self.container.state().await? {
            None => {
                let how = "its container was removed by somebody else".to_owned();
                Ok(Some(Ended { how, out_of_memory: false, orderly: false }))
            }
            Some(state) if has_ended(&state) => Ok(Some(self.told(&state).await)),
            Some(_) => Ok(None),
        }
    }

    /// Runs a command beside the server; gives its number in the container as soon as that is known, and what it said on its errors.
    async fn executed(&self, command: Vec<String>, limit: Duration) -> Result<Executed> {
        let engine = &self.container.engine;
        let failed = |error| engine.error("run a program in a container", error);
        let options = CreateExecOptions {
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            env: Some(self.environment.clone()),
            cmd: Some(command),
            ..CreateExecOptions::default()
        };
        let exec = engine.docker.create_exec(&self.container.id, options).await.map_err(failed)?.id;
        let StartExecResults::Attached { mut output, input: _input } =
            engine.docker.start_exec(&exec, None).await.map_err(failed)?
        else {
            return Err(Error::new(ErrorKind::Failed, "drill.docker", "a program in a container has no output"));
        };
        let mut said = LastWords::default();
        let listening = async {
            while let Some(part) = output.next().await {
                // An output that breaks off is over; the exit code says the rest.
                let Ok(part) = part else { break };
                said.hear(part.as_ref());
            }
        };
        let in_time = tokio::time::timeout(limit, listening).await.is_ok();
        Ok(Executed { exec, in_time, said })
    }

    /// The exit code, which may be known a moment after the output has ended.
    async fn exit_code(&self, exec: &str) -> Result<Option<i64>> {
        let engine = &self.container.engine;
        for _ in 0..100 {
            let state = engine.docker.inspect_exec(exec).await.map_err(|e| engine.error("ask for a program's exit code", e))?;
            if state.running != Some(true) {
                return Ok(state.exit_code);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(None)
    }
}

/// A program that was run beside the server.
struct Executed {
    exec: String,
    in_time: bool,
    said: LastWords,
}

/// The first line that somebody says, and the last ones.
#[derive(Debug, Default)]
struct LastWords {
    first: Vec<u8>,
    has_first: bool,
    kept: Vec<u8>,
}

impl LastWords {
    fn hear(&mut self, mut part: &[u8]) {
        if !self.has_first {
            let end = part.iter().position(|byte| *byte == b'\n');
            self.first.extend_from_slice(part.get(..end.unwrap_or(part.len())).unwrap_or_default());
            let Some(end) = end else { return };
            self.has_first = true;
            part = part.get(end + 1..).unwrap_or_default();
        }
        self.kept.extend_from_slice(part);
        let surplus = self.kept.len().saturating_sub(KEPT);
        let _ = self.kept.drain(..surplus);
    }

    /// The number that [`BECOME`] says.
    fn number(&self) -> Option<u32> {
        if !self.has_first {
            return None;
        }
        std::str::from_utf8(&self.first).ok()?.trim().parse().ok()
    }

    /// All but the number.
    fn text(&self) -> String {
        let kept = String::from_utf8_lossy(&self.kept);
        let text =
            if self.number().is_some() { kept.into_owned() } else { format!("{}\n{kept}", String::from_utf8_lossy(&self.first)) };
        text.trim_end().to_owned()
    }
}

#[async_trait]
impl Running for Contained {
    fn connection(&self) -> ConnInfo {
        self.connection.clone()
    }

    async fn ended(&mut self) -> Option<Ended> {
        if self.ended.is_none() {
            match self.looked_at().await {
                Ok(ended) => (self.ended, self.silences) = (ended, 0),
                // A service may be restarted under its containers.
                Err(_) if self.silences < SILENCES => self.silences += 1,
                Err(error) => return Some(Ended { how: error.to_string(), out_of_memory: false, orderly: false }),
            }
        }
        self.ended.clone()
    }

    async fn log_tail(&mut self) -> String {
        self.last_words(LOG_LINES).await
    }

    async fn program(&mut self, name: &str, arguments: &[String], limit: Duration) -> Result<Ran> {
        let mut command: Vec<String> = ["/bin/sh", "-c", BECOME, name].map(str::to_owned).into();
        command.extend_from_slice(arguments);
        let Executed { exec, in_time, said } = self.executed(command, limit).await?;
        if !in_time {
            if let Some(number) = said.number() {
                let kill = ["/bin/sh", "-c", "kill -9 \"$0\"", &number.to_string()].map(str::to_owned).into();
                let _ = self.executed(kill, Duration::from_secs(10)).await?;
            }
            return Ok(Ran { code: None, output: format!("it was ended after {} s", limit.as_secs()) });
        }
        let code = self.exit_code(&exec).await?;
        match code {
            Some(126 | 127) => {
                Err(Error::new(ErrorKind::Failed, "drill.command", format!("run {name} in the container: {}", said.text()))
                    .with_hint("the image lacks a program: take one with PostgreSQL's client programs"))
            }
            // A signal has ended it.
            Some(code) => Ok(Ran { code: i32::try_from(code).ok().filter(|code| (0..=128).contains(code)), output: said.text() }),
            None => Ok(Ran { code: None, output: said.text() }),
        }
    }

    /// By a signal, not by the service's own way to stop: that ends with a kill, in Podman 4.3 even without waiting first.
    async fn stop(&mut self, limit: Duration) -> Result<()> {
        if self.ended.is_none() {
            let signalled = self.container.signal("SIGINT").await;
            let Some(state) = self.container.ended_within(limit).await? else {
                let message =
                    format!("the server in the container {} does not end within {} s", self.container.id, limit.as_secs());
                let error =
                    Error::new(ErrorKind::Failed, "server.timeout", format!("{message}\n{}", self.last_words(LOG_LINES).await));
                return Err(match signalled {
                    Ok(()) => error,
                    Err(source) => error.with_source(source),
                });
            };
            self.ended = Some(match state {
                Some(state) => self.told(&state).await,
                None => {
                    Ended { how: "its container was removed by somebody else".to_owned(), out_of_memory: false, orderly: false }
                }
            });
        }
        match &self.ended {
            Some(ended) if !ended.orderly => {
                let message =
                    format!("the server did not shut down in an orderly way: {}\n{}", ended.how, self.last_words(LOG_LINES).await);
                Err(Error::new(ErrorKind::Failed, "server.ended", message))
            }
            _ => Ok(()),
        }
    }

    async fn remove(&mut self) -> Result<()> {
        self.container.remove().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_told_apart_from_what_a_program_says() {
        let mut said = LastWords::default();
        for part in ["1", "7\npg_du", "mp: error\n"] {
            said.hear(part.as_bytes());
        }
        assert_eq!((said.number(), said.text().as_str()), (Some(17), "pg_dump: error"));
        said.hear(&[b'x'; 2 * KEPT]);
        assert_eq!(said.text().len(), KEPT);

        let mut said = LastWords::default();
        said.hear(b"17");
        assert_eq!(said.number(), None, "the line is not over");
        let mut said = LastWords::default();
        said.hear(b"OCI runtime error\nmore\n");
        assert_eq!((said.number(), said.text().as_str()), (None, "OCI runtime error\nmore"));
    }
}
