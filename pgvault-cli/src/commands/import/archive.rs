//! The archive, whose maker need not be a friend.
//!
//! Every member is looked at before anything is written. Odoo looks at `dump.sql` and `filestore/` alone, in any order, and so does this;
//! others are named and left. The directory of the archive is held in memory, and is no larger than a few times the file itself; members
//! are not.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pgvault_core::filestore::fetch::Loading;
use pgvault_core::filestore::names::is_content;
use pgvault_core::{Error, ErrorKind, Result};
use serde::Serialize;
use serde_json::Value;
use zip::ZipArchive;
use zip::result::ZipError;

pub(super) type Zip = ZipArchive<BufReader<File>>;

/// The largest manifest: it names some hundred modules.
const MANIFEST: u64 = 16 << 20;

/// Bytes that are passed on at once.
const BUFFER: usize = 128 << 10;

/// The kinds of files in a mode, and the two that are welcome.
const KIND: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;

/// What an archive says of itself.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Manifest {
    pub(super) db_name: Option<String>,
    pub(super) version: Option<String>,
    pub(super) major_version: Option<String>,
    pub(super) pg_version: Option<String>,
    #[serde(skip)]
    pub(super) pg_major: Option<u32>,
    /// How many modules are installed.
    pub(super) modules: usize,
}

/// What is in it.
pub(super) struct Survey {
    pub(super) manifest: Manifest,
    dump: usize,
    /// Bytes that `dump.sql` has, as it says.
    pub(super) dump_bytes: u64,
    documents: Vec<usize>,
    /// Bytes that the documents have, as they say.
    pub(super) bytes: u64,
    pub(super) warnings: Vec<String>,
}

/// Documents that were taken.
#[derive(Debug, Default)]
pub(super) struct Documents {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Of them, those whose name promises no content.
    pub(super) unnamed: u64,
}

/// Opens an archive and looks at every member.
///
/// # Errors
/// [`ErrorKind::Usage`] with the code `import.archive` when it is none of Odoo's, and `import.unsafe` when a member would lead elsewhere.
pub(super) fn open(path: &Path) -> Result<(Zip, Survey)> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let broken = |e: ZipError| not_odoo(format!("{}: {e}", path.display())).with_source(e);
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(broken)?;
    let (mut dump, mut manifest, mut others) = (None, None, 0_u64);
    let (mut documents, mut bytes) = (Vec::new(), 0_u64);
    for number in 0..zip.len() {
        let member = zip.by_index_raw(number).map_err(broken)?;
        let name = member.name().map_err(broken)?;
        ensure_safe(&name, member.unix_mode(), member.is_symlink())?;
        if member.encrypted() {
            return Err(not_odoo(format!("`{name}` is encrypted")));
        }
        if member.is_dir() {
            continue;
        }
        match (name.as_ref(), name.strip_prefix("filestore/")) {
            ("dump.sql", _) => dump = Some((number, member.size())),
            ("manifest.json", _) => manifest = Some(number),
            // Marks for Odoo's garbage collector are those of another filestore.
            (_, Some(document)) if is_content(document) => {
                bytes = bytes.checked_add(member.size()).ok_or_else(|| not_odoo("its documents have more bytes than there are"))?;
                documents.push(number);
            }
            (_, Some(_)) => {}
            _ => others += 1,
        }
    }
    let (dump, dump_bytes) = dump.ok_or_else(|| not_odoo(format!("{} has no `dump.sql`", path.display())))?;
    let manifest = manifest.ok_or_else(|| not_odoo(format!("{} has no `manifest.json`", path.display())))?;
    let manifest = read_manifest(&mut zip, manifest)?;
    let warnings =
        (others > 0).then(|| format!("{others} other members of the archive are left out, as Odoo does")).into_iter().collect();
    Ok((zip, Survey { manifest, dump, dump_bytes, documents, bytes, warnings }))
}

/// Passes the documents on, each compared with its name; gives all back with what they were.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when one is not what its name or its size promises; when they cannot be written.
pub(super) fn documents(mut zip: Zip, survey: Survey, loading: &Loading, stop: &AtomicBool) -> Result<(Zip, Survey, Documents)> {
    let mut taken = Documents::default();
    for number in &survey.documents {
        let member = zip.by_index(*number).map_err(unreadable)?;
        let name = member.name().map_err(unreadable)?.into_owned();
        let size = member.size();
        let document = name.strip_prefix("filestore/").unwrap_or(&name);
        let promised = loading.take(document, size, &mut Stoppable { inner: member, stop })?;
        taken.files += 1;
        taken.bytes += size;
        taken.unnamed += u64::from(!promised);
    }
    Ok((zip, survey, taken))
}

/// Ends when nobody wants any more: a thread cannot be told otherwise.
struct Stoppable<'a, R> {
    inner: R,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("stopped"));
        }
        self.inner.read(buffer)
    }
}

