//! What was promised, what it took, and what it would take now.

use pgvault_core::restore::plan::Plan;
use pgvault_core::vault::drill::{Phase, Projection};
use serde_json::json;

use super::Run;
use crate::checks::Found;
use crate::report::words::time as seconds;

impl Run<'_> {
    /// What a disaster now would take: the same way, and all the WAL that the vault has behind the backup.
    pub(super) fn project(&mut self, plan: &Plan) {
        let replay = self.phase_ms("replay");
        let base_ms = self.receipt.rto_ms.saturating_sub(replay);
        let wal_bytes = plan.wal_end.0.saturating_sub(plan.snapshot.manifest.start_lsn.0);
        let wal_ms = scaled(replay, wal_bytes, self.receipt.replayed_bytes);
        self.receipt.projection = Some(Projection { total_ms: base_ms.saturating_add(wal_ms), base_ms, wal_ms, wal_bytes });
    }

    fn phase_ms(&self, name: &str) -> u64 {
        self.receipt.phases.iter().filter(|phase| phase.name == name).map(|Phase { duration_ms, .. }| duration_ms).sum()
    }

    /// Compares the time that the way back took, and would take now, with what is promised. Too slow is a warning: the data is safe.
    pub(super) fn judge_time(&mut self) {
        let Some(projection) = self.receipt.projection else { return };
        let (took, promised) = (self.receipt.rto_ms, self.receipt.rto_target_ms);
        let now = format!(
            "a disaster now would take {}: {} and {} of WAL",
            seconds(projection.total_ms),
            seconds(projection.base_ms),
            seconds(projection.wal_ms)
        );
        let evidence = json!({ "took_ms": took, "promised_ms": promised, "projection": projection });
        let found = match promised {
            None => Found::passed(format!("the way back took {}; {now}; no RTO is declared", seconds(took)), evidence),
            Some(promised) if took.max(projection.total_ms) <= promised => {
                Found::passed(format!("the way back took {} of the {} promised; {now}", seconds(took), seconds(promised)), evidence)
            }
            Some(promised) => {
                let advice = if projection.base_ms <= promised && projection.total_ms > promised {
                    format!("; a new base backup would make it {}", seconds(projection.base_ms))
                } else {
                    String::new()
                };
                Found::warned(
                    format!("the way back took {}, and {} are promised; {now}{advice}", seconds(took), seconds(promised)),
                    evidence,
                )
            }
        };
        self.note("rto", found);
    }
}

/// `ms` for `had` bytes, as `want` bytes would take.
fn scaled(ms: u64, want: u64, had: u64) -> u64 {
    let scaled = u128::from(ms) * u128::from(want) / u128::from(had.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_scaled() {
        assert_eq!(scaled(100, 300, 100), 300);
        assert_eq!(scaled(100, 300, 0), 30_000);
        assert_eq!(scaled(u64::MAX, u64::MAX, 1), u64::MAX);
    }
}
