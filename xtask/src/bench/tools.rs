//! The tools that are compared, each set up the way its own documentation recommends for speed.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, bail};

use super::cluster::Cluster;
use super::measure::{Measured, measure};
use super::s3;
use crate::run::run_quietly;

type Make = Box<dyn Fn(&Cluster) -> Result<Command>>;
type MakeRestore = Box<dyn Fn(&Cluster, &Path) -> Result<Command>>;

/// One contestant.
pub(super) struct Tool {
    pub(super) name: String,
    /// Where its backups go.
    pub(super) store: PathBuf,
    /// What has to be done once before a backup can be taken into an empty store; not measured.
    init: Option<Make>,
    backup: Make,
    pub(super) restore: Option<MakeRestore>,
}

/// Bytes and files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    pub(super) bytes: u64,
    pub(super) objects: u64,
}

impl Tool {
    /// An empty store.
    pub(super) fn prepare(&self, cluster: &Cluster) -> Result<()> {
        let name = self.store.strip_prefix(cluster.root()).ok().and_then(Path::to_str).context("the store has no name")?;
        cluster.folder(name)?;
        match &self.init {
            Some(init) => run_quietly(&mut init(cluster)?).map(drop),
            None => Ok(()),
        }
    }

    pub(super) fn backup(&self, cluster: &Cluster) -> Result<Measured> {
        let measured = measure(&mut (self.backup)(cluster)?).with_context(|| format!("back up with {}", self.name))?;
        println!("  {:16} backup   {:6.2} s", self.name, measured.wall.as_secs_f64());
        Ok(measured)
    }

    pub(super) fn restore(&self, cluster: &Cluster, target: &Path) -> Result<Measured> {
        let Some(restore) = &self.restore else { bail!("{} restores nothing", self.name) };
        let measured = measure(&mut restore(cluster, target)?).with_context(|| format!("restore with {}", self.name))?;
        println!("  {:16} restore  {:6.2} s", self.name, measured.wall.as_secs_f64());
        Ok(measured)
    }

    pub(super) fn stored(&self) -> Result<Size> {
        size_of(&self.store)
    }

    pub(super) fn clear(&self) -> Result<()> {
        fs::remove_dir_all(&self.store).with_context(|| format!("remove {}", self.store.display()))
    }
}

/// The same without WAL.
pub(super) fn size_without_wal(folder: &Path) -> Result<Size> {
    let all = size_of(folder)?;
    let wal = walk_wal(folder)?;
    Ok(Size { bytes: all.bytes - wal, ..all })
}

/// Bytes in folders called `wal`.
fn walk_wal(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            bytes += if entry.file_name() == "wal" { size_of(&entry.path())?.bytes } else { walk_wal(&entry.path())? };
        }
    }
    Ok(bytes)
}

/// Bytes of all files in a folder, and their number without WAL.
pub(super) fn size_of(folder: &Path) -> Result<Size> {
    let mut size = Size::default();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let inner = size_of(&entry.path())?;
            size.bytes += inner.bytes;
            if entry.file_name() != "wal" {
                size.objects += inner.objects;
            }
        } else if kind.is_file() {
            size.bytes += entry.metadata()?.len();
            size.objects += 1;
        }
    }
    Ok(size)
}

pub(super) fn written(cluster: &Cluster, name: &str, text: &str) -> Result<PathBuf> {
    let path = cluster.root().join(name);
    fs::write(&path, text)?;
    cluster.account.own(&path)?;
    Ok(path)
}

/// Where a pgvault keeps its vault.
pub(super) struct Vault {
    url: String,
    /// The folder in which its objects can be counted.
    folder: PathBuf,
    variables: Vec<(String, String)>,
    init: &'static [&'static str],
}

impl Vault {
    /// In a directory.
    pub(super) fn directory(cluster: &Cluster, name: &str) -> Self {
        let folder = cluster.root().join(format!("{name}.vault"));
        let url = format!("file://{}", folder.to_string_lossy().replace(' ', "%20"));
        Self { url, folder, variables: Vec::new(), init: &[] }
    }

    /// In an S3 server that is reached by this address.
    pub(super) fn s3(server: &s3::Server, name: &str, address: SocketAddr) -> Self {
        // The server lets several of many writers win; there is one.
        Self { url: s3::url(name), folder: server.folder(name), variables: s3::variables(address), init: &["--single-writer"] }
    }
}

/// A build of pgvault, reading the data directory.
pub(super) fn pgvault(cluster: &Cluster, name: &str, binary: &Path, vault: Vault) -> Result<Tool> {
    let pgvault = Pgvault::new(cluster, name, binary, vault)?;
    let mut tool = pgvault.clone().tool("local");
    tool.restore = Some(Box::new(move |cluster, target| {
        let mut command = pgvault.command(cluster, &["restore", "--to", "immediate", "--pgdata"]);
        command.arg(target);
        Ok(command)
    }));
    Ok(tool)
}

/// The same build, through `BASE_BACKUP`. What it stores is restored in the same way, so that is not measured twice.
pub(super) fn pgvault_remote(cluster: &Cluster, binary: &Path) -> Result<Tool> {
    let name = "pgvault remote";
    Ok(Pgvault::new(cluster, name, binary, Vault::directory(cluster, name))?.tool("remote"))
}

