//! The spellings of a connection's settings: keywords and values, URIs, service files, and the names of libpq's environment.

use std::path::{Path, PathBuf};

use super::{Settings, invalid};
use crate::{Error, Result};

/// What becomes of a keyword.
pub(super) enum Use {
    /// Read by [`build`].
    Yes,
    /// Without effect here, and nothing depends on it.
    Ignored,
    /// Would have to have an effect.
    Refused(&'static str),
}

/// Every keyword of libpq up to version 18 with its environment variable.
pub(super) const KEYWORDS: &[(&str, Option<&str>, Use)] = &[
    ("application_name", Some("PGAPPNAME"), Use::Yes),
    ("channel_binding", Some("PGCHANNELBINDING"), Use::Yes),
    ("client_encoding", None, Use::Ignored),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT"), Use::Yes),
    ("dbname", Some("PGDATABASE"), Use::Yes),
    ("fallback_application_name", None, Use::Yes),
    ("gssdelegation", None, Use::Ignored),
    ("gssencmode", None, Use::Yes),
    ("gsslib", None, Use::Ignored),
    ("host", Some("PGHOST"), Use::Yes),
    ("hostaddr", Some("PGHOSTADDR"), Use::Yes),
    ("keepalives", None, Use::Yes),
    ("keepalives_count", None, Use::Yes),
    ("keepalives_idle", None, Use::Yes),
    ("keepalives_interval", None, Use::Yes),
    ("krbsrvname", None, Use::Ignored),
    ("load_balance_hosts", Some("PGLOADBALANCEHOSTS"), Use::Yes),
    ("max_protocol_version", None, Use::Ignored),
    ("min_protocol_version", None, Use::Ignored),
    ("options", Some("PGOPTIONS"), Use::Yes),
    ("passfile", Some("PGPASSFILE"), Use::Yes),
    ("password", Some("PGPASSWORD"), Use::Yes),
    ("port", Some("PGPORT"), Use::Yes),
    ("replication", None, Use::Refused("pgvault chooses the kind of connection itself")),
    ("require_auth", Some("PGREQUIREAUTH"), Use::Refused("use channel_binding=require or sslmode=verify-full instead")),
    ("requirepeer", Some("PGREQUIREPEER"), Use::Refused("not supported")),
    ("service", Some("PGSERVICE"), Use::Yes),
    ("sslcert", Some("PGSSLCERT"), Use::Yes),
    ("sslcertmode", Some("PGSSLCERTMODE"), Use::Yes),
    ("sslcompression", None, Use::Ignored),
    ("sslcrl", Some("PGSSLCRL"), Use::Refused("revocation lists are not supported")),
    ("sslcrldir", Some("PGSSLCRLDIR"), Use::Refused("revocation lists are not supported")),
    ("sslkey", Some("PGSSLKEY"), Use::Yes),
    ("sslmode", Some("PGSSLMODE"), Use::Yes),
    ("sslnegotiation", Some("PGSSLNEGOTIATION"), Use::Yes),
    ("sslpassword", None, Use::Refused("encrypted keys are not supported; protect the key file by its mode")),
    ("sslrootcert", Some("PGSSLROOTCERT"), Use::Yes),
    ("sslsni", Some("PGSSLSNI"), Use::Yes),
    ("ssl_max_protocol_version", Some("PGSSLMAXPROTOCOLVERSION"), Use::Yes),
    ("ssl_min_protocol_version", Some("PGSSLMINPROTOCOLVERSION"), Use::Yes),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS"), Use::Yes),
    ("tcp_user_timeout", None, Use::Yes),
    ("user", Some("PGUSER"), Use::Yes),
];

/// Looks a keyword up, so that every name in [`Settings`] is one of the table.
pub(super) fn keyword(name: &str) -> Result<&'static str> {
    match KEYWORDS.iter().find(|(known, ..)| *known == name) {
        Some((known, _, Use::Yes | Use::Ignored)) => Ok(known),
        Some((known, _, Use::Refused(why))) => Err(invalid(format!("connection parameter `{known}` cannot be used: {why}"))),
        None => Err(invalid(format!("unknown connection parameter `{name}`"))),
    }
}

