//! `wal stream`: WAL from a replication slot into the vault, as the server writes it.
//!
//! **The acknowledgement rule.** The server forgets WAL that this process confirms. So the position it reports is always
//! the end of what is durable in the vault without a hole, never what has merely arrived. Segments are sealed and uploaded
//! a few at a time, but confirmed strictly in order.
//!
//! New WAL of the open segment is stored as a *part* after the flush interval, or at once when commits wait for it; one part at a
//! time, so what arrives while a PUT is under way goes with the next. Nothing is stored while nothing is written. The whole
//! segment supersedes its parts.
//!
//! A server that is being stopped waits for its receivers to confirm everything it has sent. Asked for a reply with
//! everything received, this process therefore stores the open segment as a part and confirms it, so that a stop takes
//! a PUT and not a timeout; when the store is down, it lets the server go.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::assemble::{Assembler, Piece};
use super::catalog::Catalog;
use super::take;
use crate::postgres::{
    Acknowledgement, ConnInfo, Connection, Lsn, Mode, SegmentName, SegmentSize, ServerError, SlotState, TimelineHistory,
    TimelineId, WalMessage, WalSegNo, WalStream, sqlstate,
};
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// Segments being stored at once; with the open one, what bounds memory.
const IN_FLIGHT: usize = 4;

/// How often the server hears where this process is, at least.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// How long a stopping server waits for an answer that does not confirm everything, and how many it gets.
const ANSWER_AFTER: Duration = Duration::from_millis(400);
const ANSWERS: u32 = 5;

/// Holes in the vault's WAL that the server is asked to fill, the newest; older ones are of less and less use.
const HOLES: usize = 8;

/// Wait between a lost connection and the next attempt.
const RECONNECT: Duration = Duration::from_secs(2);

/// How to stream.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// The server.
    pub connection: ConnInfo,
    /// The slot, created when it is missing.
    pub slot: String,
    /// The longest that new WAL waits before it is stored.
    pub flush_interval: Duration,
    /// Store new WAL at once, because commits wait for it. What arrives while a PUT is under way goes with the next.
    pub synchronous: bool,
    /// Stream from a server that another one has taken over from, as the vault has it.
    pub any_timeline: bool,
    /// How long the server may say nothing, though asked, before the connection is given up (H19).
    pub receive_timeout: Duration,
    /// Where what is going on is told.
    pub events: tokio::sync::mpsc::UnboundedSender<StreamEvent>,
}

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// The slot did not exist and was made.
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
    },
    /// The server went on to another timeline.
    Switched {
        /// The new timeline.
        timeline: TimelineId,
    },
    /// WAL between what the vault has and what the server still has is lost.
    Gap {
        /// First missing position.
        from: Lsn,
        /// First position that the server still has.
        to: Lsn,
    },
    /// The connection or the store failed; streaming goes on after a pause.
    Interrupted {
        /// Why.
        reason: String,
    },
}

