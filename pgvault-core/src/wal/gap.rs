//! Gaps: WAL that should be in the vault and is not, and when it was written.

use jiff::Timestamp;
use serde::Serialize;

use super::catalog::Gap;
use crate::postgres::{Lsn, TimelineId};

/// A gap, with the times around it as far as they are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TimedGap {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first missing position.
    pub from: Lsn,
    /// The first position that is there again.
    pub to: Lsn,
    /// When the last transaction before it ended.
    pub from_time: Option<Timestamp>,
    /// When the first transaction behind it ended.
    pub to_time: Option<Timestamp>,
}

impl TimedGap {
    /// A gap of which no times are known yet.
    pub fn new(gap: Gap) -> Self {
        Self { timeline: gap.timeline, from: gap.from, to: gap.to, from_time: None, to_time: None }
    }
}
