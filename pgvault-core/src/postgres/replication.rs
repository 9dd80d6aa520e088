//! The physical replication commands and the WAL stream.
//!
//! What the server does here is measured, not read in the manual: the notes of the project on PostgreSQL 15.20, repeated at
//! each place they matter. The grammar is `src/backend/replication/repl_gram.y`, the behaviour `walsender.c`.

use bytes::{BufMut, Bytes};
use jiff::Timestamp;
use postgres_protocol::message::frontend;

use super::connection::{Connection, protocol, quote_identifier, unexpected};
use super::message::{Fields, Frame, ServerError, data_row, sqlstate};
use super::{Lsn, ParseError, SegmentSize, SystemId, TimelineId};
use crate::{Error, ErrorKind, Result};

/// Microseconds from 1970 to PostgreSQL's epoch, 2000-01-01.
const EPOCH: i64 = 946_684_800_000_000;

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster. To be compared on every connect: a host name can lead to another cluster any day.
    pub system_id: SystemId,
    /// The timeline the server is on.
    pub timeline: TimelineId,
    /// How far the server has flushed (on a standby: received or replayed) its WAL.
    pub flush_lsn: Lsn,
    /// The database of the connection; `None` for physical replication.
    pub dbname: Option<String>,
}

/// What is known of a physical slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// There is no slot of that name.
    Missing,
    /// It holds nothing back: never used and not reserved, **or lost** because the server removed WAL it needed. The
    /// replication protocol does not tell these apart; `pg_replication_slots.wal_status` does.
    Unreserved,
    /// The server keeps WAL from here on.
    Reserved {
        /// The oldest position that is kept.
        restart_lsn: Lsn,
        /// The timeline of that position.
        restart_timeline: TimelineId,
    },
}

/// A timeline history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistoryFile {
    /// Its name, `00000002.history`.
    pub name: String,
    /// Its content, byte for byte.
    pub content: Bytes,
}

