//! One connection to a PostgreSQL server, for SQL or for physical replication.
//!
//! Written on the wire protocol itself, because a replication connection answers with messages that SQL drivers do not
//! know (`CopyBothResponse`, two `CommandComplete` after a stream), and because a backup engine must own every wait:
//!
//! - Nothing waits for ever (H19: a connection that went dead after it was opened hung until somebody noticed). Connecting
//!   is bounded by `connect_timeout`, every later read and write by [`Connection::set_idle_timeout`], and TCP keepalive is
//!   on with values of its own.
//! - Every future is cancel-safe: bytes that were read stay in the connection's buffer, bytes to be written too. A command
//!   whose future was dropped half-way leaves the connection *busy*, and the next command says so instead of taking the
//!   old command's answer for its own.
//! - Dropping the connection closes the socket at once.

mod login;
mod quote;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::quote::{quote_identifier, quote_literal, quote_replication_literal};
use super::ParseError;
use super::message::{Fields, Frame, Notice, ServerError, Tag, data_row, row_description, take_frame};
use crate::{Error, ErrorKind, Result};

/// How long a server may be silent before a read gives up, unless told otherwise. Long enough for the spread checkpoint
/// that starts a base backup with default settings (`checkpoint_timeout` 5 min).
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// Room that is made for a read: a few of the largest messages a walsender sends (128 KiB).
const READ_SIZE: usize = 256 << 10;
/// Rows of one answer that are held in memory. Larger answers belong into COPY.
const MAX_ANSWER: usize = 256 << 20;
/// Notices that are kept until somebody takes them; a page checksum failure is one notice, and there are at most five per
/// file before the server falls silent about it.
const MAX_NOTICES: usize = 10_000;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Ordinary SQL in the database of the connection string.
    Sql,
    /// `replication=true`: physical replication and base backups, no database.
    Replication,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Busy,
    Broken,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Io for T {}

/// A logged-in connection, for SQL or for physical replication.
///
/// Every wait is bounded ([`Connection::set_idle_timeout`]), every future cancel-safe; a command whose future was dropped
/// half-way leaves the connection busy for good. Dropping it closes the socket.
pub struct Connection {
    io: Box<dyn Io>,
    input: BytesMut,
    output: BytesMut,
    unflushed: bool,
    state: State,
    idle_timeout: Option<Duration>,
    parameters: BTreeMap<String, String>,
    backend_pid: i32,
    notices: VecDeque<Notice>,
    mode: Mode,
    peer: String,
    encrypted: bool,
}

/// The answer to one statement.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResultSet {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
    /// The command tag, for example `SELECT 1`.
    pub tag: String,
}

/// One row of an answer, in text format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row(Vec<Option<Bytes>>);

impl Row {
    /// The value of a column; `None` when it is NULL.
    ///
    /// # Errors
    /// When there is no such column or its value is not UTF-8 (possible in databases with encoding `SQL_ASCII`).
    pub fn text(&self, column: usize) -> Result<Option<&str>> {
        let Some(bytes) = self.bytes(column)? else { return Ok(None) };
        let text = std::str::from_utf8(bytes).map_err(|_| {
            protocol(ParseError::new("result row", format!("column {column}: `{}` is not UTF-8", bytes.escape_ascii())))
        })?;
        Ok(Some(text))
    }

    /// The value of a column as the server sent it; `None` when it is NULL.
    ///
    /// # Errors
    /// When there is no such column.
    pub fn bytes(&self, column: usize) -> Result<Option<&Bytes>> {
        let value = self.0.get(column).ok_or_else(|| {
            protocol(ParseError::new("result row", format!("has {} columns, not the expected {}", self.0.len(), column + 1)))
        })?;
        Ok(value.as_ref())
    }