/// A build of pgvault with its configuration.
#[derive(Clone)]
pub(super) struct Pgvault {
    name: String,
    binary: PathBuf,
    config: PathBuf,
    vault: Rc<Vault>,
}

impl Pgvault {
    pub(super) fn new(cluster: &Cluster, name: &str, binary: &Path, vault: Vault) -> Result<Self> {
        // The target folder of a build may not be readable for the account.
        let copy = cluster.root().join(format!("{name}.bin"));
        let _ = fs::copy(binary, &copy).with_context(|| format!("copy {}", binary.display()))?;
        let passphrase = written(cluster, "passphrase", "the benchmark's passphrase\n")?;
        let text = format!(
            "[vault]\nurl = \"{}\"\npassphrase_file = \"{}\"\n\n[cluster.main]\nconnection = \"host={} user=postgres dbname=postgres\"\npgdata = \"{}\"\n",
            vault.url,
            passphrase.display(),
            cluster.root().display(),
            cluster.pgdata().display()
        );
        let config = written(cluster, &format!("{name}.toml"), &text)?;
        Ok(Self { name: name.to_owned(), binary: copy, config, vault: Rc::new(vault) })
    }

    pub(super) fn command(&self, cluster: &Cluster, arguments: &[&str]) -> Command {
        let mut command = cluster.account.command(&self.binary);
        command.arg("--config").arg(&self.config).args(arguments).envs(self.vault.variables.iter().cloned());
        command
    }

    fn tool(self, source: &'static str) -> Tool {
        let init = self.clone();
        Tool {
            name: self.name.clone(),
            store: self.vault.folder.clone(),
            init: Some(Box::new(move |cluster| Ok(init.command(cluster, &[&["init"], init.vault.init].concat())))),
            backup: Box::new(move |cluster| Ok(self.command(cluster, &["backup", "--source", source]))),
            restore: None,
        }
    }
}

/// pgBackRest: zstd level 1, its cipher, bundles, a process per core. It archives no WAL here and does not wait for any,
/// which is in its favour: pgvault stores the WAL that its backup needs.
///
/// `incremental` is a build that knows block incrementals: its first backup is a full one, the others build on it.
pub(super) fn pgbackrest(cluster: &Cluster, incremental: Option<PathBuf>) -> Result<Tool> {
    let store = cluster.root().join("pgbackrest.repo");
    let state = cluster.folder("pgbackrest.state")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let text = format!(
        "[global]\nrepo1-path={}\nrepo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=the-benchmarks-passphrase\nrepo1-bundle=y\n\
         repo1-retention-full={}\n{}compress-type=zst\ncompress-level=1\nprocess-max={cores}\nstart-fast=y\narchive-check=n\n\
         lock-path={state}\nlog-path={state}\nspool-path={state}\nlog-level-file=off\nlog-level-console=warn\n\n\
         [main]\npg1-path={}\npg1-socket-path={}\npg1-user=postgres\n",
        store.display(),
        if incremental.is_some() { 9 } else { 1 },
        if incremental.is_some() { "repo1-block=y\n" } else { "" },
        cluster.pgdata().display(),
        cluster.root().display(),
        state = state.display()
    );
    let config = written(cluster, "pgbackrest.conf", &text)?;
    let kind = if incremental.is_some() { "--type=incr" } else { "--type=full" };
    let binary = incremental.unwrap_or_else(|| "pgbackrest".into());
    let command = move |cluster: &Cluster| {
        let mut command = cluster.account.command(&binary);
        command.arg(format!("--config={}", config.display())).arg("--stanza=main");
        command
    };
    let (init, backup, restore) = (command.clone(), command.clone(), command);
    Ok(Tool {
        name: "pgbackrest".into(),
        store,
        init: Some(Box::new(move |cluster| {
            let mut command = init(cluster);
            command.arg("stanza-create");
            Ok(command)
        })),
        backup: Box::new(move |cluster| {
            let mut command = backup(cluster);
            command.args([kind, "backup"]);
            Ok(command)
        }),
        restore: Some(Box::new(move |cluster, target| {
            let mut command = restore(cluster);
            command.arg(format!("--pg1-path={}", target.display())).args(["--type=immediate", "restore"]);
            Ok(command)
        })),
    })
}

/// `pg_basebackup` with client-side zstd and without encryption. The server does a part of its work.
pub(super) fn pg_basebackup(cluster: &Cluster) -> Tool {
    let store = cluster.root().join("pg_basebackup.store");
    let target = store.join("backup");
    Tool {
        name: "pg_basebackup".into(),
        store,
        init: None,
        backup: Box::new(move |cluster| {
            let mut command = cluster.program("pg_basebackup");
            command.args(["-Ft", "-Z", "client-zstd:1", "-X", "none", "-c", "fast", "-U", "postgres", "-h"]);
            command.arg(cluster.root()).arg("-D").arg(&target);
            Ok(command)
        }),
        restore: None,
    }
}
