//! Medians, ratios within a round, and what the budgets say about them.

use super::machine;
use super::measure::Measured;
use crate::run::{program, run_quietly};

/// One run of one tool.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) measured: Measured,
    pub(super) bytes: u64,
    pub(super) objects: u64,
}

/// Everything that was measured.
pub(super) struct Report {
    facts: String,
    names: Vec<String>,
    backups: Vec<Vec<Row>>,
    restores: Vec<Vec<Row>>,
}

const PEER: &str = "pgbackrest";
const SPEED: f64 = 1.5;
const MEMORY: u64 = 512 << 20;
const PUTS_PER_GIB: f64 = 15.0;

impl Report {
    pub(super) fn new(facts: String, names: Vec<String>) -> Self {
        let empty = || vec![Vec::new(); names.len()];
        Self { facts, backups: empty(), restores: empty(), names }
    }

    pub(super) fn backup(&mut self, tool: usize, row: Row) {
        self.backups[tool].push(row);
    }

    pub(super) fn restore(&mut self, tool: usize, row: Row) {
        self.restores[tool].push(row);
    }

    pub(super) fn print(&self) {
        println!("\n{}\n{}", machine(), self.facts);
        for peer in [("pgbackrest", "version"), ("pg_basebackup", "--version")] {
            if let Ok(version) = run_quietly(&mut program(peer.0, [peer.1])) {
                println!("{}", version.trim());
            }
        }
        table("backup", &self.names, &self.backups, true);
        table("restore", &self.names, &self.restores, false);
        for other in 1..self.names.len() {
            for (what, rows) in [("backup", &self.backups), ("restore", &self.restores)] {
                if let Some(ratio) = paired(&rows[other], &rows[0], seconds) {
                    println!("{what}: {} takes {ratio:.2} times as long as {}", self.names[other], self.names[0]);
                }
            }
        }
        self.budgets();
    }

    fn budgets(&self) {
        let Some(peer) = self.names.iter().position(|name| name == PEER) else { return };
        println!("\nbudgets, {} against {PEER}:", self.names[0]);
        for (what, rows) in [("backup", &self.backups), ("restore", &self.restores)] {
            if let Some(ratio) = paired(&rows[peer], &rows[0], seconds) {
                judge(ratio >= SPEED, &format!("{what}: {ratio:.2} times as fast; at least {SPEED} wanted"));
            }
        }
        if let Some(ratio) = paired(&self.backups[0], &self.backups[peer], |row| number(row.bytes)) {
            judge(ratio <= 1.0, &format!("stored: {ratio:.3} of its bytes; at most 1 wanted"));
        }
        let all = || self.backups[0].iter().chain(&self.restores[0]);
        let memory = all().map(|row| row.measured.peak_rss).max().unwrap_or(0);
        judge(memory < MEMORY, &format!("memory: {} MiB at most; under {} wanted", memory >> 20, MEMORY >> 20));
        let puts = median(self.backups[0].iter().map(|row| number(row.objects) / (number(row.bytes) / f64::from(1 << 30))));
        judge(puts < PUTS_PER_GIB, &format!("objects: {puts:.1} for each GiB stored, WAL aside; under {PUTS_PER_GIB} wanted"));
    }
}

pub(super) fn judge(passed: bool, text: &str) {
    println!("  {}  {text}", if passed { "PASS        " } else { "BELOW BUDGET" });
}

fn table(what: &str, names: &[String], rows: &[Vec<Row>], stored: bool) {
    println!(
        "\n{what:16}  wall s   (all)                     CPU s   RSS MiB{}",
        if stored { "   stored MiB   objects" } else { "" }
    );
    for (name, rows) in names.iter().zip(rows).filter(|(_, rows)| !rows.is_empty()) {
        let walls: Vec<String> = rows.iter().map(|row| format!("{:.2}", seconds(row))).collect();
        let memory = rows.iter().map(|row| row.measured.peak_rss).max().unwrap_or(0) >> 20;
        print!(
            "{name:16}  {:6.2}   {:24}  {:6.2}   {memory:7}",
            median(rows.iter().map(seconds)),
            walls.join(" "),
            median(rows.iter().map(|row| row.measured.cpu.as_secs_f64()))
        );
        if stored {
            let bytes = median(rows.iter().map(|row| number(row.bytes))) / f64::from(1 << 20);
            print!("   {bytes:10.1}   {:7.0}", median(rows.iter().map(|row| number(row.objects))));
        }
        println!();
    }
}

fn seconds(row: &Row) -> f64 {
    row.measured.wall.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "printed with three digits")]
fn number(value: u64) -> f64 {
    value as f64
}

/// The median over rounds of `a` divided by `b`.
fn paired(a: &[Row], b: &[Row], value: impl Fn(&Row) -> f64) -> Option<f64> {
    let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| value(a) / value(b)).collect();
    (!ratios.is_empty()).then(|| median(ratios))
}

pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.as_slice() {
        [] => f64::NAN,
        values if values.len() % 2 == 1 => values[values.len() / 2],
        values => f64::midpoint(values[values.len() / 2 - 1], values[values.len() / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).is_nan());
    }
}
