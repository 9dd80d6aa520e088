//! One timeline of one connection: from messages to pieces, and from stored pieces to what is confirmed.

use std::fs::File;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::monitor::StreamEvent;
use super::press::Pressed;
use super::upload::Stored;
use super::{Held, Setting, stopped};
use crate::postgres::{Acknowledgement, Lsn, SegmentSize, TimelineId, WalMessage, WalStream};
use crate::wal::assemble::Assembler;
use crate::{Error, ErrorKind, Result};

/// How often the server hears where this process is, at least.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// How long the connection is kept while nothing more can be taken from it. A server that is stopping waits that long in vain.
const STUCK: Duration = Duration::from_secs(2);

/// WAL in the spool that is on its way to the disk.
struct Syncing {
    to: Lsn,
    task: JoinHandle<std::io::Result<()>>,
}

/// One timeline's stream.
pub(super) struct Receiver<'a> {
    pub(super) stream: WalStream<'a>,
    setting: Setting<'a>,
    held: Held<'a>,
    size: SegmentSize,
    assembler: Assembler,
    syncing: Option<Syncing>,
    /// The end of what has arrived, of what is durable in the spool, and of what is durable in the vault.
    received: Lsn,
    spooled: Lsn,
    durable: Lsn,
    /// What the slot already stands at.
    kept: Lsn,
}

impl<'a> Receiver<'a> {
    /// A receiver for a stream that began at the start of the segment of `durable`, up to where the vault has everything.
    pub(super) fn new(
        setting: Setting<'a>,
        held: Held<'a>,
        stream: WalStream<'a>,
        size: SegmentSize,
        (durable, stored): (Lsn, Vec<u8>),
        kept: Lsn,
    ) -> Self {
        let (assembler, received) = Assembler::new(stream.timeline(), size, durable);
        let assembler = assembler.expecting(stored);
        let (syncing, spooled) = (None, Lsn::INVALID);
        Self { stream, setting, held, size, assembler, syncing, received, spooled, durable, kept }
    }

    /// What the slot stands at when this is over.
    pub(super) fn kept(&self) -> Lsn {
        self.kept.max(self.durable)
    }

