//! A server that is installed here, as a child of this process.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::{Error, ErrorKind, Result};

use super::{Ended, Needs, Ran, Runner, Running, Site};
use crate::process::{Account, Install, Mode, Server};
use crate::task::blocking;

/// Runs copies with the programs of this machine.
#[derive(Debug)]
pub struct ProcessRunner {
    /// Folders with programs of PostgreSQL besides the usual ones.
    programs: Vec<PathBuf>,
    account: Account,
    install: Option<Install>,
    pod: Option<String>,
}

impl ProcessRunner {
    /// Looks into `programs` besides the usual places.
    ///
    /// # Errors
    /// When root finds no account that could run a server.
    pub fn new(programs: Vec<PathBuf>) -> Result<Self> {
        Ok(Self { programs, account: Account::unprivileged()?, install: None, pod: None })
    }

    /// Says in reports that this process is a pod's.
    #[must_use]
    pub fn in_pod(self, name: String) -> Self {
        Self { pod: Some(name), ..self }
    }

    pub(crate) fn install(&self) -> Result<&Install> {
        self.install.as_ref().ok_or_else(|| Error::new(ErrorKind::Failed, "drill.runner", "the runner was not prepared"))
    }
}

#[async_trait]
impl Runner for ProcessRunner {
    fn describe(&self) -> String {
        let runs_in = self.pod.as_ref().map_or_else(|| "process".to_owned(), |pod| format!("kubernetes, pod {pod}"));
        match &self.install {
            Some(install) => format!("{runs_in}, PostgreSQL {} in {}", install.version(), install.bin().display()),
            None => runs_in,
        }
    }

    async fn prepare(&mut self, needs: &Needs) -> Result<()> {
        let (major, programs) = (needs.major, self.programs.clone());
        self.install = Some(blocking(move || Ok(Install::find(Some(major), &programs)?)).await?);
        Ok(())
    }

    fn owner(&self) -> (u32, u32) {
        (self.account.uid(), self.account.gid())
    }

    async fn start(&self, site: &Site, settings: &[(String, String)]) -> Result<Box<dyn Running>> {
        let (install, site, settings) = (self.install()?.clone(), site.clone(), settings.to_vec());
        let server = blocking(move || {
            let mut adopt = Server::adopt(&install, &site.pgdata).user(&site.user).folder_in(&site.folder);
            for (name, value) in settings {
                adopt = adopt.option(name, value);
            }
            Ok(adopt.launch()?)
        });
        let server = server.await?;
        let connection = ConnInfo::parse(&server.conninfo(), &|_| None)?;
        Ok(Box::new(Local { server: Arc::new(Mutex::new(server)), connection }))
    }
}

struct Local {
    /// Its methods block, and are called elsewhere.
    server: Arc<Mutex<Server>>,
    connection: ConnInfo,
}

impl Local {
    async fn with<T: Send + 'static>(&self, work: impl FnOnce(&mut Server) -> Result<T> + Send + 'static) -> Result<T> {
        let server = self.server.clone();
        blocking(move || work(&mut server.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

#[async_trait]
impl Running for Local {
    fn connection(&self) -> ConnInfo {
        self.connection.clone()
    }

    async fn ended(&mut self) -> Option<Ended> {
        let ended = self.with(|server| Ok(server.how_it_ended()?)).await;
        match ended {
            Ok(None) => None,
            Ok(Some(status)) => {
                Some(Ended { how: format!("it ended with {status}"), out_of_memory: false, orderly: status.success() })
            }
            Err(error) => Some(Ended { how: error.to_string(), out_of_memory: false, orderly: false }),
        }
    }

    async fn log_tail(&mut self) -> String {
        self.with(|server| Ok(server.log_tail())).await.unwrap_or_default()
    }

    async fn program(&mut self, name: &str, arguments: &[String], limit: Duration) -> Result<Ran> {
        let (name, arguments) = (name.to_owned(), arguments.to_vec());
        let command = self.with(move |server| {
            let mut command = server.client(&name)?;
            let _ = command.args(arguments);
            Ok(command)
        });
        super::command::run(command.await?, limit).await
    }

    async fn stop(&mut self, limit: Duration) -> Result<()> {
        self.with(move |server| Ok(server.stop_within(Mode::Fast, limit)?)).await
    }
}
