//! `pgvault backup`

use pgvault_core::backup::{BackupOptions, CensusOptions, backup};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{BackupArgs, Cli, Source};
use crate::context::{Context, system_id_of};
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &BackupArgs) -> Result<Status> {
    let began = std::time::Instant::now();
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let pgdata = match (args.source, &config.pgdata) {
        (Some(Source::Remote), _) => None,
        (Some(Source::Local), None) => {
            return Err(Error::new(ErrorKind::Usage, "config.pgdata", "a local backup needs the data directory")
                .with_hint("set pgdata in the cluster's section, or use --source remote"));
        }
        (_, pgdata) => pgdata.clone(),
    };
    let options = BackupOptions {
        connection: Context::connection(config)?,
        level: config.compression_level,
        workers: config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
        labels: args.labels.iter().cloned().collect(),
        strict: args.strict,
        spread_checkpoint: args.spread_checkpoint,
        archive_patience: None,
        as_of: None,
        full: args.full,
        census: config.drill.count_rows.then(CensusOptions::default),
        progress: printer.progress(),
        pgdata,
    };
    let system_id = options.pgdata.as_deref().and_then(system_id_of);
    let cluster = context.open(&args.cluster, system_id).await?;
    let manifest = backup(&cluster, &options).await?;
    drop(options);

    for warning in &manifest.warnings {
        printer.warn(warning);
    }
    for page in manifest.bad_pages.iter().take(20) {
        printer.warn(format_args!("damaged page: {} block {}: {}", page.path, page.block, page.reason));
    }
    printer.line(format_args!(
        "backup {} finished in {:.1} s: {} in {} files, {} stored in {} objects",
        manifest.id,
        began.elapsed().as_secs_f64(),
        output::bytes(manifest.source_bytes),
        manifest.files,
        output::bytes(manifest.stored_bytes),
        manifest.objects_put
    ));
    printer.line(format_args!(
        "it can be restored to any moment from {} ({}, timeline {}) on",
        manifest.finished_at, manifest.stop_lsn, manifest.timeline
    ));
    printer.summary(&json!({
        "backup_id": manifest.id,
        "kind": manifest.kind,
        "parent": manifest.parent,
        "source": manifest.source,
        "timeline": manifest.timeline,
        "start_lsn": manifest.start_lsn,
        "stop_lsn": manifest.stop_lsn,
        "started_at": manifest.started_at,
        "finished_at": manifest.finished_at,
        "source_bytes": manifest.source_bytes,
        "changed_bytes": manifest.changed_bytes,
        "stored_bytes": manifest.stored_bytes,
        "restore_amplification": manifest.restore_amplification,
        "objects_put": manifest.objects_put,
        "peak_rss_bytes": peak_rss_bytes(),
        "bad_pages": manifest.bad_pages,
        "warnings": manifest.warnings,
        "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }));
    Ok(if manifest.bad_pages.is_empty() { Status::Done } else { Status::Incomplete })
}

/// The most memory this process has had, as Linux counts it.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
