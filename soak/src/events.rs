//! What is done to the stream, the store and the servers.

use crate::random::Random;

/// A disturbance, or something that is not one but has to go well all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// The vault's folders cannot be written.
    StoreReadOnly,
    /// The same, and the server is stopped meanwhile.
    StoreReadOnlyAtStop,
    /// The vault's disk is full.
    StoreFull,
    /// The vault's disk takes nothing, and says nothing.
    StoreHangs,
    /// The vault is not mounted.
    StoreAway,
    /// The stream gets no more file descriptors.
    NoDescriptors,
    /// The stream does not run for a while: a machine that stalls, or a slow store.
    StreamStalls,
    /// Killed, and started again.
    StreamKilled,
    /// Asked to end, and started again.
    StreamTerminated,
    /// Every connection of the stream is cut, more than once.
    ConnectionCut,
    /// The server's end of the stream stays open and says nothing.
    ConnectionSilent,
    RestartFast,
    RestartImmediate,
    /// All processes of the server are killed.
    ServerKilled,
    SlotDropped,
    /// The slot is made anew, without keeping anything.
    SlotEmpty,
    SlotAdvanced,
    /// The primary is stopped, the standby takes over.
    Switchover,
    /// The primary is killed, the standby takes over.
    Failover,
    /// Many segments that hold almost nothing.
    SwitchStorm,
    BigTransactions,
    Idle,
    Burst,
    Backup,
    BackupKilled,
    /// A restore beside the running server.
    Restore,
    /// The hosts of both servers are gone; what the vault has becomes the new primary.
    HostLost,
    /// The same while the store is down or the stream not there.
    HostLostInOutage,
}

impl Event {
    const ALL: [Self; 28] = [
        Self::StoreReadOnly,
        Self::StoreReadOnlyAtStop,
        Self::StoreFull,
        Self::StoreHangs,
        Self::StoreAway,
        Self::NoDescriptors,
        Self::StreamStalls,
        Self::StreamKilled,
        Self::StreamTerminated,
        Self::ConnectionCut,
        Self::ConnectionSilent,
        Self::RestartFast,
        Self::RestartImmediate,
        Self::ServerKilled,
        Self::SlotDropped,
        Self::SlotEmpty,
        Self::SlotAdvanced,
        Self::Switchover,
        Self::Failover,
        Self::SwitchStorm,
        Self::BigTransactions,
        Self::Idle,
        Self::Burst,
        Self::Backup,
        Self::BackupKilled,
        Self::Restore,
        Self::HostLost,
        Self::HostLostInOutage,
    ];

    /// Needs the vault on a disk of its own.
    fn needs_disk(self) -> bool {
        matches!(self, Self::StoreFull | Self::StoreHangs | Self::StoreAway)
    }

    /// Ends the process of the stream.
    pub(crate) fn ends_stream(self) -> bool {
        matches!(self, Self::StreamKilled | Self::StreamTerminated | Self::HostLostInOutage)
    }
}

/// Every event once in some order, then again in another: a short run sees as many kinds as it has time for.
#[derive(Debug)]
pub(crate) struct Deck {
    cards: Vec<Event>,
    left: Vec<Event>,
}

impl Deck {
    pub(crate) fn new(has_disk: bool) -> Self {
        let cards = Event::ALL.into_iter().filter(|event| has_disk || !event.needs_disk()).collect();
        Self { cards, left: Vec::new() }
    }

    /// Puts one back, below all others.
    pub(crate) fn later(&mut self, event: Event, random: &mut Random) {
        if self.left.iter().all(|left| left.ends_stream()) {
            self.left.clone_from(&self.cards);
            random.shuffle(&mut self.left);
        }
        self.left.insert(0, event);
    }

    pub(crate) fn draw(&mut self, random: &mut Random) -> Event {
        loop {
            if let Some(event) = self.left.pop() {
                return event;
            }
            self.left.clone_from(&self.cards);
            random.shuffle(&mut self.left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_comes_once_before_any_comes_twice() {
        let (mut deck, mut random) = (Deck::new(true), Random::new(1));
        for _ in 0..3 {
            let mut drawn: Vec<Event> = (0..Event::ALL.len()).map(|_| deck.draw(&mut random)).collect();
            drawn.sort_unstable();
            assert_eq!(drawn, Event::ALL);
        }
        let mut deck = Deck::new(false);
        assert!((0..100).all(|_| !deck.draw(&mut random).needs_disk()));
    }
}
