//! What the operator asks for.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::postgres::Lsn;
use crate::{Error, ErrorKind, Result};

/// A recovery target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every transaction that ended at or before this moment.
    Time(Timestamp),
    /// Every record that begins at or before this position.
    Lsn(Lsn),
    /// Up to and with the end of this transaction.
    Xid(u32),
    /// Up to this restore point.
    Name(String),
    /// Everything there is.
    Latest,
    /// The end of the backup itself.
    Immediate,
    /// The newest point that a restore drill has proven.
    LastVerified,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(t) => write!(f, "{t}"),
            Self::Lsn(l) => write!(f, "lsn:{l}"),
            Self::Xid(x) => write!(f, "xid:{x}"),
            Self::Name(n) => write!(f, "name:{n}"),
            Self::Latest => f.write_str("latest"),
            Self::Immediate => f.write_str("immediate"),
            Self::LastVerified => f.write_str("last-verified"),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let usage = |why: String| Error::new(ErrorKind::Usage, "target.invalid", why);
        match text {
            "latest" => return Ok(Self::Latest),
            "immediate" => return Ok(Self::Immediate),
            "last-verified" => return Ok(Self::LastVerified),
            _ => {}
        }
        if let Some(lsn) = text.strip_prefix("lsn:") {
            return lsn.parse().map(Self::Lsn).map_err(|e| usage(e.to_string()));
        }
        if let Some(xid) = text.strip_prefix("xid:") {
            let number = xid.parse().ok().filter(|n| *n >= 3 && xid.bytes().all(|b| b.is_ascii_digit()));
            return number.map(Self::Xid).ok_or_else(|| usage(format!("`{xid}` is not a transaction number")));
        }
        if let Some(name) = text.strip_prefix("name:") {
            // PostgreSQL cuts names of restore points at 63 bytes.
            return if name.is_empty() || name.len() > 63 {
                Err(usage(format!("`{name}` cannot name a restore point: names have 1 to 63 bytes")))
            } else {
                Ok(Self::Name(name.into()))
            };
        }
        parse_time(text).map(Self::Time)
    }
}

/// Reads a time with an explicit zone; one without is refused with the readings it could have (T17, R10).
fn parse_time(text: &str) -> Result<Timestamp> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    // PostgreSQL prints the offset without minutes (`+00`), and people copy that.
    if let Some((head, tail)) =
        text.rsplit_once(['+', '-']).filter(|(_, tail)| tail.len() == 2 && tail.bytes().all(|b| b.is_ascii_digit()))
    {
        let sign = text.as_bytes().get(head.len()).copied().map_or('+', char::from);
        if let Ok(time) = format!("{head}{sign}{tail}:00").parse::<Timestamp>() {
            return Ok(time);
        }
    }
    if let Ok(naive) = text.parse::<DateTime>().or_else(|_| text.parse::<jiff::civil::Date>().map(|d| d.at(0, 0, 0, 0))) {
        let local = TimeZone::system();
        let utc = naive.to_zoned(TimeZone::UTC).map(|z| z.timestamp().to_string());
        let here = naive.to_zoned(local.clone()).map(|z| z.strftime("%Y-%m-%dT%H:%M:%S%.f%:z").to_string());
        let zone = local.iana_name().unwrap_or("this machine's zone").to_owned();
        return Err(Error::new(ErrorKind::Usage, "target.no_zone", format!("`{text}` has no time zone")).with_hint(format!(
            "write {} for UTC, or {} for {zone}",
            utc.unwrap_or_default(),
            here.unwrap_or_default()
        )));
    }
    Err(Error::new(ErrorKind::Usage, "target.invalid", format!("`{text}` is not a recovery target"))
        .with_hint("use a time such as 2026-11-21T14:32:00+01:00, lsn:X/Y, xid:N, name:NAME, latest, immediate or last-verified"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_parse() {
        let time: Timestamp = "2026-11-21T13:32:00Z".parse().unwrap();
        for text in [
            "2026-11-21T14:32:00+01:00",
            "2026-11-21 14:32:00+01",
            "2026-11-21 13:32:00.000+00",
            "2026-11-21T13:32:00Z",
            "2026-11-21 14:32:00+01:00",
        ] {
            assert_eq!(text.parse::<Target>().unwrap(), Target::Time(time), "{text}");
        }
        assert_eq!("lsn:0/1A".parse::<Target>().unwrap(), Target::Lsn(Lsn(0x1A)));
        assert_eq!("xid:731".parse::<Target>().unwrap(), Target::Xid(731));
        assert_eq!("name:before deploy".parse::<Target>().unwrap(), Target::Name("before deploy".into()));
        assert_eq!("latest".parse::<Target>().unwrap(), Target::Latest);
        for bad in [
            "",
            "now",
            "13am",
            "2026-11-21T25:00:00Z",
            "lsn:x",
            "xid:-1",
            "xid:+5",
            "xid:2",
            "name:",
            "Latest",
            "2026-13-01T00:00:00Z",
        ] {
            assert_eq!(bad.parse::<Target>().unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }

    /// T17: a time without an offset is refused, and the message shows what it could mean.
    #[test]
    fn t17_a_time_without_a_zone_is_refused_with_both_readings() {
        for text in ["2026-11-21T14:32:00", "2026-11-21 14:32:00", "2026-11-21"] {
            let error = text.parse::<Target>().unwrap_err();
            assert_eq!(error.code(), "target.no_zone", "{text}");
            assert!(error.hint().unwrap().contains("for UTC"), "{error:?}");
        }
    }
}
