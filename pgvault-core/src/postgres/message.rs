//! Framing and decoding of the messages a server sends.
//!
//! Source: the chapter "Frontend/Backend Protocol" of PostgreSQL's documentation and `src/interfaces/libpq/fe-protocol3.c`,
//! from which the limits on message lengths are taken. Everything here reads bytes that an attacker may have written.

use std::error::Error as StdError;
use std::fmt;

use bytes::{Buf, Bytes, BytesMut};

use super::ParseError;
use crate::{Error, ErrorKind};

/// The longest message of a kind that carries data. `walsender` sends at most 128 KiB of WAL and `basebackup` 32 KiB of
/// archive at once; only result rows and error texts can be longer.
const MAX_LONG: usize = 64 << 20;
/// The longest message of any other kind; libpq takes anything above it for a loss of synchronisation.
const MAX_SHORT: usize = 30_000;

/// One message, without its header.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

/// Takes the next complete message off `input`. `None` means that more bytes are needed.
///
/// Nothing is allocated here: a length is checked, never trusted.
pub(super) fn take_frame(input: &mut BytesMut) -> Result<Option<Frame>, ParseError> {
    let Some((header, _)) = input.split_first_chunk::<5>() else { return Ok(None) };
    let [tag, length @ ..] = *header;
    let length = u32::from_be_bytes(length) as usize;
    let limit = match tag {
        b'T' | b'D' | b'd' | b'E' | b'N' | b'A' => MAX_LONG,
        _ => MAX_SHORT,
    };
    if length < 4 || length > limit {
        let why = format!("message type {} with length {length}: this is not a PostgreSQL server, or bytes were lost", Tag(tag));
        return Err(ParseError::new("protocol message", why));
    }
    if input.len() <= length {
        return Ok(None);
    }
    let mut body = input.split_to(length + 1).freeze();
    body.advance(5);
    Ok(Some(Frame { tag, body }))
}

/// A message type in the notation of PostgreSQL's documentation.
pub(super) struct Tag(pub(super) u8);

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0.escape_ascii())
    }
}

/// Reads the fields of a message body; every read is checked against what is left.
#[derive(Debug)]
pub(super) struct Fields {
    what: &'static str,
    rest: Bytes,
}

impl Fields {
    pub(super) fn new(what: &'static str, rest: Bytes) -> Self {
        Self { what, rest }
    }

    fn short(&self) -> ParseError {
        ParseError::new(self.what, "the message ends within a field")
    }

    pub(super) fn u8(&mut self) -> Result<u8, ParseError> {
        self.rest.try_get_u8().map_err(|_| self.short())
    }

    pub(super) fn i16(&mut self) -> Result<i16, ParseError> {
        self.rest.try_get_i16().map_err(|_| self.short())
    }

    pub(super) fn i32(&mut self) -> Result<i32, ParseError> {
        self.rest.try_get_i32().map_err(|_| self.short())
    }

    pub(super) fn i64(&mut self) -> Result<i64, ParseError> {
        self.rest.try_get_i64().map_err(|_| self.short())
    }

    pub(super) fn u64(&mut self) -> Result<u64, ParseError> {
        self.rest.try_get_u64().map_err(|_| self.short())
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<Bytes, ParseError> {
        if self.rest.len() < count {
            return Err(self.short());
        }
        Ok(self.rest.split_to(count))
    }

    /// A string that ends with a zero byte, without it.
    pub(super) fn cstr(&mut self) -> Result<Bytes, ParseError> {
        let end = self.rest.iter().position(|b| *b == 0).ok_or_else(|| self.short())?;
        let text = self.rest.split_to(end);
        self.rest.advance(1);
        Ok(text)
    }

    /// A zero-terminated string that must be UTF-8.
    pub(super) fn text(&mut self) -> Result<String, ParseError> {
        let what = self.what;
        let bytes = self.cstr()?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(ParseError::new(what, format!("`{}` is not UTF-8", bytes.escape_ascii()))),
        }
    }

    pub(super) fn into_rest(self) -> Bytes {
        self.rest
    }
}

/// The column names of a row description.
pub(super) fn row_description(body: Bytes) -> Result<Vec<String>, ParseError> {
    let mut fields = Fields::new("row description", body);
    let count = fields.i16()?;
    let mut names = Vec::new();
    for _ in 0..count {
        names.push(String::from_utf8_lossy(&fields.cstr()?).into_owned());
        // Table, column, type, size, modifier, format.
        fields.bytes(4 + 2 + 4 + 2 + 4 + 2)?;
    }
    Ok(names)
}

/// The values of a row.
pub(super) fn data_row(body: Bytes) -> Result<Vec<Option<Bytes>>, ParseError> {
    let mut fields = Fields::new("data row", body);
    let count = fields.i16()?;
    let mut values = Vec::new();
    for _ in 0..count {
        let length = fields.i32()?;
        values.push(match usize::try_from(length) {
            Ok(length) => Some(fields.bytes(length)?),
            Err(_) if length == -1 => None,
            Err(_) => return Err(ParseError::new("data row", format!("a value of length {length}"))),
        });
    }
    Ok(values)
}

/// What a server says in an error or a notice.
///
/// It is the [source](StdError::source) of every [`Error`] that a server's answer caused, so that callers can decide by
/// SQLSTATE: see [`ServerError::of`] and [`sqlstate`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `WARNING` ..., never translated.
    pub severity: String,
    /// Five characters, for example `58P01`.
    pub sqlstate: String,
    /// The primary message, in the language of the server.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What the server proposes to do.
    pub hint: Option<String>,
}

/// A warning or remark of the server; the same fields as an error.
pub type Notice = ServerError;

