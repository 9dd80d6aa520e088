//! `pgvault restore`
//!
//! Two ways. Without documents and for the whole cluster, the files are written and whoever starts PostgreSQL on them recovers. Where
//! somebody has to ask the database at the target ([`beside`]), for its documents or to make it harmless, a server is started on the files
//! first.

pub(super) mod aside;
mod beside;
mod checklist;
mod database;
pub(super) mod files;
pub(super) mod odoo;

use std::path::PathBuf;

use pgvault_core::copy::either::{Answer, ask};
use pgvault_core::postgres::TimelineId;
use pgvault_core::restore::plan::{Plan, PlanOptions, plan};
use pgvault_core::restore::target::Target;
use pgvault_core::restore::{RestoreCommand, RestoreOptions, Restored, TargetAction, restore};
use pgvault_core::vault::Cluster;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use crate::args::{Action, Cli, ClusterArgs, RestoreArgs};
use crate::context::{Context, Place, parse_id};
use crate::exit::Status;
use crate::output::{self, Printer};

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &RestoreArgs) -> Result<Status> {
    let target = target(args)?;
    let choice = PlanOptions { backup: args.backup.as_deref().map(parse_id).transpose()?, timeline: args.timeline.map(TimelineId) };
    let context = Context::load(cli)?;
    if beside::is_wanted(args)? {
        return Box::pin(beside::run(&context, printer, args, &target, choice)).await;
    }
    let chosen = choose(&context, printer, &args.cluster, &target, choice).await?;
    if args.dry_run {
        show(printer, &chosen.plan);
        printer.summary(&describe(&chosen.plan, chosen.place));
        return Ok(Status::Done);
    }
    let given = args.pgdata.as_ref().ok_or_else(|| Error::new(ErrorKind::Usage, "usage.pgdata", "--pgdata is missing"))?;
    let pgdata = absolute(given)?;
    let options = options_of(&context, printer, args, &chosen.cluster, pgdata)?;
    let restored = write(printer, &chosen, &options).await?;
    printer.line(format_args!(
        "restored {} of {} to {} in {:.1} s; start PostgreSQL on it to recover to {target}",
        output::bytes(restored.bytes_written),
        output::bytes(restored.source_bytes),
        options.pgdata.display(),
        restored.duration.as_secs_f64()
    ));
    let artifacts = checklist::tell(printer, &chosen.cluster, chosen.place, &chosen.plan, None).await;
    let mut summary = summary(&chosen, &restored);
    extend(&mut summary, [("artifacts", json!(artifacts))]);
    printer.summary(&summary);
    Ok(Status::Done)
}

/// What is to be restored.
fn target(args: &RestoreArgs) -> Result<Target> {
    match (&args.to, &args.to_name) {
        (Some(target), _) => target.parse(),
        (None, Some(name)) => format!("name:{name}").parse(),
        (None, None) => Err(Error::new(ErrorKind::Usage, "usage.to", "either --to or --to-name is needed")),
    }
}

pub(super) fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("resolve", path, e))
}

/// How the files are written, but for what the way decides.
fn options_of(
    context: &Context,
    printer: &Printer,
    args: &RestoreArgs,
    cluster: &Cluster,
    pgdata: PathBuf,
) -> Result<RestoreOptions> {
    Ok(RestoreOptions {
        delta: args.delta,
        tablespace_mapping: args.tablespace_mapping.iter().map(|(old, new)| (old.clone(), new.into())).collect(),
        action: match args.target_action {
            Action::Pause => TargetAction::Pause,
            Action::Promote => TargetAction::Promote,
            Action::Shutdown => TargetAction::Shutdown,
        },
        archive_off: args.archive_off,
        ..options(context, printer, &args.cluster, cluster, pgdata)?
    })
}

/// How the files are written when nobody asks for anything special: into an empty directory, to pause at the target.
pub(super) fn options(
    context: &Context,
    printer: &Printer,
    args: &ClusterArgs,
    cluster: &Cluster,
    pgdata: PathBuf,
) -> Result<RestoreOptions> {
    let (_, config) = context.cluster(args)?;
    Ok(RestoreOptions {
        pgdata,
        delta: false,
        tablespace_mapping: std::collections::BTreeMap::new(),
        restore_command: restore_command(context, cluster)?,
        action: TargetAction::Pause,
        archive_off: false,
        workers: config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
        progress: printer.progress(),
    })
}

