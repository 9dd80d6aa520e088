//! `pgvault undelete`: brings back what was deleted or overwritten in a store that keeps versions.

use pgvault_core::Result;
use pgvault_core::vault::undelete::{Harm, bring_back, find};
use serde_json::json;

use crate::args::{Cli, UndeleteArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{Printer, bytes};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &UndeleteArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let store = context.store_of_vault().await?;
    let mut hidden = find(&store, &args.prefix).await?;
    if let Some(since) = args.since {
        hidden.retain(|object| object.since.is_none_or(|at| at >= since));
    }
    let (slots, hidden): (Vec<_>, Vec<_>) =
        hidden.into_iter().partition(|object| object.is_key_slot() && object.harm == Harm::Deleted && !args.with_keys);
    let mut failed = Vec::new();
    for object in &hidden {
        let what = match object.harm {
            Harm::Deleted => "deleted",
            Harm::Overwritten => "overwritten",
        };
        let at = object.since.map_or_else(String::new, |at| format!(" {at}"));
        printer.line(format_args!("{what}{at}  {}  {}", bytes(object.size), object.name));
        if !args.dry_run
            && let Err(error) = bring_back(&store, object).await
        {
            // One that cannot be brought back must not keep the others hidden.
            printer.warn(format_args!("{}: {error}", object.name));
            failed.push(&object.name);
        }
    }
    if !slots.is_empty() {
        printer.warn(format_args!(
            "{} deleted key slots were left alone: they may be keys that were revoked. --with-keys brings them back; then revoke \
             again what `pgvault key list` should not show",
            slots.len()
        ));
    }
    let done = if args.dry_run { "would be brought back" } else { "brought back" };
    printer.line(format_args!("{} objects {done}", hidden.len() - failed.len()));
    if !args.dry_run && !hidden.is_empty() {
        printer.line("now run `pgvault check`: it reads everything and says what is still missing");
    }
    printer.summary(&json!({ "dry_run": args.dry_run, "objects": hidden, "failed": failed, "key_slots_left": slots }));
    Ok(if failed.is_empty() { Status::Done } else { Status::Incomplete })
}
