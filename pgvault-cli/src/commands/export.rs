//! `pgvault export --odoo-zip`: a database of Odoo at a moment, with its documents, as the archive that Odoo's own tools load.
//!
//! ```text
//! files -> sealed -> a server on them, isolated -> at the target -> promoted -> made harmless, unless it is production
//!   -> what it refers to  -> dump.sql    as pg_dump writes it
//!                         -> manifest.json
//!                         -> filestore/  out of packs, exactly what rows of the dump refer to
//! ```
//!
//! The dump and the references are of one moment, because nobody else reaches the server; Odoo's own archive copies the files first and
//! has none that came meanwhile. Nothing is held in memory whole, and the archive has its name only when it is complete.

mod archive;
mod manifest;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use pgvault_core::config::ClusterConfig;
use pgvault_core::filestore::fetch::{FetchOptions, Fetched, SharedReceiver, Sink, Wish, fetch};
use pgvault_core::filestore::pass::Watermark;
use pgvault_core::restore::plan::PlanOptions;
use pgvault_core::restore::target::Target;
use pgvault_core::vault::drill::Point;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::neutralise::Neutralised;
use pgvault_verify::side::{OdooDatabase, Promoted, Side, seal};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use self::archive::Archive;
use self::manifest::Manifest;
use super::interrupted;
use super::libpq::said;
use super::restore::odoo::{self, ModuleSql};
use super::restore::{Chosen, absolute, aside, choose, extend, files, options, summary, write};
use crate::args::{Cli, ExportArgs};
use crate::context::Context;
use crate::exit::Status;
use crate::output::{self, Printer};

/// Bytes of the dump that are compressed at once.
const CHUNK: usize = 1 << 20;

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &ExportArgs) -> Result<Status> {
    let target: Target = args.to.parse()?;
    let context = Context::load(cli)?;
    let (_, config) = context.cluster(&args.cluster)?;
    let modules = ModuleSql::read(&args.neutralise_sql)?;
    // What is refused is refused before anything is restored.
    let out = absolute(&args.odoo_zip)?;
    archive::ensure_free(&out)?;
    let chosen = choose(&context, printer, &args.cluster, &target, PlanOptions::default()).await?;
    let mut export =
        Export { context: &context, printer, args, config, target: &target, modules, out, chosen, began: Instant::now() };
    tokio::select! {
        done = export.run() => done,
        error = interrupted("export.interrupted", "interrupted: no archive was made") => Err(error),
    }
}

struct Export<'a> {
    context: &'a Context,
    printer: &'a Printer,
    args: &'a ExportArgs,
    config: &'a ClusterConfig,
    target: &'a Target,
    modules: ModuleSql,
    out: PathBuf,
    chosen: Chosen<'a>,
    began: Instant,
}

/// What is in the archive, for the summary.
struct Packed {
    neutralised: BTreeMap<String, Neutralised>,
    manifest: Manifest,
    dump_bytes: u64,
    zip_bytes: u64,
    fetched: Fetched,
    watermark: Option<Watermark>,
    complete: bool,
}

