//! Connection strings, with libpq's meaning.
//!
//! Operators have working connection strings, `PG*` variables, service files and `.pgpass` lines; all of them work here
//! unchanged. Source: the chapter "Database Connection Control Functions" of PostgreSQL's documentation and
//! `src/interfaces/libpq/fe-connect.c`. Where pgvault departs from libpq, it does so towards safety:
//!
//! - `connect_timeout` is 30 s when it is not set, libpq waits for ever;
//! - TCP keepalive starts after 30 s, not after the kernel's 2 h, so that a blackholed connection is noticed;
//! - a parameter that would be silently without effect and that security depends on (`sslcrl`, `require_auth`,
//!   `requirepeer`) is refused instead of ignored;
//! - an `sslcert` or `sslkey` that was named but does not exist is an error.
//!
//! Nothing global is read: the environment comes in as a function.

mod passfile;
mod syntax;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

use self::passfile::{PassfileError, find_password, pgpass_host, read_passfile};
use self::syntax::{KEYWORDS, Use, parse_keywords, parse_uri, read_service};
use crate::{Error, ErrorKind, Result};

/// Where Unix sockets are when nothing says so: the choice of Debian and Red Hat packages, then that of the source code.
const SOCKET_DIRS: [&str; 3] = ["/var/run/postgresql", "/run/postgresql", "/tmp"];

type Settings = BTreeMap<&'static str, String>;

/// How to reach and log in to a server.
///
/// `Debug` shows no password: [`SecretString`] prints as redacted.
#[derive(Debug, Clone)]
pub struct ConnInfo {
    /// The servers to try, in order.
    pub endpoints: Vec<Endpoint>,
    /// The role.
    pub user: String,
    /// The password of the connection string or the environment; [`ConnInfo::password_for`] also looks into `.pgpass`.
    pub password: Option<SecretString>,
    /// The database; the role's name when there is none.
    pub dbname: Option<String>,
    /// What `pg_stat_activity` and `synchronous_standby_names` know this connection as.
    pub application_name: String,
    /// Command-line options for the backend.
    pub options: Option<String>,
    /// Encryption and certificates.
    pub ssl: SslSettings,
    /// Whether SCRAM must be bound to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// What kind of server is acceptable.
    pub target_session_attrs: SessionAttrs,
    /// Bounds the login at each address.
    pub connect_timeout: Duration,
    /// How a dead peer is noticed.
    pub keepalive: Keepalive,
    /// The password file.
    pub passfile: Option<PathBuf>,
}

/// A server to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// What to connect to, and the name that a certificate must carry.
    pub host: Host,
    /// Connect to this address instead of looking the name up.
    pub hostaddr: Option<IpAddr>,
    /// TCP port, or the number in the name of the socket.
    pub port: u16,
}

/// A host of a connection string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name or address.
    Tcp(String),
    /// The directory of a Unix socket.
    Unix(PathBuf),
}

impl Endpoint {
    /// The path of the Unix socket; libpq's `UNIXSOCK_PATH`.
    pub(super) fn socket_path(&self) -> PathBuf {
        match &self.host {
            Host::Unix(directory) => directory.join(format!(".s.PGSQL.{}", self.port)),
            Host::Tcp(_) => PathBuf::new(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.hostaddr) {
            (Host::Unix(_), _) => write!(f, "{}", self.socket_path().display()),
            (Host::Tcp(name), Some(address)) if *name != address.to_string() => write!(f, "{name} ({address}):{}", self.port),
            (Host::Tcp(name), _) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            (Host::Tcp(name), _) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// TLS settings.
#[derive(Debug, Clone)]
pub struct SslSettings {
    /// How much protection is demanded.
    pub mode: SslMode,
    /// Trusted certification authorities.
    pub root: RootCert,
    /// The client's certificate chain and key.
    pub client: Option<ClientCert>,
    /// Whether the host name is sent in clear at the start of the handshake.
    pub sni: bool,
    /// Whether TLS starts at once.
    pub negotiation: SslNegotiation,
    /// Refuse TLS 1.2.
    pub only_tls13: bool,
}

/// Where trusted certification authorities come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCert {
    /// Nothing is verified, because no file was named and there is none at the default place; that place is kept for the
    /// error message of the `verify` modes.
    Absent(Option<PathBuf>),
    /// A file of PEM certificates.
    File(PathBuf),
    /// The operating system's (`sslrootcert=system`).
    System,
}

/// The client's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCert {
    /// PEM certificates, the client's first.
    pub cert: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
}

macro_rules! keyword_enum {
    ($(#[$doc:meta])* $name:ident, $keyword:literal: $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            fn parse(text: &str) -> Result<Self> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(invalid(format!(
                        concat!("invalid ", $keyword, " value `{}`; valid are {}"),
                        text, [$($text),+].join(", ")
                    ))),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)+ })
            }
        }
    };
}