/// Streams until `stop` becomes true.
///
/// Trouble with the server or the store is reported as an event and tried again for ever.
///
/// # Errors
/// Only what trying again cannot help: a foreign server, another server on the same timeline, a refused login.
pub async fn stream(cluster: &Cluster, options: &StreamOptions, mut stop: watch::Receiver<bool>) -> Result<()> {
    let mut server = Learnt::default();
    loop {
        // The session itself watches `stop`, so that it can store and confirm what it has received.
        let outcome = session(cluster, options, stop.clone(), &mut server).await;
        let says = |error: &Error, state| ServerError::of(error).is_some_and(|server| server.sqlstate == state);
        match outcome {
            Ok(()) => return Ok(()),
            Err(error) if says(&error, sqlstate::UNDEFINED_FILE) && server.lost.is_none_or(|lost| server.asked > lost) => {
                server.lost = Some(server.asked);
            }
            Err(error) if matches!(error.kind(), ErrorKind::Source | ErrorKind::Storage) && error.code() != "source.auth" => {
                tell(options, StreamEvent::Interrupted { reason: error.to_string() });
                tokio::select! {
                    () = tokio::time::sleep(RECONNECT) => {}
                    () = stopped(&mut stop) => return Ok(()),
                }
            }
            Err(error) => return Err(error),
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone will never ask to stop.
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn tell(options: &StreamOptions, event: StreamEvent) {
    // Nobody listening is no reason to stop archiving.
    let _ = options.events.send(event);
}

/// What a server has said about the WAL that it still has.
#[derive(Debug, Default)]
struct Learnt {
    /// Where streaming was asked for last.
    asked: Lsn,
    /// The last place for which it said that it has removed the WAL.
    lost: Option<Lsn>,
    /// That this was told.
    told: Option<Lsn>,
}

/// One connection's life.
async fn session(cluster: &Cluster, options: &StreamOptions, mut stop: watch::Receiver<bool>, server: &mut Learnt) -> Result<()> {
    let mut connection = Connection::connect(&options.connection, Mode::Replication).await?;
    let identity = connection.identify_system().await?;
    cluster.ensure_is(identity.system_id)?;
    let size = connection.wal_segment_size().await?;
    let begin = slot(&mut connection, options, size, server.lost).await?.unwrap_or(identity.flush_lsn);
    let position = (identity.timeline, identity.flush_lsn);
    let (mut timeline, mut from) = start_point(cluster, &mut connection, options, size, position, begin, server).await?;
    let mut kept = begin;
    loop {
        let _ = take::ensure_history(cluster, &mut connection, timeline).await?;
        let (assembler, start) = Assembler::resume(timeline, size, from);
        server.asked = start;
        tell(options, StreamEvent::Started { from: start, timeline });
        let mut stream = connection.start_replication(Some(&options.slot), start, timeline).await?;
        stream.resume_acknowledged(from);
        let mut receiver =
            Receiver { cluster, options, stream, assembler, queue: VecDeque::new(), received: start, durable: from, kept };
        match receiver.run(&mut stop).await? {
            None => return receiver.stream.stop().await,
            Some((next, next_start)) => {
                // The end of the old timeline is only stored as a part; the new one's first segment repeats it.
                receiver.drain().await?;
                kept = receiver.kept.max(receiver.durable);
                drop(receiver);
                timeline = next;
                // The new timeline's first segment begins with a copy of the old one's bytes, which its own objects do not have.
                from = WalSegNo::containing(next_start, size).start(size);
                tell(options, StreamEvent::Switched { timeline });
            }
        }
    }
}

/// Makes sure that there is a slot that keeps WAL; gives the position it keeps.
///
/// A slot that was never used, or that the server gave up because it kept too much, keeps nothing; newer servers refuse to
/// stream from the latter. So does a slot that points at WAL of which the server has just said (`lost`) that it is removed.
/// Such a slot is replaced by one that keeps WAL from the last checkpoint on.
async fn slot(connection: &mut Connection, options: &StreamOptions, size: SegmentSize, lost: Option<Lsn>) -> Result<Option<Lsn>> {
    let mut state = connection.read_replication_slot(&options.slot).await?;
    let holds = match state {
        SlotState::Missing | SlotState::Unreserved => false,
        SlotState::Reserved { restart_lsn, .. } => {
            lost.is_none_or(|lost| WalSegNo::containing(restart_lsn, size) > WalSegNo::containing(lost, size))
        }
    };
    if !holds {
        if state != SlotState::Missing {
            connection.drop_slot(&options.slot).await?;
        }
        connection.create_physical_slot(&options.slot, false, true).await?;
        tell(options, StreamEvent::SlotCreated { slot: options.slot.clone() });
        state = connection.read_replication_slot(&options.slot).await?;
    }
    Ok(match state {
        SlotState::Reserved { restart_lsn, .. } => Some(restart_lsn),
        SlotState::Missing | SlotState::Unreserved => None,
    })
}

/// Where to go on: at the oldest hole in the vault's WAL that the server can fill, else where that WAL ends, else where the slot begins.
///
/// What the vault has behind a hole (a backup's own WAL, a segment whose upload overtook another's) is not taken for everything before
/// it. Only the server knows what it still has, so it is asked, and asked again behind the place for which it said no.
async fn start_point(
    cluster: &Cluster,
    connection: &mut Connection,
    options: &StreamOptions,
    size: SegmentSize,
    (server_timeline, server_end): (TimelineId, Lsn),
    begin: Lsn,
    server: &mut Learnt,
) -> Result<(TimelineId, Lsn)> {
    let history = take::ensure_history(cluster, connection, server_timeline).await?;
    let catalog = Catalog::load(cluster, size, Lsn::INVALID).await?;
    if !options.any_timeline {
        ensure_not_left(&catalog, server_timeline, server_end)?;
    }
    let segment_start = |lsn: Lsn| WalSegNo::containing(lsn, size).start(size);
    let ends = ends(&catalog, &history);
    let recent = ends.get(ends.len().saturating_sub(HOLES)..).unwrap_or_default();
    let open = recent.iter().find(|end| server.lost.is_none_or(|lost| segment_start(end.at) > lost));
    let from = open.map_or(segment_start(begin), |end| end.at);
    let gone = server.lost.and_then(|lost| recent.iter().rfind(|end| segment_start(end.at) <= lost));
    if let Some(gone) = gone.filter(|_| server.told < server.lost) {
        server.told = server.lost;
        tell(options, StreamEvent::Gap { from: gone.at, to: gone.next.unwrap_or(from) });
    }
    let timeline = history.timeline_at(from);
    // Inside a segment only where the timeline's own objects reach: an ancestor's may end in the same segment.
    let start = segment_start(from);
    let own = SegmentName::new(timeline, WalSegNo::containing(from, size), size);
    let covered = catalog.timelines.get(&timeline).map_or(0, |objects| objects.covered(own, size));
    Ok((timeline, if start.advance(covered) >= from { from } else { start }))
}

/// Refuses a server that was promoted past: what it writes since is a branch that nobody follows, and archiving it would look as if all
/// were well (R6, H8).
fn ensure_not_left(catalog: &Catalog, timeline: TimelineId, end: Lsn) -> Result<()> {
    let mut heirs =
        catalog.histories.values().filter(|heir| catalog.timelines.get(&heir.timeline()).is_some_and(|o| o.last().is_some()));
    let left = |heir: &TimelineHistory| heir.switch_point_of(timeline).filter(|switch| *switch < end);
    let Some((heir, switch)) = heirs.find_map(|heir| Some((heir.timeline(), left(heir)?))) else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Conflict,
        "wal.left_timeline",
        format!("the server is at {end} on timeline {timeline}, but the vault holds WAL of timeline {heir}, which left it at {switch}"),
    )
    .with_hint(
        "if another server was promoted, stream from that one, and rebuild this one as its standby; if this is the right one and the \
         other was a copy that should not have archived here, say `--any-timeline`",
    ))
}

/// A place where WAL of a history ends in the vault.
struct End {
    at: Lsn,
    /// Where it goes on behind the hole.
    next: Option<Lsn>,
}

/// Where the vault's WAL ends on a history, oldest first: before each hole, and behind everything.
fn ends(catalog: &Catalog, history: &TimelineHistory) -> Vec<End> {
    let size = catalog.segment_size;
    let mut starts = BTreeSet::new();
    for timeline in history.ancestors().iter().map(|a| a.timeline).chain([history.timeline()]) {
        let Some(objects) = catalog.timelines.get(&timeline) else { continue };
        let here = objects.present().into_iter().filter_map(|segment| Some(segment.segment_number(size).ok()?.start(size)));
        let left = history.switch_point_of(timeline);
        starts.extend(here.filter(|start| left.is_none_or(|left| *start < left)));
    }
    let mut ends = Vec::new();
    let mut next = starts.first().copied();
    while let Some(from) = next {
        let at = catalog.contiguous_end(history, from);
        next = starts.range(Lsn(at.0.max(from.0 + 1))..).next().copied();
        ends.push(End { at, next });
    }
    ends
}

/// Sleeps until a moment; for ever without one.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// A server that asks again and again to have everything confirmed: it is stopping (R1, H3).
///
/// Measured on 15.20: it asks anew after every answer that confirms less, half a million times in 25 s, and waits for ever. So the
/// answer is held back, and when the store has not taken the WAL after some of them, the connection is closed: then the server stops,
/// and the slot keeps what was not confirmed.
#[derive(Default)]
struct Pressed {
    last: Option<Instant>,
    times: u32,
    answer_at: Option<Instant>,
}

impl Pressed {
    fn ask(&mut self) -> Result<()> {
        let now = Instant::now();
        // A question every half `wal_sender_timeout` is none of these.
        let again = self.last.is_some_and(|last| now.duration_since(last) < ANSWER_AFTER * 3);
        self.times = if again { self.times + 1 } else { 1 };
        self.last = Some(now);
        self.answer_at = Some(now + ANSWER_AFTER);
        if self.times > ANSWERS {
            return Err(Error::new(
                ErrorKind::Source,
                "source.stopping",
                "the server is stopping and waits for WAL that the store does not take; let it go, the slot keeps the WAL",
            ));
        }
        Ok(())
    }
}

/// One timeline's stream.
struct Receiver<'a> {
    cluster: &'a Cluster,
    options: &'a StreamOptions,
    stream: WalStream<'a>,
    assembler: Assembler,
    /// Pieces being stored, in WAL order.
    queue: VecDeque<(Lsn, JoinHandle<Result<()>>)>,
    received: Lsn,
    durable: Lsn,
    /// What the slot already stands at.
    kept: Lsn,
}