impl Connection {
    /// Asks which cluster this is and where it stands.
    ///
    /// # Errors
    /// When the connection is not for replication, or fails.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let row = self.query_one("IDENTIFY_SYSTEM").await?;
        let timeline = row.required(1)?;
        let timeline =
            timeline.parse().map_err(|_| protocol(ParseError::new("IDENTIFY_SYSTEM", format!("timeline `{timeline}`"))))?;
        Ok(SystemIdentity {
            system_id: row.required(0)?.parse().map_err(protocol)?,
            timeline: TimelineId(timeline),
            flush_lsn: row.required(2)?.parse().map_err(protocol)?,
            dbname: row.text(3)?.map(str::to_owned),
        })
    }

    /// The value of a setting.
    ///
    /// # Errors
    /// When the name is not one that settings have, or the server does not know it.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.')) {
            return Err(Error::new(ErrorKind::Usage, "source.setting_name", format!("`{name}` is not the name of a setting")));
        }
        let row = self.query_one(&format!("SHOW {name}")).await?;
        Ok(row.required(0)?.to_owned())
    }

    /// The size of the cluster's WAL segments.
    ///
    /// # Errors
    /// As [`Connection::show`].
    pub async fn wal_segment_size(&mut self) -> Result<SegmentSize> {
        let text = self.show("wal_segment_size").await?;
        parse_segment_size(&text).map_err(protocol)
    }

    /// What a physical slot holds back.
    ///
    /// # Errors
    /// When the slot is a logical one, or the connection fails.
    pub async fn read_replication_slot(&mut self, name: &str) -> Result<SlotState> {
        let row = self.query_one(&format!("READ_REPLICATION_SLOT {}", quote_identifier(name))).await?;
        if row.text(0)?.is_none() {
            return Ok(SlotState::Missing);
        }
        let (Some(lsn), Some(timeline)) = (row.text(1)?, row.text(2)?) else { return Ok(SlotState::Unreserved) };
        let timeline =
            timeline.parse().map_err(|_| protocol(ParseError::new("READ_REPLICATION_SLOT", format!("timeline `{timeline}`"))))?;
        Ok(SlotState::Reserved { restart_lsn: lsn.parse().map_err(protocol)?, restart_timeline: TimelineId(timeline) })
    }

    /// Creates a physical slot.
    ///
    /// With `reserve_wal` the server keeps WAL from its last checkpoint's redo position on, at once (R4: without it the
    /// slot keeps nothing until the first *flush* position is reported, and what is written before is lost).
    ///
    /// # Errors
    /// [`sqlstate::DUPLICATE_OBJECT`] when it exists.
    pub async fn create_physical_slot(&mut self, name: &str, temporary: bool, reserve_wal: bool) -> Result<()> {
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let reserve = if reserve_wal { " (RESERVE_WAL)" } else { "" };
        let command = format!("CREATE_REPLICATION_SLOT {}{temporary} PHYSICAL{reserve}", quote_identifier(name));
        self.simple_query(&command).await.map(drop)
    }

    /// Removes a slot that nobody streams from.
    ///
    /// # Errors
    /// [`sqlstate::UNDEFINED_OBJECT`] when there is none, [`sqlstate::OBJECT_IN_USE`] when it is in use.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        self.simple_query(&format!("DROP_REPLICATION_SLOT {}", quote_identifier(name))).await.map(drop)
    }

    /// The history file of a timeline; `None` when the server has none, as always for timeline 1.
    ///
    /// # Errors
    /// When the connection fails or the server's answer is for another timeline.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Option<TimelineHistoryFile>> {
        let row = match self.query_one(&format!("TIMELINE_HISTORY {timeline}")).await {
            Ok(row) => row,
            Err(error) if ServerError::of(&error).is_some_and(|server| server.sqlstate == sqlstate::UNDEFINED_FILE) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let name = row.required(0)?.to_owned();
        let expected = format!("{}.history", timeline.hex());
        if name != expected {
            return Err(protocol(ParseError::new("TIMELINE_HISTORY", format!("the file is named `{name}`, not `{expected}`"))));
        }
        let content = row.bytes(1)?.cloned().unwrap_or_default();
        Ok(Some(TimelineHistoryFile { name, content }))
    }

    /// Starts streaming at `lsn`, which should be the start of a segment, on `timeline`.
    ///
    /// A slot that was *lost* refuses its old position, but accepts the server's current one without a word: starting
    /// "where the server is" makes an invisible gap. Start where the archive ends.
    ///
    /// # Errors
    /// A position that is not on the timeline is refused here. A position ahead of the server, and WAL that was removed
    /// already ([`sqlstate::UNDEFINED_FILE`]), are refused by the first [`WalStream::next`]: the server looks only after it
    /// has agreed to stream.
    pub async fn start_replication(&mut self, slot: Option<&str>, lsn: Lsn, timeline: TimelineId) -> Result<WalStream<'_>> {
        let slot = slot.map(|name| format!("SLOT {} ", quote_identifier(name))).unwrap_or_default();
        self.begin(&format!("START_REPLICATION {slot}PHYSICAL {lsn} TIMELINE {timeline}"))?;
        let frame = self.read().await?;
        let phase = match frame.tag {
            b'W' => Phase::Streaming,
            // A timeline that ends exactly at `lsn`: there is nothing to copy, the result row follows at once.
            b'T' => Phase::Result,
            b'E' => return Err(self.failed(frame).await),
            _ => return Err(unexpected(&frame, "START_REPLICATION")),
        };
        Ok(WalStream { connection: self, timeline, phase, sent_done: false, next: None, failed: None, acks: AckGuard::new(lsn) })
    }
}

fn parse_segment_size(text: &str) -> Result<SegmentSize, ParseError> {
    let bad = || ParseError::new("wal_segment_size", format!("`{text}` is not a size"));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().map_err(|_| bad())?;
    let unit = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return Err(bad()),
    };
    SegmentSize::try_from(number.checked_mul(unit).ok_or_else(bad)?)
}