keyword_enum! {
    /// `sslmode`.
    SslMode, "sslmode":
    /// Never TLS.
    Disable = "disable",
    /// TLS when the server refuses a plain connection.
    Allow = "allow",
    /// TLS when the server offers it; libpq's default.
    Prefer = "prefer",
    /// TLS; the certificate is verified only when there is a root certificate.
    Require = "require",
    /// TLS with a certificate of a trusted authority, for whatever name.
    VerifyCa = "verify-ca",
    /// TLS with a certificate of a trusted authority for this host.
    VerifyFull = "verify-full",
}

keyword_enum! {
    /// `sslnegotiation`.
    SslNegotiation, "sslnegotiation":
    /// PostgreSQL's `SSLRequest` first.
    Postgres = "postgres",
    /// TLS from the first byte (servers from PostgreSQL 17 on).
    Direct = "direct",
}

keyword_enum! {
    /// `channel_binding`.
    ChannelBinding, "channel_binding":
    /// Never.
    Disable = "disable",
    /// When both sides can.
    Prefer = "prefer",
    /// Refuse a server that does not.
    Require = "require",
}

keyword_enum! {
    /// `target_session_attrs`.
    SessionAttrs, "target_session_attrs":
    /// Any server.
    Any = "any",
    /// One that accepts writes.
    ReadWrite = "read-write",
    /// One that does not.
    ReadOnly = "read-only",
    /// Not in recovery.
    Primary = "primary",
    /// In recovery.
    Standby = "standby",
    /// In recovery when one of the hosts is, else any.
    PreferStandby = "prefer-standby",
}

/// How a dead peer is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Probes are sent at all.
    pub enabled: bool,
    /// Silence before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes that end the connection.
    pub count: u32,
    /// How long sent data may stay unacknowledged.
    pub user_timeout: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: Duration::from_secs(60),
        }
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, "source.conninfo", message)
}

impl ConnInfo {
    /// Reads a connection string: keywords and values (`host=db user=backup`), a URI (`postgresql://backup@db/`), or
    /// nothing at all, when everything is in the environment.
    ///
    /// Each setting is taken from the first of: the string, the service that it or `PGSERVICE` names, the environment,
    /// libpq's default. Files are read here (service file) and at each login (`.pgpass`, certificates), so that a rotated
    /// password or certificate is picked up.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Usage`] for anything libpq would refuse, naming the keyword; values are not repeated in the
    /// message when they may contain a password.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let uri = ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme));
        let mut settings = match uri {
            Some(rest) => parse_uri(rest)?,
            None => parse_keywords(text)?,
        };
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let home = env("HOME").map(PathBuf::from);
        if let Some(service) = settings.get("service").cloned().or_else(|| env("PGSERVICE")) {
            for (keyword, value) in read_service(&service, home.as_deref(), &env)? {
                settings.entry(keyword).or_insert(value);
            }
        }
        for (keyword, variable, how) in KEYWORDS {
            if let Some((variable, value)) = variable.and_then(|name| Some((name, env(name)?))) {
                if let Use::Refused(why) = how {
                    return Err(invalid(format!("{variable} is set in the environment: {why}")));
                }
                settings.entry(keyword).or_insert(value);
            }
        }
        build(&settings, home.as_deref(), &env)
    }

    /// The password for a server: that of the connection string, else the first line of the password file that fits.
    ///
    /// The file's database field is matched against `replication` and against the database for replication connections,
    /// because `pg_basebackup` and `pg_receivewal` look for the former.
    ///
    /// # Errors
    /// When the password file exists but cannot be read.
    pub fn password_for(&self, endpoint: &Endpoint, replication: bool) -> Result<Option<SecretString>> {
        if self.password.is_some() {
            return Ok(self.password.clone());
        }
        let Some(path) = &self.passfile else { return Ok(None) };
        let content = match read_passfile(path) {
            Ok(Some(content)) => content,
            Ok(None) => return Ok(None),
            Err(PassfileError::Ignored(why)) => {
                tracing::warn!(path = %path.display(), "password file ignored: {why}");
                return Ok(None);
            }
            Err(PassfileError::Io(error)) => return Err(Error::io("read the password file", path, error)),
        };
        let database = self.dbname.as_deref().unwrap_or(&self.user);
        let databases: &[&str] = if replication { &["replication", database] } else { &[database] };
        Ok(databases
            .iter()
            .find_map(|database| find_password(&content, &pgpass_host(endpoint), endpoint.port, database, &self.user)))
    }
}

