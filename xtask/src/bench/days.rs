//! `cargo xtask bench days`: what a month of daily backups costs, beside pgBackRest's block incrementals.
//!
//! One cluster for each pattern of change. Every day it is changed a little, and both tools back it up, in turns in another order.
//! What counts is what they store, how many objects they write and how long they take; at the end both restore.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::cluster::{Account, Cluster};
use super::report::{judge, median};
use super::tools::{self, Tool};
use super::{ensure_space, machine, settle};
use crate::run::run_quietly;

#[derive(Args)]
pub(crate) struct Days {
    /// Days, and so backups of each tool after the first
    #[arg(long = "days", value_name = "DAYS", default_value_t = 30)]
    count: u32,
    /// How the cluster changes; all of them when none is given
    #[arg(long, value_enum)]
    pattern: Vec<Pattern>,
    /// Size of the generated cluster
    #[arg(long, default_value_t = 1)]
    gib: u32,
    /// Transactions of a day
    #[arg(long, default_value_t = 5000)]
    transactions: u32,
    /// Folder to work in
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/pgvault-days")]
    folder: PathBuf,
}

/// Which rows change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    /// Any, each as likely as the others
    Uniform,
    /// A few again and again, and many once
    Zipf,
    /// Those around a place that moves from day to day
    Clustered,
    /// New rows at the end of some tables, changes to young ones, a few to old ones
    Odoo,
}

impl Pattern {
    const ALL: [Self; 4] = [Self::Uniform, Self::Zipf, Self::Clustered, Self::Odoo];