/// Writes the files, and says what was written from what.
pub(super) async fn write(printer: &Printer, chosen: &Chosen<'_>, options: &RestoreOptions) -> Result<Restored> {
    let restored = restore(&chosen.cluster, &chosen.plan, options).await?;
    for warning in &restored.warnings {
        printer.warn(warning);
    }
    show(printer, &chosen.plan);
    Ok(restored)
}

pub(super) fn summary(chosen: &Chosen<'_>, restored: &Restored) -> Value {
    let mut summary = describe(&chosen.plan, chosen.place);
    extend(
        &mut summary,
        [
            ("bytes_written", restored.bytes_written.into()),
            ("duration_ms", u64::try_from(restored.duration.as_millis()).unwrap_or(u64::MAX).into()),
            ("warnings", json!(restored.warnings)),
            ("peak_rss_bytes", json!(super::backup::peak_rss_bytes())),
        ],
    );
    summary
}

pub(super) fn extend<const N: usize>(summary: &mut Value, fields: [(&str, Value); N]) {
    if let Value::Object(object) = summary {
        object.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>());
    }
}

/// What a restore reads from, all of it.
pub(super) struct Chosen<'a> {
    place: Place<'a>,
    pub(super) cluster: Cluster,
    pub(super) plan: Plan,
}

/// The vault, or the first copy of `vault.fallback` that can give what it does not.
///
/// A vault that cannot be read, or has no way to the target, is passed over, and this is said. What is wrong with the request or with
/// the key is not asked of a copy: it might answer another question.
pub(super) async fn choose<'a>(
    context: &'a Context,
    printer: &Printer,
    args: &ClusterArgs,
    target: &Target,
    choice: PlanOptions,
) -> Result<Chosen<'a>> {
    let mut outside = None;
    let places = context.places();
    let more = places.len() > 1;
    let answer = ask(places, async |place: Place<'a>| {
        let opened = async {
            let cluster = context.open_at(place, args, None).await?;
            let plan = plan(&cluster, target, choice).await?;
            Ok::<_, Error>(Chosen { place, cluster, plan })
        };
        let error = match opened.await {
            Ok(chosen) => return Ok(Answer::Present(chosen)),
            Err(error) => error,
        };
        if more {
            printer.warn(format_args!(
                "{} cannot be restored from: {error}",
                place.map_or("the vault".into(), |n| format!("copy {n}"))
            ));
        }
        match error.kind() {
            ErrorKind::OutsideWindow => {
                let _ = outside.get_or_insert(error);
                Ok(Answer::Absent)
            }
            ErrorKind::Storage | ErrorKind::NoVault | ErrorKind::Corrupt | ErrorKind::NotFound => Ok(Answer::Trouble(error)),
            _ => Err(error),
        }
    });
    match answer.await? {
        Answer::Present(chosen) => {
            if let (None, Some(copy)) = (context.place(), chosen.place) {
                printer.warn(format_args!(
                    "restoring from copy {copy}; recovery asks it and the vault, and stops where the copy ends as long as the vault does \
                     not answer. When the vault is gone for good, use --from {copy}"
                ));
            }
            Ok(chosen)
        }
        Answer::Trouble(error) => Err(error),
        Answer::Absent => {
            Err(outside.unwrap_or_else(|| Error::new(ErrorKind::Failed, "restore.nowhere", "there is no vault to ask")))
        }
    }
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

fn describe(plan: &Plan, place: Place<'_>) -> Value {
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
        "copy": place,
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
        arguments: ["--cluster".into(), cluster.name().name.clone(), "--system-id".into(), cluster.name().system_id.to_string()]
            .into_iter()
            // Who restores from one copy means its WAL, too.
            .chain(context.place().into_iter().flat_map(|copy| ["--from".into(), copy.to_owned()]))
            .collect(),
    })
}