fn seconds(settings: &Settings, name: &str) -> Result<Option<u32>> {
    match settings.get(name).map(|value| value.trim()) {
        None | Some("") => Ok(None),
        // libpq takes negative numbers for "not set".
        Some(value) => match value.parse::<i32>() {
            Ok(number) => Ok(u32::try_from(number).ok().filter(|number| *number > 0)),
            Err(_) => Err(invalid(format!("invalid integer value for connection parameter `{name}`"))),
        },
    }
}

fn build(settings: &Settings, home: Option<&Path>, env: &dyn Fn(&str) -> Option<String>) -> Result<ConnInfo> {
    let get = |name: &str| settings.get(name).filter(|value| !value.is_empty());
    if get("gssencmode").is_some_and(|mode| mode == "require") {
        return Err(invalid("gssencmode=require: GSSAPI encryption is not supported"));
    }
    if get("load_balance_hosts").is_some_and(|mode| mode != "disable") {
        return Err(invalid("load_balance_hosts: only `disable` is supported; hosts are tried in their order"));
    }
    let Some(user) = get("user").cloned().or_else(os_user).or_else(|| env("USER")) else {
        return Err(invalid("no user name: neither `user` nor PGUSER is set and the system user has no name"));
    };
    let default = Keepalive::default();
    let span =
        |name, default: Duration| Ok::<_, Error>(seconds(settings, name)?.map_or(default, |s| Duration::from_secs(s.into())));
    let keepalive = Keepalive {
        enabled: get("keepalives").is_none_or(|value| value.trim() != "0"),
        idle: span("keepalives_idle", default.idle)?,
        interval: span("keepalives_interval", default.interval)?,
        count: seconds(settings, "keepalives_count")?.unwrap_or(default.count),
        user_timeout: seconds(settings, "tcp_user_timeout")?.map_or(default.user_timeout, |ms| Duration::from_millis(ms.into())),
    };
    Ok(ConnInfo {
        endpoints: endpoints(settings)?,
        user,
        password: get("password").map(|password| SecretString::from(password.clone())),
        dbname: get("dbname").cloned(),
        application_name: get("application_name")
            .or_else(|| get("fallback_application_name"))
            .map_or_else(|| "pgvault".to_owned(), Clone::clone),
        options: get("options").cloned(),
        ssl: ssl_settings(settings, home)?,
        channel_binding: get("channel_binding").map_or(Ok(ChannelBinding::Prefer), |text| ChannelBinding::parse(text))?,
        target_session_attrs: get("target_session_attrs").map_or(Ok(SessionAttrs::Any), |text| SessionAttrs::parse(text))?,
        // libpq rounds 1 up to 2, because its clock counts whole seconds; ours does not.
        connect_timeout: span("connect_timeout", Duration::from_secs(30))?,
        keepalive,
        passfile: get("passfile").map(PathBuf::from).or_else(|| home.map(|home| home.join(".pgpass"))),
    })
}

