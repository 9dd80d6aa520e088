//! `pgvault hold`: keeps a backup or a stretch of time whatever the policy says.

use pgvault_core::Result;
use pgvault_core::retention::expire::ensure_backup;
use pgvault_core::retention::holds::{Marked, lay, lift};
use pgvault_core::vault::Cluster;
use pgvault_core::vault::hold::{self, Hold, Scope};
use pgvault_core::{Error, ErrorKind};
use serde_json::json;

use crate::args::{Cli, ClusterArgs, HoldAddArgs, HoldCommand, HoldRemoveArgs};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, command: &HoldCommand) -> Result<Status> {
    let context = Context::load(cli)?;
    match command {
        HoldCommand::Add(args) => add(&context, printer, args).await,
        HoldCommand::List(args) => list(&context, printer, args).await,
        HoldCommand::Remove(args) => remove(&context, printer, args).await,
    }
}

async fn add(context: &Context, printer: &Printer, args: &HoldAddArgs) -> Result<Status> {
    let cluster = context.open(&args.cluster, None).await?;
    let scope = match (&args.backup, args.from, args.to) {
        (Some(id), ..) => {
            let backup_id = parse_id(id)?;
            ensure_backup(&cluster, backup_id).await?;
            Scope::Backup { backup_id }
        }
        (None, Some(from), Some(to)) => Scope::Range { from, to },
        _ => return Err(Error::new(ErrorKind::Usage, "usage.hold", "a hold needs --backup, or --from and --to")),
    };
    let hold = hold::place(&cluster, scope, args.reason.clone()).await?;
    printer.line(format_args!("hold {} on {} is in force", hold.id, describe(&hold)));
    marks(printer, &cluster, &hold, lay(&cluster, &hold).await)
}

async fn list(context: &Context, printer: &Printer, args: &ClusterArgs) -> Result<Status> {
    let cluster = context.open(args, None).await?;
    let holds = hold::active(&cluster).await?;
    if holds.is_empty() {
        printer.line("no holds");
    }
    for hold in &holds {
        printer.line(format_args!("{}  {:.0}  {}  {}", hold.id, hold.placed_at, describe(hold), hold.reason));
    }
    printer.summary(&json!({ "cluster": cluster.name().name, "holds": holds }));
    Ok(Status::Done)
}

async fn remove(context: &Context, printer: &Printer, args: &HoldRemoveArgs) -> Result<Status> {
    let cluster = context.open(&args.cluster, None).await?;
    let hold = hold::remove(&cluster, parse_id(&args.hold_id)?).await?;
    printer.line(format_args!("hold {} on {} is taken back", hold.id, describe(&hold)));
    marks(printer, &cluster, &hold, lift(&cluster, &hold).await)
}

/// Says what the store does about it. The hold itself is in the vault whatever that is.
fn marks(printer: &Printer, cluster: &Cluster, hold: &Hold, marked: Result<Marked>) -> Result<Status> {
    let marked = marked?;
    if !marked.supported {
        printer
            .line(format_args!("{} has no legal holds: pgvault keeps to the record, others need not", cluster.store().location()));
    }
    for left in &marked.failed {
        printer.warn(format_args!("{}: {}", left.name, left.why));
    }
    printer.summary(&json!({ "hold": hold, "legal_holds": marked }));
    Ok(if marked.failed.is_empty() { Status::Done } else { Status::Incomplete })
}

fn describe(hold: &Hold) -> String {
    match hold.scope {
        Scope::Backup { backup_id } => format!("backup {backup_id}"),
        Scope::Range { from, to } => format!("every moment from {from} to {to}"),
    }
}
