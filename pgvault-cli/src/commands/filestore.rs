//! `pgvault filestore`: captures the filestores of Odoo databases, shows what was captured, gives single files back.

mod get;
mod list;
mod sync;

use pgvault_core::Result;
use pgvault_core::config::ClusterConfig;
use pgvault_core::filestore::find::Finder;
use pgvault_core::postgres::ConnInfo;

use crate::args::{Cli, FilestoreCommand};
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, command: &FilestoreCommand) -> Result<Status> {
    match command {
        FilestoreCommand::Sync(args) => Box::pin(sync::run(cli, printer, args)).await,
        FilestoreCommand::List(args) => list::run(cli, printer, args).await,
        FilestoreCommand::Get(args) => get::run(cli, printer, args).await,
    }
}

/// Where the cluster's Odoo databases are, and how to reach them.
pub(super) fn finder(config: &ClusterConfig) -> Result<(Finder, ConnInfo)> {
    let finder = Finder::new(&config.odoo)?;
    let connection = finder.connection(&config.connection, &|name| std::env::var(name).ok())?;
    Ok((finder, connection))
}
