//! A restore that asks the database at its target.
//!
//! ```text
//! files -> sealed, unless it is production -> a server on them, isolated -> paused at the target
//!   -> which databases are Odoo's, is one within an upgrade -> their documents
//!   -> as production: left in recovery, to be started by its owner
//!      as a copy:     promoted, made harmless, released
//!      one database:  promoted, made harmless, dumped into another server
//! ```
//!
//! Nothing but this program reaches the server meanwhile. A copy that could not be made harmless stays sealed: no server starts on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pgvault_core::config::ClusterConfig;
use pgvault_core::filestore::find::Finder;
use pgvault_core::filestore::separate::ensure_separate;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::restore::TargetAction;
use pgvault_core::restore::plan::{PlanOptions, Stop};
use pgvault_core::restore::target::Target;
use pgvault_core::vault::drill::Point;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::neutralise::Neutralised;
use pgvault_verify::side::{OdooDatabase, Promoted, Side, seal};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::aside;
use super::database::Destination;
use super::files::{self, FilesOutcome, FilesWish};
use super::odoo::{self, ModuleSql};
use super::{Chosen, absolute, checklist, choose, describe, extend, show, summary, write};
use crate::args::RestoreArgs;
use crate::commands::interrupted;
use crate::context::Context;
use crate::exit::Status;
use crate::output::Printer;

/// True when the database has to be asked.
///
/// # Errors
/// [`ErrorKind::Usage`] for options that mean nothing without it.
pub(super) fn is_wanted(args: &RestoreArgs) -> Result<bool> {
    let wanted = args.odoo.filestore.is_some() || args.one.database.is_some();
    if !wanted && (args.odoo.as_production || !args.odoo.neutralise_sql.is_empty()) {
        return Err(Error::new(
            ErrorKind::Usage,
            "usage.beside",
            "--as-production and --neutralise-sql need --filestore or --database: without them nothing in the database is looked at",
        ));
    }
    Ok(wanted)
}

/// Carries it out.
pub(super) async fn run(
    context: &Context,
    printer: &Printer,
    args: &RestoreArgs,
    target: &Target,
    choice: PlanOptions,
) -> Result<Status> {
    let (_, config) = context.cluster(&args.cluster)?;
    let modules = ModuleSql::read(&args.odoo.neutralise_sql)?;
    // What is refused is refused before anything is restored.
    let filestore = args.odoo.filestore.as_deref().map(absolute).transpose()?;
    if let (Some(target), false) = (&filestore, args.odoo.as_production) {
        for source in Finder::new(&config.odoo)?.sources() {
            ensure_separate(target, &source)?;
        }
    }
    let destination = destination(args)?;
    let into = match &destination {
        Some(destination) => Some(destination.ensure_free().await?),
        None => None,
    };
    let chosen = choose(context, printer, &args.cluster, target, choice).await?;
    let major = chosen.plan.snapshot.manifest.major;
    if let Some(into) = into.filter(|into| *into < major) {
        printer.warn(format_args!(
            "the server of --into is PostgreSQL {into}, and the database is from PostgreSQL {major}: what is newer may be refused"
        ));
    }
    if args.dry_run {
        show(printer, &chosen.plan);
        printer.summary(&describe(&chosen.plan, chosen.place));
        return Ok(Status::Done);
    }
    let mut restoring =
        Beside { context, printer, args, config, target, modules, filestore, destination, chosen, began: Instant::now() };
    tokio::select! {
        done = restoring.run() => done,
        error = interrupted("restore.interrupted", "interrupted: the directory is not to be used as it is") => Err(error),
    }
}

fn destination(args: &RestoreArgs) -> Result<Option<Destination>> {
    let (Some(database), Some(into)) = (&args.one.database, &args.one.into) else { return Ok(None) };
    let connection = ConnInfo::parse(into, &|name| std::env::var(name).ok())?;
    let name = args.one.new_name.as_ref().unwrap_or(database).clone();
    Ok(Some(Destination { connection, name }))
}

