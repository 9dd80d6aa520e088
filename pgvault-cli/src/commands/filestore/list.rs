//! `pgvault filestore list`: which filestores the vault has.

use pgvault_core::Result;
use pgvault_core::filestore::pass;
use serde_json::json;

use crate::args::{Cli, ReadArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

pub(super) async fn run(cli: &Cli, printer: &Printer, args: &ReadArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let cluster = context.open(&args.cluster, None).await?;
    let mut filestores = Vec::new();
    for folder in pass::instances(&cluster).await? {
        let Some(known) = pass::load(&cluster, &folder).await? else { continue };
        let pass = known.pass;
        let watermark = pass.watermark();
        printer.line(format_args!(
            "{}  {} files of {}  safe up to {}  {}",
            pass.database.name,
            pass.counts.present,
            output::bytes(pass.counts.bytes),
            watermark.map_or_else(|| "nothing yet".to_owned(), |(_, mark)| format!("{} ({:.0})", mark.lsn, mark.at)),
            pass.database.uuid,
        ));
        filestores.push(json!({
            "database": pass.database.name,
            "oid": pass.database.oid,
            "uuid": pass.database.uuid,
            "series": pass.database.series,
            "kind": pass.kind,
            "ended_at": pass.ended_at,
            "full_at": pass.full_at,
            "watermarks": pass.watermarks,
            "counts": pass.counts,
            "entries": known.catalog.entries(),
        }));
    }
    if filestores.is_empty() {
        printer.line("no filestore was captured");
    }
    printer.summary(&json!({ "cluster": cluster.name().name, "filestores": filestores }));
    Ok(Status::Done)
}
