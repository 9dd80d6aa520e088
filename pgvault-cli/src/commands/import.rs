//! `pgvault import`: an archive of Odoo's database manager becomes a database and a filestore.
//!
//! ```text
//! members looked at, all of them -> a folder, documents compared with their names -> a database, dump.sql -> what rows refer to is looked for
//! ```
//!
//! The archive may be anybody's: no name leads out of the folder, nothing is larger than it says, and nothing is read into memory whole. A
//! statement that fails fails the import, which Odoo's own loading overlooks. What fails leaves neither database nor folder.
//!
//! `dump.sql` can do whatever the role of `--into` can, and nothing on the machine that runs this ([`script`]).

mod archive;
mod script;
mod server;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pgvault_core::filestore::database::{References, references};
use pgvault_core::filestore::fetch::Loading;
use pgvault_core::postgres::ConnInfo;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use self::archive::{Survey, Zip};
use self::server::Server;
use super::interrupted;
use super::restore::absolute;
use crate::args::ImportArgs;
use crate::exit::Status;
use crate::output::{self, Printer};

/// Names of missing documents that are listed.
const NAMED: usize = 1000;

pub(crate) async fn run(printer: &Printer, args: &ImportArgs) -> Result<Status> {
    let began = Instant::now();
    let connection = ConnInfo::parse(&args.into, &|name| std::env::var(name).ok())?;
    if matches!(args.database.as_str(), "" | "." | "..") || args.database.contains(['/', '\0']) {
        let why = format!("`{}` cannot be the name of a folder, and so of no database of Odoo", args.database);
        return Err(Error::new(ErrorKind::Usage, "import.name", why));
    }
    let place = Place::new(&absolute(&args.filestore)?, &args.database)?;
    let path = args.archive.clone();
    let (zip, survey) = blocking(move || archive::open(&path)).await?;
    for warning in &survey.warnings {
        printer.warn(warning);
    }
    place.ensure_room(survey.bytes)?;
    let server = Server { connection, database: args.database.clone() };
    let major = server.ensure_free().await?;
    if survey.manifest.pg_major.is_some_and(|of_dump| of_dump > major) {
        let from = survey.manifest.pg_major.unwrap_or_default();
        printer.warn(format_args!(
            "the server is PostgreSQL {major}, and the dump of PostgreSQL {from}: what is newer may be refused"
        ));
    }
    let mut import = Import { printer, args, server, place, made_database: false, stop: Arc::default(), working: Arc::default() };
    let done = tokio::select! {
        done = import.run(zip, survey, began) => done,
        error = interrupted("import.interrupted", "interrupted: nothing was imported") => Err(error),
    };
    if done.is_err() {
        import.undo().await;
    }
    done
}

struct Import<'a> {
    printer: &'a Printer,
    args: &'a ImportArgs,
    server: Server,
    place: Place,
    made_database: bool,
    /// Tells the thread that writes documents to end.
    stop: Arc<AtomicBool>,
    /// Held by that thread.
    working: Arc<Mutex<()>>,
}

