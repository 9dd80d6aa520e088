//! Whether a filestore that is to be written is another one than production's.
//!
//! The surviving garbage collector of a copy deletes what the copy does not refer to. In a filestore that it shares with production,
//! those are production's documents. So a place is refused that *is* the source's, lies in it or contains it, by whatever name it is
//! called, and one whose files are the source's under a second name.
//!
//! Two places are the same when their paths are, once links and `..` are resolved, or when one of their directories is the same on disk
//! (device and inode): that is how a bind mount shows. A directory that does not exist yet is judged by the nearest one above it that
//! does.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io::ErrorKind as Io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use walkdir::WalkDir;

use crate::{Error, ErrorKind, Result};

/// Links that are followed from one path before it counts as a circle; Linux's own limit.
const MAX_LINKS: usize = 40;

/// What a file or directory is on disk, whatever it is called.
type Identity = (u64, u64);

/// Makes sure that writing and deleting in `target` cannot touch `source`.
///
/// Everything that exists in `target` is looked at; `source` only when `target` holds something that could be shared.
///
/// # Errors
/// [`ErrorKind::Usage`] with the code `filestore.same_place` when it could, and `io` when it cannot be told.
pub fn ensure_separate(target: &Path, source: &Path) -> Result<()> {
    let (here, there) = (resolve(target)?, resolve(source)?);
    let refuse = |how: &str| {
        Err(Error::new(
            ErrorKind::Usage,
            "filestore.same_place",
            format!("the filestore {} {how} {}, the source's", target.display(), source.display()),
        )
        .with_hint("give the copy a filestore of its own, on a path that shares nothing with the source's"))
    };
    if here == there {
        return refuse("is");
    }
    if here.starts_with(&there) {
        return refuse("lies in");
    }
    if there.starts_with(&here) {
        return refuse("contains");
    }
    let (own, other) = (identity_of(&here)?, identity_of(&there)?);
    if own.is_some() && own == other {
        return refuse("is, by another name,");
    }
    if let Some(other) = other
        && is_among_ancestors(other, &here)?
    {
        return refuse("lies, by another name, in");
    }
    if let Some(own) = own {
        if is_among_ancestors(own, &there)? {
            return refuse("contains, by another name,");
        }
        if let Some(path) = shared(&here, &there)? {
            return refuse(&format!("shares {} with", path.display()));
        }
    }
    Ok(())
}

/// The path without links and `..`, as far as it exists; what does not exist yet is appended.
fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("resolve", path, e))?;
    let mut links = 0;
    walk(PathBuf::from("/"), &absolute, &mut links)
}

fn walk(mut at: PathBuf, path: &Path, links: &mut usize) -> Result<PathBuf> {
    for component in path.components() {
        match component {
            Component::RootDir | Component::Prefix(_) => at = PathBuf::from("/"),
            Component::CurDir => {}
            // `at` has no links, so the directory above it is what `..` means.
            Component::ParentDir => {
                let _ = at.pop();
            }
            Component::Normal(name) => {
                let next = at.join(name);
                match fs::read_link(&next) {
                    Ok(leads_to) => {
                        *links += 1;
                        if *links > MAX_LINKS {
                            return Err(Error::io("resolve", path, Io::TooManyLinks.into()));
                        }
                        at = walk(at, &leads_to, links)?;
                    }
                    // It is no link, or is not there.
                    Err(e) if matches!(e.kind(), Io::InvalidInput | Io::NotFound | Io::NotADirectory) => at = next,
                    Err(e) => return Err(Error::io("resolve", &next, e)),
                }
            }
        }
    }
    Ok(at)
}