/// Passes `dump.sql` on. A reader that has gone has its own reason, which is not ours to tell.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it is not what the archive promises, or is larger.
pub(super) fn dump(mut zip: Zip, survey: &Survey, mut out: impl Write) -> Result<()> {
    let mut member = zip.by_index(survey.dump).map_err(unreadable)?.take(survey.dump_bytes.saturating_add(1));
    let (mut buffer, mut passed) = (vec![0; BUFFER], 0_u64);
    loop {
        let read = member.read(&mut buffer).map_err(|e| damaged(format!("read `dump.sql`: {e}")))?;
        if read == 0 {
            break;
        }
        passed += read as u64;
        if passed > survey.dump_bytes {
            return Err(damaged(format!("`dump.sql` is larger than the {} bytes that were announced", survey.dump_bytes)));
        }
        match out.write_all(buffer.get(..read).unwrap_or_default()) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(|e| Error::new(ErrorKind::Failed, "import.dump", format!("write to `psql`: {e}")))?,
        }
    }
    if passed < survey.dump_bytes {
        return Err(damaged(format!("`dump.sql` has {passed} bytes of the {} that were announced", survey.dump_bytes)));
    }
    Ok(())
}

fn not_odoo(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, "import.archive", why)
        .with_hint("it must be a zip with `dump.sql`, `manifest.json` and `filestore/`")
}

fn damaged(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, "import.damaged", why)
}

fn unreadable(error: ZipError) -> Error {
    damaged(format!("a member of the archive cannot be read: {error}")).with_source(error)
}

/// Refuses what would be written elsewhere, or is something else than a file or a folder. Whoever made such a member meant no good, whatever
/// its name is.
fn ensure_safe(name: &str, mode: Option<u32>, is_link: bool) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::new(ErrorKind::Usage, "import.unsafe", format!("the member `{}` {why}", name.escape_debug()))
            .with_hint("no tool of Odoo makes such an archive; nothing of it was loaded"))
    };
    let path = name.strip_suffix('/').unwrap_or(name);
    if name.starts_with('/') || name.contains(['\\', '\0']) || name.as_bytes().get(1) == Some(&b':') {
        return refuse("has an absolute name, or one that other systems take for one");
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("leads out of its folder");
    }
    let kind = mode.map_or(0, |mode| mode & KIND);
    if is_link || !matches!(kind, 0 | REGULAR | FOLDER) {
        return refuse("is neither a file nor a folder");
    }
    Ok(())
}

fn read_manifest(zip: &mut Zip, number: usize) -> Result<Manifest> {
    let mut text = Vec::new();
    let member = zip.by_index(number).map_err(unreadable)?;
    let _ = member.take(MANIFEST + 1).read_to_end(&mut text).map_err(|e| damaged(format!("read `manifest.json`: {e}")))?;
    if text.len() as u64 > MANIFEST {
        return Err(not_odoo("`manifest.json` is larger than any that Odoo writes"));
    }
    let known: Value = serde_json::from_slice(&text).map_err(|e| not_odoo(format!("`manifest.json` is no JSON: {e}")))?;
    let text = |key: &str| known.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
    match text("odoo_dump").as_deref() {
        Some("1") => {}
        Some(other) => return Err(not_odoo(format!("`manifest.json` says `odoo_dump` {other}, and only 1 is known"))),
        None => return Err(not_odoo("`manifest.json` does not say `odoo_dump`: it is not Odoo's")),
    }
    let pg_version = text("pg_version");
    let pg_major = pg_version.as_deref().and_then(|version| version.split('.').next()?.parse().ok());
    let modules = known.get("modules").and_then(Value::as_object).map_or(0, serde_json::Map::len);
    Ok(Manifest {
        db_name: text("db_name"),
        version: text("version"),
        major_version: text("major_version"),
        pg_version,
        pg_major,
        modules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_and_what_is_no_file_are_refused() {
        for (name, mode, is_link) in [
            ("../x", None, false),
            ("filestore/../../x", None, false),
            ("filestore/..", None, false),
            ("filestore/./x", None, false),
            ("filestore//x", None, false),
            ("/etc/passwd", None, false),
            ("filestore\\..\\x", None, false),
            ("C:x", None, false),
            ("", None, false),
            ("filestore/x\0y", None, false),
            ("filestore/x", Some(0o120_777), true),
            ("filestore/x", Some(0o120_777), false),
            ("filestore/x", Some(0o010_644), false),
        ] {
            assert_eq!(ensure_safe(name, mode, is_link).unwrap_err().code(), "import.unsafe", "{name:?}");
        }
        for (name, mode) in
            [("dump.sql", Some(0o100_644)), ("filestore/", Some(0o040_755)), ("filestore/a9/a9..x", Some(0o644)), ("x", None)]
        {
            ensure_safe(name, mode, false).unwrap();
        }
    }
}
