//! `pgvault-stores`: starts object stores for a run of tests or for a developer, and says how to reach them. `cargo xtask stores` and
//! `cargo xtask test` start it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a development tool talks to a terminal")]

use std::io::Read;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use pgvault_teststores::{Kind, Server};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Parser)]
#[command(name = "pgvault-stores")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what these stores need
    Install {
        /// Which
        #[arg(required = true)]
        stores: Vec<Kind>,
    },
    /// Start these stores, say how to reach them, and end them at Ctrl-C
    Run {
        /// Which
        #[arg(required = true)]
        stores: Vec<Kind>,
    },
    /// Start these stores, say a line of the environment for each, and end them with the standard input
    Serve {
        /// Which
        #[arg(required = true)]
        stores: Vec<Kind>,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgvault-stores: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Install { stores } => stores.iter().try_for_each(|kind| Server::install(*kind)),
        Command::Run { stores } => {
            let servers = start(stores)?;
            for server in &servers {
                show(server)?;
            }
            println!("\nCtrl-C ends them");
            until_signalled()
        }
        Command::Serve { stores } => {
            let servers = start(stores)?;
            println!("ready");
            let _ = std::io::stdin().read_to_end(&mut Vec::new()).context("wait for the end of the input")?;
            drop(servers);
            Ok(())
        }
    }
}

fn start(stores: &[Kind]) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for kind in stores {
        let server = Server::start(*kind).with_context(|| format!("start {kind}"))?;
        println!("{}={}", kind.variable(), serde_json::to_string(server.info())?);
        servers.push(server);
    }
    Ok(servers)
}

fn show(server: &Server) -> Result<()> {
    let place = server.place()?;
    println!("\n# {}: {}", server.info().kind, place.url());
    for (name, value) in place.variables()? {
        println!("export {name}='{value}'");
    }
    println!("# or, as a configuration:");
    for line in place.config("passphrase_file = \"...\"", "")?.lines() {
        println!("#   {line}");
    }
    Ok(())
}

fn until_signalled() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}
