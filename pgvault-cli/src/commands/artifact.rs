//! `pgvault artifact`: small configuration files, in versions.
//!
//! A directory becomes an artifact for each file in it, not an archive: one that did not change is not stored again, and one can
//! be got back without the others. What this does not show is that a file was removed from the directory.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use pgvault_core::vault::artifact::{self, Artifact, Artifacts, MAX_SIZE, NewArtifact, Stored, ensure_name};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::args::{ArtifactCommand, ArtifactGetArgs, ArtifactPutArgs, Cli, ReadArgs};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::{Printer, bytes};

/// Files that a directory may have.
const MAX_FILES: usize = 1000;

/// The permissions of what comes without any.
const PRIVATE: u32 = 0o600;

pub(crate) async fn run(cli: &Cli, printer: &Printer, command: &ArtifactCommand) -> Result<Status> {
    let context = Context::load(cli)?;
    match command {
        ArtifactCommand::Put(args) => put(&context, printer, args).await,
        ArtifactCommand::Get(args) => get(&context, printer, args).await,
        ArtifactCommand::List(args) => list(&context, printer, args).await,
    }
}

async fn put(context: &Context, printer: &Printer, args: &ArtifactPutArgs) -> Result<Status> {
    // All of it is read before anything is stored.
    let files = if args.path == Path::new("-") { vec![from_standard_input(args.name.as_deref())?] } else { gather(printer, args)? };
    let cluster = context.open(&args.cluster, None).await?;
    let known = artifact::list(&cluster).await?;
    tell_damaged(printer, &known);
    let mut stored = Vec::new();
    for file in &files {
        let (version, is_new) = match artifact::put(&cluster, &known, file, args.force).await? {
            Stored::New(version) => (version, true),
            Stored::Unchanged(version) => (version, false),
        };
        let what = if is_new { "is stored as version" } else { "has not changed since version" };
        printer.line(format_args!("{} ({}) {what} {}", version.name, bytes(version.size), version.id));
        let mut value = describe(&version);
        if let Value::Object(fields) = &mut value {
            let _ = fields.insert("new".into(), is_new.into());
        }
        stored.push(value);
    }
    printer.summary(&json!({ "cluster": cluster.name().name, "artifacts": stored }));
    Ok(Status::Done)
}

fn from_standard_input(name: Option<&str>) -> Result<NewArtifact> {
    let name =
        name.ok_or_else(|| Error::new(ErrorKind::Usage, "usage.name", "what comes from standard input needs a name: --name NAME"))?;
    ensure_name(name)?;
    let content = read(&mut std::io::stdin().lock(), name)
        .map_err(|e| e.unwrap_or_else(|e| Error::io("read", Path::new("standard input"), e)))?;
    Ok(NewArtifact { name: name.to_owned(), mode: PRIVATE, content })
}

/// Reads no more than an artifact may have.
fn read(from: &mut dyn Read, name: &str) -> Result<Vec<u8>, Result<Error, std::io::Error>> {
    let mut content = Vec::new();
    let _ = from.take(MAX_SIZE as u64 + 1).read_to_end(&mut content).map_err(Err)?;
    if content.len() > MAX_SIZE { Err(Ok(artifact::too_large(name))) } else { Ok(content) }
}

/// The file, or the files below the directory.
fn gather(printer: &Printer, args: &ArtifactPutArgs) -> Result<Vec<NewArtifact>> {
    let path = &args.path;
    let meta = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    let own_name = || {
        let absolute = std::fs::canonicalize(path).map_err(|e| Error::io("resolve", path, e))?;
        let given = path.file_name().or_else(|| absolute.file_name()).unwrap_or_default();
        text(Path::new(given))
    };
    let name = args.name.clone().map_or_else(own_name, Ok)?;
    ensure_name(&name)?;
    if meta.is_file() {
        return Ok(vec![from_file(path, &name)?]);
    }
    if !meta.is_dir() {
        return Err(Error::new(
            ErrorKind::Usage,
            "artifact.special",
            format!("{} is neither a file nor a directory", path.display()),
        ));
    }
    let mut files = Vec::new();
    // What a link leads to counts: Kubernetes mounts a ConfigMap as links into a folder whose name begins with two dots.
    let walker = walkdir::WalkDir::new(path).min_depth(1).follow_links(true).sort_by_file_name();
    for entry in walker.into_iter().filter_entry(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"..")) {
        let entry = entry.map_err(|e| Error::new(ErrorKind::Failed, "io", format!("read {}: {e}", path.display())))?;
        if entry.file_type().is_dir() {
            continue;
        }
        if !entry.file_type().is_file() {
            printer.warn(format_args!("{} is no plain file, and is left out", entry.path().display()));
            continue;
        }
        let relative = text(entry.path().strip_prefix(path).unwrap_or(entry.path()))?;
        files.push(from_file(entry.path(), &format!("{name}/{relative}"))?);
        if files.len() > MAX_FILES {
            let why = format!("{} has more than {MAX_FILES} files", path.display());
            return Err(Error::new(ErrorKind::Usage, "artifact.too_many", why).with_hint("put the few that matter"));
        }
    }
    if files.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "artifact.none", format!("there is no file in {}", path.display())));
    }
    Ok(files)
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(ToOwned::to_owned);
    text.ok_or_else(|| Error::new(ErrorKind::Usage, "artifact.name", format!("the name of {} is not UTF-8", path.display())))
}

