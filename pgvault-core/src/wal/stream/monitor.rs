//! What a stream tells while it runs: events as they happen, and where it stands.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{mpsc, watch};

use super::retention::Retention;
use crate::Error;
use crate::env::Env;
use crate::postgres::{Lsn, TimelineId};

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// The slot is there and keeps WAL from `restart_lsn` on.
    SlotFound {
        /// Its name.
        slot: String,
        /// The oldest position that it keeps.
        restart_lsn: Lsn,
    },
    /// The slot did not exist, or kept nothing, and was made.
    SlotCreated {
        /// Its name.
        slot: String,
    },
    /// Streaming begins.
    Started {
        /// The position.
        from: Lsn,
        /// The timeline.
        timeline: TimelineId,
    },
    /// Everything up to here is durable in the vault.
    Durable {
        /// The position.
        to: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// From the arrival of the oldest of it to the answer of the store.
        waited: Duration,
    },
    /// The server went on to another timeline.
    Switched {
        /// The new timeline.
        timeline: TimelineId,
    },
    /// WAL between what the vault has and what the server still has is lost.
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// First missing position.
        from: Lsn,
        /// First position that the server still has.
        to: Lsn,
    },
    /// The connection failed; streaming goes on after a pause.
    Interrupted {
        /// Why.
        reason: String,
    },
    /// The store does not take WAL; trying goes on, and the server keeps what is not stored.
    StoreTrouble {
        /// Why.
        reason: String,
    },
    /// The store takes WAL again.
    StoreRecovered,
    /// The store is slower than the server writes: the connection is closed until what has arrived is stored.
    Behind,
    /// The server keeps more and more WAL for the slot; see [`Retention`].
    Retained(Retention),
}

/// Where a stream stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StreamState {
    /// True while WAL is being received.
    pub connected: bool,
    /// The timeline that was streamed last.
    pub timeline: Option<TimelineId>,
    /// The end of the server's WAL, as it last said.
    pub server: Lsn,
    /// The end of what has arrived.
    pub received: Lsn,
    /// The end of what is durable in the spool directory, when there is one.
    pub spooled: Lsn,
    /// The end of what is durable in the vault without a hole.
    pub durable: Lsn,
    /// When the server was first seen with WAL that is not durable yet.
    pub waiting_since: Option<Timestamp>,
    /// When the connection was lost, while there is none: what was written since is not known.
    pub disconnected_since: Option<Timestamp>,
    /// Why the store does not take WAL, while it does not.
    pub store_trouble: Option<String>,
    /// Why there is no connection, while there is none.
    pub connection_trouble: Option<String>,
    /// Whole segments that were stored.
    pub segments: u64,
    /// Parts of segments that were stored.
    pub parts: u64,
    /// PUTs that failed.
    pub store_failures: u64,
    /// Connections that were lost or could not be made.
    pub connection_failures: u64,
    /// Holes that no server can fill, found since the start.
    pub gaps: u64,
    /// Questions of the server that wanted an answer at once.
    pub keepalives: u64,
    /// What the server keeps for the slot, as it last said.
    pub retention: Option<Retention>,
}

impl StreamState {
    /// Bytes of the server's WAL that are not durable in the vault.
    pub fn lag_bytes(&self) -> u64 {
        self.server.0.saturating_sub(self.durable.0)
    }

    /// How much, in time, would be missing if the server were lost now: at most, while there is no connection.
    pub fn lag(&self, now: Timestamp) -> Duration {
        let since = self.waiting_since.into_iter().chain(self.disconnected_since).min();
        since.map_or(Duration::ZERO, |since| Duration::try_from(now.duration_since(since)).unwrap_or_default())
    }
}

/// Both, as the parts of a stream use them.
#[derive(Debug, Clone)]
pub(super) struct Monitor {
    pub(super) env: Env,
    pub(super) events: mpsc::UnboundedSender<StreamEvent>,
    pub(super) state: watch::Sender<StreamState>,
}

impl Monitor {
    /// Nobody listening is no reason to stop archiving.
    pub(super) fn tell(&self, event: StreamEvent) {
        let _ = self.events.send(event);
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut StreamState)) {
        self.state.send_modify(change);
    }

    /// Counted each time, told when it is news.
    pub(super) fn interrupted(&self, error: &Error) {
        let reason = error.to_string();
        let mut known = false;
        self.update(|state| {
            state.connection_failures += 1;
            known = state.connection_trouble.replace(reason.clone()).as_ref() == Some(&reason);
        });
        if !known {
            self.tell(StreamEvent::Interrupted { reason });
        }
    }

    /// Whatever connection there was is over; true when there was one.
    pub(super) fn disconnected(&self) -> bool {
        let now = self.env.now();
        let mut was = false;
        self.update(|state| {
            was = std::mem::take(&mut state.connected);
            let _ = state.disconnected_since.get_or_insert(now);
        });
        was
    }

    /// The connection is closed on purpose.
    pub(super) fn behind(&self, error: &Error) {
        self.update(|state| state.connection_trouble = Some(error.to_string()));
        self.tell(StreamEvent::Behind);
    }

    /// Told once for each trouble, counted each time.
    pub(super) fn store_failed(&self, error: &Error) {
        let reason = error.to_string();
        let mut first = false;
        self.update(|state| {
            state.store_failures += 1;
            first = state.store_trouble.replace(reason.clone()).is_none();
        });
        if first {
            self.tell(StreamEvent::StoreTrouble { reason });
        }
    }

    pub(super) fn store_works(&self) {
        let mut recovered = false;
        self.state.send_if_modified(|state| {
            recovered = state.store_trouble.take().is_some();
            recovered
        });
        if recovered {
            self.tell(StreamEvent::StoreRecovered);
        }
    }
}
