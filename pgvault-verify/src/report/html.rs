//! One page without scripts, fonts or pictures from anywhere: it opens from a mail, and prints.

use maud::{DOCTYPE, Markup, PreEscaped, html as page};
use pgvault_core::vault::drill::{Check, Outcome, Receipt, SignedReceipt, Verdict};

use super::words::{meaning, size, time};

/// Colours are those of the reader's light or dark setting; every state is a word as well as a colour.
const STYLE: &str = "
:root { color-scheme: light dark; --fg: #1b1f24; --soft: #57606a; --bg: #fff; --line: #d0d7de; --card: #f6f8fa; --good: #116329; --warn: #7d4e00; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6edf3; --soft: #9da7b3; --bg: #0d1117; --line: #30363d; --card: #161b22; --good: #56d364; --warn: #e3b341; --bad: #ff8b85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; font-weight: 500; }
p { margin: .5rem 0; }
.soft { color: var(--soft); }
.verdict { border: 1px solid var(--line); border-left: .5rem solid; border-radius: .4rem; padding: .8rem 1rem; margin: 1rem 0; background: var(--card); }
.passed { border-left-color: var(--good); } .partial, .warned { border-left-color: var(--warn); } .failed { border-left-color: var(--bad); }
.verdict strong { font-size: 1.25rem; }
.word { font-weight: 600; white-space: nowrap; }
.word.is-passed { color: var(--good); } .word.is-warned { color: var(--warn); } .word.is-failed { color: var(--bad); } .word.is-skipped { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11.5rem, 100%), 1fr)); gap: .75rem; margin: 0; }
dl div { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.05rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem .45rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; padding-right: 0; }
.bar { display: flex; height: 1.1rem; border-radius: .3rem; overflow: hidden; margin: .9rem 0 .5rem; background: var(--line); }
.bar span:nth-child(odd) { background: #0969da; } .bar span:nth-child(even) { background: #54aeff; }
details { margin-top: .2rem; } summary { color: var(--soft); cursor: pointer; font-size: .85rem; }
pre { white-space: pre-wrap; font-size: .8rem; margin: .3rem 0 0; padding: .5rem; background: var(--card); border-radius: .3rem; }
@media (max-width: 40rem) {
  table.checks thead { display: none; } table.checks tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  table.checks td { display: block; border: 0; padding: 0; } table.checks td.number { text-align: left; color: var(--soft); font-size: .85rem; }
}
@media print { details { display: none; } body { max-width: none; } }
";

/// The page of a drill; `before` are earlier ones, oldest first.
pub fn html(signed: &SignedReceipt, before: &[Receipt]) -> String {
    let receipt = &signed.receipt;
    let markup = page! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Restore drill of " (receipt.cluster) ": " (receipt.outcome) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { "Restore drill of " (receipt.cluster) }
                    p .soft { (moment(receipt.started_at)) ", by " (receipt.by) }
                    (verdict(receipt))
                    (restored(receipt))
                    (duration(receipt, before))
                    @if !receipt.facts.is_empty() { (facts(receipt)) }
                    (checks(receipt))
                    (proof(signed))
                }
            }
        }
    };
    markup.into_string()
}

