//! From a connection string to a connection that is logged in: hosts in their order, TLS, authentication.
//!
//! The order of attempts is libpq's, and so is what ends it: a server that refuses this user would be refused by the next host
//! too, a server that is only starting would not.

use std::io;

use bytes::BytesMut;
use postgres_protocol::authentication::sasl::{self, ChannelBinding as ScramBinding, ScramSha256};
use postgres_protocol::message::frontend;
use secrecy::ExposeSecret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::super::conninfo::{ChannelBinding, ConnInfo, Endpoint, Host, Keepalive, SessionAttrs, SslMode, SslNegotiation};
use super::super::message::{Fields, Frame, ServerError, Tag, sqlstate};
use super::super::{ParseError, tls};
use super::{Connection, Io, Mode, State, protocol, timed_out, unencodable, unexpected, within};
use crate::{Error, ErrorKind, Result};

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
            Mode::Replication => {
                parameters.push(("replication", "true"));
                // The connection that holds a backup's temporary slot is idle while files are copied. A walsender
                // without a database takes no SET, and poolers, which refuse such a parameter, do not carry replication.
                parameters.push(("idle_session_timeout", "0"));
            }
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
}

impl Keepalive {
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