/// The SQLSTATE codes that decide something here.
///
/// Source: appendix "PostgreSQL Error Codes".
pub mod sqlstate {
    /// `undefined_file`: a segment was already removed, a history file does not exist.
    pub const UNDEFINED_FILE: &str = "58P01";
    /// `undefined_object`: no slot of that name.
    pub const UNDEFINED_OBJECT: &str = "42704";
    /// `duplicate_object`: a slot of that name exists.
    pub const DUPLICATE_OBJECT: &str = "42710";
    /// `object_in_use`: another walsender streams from the slot.
    pub const OBJECT_IN_USE: &str = "55006";
    /// `data_corrupted`: pages with bad checksums were in the base backup.
    pub const DATA_CORRUPTED: &str = "XX001";
    /// The command is not for what it was given: a logical slot where a physical one is wanted.
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// The role lacks a right.
    pub const INSUFFICIENT_PRIVILEGE: &str = "42501";
    /// `invalid_authorization_specification`: `pg_hba.conf` has no line for this connection.
    pub const INVALID_AUTHORIZATION: &str = "28000";
    /// `invalid_password`.
    pub const INVALID_PASSWORD: &str = "28P01";
    /// `cannot_connect_now`: starting up, shutting down or in recovery without hot standby.
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    /// `admin_shutdown`: a fast shutdown, or somebody terminated this session.
    pub const ADMIN_SHUTDOWN: &str = "57P01";
}

impl ServerError {
    /// The server's answer that caused `error`, if one did.
    pub fn of(error: &Error) -> Option<&Self> {
        let mut source = StdError::source(error);
        while let Some(cause) = source {
            if let Some(server) = cause.downcast_ref() {
                return Some(server);
            }
            source = cause.source();
        }
        None
    }

    /// True when the server closes the connection after this.
    pub fn is_fatal(&self) -> bool {
        matches!(self.severity.as_str(), "FATAL" | "PANIC")
    }

    pub(super) fn parse(body: Bytes) -> Result<Self, ParseError> {
        let mut fields = Fields::new("error or notice", body);
        let mut this = Self::default();
        loop {
            let kind = fields.u8()?;
            if kind == 0 {
                return Ok(this);
            }
            // Before the client encoding is agreed on, or from an SQL_ASCII database, the text can be in any encoding.
            let text = String::from_utf8_lossy(&fields.cstr()?).into_owned();
            match kind {
                b'V' => this.severity = text,
                b'S' if this.severity.is_empty() => this.severity = text,
                b'C' => this.sqlstate = text,
                b'M' => this.message = text,
                b'D' => this.detail = Some(text),
                b'H' => this.hint = Some(text),
                _ => {}
            }
        }
    }

    pub(super) fn into_error(self) -> Error {
        let mut message = format!("PostgreSQL reports {} ({})", self.message, self.sqlstate);
        if let Some(detail) = &self.detail {
            message.push_str(": ");
            message.push_str(detail);
        }
        let error = Error::new(ErrorKind::Source, "source.server", message);
        match &self.hint {
            Some(hint) => error.with_hint(hint.clone()),
            None => error,
        }
        .with_source(self)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity, self.sqlstate, self.message)
    }
}

impl StdError for ServerError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As PostgreSQL 15.20 sent it.
    const REMOVED: &[u8] =
        b"SERROR\0VERROR\0C58P01\0Mrequested WAL segment 000000010000000000000001 has already been removed\0Fwalsender.c\0L776\0\0";

    #[test]
    fn an_error_keeps_its_sqlstate_through_our_error() {
        let server = ServerError::parse(Bytes::from_static(REMOVED)).unwrap();
        assert!(!server.is_fatal());
        let error = server.into_error();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert_eq!(ServerError::of(&error).unwrap().sqlstate, sqlstate::UNDEFINED_FILE);
        assert!(ServerError::of(&Error::new(ErrorKind::Source, "x", "y")).is_none());
    }

    #[test]
    fn lengths_are_refused_before_anything_waits_for_them() {
        for bad in [&b"Z\0\0\0\x03"[..], b"Z\0\0\xff\xff", b"d\x7f\xff\xff\xff", b"HTTP/1.1 400 Bad Request"] {
            assert!(take_frame(&mut BytesMut::from(bad)).is_err(), "{}", bad.escape_ascii());
        }
        assert!(take_frame(&mut BytesMut::from(&b"Z\0\0\0"[..])).unwrap().is_none());
        assert!(take_frame(&mut BytesMut::from(&b"Z\0\0\0\x05"[..])).unwrap().is_none());
        let mut two = BytesMut::from(&b"Z\0\0\0\x05I1\0\0\0\x04"[..]);
        assert_eq!(&take_frame(&mut two).unwrap().unwrap().body[..], b"I");
        assert_eq!(take_frame(&mut two).unwrap().unwrap().tag, b'1');
        assert!(two.is_empty());
    }

    #[test]
    fn rows_know_null_from_empty() {
        let row = data_row(Bytes::from_static(b"\0\x03\xff\xff\xff\xff\0\0\0\0\0\0\0\x01x")).unwrap();
        assert_eq!(row, vec![None, Some(Bytes::new()), Some(Bytes::from_static(b"x"))]);
        assert!(data_row(Bytes::from_static(b"\0\x01\xff\xff\xff\xfe")).is_err());
        assert!(data_row(Bytes::from_static(b"\0\x01\x7f\xff\xff\xff")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let body = Bytes::from(bytes.clone());
            let _ = ServerError::parse(body.clone());
            let _ = row_description(body.clone());
            let _ = data_row(body);
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_frame(&mut input) {}
        }
    }
}