/// To the second: nobody reads more.
fn moment(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// What a check is about; the operator's own are called what he calls them.
fn title_of(check: &Check) -> String {
    match (check.name.strip_prefix("user:"), meaning(&check.name).0) {
        (Some(own), _) => own.rsplit_once(':').map_or_else(|| own.to_owned(), |(name, database)| format!("{name} ({database})")),
        (None, "") => check.name.clone(),
        (None, title) => title.to_owned(),
    }
}

fn verdict(receipt: &Receipt) -> Markup {
    let failed: Vec<&Check> = receipt.failures().collect();
    let class = match receipt.outcome {
        Outcome::Passed => "verdict passed",
        Outcome::Partial => "verdict partial",
        Outcome::Failed => "verdict failed",
    };
    page! {
        section class=(class) aria-label="Result" {
            @match receipt.outcome {
                Outcome::Passed => {
                    strong { "Passed. " }
                    "The backup was restored, started and examined; everything that was asked of it holds."
                }
                Outcome::Partial => {
                    strong { "Not a full proof. " }
                    "What was examined holds, but something was left out:"
                    ul { @for left_out in &receipt.left_out { li { (left_out) } } }
                }
                Outcome::Failed => {
                    strong { "Failed. " }
                    "A disaster at this moment would not have ended well:"
                    ul {
                        @for check in failed {
                            @let (_, means) = meaning(&check.name);
                            li {
                                b { (title_of(check)) ": " }
                                (check.message)
                                @if !means.is_empty() { " " span .soft { (means) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn fact(label: &str, value: &str) -> Markup {
    page! { div { dt { (label) } dd { (value) } } }
}

fn restored(receipt: &Receipt) -> Markup {
    page! {
        h2 { "What was restored" }
        dl {
            @if let Some(id) = receipt.backup_id {
                (fact("Backup", &format!("{id}{}", receipt.backup_finished_at.map(|at| format!(", of {}", moment(at))).unwrap_or_default())))
            }
            (fact("Asked for", &receipt.target))
            @match &receipt.reached {
                Some(point) => {
                    (fact("Reached", &point.time.map_or_else(|| "the moment of the backup".to_owned(), moment)))
                    (fact("Position", &format!("{} on timeline {}", point.lsn, point.timeline)))
                }
                None => (fact("Reached", "nothing")),
            }
            (fact("Files", &size(receipt.restored_bytes)))
            (fact("Changes replayed", &size(receipt.replayed_bytes)))
            @if let Some(id) = receipt.promoted_to { (fact("Made into backup", &id.to_string())) }
        }
    }
}

fn phase_name(name: &str) -> &str {
    match name {
        "open" => "open the vault",
        "plan" => "find the way",
        "fetch" => "fetch the files",
        "start" => "start the server",
        "replay" => "replay the changes",
        "promote" => "open for work",
        "checks" => "examine (not part of a restore)",
        other => other,
    }
}

fn duration(receipt: &Receipt, before: &[Receipt]) -> Markup {
    let phases: Vec<_> = receipt.phases.iter().filter(|phase| phase.name != "checks").collect();
    let total: u64 = phases.iter().map(|phase| phase.duration_ms).sum::<u64>().max(1);
    let passed: Vec<&Receipt> = before.iter().filter(|drill| drill.outcome == Outcome::Passed).collect();
    page! {
        h2 { "How long it took" }
        @if receipt.rto_ms > 0 {
            dl {
                (fact("Until open for work", &time(receipt.rto_ms)))
                (fact("Promised", &receipt.rto_target_ms.map_or_else(|| "nothing declared".to_owned(), time)))
                @if let Some(projection) = receipt.projection {
                    (fact("A disaster now", &format!(
                        "{}: {}, and {} for {} of changes", time(projection.total_ms), time(projection.base_ms), time(projection.wal_ms), size(projection.wal_bytes)
                    )))
                    (fact("With a new base backup", &time(projection.base_ms)))
                }
            }
        }
        div .bar aria-hidden="true" {
            @for phase in &phases { span style=(format!("width:{}%", phase.duration_ms * 100 / total)) {} }
        }
        table {
            thead { tr { th { "Step" } th .number { "Time" } } }
            tbody {
                @for phase in &receipt.phases { tr { td { (phase_name(&phase.name)) } td .number { (time(phase.duration_ms)) } } }
            }
        }
        @if !passed.is_empty() {
            p .soft {
                "Earlier drills that passed: "
                @for (number, drill) in passed.iter().enumerate() {
                    @if number > 0 { ", " }
                    (drill.started_at.strftime("%Y-%m-%d").to_string()) " " (time(drill.rto_ms))
                }
            }
        }
    }
}

fn facts(receipt: &Receipt) -> Markup {
    let mut databases: Vec<&str> = receipt.facts.iter().map(|fact| fact.database.as_str()).collect();
    databases.dedup();
    page! {
        h2 { "What is in it" }
        @for database in databases {
            h3 .soft { (database) }
            dl {
                @for found in receipt.facts.iter().filter(|fact| fact.database == database) { (fact(&found.label, &found.value)) }
            }
        }
    }
}

fn checks(receipt: &Receipt) -> Markup {
    page! {
        h2 { "What was examined" }
        table .checks {
            thead { tr { th { "Check" } th { "Result" } th { "Finding" } th .number { "Time" } } }
            tbody {
                @for check in &receipt.checks {
                    @let (_, means) = meaning(&check.name);
                    tr {
                        td { b { (title_of(check)) } br; span .soft { (check.name) } }
                        td {
                            @match check.verdict {
                                Verdict::Passed => span class="word is-passed" { "passed" },
                                Verdict::Warned => span class="word is-warned" { "warning" },
                                Verdict::Failed => span class="word is-failed" { "failed" },
                                Verdict::Skipped => span class="word is-skipped" { "not done" },
                            }
                        }
                        td {
                            (check.message)
                            @if check.verdict == Verdict::Failed && !means.is_empty() { p .soft { (means) } }
                            @if !check.evidence.is_null() {
                                details { summary { "evidence" } pre { (serde_json::to_string_pretty(&check.evidence).unwrap_or_default()) } }
                            }
                        }
                        td .number { (time(check.duration_ms)) }
                    }
                }
            }
        }
    }
}

fn proof(signed: &SignedReceipt) -> Markup {
    let receipt = &signed.receipt;
    page! {
        h2 { "Proof" }
        p {
            "Drill " (receipt.id) ", seed " (receipt.seed) ", run in " (receipt.runner) " by pgvault " (receipt.version)
            ", ended " (moment(receipt.finished_at)) ". The receipt is stored in the vault under this id and cannot be changed there."
        }
        p .soft { "Signed by the Ed25519 key " code { (signed.public_key) } ": " code { (signed.signature) } }
        p .soft { "This page is made from the receipt. Its JSON (" code { "--json" } ") can be verified by " code { "pgvault verify receipt FILE" } "." }
    }
}
