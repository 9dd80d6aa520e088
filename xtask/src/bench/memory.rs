//! `cargo xtask bench memory`: the most memory that each command takes, for a million files and for a terabyte of pages.
//!
//! The files are there, a few bytes each and all in one directory. The terabyte is not: its files are names of one file of a gibibyte
//! (hard links), so that every page is read and compared, and the backup before is made up (`benches/examples/logical.rs`): maps of
//! all pages, each section stored, with a pack table as long as that of a terabyte that does not compress. Its data packs are empty:
//! who does not read pages does not notice.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::cluster::{Account, Cluster};
use super::measure::{Measured, measure};
use super::tools::{Pgvault, Vault};
use super::{ensure_space, machine};
use crate::run::{cargo, run, run_quietly, target};

/// The budget, in MiB.
const BUDGET: u64 = 512;

/// Bytes of a data file's segment.
const SEGMENT: u64 = 1 << 30;

const SETTINGS: &str = "listen_addresses = ''\nwal_level = replica\nmax_wal_senders = 10\nautovacuum = off\n";

#[derive(Args)]
pub(crate) struct Memory {
    /// Files of a few bytes
    #[arg(long, default_value_t = 1_000_000)]
    files: u32,
    /// Files of 1 GiB that exist by their names
    #[arg(long, default_value_t = 1024)]
    gib: u32,
    /// Folder to work in
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-memory")]
    folder: PathBuf,
}

/// What was run, and what it took.
struct Row {
    what: String,
    measured: Measured,
}

impl Memory {
    pub(super) fn run(&self) -> Result<()> {
        let bin = crate::postgres::ensure(15)?;
        let built = super::build()?;
        run(cargo().args(["build", "--release", "--quiet", "--package", "pgvault-benches", "--example", "logical"]))?;
        // A block for each small file and its restored copy, and the large file.
        ensure_space(&self.folder, (u64::from(self.files) * 8192 + 4 * SEGMENT) / 5)?;
        let cluster = Cluster::create(&self.folder, &bin, Account::find()?, SETTINGS)?;
        let measured = self.measure(&cluster, &built);
        cluster.stop()?;
        fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        let rows = measured?;
        println!("{}", machine());
        println!("{:44} {:>12} {:>8} {:>8}", "", "peak MiB", "wall s", "CPU s");
        for Row { what, measured } in &rows {
            let (wall, cpu) = (measured.wall.as_secs_f64(), measured.cpu.as_secs_f64());
            println!("{what:44} {:>12} {wall:>8.1} {cpu:>8.1}", measured.peak_rss >> 20);
        }
        let above: Vec<&str> =
            rows.iter().filter(|row| row.measured.peak_rss >> 20 >= BUDGET).map(|row| row.what.as_str()).collect();
        if !above.is_empty() {
            bail!("above the budget of {BUDGET} MiB: {}", above.join(", "));
        }
        Ok(())
    }

