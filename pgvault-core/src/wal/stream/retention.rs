//! How much WAL the server keeps for the slot, and how long that can go on.
//!
//! While the store is down the slot holds WAL back: on the server's disk, until `max_slot_wal_keep_size` is reached, or the disk is
//! full. The first loses WAL, the second stops the server. Both are told long before.

use serde::Serialize;

/// What the server keeps for the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Retention {
    /// Bytes of WAL between the slot's position and the server's.
    pub retained: u64,
    /// `max_slot_wal_keep_size` in bytes, when there is a limit.
    pub limit: Option<u64>,
    /// Bytes that can still be written before the slot may lose WAL (`safe_wal_size`), when there is a limit.
    pub safe: Option<u64>,
    /// Free bytes of the disk of `pg_wal`, when that is on this machine.
    pub disk_free: Option<u64>,
    /// False when the server has given the slot's WAL up.
    pub held: bool,
}

/// How serious a [`Retention`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pressure {
    /// No cause for concern.
    Low,
    /// Half of what the limit or the disk allows is used.
    Warning,
    /// Four fifths of it are.
    Critical,
    /// The server has given WAL up that is not in the vault.
    Lost,
}

impl Retention {
    /// How serious it is.
    pub fn pressure(&self) -> Pressure {
        if !self.held {
            return Pressure::Lost;
        }
        let used = |free: u64| self.retained.saturating_mul(100) / self.retained.saturating_add(free).max(1);
        let room = self.safe.into_iter().chain(self.disk_free).min();
        match room.map_or(0, used) {
            80.. => Pressure::Critical,
            50.. => Pressure::Warning,
            _ => Pressure::Low,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_limit_are_told_long_before() {
        let of = |retained, safe, disk_free| Retention { retained, limit: safe, safe, disk_free, held: true }.pressure();
        assert_eq!(of(1 << 40, None, None), Pressure::Low);
        assert_eq!(of(49, Some(51), None), Pressure::Low);
        assert_eq!(of(50, Some(50), Some(1000)), Pressure::Warning);
        assert_eq!(of(50, Some(1000), Some(50)), Pressure::Warning);
        assert_eq!(of(80, Some(20), None), Pressure::Critical);
        assert_eq!(of(80, Some(0), None), Pressure::Critical);
        assert_eq!(of(0, Some(0), Some(0)), Pressure::Low);
        let lost = Retention { retained: 0, limit: None, safe: None, disk_free: None, held: false };
        assert_eq!(lost.pressure(), Pressure::Lost);
    }
}