fn endpoints(settings: &Settings) -> Result<Vec<Endpoint>> {
    let list = |name: &str| -> Vec<&str> {
        settings
            .get(name)
            .filter(|value| !value.is_empty())
            .map(|value| value.split(',').map(str::trim).collect())
            .unwrap_or_default()
    };
    let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = hosts.len().max(addresses.len()).max(1);
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err(invalid(format!("could not match {} host names to {} hostaddr values", hosts.len(), addresses.len())));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(invalid(format!("could not match {} port numbers to {count} hosts", ports.len())));
    }
    let mut endpoints = Vec::with_capacity(count);
    for index in 0..count {
        let hostaddr = match addresses.get(index) {
            None | Some(&"") => None,
            Some(text) => Some(text.parse::<IpAddr>().map_err(|_| invalid(format!("hostaddr `{text}` is not an IP address")))?),
        };
        let host = match (hosts.get(index).copied().unwrap_or_default(), hostaddr) {
            ("", Some(address)) => Host::Tcp(address.to_string()),
            ("", None) => Host::Unix(default_socket_dir()),
            (directory, None) if directory.starts_with('/') => Host::Unix(directory.into()),
            (name, None) if name.starts_with('@') => {
                return Err(invalid(format!("host `{name}`: abstract Unix sockets are not supported")));
            }
            (name, _) => Host::Tcp(name.to_owned()),
        };
        let port = match if ports.len() == 1 { ports.first() } else { ports.get(index) } {
            None | Some(&"") => 5432,
            Some(text) => match text.parse::<u16>() {
                Ok(port) if port > 0 => port,
                _ => return Err(invalid(format!("invalid port number `{text}`"))),
            },
        };
        endpoints.push(Endpoint { host, hostaddr, port });
    }
    Ok(endpoints)
}

fn default_socket_dir() -> PathBuf {
    SOCKET_DIRS.iter().map(Path::new).find(|directory| directory.is_dir()).unwrap_or(Path::new("/tmp")).to_owned()
}

fn ssl_settings(settings: &Settings, home: Option<&Path>) -> Result<SslSettings> {
    let get = |name: &str| settings.get(name).filter(|value| !value.is_empty());
    let directory = home.map(|home| home.join(".postgresql"));
    let default_file = |name: &str| directory.as_ref().map(|directory| directory.join(name));
    let root = match get("sslrootcert").map(String::as_str) {
        Some("system") => RootCert::System,
        Some(path) => RootCert::File(path.into()),
        None => match default_file("root.crt") {
            Some(path) if path.exists() => RootCert::File(path),
            path => RootCert::Absent(path),
        },
    };
    let mode = match get("sslmode") {
        Some(text) => SslMode::parse(text)?,
        None if root == RootCert::System => SslMode::VerifyFull,
        None => SslMode::Prefer,
    };
    if root == RootCert::System && mode != SslMode::VerifyFull {
        return Err(invalid(format!("weak sslmode `{mode}` may not be used with sslrootcert=system"))
            .with_hint("use sslmode=verify-full: everybody can get a certificate of a public authority for some name"));
    }
    let negotiation = get("sslnegotiation").map_or(Ok(SslNegotiation::Postgres), |text| SslNegotiation::parse(text))?;
    if negotiation == SslNegotiation::Direct && matches!(mode, SslMode::Disable | SslMode::Allow | SslMode::Prefer) {
        return Err(invalid(format!("weak sslmode `{mode}` may not be used with sslnegotiation=direct")));
    }
    let client = match (get("sslcert"), get("sslkey"), get("sslcertmode").map(String::as_str)) {
        (_, _, Some("disable")) => None,
        (Some(cert), key, _) => {
            let key = key.map(PathBuf::from).or_else(|| default_file("postgresql.key"));
            Some((cert.into(), key.ok_or_else(|| invalid("sslcert is set, but neither sslkey nor HOME"))?))
        }
        (None, key, _) => match (default_file("postgresql.crt"), default_file("postgresql.key")) {
            (Some(cert), Some(default)) if cert.exists() => Some((cert, key.map_or(default, PathBuf::from))),
            _ => None,
        },
    };
    let version = |name: &str| match get(name).map(String::as_str) {
        None | Some("TLSv1" | "TLSv1.1" | "TLSv1.2") => Ok(false),
        Some("TLSv1.3") => Ok(true),
        Some(_) => Err(invalid(format!("invalid {name} value; valid are TLSv1, TLSv1.1, TLSv1.2 and TLSv1.3"))),
    };
    if get("ssl_max_protocol_version").is_some() && !version("ssl_max_protocol_version")? {
        return Err(invalid("ssl_max_protocol_version below TLSv1.3 is not supported"));
    }
    Ok(SslSettings {
        mode,
        root,
        client: client.map(|(cert, key)| ClientCert { cert, key }),
        sni: get("sslsni").is_none_or(|value| value != "0"),
        negotiation,
        only_tls13: version("ssl_min_protocol_version")?,
    })
}

