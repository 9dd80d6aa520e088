//! Positions in the write-ahead log and the identities that give them meaning.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ParseError;

/// A byte position in the write-ahead log, printed `X/Y` as PostgreSQL does.
///
/// An LSN means something only together with a [`SystemId`] and a [`TimelineId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `0/0`, which PostgreSQL uses for "no position".
    pub const INVALID: Self = Self(0);

    /// True for `0/0`.
    pub fn is_invalid(self) -> bool {
        self.0 == 0
    }

    /// The position `bytes` further on, saturating at the end of the address space.
    #[must_use]
    pub fn advance(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseError::new("LSN", format!("`{text}` is not of the form X/Y, two hexadecimal numbers"));
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let part = |s: &str| {
            if s.is_empty() || s.len() > 8 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            u64::from_str_radix(s, 16).map_err(|_| bad())
        };
        Ok(Self(part(high)? << 32 | part(low)?))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Reads 8 hexadecimal digits of a file name. PostgreSQL writes them in upper case; another spelling would be another file's name.
pub(crate) fn hex8(text: &str) -> Option<u32> {
    let plain = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    u32::from_str_radix(text, 16).ok().filter(|_| plain)
}

/// A branch of a cluster's history; each promotion starts a new one.
///
/// Printed in decimal for people; in file names it is 8 hexadecimal digits, see [`TimelineId::hex`] (T15: parsing those
/// as decimal went unnoticed until timeline 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl TimelineId {
    /// The 8 upper-case hexadecimal digits of file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }

    /// Reads the 8 hexadecimal digits of a file name.
    ///
    /// # Errors
    /// When `text` is anything but 8 upper-case hexadecimal digits, or zero: timelines start at 1.
    pub fn from_hex(text: &str) -> Result<Self, ParseError> {
        match hex8(text) {
            Some(n) if n > 0 => Ok(Self(n)),
            _ => Err(ParseError::new("timeline", format!("`{text}` is not 8 hexadecimal digits"))),
        }
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity `initdb` gave a cluster; its standbys share it, `pg_upgrade` and `initdb` change it.
///
/// Serialised as a decimal string, because JSON readers lose the low digits of a 64-bit number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SystemId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number: Option<u64> = text.parse().ok();
        // One spelling: it is part of a cluster's prefix, and `+7` or `07` would be another prefix.
        let number = number.filter(|n| n.to_string() == text);
        number.map(Self).ok_or_else(|| ParseError::new("system identifier", format!("`{text}` is not a decimal number")))
    }
}

impl Serialize for SystemId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_prints_and_parses_as_postgres_does() {
        assert_eq!(Lsn(0x1_0000_00A0).to_string(), "1/A0");
        assert_eq!("16/B374D848".parse::<Lsn>().unwrap(), Lsn(0x16_B374_D848));
        for bad in ["", "/", "1", "1/", "/1", "1/123456789", "x/1", "-1/1", "+1/1", "1/1/1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    /// T15: timelines from 10 on differ between decimal and hexadecimal.
    #[test]
    fn t15_timelines_are_hexadecimal_in_file_names() {
        assert_eq!(TimelineId(10).hex(), "0000000A");
        assert_eq!(TimelineId::from_hex("00000010").unwrap(), TimelineId(16));
        assert!(TimelineId::from_hex("00000000").is_err());
        assert!(TimelineId::from_hex("0000001").is_err());
        assert!(TimelineId::from_hex("+0000001").is_err());
        assert!(TimelineId::from_hex("0000000a").is_err());
    }
}
