//! The folder of a run: program, configuration, vault, and the address behind which the primary is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use pgvault_verify::process::Account;
use tempfile::TempDir;

/// A file system of its own for the vault, so that it can be full or hang.
#[derive(Debug)]
struct Mount {
    point: PathBuf,
}

impl Mount {
    /// Sparse: it takes what is written to it.
    fn new(folder: &Path, gib: u64) -> Option<Self> {
        let (image, point) = (folder.join("disk.img"), folder.join("disk"));
        fs::create_dir(&point).ok()?;
        let file = fs::File::create(&image).ok()?;
        file.set_len(gib << 30).ok()?;
        drop(file);
        quiet(Command::new("mkfs.ext4").args(["-q", "-F", "-i", "4096"]).arg(&image)).ok()?;
        quiet(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&point)).ok()?;
        Some(Self { point })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = quiet(Command::new("fsfreeze").arg("-u").arg(&self.point));
        let _ = quiet(Command::new("umount").arg("-l").arg(&self.point));
    }
}

/// Everything of a run but the servers.
#[derive(Debug)]
pub(crate) struct Place {
    mount: Option<Mount>,
    pub(crate) account: Account,
    folder: Option<TempDir>,
    path: PathBuf,
}

/// How `wal stream` is configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) synchronous: bool,
    pub(crate) spool: bool,
}

/// `wal.flush_interval`, and `wal.receive_timeout`, in seconds.
pub(crate) const FLUSH_INTERVAL: u64 = 1;
pub(crate) const RECEIVE_TIMEOUT: u64 = 4;

impl Place {
    pub(crate) fn new(program: &Path, keep: bool, gib: u64) -> Result<Self> {
        let account = Account::unprivileged()?;
        let folder = tempfile::Builder::new()
            .prefix("pgvault-soak-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/tmp")
            .context("create a folder in /tmp")?;
        let path = folder.path().to_path_buf();
        account.own(&path)?;
        let mount = rustix::process::geteuid().is_root().then(|| Mount::new(&path, gib)).flatten();
        let folder = if keep {
            println!("files stay in {}", folder.keep().display());
            None
        } else {
            Some(folder)
        };
        let place = Self { mount, account, folder, path };
        // The folder of a build need not be one that the account can enter.
        let _ = fs::copy(program, place.path("pgvault")).with_context(|| format!("copy {}", program.display()))?;
        for name in ["address", "spool", "restored", "prefetch"] {
            place.directory(&place.path(name))?;
        }
        place.directory(&place.vault())?;
        let passphrase = place.write("passphrase", "correct horse battery staple\n")?;
        fs::set_permissions(passphrase, fs::Permissions::from_mode(0o600))?;
        Ok(place)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn vault(&self) -> PathBuf {
        self.disk().join("vault")
    }

    /// Above the vault; nobody but root can write here when the vault has a disk of its own.
    pub(crate) fn disk(&self) -> PathBuf {
        self.mount.as_ref().map_or_else(|| self.path("disk"), |mount| mount.point.clone())
    }

    /// True when the vault can be filled, frozen and taken away.
    pub(crate) fn has_disk(&self) -> bool {
        self.mount.is_some()
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.path("address")
    }

    fn directory(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        Ok(self.account.own(path)?)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        self.account.own(&path)?;
        Ok(path)
    }

    /// The stream and the backups find the primary by a name that follows it, as they would a virtual address.
    pub(crate) fn lead_to(&self, socket_dir: &Path, port: u16, pgdata: &Path) -> Result<()> {
        for (link, target) in [
            (self.address().join(".s.PGSQL.5432"), socket_dir.join(format!(".s.PGSQL.{port}"))),
            (self.path("pgdata"), pgdata.to_path_buf()),
        ] {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&target, &link).with_context(|| format!("link {}", link.display()))?;
        }
        Ok(())
    }

    pub(crate) fn configure(&self, settings: Settings) -> Result<()> {
        let spool = if settings.spool { format!("spool = \"{}\"\n", self.path("spool").display()) } else { String::new() };
        let text = format!(
            "[vault]\nurl = \"file://{}\"\npassphrase_file = \"{}\"\n\n[cluster.main]\n\
             connection = \"host={} port=5432 user=postgres dbname=postgres\"\npgdata = \"{}\"\n\n\
             [cluster.main.wal]\nflush_interval = \"{FLUSH_INTERVAL}s\"\nreceive_timeout = \"{RECEIVE_TIMEOUT}s\"\nsynchronous = {}\nprefetch_dir = \"{}\"\n{spool}",
            self.vault().display(),
            self.path("passphrase").display(),
            self.address().display(),
            self.path("pgdata").display(),
            settings.synchronous,
            self.path("prefetch").display(),
        );
        self.write("pgvault.toml", &text).map(drop)
    }

    /// A command of the servers' account.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.current_dir(&self.path).env("HOME", &self.path).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        self.account.apply(&mut command);
        command
    }

    pub(crate) fn pgvault(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&self.path("pgvault"));
        command.arg("--config").arg(self.path("pgvault.toml")).args(arguments);
        command
    }

    /// Runs pgvault to its end; gives standard output.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        quiet(&mut self.pgvault(arguments))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Unmounted before the folder is removed.
        self.mount = None;
        self.folder = None;
    }
}

/// Runs a command; what it said is part of the error.
pub(crate) fn quiet(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let line = format!("{command:?}");
        let name: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
        bail!("`{}`: {}\n{}{}", name.join(" "), output.status, stdout, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}