/// The name of the user this process runs as, which libpq gets from `getpwuid`. The password database is read as a file:
/// users of a directory service have to set `user`.
fn os_user() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;

    fn no_env(_: &str) -> Option<String> {
        None
    }

    fn parse(text: &str) -> Result<ConnInfo> {
        ConnInfo::parse(text, &no_env)
    }

    fn tcp(name: &str, port: u16) -> Endpoint {
        Endpoint { host: Host::Tcp(name.to_owned()), hostaddr: None, port }
    }

    #[test]
    fn keywords_are_read_as_libpq_does() {
        let info = parse(r"  host = db.example  port=5433 user='o''' password='it\'s \\ a secret' dbname=a\ b connect_timeout=7")
            .unwrap_err();
        // `''` is not an escape in libpq: the value ends and a keyword named `'` begins.
        assert_eq!(info.kind(), ErrorKind::Usage);
        let info = parse(r"  host = db.example  port=5433 user='o\'x' password='it\'s \\ a secret' dbname=a\ b connect_timeout=7")
            .unwrap();
        assert_eq!(info.endpoints, [tcp("db.example", 5433)]);
        assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("o'x", Some("a b")));
        assert_eq!(info.password.as_ref().unwrap().expose_secret(), r"it's \ a secret");
        assert_eq!(info.connect_timeout, Duration::from_secs(7));
        assert_eq!((info.ssl.mode, info.application_name.as_str()), (SslMode::Prefer, "pgvault"));
        assert!(!format!("{info:?}").contains("secret"), "{info:?}");
    }

    #[test]
    fn several_hosts() {
        let info = parse("user=u host=a,/run/x,c port=1,2,3").unwrap();
        let socket = Endpoint { host: Host::Unix("/run/x".into()), hostaddr: None, port: 2 };
        assert_eq!(info.endpoints, [tcp("a", 1), socket, tcp("c", 3)]);
        assert_eq!(info.endpoints[1].to_string(), "/run/x/.s.PGSQL.2");
        assert_eq!(parse("user=u host=a,b port=7").unwrap().endpoints, [tcp("a", 7), tcp("b", 7)]);
        let info = parse("user=u host=a hostaddr=::1").unwrap();
        assert_eq!(info.endpoints[0].to_string(), "a (::1):5432");
        for bad in ["host=a,b port=1,2,3", "host=a,b hostaddr=::1", "hostaddr=db", "port=0", "port=65536", "port=x"] {
            assert!(parse(&format!("user=u {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn uris_are_read_as_libpq_does() {
        let info =
            parse("postgresql://o%27x:p%40ss%2F@h1:1,[2001:db8::1]:2,h3/my%20db?sslmode=verify-ca&application_name=x").unwrap();
        assert_eq!(info.endpoints, [tcp("h1", 1), tcp("2001:db8::1", 2), tcp("h3", 5432)]);
        assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("o'x", Some("my db")));
        assert_eq!(info.password.as_ref().unwrap().expose_secret(), "p@ss/");
        assert_eq!((info.ssl.mode, info.application_name.as_str()), (SslMode::VerifyCa, "x"));
        let info = parse("postgres:///db?host=/run/x&port=7&user=u&ssl=true").unwrap();
        assert_eq!(info.endpoints, [Endpoint { host: Host::Unix("/run/x".into()), hostaddr: None, port: 7 }]);
        assert_eq!(info.ssl.mode, SslMode::Require);
        assert_eq!(parse("postgresql://u@%2Frun%2Fx/db").unwrap().endpoints[0].host, Host::Unix("/run/x".into()));
        for bad in ["u@[::1/db", "u@[::1]x/db", "u:%zz@h/", "u:%00@h/", "u:%f@h/", "u@h/?x=1", "u@h/?sslmode"] {
            assert!(parse(&format!("postgresql://{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_understood_is_named_and_passwords_are_not() {
        let message = |text: &str| parse(text).unwrap_err().to_string();
        assert!(message("hots=x").contains("`hots`"));
        assert!(message("user=u sslmode=verfy-full").contains("verify-full"));
        assert!(message("user=u sslcrl=/x").contains("sslcrl"));
        assert!(message("user=u gssencmode=require").contains("gssencmode"));
        assert!(message("user=u connect_timeout=soon").contains("connect_timeout"));
        for leak in ["password=my hunter2", "password='hunter2", "postgresql://u:hunter2%@h/"] {
            assert!(!message(leak).contains("hunter2"), "{leak}");
        }
    }

    #[test]
    fn the_environment_fills_what_the_string_leaves_open() {
        let env = |name: &str| {
            Some(match name {
                "PGHOST" => "env.example".to_owned(),
                "PGPORT" => "6000".to_owned(),
                "PGUSER" => "env".to_owned(),
                "PGPASSWORD" => "envpass".to_owned(),
                "PGSSLMODE" => "require".to_owned(),
                "PGAPPNAME" => "app".to_owned(),
                "PGCONNECT_TIMEOUT" => "3".to_owned(),
                "PGDATABASE" => String::new(),
                _ => return None,
            })
        };
        let info = ConnInfo::parse("user=mine", &env).unwrap();
        assert_eq!(info.endpoints, [tcp("env.example", 6000)]);
        assert_eq!((info.user.as_str(), info.dbname.as_deref(), info.application_name.as_str()), ("mine", None, "app"));
        assert_eq!((info.ssl.mode, info.connect_timeout), (SslMode::Require, Duration::from_secs(3)));
        assert!(ConnInfo::parse("", &|name| (name == "PGSSLCRL").then(|| "/x".to_owned())).is_err());
    }

    #[test]
    fn services_come_between_the_string_and_the_environment() {
        let home = tempfile::tempdir().unwrap();
        let content = "# mine\n[other]\nport=1\n\n[prod]\nhost=svc\nport = 7\nuser=svc\n[next]\ndbname=no\n";
        std::fs::write(home.path().join(".pg_service.conf"), content).unwrap();
        let env = |name: &str| {
            Some(match name {
                "HOME" => home.path().display().to_string(),
                "PGPORT" => "9".to_owned(),
                "PGDATABASE" => "env".to_owned(),
                _ => return None,
            })
        };
        let info = ConnInfo::parse("service=prod user=mine", &env).unwrap();
        assert_eq!(info.endpoints, [tcp("svc", 7)]);
        assert_eq!((info.user.as_str(), info.dbname.as_deref()), ("mine", Some("env")));
        assert!(ConnInfo::parse("service=absent", &env).unwrap_err().to_string().contains("absent"));
        std::fs::write(home.path().join(".pg_service.conf"), "[prod]\nhots=x\n").unwrap();
        assert!(ConnInfo::parse("service=prod", &env).unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn the_system_roots_demand_the_full_check() {
        assert_eq!(parse("user=u sslrootcert=system").unwrap().ssl.mode, SslMode::VerifyFull);
        assert!(parse("user=u sslrootcert=system sslmode=require").is_err());
        assert!(parse("user=u sslnegotiation=direct").is_err());
        assert!(parse("user=u sslnegotiation=direct sslmode=require").is_ok());
        assert!(parse("user=u ssl_min_protocol_version=TLSv1.3").unwrap().ssl.only_tls13);
    }

    #[test]
    fn a_password_file_others_can_read_is_ignored() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("pass");
        std::fs::write(&path, "*:*:*:*:secret\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let info = parse(&format!("user=u host=h passfile={}", path.display())).unwrap();
        assert_eq!(info.password_for(&info.endpoints[0], true).unwrap().unwrap().expose_secret(), "secret");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(info.password_for(&info.endpoints[0], true).unwrap().is_none());
        let info = parse("user=u host=h passfile=/nonexistent/x").unwrap();
        assert!(info.password_for(&info.endpoints[0], true).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn no_string_makes_the_parser_panic(text in "\\PC{0,60}", line in "\\PC{0,60}") {
            let _ = parse(&text);
            let _ = parse(&format!("postgresql://{text}"));
            let _ = syntax::parse_service_file(&format!("[x]\n{line}"), "x", Path::new("f"));
        }

        #[test]
        fn any_password_survives_quoting(password in "\\PC{1,40}") {
            let quoted = password.replace('\\', r"\\").replace('\'', r"\'");
            let info = parse(&format!("user=u password='{quoted}'")).unwrap();
            let found = info.password.unwrap();
            prop_assert_eq!(found.expose_secret(), password.as_str());
            let encoded = password.bytes().fold(String::new(), |all, byte| format!("{all}%{byte:02x}"));
            let info = parse(&format!("postgres://u:{encoded}@h/")).unwrap();
            let found = info.password.unwrap();
            prop_assert_eq!(found.expose_secret(), password.as_str());
        }
    }
}
