//! `pgvault copy`: ships backups and WAL to another vault.

use pgvault_core::copy::{CopyOptions, copy};
use pgvault_core::{ErrorKind, Result};
use serde_json::json;

use crate::args::{Cli, CopyArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &CopyArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    // The one whose requests are counted comes first.
    let place = Some(args.to.as_str());
    let target = context.vault_at(place).await.map_err(|error| uncreated(&args.to, error))?;
    let source = context.open(&args.cluster, None).await?;
    let unlock = context.vault_config(place)?.unlock()?;
    let name = target.find_cluster(&source.name().name, Some(source.name().system_id)).await;
    let name = name.map_err(|error| uncreated(&args.to, error))?;
    let target = target.unlock(&name, &unlock).await.map_err(|error| error.context(format!("copy {}", args.to)))?;

    let options = CopyOptions { workers: args.workers.into(), progress: printer.progress() };
    let copied = copy(&source, &target, &options).await?;
    drop(options);
    for failed in &copied.failed {
        printer.warn(format_args!("{} was not copied: {}", failed.name, failed.error));
    }
    printer.line(format_args!(
        "copied {} backups ({} were there), {} packs, {} WAL objects, {} to {}",
        copied.backups.len(),
        copied.present,
        copied.packs,
        copied.wal,
        output::bytes(copied.bytes),
        target.store().location()
    ));
    let failed: Vec<_> =
        copied.failed.iter().map(|f| json!({ "object": f.name, "code": f.error.code(), "problem": f.error.to_string() })).collect();
    printer.summary(&json!({
        "copy": args.to,
        "cluster": target.name().name,
        "system_id": target.name().system_id,
        "backups": copied.backups,
        "backups_present": copied.present,
        "backups_expired": copied.expired,
        "packs": copied.packs,
        "wal_objects": copied.wal,
        "gaps": copied.gaps,
        "marks": copied.marks,
        "artifacts": copied.artifacts,
        "stored_bytes": copied.bytes,
        "failed": failed,
        "peak_rss_bytes": super::backup::peak_rss_bytes(),
    }));
    Ok(if copied.failed.is_empty() { Status::Done } else { Status::VerificationFailed })
}

/// A copy is created by `init`, never by the way: a misspelt address must not become a vault.
fn uncreated(copy: &str, error: pgvault_core::Error) -> pgvault_core::Error {
    match error.kind() {
        ErrorKind::NoVault => error.with_hint(format!("create it with `pgvault init --copy {copy}`")),
        _ => error,
    }
}