    fn measure(&self, cluster: &Cluster, built: &Path) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        if self.files > 0 {
            self.small_files(cluster, built, &mut rows)?;
        }
        if self.gib > 0 {
            self.terabyte(cluster, built, &mut rows)?;
        }
        Ok(rows)
    }

    /// Backup, incremental, restore and everything that reads tables, of very many files.
    fn small_files(&self, cluster: &Cluster, built: &Path, rows: &mut Vec<Row>) -> Result<()> {
        println!("writing {} files", self.files);
        let folder = database(cluster)?;
        let write = |number: u32, round: u32| -> Result<()> {
            let path = folder.join(format!("file_{number:07}"));
            fs::write(&path, format!("{number} {round}\n")).with_context(|| format!("write {}", path.display()))?;
            cluster.account.own(&path)
        };
        for number in 0..self.files {
            write(number, 0)?;
        }
        let pgvault = Pgvault::new(cluster, "files", built, Vault::directory(cluster, "files"))?;
        run_quietly(&mut pgvault.command(cluster, &["init"]))?;
        let mut run =
            |what: &str, arguments: &[&str]| one(cluster, &pgvault, &format!("{} files: {what}", self.files), arguments, rows);
        run("backup", &["backup", "--source", "local"])?;
        for number in (0..self.files).step_by(100) {
            write(number, 1)?;
        }
        run("incremental", &["backup", "--source", "local"])?;
        run("backup, remote", &["backup", "--source", "remote"])?;
        let restored = cluster.folder("restored")?;
        let target = restored.to_string_lossy().into_owned();
        run("restore", &["restore", "--to", "immediate", "--pgdata", &target])?;
        run("restore --delta", &["restore", "--to", "immediate", "--delta", "--pgdata", &target])?;
        fs::remove_dir_all(&restored)?;
        readers(&mut run)?;
        for number in 0..self.files {
            fs::remove_file(folder.join(format!("file_{number:07}")))?;
        }
        fs::remove_dir_all(cluster.root().join("files.vault"))?;
        Ok(())
    }

    /// Incrementals of a terabyte, of which nothing changed, and of which a page of each section did.
    fn terabyte(&self, cluster: &Cluster, built: &Path, rows: &mut Vec<Row>) -> Result<()> {
        println!("making up a backup of {} GiB", self.gib);
        let folder = database(cluster)?;
        let large = folder.join("large.0000");
        // Pages that differ, as those of a table do.
        let file = fs::File::create(&large)?;
        let mut region = vec![0x5a; 256 << 10];
        for number in 0..SEGMENT / region.len() as u64 {
            for (at, page) in (0..).zip(region.chunks_mut(8192)) {
                let text = format!("page {at} of region {number}");
                page.iter_mut().zip(text.bytes()).for_each(|(byte, letter)| *byte = letter);
            }
            file.write_all_at(&region, number * region.len() as u64)?;
        }
        cluster.account.own(&large)?;
        for number in 1..self.gib {
            fs::hard_link(&large, folder.join(format!("large.{number:04}")))?;
        }
        let pgvault = Pgvault::new(cluster, "terabyte", built, Vault::directory(cluster, "terabyte"))?;
        run_quietly(&mut pgvault.command(cluster, &["init"]))?;
        let store = cluster.root().join("terabyte.vault");
        let relative = large.strip_prefix(cluster.pgdata())?.with_extension("");
        let program = cluster.root().join("logical");
        let _ = fs::copy(target().join("release/examples/logical"), &program)?;
        let mut logical = cluster.account.command(&program);
        logical.arg(&store).arg(cluster.root().join("passphrase")).arg(&large).arg(relative).arg(self.gib.to_string());
        run_quietly(&mut logical)?;
        let mut run =
            |what: &str, arguments: &[&str]| one(cluster, &pgvault, &format!("{} GiB: {what}", self.gib), arguments, rows);
        run("incremental, nothing changed", &["backup", "--source", "local"])?;
        for section in 0..SEGMENT >> 25 {
            file.write_all_at(b"something else", (section << 25) + 8192 * 1000)?;
        }
        run("incremental, a page of each 32 MiB", &["backup", "--source", "local"])?;
        readers(&mut run)
    }
}

/// The folder of a database, in which PostgreSQL minds no strangers.
fn database(cluster: &Cluster) -> Result<PathBuf> {
    let oid = cluster.sql("SELECT oid FROM pg_database WHERE datname = 'postgres'")?;
    Ok(cluster.pgdata().join("base").join(oid))
}

/// What reads tables and maps of all backups.
fn readers(run: &mut impl FnMut(&str, &[&str]) -> Result<()>) -> Result<()> {
    run("list", &["list"])?;
    run("restore --dry-run", &["restore", "--to", "immediate", "--pgdata", "/nowhere", "--dry-run"])?;
    run("du", &["du"])?;
    run("expire", &["expire"])?;
    run("gc", &["gc"])
}

fn one(cluster: &Cluster, pgvault: &Pgvault, what: &str, arguments: &[&str], rows: &mut Vec<Row>) -> Result<()> {
    let mut command = pgvault.command(cluster, arguments);
    command.env("PGVAULT_CLUSTER__MAIN__RETENTION__KEEP_LAST", "1");
    let measured = measure(&mut command).with_context(|| what.to_owned())?;
    println!("  {what:44} {:6} MiB {:8.1} s", measured.peak_rss >> 20, measured.wall.as_secs_f64());
    rows.push(Row { what: what.to_owned(), measured });
    Ok(())
}
