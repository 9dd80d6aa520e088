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

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::sasl::{self, ChannelBinding as ScramBinding, ScramSha256};
use postgres_protocol::message::frontend;
use secrecy::ExposeSecret;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::conninfo::{ChannelBinding, ConnInfo, Endpoint, Host, SessionAttrs, SslMode, SslNegotiation};
use super::message::{Fields, Frame, Notice, ServerError, Tag, data_row, row_description, sqlstate, take_frame};
use super::{ParseError, tls};
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

/// Why an attempt to log in failed, and what libpq would try next.
struct Attempt {
    error: Error,
    /// The other kind of connection (with or without TLS) may be accepted.
    try_other_tls: bool,
    /// Another host may do better.
    try_next_host: bool,
}

/// What SCRAM can be bound to.
enum Binding {
    /// The connection is not encrypted.
    Plain,
    /// It is; the data is missing when the server's certificate has no defined channel binding.
    Tls(Option<Vec<u8>>),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self { error, try_other_tls: false, try_next_host: true }
    }
}

impl Connection {
    /// Connects and logs in, trying the hosts of `info` in their order, and all addresses of each.
    ///
    /// `connect_timeout` bounds each address from the first packet to the end of the login. A refused login ends the
    /// search, as in libpq: the next host would refuse it too, and a wrong password should not be tried everywhere.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Source`] when no host could be logged in to; the message names each host and why.
    pub async fn connect(info: &ConnInfo, mode: Mode) -> Result<Self> {
        let passes: &[SessionAttrs] = match info.target_session_attrs {
            SessionAttrs::PreferStandby => &[SessionAttrs::Standby, SessionAttrs::Any],
            _ => std::slice::from_ref(&info.target_session_attrs),
        };
        let mut failures: Vec<(String, Error)> = Vec::new();
        for attrs in passes {
            failures.clear();
            for endpoint in &info.endpoints {
                match Self::connect_endpoint(info, endpoint, mode, *attrs).await {
                    Ok(connection) => return Ok(connection),
                    Err(attempt) => {
                        tracing::debug!(host = %endpoint, error = %attempt.error, "cannot connect");
                        let last = !attempt.try_next_host;
                        failures.push((endpoint.to_string(), attempt.error));
                        if last {
                            break;
                        }
                    }
                }
            }
        }
        match failures.pop() {
            Some((host, error)) if failures.is_empty() => Err(error.context(format_args!("connect to PostgreSQL at {host}"))),
            Some((host, error)) => {
                let all: String = failures.iter().fold(String::new(), |all, (host, error)| format!("{all}{host}: {error}; "));
                let summary = format!("no PostgreSQL server could be used: {all}{host}: {error}");
                Err(Error::new(ErrorKind::Source, error.code(), summary).with_source(error))
            }
            None => Err(Error::new(ErrorKind::Usage, "source.conninfo", "the connection string names no host")),
        }
    }

    async fn connect_endpoint(info: &ConnInfo, endpoint: &Endpoint, mode: Mode, attrs: SessionAttrs) -> Result<Self, Attempt> {
        let limit = info.connect_timeout;
        let mut addresses = Vec::new();
        match (&endpoint.host, endpoint.hostaddr) {
            (Host::Unix(_), _) => addresses.push(None),
            (Host::Tcp(_), Some(address)) => addresses.push(Some((address, endpoint.port).into())),
            (Host::Tcp(name), None) => {
                let found =
                    within(Some(limit), "look up the host name", tokio::net::lookup_host((name.as_str(), endpoint.port))).await?;
                addresses.extend(found.map(Some));
            }
        }
        let mut last = Error::new(ErrorKind::Source, "source.connect", "the name has no address");
        for address in addresses {
            let attempts: &[bool] = match (address, info.ssl.mode) {
                (None, _) | (_, SslMode::Disable) => &[false],
                (_, SslMode::Allow) => &[false, true],
                (_, SslMode::Prefer) => &[true, false],
                _ => &[true],
            };
            for (index, with_tls) in attempts.iter().enumerate() {
                let login = Self::login(info, endpoint, address, mode, *with_tls);
                let outcome = match tokio::time::timeout(limit, login).await {
                    Ok(outcome) => outcome,
                    Err(_) => Err(timed_out("log in", limit).into()),
                };
                match outcome {
                    Ok(connection) => match connection.accepts(attrs) {
                        Ok(()) => return Ok(connection),
                        Err(error) => last = error,
                    },
                    Err(attempt) if attempt.try_other_tls && index + 1 < attempts.len() => {
                        last = attempt.error;
                        continue;
                    }
                    Err(attempt) if !attempt.try_next_host => return Err(attempt),
                    Err(attempt) => last = attempt.error,
                }
                break;
            }
        }
        Err(last.into())
    }

