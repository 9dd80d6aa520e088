//! `pgvault verify`: restore drills.
//!
//! Opening the vault is part of the proof: a key that opens nothing any more fails the drill, though there is nothing left to seal a
//! receipt with.

mod report;

use std::time::{Duration, Instant};

use pgvault_core::config::{Asks, DrillConfig, RunnerKind};
use pgvault_core::env::Env;
use pgvault_core::postgres::TimelineId;
use pgvault_core::vault::Cluster;
use pgvault_core::vault::drill::Outcome;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::drill::{Assertion, DrillOptions, Held, Question, drill};
use pgvault_verify::runner::Runner;
use pgvault_verify::runner::docker::image::{containerfile, own};
use pgvault_verify::runner::docker::{DockerOptions, DockerRunner};
use pgvault_verify::runner::process::ProcessRunner;
use serde_json::json;

use crate::args::{BuildImageArgs, Cli, RunnerName, VerifyArgs, VerifyCommand};
use crate::commands::interrupted;
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &VerifyArgs) -> Result<Status> {
    match &args.command {
        None => Box::pin(hold(cli, printer, args)).await,
        Some(VerifyCommand::Report(args)) => report::show(cli, printer, args).await,
        Some(VerifyCommand::Receipt(args)) => report::verify(printer, args),
        Some(VerifyCommand::BuildImage(args)) => build_image(printer, args),
    }
}

async fn hold(cli: &Cli, printer: &Printer, args: &VerifyArgs) -> Result<Status> {
    let began = Instant::now();
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let mut runner = runner(args, &config.drill)?;
    let options = DrillOptions {
        began,
        wish: args.to.parse()?,
        backup: args.backup.as_deref().filter(|id| *id != "latest").map(parse_id).transpose()?,
        timeline: args.timeline.map(TimelineId),
        base: base(args, &config.drill)?,
        room: args.room,
        user: config.drill.user.clone(),
        settings: config.drill.settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        deep: args.deep,
        level: config.compression_level,
        workers: config.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
        seed: args.seed.map_or_else(seed, Ok)?,
        timeout: config.drill.timeout,
        rto: config.drill.rto,
        assertions: assertions(&config.drill)?,
        filestores: args.filestores.iter().map(|(database, folder)| (database.clone(), folder.into())).collect(),
        promote_to_backup: args.promote_to_backup,
        progress: printer.progress(),
    };
    let cluster = match open(&context, args).await {
        Ok(cluster) => cluster,
        Err(error) if matches!(error.kind(), ErrorKind::WrongKey | ErrorKind::Corrupt) => {
            return Ok(locked_out(printer, &error, began));
        }
        Err(error) => return Err(error),
    };
    let Held { signed, recorded } = tokio::select! {
        held = drill(&cluster, &mut *runner, &options) => held?,
        error = interrupted("drill.interrupted", "interrupted: the copy was removed, and nothing was recorded") => return Err(error),
    };
    report::tell(printer, &cluster, &signed, &args.reports).await?;
    // Said after everything else: what was found is not lost with its record.
    recorded.map_err(|error| error.context("record the drill in the vault"))?;
    Ok(match signed.receipt.outcome {
        Outcome::Passed => Status::Done,
        Outcome::Partial => Status::Incomplete,
        Outcome::Failed => Status::VerificationFailed,
    })
}

async fn open(context: &Context, args: &VerifyArgs) -> Result<Cluster> {
    context.open(&args.cluster, None).await
}

/// Says that the key opens nothing. Nothing can be recorded without one.
fn locked_out(printer: &Printer, error: &Error, began: Instant) -> Status {
    printer.error(error);
    printer.line(
        "FAILED  key-access: the vault cannot be opened, so nothing could be restored; no receipt, there is no key to seal it with",
    );
    let check =
        json!({ "name": "key-access", "verdict": "failed", "message": error.to_string(), "duration_ms": millis(began.elapsed()) });
    printer.summary(&json!({ "result": "failed", "drill_id": null, "checks": [check], "rto_ms": null }));
    Status::VerificationFailed
}

/// Where the copy goes.
fn base(args: &VerifyArgs, config: &DrillConfig) -> Result<std::path::PathBuf> {
    let folder = args.folder.clone().or_else(|| config.folder.clone()).unwrap_or_else(std::env::temp_dir);
    std::path::absolute(&folder).map_err(|e| Error::io("resolve", &folder, e))
}

fn runner(args: &VerifyArgs, config: &DrillConfig) -> Result<Box<dyn Runner>> {
    let kind = match args.runner {
        Some(RunnerName::Process) => RunnerKind::Process,
        Some(RunnerName::Docker) => RunnerKind::Docker,
        Some(RunnerName::Kubernetes) => RunnerKind::Kubernetes,
        None => config.runner,
    };
    match kind {
        RunnerKind::Process => Ok(Box::new(ProcessRunner::new(config.programs.clone())?)),
        RunnerKind::Kubernetes => Ok(Box::new(ProcessRunner::new(config.programs.clone())?.in_pod(pod(args, config)?))),
        RunnerKind::Docker => {
            let options = DockerOptions {
                socket: config.socket.clone(),
                image: args.image.clone().or_else(|| config.image.clone()),
                memory: config.memory,
                accept_musl: config.accept_musl,
                ..DockerOptions::default()
            };
            Ok(Box::new(DockerRunner::new(options)?))
        }
    }
}

/// Writes what an image is built from, and says how.
fn build_image(printer: &Printer, args: &BuildImageArgs) -> Result<Status> {
    let text = containerfile(args.major, &args.extensions);
    let image = own(args.major);
    match &args.file {
        Some(path) => std::fs::write(path, &text).map_err(|e| Error::io("write", path, e))?,
        None => printer.line(text.trim_end()),
    }
    let name = args.file.as_ref().map_or("-".to_owned(), |path| path.display().to_string());
    printer.warn(format_args!(
        "build it with `docker build -t {image} -f {name} .`, or podman; drills of version {} take it from then on",
        args.major
    ));
    printer.summary(&json!({ "image": image, "containerfile": text, "file": args.file }));
    Ok(Status::Done)
}

/// The name of the pod that this runs in.
fn pod(args: &VerifyArgs, config: &DrillConfig) -> Result<String> {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        return Err(Error::new(ErrorKind::Usage, "drill.no_pod", "this is not a pod of Kubernetes")
            .with_hint("the drill is the pod: deploy/kubernetes/drill.yaml runs it; elsewhere use --runner process or docker"));
    }
    if args.folder.is_none() && config.folder.is_none() {
        return Err(Error::new(ErrorKind::Usage, "drill.folder", "a drill in a pod needs a folder for its copy")
            .with_hint("mount an emptyDir, and name it by --folder or `drill.folder`"));
    }
    Ok(std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".into()))
}

fn assertions(config: &DrillConfig) -> Result<Vec<Assertion>> {
    let assertion = |check: &pgvault_core::config::DrillCheck| {
        Ok(Assertion {
            name: check.name.clone(),
            database: check.database.clone(),
            question: match check.asks()? {
                Asks::Sql(statement) => Question::Sql(statement),
                Asks::Command(words) => Question::Program(words),
            },
            limit: check.timeout,
            must_hold: !check.warn,
        })
    };
    config.check.iter().map(assertion).collect()
}

/// Different for every drill, and small enough to be typed.
fn seed() -> Result<u64> {
    Ok(u64::from(u32::from_le_bytes(Env::default().random()?)) % 1_000_000_000)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