impl Import<'_> {
    async fn run(&mut self, zip: Zip, survey: Survey, began: Instant) -> Result<Status> {
        // The documents first: what their names do not promise is noticed before there is a database.
        let folder = self.place.folder.clone();
        let loading = blocking(move || Loading::create(&folder)).await?;
        self.place.made = true;
        let (stop, working) = (self.stop.clone(), self.working.clone());
        let work = move || {
            let _working = working.lock().unwrap_or_else(PoisonError::into_inner);
            let (zip, survey, documents) = archive::documents(zip, survey, &loading, &stop)?;
            Ok((zip, survey, documents, loading))
        };
        let (zip, survey, documents, loading) = blocking(work).await?;
        self.server.create().await?;
        self.made_database = true;
        let dump_bytes = survey.dump_bytes;
        let manifest = survey.manifest.clone();
        self.server.load(self.printer, move |out| archive::dump(zip, &survey, out)).await?;
        let mut sql = self.server.connect_to_it().await?;
        let version = server::version_of_base(&mut sql).await?;
        let references = references(&mut sql).await?;
        sql.close().await;
        let root = self.place.folder.clone();
        let (referenced, remote) = (references.local, references.remote.clone());
        let (missing, names) = blocking(move || {
            let missing = missing(&root, references)?;
            loading.finish()?;
            Ok(missing)
        })
        .await?;

        let mut warnings = Vec::new();
        if let (Some(major), Some(version)) = (&manifest.major_version, &version)
            && !version.starts_with(&format!("{major}."))
        {
            warnings.push(format!("the manifest says Odoo {major}, and the module `base` has the version {version}"));
        }
        if missing > 0 {
            warnings.push(format!("rows refer to {missing} documents that are not in the archive"));
        }
        for (scheme, count) in &remote {
            warnings.push(format!("{count} documents lie in `{scheme}://`, which the archive does not have"));
        }
        for warning in &warnings {
            self.printer.warn(warning);
        }
        let name = &self.args.database;
        self.printer.line(format_args!(
            "`{name}` is there, with {} documents of {} in {}",
            documents.files,
            output::bytes(documents.bytes),
            self.place.folder.display()
        ));
        self.printer.line("capture it: `pgvault filestore sync` for the documents, and `pgvault backup` for the cluster");
        self.printer.summary(&json!({
            "database": name,
            "folder": self.place.folder,
            "manifest": manifest,
            "version": version,
            "dump_bytes": dump_bytes,
            "files": documents.files,
            "bytes": documents.bytes,
            "unnamed": documents.unnamed,
            "referenced": referenced,
            "missing": missing,
            "missing_names": names,
            "remote": remote,
            "warnings": warnings,
            "next": ["pgvault filestore sync", "pgvault backup"],
            "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        }));
        Ok(if missing > 0 && !self.args.allow_missing_files { Status::Incomplete } else { Status::Done })
    }

    /// Takes away what this run has made.
    async fn undo(&self) {
        if self.made_database {
            self.server.drop_it().await;
        }
        self.stop.store(true, Ordering::Relaxed);
        let working = self.working.clone();
        // What is still being written is waited for, or it would come back.
        let wait = move || {
            let _done = working.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(())
        };
        let _ = blocking(wait).await;
        self.place.remove(self.printer);
    }
}

/// Where the documents go.
struct Place {
    /// The folder of the database.
    folder: PathBuf,
    /// Folders above it that are not there yet, the lowest first.
    above: Vec<PathBuf>,
    /// Whether this run has made it.
    made: bool,
}

impl Place {
    fn new(filestore: &Path, database: &str) -> Result<Self> {
        let folder = filestore.join(database);
        if folder.symlink_metadata().is_ok() {
            let why = format!("{} exists, and documents are not mixed with others", folder.display());
            return Err(Error::new(ErrorKind::Usage, "import.folder_exists", why)
                .with_hint("give the database another name, or move it away"));
        }
        let above = filestore.ancestors().take_while(|path| !path.exists()).map(Path::to_path_buf).collect();
        Ok(Self { folder, above, made: false })
    }

    /// What the members say that they are must find room before anything is written.
    fn ensure_room(&self, bytes: u64) -> Result<()> {
        let there = self.folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let free = rustix::fs::statvfs(there).map_err(|e| Error::io("ask for the room of", there, e.into()))?;
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        if bytes <= free {
            return Ok(());
        }
        let why = format!("the documents take {bytes} bytes, and {} has room for {free}", there.display());
        Err(Error::new(ErrorKind::Failed, "import.room", why))
    }

    fn remove(&self, printer: &Printer) {
        if self.made
            && let Err(error) = std::fs::remove_dir_all(&self.folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            printer.warn(format_args!("{} was not removed: {error}", self.folder.display()));
        }
        for folder in &self.above {
            // Not when somebody else has put something there.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// How many of the documents that rows refer to are not there, and the first of them.
fn missing(root: &Path, references: References) -> Result<(u64, Vec<String>)> {
    let (names, odd) = references.read()?;
    let (mut missing, mut first) = (0, Vec::new());
    for name in names.chain(odd.into_iter().map(Ok)) {
        let name = name?;
        if !root.join(&name).is_file() {
            missing += 1;
            if first.len() < NAMED {
                first.push(name);
            }
        }
    }
    Ok((missing, first))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}