impl Receiver<'_> {
    /// Receives until the timeline ends (giving the next) or `stop` is set.
    async fn run(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Option<(TimelineId, Lsn)>> {
        let patience = self.options.receive_timeout;
        let mut status = tokio::time::interval(STATUS_INTERVAL.min(patience / 4));
        // An idle server is silent for as long as it hears from its receiver: whether it still lives, only a question tells.
        let mut heard = Instant::now();
        let mut flush_at: Option<Instant> = None;
        let mut pressed = Pressed::default();
        loop {
            let busy = self.queue.len() >= IN_FLIGHT;
            if busy {
                heard = Instant::now();
            }
            // One part at a time: what arrives meanwhile goes together with the next, so that a hundred commits cost one PUT.
            let may_flush = flush_at.is_some() && self.queue.is_empty();
            tokio::select! {
                biased;
                () = stopped(stop) => {
                    self.flush();
                    self.drain().await?;
                    return Ok(None);
                }
                stored = Self::first_stored(&mut self.queue) => {
                    self.confirm(stored?).await?;
                    if self.durable >= self.received {
                        pressed = Pressed::default();
                    }
                }
                () = sleep_until(flush_at), if may_flush => {
                    flush_at = None;
                    self.flush();
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
                message = self.stream.next(), if !busy => {
                    heard = Instant::now();
                    match message? {
                        WalMessage::Data { start, bytes, .. } => {
                            self.received = start.advance(bytes.len() as u64);
                            for piece in self.assembler.add(start, &bytes)? {
                                self.enqueue(piece);
                            }
                            if !self.assembler.has_news() {
                                flush_at = None;
                            } else if flush_at.is_none() {
                                let wait = if self.options.synchronous { Duration::ZERO } else { self.options.flush_interval };
                                flush_at = Some(Instant::now() + wait);
                            }
                        }
                        WalMessage::Keepalive { server_end, reply_requested, .. } if reply_requested => {
                            if self.received < server_end || self.durable >= self.received {
                                self.acknowledge(false).await?;
                            } else {
                                // A server that is stopping waits until everything it has sent is confirmed.
                                self.flush();
                                pressed.ask()?;
                            }
                        }
                        WalMessage::Keepalive { .. } => {}
                        WalMessage::EndOfTimeline { next_timeline, next_start } => {
                            self.flush();
                            return Ok(Some((next_timeline, next_start)));
                        }
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        if let Some(piece) = self.assembler.flush() {
            self.enqueue(piece);
        }
    }

    fn enqueue(&mut self, piece: Piece) {
        let (end, cluster) = (piece.end, self.cluster.clone());
        self.queue.push_back((end, tokio::spawn(async move { take::store(&cluster, piece).await })));
    }

    /// Waits until the oldest piece is stored; for ever when there is none.
    async fn first_stored(queue: &mut VecDeque<(Lsn, JoinHandle<Result<()>>)>) -> Result<Lsn> {
        let Some((end, task)) = queue.front_mut() else { return std::future::pending().await };
        let end = *end;
        let stored = task.await;
        let _ = queue.pop_front();
        stored.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        Ok(end)
    }

    async fn drain(&mut self) -> Result<()> {
        while !self.queue.is_empty() {
            let end = Self::first_stored(&mut self.queue).await?;
            self.confirm(end).await?;
        }
        Ok(())
    }

    async fn confirm(&mut self, end: Lsn) -> Result<()> {
        self.durable = self.durable.max(end);
        tell(self.options, StreamEvent::Durable { to: self.durable, timeline: self.stream.timeline() });
        self.acknowledge(false).await
    }

    /// Reports the durable end, and nothing more (R2, H18).
    ///
    /// Nothing is said about what lies before the slot's own position: the server takes every word for the slot's new place,
    /// a step back as well, and a slot that was moved back onto removed WAL holds nothing (R5).
    async fn acknowledge(&mut self, reply: bool) -> Result<()> {
        let reached = if self.durable >= self.kept { self.durable } else { Lsn::INVALID };
        let ack = Acknowledgement { write: reached, flush: reached, apply: reached };
        self.stream.send_status(ack, reply, self.cluster.env().now()).await
    }
}