/// What came from a [`WalStream`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalMessage {
    /// A piece of WAL, at most 128 KiB. It starts and ends anywhere: in the middle of a page, across a segment boundary.
    Data {
        /// Position of the first byte; always where the message before ended.
        start: Lsn,
        /// How far the server's WAL reaches.
        server_end: Lsn,
        /// The server's clock.
        server_time: Timestamp,
        /// The WAL.
        bytes: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// How far the server has sent.
        server_end: Lsn,
        /// The server's clock.
        server_time: Timestamp,
        /// The server wants a status now, because it is shutting down or about to give this receiver up.
        reply_requested: bool,
    },
    /// The timeline ended; the stream is over and the connection can be used for commands.
    EndOfTimeline {
        /// The timeline that follows. Not always this one plus one.
        next_timeline: TimelineId,
        /// Where it branched off: at or before the end of what was received, never after.
        next_start: Lsn,
    },
}

/// What a receiver has done with the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Acknowledgement {
    /// Received.
    pub write: Lsn,
    /// Durable. [`Lsn::INVALID`] when nothing is to be said about it; the server then neither moves the slot nor counts
    /// this receiver as a synchronous standby.
    pub flush: Lsn,
    /// Applied. [`Lsn::INVALID`] for an archive, or equal to `flush`.
    pub apply: Lsn,
}

/// Refuses acknowledgements that would make the server throw away WAL that nobody has.
///
/// The server trusts blindly: measured on 15.20, a flush position 256 MiB ahead of what had been sent moved the slot there,
/// and going back was accepted too. So the rule is kept on this side (R2): `apply <= flush <= write <= received`, and
/// nothing ever goes back.
#[derive(Debug, Clone)]
struct AckGuard {
    /// The end of what this stream has brought without a hole.
    received: Lsn,
    /// The end of what an earlier stream made durable.
    resumed: Lsn,
    last: Acknowledgement,
}

impl AckGuard {
    fn new(start: Lsn) -> Self {
        Self { received: start, resumed: Lsn::INVALID, last: Acknowledgement::default() }
    }

    fn check(&mut self, ack: Acknowledgement) -> Result<()> {
        let Acknowledgement { write, flush, apply } = ack;
        let last = self.last;
        let known = self.received.max(self.resumed);
        let rules = [
            (write > known, "write", write, "received", known),
            (flush > write, "flush", flush, "write", write),
            (apply > flush, "apply", apply, "flush", flush),
            (write < last.write, "the earlier write", last.write, "write", write),
            (flush < last.flush, "the earlier flush", last.flush, "flush", flush),
            (apply < last.apply, "the earlier apply", last.apply, "apply", apply),
        ];
        for (broken, greater, greater_lsn, less, less_lsn) in rules {
            if broken {
                let message =
                    format!("refused to acknowledge WAL: {greater} position {greater_lsn} is beyond {less} position {less_lsn}");
                return Err(Error::new(ErrorKind::Failed, "wal.ack_refused", message).with_hint(
                    "this is a bug in pgvault: sending it could have made PostgreSQL remove WAL that is not in the vault",
                ));
            }
        }
        self.last = ack;
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Streaming,
    /// Both sides are done copying; the result row and the command tags follow.
    Result,
    Ended,
}

/// A running `START_REPLICATION`.
///
/// All futures are cancel-safe, so [`WalStream::next`] can stand in a `select!` beside a flush timer. Dropping the stream
/// before its end leaves the connection busy; [`WalStream::stop`] ends it in order.
#[derive(Debug)]
pub struct WalStream<'a> {
    connection: &'a mut Connection,
    timeline: TimelineId,
    phase: Phase,
    sent_done: bool,
    next: Option<(TimelineId, Lsn)>,
    /// What the server said went wrong, until it was told: telling takes an answer, and who waits for it may be cancelled.
    failed: Option<Frame>,
    acks: AckGuard,
}

