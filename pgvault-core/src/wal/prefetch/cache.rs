//! Segments on the local disk, for one recovering server, between the process that fetches them and those that hand them out.
//!
//! ```text
//! BASE/                    the system's folder for temporary files, or the configured one
//!   KEY/                   one server (its pg_wal, device and inode), one vault, one cluster; mode 0700
//!     owner                locked while a prefetcher runs; holds the vault's id
//!     asked                the segment that the server asked for last
//!     NAME                 a segment and its seal
//!     NAME.pending         that segment is on its way
//!     rest                 prefetching failed a moment ago; not to be tried again at once
//! ```
//!
//! Whatever lies here is doubted. The folder must be ours and closed to everybody else, no link is followed, and a segment
//! counts only while its owner lives, when its seal names this vault, this cluster and this segment, when its digest is
//! right, and when its first page says the same. Without an owner the cache is empty: what an earlier recovery left is
//! never used (T20).

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use ulid::Ulid;

use crate::postgres::{ControlFile, SegmentHeader, SegmentName, SegmentSize, SystemId};

const OWNER: &str = "owner";
const ASKED: &str = "asked";
const REST: &str = "rest";
const PENDING: &str = ".pending";
const TEMPORARY: &str = ".tmp";

const MAGIC: [u8; 8] = *b"PGVCACH1";
/// Bytes that are looked at in one go.
const CHUNK: usize = 256 << 10;

/// Magic, vault, system identifier, name, length, digest.
const SEAL: usize = 8 + 16 + 8 + 24 + 8 + 32;

/// The server that a file is fetched for.
#[derive(Debug, Clone)]
pub struct Recovering {
    /// Its data directory.
    pub pgdata: PathBuf,
    /// Its `pg_wal`, wherever that leads.
    pub wal: PathBuf,
    /// Device and inode of `pg_wal`: a directory that was removed and made again is another server.
    identity: (u64, u64),
    /// Its system identifier.
    pub system_id: SystemId,
    /// Its segment size.
    pub segment_size: SegmentSize,
}

impl Recovering {
    /// The server whose `pg_wal` the destination lies in; `None` when it does not lie in one.
    pub fn of_destination(destination: &Path) -> Option<Self> {
        let destination = std::path::absolute(destination).ok()?;
        let folder = destination.parent().filter(|folder| folder.file_name().is_some_and(|name| name == "pg_wal"))?;
        let pgdata = folder.parent()?;
        // While the server writes it, it may be torn; then this one time nothing is taken from the cache.
        let control = ControlFile::parse(&std::fs::read(pgdata.join("global/pg_control")).ok()?).ok()?;
        let wal = folder.canonicalize().ok()?;
        let identity = identity(&std::fs::symlink_metadata(&wal).ok()?);
        Some(Self {
            pgdata: pgdata.to_path_buf(),
            wal,
            identity,
            system_id: control.system_identifier,
            segment_size: control.wal_segment_size,
        })
    }

    /// True as long as its `pg_wal` is the directory it was.
    pub fn is_there(&self) -> bool {
        std::fs::symlink_metadata(&self.wal).is_ok_and(|found| identity(&found) == self.identity)
    }

    /// True while the data directory says that its server is to recover.
    pub fn is_told_to_recover(&self) -> bool {
        ["recovery.signal", "standby.signal"].iter().any(|signal| self.pgdata.join(signal).exists())
    }

