//! `wal stream`: WAL from a replication slot into the vault, as the server writes it.
//!
//! ```text
//! start: the slot, the oldest place that the vault lacks -> receive: messages to pieces -> upload: pieces into the vault
//!                                                             |  ^                             |
//!                                                    spool <--'  '--- confirmed, in order <----'
//! ```
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
//!
//! **The store is down**: what has arrived is tried again for as long as it takes, a few segments are held in memory (or more in the
//! [spool](super::spool)), and the server keeps the rest, which [`Retention`] watches.

mod lag;
mod monitor;
mod press;
mod receive;
mod retention;
mod slot_watch;
mod start;
mod upload;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub use monitor::{StreamEvent, StreamState};
pub use retention::{Pressure, Retention};

use self::lag::Lag;
use self::monitor::Monitor;
use self::receive::Receiver;
use self::start::{Begin, Learnt};
use self::upload::Uploads;
use super::spool::{Spool, SpoolOptions};
use super::take;
use crate::postgres::{ConnInfo, Connection, Lsn, Mode, SegmentSize, ServerError, WalSegNo, sqlstate};
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// Waits between a lost connection and the next attempts, each twice as long as the one before.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// What the server refuses for good: a slot of another kind, a role without the right.
const REFUSED: [&str; 2] = [sqlstate::FEATURE_NOT_SUPPORTED, sqlstate::INSUFFICIENT_PRIVILEGE];

/// How long what was received may take to be stored when the stream is asked to end. What is not then is still with the server.
const FAREWELL: Duration = Duration::from_secs(15);

/// The part of that for which the server is kept waiting to hear of it, should it be stopping as well.
const ATTACHED: Duration = Duration::from_secs(2);

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
    /// A second place for what the store does not take.
    pub spool: Option<SpoolOptions>,
    /// The server's `pg_wal`, when it is on this machine: its disk is watched.
    pub pg_wal: Option<PathBuf>,
    /// Where what is going on is told.
    pub events: mpsc::UnboundedSender<StreamEvent>,
    /// Where the stream stands.
    pub state: watch::Sender<StreamState>,
}

impl StreamOptions {
    /// The usual way to stream: every second, without a spool. Events go to the returned receiver.
    pub fn new(connection: ConnInfo, slot: impl Into<String>) -> (Self, mpsc::UnboundedReceiver<StreamEvent>) {
        let (events, told) = mpsc::unbounded_channel();
        let options = Self {
            connection,
            slot: slot.into(),
            flush_interval: Duration::from_secs(1),
            synchronous: false,
            any_timeline: false,
            receive_timeout: Duration::from_secs(60),
            spool: None,
            pg_wal: None,
            events,
            state: watch::Sender::default(),
        };
        (options, told)
    }
}

/// What does not change while a stream lives.
#[derive(Clone, Copy)]
struct Setting<'a> {
    cluster: &'a Cluster,
    options: &'a StreamOptions,
    monitor: &'a Monitor,
}

/// What outlives a connection: WAL that has arrived, and since when some is missing.
struct Held<'a> {
    uploads: &'a mut Uploads,
    spool: Option<&'a mut Spool>,
    lag: &'a mut Lag,
}

/// Streams until `stop` becomes true.
///
/// Trouble with the server or the store is reported as an event and tried again for ever.
///
/// # Errors
/// Only what trying again cannot help: a foreign server, another server on the same timeline, a refused login, a spool that cannot
/// be written.
pub async fn stream(cluster: &Cluster, options: &StreamOptions, mut stop: watch::Receiver<bool>) -> Result<()> {
    let monitor = Monitor { env: cluster.env().clone(), events: options.events.clone(), state: options.state.clone() };
    monitor.disconnected();
    let mut uploads = Uploads::new(cluster, &monitor);
    let mut spool = options.spool.as_ref().map(|spool| Spool::open(spool, cluster)).transpose()?;
    let watching = slot_watch::watch(options.connection.clone(), options.slot.clone(), options.pg_wal.clone(), monitor.clone());
    let streaming = async {
        if let Some(spool) = &mut spool {
            tokio::select! {
                stored = store_what_is_left(spool, &mut uploads) => stored?,
                () = stopped(&mut stop) => return farewell(&mut uploads, None).await,
            }
        }
        let mut server = Learnt::default();
        let mut lag = Lag::default();
        let setting = Setting { cluster, options, monitor: &monitor };
        let mut pause = RECONNECT.0;
        loop {
            // What an earlier connection brought comes first: where the next one begins is what the vault has then.
            tokio::select! {
                stored = drain(&mut uploads, spool.as_mut()) => {
                    stored?;
                    if let Some(spool) = &mut spool {
                        spool.clear()?;
                    }
                }
                () = stopped(&mut stop) => {}
            }
            if *stop.borrow() {
                return farewell(&mut uploads, spool.as_mut()).await;
            }
            let held = Held { uploads: &mut uploads, spool: spool.as_mut(), lag: &mut lag };
            let outcome = session(setting, held, &mut stop, &mut server).await;
            if monitor.disconnected() {
                pause = RECONNECT.0;
            }
            let says = |error: &Error, state: &str| ServerError::of(error).is_some_and(|server| server.sqlstate == state);
            match outcome {
                Ok(()) => return farewell(&mut uploads, spool.as_mut()).await,
                Err(error) if says(&error, sqlstate::UNDEFINED_FILE) && server.refused() => continue,
                Err(error) if error.code() == receive::BEHIND => monitor.behind(&error),
                Err(error) if REFUSED.iter().any(|state| says(&error, state)) => return Err(error),
                Err(error) if matches!(error.kind(), ErrorKind::Source | ErrorKind::Storage) && error.code() != "source.auth" => {
                    match error.kind() {
                        ErrorKind::Storage => monitor.store_failed(&error),
                        _ => monitor.interrupted(&error),
                    }
                    tokio::select! {
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(RECONNECT.1),
                        () = stopped(&mut stop) => {}
                    }
                }
                Err(error) => return Err(error),
            }
            // The next connection may reach another server.
            server = Learnt::default();
        }
    };
    tokio::select! {
        ended = streaming => ended,
        () = watching => Ok(()),
    }
}