    /// A value that must not be NULL.
    ///
    /// # Errors
    /// As [`Row::text`], and when the value is NULL.
    pub fn required(&self, column: usize) -> Result<&str> {
        self.text(column)?.ok_or_else(|| protocol(ParseError::new("result row", format!("column {column} is NULL"))))
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True for a row without columns.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The server broke the protocol.
pub(super) fn protocol(why: ParseError) -> Error {
    Error::new(ErrorKind::Source, "source.protocol", format!("unexpected answer from PostgreSQL: {why}")).with_source(why)
}

/// A message that has no place here.
pub(super) fn unexpected(frame: &Frame, during: &'static str) -> Error {
    protocol(ParseError::new(during, format!("message {} has no place here", Tag(frame.tag))))
}

impl Connection {
    fn over(io: Box<dyn Io>, mode: Mode, peer: String, encrypted: bool) -> Self {
        Self {
            io,
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
            state: State::Busy,
            idle_timeout: Some(DEFAULT_IDLE_TIMEOUT),
            parameters: BTreeMap::new(),
            backend_pid: 0,
            notices: VecDeque::new(),
            mode,
            peer,
            encrypted,
        }
    }

    /// The parameter that the server reported last, for example `server_version`, `TimeZone` or `in_hot_standby`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The server's version as it prints it: `15.20 (Debian 15.20-0+deb12u1)`, `19beta1`.
    pub fn server_version(&self) -> &str {
        self.parameter("server_version").unwrap_or_default()
    }

    /// The server's major version.
    ///
    /// # Errors
    /// When the server did not say, which no PostgreSQL does.
    pub fn server_major(&self) -> Result<u32> {
        let version = self.server_version();
        let digits = version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        digits.parse().map_err(|_| protocol(ParseError::new("server_version", format!("`{version}` does not start with a number"))))
    }

    /// The process id of the server's backend or walsender.
    pub fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// What the connection is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// True when the connection is encrypted with TLS.
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// True when the next command can be sent. False after an I/O error, a protocol error or a command whose future was
    /// dropped before its end.
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// Bounds every wait for the server from now on; `None` waits as long as TCP believes that the peer lives.
    pub fn set_idle_timeout(&mut self, limit: Option<Duration>) {
        self.idle_timeout = limit;
    }

    /// The bound of [`Connection::set_idle_timeout`].
    pub fn idle_timeout(&self) -> Option<Duration> {
        self.idle_timeout
    }

    /// Takes the warnings and notices that came since the last call, in their order.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        self.notices.drain(..).collect()
    }

    /// Runs statements by the simple query protocol and returns one [`ResultSet`] for each.
    ///
    /// Quoting is the caller's duty: see [`quote_literal`] and [`quote_identifier`].
    ///
    /// # Errors
    /// The first error the server reports; the connection can be used further then, unless the server closed it.
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<ResultSet>> {
        self.begin(sql)?;
        let mut sets = Vec::new();
        let mut current = ResultSet::default();
        let mut size = 0_usize;
        loop {
            let frame = self.read().await?;
            match frame.tag {
                b'T' => current.columns = row_description(frame.body).map_err(|why| self.broken(why))?,
                b'D' => {
                    size = size.saturating_add(frame.body.len() + 64);
                    if size > MAX_ANSWER {
                        self.state = State::Broken;
                        let message = format!("the answer is larger than {} MiB", MAX_ANSWER >> 20);
                        return Err(Error::new(ErrorKind::Failed, "source.answer_too_large", message));
                    }
                    current.rows.push(Row(data_row(frame.body).map_err(|why| self.broken(why))?));
                }
                b'C' => {
                    current.tag = Fields::new("command tag", frame.body).text().map_err(|why| self.broken(why))?;
                    sets.push(std::mem::take(&mut current));
                }
                b'I' => sets.push(std::mem::take(&mut current)),
                b'E' => return Err(self.failed(frame).await),
                b'Z' => {
                    self.state = State::Idle;
                    return Ok(sets);
                }
                _ => {
                    self.state = State::Broken;
                    return Err(unexpected(&frame, "answer to a query"));
                }
            }
        }
    }

    /// Runs one statement that returns exactly one row.
    ///
    /// # Errors
    /// As [`Connection::simple_query`], and when there is not exactly one row.
    pub async fn query_one(&mut self, sql: &str) -> Result<Row> {
        let mut sets = self.simple_query(sql).await?;
        match sets.pop() {
            Some(mut set) if set.rows.len() == 1 && sets.is_empty() => Ok(set.rows.remove(0)),
            _ => Err(protocol(ParseError::new("answer", "one row was expected"))),
        }
    }

    /// Says goodbye and closes the socket. Dropping the connection closes it too, but the server then logs an unexpected
    /// end of file.
    pub async fn close(mut self) {
        frontend::terminate(&mut self.output);
        let limit = Some(Duration::from_secs(5));
        let goodbye = async {
            self.io.write_all_buf(&mut self.output).await?;
            self.io.shutdown().await
        };
        if let Err(error) = within(limit, "close the connection", goodbye).await {
            tracing::debug!(%error, "the connection was not closed cleanly");
        }
    }

    /// Queues a command; its answer is read with [`Connection::read`].
    pub(super) fn begin(&mut self, sql: &str) -> Result<()> {
        match self.state {
            State::Idle => {}
            State::Busy => {
                let why = "an earlier command on this connection was abandoned before its end";
                return Err(Error::new(ErrorKind::Source, "source.busy", why).with_hint("open a new connection"));
            }
            State::Broken => {
                return Err(Error::new(ErrorKind::Source, "source.closed", "the connection failed earlier"));
            }
        }
        let before = self.output.len();
        if let Err(error) = frontend::query(sql, &mut self.output) {
            // The encoder leaves what it had written up to the zero byte.
            self.output.truncate(before);
            return Err(unencodable(error));
        }
        self.state = State::Busy;
        Ok(())
    }

    /// Queues bytes; the next read or [`Connection::flush`] sends them.
    pub(super) fn enqueue(&mut self, encode: impl FnOnce(&mut BytesMut)) {
        encode(&mut self.output);
    }

    /// The command's answer is complete.
    pub(super) fn end(&mut self) {
        self.state = State::Idle;
    }

    /// The peer cannot be understood any more.
    pub(super) fn broken(&mut self, why: ParseError) -> Error {
        self.state = State::Broken;
        protocol(why)
    }

    /// Turns an error response into our error and reads on to the end of the command, so that the connection is usable.
    pub(super) async fn failed(&mut self, frame: Frame) -> Error {
        let server = match ServerError::parse(frame.body) {
            Ok(server) => server,
            Err(why) => return self.broken(why),
        };
        if server.is_fatal() {
            self.state = State::Broken;
            return server.into_error();
        }
        let error = server.into_error();
        loop {
            match self.read().await {
                Ok(Frame { tag: b'Z', .. }) => {
                    self.state = State::Idle;
                    return error;
                }
                Ok(_) => {}
                // What the server said is the reason; that it then went away is not.
                Err(_) => return error,
            }
        }
    }

    /// Sends everything that is queued. Cancel-safe: what was sent is off the queue.
    pub(super) async fn flush(&mut self) -> Result<()> {
        if self.output.is_empty() && !self.unflushed {
            return Ok(());
        }
        self.unflushed = true;
        let limit = self.idle_timeout;
        let sending = async {
            self.io.write_all_buf(&mut self.output).await?;
            self.io.flush().await
        };
        let sent = within(limit, "send to PostgreSQL", sending).await;
        match sent {
            Ok(()) => self.unflushed = false,
            Err(_) => self.state = State::Broken,
        }
        sent
    }

    /// The next message that is part of an answer: notices, parameters and notifications are put aside. Cancel-safe.
    pub(super) async fn read(&mut self) -> Result<Frame> {
        // A server that goes away often says why first: what it sent is read even if it takes nothing any more.
        let unsent = match self.flush().await {
            Err(error) if error.code() != "source.io" => return Err(error),
            sent => sent,
        };
        loop {
            while let Some(frame) = take_frame(&mut self.input).map_err(|why| self.broken(why))? {
                match frame.tag {
                    b'N' => {
                        let notice = ServerError::parse(frame.body).map_err(|why| self.broken(why))?;
                        tracing::debug!(%notice, "PostgreSQL");
                        if self.notices.len() < MAX_NOTICES {
                            self.notices.push_back(notice);
                        }
                    }
                    b'S' => {
                        let mut fields = Fields::new("parameter status", frame.body);
                        let (name, value) = match (fields.cstr(), fields.cstr()) {
                            (Ok(name), Ok(value)) => (name, value),
                            (Err(why), _) | (_, Err(why)) => return Err(self.broken(why)),
                        };
                        // The value of a parameter of the user can be in any encoding (search_path).
                        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
                        if self.parameters.len() < 1000 {
                            self.parameters.insert(text(&name), text(&value));
                        }
                    }
                    b'A' => {}
                    _ => return Ok(frame),
                }
            }
            // One read's worth at a time: a length that a message claims is not allocated before its bytes arrive.
            if self.input.capacity() - self.input.len() < READ_SIZE / 4 {
                self.input.reserve(READ_SIZE);
            }
            match within(self.idle_timeout, "wait for PostgreSQL", self.io.read_buf(&mut self.input)).await {
                Ok(0) => {
                    self.state = State::Broken;
                    unsent?;
                    return Err(Error::new(ErrorKind::Source, "source.closed", "PostgreSQL closed the connection"));
                }
                Ok(_) => {}
                Err(error) => {
                    self.state = State::Broken;
                    unsent?;
                    return Err(error);
                }
            }
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("mode", &self.mode)
            .field("encrypted", &self.encrypted)
            .field("state", &self.state)
            .field("backend_pid", &self.backend_pid)
            .field("server_version", &self.server_version())
            .finish_non_exhaustive()
    }
}

fn timed_out(doing: &str, limit: Duration) -> Error {
    Error::new(ErrorKind::Source, "source.timeout", format!("{doing}: no answer within {} s", limit.as_secs_f32()))
}

/// Bounds one wait.
async fn within<T>(limit: Option<Duration>, doing: &'static str, future: impl Future<Output = io::Result<T>>) -> Result<T> {
    let outcome = match limit {
        Some(limit) => tokio::time::timeout(limit, future).await.map_err(|_| timed_out(doing, limit))?,
        None => future.await,
    };
    outcome.map_err(|error| Error::new(ErrorKind::Source, "source.io", format!("{doing}: {error}")).with_source(error))
}

/// The only thing that cannot be encoded is a zero byte within a string.
fn unencodable(error: io::Error) -> Error {
    Error::new(ErrorKind::Usage, "source.encode", format!("cannot be sent to PostgreSQL: {error}")).with_source(error)
}

/// Shared by the tests of the modules above this one: a connection to a script of recorded bytes.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A connection that is logged in, and the server's end of it.
    pub(crate) fn pair() -> (Connection, tokio::io::DuplexStream) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let mut connection = Connection::over(Box::new(client), Mode::Replication, "test".to_owned(), false);
        connection.state = State::Idle;
        (connection, server)
    }

