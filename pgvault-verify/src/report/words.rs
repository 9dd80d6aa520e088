//! Figures as people write them, and what a check is about in plain words.

/// A time: `850 ms`, `12.3 s`, `41 min`.
pub(crate) fn time(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        120_000..7_200_000 => format!("{} min", (ms + 30_000) / 60_000),
        _ => format!("{}.{} h", ms / 3_600_000, ms % 3_600_000 / 360_000),
    }
}

/// A size: `12 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut unit, mut scaled, mut rest) = (0, bytes, 0);
    while scaled >= 1024 && unit + 1 < UNITS.len() {
        rest = scaled % 1024;
        scaled /= 1024;
        unit += 1;
    }
    let unit = UNITS.get(unit).copied().unwrap_or_default();
    if scaled < 10 && unit != "bytes" { format!("{scaled}.{} {unit}", rest * 10 / 1024) } else { format!("{scaled} {unit}") }
}

/// What a check stands for, and what it means for the business when it fails.
pub(crate) fn meaning(check: &str) -> (&'static str, &'static str) {
    match check.split(':').next().unwrap_or(check) {
        "leftovers" => ("Earlier drills", "A drill was interrupted; what it left is gone."),
        "plan" => ("A way back exists", "The moment cannot be restored from what the vault holds."),
        "history" => ("Nothing was lost since the last drill", "What could be restored before cannot be restored any more."),
        "resources" => ("Room for the copy", "The drill could not be held."),
        "restore" => ("Every byte authentic", "Stored data is missing or was changed."),
        "base-files" => ("Every file in its place", "The restored database is not what was backed up."),
        "recovery" => ("The moment was reached", "A disaster now would lose more than it should, or everything."),
        "capture" | "roll-forward" => ("A new backup of the copy", "The next restore takes as long as this one did."),
        "promotion" => ("The database opens for work", "The restored database cannot be used."),
        "row-counts" => ("Tables have their rows", "Rows are missing from the restored database."),
        "catalog-dump" => ("The structure is whole", "Parts of the database cannot be described, and not be used."),
        "tables" => ("Tables can be read", "Data is lost, though its files are there."),
        "amcheck" => ("Tables and indexes agree", "Searches give wrong answers, or fail."),
        "sequences" | "odoo-sequences" => ("Numbering goes on", "New documents would be refused as duplicates."),
        "indexes" => ("Indexes in use", "Searches are slow."),
        "constraints" => ("Rules were checked", "Old rows may break rules that new ones have to follow."),
        "collations" => ("Text is sorted as before", "Searches for text may miss rows until indexes are rebuilt."),
        "extensions" => ("Add-ons are there", "Parts of the application fail after a restore to a machine like this."),
        "odoo-identity" => ("The right company's database", "This may not be the database that it should be."),
        "odoo-modules" => ("No half-done upgrade", "The application may not start at this moment; choose one before the upgrade."),
        "odoo-attachments" => ("Documents have a place", "Documents cannot be opened."),
        "odoo-books" => ("The books balance", "Accounting entries are damaged."),
        "filestore" => ("Documents are there", "Documents are lost or damaged."),
        "page-checksums" => ("The disk gave back what it took", "Data is damaged."),
        "shutdown" => ("The database closes in good order", "The copy broke down."),
        "rto" => ("Fast enough", "A disaster would take longer than promised."),
        "removal" => ("The copy is gone", "Production data may lie about."),
        "user" => ("The operator's own check", "What the operator asked for does not hold."),
        _ => ("", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        let times: Vec<String> = [12, 1_500, 119_999, 2_460_000, 9_000_000].into_iter().map(time).collect();
        assert_eq!(times, ["12 ms", "1.5 s", "119.9 s", "41 min", "2.5 h"]);
        let sizes: Vec<String> = [0, 1023, 1536, 11 << 20, 3 << 40].into_iter().map(size).collect();
        assert_eq!(sizes, ["0 bytes", "1023 bytes", "1.5 KiB", "11 MiB", "3.0 TiB"]);
    }
}