impl WalStream<'_> {
    /// The timeline that is streamed.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The end of what was received without a hole.
    pub fn received(&self) -> Lsn {
        self.acks.received
    }

    /// Bounds the silence of the server; it sends a keepalive at least every half `wal_sender_timeout` (default 30 s).
    pub fn set_idle_timeout(&mut self, limit: Option<std::time::Duration>) {
        self.connection.set_idle_timeout(limit);
    }

    /// Declares that WAL up to `durable` was made durable by an earlier connection, so that it may be acknowledged although
    /// this stream, which starts at a segment's start, has not repeated it yet. The caller answers for the truth of it.
    pub fn resume_acknowledged(&mut self, durable: Lsn) {
        self.acks.resumed = self.acks.resumed.max(durable);
    }

    /// The next message. After [`WalMessage::EndOfTimeline`] the stream is over.
    ///
    /// # Errors
    /// Besides those of the connection: `source.gap` when a message does not continue where the one before ended (R3, H14),
    /// `source.shutdown` when the server stops, `source.stream_ended` after the end.
    pub async fn next(&mut self) -> Result<WalMessage> {
        loop {
            if let Some(frame) = self.failed.clone() {
                return Err(self.fail(frame).await);
            }
            match self.phase {
                Phase::Streaming => {
                    let frame = self.connection.read().await?;
                    if let Some(message) = self.copy_frame(frame).await? {
                        return Ok(message);
                    }
                }
                Phase::Result => {
                    self.read_result().await?;
                    let Some((next_timeline, next_start)) = self.next else {
                        let message = "PostgreSQL ended the stream without naming a next timeline";
                        return Err(Error::new(ErrorKind::Source, "source.stream_ended", message));
                    };
                    return Ok(WalMessage::EndOfTimeline { next_timeline, next_start });
                }
                Phase::Ended => return Err(Error::new(ErrorKind::Failed, "source.stream_ended", "the WAL stream is over")),
            }
        }
    }

    /// A message of the copy phase. `None` when it changed the phase.
    async fn copy_frame(&mut self, frame: Frame) -> Result<Option<WalMessage>> {
        match frame.tag {
            b'd' => {
                let message = decode(frame.body).map_err(|why| self.connection.broken(why))?;
                if let WalMessage::Data { start, bytes, .. } = &message {
                    let expected = self.acks.received;
                    if *start != expected {
                        let why = format!("WAL from {start} arrived where {expected} was expected on timeline {}", self.timeline);
                        let error = self.connection.broken(ParseError::new("WAL stream", why.clone()));
                        return Err(Error::new(ErrorKind::Source, "source.gap", why).with_source(error));
                    }
                    self.acks.received = expected.advance(bytes.len() as u64);
                }
                Ok(Some(message))
            }
            b'c' => {
                self.done();
                self.phase = Phase::Result;
                Ok(None)
            }
            // A walsender that shuts down ends with the bare tag `COPY 0` and closes the socket (`WalSndDone`).
            b'C' => {
                let why = "PostgreSQL is shutting down and has sent all its WAL";
                drop(self.connection.broken(ParseError::new("WAL stream", why)));
                Err(Error::new(ErrorKind::Source, "source.shutdown", why))
            }
            b'E' => Err(self.fail(frame).await),
            _ => Err(self.connection.broken(ParseError::new("WAL stream", unexpected(&frame, "copy").to_string()))),
        }
    }

    async fn fail(&mut self, frame: Frame) -> Error {
        self.failed = Some(frame.clone());
        let error = self.connection.failed(frame).await;
        (self.failed, self.phase) = (None, Phase::Ended);
        error
    }

    fn done(&mut self) {
        if !self.sent_done {
            self.sent_done = true;
            self.connection.enqueue(frontend::copy_done);
        }
    }

    /// Reads what follows the copy: for an ended timeline a row, then **two** command tags (`START_STREAMING`,
    /// `START_REPLICATION`), then the prompt.
    async fn read_result(&mut self) -> Result<()> {
        loop {
            let frame = self.connection.read().await?;
            match frame.tag {
                // Data may still have been under way when our CopyDone was sent.
                b'T' | b'C' | b'c' | b'd' => {}
                b'D' => {
                    let row = data_row(frame.body).map_err(|why| self.connection.broken(why))?;
                    self.next = Some(next_timeline(&row).map_err(|why| self.connection.broken(why))?);
                }
                b'E' => return Err(self.fail(frame).await),
                b'Z' => {
                    self.connection.end();
                    self.phase = Phase::Ended;
                    return Ok(());
                }
                _ => return Err(self.connection.broken(ParseError::new("WAL stream", unexpected(&frame, "its end").to_string()))),
            }
        }
    }

    /// Tells the server how far this receiver is. `now` is this side's clock, which the server only displays.
    ///
    /// That the connection is broken is reported by [`WalStream::next`], which may still find the server's reason.
    ///
    /// # Errors
    /// `wal.ack_refused`, and nothing is sent, when a position is ahead of what was received, of the position it depends
    /// on, or behind what was said before.
    pub async fn send_status(&mut self, ack: Acknowledgement, reply_requested: bool, now: Timestamp) -> Result<()> {
        if self.phase != Phase::Streaming || self.sent_done {
            return Ok(());
        }
        self.acks.check(ack)?;
        self.connection.enqueue(|output| {
            output.put_u8(b'd');
            output.put_i32(4 + 34);
            output.put_u8(b'r');
            output.put_u64(ack.write.0);
            output.put_u64(ack.flush.0);
            output.put_u64(ack.apply.0);
            output.put_i64(now.as_microsecond().saturating_sub(EPOCH));
            output.put_u8(u8::from(reply_requested));
        });
        match self.connection.flush().await {
            // Nothing that was acknowledged here is lost by the server not hearing it; why it went away, `next` will tell.
            Err(error) if error.code() == "source.io" => Ok(()),
            sent => sent,
        }
    }

    /// Ends the stream from this side and leaves the connection ready for commands. WAL that is still under way is
    /// discarded.
    ///
    /// # Errors
    /// When the connection fails meanwhile.
    pub async fn stop(mut self) -> Result<()> {
        if self.phase == Phase::Ended {
            return Ok(());
        }
        if self.phase == Phase::Streaming {
            self.done();
        }
        self.read_result().await
    }
}

