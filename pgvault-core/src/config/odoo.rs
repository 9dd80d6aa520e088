//! `[cluster.NAME.odoo]`: where the filestores of the cluster's Odoo databases are, and how they are captured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::load;
use crate::{Error, ErrorKind, Result};

/// How documents are kept from Odoo's garbage collector, until 19; from 19.5 on it leaves new ones alone for half an hour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OdooMode {
    /// Not at all: what comes and goes between two passes is not captured.
    #[default]
    Poll,
    /// By a lock that it has to wait for, two seconds at most, while the files on its list are opened.
    Guard,
}

/// `[cluster.NAME.odoo]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OdooConfig {
    /// Odoo's own configuration: `data_dir`, `db_name`, `dbfilter`, and the connection when the cluster has none.
    pub config: Option<PathBuf>,
    /// Odoo's data directory, which has `filestore/<database>`; wins over Odoo's configuration.
    pub data_dir: Option<PathBuf>,
    /// The databases; those of Odoo's configuration, or all that are Odoo's, when not given.
    pub databases: Vec<String>,
    /// Filestores that lie elsewhere, by database.
    pub filestores: BTreeMap<String, PathBuf>,
    /// How documents are kept from Odoo's garbage collector.
    pub mode: OdooMode,
    /// Time between passes of `filestore sync --watch`.
    #[serde(deserialize_with = "load::duration")]
    pub interval: Duration,
    /// Time after which all of a filestore is looked at, whatever the checklist says.
    #[serde(deserialize_with = "load::duration")]
    pub full_every: Duration,
    /// Times of day in which nothing but the checklist is looked at, as in `08:00-20:00`.
    pub blackout: Vec<String>,
    /// Where days begin, as in `Europe/Berlin`; this machine's zone when not given.
    pub time_zone: Option<String>,
}

impl Default for OdooConfig {
    fn default() -> Self {
        Self {
            config: None,
            data_dir: None,
            databases: Vec::new(),
            filestores: BTreeMap::new(),
            mode: OdooMode::Poll,
            interval: Duration::from_secs(60),
            full_every: Duration::from_secs(24 * 3600),
            blackout: Vec::new(),
            time_zone: None,
        }
    }
}

impl OdooConfig {
    /// True when there is anything in it that leads to an instance.
    pub fn is_configured(&self) -> bool {
        self.config.is_some() || self.data_dir.is_some() || !self.filestores.is_empty()
    }

    /// The times of day in which nothing but the checklist is looked at.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when one cannot be read, or the time zone is not known.
    pub fn blackout(&self) -> Result<Blackout> {
        let zone = match &self.time_zone {
            None => jiff::tz::TimeZone::system(),
            Some(name) => jiff::tz::TimeZone::get(name)
                .map_err(|e| Error::new(ErrorKind::Usage, "config.time_zone", format!("odoo.time_zone `{name}`: {e}")))?,
        };
        let windows = self.blackout.iter().map(|window| parse_window(window)).collect::<Result<Vec<_>>>()?;
        Ok(Blackout { zone, windows })
    }
}

fn parse_window(text: &str) -> Result<(jiff::civil::Time, jiff::civil::Time)> {
    let time = |text: &str| jiff::civil::Time::strptime("%H:%M", text.trim());
    let parsed = text.split_once('-').map(|(from, to)| (time(from), time(to)));
    match parsed {
        Some((Ok(from), Ok(to))) if from != to => Ok((from, to)),
        _ => Err(Error::new(ErrorKind::Usage, "config.blackout", format!("odoo.blackout: `{text}` is no time of day"))
            .with_hint("write a beginning and an end, as in \"08:00-20:00\"; it may span midnight")),
    }
}

/// Times of day.
#[derive(Debug, Clone)]
pub struct Blackout {
    zone: jiff::tz::TimeZone,
    windows: Vec<(jiff::civil::Time, jiff::civil::Time)>,
}

impl Blackout {
    /// True inside one of the times.
    pub fn is_on(&self, now: jiff::Timestamp) -> bool {
        let now = now.to_zoned(self.zone.clone()).time();
        self.windows.iter().any(|(from, to)| if from < to { *from <= now && now < *to } else { now >= *from || now < *to })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blackouts_are_local_times_and_may_span_midnight() {
        let config = OdooConfig {
            blackout: vec!["08:00-20:00".into(), "23:30 - 01:00".into()],
            time_zone: Some("Europe/Berlin".into()),
            ..OdooConfig::default()
        };
        let blackout = config.blackout().unwrap();
        // Berlin is an hour ahead of UTC in winter.
        for (at, on) in [
            ("07:00", true),
            ("18:59", true),
            ("19:00", false),
            ("22:30", true),
            ("23:59", true),
            ("00:00", false),
            ("06:59", false),
        ] {
            assert_eq!(blackout.is_on(format!("2026-01-15T{at}:00Z").parse().unwrap()), on, "{at}");
        }
        for bad in ["8-20", "08:00", "25:00-26:00", "08:00-08:00"] {
            assert!(OdooConfig { blackout: vec![bad.into()], ..OdooConfig::default() }.blackout().is_err(), "{bad}");
        }
    }
}