    /// Encodes a message of the server.
    pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut all = vec![tag];
        all.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        all.extend_from_slice(body);
        all
    }

    /// A row description followed by one row.
    pub(crate) fn row(names: &[&str], values: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(names.len()).unwrap().to_be_bytes().to_vec();
        for name in names {
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&[0; 19]);
        }
        let mut all = message(b'T', &body);
        all.extend(data(values));
        all
    }

    /// One row.
    pub(crate) fn data(values: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                Some(value) => {
                    body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
                    body.extend_from_slice(value.as_bytes());
                }
                None => body.extend_from_slice(&[0xFF; 4]),
            }
        }
        message(b'D', &body)
    }

    pub(crate) fn complete(tag: &str) -> Vec<u8> {
        message(b'C', format!("{tag}\0").as_bytes())
    }

    pub(crate) fn ready() -> Vec<u8> {
        message(b'Z', b"I")
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use crate::postgres::sqlstate;

    #[tokio::test]
    async fn answers_of_several_statements_stay_apart() {
        let (mut connection, mut server) = pair();
        let mut answer = row(&["a"], &[Some("1")]);
        answer.extend(complete("SELECT 1"));
        answer.extend(message(b'N', b"SWARNING\0C01000\0Mcareful\0\0"));
        answer.extend(message(b'S', b"in_hot_standby\0on\0"));
        answer.extend(row(&["b", "c"], &[None, Some("")]));
        answer.extend(complete("SELECT 1"));
        answer.extend(ready());
        let write = async {
            for byte in answer {
                server.write_all(&[byte]).await.unwrap();
            }
        };
        let (sets, ()) = tokio::join!(connection.simple_query("SELECT 1; SELECT 2"), write);
        let sets = sets.unwrap();
        assert_eq!(sets.len(), 2);
        assert_eq!(sets[0].rows[0].text(0).unwrap(), Some("1"));
        assert_eq!((sets[1].rows[0].text(0).unwrap(), sets[1].rows[0].text(1).unwrap()), (None, Some("")));
        assert!(sets[1].rows[0].text(2).is_err() && sets[1].rows[0].required(0).is_err());
        assert_eq!(connection.take_notices()[0].message, "careful");
        assert_eq!(connection.parameter("in_hot_standby"), Some("on"));
        assert!(connection.is_idle());
    }

    /// H19: a peer that went silent after the connection was opened.
    #[tokio::test]
    async fn h19_a_silent_server_is_given_up() {
        let (mut connection, _server) = pair();
        connection.set_idle_timeout(Some(Duration::from_millis(20)));
        let error = connection.simple_query("SELECT 1").await.unwrap_err();
        assert_eq!(error.code(), "source.timeout");
        assert!(!connection.is_idle());
        assert_eq!(connection.simple_query("SELECT 1").await.unwrap_err().code(), "source.closed");
    }

    #[tokio::test]
    async fn an_abandoned_command_is_not_answered_by_the_next() {
        let (mut connection, mut server) = pair();
        {
            let query = connection.simple_query("SELECT pg_sleep(10)");
            tokio::pin!(query);
            assert!(tokio::time::timeout(Duration::from_millis(5), &mut query).await.is_err());
        }
        let mut answer = complete("SELECT 1");
        answer.extend(ready());
        server.write_all(&answer).await.unwrap();
        assert_eq!(connection.simple_query("SELECT 2").await.unwrap_err().code(), "source.busy");
    }

    #[tokio::test]
    async fn an_error_leaves_the_connection_usable_and_a_fatal_one_does_not() {
        let (mut connection, mut server) = pair();
        let mut answer = message(b'E', b"SERROR\0VERROR\0C42601\0Msyntax error\0\0");
        answer.extend(ready());
        answer.extend(message(b'E', b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"));
        server.write_all(&answer).await.unwrap();
        let error = connection.simple_query("x").await.unwrap_err();
        assert_eq!(ServerError::of(&error).unwrap().sqlstate, "42601");
        assert!(connection.is_idle());
        let error = connection.simple_query("x").await.unwrap_err();
        assert_eq!(ServerError::of(&error).unwrap().sqlstate, sqlstate::ADMIN_SHUTDOWN);
        assert!(!connection.is_idle());
    }
}
