//! The archive while it is written.
//!
//! It lies beside its place under a name of its own, readable by its owner alone, and gets its name when it is complete and durable. What
//! is dropped before is gone.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use pgvault_core::filestore::fetch::Receiver;
use pgvault_core::{Error, ErrorKind, Result};
use tempfile::TempPath;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Above this a member needs the long form of its sizes; some of the limit is left for what does not compress.
const LARGE: u64 = 0xF000_0000;

/// Most documents are compressed in themselves: a second try is not worth much time.
const QUICK: i64 = 1;

/// Refuses a place where something is.
///
/// # Errors
/// [`ErrorKind::Usage`] when it is taken, or its folder is not there.
pub(super) fn ensure_free(out: &Path) -> Result<()> {
    if out.symlink_metadata().is_ok() {
        return Err(exists(out));
    }
    let folder = folder_of(out);
    if folder.is_dir() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        "export.no_folder",
        format!("there is no folder {} to write the archive in", folder.display()),
    ))
}

fn exists(out: &Path) -> Error {
    Error::new(ErrorKind::Usage, "export.exists", format!("{} exists, and nothing is overwritten", out.display()))
        .with_hint("name another file, or move that one away")
}

fn folder_of(out: &Path) -> &Path {
    out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An archive that is being written.
pub(super) struct Archive {
    /// Removes the file when it is dropped.
    temporary: TempPath,
    out: PathBuf,
    writer: Arc<Mutex<Writer>>,
}

/// Its open end.
pub(super) struct Writer {
    /// Until it is complete.
    zip: Option<ZipWriter<BufWriter<File>>>,
    out: PathBuf,
}

impl Archive {
    /// Begins one that is going to be `out`.
    ///
    /// # Errors
    /// When no file can be made beside it.
    pub(super) fn create(out: &Path) -> Result<Self> {
        let folder = folder_of(out);
        let made = tempfile::Builder::new().prefix(".pgvault-").suffix(".zip.part").tempfile_in(folder);
        let (file, temporary) = made.map_err(|e| Error::io("create a file in", folder, e))?.into_parts();
        let writer = Writer { zip: Some(ZipWriter::new(BufWriter::with_capacity(1 << 20, file))), out: out.to_path_buf() };
        Ok(Self { temporary, out: out.to_path_buf(), writer: Arc::new(Mutex::new(writer)) })
    }

    /// Its open end, which takes documents.
    pub(super) fn writer(&self) -> Arc<Mutex<Writer>> {
        self.writer.clone()
    }

    /// A member of any size begins.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) async fn begin(&self, name: &'static str) -> Result<()> {
        self.with(move |writer| writer.start(name, None, u64::MAX)).await
    }

    /// The next bytes of the member that has begun.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub(super) async fn write(&self, bytes: Vec<u8>) -> Result<()> {
        self.with(move |writer| writer.append(&bytes)).await
    }

    /// A whole member.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub(super) async fn add(&self, name: &'static str, bytes: Vec<u8>) -> Result<()> {
        self.with(move |writer| {
            writer.start(name, None, bytes.len() as u64)?;
            writer.append(&bytes)
        })
        .await
    }

    /// Completes it and gives it its name; gives its bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when somebody else has put something there meanwhile; otherwise when it cannot be written.
    pub(super) async fn finish(self) -> Result<u64> {
        self.with(Writer::finish).await?;
        let Self { temporary, out, .. } = self;
        // On the runtime's thread: a moment, and nobody can come in between the name and its being kept.
        let bytes = std::fs::metadata(&temporary).map_err(|e| Error::io("read", &temporary, e))?.len();
        temporary.persist_noclobber(&out).map_err(|e| match e.error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(&out),
            _ => Error::io("create", &out, e.error),
        })?;
        let folder = folder_of(&out);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| Error::io("make durable", folder, e))?;
        Ok(bytes)
    }

    /// Compressing and writing disturb nobody who waits for something else.
    async fn with(&self, work: impl FnOnce(&mut Writer) -> Result<()> + Send + 'static) -> Result<()> {
        let writer = self.writer.clone();
        let worked = tokio::task::spawn_blocking(move || work(&mut writer.lock().unwrap_or_else(PoisonError::into_inner)));
        worked.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
    }
}

impl Writer {
    fn start(&mut self, name: &str, level: Option<i64>, size: u64) -> Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .compression_level(level)
            .unix_permissions(0o644)
            .large_file(size > LARGE);
        match &mut self.zip {
            Some(zip) => zip.start_file(name, options).map_err(|e| failed(&self.out, name, e)),
            None => Err(self.is_complete()),
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.zip {
            Some(zip) => zip.write_all(bytes).map_err(|e| Error::io("write", &self.out, e)),
            None => Err(self.is_complete()),
        }
    }

    /// Writes the directory of the archive, and makes all of it durable.
    fn finish(&mut self) -> Result<()> {
        let out = &self.out;
        let zip = self.zip.take().ok_or_else(|| self.is_complete())?;
        let file = zip.finish().map_err(|e| failed(out, "its directory", e))?;
        let file = file.into_inner().map_err(|e| Error::io("write", out, e.into_error()))?;
        file.sync_all().map_err(|e| Error::io("make durable", out, e))
    }

    fn is_complete(&self) -> Error {
        Error::new(ErrorKind::Failed, "export.archive", format!("{} is complete, and takes nothing more", self.out.display()))
    }
}

fn failed(out: &Path, member: &str, error: zip::result::ZipError) -> Error {
    Error::new(ErrorKind::Failed, "export.archive", format!("write {member} to {}: {error}", out.display())).with_source(error)
}

impl Receiver for Writer {
    fn begin(&mut self, name: &str, size: u64) -> Result<()> {
        self.start(&format!("filestore/{name}"), Some(QUICK), size)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.append(bytes)
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}