struct Beside<'a> {
    context: &'a Context,
    printer: &'a Printer,
    args: &'a RestoreArgs,
    config: &'a ClusterConfig,
    target: &'a Target,
    modules: ModuleSql,
    filestore: Option<PathBuf>,
    destination: Option<Destination>,
    chosen: Chosen<'a>,
    began: Instant,
}

/// What was found and done, for the summary.
struct Done {
    reached: Point,
    databases: Vec<OdooDatabase>,
    neutralised: BTreeMap<String, Neutralised>,
    files: Vec<FilesOutcome>,
    warnings: Vec<String>,
    mark: Value,
}

impl Beside<'_> {
    async fn run(&mut self) -> Result<Status> {
        let temporary = self.temporary()?;
        let pgdata = match (&self.args.pgdata, &temporary) {
            (Some(given), _) => absolute(given)?,
            (None, Some(folder)) => folder.path().join("data"),
            (None, None) => return Err(Error::new(ErrorKind::Usage, "usage.pgdata", "--pgdata is missing")),
        };
        let opens_at_end = self.chosen.plan.stop == Stop::End;
        self.chosen.plan.pin();
        let mut options = super::options_of(self.context, self.printer, self.args, &self.chosen.cluster, pgdata.clone())?;
        if opens_at_end {
            // Pinned it would pause where it was to open.
            options.action = TargetAction::Promote;
        }
        // A copy must not archive beside production, under production's identity.
        options.archive_off |= !self.is_production();
        if let Some(folder) = &temporary {
            aside::map_tablespaces(folder.path(), &self.chosen.plan, &mut options);
        }
        let restored = write(self.printer, &self.chosen, &options).await?;
        if !self.is_production() {
            seal(&pgdata)?;
        }
        let side = Side::start(&self.chosen.cluster, &self.chosen.plan, &pgdata, &aside::side_options(&self.config.drill)).await?;
        let done = self.ask(side, &pgdata).await?;
        self.tell(&done, &pgdata);
        // One database of many goes into a server that has files of its own.
        let artifacts = if self.destination.is_some() {
            Vec::new()
        } else {
            let (chosen, reached) = (&self.chosen, done.reached.time);
            checklist::tell(self.printer, &chosen.cluster, chosen.place, &chosen.plan, reached).await
        };
        let mut summary = summary(&self.chosen, &restored);
        let warnings: Vec<&String> = restored.warnings.iter().chain(&done.warnings).collect();
        extend(
            &mut summary,
            [
                ("artifacts", json!(artifacts)),
                ("warnings", json!(warnings)),
                ("duration_ms", u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX).into()),
                ("reached", json!(done.reached)),
                ("odoo", odoo::describe(&done.databases, &done.neutralised)),
                ("mark_before", done.mark),
                ("files", json!(done.files)),
                ("as_production", self.args.odoo.as_production.into()),
                ("database", json!(self.args.one.database)),
                ("into", json!(self.destination.as_ref().map(|destination| &destination.name))),
            ],
        );
        self.printer.summary(&summary);
        Ok(if done.files.iter().any(|files| files.lacks) { Status::Incomplete } else { Status::Done })
    }

    /// True when the directory is going to be production, as it was.
    fn is_production(&self) -> bool {
        self.args.odoo.as_production && self.destination.is_none()
    }

    /// A folder for the cluster that one database is taken from.
    fn temporary(&self) -> Result<Option<TempDir>> {
        if self.args.pgdata.is_some() || self.destination.is_none() {
            return Ok(None);
        }
        let hint = "name one with room for the whole cluster: --pgdata, or `drill.folder`";
        aside::temporary(&self.config.drill).map(Some).map_err(|e| e.with_hint(hint))
    }

    /// Everything that the server is needed for.
    async fn ask(&mut self, side: Side, pgdata: &Path) -> Result<Done> {
        let reached = side.reached().clone();
        let databases = self.databases(&side).await?;
        self.modules.ensure_fits(&databases)?;
        let (cluster, plan) = (&self.chosen.cluster, &self.chosen.plan);
        let (mut warnings, mark) = odoo::warn_of_upgrades(self.printer, cluster, plan, reached.lsn, &databases).await?;
        let files = match &self.filestore {
            None => Vec::new(),
            Some(target) => {
                let wish = FilesWish {
                    cluster,
                    side: &side,
                    databases: &databases,
                    target,
                    called: self.destination.as_ref().map(|destination| destination.name.as_str()),
                    allow_missing: self.args.odoo.allow_missing_files,
                    delta: self.args.delta,
                    workers: pgvault_core::filestore::fetch::packs_at_once(self.config.workers),
                    progress: self.printer.progress(),
                };
                files::fetch(self.printer, wish).await?
            }
        };
        let mut neutralised = BTreeMap::new();
        if self.is_production() {
            side.leave().await?;
        } else {
            let promoted = side.promote().await?;
            match self.use_copy(&promoted, &databases).await {
                Ok(done) => neutralised = done,
                Err(error) => {
                    promoted.withhold().await?;
                    let note = format!("the copy in {} stays sealed: no server starts on it", pgdata.display());
                    let hint = error.hint().map_or_else(|| note.clone(), |hint| format!("{hint}; {note}"));
                    return Err(error.with_hint(hint));
                }
            }
            if self.destination.is_some() {
                promoted.withhold().await?;
            } else {
                promoted.release().await?;
            }
        }
        for warning in neutralised.values().flat_map(|done| &done.warnings) {
            self.printer.warn(warning);
            warnings.push(warning.clone());
        }
        Ok(Done { reached, databases, neutralised, files, warnings, mark: json!(mark) })
    }

    /// The databases of Odoo that this is about.
    async fn databases(&self, side: &Side) -> Result<Vec<OdooDatabase>> {
        let mut databases = side.odoo_databases().await?;
        if let Some(wanted) = &self.args.one.database {
            let all = side.databases().await?;
            if !all.contains(wanted) {
                let why = format!("the cluster has no database `{wanted}` at {}", self.target);
                // A drop marks the database, for ever and not only when it commits, some moments before.
                let hint = format!(
                    "it has: {}; of one that is being dropped, restore a moment with another commit before the drop",
                    all.join(", ")
                );
                return Err(Error::new(ErrorKind::NotFound, "restore.no_database", why).with_hint(hint));
            }
            databases.retain(|database| database.name == *wanted);
        }
        Ok(databases)
    }

    /// Makes the copy harmless, and takes from it what was wanted.
    async fn use_copy(&self, promoted: &Promoted, databases: &[OdooDatabase]) -> Result<BTreeMap<String, Neutralised>> {
        let neutralised = if self.args.odoo.as_production {
            BTreeMap::new()
        } else {
            odoo::neutralise_all(promoted, databases, &self.modules).await?
        };
        if let (Some(destination), Some(database)) = (&self.destination, &self.args.one.database) {
            destination.take(promoted, database).await?;
        }
        Ok(neutralised)
    }

    fn tell(&self, done: &Done, pgdata: &Path) {
        let when = done.reached.time.map_or_else(String::new, |time| format!(", the last transaction at {time}"));
        self.printer.line(format_args!("reached {} on timeline {}{when}", done.reached.lsn, done.reached.timeline));
        for (database, neutralised) in &done.neutralised {
            let found: Vec<String> =
                neutralised.found.iter().map(|(kind, count)| format!("{} {}", count.disabled, kind.replace('_', " "))).collect();
            self.printer.line(format_args!("`{database}` is harmless now; switched off: {}", found.join(", ")));
        }
        match (&self.destination, self.is_production()) {
            (Some(destination), _) => {
                self.printer.line(format_args!("the database is there as `{}`", destination.name));
                if self.args.pgdata.is_some() {
                    self.printer.line(format_args!("{} was for the work, and stays sealed: remove it", pgdata.display()));
                }
            }
            (None, true) => self.printer.line(format_args!(
                "production is in {}, in recovery at {}; start PostgreSQL on it",
                pgdata.display(),
                self.target
            )),
            (None, false) => self.printer.line(format_args!("the copy is in {}; start PostgreSQL on it", pgdata.display())),
        }
    }
}