    /// Connects to one address, negotiates TLS and logs in.
    async fn login(
        info: &ConnInfo,
        endpoint: &Endpoint,
        address: Option<std::net::SocketAddr>,
        mode: Mode,
        with_tls: bool,
    ) -> Result<Self, Attempt> {
        let unreachable = |error: io::Error| {
            Error::new(ErrorKind::Source, "source.connect", error.to_string())
                .with_hint("is PostgreSQL running there, and does it listen on this address (listen_addresses, port)?")
                .with_source(error)
        };
        let peer = endpoint.to_string();
        let Some(address) = address else {
            let socket = UnixStream::connect(endpoint.socket_path()).await.map_err(unreachable)?;
            return Self::start(Box::new(socket), info, endpoint, mode, peer, Binding::Plain).await;
        };
        let mut socket = TcpStream::connect(address).await.map_err(unreachable)?;
        info.keepalive.apply(&socket).map_err(unreachable)?;
        if !with_tls {
            return Self::start(Box::new(socket), info, endpoint, mode, peer, Binding::Plain).await.map_err(|mut attempt| {
                attempt.try_other_tls &= info.ssl.mode == SslMode::Allow;
                attempt
            });
        }
        let config = tls::client_config(&info.ssl)?;
        if info.ssl.negotiation == SslNegotiation::Postgres {
            let mut request = BytesMut::new();
            frontend::ssl_request(&mut request);
            socket.write_all(&request).await.map_err(unreachable)?;
            // Exactly one byte is read in the clear: whatever somebody put behind it goes to the TLS handshake and fails
            // there (CVE-2021-23222).
            match socket.read_u8().await.map_err(unreachable)? {
                b'S' => {}
                b'N' if info.ssl.mode == SslMode::Prefer => {
                    return Self::start(Box::new(socket), info, endpoint, mode, peer, Binding::Plain).await;
                }
                b'N' => {
                    let message = format!("the server does not offer TLS, and sslmode={} demands it", info.ssl.mode);
                    let hint = "set ssl = on on the server, or choose a weaker sslmode";
                    return Err(Error::new(ErrorKind::Source, "source.tls", message).with_hint(hint).into());
                }
                // Answered before anybody is authenticated, so its text is not to be believed (CVE-2024-10977).
                other => {
                    let why = format!("the answer to SSLRequest was {}", Tag(other));
                    return Err(protocol(ParseError::new("TLS negotiation", why)).into());
                }
            }
        }
        let name = tls::server_name(endpoint, address.ip());
        let stream = match tokio_rustls::TlsConnector::from(config).connect(name, socket).await {
            Ok(stream) => stream,
            Err(error) => {
                let message = format!("the TLS handshake failed with sslmode={}: {error}", info.ssl.mode);
                let error = Error::new(ErrorKind::Source, "source.tls", message).with_hint(tls::hint(&error)).with_source(error);
                return Err(Attempt { error, try_other_tls: true, try_next_host: true });
            }
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let binding = certificate.and_then(|certificate| tls::tls_server_end_point(certificate));
        Self::start(Box::new(stream), info, endpoint, mode, peer, Binding::Tls(binding)).await.map_err(|mut attempt| {
            attempt.try_other_tls &= info.ssl.mode == SslMode::Prefer;
            attempt
        })
    }

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

    /// Startup and authentication.
    async fn start(
        io: Box<dyn Io>,
        info: &ConnInfo,
        endpoint: &Endpoint,
        mode: Mode,
        peer: String,
        binding: Binding,
    ) -> Result<Self, Attempt> {
        let mut this = Self::over(io, mode, peer, matches!(binding, Binding::Tls(_)));
        let mut parameters = vec![("user", info.user.as_str()), ("client_encoding", "UTF8")];
        match mode {
            Mode::Sql => parameters.push(("database", info.dbname.as_deref().unwrap_or(&info.user))),
            Mode::Replication => parameters.push(("replication", "true")),
        }
        parameters.push(("application_name", &info.application_name));
        if let Some(options) = &info.options {
            parameters.push(("options", options));
        }
        frontend::startup_message(parameters, &mut this.output).map_err(unencodable)?;
        this.authenticate(info, endpoint, binding).await?;
        loop {
            let frame = this.read().await?;
            match frame.tag {
                b'K' => this.backend_pid = Fields::new("backend key", frame.body).i32().map_err(protocol)?,
                b'Z' => break,
                b'E' => return Err(this.refused(frame)),
                b'v' => {}
                _ => return Err(unexpected(&frame, "login").into()),
            }
        }
        this.state = State::Idle;
        Ok(this)
    }

    async fn authenticate(&mut self, info: &ConnInfo, endpoint: &Endpoint, binding: Binding) -> Result<(), Attempt> {
        let refuse = |why: &str| Error::new(ErrorKind::Source, "source.auth", why.to_owned());
        let replication = self.mode == Mode::Replication;
        let password = || -> Result<_> {
            info.password_for(endpoint, replication)?.ok_or_else(|| {
                refuse("the server asks for a password and none is configured")
                    .with_hint("set `password` or `passfile` in the connection string, PGPASSWORD, or a line in ~/.pgpass")
            })
        };
        let mut scram: Option<ScramSha256> = None;
        let mut proven = false;
        let mut bound = false;
        let only_bound = || refuse("channel_binding=require, but the server does not authenticate with SCRAM-SHA-256-PLUS");
        loop {
            let frame = self.read().await?;
            let mut fields = match frame.tag {
                b'R' => Fields::new("authentication request", frame.body),
                b'E' => return Err(self.refused(frame)),
                b'v' => continue,
                _ => return Err(unexpected(&frame, "authentication").into()),
            };
            let kind = fields.i32().map_err(protocol)?;
            if info.channel_binding == ChannelBinding::Require && matches!(kind, 3 | 5) {
                return Err(only_bound().into());
            }
            match kind {
                0 if scram.is_some() && !proven => {
                    return Err(refuse("the server ended the SCRAM exchange without proving that it knows the password").into());
                }
                0 if info.channel_binding == ChannelBinding::Require && !bound => return Err(only_bound().into()),
                0 => return Ok(()),
                3 => {
                    let secret = password()?;
                    frontend::password_message(secret.expose_secret().as_bytes(), &mut self.output).map_err(unencodable)?;
                }
                5 => {
                    let salt = fields.bytes(4).map_err(protocol)?;
                    let salt: [u8; 4] = salt.as_ref().try_into().unwrap_or_default();
                    let secret = password()?;
                    let hash =
                        postgres_protocol::authentication::md5_hash(info.user.as_bytes(), secret.expose_secret().as_bytes(), salt);
                    frontend::password_message(hash.as_bytes(), &mut self.output).map_err(unencodable)?;
                }
                10 if scram.is_none() => {
                    let mut mechanisms = Vec::new();
                    loop {
                        let name = fields.text().map_err(protocol)?;
                        if name.is_empty() {
                            break;
                        }
                        mechanisms.push(name);
                    }
                    let offered = |wanted: &str| mechanisms.iter().any(|name| name == wanted);
                    let wanted = info.channel_binding != ChannelBinding::Disable;
                    let (mechanism, header) = match &binding {
                        Binding::Tls(Some(data)) if wanted && offered(sasl::SCRAM_SHA_256_PLUS) => {
                            (sasl::SCRAM_SHA_256_PLUS, ScramBinding::tls_server_end_point(data.clone()))
                        }
                        _ if info.channel_binding == ChannelBinding::Require => return Err(only_bound().into()),
                        // We could, the server says it cannot: sent as such, so that a server which could notices that
                        // somebody in between removed the offer.
                        Binding::Tls(Some(_)) if wanted => (sasl::SCRAM_SHA_256, ScramBinding::unrequested()),
                        _ => (sasl::SCRAM_SHA_256, ScramBinding::unsupported()),
                    };
                    if !offered(mechanism) {
                        let why = format!("the server offers only the SASL mechanisms {}", mechanisms.join(", "));
                        return Err(Error::new(ErrorKind::Unsupported, "source.auth", why).into());
                    }
                    bound = mechanism == sasl::SCRAM_SHA_256_PLUS;
                    let secret = password()?;
                    let exchange = ScramSha256::new(secret.expose_secret().as_bytes(), header);
                    frontend::sasl_initial_response(mechanism, exchange.message(), &mut self.output).map_err(unencodable)?;
                    scram = Some(exchange);
                }
                11 | 12 if !proven => {
                    let Some(exchange) = &mut scram else {
                        return Err(protocol(ParseError::new("authentication", "a SASL answer without a question")).into());
                    };
                    let data = fields.into_rest();
                    let failed = |error: io::Error| {
                        refuse("the SCRAM exchange failed: the server does not know this password, or is not the server")
                            .with_source(error)
                    };
                    if kind == 11 {
                        exchange.update(&data).map_err(failed)?;
                        frontend::sasl_response(exchange.message(), &mut self.output).map_err(unencodable)?;
                    } else {
                        exchange.finish(&data).map_err(failed)?;
                        proven = true;
                    }
                }
                2 | 7 | 8 | 9 => {
                    let why = "the server asks for GSSAPI, SSPI or Kerberos authentication, which pgvault does not speak";
                    let hint = "add a pg_hba.conf line with scram-sha-256 or cert for this user";
                    return Err(Error::new(ErrorKind::Unsupported, "source.auth", why).with_hint(hint).into());
                }
                _ => return Err(protocol(ParseError::new("authentication", format!("request {kind} has no place here"))).into()),
            }
        }
    }

    /// An error response during login.
    fn refused(&mut self, frame: Frame) -> Attempt {
        self.state = State::Broken;
        match ServerError::parse(frame.body) {
            Ok(server) => Attempt {
                // Only the missing pg_hba.conf line is about TLS; libpq would also repeat a wrong password in the clear.
                try_other_tls: server.sqlstate == sqlstate::INVALID_AUTHORIZATION,
                try_next_host: server.sqlstate == sqlstate::CANNOT_CONNECT_NOW || server.sqlstate.starts_with("53"),
                error: server.into_error(),
            },
            Err(why) => protocol(why).into(),
        }
    }

    /// Whether this server is what `target_session_attrs` asks for. Servers report both parameters by themselves since
    /// PostgreSQL 14.
    fn accepts(&self, attrs: SessionAttrs) -> Result<()> {
        let on = |name| self.parameter(name) == Some("on");
        let standby = on("in_hot_standby");
        let read_only = standby || on("default_transaction_read_only");
        let (fits, wanted) = match attrs {
            SessionAttrs::Any | SessionAttrs::PreferStandby => (true, ""),
            SessionAttrs::ReadWrite => (!read_only, "accept writes"),
            SessionAttrs::ReadOnly => (read_only, "be read-only"),
            SessionAttrs::Primary => (!standby, "be a primary"),
            SessionAttrs::Standby => (standby, "be a standby"),
        };
        if fits {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Source, "source.session_attrs", format!("the server must {wanted} (target_session_attrs)")))
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

/// `text` as a literal of SQL and of the replication grammar, whatever it contains.
///
/// SQL literals with a backslash become `E'...'`, so that the result does not depend on `standard_conforming_strings`.
/// The replication grammar has no such form and takes backslashes literally: use [`quote_replication_literal`] there.
pub fn quote_literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text).trim_start().to_owned()
}

/// `text` as an identifier of SQL and of the replication grammar (`repl_scanner.l`), whatever it contains.
pub fn quote_identifier(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// `text` as a literal of the replication grammar, in which nothing but the quote itself is special (`repl_scanner.l`).
pub fn quote_replication_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

impl super::conninfo::Keepalive {
    /// Sets the options on a connected socket.
    fn apply(&self, socket: &TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let socket = socket2::SockRef::from(socket);
        if self.enabled {
            let probes = socket2::TcpKeepalive::new().with_time(self.idle).with_interval(self.interval).with_retries(self.count);
            socket.set_tcp_keepalive(&probes)?;
        }
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        Ok(())
    }
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

    #[test]
    fn hostile_names_stay_within_their_quotes() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal(r"a\'b"), r"E'a\\''b'");
        assert_eq!(quote_replication_literal(r"a\'); DROP"), r"'a\''); DROP'");
        assert_eq!(quote_identifier(r#"a"b\"#), r#""a""b\""#);
    }
}
