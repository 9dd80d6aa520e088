//! `pgvault filestore get`: one document by its name, or all of a filestore as it was at a time.

use std::io::Write;
use std::path::Path;

use pgvault_core::filestore::fetch::{FetchOptions, Sink, Wish, fetch, get};
use pgvault_core::filestore::pass::{self, Known};
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{Cli, FileGetArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

pub(super) async fn run(cli: &Cli, printer: &Printer, args: &FileGetArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let cluster = context.open(&args.cluster, None).await?;
    let mut known = choose(&cluster, args.database.as_deref()).await?;
    match (&args.name, &args.all) {
        (Some(name), _) => {
            let bytes = one(&mut known, name, &args.out).await?;
            printer.line(format_args!("{name}: {} to {}", output::bytes(bytes), args.out.display()));
            printer.summary(&json!({ "database": known.pass.database.name, "name": name, "bytes": bytes, "out": args.out }));
            Ok(Status::Done)
        }
        (None, Some(time)) => {
            let sink = Sink::Folder { path: args.out.clone(), owner: None, delta: args.delta };
            let workers = pgvault_core::filestore::fetch::packs_at_once(config.workers);
            let fetched =
                fetch(&mut known.catalog, Wish::At(*time), &FetchOptions { sink, workers, progress: printer.progress() }).await?;
            printer.line(format_args!("{} files of {} to {}", fetched.files, output::bytes(fetched.bytes), args.out.display()));
            printer.summary(&json!({ "database": known.pass.database.name, "at": time, "fetched": fetched, "out": args.out }));
            Ok(Status::Done)
        }
        (None, None) => Err(Error::new(ErrorKind::Usage, "usage.get", "name a file, or a time with --all")),
    }
}

/// Writes a file under a name of its own first: nothing half-written has the name that was asked for.
async fn one(known: &mut Known, name: &str, out: &Path) -> Result<u64> {
    if out == Path::new("-") {
        return get(&mut known.catalog, name, &mut std::io::stdout()).await;
    }
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io("create a file in", folder, e))?;
    let bytes = get(&mut known.catalog, name, &mut file).await?;
    file.flush().map_err(|e| Error::io("write", out, e))?;
    file.as_file().sync_all().map_err(|e| Error::io("write", out, e))?;
    let _ = file.persist_noclobber(out).map_err(|e| Error::io("create", out, e.error))?;
    Ok(bytes)
}

/// The filestore of a database by its name or uuid, or the only one.
pub(crate) async fn choose(cluster: &Cluster, database: Option<&str>) -> Result<Known> {
    let mut found = Vec::new();
    let mut names = Vec::new();
    for folder in pass::instances(cluster).await? {
        let Some(known) = pass::load(cluster, &folder).await? else { continue };
        let it = &known.pass.database;
        names.push(format!("{} ({})", it.name, it.uuid));
        if database.is_none_or(|wanted| wanted == it.name || wanted == it.uuid) {
            found.push(known);
        }
    }
    let only = found.len() == 1;
    match found.pop() {
        Some(known) if only => Ok(known),
        Some(_) => Err(Error::new(ErrorKind::Usage, "filestore.ambiguous", "the vault has several filestores that are meant")
            .with_hint(format!("choose one with --database, by its name or uuid: {}", names.join(", ")))),
        None => Err(Error::new(ErrorKind::NotFound, "filestore.none_captured", "the vault has no such filestore").with_hint(
            if names.is_empty() { "run `pgvault filestore sync`".into() } else { format!("it has: {}", names.join(", ")) },
        )),
    }
}