    /// `pg_rewind` lists and deletes what lies in the data directory: nothing of ours may.
    fn ensure_outside(&self, base: &Path) -> io::Result<()> {
        let base = base.canonicalize().or_else(|error| base.parent().ok_or(error)?.canonicalize())?;
        if base.starts_with(self.pgdata.canonicalize()?) || base.starts_with(&self.wal) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the cache would lie in the data directory"));
        }
        Ok(())
    }

    /// The name of its cache. A server that recovers from another vault or cluster has another one.
    fn key(&self, vault: &str, cluster: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [vault.as_bytes(), cluster.as_bytes(), self.wal.as_os_str().as_encoded_bytes()] {
            let _ = hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        for number in [self.identity.0, self.identity.1, self.system_id.0] {
            let _ = hasher.update(&number.to_le_bytes());
        }
        hasher.finalize().to_hex().chars().take(32).collect()
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The folder of caches when none is configured.
pub fn default_base() -> PathBuf {
    std::env::temp_dir().join(format!("pgvault-prefetch-{}", rustix::process::geteuid().as_raw()))
}

/// Makes sure that a folder may hold WAL: a real one, ours, and one that nobody else writes to.
fn ensure_ours(folder: impl AsFd, forbidden: u32) -> io::Result<()> {
    let stat = rustix::fs::fstat(folder)?;
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned()));
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return refused("the cache's folder belongs to somebody else");
    }
    if stat.st_mode & forbidden != 0 {
        return refused("the cache's folder is open to others");
    }
    Ok(())
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// One server's cache.
#[derive(Debug)]
pub struct Cache {
    base: PathBuf,
    key: String,
    folder: OwnedFd,
    server: Recovering,
}

