//! A container, from its creation to its removal. It does not outlive its value, and what cannot be removed is told.

use std::time::{Duration, Instant};

use bollard::container::LogOutput;
use bollard::models::{ContainerState, ContainerStateStatusEnum};
use bollard::query_parameters::{CreateContainerOptions, KillContainerOptions, LogsOptions, RemoveContainerOptions};
use futures::StreamExt;
use pgvault_core::{Error, ErrorKind, Result};

use super::client::{Engine, is_absent, is_between};
use super::sandbox::Sandbox;

/// How often a container is looked at.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// How often a container is asked for that has ended and is about to be tidied up: 10 s.
pub(super) const BETWEEN: u32 = 200;

/// How often removing is tried: a container that is just ending may refuse, and so may one that another process removes.
const ATTEMPTS: u32 = 40;

/// What a program in a container has said when it ended.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) code: i64,
    pub(super) stdout: String,
    /// Both outputs.
    pub(super) all: String,
}

/// A container of this process.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) engine: Engine,
    pub(super) id: String,
    gone: bool,
}

impl Container {
    /// Creates it without starting it.
    pub(super) async fn created(engine: &Engine, sandbox: &Sandbox) -> Result<Self> {
        let options = CreateContainerOptions { name: sandbox.name().map(str::to_owned), ..CreateContainerOptions::default() };
        let created = engine.docker.create_container(Some(options), sandbox.body()).await;
        let created = created.map_err(|e| engine.error("create a container", e))?;
        for warning in created.warnings {
            tracing::warn!(container = %created.id, "{engine}: {warning}");
        }
        Ok(Self { engine: engine.clone(), id: created.id, gone: false })
    }

    pub(super) async fn start(&self) -> Result<()> {
        self.engine.docker.start_container(&self.id, None).await.map_err(|e| self.engine.error("start a container", e))
    }

    /// Its state, or nothing when it does not exist any more.
    pub(super) async fn state(&self) -> Result<Option<ContainerState>> {
        let docker = &self.engine.docker;
        let mut between = 0;
        loop {
            match docker.inspect_container(&self.id, None).await {
                Ok(answer) => return Ok(Some(answer.state.unwrap_or_default())),
                Err(error) if is_absent(&error) => return Ok(None),
                Err(error) if is_between(&error) && between < BETWEEN => {
                    between += 1;
                    tokio::time::sleep(POLL).await;
                }
                // Whoever was to tidy up has died; the exit code is known all the same.
                Err(error) if is_between(&error) => {
                    let exit_code = match docker.wait_container(&self.id, None).next().await {
                        Some(Ok(answer)) => Some(answer.status_code),
                        Some(Err(bollard::errors::Error::DockerContainerWaitError { code, .. })) => Some(code),
                        _ => None,
                    };
                    let status = Some(ContainerStateStatusEnum::EXITED);
                    return Ok(Some(ContainerState { status, exit_code, ..ContainerState::default() }));
                }
                Err(error) => return Err(self.engine.error("ask for a container's state", error)),
            }
        }
    }

    /// Bytes of memory that it is limited to, which may not be what was asked for. To be asked before it is
    /// started.
    pub(super) async fn memory(&self) -> Result<Option<u64>> {
        let answer = self.engine.docker.inspect_container(&self.id, None).await;
        let answer = answer.map_err(|e| self.engine.error("ask for a container's limits", e))?;
        let bytes = answer.host_config.and_then(|host| host.memory).and_then(|bytes| u64::try_from(bytes).ok());
        Ok(bytes.filter(|bytes| *bytes > 0))
    }

