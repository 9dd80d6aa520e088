//! `pgvault restore`

use pgvault_core::postgres::TimelineId;
use pgvault_core::restore::plan::{Plan, PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, TargetAction, restore};
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::args::{Action, Cli, RestoreArgs};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &RestoreArgs) -> Result<Status> {
    let target: Target = args.to.parse()?;
    let choice = PlanOptions { backup: args.backup.as_deref().map(parse_id).transpose()?, timeline: args.timeline.map(TimelineId) };
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let workers = config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let cluster = context.open(&args.cluster, None).await?;
    let plan = plan(&cluster, &target, choice).await?;
    if args.dry_run {
        show(printer, &plan);
        printer.summary(&describe(&plan));
        return Ok(Status::Done);
    }
    let pgdata = std::path::absolute(&args.pgdata).map_err(|e| Error::io("resolve", &args.pgdata, e))?;
    let options = RestoreOptions {
        pgdata,
        delta: args.delta,
        tablespace_mapping: args.tablespace_mapping.iter().map(|(old, new)| (old.clone(), new.into())).collect(),
        restore_command: restore_command(&context, &cluster)?,
        action: match args.target_action {
            Action::Pause => TargetAction::Pause,
            Action::Promote => TargetAction::Promote,
            Action::Shutdown => TargetAction::Shutdown,
        },
        archive_off: args.archive_off,
        workers,
        progress: printer.progress(),
    };
    let restored = restore(&cluster, &plan, &options).await?;
    for warning in &restored.warnings {
        printer.warn(warning);
    }
    show(printer, &plan);
    printer.line(format_args!(
        "restored {} of {} to {} in {:.1} s; start PostgreSQL on it to recover to {target}",
        output::bytes(restored.bytes_written),
        output::bytes(restored.source_bytes),
        options.pgdata.display(),
        restored.duration.as_secs_f64()
    ));
    let mut summary = describe(&plan);
    if let Value::Object(fields) = &mut summary {
        let _ = fields.insert("bytes_written".into(), restored.bytes_written.into());
        let _ = fields.insert("duration_ms".into(), u64::try_from(restored.duration.as_millis()).unwrap_or(u64::MAX).into());
        let _ = fields.insert("warnings".into(), json!(restored.warnings));
        let _ = fields.insert("peak_rss_bytes".into(), json!(super::backup::peak_rss_bytes()));
    }
    printer.summary(&summary);
    Ok(Status::Done)
}

fn show(printer: &Printer, plan: &Plan) {
    let manifest = &plan.snapshot.manifest;
    printer.line(format_args!("backup {} of {}, timeline {}", manifest.id, manifest.finished_at, manifest.timeline));
    for branch in &plan.left_out {
        printer.warn(format_args!("{branch}, is left out; `--timeline {}` follows it", branch.timeline));
    }
    for reason in &plan.reasons {
        printer.line(format_args!("  {reason}"));
    }
    printer.line(format_args!(
        "recovery from {} along timeline {}, up to {} at most",
        manifest.start_lsn, plan.timeline, plan.wal_end
    ));
}

fn describe(plan: &Plan) -> Value {
    let manifest = &plan.snapshot.manifest;
    json!({
        "backup_id": manifest.id,
        "target": plan.target.to_string(),
        "timeline": plan.timeline,
        "recovery": plan.stop,
        "start_lsn": manifest.start_lsn,
        "wal_end_lsn": plan.wal_end,
        "source_bytes": manifest.source_bytes,
        "left_out": plan.left_out,
        "reasons": plan.reasons,
    })
}

/// How the restored server will call this program.
fn restore_command(context: &Context, cluster: &Cluster) -> Result<RestoreCommand> {
    let program =
        std::env::current_exe().map_err(|e| Error::new(ErrorKind::Failed, "io", format!("find the path of this program: {e}")))?;
    let file = context.file.as_ref().map(|file| file.to_string_lossy().into_owned());
    Ok(RestoreCommand {
        program,
        global_arguments: file.into_iter().flat_map(|file| ["--config".to_owned(), file]).collect(),
        arguments: vec![
            "--cluster".into(),
            cluster.name().name.clone(),
            "--system-id".into(),
            cluster.name().system_id.to_string(),
        ],
    })
}