impl Cache {
    /// Opens a cache that is there.
    ///
    /// # Errors
    /// When there is none, or it is not fit to be trusted.
    pub fn open(base: &Path, server: Recovering, vault: &str, cluster: &str) -> io::Result<Self> {
        let key = server.key(vault, cluster);
        server.ensure_outside(base)?;
        let outer = open_folder(base)?;
        ensure_ours(&outer, 0o022)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&outer, &key, flags, Mode::empty())?;
        ensure_ours(&folder, 0o077)?;
        Ok(Self { base: base.to_path_buf(), key, folder, server })
    }

    /// Opens a cache, and makes it first if need be.
    ///
    /// # Errors
    /// When it cannot be made, or is not fit to be trusted.
    pub fn create(base: &Path, server: Recovering, vault: &str, cluster: &str) -> io::Result<Self> {
        let create = |path: &Path| match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        server.ensure_outside(base)?;
        create(base)?;
        ensure_ours(open_folder(base)?, 0o022)?;
        create(&base.join(server.key(vault, cluster)))?;
        Self::open(base, server, vault, cluster)
    }

    /// The server it is for.
    pub fn server(&self) -> &Recovering {
        &self.server
    }

    /// Its folder.
    pub fn path(&self) -> PathBuf {
        self.base.join(&self.key)
    }

    /// True when its path still leads to it.
    pub fn is_there(&self) -> bool {
        let found = std::fs::symlink_metadata(self.path());
        let own = rustix::fs::fstat(&self.folder);
        matches!((found, own), (Ok(found), Ok(own)) if identity(&found) == (own.st_dev, own.st_ino))
    }

    fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let fd = rustix::fs::openat(&self.folder, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
        let file = File::from(fd);
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{name} in the cache is not a file of ours")));
        }
        Ok(file)
    }

    fn exists(&self, name: &str) -> bool {
        rustix::fs::statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    fn remove(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
    }

    /// The vault of the prefetcher that keeps this cache; `None` when there is no prefetcher.
    pub fn kept_for(&self) -> Option<Ulid> {
        let mut file = self.file(OWNER, OFlags::RDONLY).ok()?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {}
            // Given back at once, with the file.
            _ => return None,
        }
        let mut text = String::new();
        let _ = (&mut file).take(64).read_to_string(&mut text).ok()?;
        Ulid::from_string(text.trim()).ok()
    }

    /// True when prefetching failed less than `pause` ago.
    pub fn rests(&self, pause: Duration) -> bool {
        let age = self.file(REST, OFlags::RDONLY).and_then(|file| file.metadata()?.modified());
        age.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < pause))
    }

    /// Notes that the server wants this segment.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn ask(&self, segment: SegmentName) -> io::Result<()> {
        // Always as many bytes, so that nobody reads half of one name without the end of another.
        std::os::unix::fs::FileExt::write_all_at(
            &self.file(ASKED, OFlags::WRONLY | OFlags::CREATE)?,
            segment.to_string().as_bytes(),
            0,
        )
    }

    /// The segment that the server asked for last.
    pub fn asked(&self) -> Option<SegmentName> {
        let mut text = String::new();
        let _ = self.file(ASKED, OFlags::RDONLY).ok()?.take(64).read_to_string(&mut text).ok()?;
        text.parse().ok()
    }

    /// True when the segment is on its way.
    pub fn is_pending(&self, segment: SegmentName) -> bool {
        self.exists(&format!("{segment}{PENDING}"))
    }

    /// A segment; `None` when it is not there, or there is anything wrong with it: then it is removed as well.
    pub fn get(&self, segment: SegmentName) -> Option<Vec<u8>> {
        let vault = self.kept_for()?;
        match self.read(segment, vault) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%segment, %error, "a cached segment is not used");
                    self.remove(&segment.to_string());
                }
                None
            }
        }
    }

    fn read(&self, segment: SegmentName, vault: Ulid) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::try_from(self.server.segment_size.bytes()).unwrap_or(0));
        let _ = self.verify(segment, vault, |chunk| bytes.extend_from_slice(chunk))?;
        Ok(bytes)
    }

    /// Reads a segment from its first byte to its seal; gives the file when everything about it is right.
    fn verify(&self, segment: SegmentName, vault: Ulid, mut each: impl FnMut(&[u8])) -> io::Result<File> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let mut file = self.file(&segment.to_string(), OFlags::RDWR)?;
        let size = self.server.segment_size.bytes();
        if file.metadata()?.len() != size + SEAL as u64 {
            return Err(bad("has another size than a segment"));
        }
        let head = self.seal_head(segment, vault, size);
        let mut hasher = blake3::Hasher::new();
        let _ = hasher.update(&head);
        let mut chunk = vec![0; CHUNK];
        let mut left = size;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let Some(here) = chunk.get_mut(..length) else { break };
            file.read_exact(here)?;
            if left == size {
                self.check_header(segment, here).map_err(|why| bad(&why))?;
            }
            let _ = hasher.update(here);
            each(here);
            left -= length as u64;
        }
        let mut seal = Vec::with_capacity(SEAL);
        let _ = (&mut file).take(SEAL as u64).read_to_end(&mut seal)?;
        let right = seal.strip_prefix(head.as_slice()).is_some_and(|digest| digest == hasher.finalize().as_bytes());
        if right { Ok(file) } else { Err(bad("its seal is not that of this segment and these bytes")) }
    }

    /// Moves a segment to where the server wants it, when that is on the same file system, and copies it there otherwise. `None` when
    /// it is not there, or there is anything wrong with it: then it is removed as well.
    pub fn hand_out(&self, segment: SegmentName, destination: &Path) -> Option<io::Result<()>> {
        let vault = self.kept_for()?;
        let folder = rustix::fs::fstat(&self.folder).ok()?.st_dev;
        let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if rustix::fs::stat(parent).is_ok_and(|parent| parent.st_dev == folder) {
            let moved = self.verify(segment, vault, |_| {}).and_then(|file| {
                // Without its seal it is a segment, and nothing that this cache would give to anybody.
                file.set_len(self.server.segment_size.bytes())?;
                let name = segment.to_string();
                Ok(rustix::fs::renameat(&self.folder, name, rustix::fs::CWD, destination)?)
            });
            match moved {
                Ok(()) => return Some(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
                Err(error) => {
                    tracing::warn!(%segment, %error, "a cached segment is not used");
                    self.remove(&segment.to_string());
                    return None;
                }
            }
        }
        self.get(segment).map(|bytes| crate::wal::fetch::place(destination, &bytes))
    }

    fn check_header(&self, segment: SegmentName, bytes: &[u8]) -> Result<(), String> {
        let header = SegmentHeader::parse(bytes).map_err(|e| e.to_string())?;
        let number = segment.segment_number(header.segment_size).map_err(|e| e.to_string())?;
        let right = header.system_identifier == self.server.system_id
            && header.segment_size == self.server.segment_size
            && header.start == number.start(header.segment_size)
            && header.timeline <= segment.timeline;
        if right { Ok(()) } else { Err("its first page is not that of this segment of this server".into()) }
    }

    /// Says what the bytes are, behind them.
    fn seal(&self, segment: SegmentName, vault: Ulid, bytes: &[u8]) -> Vec<u8> {
        let mut seal = self.seal_head(segment, vault, bytes.len() as u64);
        let digest = blake3::Hasher::new().update(&seal).update(bytes).finalize();
        seal.extend_from_slice(digest.as_bytes());
        seal
    }

    /// What a seal says before the digest.
    fn seal_head(&self, segment: SegmentName, vault: Ulid, length: u64) -> Vec<u8> {
        let mut head = Vec::with_capacity(SEAL);
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&vault.to_bytes());
        head.extend_from_slice(&self.server.system_id.0.to_le_bytes());
        head.extend_from_slice(segment.to_string().as_bytes());
        head.extend_from_slice(&length.to_le_bytes());
        head
    }

    /// Becomes the only one that fills this cache, and empties it; `None` while somebody else is.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn own(self, vault: Ulid) -> io::Result<Result<Owner, Self>> {
        let lock = self.file(OWNER, OFlags::RDWR | OFlags::CREATE)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(Err(self)),
            locked => locked?,
        }
        // Who ended meanwhile has removed the file that was locked here, and maybe the folder.
        let found = rustix::fs::statat(&self.folder, OWNER, AtFlags::SYMLINK_NOFOLLOW);
        if !self.is_there() || !found.is_ok_and(|found| lock.metadata().is_ok_and(|own| own.ino() == found.st_ino)) {
            return Ok(Err(self));
        }
        self.empty(&[OWNER, ASKED])?;
        lock.set_len(0)?;
        std::os::unix::fs::FileExt::write_all_at(&lock, vault.to_string().as_bytes(), 0)?;
        Ok(Ok(Owner { cache: self, vault, _lock: lock }))
    }

    /// Removes everything but `keep`.
    fn empty(&self, keep: &[&str]) -> io::Result<()> {
        for name in self.names()? {
            if !keep.contains(&name.as_str()) {
                self.remove(&name);
            }
        }
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// The right to fill a cache; given up with this value.
#[derive(Debug)]
pub struct Owner {
    cache: Cache,
    vault: Ulid,
    _lock: File,
}

impl Owner {
    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The vault that the segments come from.
    pub fn vault(&self) -> Ulid {
        self.vault
    }

    /// Says that a segment is on its way.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn expect(&self, segment: SegmentName) -> io::Result<()> {
        self.cache.file(&format!("{segment}{PENDING}"), OFlags::WRONLY | OFlags::CREATE).map(drop)
    }

    /// Says that a segment is not on its way any more.
    pub fn expect_no_more(&self, segment: SegmentName) {
        self.cache.remove(&format!("{segment}{PENDING}"));
    }

    /// Puts a segment into the cache, whole or not at all.
    ///
    /// # Errors
    /// When the bytes are not that segment of this server, or the disk is full.
    pub fn put(&self, segment: SegmentName, bytes: &[u8]) -> io::Result<()> {
        let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        self.cache.check_header(segment, bytes).map_err(bad)?;
        if bytes.len() as u64 != self.cache.server.segment_size.bytes() {
            return Err(bad("it is not as long as a segment".into()));
        }
        let temporary = format!("{segment}{TEMPORARY}");
        let written = (|| {
            let mut file = self.cache.file(&temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
            file.write_all(bytes)?;
            file.write_all(&self.cache.seal(segment, self.vault, bytes))?;
            Ok(rustix::fs::renameat(&self.cache.folder, &temporary, &self.cache.folder, segment.to_string())?)
        })();
        if written.is_err() {
            self.cache.remove(&temporary);
        }
        written
    }

    /// Removes the segments that `keep` does not want.
    pub fn retain(&self, keep: impl Fn(SegmentName) -> bool) {
        for name in self.cache.names().unwrap_or_default() {
            if name.parse::<SegmentName>().is_ok_and(|segment| !keep(segment)) {
                self.cache.remove(&name);
            }
        }
    }

    /// Removes the cache. After a failure a note stays that keeps others from trying the same at once.
    pub fn finish(self, failed: bool) {
        let Self { cache, .. } = &self;
        if failed && cache.is_there() {
            let _ = cache.empty(&[OWNER]);
            let _ = cache.file(REST, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC);
            return;
        }
        let _ = cache.empty(&[]);
        if cache.is_there() {
            let _ = std::fs::remove_dir(cache.path());
            // Only when nobody else uses it; a configured one stays.
            if cache.base == default_base() {
                let _ = std::fs::remove_dir(&cache.base);
            }
        }
    }
}

/// Removes what prefetchers that were killed have left below `base`, when nothing has happened there for `age`.
pub fn sweep(base: &Path, age: Duration) {
    let Ok(outer) = open_folder(base).and_then(|outer| ensure_ours(&outer, 0o022).map(|()| outer)) else { return };
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_key = name.to_str().is_some_and(|name| name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Some(folder) = is_key.then(|| rustix::fs::openat(&outer, &name, flags, Mode::empty()).ok()).flatten() else { continue };
        let old = entry.metadata().and_then(|found| found.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|since| since > age));
        if !old || ensure_ours(&folder, 0o077).is_err() {
            continue;
        }
        let owner = rustix::fs::openat(&folder, OWNER, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        if owner.as_ref().is_ok_and(|owner| rustix::fs::flock(owner, FlockOperation::NonBlockingLockExclusive).is_err()) {
            continue;
        }
        for file in rustix::fs::Dir::read_from(&folder).into_iter().flatten().flatten() {
            let _ = rustix::fs::unlinkat(&folder, file.file_name(), AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&outer, &name, AtFlags::REMOVEDIR);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;

    const NAME: &str = "000000010000000000000008";

    fn segment_bytes() -> Vec<u8> {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/postgres").join(format!("{NAME}.zst"));
        zstd::stream::decode_all(File::open(packed).unwrap()).unwrap()
    }

    struct Place {
        root: tempfile::TempDir,
        server: Recovering,
    }

    impl Place {
        fn new(bytes: &[u8]) -> Self {
            let root = tempfile::tempdir().unwrap();
            let wal = root.path().join("data/pg_wal");
            std::fs::create_dir_all(&wal).unwrap();
            let header = SegmentHeader::parse(bytes).unwrap();
            let server = Recovering {
                pgdata: root.path().join("data"),
                identity: identity(&std::fs::metadata(&wal).unwrap()),
                wal: wal.canonicalize().unwrap(),
                system_id: header.system_identifier,
                segment_size: header.segment_size,
            };
            Self { root, server }
        }

        fn base(&self) -> PathBuf {
            self.root.path().join("cache")
        }

        fn cache(&self) -> Cache {
            Cache::create(&self.base(), self.server.clone(), "file:///vault", "main").unwrap()
        }
    }

    fn name() -> SegmentName {
        NAME.parse().unwrap()
    }

    #[test]
    fn a_segment_is_given_back_while_its_owner_lives() {
        let bytes = segment_bytes();
        let place = Place::new(&bytes);
        let owner = place.cache().own(Ulid(7)).unwrap().unwrap();
        assert!(place.cache().get(name()).is_none());
        owner.put(name(), &bytes).unwrap();
        assert!(place.cache().get(name()).unwrap() == bytes);
        assert!(place.cache().own(Ulid(8)).unwrap().is_err(), "two owners");
        place.cache().ask(name()).unwrap();
        assert_eq!(owner.cache().asked(), Some(name()));
        // T20: killed, nothing of it counts; the next owner begins with nothing.
        drop(owner);
        assert!(place.cache().get(name()).is_none());
        let owner = place.cache().own(Ulid(7)).unwrap().unwrap();
        assert!(place.cache().get(name()).is_none());
        owner.put(name(), &bytes).unwrap();
        owner.finish(false);
        assert!(std::fs::read_dir(place.base()).unwrap().next().is_none());
        // After a failure nothing but a note is left.
        place.cache().own(Ulid(7)).unwrap().unwrap().finish(true);
        assert!(place.cache().rests(Duration::from_secs(60)));
        assert_eq!(place.cache().kept_for(), None);
    }

    #[test]
    fn a_poisoned_segment_is_not_used() {
        let bytes = segment_bytes();
        let place = Place::new(&bytes);
        let owner = place.cache().own(Ulid(7)).unwrap().unwrap();
        let path = owner.cache().path().join(NAME);
        let stored = {
            owner.put(name(), &bytes).unwrap();
            std::fs::read(&path).unwrap()
        };
        let refused = |what: &str| {
            assert!(place.cache().get(name()).is_none(), "{what}");
            assert!(std::fs::symlink_metadata(&path).is_err(), "{what} is left in place");
        };
        for at in [0, 30, 5000, bytes.len() - 1, bytes.len(), bytes.len() + 20, stored.len() - 1] {
            std::fs::write(&path, &stored).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[stored[at] ^ 4], at as u64).unwrap();
            refused("a flipped bit");
        }
        for length in [0, 100, bytes.len(), stored.len() - 1] {
            std::fs::write(&path, &stored[..length]).unwrap();
            refused("a file cut short");
        }
        // Another server's, another segment's, another vault's: all rightly sealed.
        let mut foreign = bytes.clone();
        foreign[24] ^= 1;
        for (vault, segment, bytes) in
            [(Ulid(7), name(), &foreign), (Ulid(7), "000000010000000000000009".parse().unwrap(), &bytes), (Ulid(8), name(), &bytes)]
        {
            let seal = owner.cache().seal(segment, vault, bytes);
            std::fs::write(&path, [bytes.as_slice(), &seal].concat()).unwrap();
            refused("what belongs elsewhere");
        }
        assert!(owner.put(name(), &foreign).is_err());
        let aside = place.root.path().join("aside");
        std::fs::write(&aside, &stored).unwrap();
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        refused("a link");
        owner.put(name(), &bytes).unwrap();
        assert!(place.cache().get(name()).is_some());
    }

    #[test]
    fn a_folder_that_is_not_ours_alone_is_no_cache() {
        let bytes = segment_bytes();
        let place = Place::new(&bytes);
        let create = |base: &Path| Cache::create(base, place.server.clone(), "file:///vault", "main").map(drop);
        create(&place.base()).unwrap();
        std::fs::set_permissions(place.base(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create(&place.base()).is_err(), "everybody may write there");
        std::fs::set_permissions(place.base(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let folder = place.cache().path();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert!(create(&place.base()).is_err(), "others may read it");
        std::fs::remove_dir(&folder).unwrap();
        std::os::unix::fs::symlink(place.root.path(), &folder).unwrap();
        assert!(create(&place.base()).is_err(), "a link");
        let link = place.root.path().join("link");
        std::os::unix::fs::symlink(place.base(), &link).unwrap();
        assert!(create(&link).is_err(), "a link above it");
        // `pg_rewind` would meet it there.
        assert!(create(&place.server.pgdata.join("cache")).is_err());
        assert!(create(&place.server.wal.join("cache")).is_err());
    }

    #[test]
    fn other_servers_vaults_and_clusters_have_other_caches() {
        let place = Place::new(&segment_bytes());
        let key = place.server.key("file:///vault", "main");
        assert_ne!(place.server.key("file:///other", "main"), key);
        assert_ne!(place.server.key("file:///vault", "other"), key);
        assert_ne!(place.server.key("file:///vaultm", "ain"), key);
        for change in [
            |server: &mut Recovering| server.system_id.0 ^= 1,
            |server: &mut Recovering| server.identity.1 ^= 1,
            |server: &mut Recovering| server.wal.push("x"),
        ] {
            let mut other = place.server.clone();
            change(&mut other);
            assert_ne!(other.key("file:///vault", "main"), key);
        }
    }

    #[test]
    fn what_a_killed_prefetcher_left_is_swept_away() {
        let bytes = segment_bytes();
        let place = Place::new(&bytes);
        let owner = place.cache().own(Ulid(7)).unwrap().unwrap();
        owner.put(name(), &bytes).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        sweep(&place.base(), Duration::from_millis(1));
        assert!(place.cache().get(name()).is_some(), "a live one stays");
        drop(owner);
        sweep(&place.base(), Duration::from_secs(60));
        assert!(place.cache().path().join(NAME).exists(), "a young one stays");
        std::thread::sleep(Duration::from_millis(20));
        sweep(&place.base(), Duration::from_millis(1));
        assert!(std::fs::read_dir(place.base()).unwrap().next().is_none());
    }
}