    /// Receives until the timeline ends (giving the next) or `stop` is set. However it ends, all that has arrived is on its way.
    pub(super) async fn run(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Option<(TimelineId, Lsn)>> {
        let outcome = self.receive(stop).await;
        // What the server has sent may be all that is left of it.
        if outcome.as_ref().is_ok_and(Option::is_some) || outcome.as_ref().is_err_and(|e| e.kind() != ErrorKind::Conflict) {
            self.flush()?;
        }
        outcome
    }

    async fn receive(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Option<(TimelineId, Lsn)>> {
        let patience = self.setting.options.receive_timeout;
        let mut status = tokio::time::interval(STATUS_INTERVAL.min(patience / 4));
        // An idle server is silent for as long as it hears from its receiver: whether it still lives, only a question tells.
        let mut heard = Instant::now();
        let mut flush_at: Option<Instant> = None;
        let mut sync_at: Option<Instant> = None;
        let mut full_since: Option<Instant> = None;
        let mut pressed = Pressed::default();
        loop {
            let full = match &self.held.spool {
                Some(spool) => spool.is_full(),
                None => self.held.uploads.is_full(),
            };
            if full {
                heard = Instant::now();
            }
            full_since = full.then(|| full_since.unwrap_or_else(Instant::now));
            // One part at a time: what arrives meanwhile goes together with the next, so that a hundred commits cost one PUT.
            let may_flush = flush_at.is_some() && !self.held.uploads.has_part();
            let may_sync = sync_at.is_some() && self.syncing.is_none();
            tokio::select! {
                biased;
                () = stopped(stop) => {
                    self.flush()?;
                    return Ok(None);
                }
                stored = self.held.uploads.first() => {
                    self.confirm(stored?).await?;
                    full_since = None;
                    if self.durable >= self.received {
                        pressed = Pressed::default();
                    }
                }
                synced = synced(&mut self.syncing) => {
                    self.spooled = self.spooled.max(synced?);
                    let spooled = self.spooled;
                    self.setting.monitor.update(|state| state.spooled = spooled);
                    self.acknowledge(false).await?;
                }
                () = sleep_until(flush_at), if may_flush => {
                    flush_at = None;
                    self.flush()?;
                }
                () = sleep_until(sync_at), if may_sync => {
                    sync_at = None;
                    self.sync()?;
                }
                () = sleep_until(full_since.map(|since| since + STUCK)) => {
                    return Err(Error::new(ErrorKind::Source, BEHIND, "waiting until the store has what has arrived"));
                }
                _ = status.tick() => {
                    if heard.elapsed() >= patience {
                        let why = format!("PostgreSQL has not answered for {} s", patience.as_secs_f32());
                        return Err(Error::new(ErrorKind::Source, "source.timeout", why));
                    }
                    self.acknowledge(heard.elapsed() >= patience / 2).await?;
                }
                () = sleep_until(pressed.answer_at) => {
                    pressed.answer_at = None;
                    self.acknowledge(false).await?;
                }
                message = self.stream.next(), if !full => {
                    heard = Instant::now();
                    match message? {
                        WalMessage::Data { start, bytes, server_end, .. } => {
                            self.take(start, &bytes, server_end)?;
                            let at_once = Instant::now();
                            if !self.assembler.has_news() {
                                flush_at = None;
                            } else if flush_at.is_none() {
                                let wait = if self.setting.options.synchronous { Duration::ZERO } else { self.setting.options.flush_interval };
                                flush_at = Some(at_once + wait);
                            }
                            if let Some(spool) = &self.setting.options.spool {
                                let wait = if self.setting.options.synchronous || spool.durable { Duration::ZERO } else { self.setting.options.flush_interval };
                                sync_at = sync_at.or(Some(at_once + wait));
                            }
                        }
                        WalMessage::Keepalive { server_end, reply_requested, .. } => {
                            self.setting.monitor.update(|state| state.keepalives += u64::from(reply_requested));
                            self.server_is_at(server_end);
                            if reply_requested {
                                if self.received < server_end || self.confirmed() >= self.received {
                                    self.acknowledge(false).await?;
                                } else {
                                    // A server that is stopping waits until everything it has sent is confirmed.
                                    flush_at = Some(Instant::now());
                                    pressed.ask()?;
                                }
                            }
                        }
                        WalMessage::EndOfTimeline { next_timeline, next_start } => return Ok(Some((next_timeline, next_start))),
                    }
                }
            }
        }
    }

    /// True when everything that has arrived is durable.
    pub(super) fn is_drained(&self) -> bool {
        self.held.uploads.is_empty()
    }

    /// Waits until everything that has arrived is durable, and says so.
    pub(super) async fn drain(&mut self) -> Result<()> {
        while !self.held.uploads.is_empty() {
            let stored = self.held.uploads.first().await?;
            self.confirm(stored).await?;
        }
        Ok(())
    }

    /// Takes what has arrived.
    fn take(&mut self, start: Lsn, bytes: &[u8], server_end: Lsn) -> Result<()> {
        self.received = start.advance(bytes.len() as u64);
        if let Some(spool) = &mut self.held.spool {
            spool.write(self.stream.timeline(), self.size, start, bytes)?;
        }
        for piece in self.assembler.add(start, bytes)? {
            let spooled = self.held.spool.as_ref().map(|spool| spool.path(piece.segment));
            self.held.uploads.add(piece, spooled);
        }
        self.server_is_at(server_end.max(self.received));
        Ok(())
    }

    fn server_is_at(&mut self, end: Lsn) {
        if end > self.durable {
            self.held.lag.add(end, self.setting.monitor.env.now());
        }
        let (received, waiting_since) = (self.received, self.held.lag.since());
        self.setting.monitor.update(|state| (state.received, state.server, state.waiting_since) = (received, end, waiting_since));
    }

    /// Sends what is in the open segment on its way.
    fn flush(&mut self) -> Result<()> {
        while let Some(piece) = self.assembler.flush()? {
            self.held.uploads.add(piece, None);
        }
        Ok(())
    }

    /// Begins to make durable what is in the spool.
    fn sync(&mut self) -> Result<()> {
        let Some(spool) = &mut self.held.spool else { return Ok(()) };
        let files: Vec<File> = spool.unsynced()?;
        let task = tokio::task::spawn_blocking(move || files.iter().try_for_each(File::sync_data));
        self.syncing = Some(Syncing { to: self.received, task });
        Ok(())
    }

    /// A piece is durable: says so, and lets go of what was kept for it.
    pub(super) async fn confirm(&mut self, stored: Stored) -> Result<()> {
        if let (Some(spool), true) = (&mut self.held.spool, stored.completes) {
            spool.release(stored.segment)?;
        }
        // A piece of the timeline before says nothing about this one.
        if stored.segment.timeline != self.stream.timeline() {
            return Ok(());
        }
        self.durable = self.durable.max(stored.end);
        let now = self.setting.monitor.env.now();
        let waited = self.held.lag.remove(self.durable, now);
        let (to, waiting_since) = (self.durable, self.held.lag.since());
        self.setting.monitor.update(|state| (state.durable, state.waiting_since) = (to, waiting_since));
        self.setting.monitor.tell(StreamEvent::Durable { to, timeline: self.stream.timeline(), waited });
        self.acknowledge(false).await
    }

    /// What the server may forget.
    fn confirmed(&self) -> Lsn {
        match &self.setting.options.spool {
            Some(spool) if spool.durable => self.durable.max(self.spooled),
            _ => self.durable,
        }
    }

    /// Reports the durable end, and nothing more (R2, H18).
    ///
    /// Nothing is said about what lies before the slot's own position: the server takes every word for the slot's new place,
    /// a step back as well, and a slot that was moved back onto removed WAL holds nothing (R5).
    async fn acknowledge(&mut self, reply: bool) -> Result<()> {
        let flush = self.confirmed();
        let write = flush.max(self.spooled);
        let ack = if flush >= self.kept { Acknowledgement { write, flush, apply: flush } } else { Acknowledgement::default() };
        self.stream.send_status(ack, reply, self.setting.monitor.env.now()).await
    }
}

/// The code of the error that means: wait until the store has caught up.
pub(super) const BEHIND: &str = "wal.behind";

/// The end of what became durable in the spool; waits for ever when nothing is on its way.
async fn synced(syncing: &mut Option<Syncing>) -> Result<Lsn> {
    let Some(Syncing { to, task }) = syncing else { return std::future::pending().await };
    let to = *to;
    let outcome = task.await;
    *syncing = None;
    outcome
        .map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
        .map_err(|e| Error::new(ErrorKind::Failed, "spool.fsync", format!("fsync the spool: {e}")))?;
    Ok(to)
}

/// Sleeps until a moment; for ever without one.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