/// Waits until the stream is to end.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone will never ask to stop.
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Stores what a process before this one has left in the spool.
async fn store_what_is_left(spool: &mut Spool, uploads: &mut Uploads) -> Result<()> {
    for segment in spool.segments() {
        match spool.left(segment)? {
            Some(piece) => {
                uploads.add(piece, None);
                let _ = uploads.first().await?;
                spool.release(segment)?;
            }
            None => spool.set_aside(segment)?,
        }
    }
    Ok(())
}

/// Waits until everything that has arrived is stored.
async fn drain(uploads: &mut Uploads, mut spool: Option<&mut Spool>) -> Result<()> {
    while !uploads.is_empty() {
        let stored = uploads.first().await?;
        if let (Some(spool), true) = (&mut spool, stored.completes) {
            spool.release(stored.segment)?;
        }
    }
    Ok(())
}

/// Stores what has arrived, for a while.
async fn farewell(uploads: &mut Uploads, spool: Option<&mut Spool>) -> Result<()> {
    tokio::time::timeout(FAREWELL, drain(uploads, spool)).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Storage, "wal.not_stored", "ended before everything received was stored")
            .with_hint("nothing is lost: the replication slot keeps what was not confirmed"))
    })
}

/// A connection that is ready to stream.
struct Ready {
    connection: Connection,
    size: SegmentSize,
    begin: Begin,
    /// What the slot stands at.
    kept: Lsn,
    /// The end of the server's WAL.
    end: Lsn,
}

/// Connects, and finds out where to begin.
async fn prepare(setting: Setting<'_>, server: &mut Learnt) -> Result<Ready> {
    let Setting { cluster, options, .. } = setting;
    let mut connection = Connection::connect(&options.connection, Mode::Replication).await?;
    connection.set_idle_timeout(Some(options.receive_timeout));
    let identity = connection.identify_system().await?;
    cluster.ensure_is(identity.system_id)?;
    let size = connection.wal_segment_size().await?;
    if options.spool.as_ref().is_some_and(|spool| spool.limit < 2 * size.bytes()) {
        let why = format!("the spool holds less than two segments of {} bytes", size.bytes());
        return Err(Error::new(ErrorKind::Usage, "spool.too_small", why).with_hint("raise wal.spool_limit"));
    }
    let kept = start::slot(setting, &mut connection, size, server).await?.unwrap_or(identity.flush_lsn);
    let begin = start::start_point(setting, &mut connection, size, &identity, kept, server).await?;
    Ok(Ready { connection, size, begin, kept, end: identity.flush_lsn })
}

/// One connection's life.
async fn session(setting: Setting<'_>, held: Held<'_>, stop: &mut watch::Receiver<bool>, server: &mut Learnt) -> Result<()> {
    let Setting { cluster, options, monitor } = setting;
    let Held { uploads, mut spool, lag } = held;
    // What the server wrote while nobody was connected has been missing since then.
    let disconnected = monitor.state.borrow().disconnected_since.unwrap_or_else(|| monitor.env.now());
    let Ready { mut connection, size, mut begin, mut kept, end } = tokio::select! {
        ready = prepare(setting, server) => ready?,
        () = stopped(stop) => return Ok(()),
    };
    loop {
        let Begin { timeline, from, stored } = begin;
        let _ = take::ensure_history(cluster, &mut connection, timeline).await?;
        let start = WalSegNo::containing(from, size).start(size);
        server.asked = start;
        monitor.tell(StreamEvent::Started { from: start, timeline });
        let mut stream = connection.start_replication(Some(&options.slot), start, timeline).await?;
        stream.resume_acknowledged(from);
        let _ = lag.remove(from, monitor.env.now());
        if end > from {
            lag.add(end, disconnected);
        }
        let waiting_since = lag.since();
        monitor.update(|state| {
            (state.connected, state.disconnected_since, state.connection_trouble) = (true, None, None);
            (state.timeline, state.received, state.durable, state.server) = (Some(timeline), from, from, end.max(from));
            state.waiting_since = waiting_since;
        });
        let held = Held { uploads: &mut *uploads, spool: spool.as_deref_mut(), lag: &mut *lag };
        let mut receiver = Receiver::new(setting, held, stream, size, (from, stored), kept);
        match receiver.run(stop).await? {
            None => {
                // Who is not told in time asks again, or has gone; storing goes on without the connection.
                if tokio::time::timeout(ATTACHED, receiver.drain()).await.unwrap_or(Ok(())).is_ok() && receiver.is_drained() {
                    let _ = tokio::time::timeout(ATTACHED, receiver.stream.stop()).await;
                }
                return Ok(());
            }
            Some((next, next_start)) => {
                // The end of the old timeline is only stored as a part; the new one's first segment repeats it.
                tokio::select! {
                    drained = receiver.drain() => drained?,
                    () = stopped(stop) => return Ok(()),
                }
                kept = receiver.kept();
                drop(receiver);
                if let Some(spool) = spool.as_deref_mut() {
                    spool.clear()?;
                }
                // The new timeline's first segment begins with a copy of the old one's bytes, which its own objects do not have.
                let from = WalSegNo::containing(next_start, size).start(size);
                begin = Begin { timeline: next, from, stored: Vec::new() };
                monitor.tell(StreamEvent::Switched { timeline: next });
            }
        }
    }
}