fn from_file(path: &Path, name: &str) -> Result<NewArtifact> {
    ensure_name(name)?;
    let failed = |e| Error::io("read", path, e);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    let content = read(&mut file, name).map_err(|e| e.unwrap_or_else(failed))?;
    Ok(NewArtifact { name: name.to_owned(), mode, content })
}

async fn get(context: &Context, printer: &Printer, args: &ArtifactGetArgs) -> Result<Status> {
    let cluster = context.open(&args.cluster, None).await?;
    let artifact = match (&args.version, &args.name) {
        (Some(id), name) => {
            let artifact = artifact::about(&cluster, parse_id(id)?, None).await?;
            if let Some(name) = name.as_ref().filter(|name| **name != artifact.name) {
                let why = format!("version {id} is of `{}`, not of `{name}`", artifact.name);
                return Err(Error::new(ErrorKind::Usage, "artifact.other", why));
            }
            artifact
        }
        (None, Some(name)) => {
            let known = artifact::list(&cluster).await?;
            tell_damaged(printer, &known);
            known.find(name, args.at)?.clone()
        }
        (None, None) => return Err(Error::new(ErrorKind::Usage, "usage.get", "name an artifact, or a version with --version")),
    };
    let content = artifact::read(&cluster, &artifact).await?;
    if args.out == Path::new("-") {
        let mut out = std::io::stdout().lock();
        out.write_all(&content).and_then(|()| out.flush()).map_err(|e| Error::io("write to", Path::new("standard output"), e))?;
        return Ok(Status::Done);
    }
    write(&args.out, &content, args.force)?;
    printer.line(format_args!(
        "{} of {:.0} (version {}) is in {} with mode 0600; its own was {:04o}",
        artifact.name,
        artifact.at,
        artifact.id,
        args.out.display(),
        artifact.mode
    ));
    printer.summary(&json!({ "cluster": cluster.name().name, "artifact": describe(&artifact), "out": args.out }));
    Ok(Status::Done)
}

/// Writes under a name of its own first: nothing half-written has the name that was asked for. It may hold passwords, so nobody
/// else reads it.
fn write(out: &Path, content: &[u8], force: bool) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".pgvault-")
        .make_in(folder, |path| std::fs::OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(path))
        .map_err(|e| Error::io("create a file in", folder, e))?;
    file.write_all(content).and_then(|()| file.as_file().sync_all()).map_err(|e| Error::io("write", out, e))?;
    let persisted = if force { file.persist(out) } else { file.persist_noclobber(out) };
    match persisted {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(Error::new(ErrorKind::Usage, "artifact.exists", format!("{} exists", out.display()))
                .with_hint("name another file, or say --force"))
        }
        Err(error) => Err(Error::io("create", out, error.error)),
    }
}

async fn list(context: &Context, printer: &Printer, args: &ReadArgs) -> Result<Status> {
    let cluster = context.open(&args.cluster, None).await?;
    let known = artifact::list(&cluster).await?;
    if known.versions.is_empty() {
        printer.line("no artifacts");
    }
    for version in &known.versions {
        printer.line(format_args!(
            "{}  {}  {:.0}  {}  {:04o}  {}",
            version.name,
            version.id,
            version.at,
            bytes(version.size),
            version.mode,
            version.by
        ));
    }
    tell_damaged(printer, &known);
    let versions: Vec<Value> = known.versions.iter().map(describe).collect();
    let damaged: Vec<Value> = known.damaged.iter().map(|(name, e)| json!({ "object": name, "problem": e.to_string() })).collect();
    printer.summary(&json!({ "cluster": cluster.name().name, "artifacts": versions, "damaged": damaged }));
    Ok(if known.damaged.is_empty() { Status::Done } else { Status::VerificationFailed })
}

fn tell_damaged(printer: &Printer, known: &Artifacts) {
    for (name, error) in &known.damaged {
        printer.warn(format_args!("{name} cannot be read, so it is not known which artifact it is: {error}"));
    }
}

/// A version as JSON.
pub(crate) fn describe(version: &Artifact) -> Value {
    let fields: BTreeMap<&str, Value> = [
        ("name", json!(version.name)),
        ("version_id", json!(version.id)),
        ("at", json!(version.at)),
        ("size", json!(version.size)),
        ("mode", json!(format!("{:04o}", version.mode))),
        ("sha256", json!(version.sha256)),
        ("by", json!(version.by)),
    ]
    .into();
    json!(fields)
}