impl Export<'_> {
    async fn run(&mut self) -> Result<Status> {
        let folder = aside::temporary(&self.config.drill)?;
        let pgdata = folder.path().join("data");
        self.chosen.plan.pin();
        let mut options = options(self.context, self.printer, &self.args.cluster, &self.chosen.cluster, pgdata.clone())?;
        options.archive_off = true;
        aside::map_tablespaces(folder.path(), &self.chosen.plan, &mut options);
        let restored = write(self.printer, &self.chosen, &options).await?;
        seal(&pgdata)?;
        let (cluster, plan) = (&self.chosen.cluster, &self.chosen.plan);
        let side = Side::start(cluster, plan, &pgdata, &aside::side_options(&self.config.drill)).await?;
        let reached = side.reached().clone();
        let databases = [self.database(&side).await?];
        let [database] = &databases;
        self.modules.ensure_fits(&databases)?;
        let (mut warnings, mark) = odoo::warn_of_upgrades(self.printer, cluster, plan, reached.lsn, &databases).await?;
        let promoted = side.promote().await?;
        let packed = Box::pin(self.pack(&promoted, database, &reached)).await;
        promoted.withhold().await?;
        let packed = packed?;
        for warning in packed.neutralised.values().flat_map(|done| &done.warnings) {
            self.printer.warn(warning);
            warnings.push(warning.clone());
        }
        self.tell(database, &packed);
        let mut summary = summary(&self.chosen, &restored);
        warnings.extend(restored.warnings.iter().cloned());
        extend(
            &mut summary,
            [
                ("out", json!(self.out)),
                ("zip_bytes", packed.zip_bytes.into()),
                ("dump_bytes", packed.dump_bytes.into()),
                ("database", json!(database.name)),
                ("manifest", json!(packed.manifest)),
                ("reached", json!(reached)),
                ("odoo", odoo::describe(&databases, &packed.neutralised)),
                ("as_production", self.args.as_production.into()),
                ("files", json!(packed.fetched)),
                ("watermark", json!(packed.watermark)),
                ("complete", packed.complete.into()),
                ("mark_before", json!(mark)),
                ("warnings", json!(warnings)),
                ("duration_ms", u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX).into()),
            ],
        );
        self.printer.summary(&summary);
        Ok(if packed.fetched.unknown > 0 && !self.args.allow_missing_files { Status::Incomplete } else { Status::Done })
    }

    /// The database that is meant.
    async fn database(&self, side: &Side) -> Result<OdooDatabase> {
        let mut databases = side.odoo_databases().await?;
        let names: Vec<String> = databases.iter().map(|database| database.name.clone()).collect();
        if let Some(wanted) = &self.args.database {
            databases.retain(|database| database.name == *wanted);
        }
        let only = databases.len() == 1;
        match databases.pop() {
            Some(database) if only => Ok(database),
            Some(_) => Err(Error::new(ErrorKind::Usage, "export.ambiguous", "the cluster has several databases of Odoo")
                .with_hint(format!("choose one with --database: {}", names.join(", ")))),
            None => {
                let wanted = self.args.database.as_ref().map_or_else(String::new, |name| format!(" `{name}`"));
                let why = format!("the cluster has no database{wanted} of Odoo at {}", self.target);
                let error = Error::new(ErrorKind::NotFound, "export.no_database", why);
                Err(if names.is_empty() { error } else { error.with_hint(format!("it has: {}", names.join(", "))) })
            }
        }
    }

    /// Makes the copy harmless and writes the archive.
    async fn pack(&self, promoted: &Promoted, database: &OdooDatabase, reached: &Point) -> Result<Packed> {
        let neutralised = if self.args.as_production {
            BTreeMap::new()
        } else {
            odoo::neutralise_all(promoted, std::slice::from_ref(database), &self.modules).await?
        };
        // Asked now, because statements of modules may have changed what rows refer to.
        let mut sql = promoted.connect(&database.name).await?;
        let manifest = Manifest::read(&mut sql, database).await?;
        let mut found = files::look_up(&self.chosen.cluster, &mut sql, database, reached).await?;
        sql.close().await;

        let archive = Archive::create(&self.out)?;
        let dump_bytes = dump(promoted, &database.name, &archive).await?;
        archive.add("manifest.json", serde_json::to_vec_pretty(&manifest).unwrap_or_default()).await?;
        let options = FetchOptions {
            sink: Sink::Receiver(SharedReceiver::new(archive.writer())),
            workers: pgvault_core::filestore::fetch::packs_at_once(self.config.workers),
            progress: self.printer.progress(),
        };
        let fetched = fetch(&mut found.catalog, Wish::Referenced(found.references), &options).await?;
        let zip_bytes = archive.finish().await?;
        let (watermark, complete) = (found.watermark, found.complete);
        Ok(Packed { neutralised, manifest, dump_bytes, zip_bytes, fetched, watermark, complete })
    }

    fn tell(&self, database: &OdooDatabase, packed: &Packed) {
        let (fetched, name) = (&packed.fetched, &database.name);
        files::warn(self.printer, name, packed.watermark, packed.complete, fetched);
        for (scheme, count) in &fetched.remote {
            self.printer.warn(format_args!("{name}: {count} documents lie in `{scheme}://`, and are not in the archive"));
        }
        self.printer.line(format_args!(
            "`{name}` at {} with {} documents of {} is in {}, {}{}",
            self.target,
            fetched.files,
            output::bytes(fetched.bytes),
            self.out.display(),
            output::bytes(packed.zip_bytes),
            if packed.neutralised.is_empty() { "" } else { "; it is a harmless copy" },
        ));
    }
}

/// `pg_dump`, as Odoo runs it, into the archive; gives the bytes of the dump.
async fn dump(promoted: &Promoted, database: &str, archive: &Archive) -> Result<u64> {
    let failed = |what: &str, e: std::io::Error| Error::new(ErrorKind::Failed, "export.dump", format!("{what} `pg_dump`: {e}"));
    let mut command = Command::from(promoted.client("pg_dump", database)?);
    let _ = command.args(["--no-owner", "--no-privileges", "--format=plain", "--no-password"]);
    let _ = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| failed("start", e))?;
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new(ErrorKind::Failed, "export.dump", "`pg_dump` has no output"));
    };
    // Read beside, or a dump that complains much would wait for us, and we for it.
    let complaints = tokio::spawn(async move {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text).await;
        text
    });
    archive.begin("dump.sql").await?;
    let mut bytes = 0;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        while chunk.len() < CHUNK
            && (&mut stdout).take((CHUNK - chunk.len()) as u64).read_buf(&mut chunk).await.map_err(|e| failed("read from", e))? > 0
        {
        }
        if chunk.is_empty() {
            break;
        }
        bytes += chunk.len() as u64;
        archive.write(chunk).await?;
    }
    let status = child.wait().await.map_err(|e| failed("wait for", e))?;
    let complaints = complaints.await.unwrap_or_default();
    if !status.success() {
        let why = format!("`pg_dump` ended with {status}: {}", said(&complaints));
        return Err(Error::new(ErrorKind::Failed, "export.dump", why).with_hint("no archive was made"));
    }
    Ok(bytes)
}