fn metadata(path: &Path) -> Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta)),
        Err(e) if matches!(e.kind(), Io::NotFound | Io::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

fn identity_of(path: &Path) -> Result<Option<Identity>> {
    Ok(metadata(path)?.map(|meta| (meta.dev(), meta.ino())))
}

fn is_among_ancestors(wanted: Identity, path: &Path) -> Result<bool> {
    for folder in path.ancestors().skip(1) {
        if identity_of(folder)? == Some(wanted) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What in `target` can be the same on disk as something else.
#[derive(Default)]
struct Held {
    /// Directories below it: a bind mount may lie on any.
    directories: BTreeSet<Identity>,
    /// Files with more than one name.
    files: BTreeSet<Identity>,
}

/// Something in `target` that is also in `source`; both are resolved and exist.
fn shared(target: &Path, source: &Path) -> Result<Option<PathBuf>> {
    let mut held = Held::default();
    for entry in entries(target) {
        let Some((path, meta)) = entry? else { continue };
        if meta.is_dir() {
            let _ = held.directories.insert((meta.dev(), meta.ino()));
        } else if meta.is_symlink() {
            let parent = path.parent().unwrap_or(target);
            let leads_to = fs::read_link(&path).map_err(|e| Error::io("follow", &path, e))?;
            let end = walk(parent.to_path_buf(), &leads_to, &mut 0)?;
            if end.starts_with(source) || source.starts_with(&end) {
                return Ok(Some(path));
            }
        } else if meta.nlink() > 1 {
            let _ = held.files.insert((meta.dev(), meta.ino()));
        }
    }
    if held.directories.is_empty() && held.files.is_empty() {
        return Ok(None);
    }
    for entry in WalkDir::new(source).min_depth(1).follow_links(false) {
        let Some(entry) = present(source, entry)? else { continue };
        let is_dir = entry.file_type().is_dir();
        // A look at every file of a large filestore takes minutes; most copies have none with a second name.
        if !is_dir && held.files.is_empty() {
            continue;
        }
        let Some(identity) = identity_of(entry.path())? else { continue };
        if held.directories.contains(&identity) || held.files.contains(&identity) {
            return Ok(Some(entry.path().to_path_buf()));
        }
    }
    Ok(None)
}

fn entries(folder: &Path) -> impl Iterator<Item = Result<Option<(PathBuf, Metadata)>>> {
    WalkDir::new(folder).min_depth(1).follow_links(false).into_iter().map(move |entry| {
        let Some(entry) = present(folder, entry)? else { return Ok(None) };
        Ok(metadata(entry.path())?.map(|meta| (entry.into_path(), meta)))
    })
}

/// An entry, unless it has gone meanwhile: a filestore is in use.
fn present(folder: &Path, entry: walkdir::Result<walkdir::DirEntry>) -> Result<Option<walkdir::DirEntry>> {
    match entry {
        Ok(entry) => Ok(Some(entry)),
        Err(e) if e.io_error().is_some_and(|e| e.kind() == Io::NotFound) => Ok(None),
        Err(e) => {
            let path = e.path().unwrap_or(folder).to_path_buf();
            let cause = e.into_io_error().unwrap_or_else(|| Io::Other.into());
            Err(Error::io("list", &path, cause))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// `live/prod` with a document, and room beside it.
    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("live/prod");
        fs::create_dir_all(source.join("3f")).unwrap();
        fs::write(source.join("3f/3fdoc"), "document").unwrap();
        (folder, source)
    }

    #[track_caller]
    fn refused(target: &Path, source: &Path, how: &str) {
        let error = ensure_separate(target, source).unwrap_err();
        assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "filestore.same_place"), "{error}");
        assert!(error.to_string().contains(how), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn a_place_of_its_own_is_accepted_whether_or_not_it_exists() {
        let (folder, source) = place();
        let target = folder.path().join("copies/prod");
        ensure_separate(&target, &source).unwrap();
        fs::create_dir_all(target.join("3f")).unwrap();
        fs::write(target.join("3f/3fdoc"), "document").unwrap();
        fs::hard_link(target.join("3f/3fdoc"), folder.path().join("second-name")).unwrap();
        symlink("/nowhere", target.join("dangling")).unwrap();
        ensure_separate(&target, &source).unwrap();
        // A name that begins alike is another name.
        ensure_separate(&folder.path().join("live/prod2"), &source).unwrap();
        ensure_separate(&target, &folder.path().join("not/there")).unwrap();
    }

    #[test]
    fn the_source_what_lies_in_it_and_what_contains_it_are_refused() {
        let (folder, source) = place();
        refused(&source, &source, " is ");
        refused(&source.join("copy"), &source, "lies in");
        refused(&source.join("not/yet/there"), &source, "lies in");
        refused(&folder.path().join("live"), &source, "contains");
        refused(Path::new("/"), &source, "contains");
        // The same when production's is not mounted.
        fs::remove_dir_all(&source).unwrap();
        refused(&source, &source, " is ");
        refused(&folder.path().join("live"), &source, "contains");
    }

    #[test]
    fn links_and_dots_lead_nowhere_else() {
        let (folder, source) = place();
        let at = |name: &str| folder.path().join(name);
        refused(&at("live/../live/./prod"), &source, " is ");
        // Of what does not exist, `..` is what will be above it.
        refused(&at("new/../live/prod"), &source, " is ");
        symlink(&source, at("link")).unwrap();
        refused(&at("link"), &source, " is ");
        refused(&at("link/copy"), &source, "lies in");
        refused(&at("other"), &at("other"), " is ");
        symlink("live", at("relative")).unwrap();
        refused(&at("relative/prod"), &source, " is ");
        refused(&source, &at("relative/prod"), " is ");
        // `..` behind a link is above what the link leads to.
        refused(&at("link/../prod"), &source, " is ");
        // A link to where nothing is yet.
        symlink(source.join("later"), at("promise")).unwrap();
        refused(&at("promise"), &source, "lies in");
        symlink(at("circle"), at("circle")).unwrap();
        assert_eq!(ensure_separate(&at("circle"), &source).unwrap_err().code(), "io");
    }

    #[test]
    fn what_the_target_holds_of_the_source_is_found() {
        let (folder, source) = place();
        let target = folder.path().join("copy");
        fs::create_dir_all(target.join("3f")).unwrap();
        fs::hard_link(source.join("3f/3fdoc"), target.join("3f/3fdoc")).unwrap();
        refused(&target, &source, "shares");
        fs::remove_file(target.join("3f/3fdoc")).unwrap();
        ensure_separate(&target, &source).unwrap();
        fs::remove_dir(target.join("3f")).unwrap();
        symlink(source.join("3f"), target.join("3f")).unwrap();
        refused(&target, &source, "shares");
        fs::remove_file(target.join("3f")).unwrap();
        symlink("../live", target.join("up")).unwrap();
        refused(&target, &source, "shares");
    }

    /// Needs the right to mount; whoever has it not is told by `mount`, and nothing is claimed.
    #[test]
    fn a_bind_mount_is_seen_through() {
        let (folder, source) = place();
        let at = |name: &str| folder.path().join(name);
        for name in ["bound", "up", "copy/3f"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        // In a mount namespace of its own: the test leaves no mount behind, however it ends.
        let script = "mount --bind \"$1/live/prod\" \"$1/bound\" && mount --bind \"$1/live\" \"$1/up\" \
                      && mount --bind \"$1/live/prod/3f\" \"$1/copy/3f\" && exec \"$2\" --exact --ignored filestore::separate::tests::behind_bind_mounts --nocapture";
        let ran = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(std::env::current_exe().unwrap())
            .env("PGVAULT_TEST_BOUND", folder.path())
            .output();
        match ran {
            Ok(ran) if ran.status.success() => assert!(String::from_utf8_lossy(&ran.stdout).contains("1 passed"), "{ran:?}"),
            Ok(ran) if !rustix::process::geteuid().is_root() || String::from_utf8_lossy(&ran.stderr).contains("ermi") => {
                println!("not allowed to mount: {}", String::from_utf8_lossy(&ran.stderr));
            }
            other => panic!("{other:?}"),
        }
        let _ = source;
    }

    #[test]
    #[ignore = "run by `a_bind_mount_is_seen_through`, behind its mounts"]
    fn behind_bind_mounts() {
        let folder = PathBuf::from(std::env::var_os("PGVAULT_TEST_BOUND").unwrap());
        let source = folder.join("live/prod");
        refused(&folder.join("bound"), &source, "is, by another name");
        refused(&folder.join("bound/new"), &source, "lies, by another name, in");
        refused(&folder.join("up/prod/new"), &source, "lies, by another name, in");
        refused(&folder.join("up"), &source, "contains, by another name");
        refused(&folder.join("copy"), &source, "shares");
    }
}