    /// A transaction of pgbench.
    fn script(self, rows: u64, day: u32, days: u32) -> String {
        let update = "update pgbench_accounts set abalance = abalance + 1 where aid = :aid;\n";
        let around = rows * u64::from(day) / u64::from(days.max(1) + 1);
        match self {
            Self::Uniform => format!("\\set aid random(1, {rows})\n{update}"),
            Self::Zipf => {
                // Scattered, as the rows that are used most are not neighbours: the multiplier has no factor in common with their number.
                format!("\\set hot random_zipfian(1, {rows}, 1.05)\n\\set aid 1 + (:hot * 7919) % {rows}\n{update}")
            }
            Self::Clustered => format!("\\set aid {around} + random(1, {})\n{update}", rows / 50),
            Self::Odoo => format!(
                "\\set old random(1, 1000)\nbegin;\n\
                 insert into mail_message(id, create_date, write_date, author_id, res_id, model, message_type, subject, body) values \
                 ((extract(epoch from clock_timestamp()) * 1000000)::bigint * 8 + :client_id, now(), now(), 7, :old, 'sale.order', 'comment', \
                 'Order ' || :old, repeat(md5(random()::text), 8));\n\
                 update mail_message set write_date = now() where id = (select max(id) from mail_message);\n\
                 update res_partner set color = coalesce(color, 0) + 1 where id = :old;\n{update}end;\n"
            )
            .replace(":aid", ":old"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Clustered => "clustered",
            Self::Odoo => "odoo",
        }
    }
}

/// A tool's month.
#[derive(Default)]
struct Month {
    /// Bytes, objects and seconds of each backup; the first is the full one.
    days: Vec<(u64, u64, f64)>,
    restore: f64,
}

impl Month {
    fn bytes(&self) -> u64 {
        self.days.iter().map(|day| day.0).sum()
    }
}

impl Days {
    pub(super) fn run(&self) -> Result<()> {
        let bin = crate::postgres::ensure(15)?;
        let peer = crate::postgres::newest_pgbackrest()?;
        let built = super::build()?;
        let patterns = if self.pattern.is_empty() { Pattern::ALL.to_vec() } else { self.pattern.clone() };
        ensure_space(&self.folder, u64::from(self.gib) << 30)?;
        if let Some(child) = fs::read_dir(&self.folder)?.flatten().next() {
            bail!("{} is not empty ({}); give another --folder, or empty it", self.folder.display(), child.path().display());
        }
        println!("{}\n{}", machine(), run_quietly(std::process::Command::new(&peer).arg("version"))?.trim());
        for pattern in patterns {
            let folder = self.folder.join(pattern.name());
            fs::create_dir_all(&folder)?;
            let cluster = Cluster::start(&folder, &bin, self.gib, Account::find()?)?;
            let done = self.month(&cluster, pattern, &built, &peer);
            cluster.stop()?;
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
            done?;
        }
        fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))
    }

    fn month(&self, cluster: &Cluster, pattern: Pattern, built: &Path, peer: &Path) -> Result<()> {
        let tools = [
            tools::pgvault(cluster, "pgvault", built, tools::Vault::directory(cluster, "pgvault"))?,
            tools::pgbackrest(cluster, Some(peer.to_path_buf()))?,
        ];
        let mut months = [Month::default(), Month::default()];
        for tool in &tools {
            tool.prepare(cluster)?;
        }
        let rows: u64 = cluster.sql("select count(*) from pgbench_accounts")?.parse().context("a number of rows")?;
        for day in 0..=self.count {
            if day > 0 {
                self.change(cluster, &pattern.script(rows, day, self.count))?;
            }
            for turn in 0..tools.len() {
                let number = (day as usize + turn) % tools.len();
                let day = back_up(cluster, &tools[number])?;
                months[number].days.push(day);
            }
        }
        for (tool, month) in tools.iter().zip(&mut months) {
            let target = cluster.folder("restored")?;
            settle()?;
            month.restore = tool.restore(cluster, &target)?.wall.as_secs_f64();
            fs::remove_dir_all(&target)?;
        }
        let list = run_quietly(
            cluster
                .account
                .command(cluster.root().join("pgvault.bin"))
                .arg("--config")
                .arg(cluster.root().join("pgvault.toml"))
                .args(["list"]),
        )?;
        let last = list.lines().rfind(|line| line.contains("incremental")).unwrap_or_default().to_owned();
        for tool in &tools {
            tool.clear()?;
        }
        self.report(pattern, &tools, &months, &last);
        Ok(())
    }

    /// A day's transactions.
    fn change(&self, cluster: &Cluster, script: &str) -> Result<()> {
        let file = tools::written(cluster, "day.sql", script)?;
        let mut pgbench = cluster.program("pgbench");
        let transactions = (self.transactions / 2).max(1).to_string();
        pgbench
            .args(["-n", "-c", "2", "-t", &transactions, "-U", "postgres", "-f"])
            .arg(file)
            .arg("-h")
            .arg(cluster.root())
            .arg("postgres");
        let _ = run_quietly(&mut pgbench)?;
        cluster.sql("CHECKPOINT").map(drop)
    }

    fn report(&self, pattern: Pattern, tools: &[Tool; 2], months: &[Month; 2], last: &str) {
        const MIB: f64 = 1_048_576.0;
        #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
        let mib = |bytes: u64| bytes as f64 / MIB;
        println!("\n{}: {} days of {} transactions", pattern.name(), self.count, self.transactions);
        println!(
            "{:12} {:>10} {:>12} {:>12} {:>10} {:>9} {:>9} {:>9}",
            "", "first MiB", "a day MiB", "in all MiB", "objects/d", "first s", "a day s", "restore s"
        );
        for (tool, month) in tools.iter().zip(months) {
            let (first, rest) = month.days.split_first().map_or(((0, 0, 0.0), &[][..]), |(first, rest)| (*first, rest));
            #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
            let objects = median(rest.iter().map(|day| day.1 as f64));
            println!(
                "{:12} {:10.1} {:12.2} {:12.1} {objects:10.1} {:9.2} {:9.2} {:9.2}",
                tool.name,
                mib(first.0),
                median(rest.iter().map(|day| mib(day.0))),
                mib(month.bytes()),
                first.2,
                median(rest.iter().map(|day| day.2)),
                month.restore
            );
        }
        println!("last: {last}");
        let [own, other] = months;
        judge(
            own.bytes() <= other.bytes(),
            &format!("{}: {:.3} of its bytes; at most 1 wanted", pattern.name(), mib(own.bytes()) / mib(other.bytes())),
        );
        let first = own.days.first().map_or(0.0, |day| day.2);
        let each = median(own.days.iter().skip(1).map(|day| day.2));
        judge(
            each * 3.0 <= first,
            &format!("{}: an incremental takes {:.2} of a full backup's time; at most 0.33 wanted", pattern.name(), each / first),
        );
    }
}

/// Bytes, objects and seconds of one backup.
fn back_up(cluster: &Cluster, tool: &Tool) -> Result<(u64, u64, f64)> {
    let before = tools::size_without_wal(&tool.store)?;
    settle()?;
    let measured = tool.backup(cluster)?;
    let after = tools::size_without_wal(&tool.store)?;
    Ok((after.bytes.saturating_sub(before.bytes), after.objects.saturating_sub(before.objects), measured.wall.as_secs_f64()))
}