    /// Waits for its end: its last state, or nothing after `limit`. One that was removed has no state.
    pub(super) async fn ended_within(&self, limit: Duration) -> Result<Option<Option<ContainerState>>> {
        let deadline = Instant::now() + limit;
        loop {
            match self.state().await? {
                Some(state) if !has_ended(&state) => {}
                ended => return Ok(Some(ended)),
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub(super) async fn signal(&self, signal: &str) -> Result<(), bollard::errors::Error> {
        self.engine.docker.kill_container(&self.id, Some(KillContainerOptions { signal: signal.to_owned() })).await
    }

    /// What it wrote to its standard output and to both outputs; the last lines when `lines` says how many.
    pub(super) async fn log(&self, lines: Option<u32>) -> Result<(String, String)> {
        let tail = lines.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
        let options = LogsOptions { stdout: true, stderr: true, tail, ..LogsOptions::default() };
        let mut stream = self.engine.docker.logs(&self.id, Some(options));
        let (mut stdout, mut all) = (Vec::new(), Vec::new());
        while let Some(part) = stream.next().await {
            let part = part.map_err(|e| self.engine.error("read a container's log", e))?;
            if matches!(part, LogOutput::StdOut { .. }) {
                stdout.extend_from_slice(part.as_ref());
            }
            all.extend_from_slice(part.as_ref());
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        Ok((text(&stdout), text(&all)))
    }

    /// Starts it and waits for its end.
    pub(super) async fn to_its_end(&self, limit: Duration) -> Result<Said> {
        self.start().await?;
        let Some(ended) = self.ended_within(limit).await? else {
            let message = format!("a program in a container took longer than {} s", limit.as_secs());
            return Err(Error::new(ErrorKind::Failed, "drill.docker", message));
        };
        let code = ended.and_then(|state| state.exit_code).unwrap_or(-1);
        let (stdout, all) = self.log(None).await?;
        Ok(Said { code, stdout, all })
    }

    /// Removes it, whatever it does, and makes sure that it is gone.
    pub(super) async fn remove(&mut self) -> Result<()> {
        if !self.gone {
            remove(&self.engine, &self.id).await?;
            self.gone = true;
        }
        Ok(())
    }
}

impl Drop for Container {
    /// Whoever drops it may be inside of a runtime or outside of any, which may itself be ending: a thread with its own does the work.
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        let (engine, id) = (self.engine.clone(), self.id.clone());
        let work = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| Error::new(ErrorKind::Failed, "task", format!("start a runtime: {e}")))?;
            runtime.block_on(remove(&engine, &id))
        };
        let removed =
            std::thread::Builder::new().name("remove-container".to_owned()).spawn(work).map(std::thread::JoinHandle::join);
        let why = match removed {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(_)) => "the thread that removes it has panicked".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(container = %self.id, error = %why, "a container of a drill cannot be removed; the next drill tries again");
    }
}

/// True for a container that runs no more, or never will.
pub(super) fn has_ended(state: &ContainerState) -> bool {
    use ContainerStateStatusEnum::{DEAD, EXITED, REMOVING};
    match state.status {
        Some(EXITED | DEAD | REMOVING) => true,
        Some(_) => false,
        None => state.running == Some(false),
    }
}

/// Kills and removes a container with its volumes, and asks until it is gone.
///
/// # Errors
/// With the last answer of the service.
pub(super) async fn remove(engine: &Engine, id: &str) -> Result<()> {
    // First by hand: a forced removal may begin with the patience of an orderly stop.
    let kill = KillContainerOptions { signal: "SIGKILL".to_owned() };
    let _ = engine.docker.kill_container(id, Some(kill)).await;
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let options = RemoveContainerOptions { v: true, force: true, link: false };
        match engine.docker.remove_container(id, Some(options)).await {
            Err(error) if is_absent(&error) => return Ok(()),
            // Asked once more: the answer to that is the proof.
            Ok(()) => continue,
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(POLL * 5).await;
    }
    let doing = format!("remove the container {id}");
    Err(last.map_or_else(
        || Error::new(ErrorKind::Failed, "drill.docker", format!("{doing}: it is still there")),
        |e| engine.error(&doing, e),
    ))
}