fn decode(body: Bytes) -> Result<WalMessage, ParseError> {
    let mut fields = Fields::new("WAL stream", body);
    match fields.u8()? {
        b'w' => {
            let start = Lsn(fields.u64()?);
            let server_end = Lsn(fields.u64()?);
            let server_time = server_time(fields.i64()?);
            let bytes = fields.into_rest();
            if start.0.checked_add(bytes.len() as u64).is_none() {
                return Err(ParseError::new("WAL stream", format!("WAL at {start} reaches beyond the last position")));
            }
            Ok(WalMessage::Data { start, server_end, server_time, bytes })
        }
        b'k' => Ok(WalMessage::Keepalive {
            server_end: Lsn(fields.u64()?),
            server_time: server_time(fields.i64()?),
            reply_requested: fields.u8()? != 0,
        }),
        other => Err(ParseError::new("WAL stream", format!("message of the type '{}'", other.escape_ascii()))),
    }
}

/// A server's clock may show anything; a time that does not exist becomes the nearest that does.
fn server_time(micros: i64) -> Timestamp {
    let micros = micros.saturating_add(EPOCH);
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 { Timestamp::MIN } else { Timestamp::MAX })
}

fn next_timeline(row: &[Option<Bytes>]) -> Result<(TimelineId, Lsn), ParseError> {
    let [Some(timeline), Some(start)] = row else {
        return Err(ParseError::new("end of timeline", "the row does not have two values"));
    };
    let text = |bytes| std::str::from_utf8(bytes).map_err(|_| ParseError::new("end of timeline", "the row is not text"));
    let timeline = text(timeline)?;
    match timeline.parse() {
        Ok(number) if number > 0 => Ok((TimelineId(number), text(start)?.parse()?)),
        _ => Err(ParseError::new("end of timeline", format!("timeline `{timeline}`"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::connection::testing::*;
    use super::*;

    fn wal(start: u64, bytes: &[u8]) -> Vec<u8> {
        let mut body = vec![b'w'];
        body.put_u64(start);
        body.put_u64(start + bytes.len() as u64);
        body.put_i64(0);
        body.extend_from_slice(bytes);
        message(b'd', &body)
    }

    fn both() -> Vec<u8> {
        message(b'W', &[0, 0, 0])
    }

    #[tokio::test]
    async fn the_end_of_a_timeline_leaves_the_connection_usable() {
        let (mut connection, mut server) = pair();
        let mut answer = both();
        answer.extend(wal(0x0100_0000, b"abc"));
        answer.extend(message(b'c', b""));
        answer.extend(row(&["next_tli", "next_tli_startpos"], &[Some("4"), Some("0/1000002")]));
        answer.extend(complete("START_STREAMING"));
        answer.extend(complete("START_REPLICATION"));
        answer.extend(ready());
        answer.extend(row(&["wal_segment_size"], &[Some("16MB")]));
        answer.extend(complete("SHOW"));
        answer.extend(ready());
        server.write_all(&answer).await.unwrap();
        let mut stream = connection.start_replication(Some("s\"1"), Lsn(0x0100_0000), TimelineId(2)).await.unwrap();
        assert!(matches!(stream.next().await.unwrap(), WalMessage::Data { bytes, .. } if &bytes[..] == b"abc"));
        let end = WalMessage::EndOfTimeline { next_timeline: TimelineId(4), next_start: Lsn(0x0100_0002) };
        assert_eq!(stream.next().await.unwrap(), end);
        assert_eq!(stream.next().await.unwrap_err().code(), "source.stream_ended");
        assert_eq!(connection.wal_segment_size().await.unwrap(), SegmentSize::DEFAULT);
        drop(connection);
        let mut sent = Vec::new();
        server.read_to_end(&mut sent).await.unwrap();
        let mut expected = message(b'Q', b"START_REPLICATION SLOT \"s\"\"1\" PHYSICAL 0/1000000 TIMELINE 2\0");
        expected.extend(message(b'c', b""));
        expected.extend(message(b'Q', b"SHOW wal_segment_size\0"));
        assert_eq!(sent, expected);
    }

    #[tokio::test]
    async fn a_timeline_without_anything_left_ends_at_once() {
        let (mut connection, mut server) = pair();
        let mut answer = row(&["next_tli", "next_tli_startpos"], &[Some("2"), Some("0/3000000")]);
        answer.extend(complete("START_STREAMING"));
        answer.extend(complete("START_REPLICATION"));
        answer.extend(ready());
        server.write_all(&answer).await.unwrap();
        let mut stream = connection.start_replication(None, Lsn(0x0300_0000), TimelineId(1)).await.unwrap();
        assert!(matches!(stream.next().await.unwrap(), WalMessage::EndOfTimeline { next_timeline: TimelineId(2), .. }));
        assert!(connection.is_idle());
    }

    /// Who waits beside a timer gives up waiting in the middle of an error; the error is told all the same, to the next who asks.
    #[tokio::test]
    async fn an_error_that_was_not_waited_for_is_told_later() {
        let (mut connection, mut server) = pair();
        let mut answer = both();
        answer.extend(message(b'E', b"SERROR\0VERROR\0C58P01\0Mrequested WAL segment has already been removed\0\0"));
        server.write_all(&answer).await.unwrap();
        let mut stream = connection.start_replication(None, Lsn(0x0100_0000), TimelineId(1)).await.unwrap();
        let soon = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, stream.next()).await.is_err());
        server.write_all(&ready()).await.unwrap();
        let error = stream.next().await.unwrap_err();
        assert_eq!(ServerError::of(&error).unwrap().sqlstate, "58P01");
        assert_eq!(stream.next().await.unwrap_err().code(), "source.stream_ended");
        assert!(connection.is_idle());
    }

    /// H14, R3: a skipped segment, a repeated byte, and a first message that is not where the stream was asked to start.
    #[tokio::test]
    async fn h14_wal_that_does_not_continue_is_refused() {
        for (first, second) in [(0x0100_0000, 0x0200_0000), (0x0100_0000, 0x0100_0002), (0x0100_0008, 0)] {
            let (mut connection, mut server) = pair();
            let mut answer = both();
            answer.extend(wal(first, b"abc"));
            answer.extend(wal(second, b"abc"));
            server.write_all(&answer).await.unwrap();
            let mut stream = connection.start_replication(None, Lsn(0x0100_0000), TimelineId(1)).await.unwrap();
            let mut last = stream.next().await;
            if last.is_ok() {
                last = stream.next().await;
            }
            assert_eq!(last.unwrap_err().code(), "source.gap");
            assert!(!connection.is_idle());
        }
    }

    #[tokio::test]
    async fn a_shutdown_is_told_from_a_broken_connection() {
        let (mut connection, mut server) = pair();
        let mut answer = both();
        answer.extend(complete("COPY 0"));
        server.write_all(&answer).await.unwrap();
        drop(server);
        let mut stream = connection.start_replication(None, Lsn(0x0100_0000), TimelineId(1)).await.unwrap();
        assert_eq!(stream.next().await.unwrap_err().code(), "source.shutdown");
    }

    /// R2, H18: what the guard lets through never runs ahead and never goes back.
    #[test]
    fn r2_acknowledgements_keep_their_order() {
        let ack = |write, flush, apply| Acknowledgement { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply) };
        let mut guard = AckGuard { received: Lsn(100), resumed: Lsn(0), last: ack(50, 40, 0) };
        for bad in [(101, 40, 0), (60, 61, 0), (60, 50, 51), (49, 40, 0), (60, 39, 0), (60, 0, 0)] {
            let refused = guard.check(ack(bad.0, bad.1, bad.2)).unwrap_err();
            assert_eq!(refused.code(), "wal.ack_refused", "{bad:?}");
        }
        guard.check(ack(100, 100, 100)).unwrap();
        assert!(guard.check(ack(100, 100, 0)).is_err());
        guard.resumed = Lsn(120);
        guard.check(ack(120, 110, 100)).unwrap();
        assert!(guard.check(ack(121, 110, 100)).is_err());
    }

    #[test]
    fn segment_sizes_come_with_units() {
        for (text, bytes) in [("16MB", 16 << 20), ("1GB", 1 << 30), ("1MB", 1 << 20), ("1048576", 1 << 20), ("65536kB", 64 << 20)] {
            assert_eq!(parse_segment_size(text).unwrap().bytes(), bytes, "{text}");
        }
        for bad in ["", "MB", "3MB", "4GB", "8GB", "16XB", "-1MB", "99999999999GB"] {
            assert!(parse_segment_size(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_stream_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64), kind in 0_usize..3) {
            let mut body = bytes;
            if let Some(first) = body.first_mut() {
                *first = [b'w', b'k', *first][kind];
            }
            let _ = decode(body.into());
        }

        #[test]
        fn the_guard_holds_for_any_sequence(steps in proptest::collection::vec((0_u64..9, 0_u64..9, 0_u64..9, 0_u64..3), 1..40)) {
            let mut guard = AckGuard::new(Lsn(1));
            let mut last = Acknowledgement::default();
            for (write, flush, apply, more) in steps {
                guard.received = guard.received.advance(more);
                let ack = Acknowledgement { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply) };
                if guard.check(ack).is_ok() {
                    prop_assert!(ack.apply <= ack.flush && ack.flush <= ack.write && ack.write <= guard.received);
                    prop_assert!(ack.write >= last.write && ack.flush >= last.flush && ack.apply >= last.apply);
                    last = ack;
                }
                prop_assert_eq!(guard.last, last);
            }
        }
    }
}
