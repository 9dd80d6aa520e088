//! The `pgvault` command: reads arguments and configuration, calls the engine, prints, and decides the exit code.
//!
//! One file per command under `commands`; everything that reaches a terminal goes through [`output::Printer`].

mod args;
mod commands;
mod context;
mod endpoint;
mod exit;
mod output;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, WalCommand};
use output::Printer;

fn main() -> ExitCode {
    // PostgreSQL takes exit codes 1 to 125 of its restore_command for "no such file" and promotes. Whatever goes wrong in
    // `wal fetch`, a misspelt argument and a panic included, must end above that.
    let is_fetch = std::env::args_os().skip(1).skip_while(|argument| argument != "wal").any(|argument| argument == "fetch");
    let guarded = |code: u8| ExitCode::from(if is_fetch && code != 0 { exit::FETCH_FAILED } else { code });
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return guarded(if error.use_stderr() { exit::USAGE } else { 0 });
        }
    };
    output::start_logging(cli.log_format);
    let printer = Printer::new(cli.output, cli.meter.clone());
    // After a panic nothing is read any more that it may have left half-done.
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| run(&cli, &printer)));
    match ran {
        Ok(Ok(code)) => code.into(),
        Ok(Err(error)) => {
            printer.error(&error);
            guarded(exit::of(&error))
        }
        Err(_) => guarded(exit::FAILED),
    }
}

fn run(cli: &Cli, printer: &Printer) -> pgvault_core::Result<exit::Status> {
    match &cli.command {
        // PostgreSQL waits: what lies in the cache needs neither runtime nor vault.
        Command::Wal(WalCommand::Fetch(args)) => {
            if let Some(status) = commands::wal::prefetch::cached(cli, args) {
                return Ok(status);
            }
        }
        Command::Wal(WalCommand::Prefetch(_)) if commands::wal::prefetch::detach() => return Ok(exit::Status::Done),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|e| {
        pgvault_core::Error::new(pgvault_core::ErrorKind::Failed, "runtime", format!("start the async runtime: {e}"))
    })?;
    let result = runtime.block_on(async {
        match &cli.command {
            Command::Init(args) => commands::init::run(cli, printer, args).await,
            Command::Backup(args) => commands::backup::run(cli, printer, args).await,
            Command::Wal(WalCommand::Push(args)) => commands::wal::push(cli, printer, args).await,
            Command::Wal(WalCommand::Fetch(args)) => commands::wal::fetch(cli, printer, args).await,
            Command::Wal(WalCommand::Prefetch(args)) => commands::wal::prefetch::run(cli, args).await,
            Command::Wal(WalCommand::Stream(args)) => Box::pin(commands::wal::stream::run(cli, printer, args)).await,
            Command::Wal(WalCommand::Check(args)) => Box::pin(commands::wal::check::run(cli, printer, args)).await,
            Command::Restore(args) => commands::restore::run(cli, printer, args).await,
            Command::Filestore(command) => Box::pin(commands::filestore::run(cli, printer, command)).await,
            Command::Export(args) => Box::pin(commands::export::run(cli, printer, args)).await,
            Command::Import(args) => Box::pin(commands::import::run(printer, args)).await,
            Command::Copy(args) => Box::pin(commands::copy::run(cli, printer, args)).await,
            Command::List(args) => commands::list::run(cli, printer, args).await,
            Command::Status(args) => commands::status::run(cli, printer, args).await,
            Command::Verify(args) => Box::pin(commands::verify::run(cli, printer, args)).await,
            Command::Check(args) => commands::inspect::check(cli, printer, args).await,
            Command::Scrub(args) => commands::inspect::scrub(cli, printer, args).await,
            Command::Expire(args) => Box::pin(commands::expire::run(cli, printer, args)).await,
            Command::Gc(args) => Box::pin(commands::gc::run(cli, printer, args)).await,
            Command::Hold(command) => Box::pin(commands::hold::run(cli, printer, command)).await,
            Command::Mark(args) => Box::pin(commands::mark::run(cli, printer, args)).await,
            Command::Artifact(command) => Box::pin(commands::artifact::run(cli, printer, command)).await,
            Command::Du(args) => Box::pin(commands::du::run(cli, printer, args)).await,
            Command::Doctor(args) => commands::doctor::run(cli, printer, args).await,
            Command::Undelete(args) => commands::undelete::run(cli, printer, args).await,
            Command::Key(command) => commands::key::run(cli, printer, command).await,
            Command::Demo(args) => Box::pin(commands::demo::run(printer, args)).await,
            Command::Completions(args) => Ok(commands::completions::run(args)),
        }
    });
    // A blocked read of standard input or a stuck file system must not keep the process alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}