/// `conninfo_parse` of libpq.
pub(super) fn parse_keywords(text: &str) -> Result<Settings> {
    let mut settings = Settings::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_ascii_whitespace()).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        // The text is not repeated: it may be the second half of a password with a space.
        let Some(value) = after.trim_start().strip_prefix('=') else {
            return Err(invalid(format!("missing `=` in the connection string at offset {}", text.len() - after.len()))
                .with_hint("values with spaces must stand in single quotes"));
        };
        let name = keyword(name)?;
        let (value, after) = take_value(value.trim_start()).ok_or_else(|| {
            invalid(format!("the quoted value of `{name}` does not end")).with_hint(r"inside quotes, write \' and \\")
        })?;
        settings.insert(name, value);
        rest = after.trim_start();
    }
    Ok(settings)
}

/// A value, quoted or not, and what follows it. `None` when the closing quote is missing.
pub(super) fn take_value(text: &str) -> Option<(String, &str)> {
    let (quoted, body) = match text.strip_prefix('\'') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, body.get(at + 1..).unwrap_or_default())),
            c if !quoted && c.is_ascii_whitespace() => return Some((value, body.get(at..).unwrap_or_default())),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

/// `conninfo_uri_parse` of libpq, behind the scheme.
pub(super) fn parse_uri(rest: &str) -> Result<Settings> {
    let mut settings = Settings::new();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (userinfo, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = match userinfo.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (userinfo, None),
    };
    let mut put = |name, value: &str| -> Result<()> {
        let value = percent_decode(value).ok_or_else(|| invalid(format!("invalid percent-encoding in the `{name}` of the URI")))?;
        if !value.is_empty() {
            settings.insert(name, value);
        }
        Ok(())
    };
    put("user", user)?;
    put("password", password.unwrap_or_default())?;
    put("dbname", database)?;
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',') {
        let (name, after) = match host.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or_else(|| invalid("an IPv6 address in the URI has no closing `]`"))?,
            None => host.split_at(host.find(':').unwrap_or(host.len())),
        };
        match after.strip_prefix(':') {
            Some(port) => ports.push(port),
            None if after.is_empty() => ports.push(""),
            None => return Err(invalid("unexpected text behind the IPv6 address in the URI")),
        }
        names.push(name);
    }
    if names.iter().any(|name| !name.is_empty()) {
        put("host", &names.join(","))?;
    }
    if ports.iter().any(|port| !port.is_empty()) {
        put("port", &ports.join(","))?;
    }
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let Some((name, value)) = parameter.split_once('=') else {
            return Err(invalid("a parameter in the query of the URI has no value"));
        };
        let name = percent_decode(name).ok_or_else(|| invalid("invalid percent-encoding in a parameter name of the URI"))?;
        // JDBC's spelling, which libpq accepts too.
        if name == "ssl" && value == "true" {
            put("sslmode", "require")?;
        } else {
            put(keyword(&name)?, value)?;
        }
    }
    Ok(settings)
}

/// `None` for an incomplete or non-hexadecimal escape, for `%00`, and for what is not UTF-8 afterwards.
pub(super) fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let value = digit()? << 4 | digit()?;
        bytes.push(u8::try_from(value).ok().filter(|byte| *byte != 0)?);
    }
    String::from_utf8(bytes).ok()
}

/// The settings of a service: of the user's file, else of the system's.
pub(super) fn read_service(service: &str, home: Option<&Path>, env: &dyn Fn(&str) -> Option<String>) -> Result<Settings> {
    let user_file = env("PGSERVICEFILE").map(PathBuf::from).or_else(|| home.map(|home| home.join(".pg_service.conf")));
    let system_dir = env("PGSYSCONFDIR").map_or_else(|| PathBuf::from("/etc/postgresql-common"), PathBuf::from);
    for path in user_file.into_iter().chain([system_dir.join("pg_service.conf")]) {
        let content = match std::fs::read_to_string(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("read the service file", &path, error)),
        };
        if let Some(settings) = parse_service_file(&content, service, &path)? {
            return Ok(settings);
        }
    }
    Err(invalid(format!("definition of service `{service}` not found")))
}

pub(super) fn parse_service_file(content: &str, service: &str, path: &Path) -> Result<Option<Settings>> {
    let mut found: Option<Settings> = None;
    for (number, line) in content.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            if group.strip_suffix(']') == Some(service) {
                found = Some(Settings::new());
            }
            continue;
        }
        let Some(settings) = &mut found else { continue };
        let place = || format!("service file {}, line {}", path.display(), number + 1);
        let (name, value) = line.split_once('=').ok_or_else(|| invalid(format!("{}: missing `=`", place())))?;
        if name == "service" {
            return Err(invalid(format!("{}: services cannot be nested", place())));
        }
        let name = keyword(name.trim_end()).map_err(|error| error.context(place()))?;
        settings.entry(name).or_insert_with(|| value.trim_start().to_owned());
    }
    Ok(found)
}
