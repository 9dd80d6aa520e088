//! `pgvault completions`

use clap::CommandFactory;

use crate::args::{Cli, CompletionArgs};
use crate::exit::Status;

pub(crate) fn run(args: &CompletionArgs) -> Status {
    clap_complete::generate(args.shell, &mut Cli::command(), "pgvault", &mut std::io::stdout());
    Status::Done
}
