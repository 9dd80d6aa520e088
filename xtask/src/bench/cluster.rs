//! A running PostgreSQL 15 with data checksums and data that is neither random nor toy-compressible.
//!
//! Half of it is pgbench's tables, whose filler compresses like nothing real; the other half looks like what Odoo keeps:
//! messages with HTML bodies, partners with addresses, JSON properties, and the indexes on them. The rows come from a
//! generator with a fixed seed, so that two runs back up the same bytes.

use std::fs::{self, DirBuilder};
use std::io::{BufWriter, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::packages::is_root;
use crate::run::{program, run_quietly};

/// Who runs PostgreSQL and every tool: it refuses root.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account(Option<(u32, u32)>);

impl Account {
    pub(super) fn find() -> Result<Self> {
        if !is_root() {
            return Ok(Self(None));
        }
        let id = |flag| -> Result<u32> { Ok(run_quietly(&mut program("id", [flag, "postgres"]))?.trim().parse()?) };
        Ok(Self(Some((id("-u")?, id("-g")?))))
    }

    /// A command run as this account, with nothing of the caller's PostgreSQL settings.
    pub(super) fn command(self, name: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(name);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if ["PG", "PGVAULT_", "PGBACKREST_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("LC_ALL", "C.UTF-8").current_dir("/");
        if let Self(Some((uid, gid))) = self {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Gives a file or folder to this account.
    pub(super) fn own(self, path: &Path) -> Result<()> {
        if let Self(Some((uid, gid))) = self {
            std::os::unix::fs::chown(path, Some(uid), Some(gid)).with_context(|| format!("give away {}", path.display()))?;
        }
        Ok(())
    }
}

/// The server and the folder that everything of a run is in.
#[derive(Debug)]
pub(super) struct Cluster {
    root: PathBuf,
    bin: PathBuf,
    pub(super) account: Account,
    gib: u32,
    running: bool,
}

/// Written once the data is complete: the size in GiB.
const COMPLETE: &str = "cluster.complete";

const SETTINGS: &str = "
listen_addresses = ''
wal_level = replica
max_wal_senders = 10
shared_buffers = 256MB
max_wal_size = 4GB
checkpoint_timeout = 1h
autovacuum = off
";

impl Cluster {
    /// Starts the server in `root`, filling it first unless an earlier run left it.
    pub(super) fn start(root: &Path, bin: &Path, gib: u32, account: Account) -> Result<Self> {
        account.own(root)?;
        let mut cluster = Self { root: root.to_path_buf(), bin: bin.to_path_buf(), account, gib, running: false };
        let complete = root.join(COMPLETE);
        if fs::read_to_string(&complete).is_ok_and(|size| size.trim() == gib.to_string()) {
            cluster.control(&["start"])?;
            cluster.running = true;
        } else {
            if let Some(child) = fs::read_dir(root)?.flatten().next() {
                bail!("{} is not empty ({}); give another --folder, or empty it", root.display(), child.path().display());
            }
            println!("generating a cluster of {gib} GiB in {}", root.display());
            cluster.fill()?;
            fs::write(complete, gib.to_string())?;
        }
        Ok(cluster)
    }

    /// An empty cluster with these settings, started.
    pub(super) fn create(root: &Path, bin: &Path, account: Account, settings: &str) -> Result<Self> {
        account.own(root)?;
        if let Some(child) = fs::read_dir(root)?.flatten().next() {
            bail!("{} is not empty ({}); give another --folder, or empty it", root.display(), child.path().display());
        }
        let mut cluster = Self { root: root.to_path_buf(), bin: bin.to_path_buf(), account, gib: 0, running: false };
        cluster.init(settings)?;
        Ok(cluster)
    }

    fn init(&mut self, settings: &str) -> Result<()> {
        let pgdata = self.pgdata();
        let mut initdb = self.account.command(self.bin.join("initdb"));
        initdb.args(["--data-checksums", "-U", "postgres", "-A", "trust", "--locale=C.UTF-8", "-E", "UTF8", "-N", "-D"]);
        run_quietly(initdb.arg(&pgdata))?;
        let conf = pgdata.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf)?;
        text.push_str(settings);
        fs::write(&conf, text + &format!("unix_socket_directories = '{}'\n", self.root.display()))?;
        self.control(&["start"])?;
        self.running = true;
        Ok(())
    }

    fn fill(&mut self) -> Result<()> {
        self.init(SETTINGS)?;
        // 15 MiB of table and index for each unit.
        let scale = (u64::from(self.gib) * 512 / 15).max(1).to_string();
        let mut pgbench = self.account.command(self.bin.join("pgbench"));
        run_quietly(pgbench.args(["-i", "-q", "-s", &scale, "-U", "postgres", "-h"]).arg(&self.root).arg("postgres"))?;
        self.sql(TABLES)?;
        self.copy("mail_message", (u64::from(self.gib) * 380) << 20, message)?;
        self.copy("res_partner", (u64::from(self.gib) * 60) << 20, partner)?;
        self.sql(INDEXES)?;
        self.sql("VACUUM ANALYZE")?;
        self.sql("CHECKPOINT")?;
        Ok(())
    }

    /// Feeds generated rows of about `bytes` to COPY.
    fn copy(&self, table: &str, bytes: u64, row: fn(&mut Generator, u64, &mut String)) -> Result<()> {
        let mut psql = self.account.command(self.bin.join("psql"));
        psql.args(["-XqU", "postgres", "-v", "ON_ERROR_STOP=1", "-c", &format!("COPY {table} FROM STDIN"), "-h"]);
        let mut child = psql.arg(&self.root).arg("postgres").stdin(Stdio::piped()).spawn().context("start psql")?;
        let mut input = BufWriter::with_capacity(1 << 20, child.stdin.take().context("psql has no input")?);
        let mut generator = Generator::new();
        let mut text = String::new();
        let (mut written, mut id) = (0, 0);
        while written < bytes {
            id += 1;
            text.clear();
            row(&mut generator, id, &mut text);
            input.write_all(text.as_bytes())?;
            written += text.len() as u64;
        }
        input.flush()?;
        drop(input);
        let status = child.wait()?;
        if !status.success() {
            bail!("psql ended with {status}");
        }
        Ok(())
    }

    pub(super) fn sql(&self, text: &str) -> Result<String> {
        let mut psql = self.account.command(self.bin.join("psql"));
        psql.args(["-XqAtU", "postgres", "-v", "ON_ERROR_STOP=1", "-c", text, "-h"]).arg(&self.root).arg("postgres");
        Ok(run_quietly(&mut psql)?.trim().to_owned())
    }

    fn control(&self, arguments: &[&str]) -> Result<()> {
        let mut control = self.account.command(self.bin.join("pg_ctl"));
        control.arg("-D").arg(self.pgdata()).arg("-l").arg(self.root.join("server.log")).args(["-w", "-t", "300", "-s"]);
        control.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = control.status().context("start pg_ctl")?;
        if !status.success() {
            bail!("pg_ctl {} ended with {status}; see {}", arguments.join(" "), self.root.join("server.log").display());
        }
        Ok(())
    }

    pub(super) fn stop(mut self) -> Result<()> {
        self.running = false;
        self.control(&["stop", "-m", "fast"])
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn pgdata(&self) -> PathBuf {
        self.root.join("data")
    }

    /// A program of this PostgreSQL, to be run as the account.
    pub(super) fn program(&self, name: &str) -> Command {
        self.account.command(self.bin.join(name))
    }

    /// An empty folder of the account inside the root.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("empty {}", path.display()))?;
        }
        DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("create {}", path.display()))?;
        self.account.own(&path)?;
        Ok(path)
    }

    /// What the report says about it.
    pub(super) fn facts(&self) -> Result<String> {
        let size = self.sql("SELECT pg_size_pretty(sum(pg_database_size(oid))) FROM pg_database")?;
        let version = self.sql("SHOW server_version")?;
        Ok(format!("{size}, PostgreSQL {version}, data checksums on"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.running {
            let _ = self.control(&["stop", "-m", "immediate"]);
        }
    }
}

const TABLES: &str = "
CREATE TABLE mail_message (
    id bigint, create_date timestamptz, write_date timestamptz, author_id int, res_id int, model text, message_type text,
    subject text, email_from text, message_id text, body text, properties jsonb, amount numeric(12,2));
CREATE TABLE res_partner (
    id bigint, name text, street text, city text, zip text, email text, phone text, vat text, create_date timestamptz,
    company_id int, color int, active boolean, properties jsonb);";

const INDEXES: &str = "
CREATE UNIQUE INDEX ON mail_message (id);
CREATE INDEX ON mail_message (model, res_id);
CREATE INDEX ON mail_message (message_id);
CREATE INDEX ON mail_message (create_date);
CREATE UNIQUE INDEX ON res_partner (id);
CREATE INDEX ON res_partner (name);
CREATE INDEX ON res_partner (email);";

/// Words that look like words, and numbers, from a fixed seed.
struct Generator {
    state: u64,
    words: Vec<String>,
}

impl Generator {
    fn new() -> Self {
        const SYLLABLES: [&str; 32] = [
            "an", "ber", "con", "der", "el", "fi", "gen", "hal", "in", "jo", "ka", "lin", "mar", "nor", "on", "per", "qui", "re",
            "sta", "ti", "un", "ver", "wal", "xi", "yo", "zen", "pro", "tra", "mis", "sion", "lor", "ent",
        ];
        let mut generator = Self { state: 0x7067_7661_756c_7431, words: Vec::new() };
        generator.words = (0..4000)
            .map(|_| {
                let count = 1 + generator.below(4);
                (0..count).map(|_| SYLLABLES[generator.below(32)]).collect()
            })
            .collect();
        generator
    }

    /// `SplitMix64`.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the bound is a usize")]
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Words as text uses them: few often, most seldom.
    fn word(&mut self) -> &str {
        let rank = self.below(4000) * self.below(4000) / 4000;
        &self.words[rank]
    }

    fn words(&mut self, count: usize, text: &mut String) {
        for number in 0..count {
            if number > 0 {
                text.push(' ');
            }
            text.push_str(self.word());
        }
    }
}

/// Seconds, later with each row, as an application writes them.
fn moment(generator: &mut Generator, id: u64) -> String {
    let second = id * 7 + generator.below(7) as u64;
    format!(
        "2026-{:02}-{:02} {:02}:{:02}:{:02}.{:06}+00",
        1 + second / 2_419_200 % 12,
        1 + second / 86_400 % 28,
        second / 3600 % 24,
        second / 60 % 60,
        second % 60,
        generator.below(1_000_000)
    )
}

fn message(generator: &mut Generator, id: u64, text: &mut String) {
    use std::fmt::Write as _;
    const MODELS: [&str; 6] = ["sale.order", "account.move", "crm.lead", "project.task", "stock.picking", "helpdesk.ticket"];
    let created = moment(generator, id);
    let model = MODELS[generator.below(6)];
    let (author, record) = (generator.below(5000), generator.below(200_000));
    let _ = write!(text, "{id}\t{created}\t{created}\t{author}\t{record}\t{model}\tcomment\t");
    let count = 3 + generator.below(6);
    generator.words(count, text);
    let (first, second) = (generator.word().to_owned(), generator.word().to_owned());
    let _ = write!(text, "\t\"{first} {second}\" <{first}.{second}@example.com>\t");
    let _ = write!(text, "<{:016x}.{id}-openerp-{record}-{model}@odoo.example.com>\t<p>", generator.next());
    for _ in 0..=generator.below(5) {
        let count = 8 + generator.below(40);
        generator.words(count, text);
        text.push_str(".</p><p style=\"margin:0px; font-size:13px\">");
    }
    let amount = generator.below(10_000_000);
    let _ =
        write!(text, "</p>\t{{\"state\": \"{}\", \"user\": {author}, \"tags\": [\"", ["draft", "sent", "done"][generator.below(3)]);
    generator.words(2, text);
    let _ = writeln!(
        text,
        "\"], \"total\": {amount}, \"token\": \"{:016x}\"}}\t{}.{:02}",
        generator.next(),
        amount / 100,
        amount % 100
    );
}

fn partner(generator: &mut Generator, id: u64, text: &mut String) {
    use std::fmt::Write as _;
    let _ = write!(text, "{id}\t");
    generator.words(2, text);
    text.push('\t');
    generator.words(2, text);
    let _ = write!(text, " {}\t{}\t{:05}\t", generator.below(300), generator.below(900), generator.below(99_999));
    let user = generator.word().to_owned();
    let _ = write!(
        text,
        "{user}{id}@example.org\t+49 {} {}\tDE{:09}\t",
        generator.below(9999),
        generator.below(9_999_999),
        generator.below(999_999_999)
    );
    let created = moment(generator, id);
    let _ = write!(text, "{created}\t{}\t{}\tt\t", generator.below(4), generator.below(12));
    let _ = writeln!(
        text,
        "{{\"lang\": \"de_DE\", \"tz\": \"Europe/Berlin\", \"credit\": {}, \"ref\": \"{:08x}\"}}",
        generator.below(50_000),
        generator.next() >> 32
    );
}
