//! Reading the file and laying the environment over it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::{Table, Value};

use super::Config;
use crate::{Error, ErrorKind, Result};

/// Names outside the nesting rule, because they are shorter.
const ALIASES: [(&str, &str); 3] = [
    ("PGVAULT_VAULT_PASSPHRASE", "PGVAULT_VAULT__PASSPHRASE"),
    ("PGVAULT_VAULT_PASSPHRASE_FILE", "PGVAULT_VAULT__PASSPHRASE_FILE"),
    ("PGVAULT_VAULT_PASSPHRASE_COMMAND", "PGVAULT_VAULT__PASSPHRASE_COMMAND"),
];

/// Reads a configuration file and lays `environment` over it.
///
/// # Errors
/// [`ErrorKind::Usage`] when the file cannot be read or holds something that is not configuration.
pub fn load(path: Option<&Path>, environment: impl Iterator<Item = (String, String)>) -> Result<Config> {
    let text = match path {
        Some(path) => std::fs::read_to_string(path).map_err(|e| {
            Error::new(ErrorKind::Usage, "config.read", format!("read {}: {e}", path.display()))
                .with_hint("name the file with --config or PGVAULT_CONFIG, or create ./pgvault.toml")
        })?,
        None => String::new(),
    };
    load_text(&text, environment).map_err(|e| match path {
        Some(path) => e.context(path.display()),
        None => e,
    })
}

/// Reads configuration text and lays `environment` over it.
///
/// # Errors
/// As [`load`].
pub fn load_text(text: &str, environment: impl Iterator<Item = (String, String)>) -> Result<Config> {
    let usage = |why: String| Error::new(ErrorKind::Usage, "config.invalid", why);
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| {
        // The error itself quotes the line, which may hold a passphrase.
        let line = e.span().and_then(|span| text.get(..span.start)).map_or(1, |before| before.lines().count().max(1));
        usage(format!("line {line}: {}", e.message()))
    })?;
    let mut variables: Vec<(String, String)> = environment.collect();
    variables.sort();
    // Values that are not a string, by the place they go to.
    let mut others = BTreeMap::new();
    for (name, value) in variables {
        let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, full)| (*full).to_owned());
        let Some(path) = name.strip_prefix("PGVAULT_").filter(|path| path.contains("__")) else { continue };
        let keys: Vec<String> = path.split("__").map(str::to_ascii_lowercase).collect();
        let parsed = format!("v = {value}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
        if let Some(parsed) = parsed.filter(|v| !v.is_str()) {
            let _ = others.insert(keys.join("."), (keys.clone(), parsed));
        }
        insert(&mut table, &keys, Value::String(value))
            .ok_or_else(|| usage(format!("{name} does not fit the configuration file")))?;
    }
    if !table.contains_key("vault") {
        return Err(usage("there is no [vault] section".into()).with_hint(
            "write ./pgvault.toml with [vault] url = \"file:///srv/pgvault\", or name the file with --config or PGVAULT_CONFIG",
        ));
    }
    loop {
        let error = match serde_path_to_error::deserialize(Value::Table(table.clone())) {
            Ok(config) => {
                Config::ensure_copies(&config)?;
                return Ok(config);
            }
            Err(error) => error,
        };
        // The environment knows no types: `12345` is a passphrase or a number, as the key has it. Text is tried first.
        match others.remove(&error.path().to_string()) {
            Some((keys, value)) => drop(insert(&mut table, &keys, value)),
            // Neither is the value of a secret repeated.
            None if ["passphrase", "secret", "access_key", "sas", "token"]
                .iter()
                .any(|word| error.path().to_string().contains(word)) =>
            {
                return Err(usage(format!("{}: is not text", error.path())));
            }
            None => return Err(usage(format!("{}: {}", error.path(), error.inner().message()))),
        }
    }
}

fn insert(table: &mut Table, keys: &[String], value: Value) -> Option<()> {
    match keys {
        [] => None,
        [last] => {
            let _ = table.insert(last.clone(), value);
            Some(())
        }
        [first, rest @ ..] => insert(table.entry(first).or_insert_with(|| Value::Table(Table::new())).as_table_mut()?, rest, value),
    }
}

/// A duration such as `1s`, `500ms`, `14d` or `1h 30m`.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).map_err(D::Error::custom)
}

pub(super) fn optional_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

/// As [`duration`], from 100 ms to 1 h: below, every day costs a million PUTs; above, archiving segments loses less.
pub(super) fn flush_interval<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let interval = duration(deserializer)?;
    if (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&interval) {
        return Ok(interval);
    }
    Err(D::Error::custom("a flush interval is between 100ms and 1h"))
}

/// As [`duration`], at least a second.
pub(super) fn receive_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let timeout = duration(deserializer)?;
    if timeout >= Duration::from_secs(1) { Ok(timeout) } else { Err(D::Error::custom("a receive timeout is at least 1s")) }
}

/// As [`duration`], from 1 s to 10 min.
pub(super) fn kms_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let timeout = duration(deserializer)?;
    if (Duration::from_secs(1)..=Duration::from_secs(600)).contains(&timeout) {
        return Ok(timeout);
    }
    Err(D::Error::custom("a timeout of a key service is between 1s and 10min"))
}

/// Bytes, as a number or with a unit such as `4GiB`.
pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    bytesize::ByteSize::deserialize(deserializer).map(|size| size.as_u64())
}

pub(super) fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    size(deserializer).map(Some)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a duration such as 1s, 500ms or 14d");
    let span: jiff::Span = text.parse().map_err(|_| bad())?;
    // A day is 24 hours here: retention does not follow daylight saving.
    let signed = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| bad())?;
    Duration::try_from(signed).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        [vault]
        url = "file:///srv/pgvault"
        passphrase_file = "/etc/pgvault/passphrase"
        [cluster.main]
        connection = "host=/run/postgresql"
        [cluster.main.wal]
        flush_interval = "500ms"
        spool_limit = "4GiB"
        durability = "spool"
        [cluster.main.retention]
        window = "14d"
    "#;

    fn env(pairs: &[(&str, &str)]) -> std::vec::IntoIter<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let config = load_text(
            TEXT,
            env(&[
                ("PGVAULT_VAULT__URL", "file:///other"),
                ("PGVAULT_CLUSTER__MAIN__WAL__SYNCHRONOUS", "true"),
                ("PGVAULT_VAULT_PASSPHRASE_FILE", "/p"),
                ("PGVAULT_TEST_PG", "15"),
            ]),
        )
        .unwrap();
        assert_eq!(config.vault.url, "file:///other");
        assert_eq!(config.vault.passphrase_file.as_deref(), Some(Path::new("/p")));
        let (name, cluster) = config.cluster(None).unwrap();
        assert_eq!(name, "main");
        assert!(cluster.wal.synchronous);
        assert_eq!(cluster.wal.flush_interval, Duration::from_millis(500));
        assert_eq!((cluster.wal.spool_limit, cluster.wal.durability), (4 << 30, crate::config::Durability::Spool));
        assert_eq!(cluster.retention.window, Some(Duration::from_secs(14 * 86_400)));
    }

    #[test]
    fn copies_have_the_keys_of_a_vault_and_names_that_lead_somewhere() {
        let text = format!("{TEXT}\n[copies.east]\nurl = 's3://east'\npassphrase_file = '/p'");
        let fallback = ("PGVAULT_VAULT__FALLBACK", "['east']");
        let config = load_text(&text, env(&[fallback, ("PGVAULT_COPIES__EAST__S3__REGION", "eu-east")])).unwrap();
        assert_eq!(config.vault.fallback, ["east"]);
        let copy = config.copy("east").unwrap();
        assert_eq!((copy.url.as_str(), copy.s3.region.as_deref()), ("s3://east", Some("eu-east")));
        for (text, environment) in [
            (TEXT, vec![fallback]),
            (text.as_str(), vec![("PGVAULT_COPIES__EAST__FALLBACK", "['east']")]),
            (text.as_str(), vec![("PGVAULT_COPIES__EAST__URLL", "x")]),
        ] {
            assert_eq!(load_text(text, env(&environment)).unwrap_err().kind(), ErrorKind::Usage, "{environment:?}");
        }
        assert_eq!(config.copy("west").unwrap_err().code(), "config.copy");
    }

    /// A secret made of digits, or a slot called `true`, is text; a number of workers is a number.
    #[test]
    fn the_key_decides_what_a_variable_means() {
        let config = load_text(
            TEXT,
            env(&[
                ("PGVAULT_VAULT_PASSPHRASE", "12345"),
                ("PGVAULT_VAULT__RECIPIENTS", "['age1x']"),
                ("PGVAULT_CLUSTER__MAIN__WORKERS", "3"),
                ("PGVAULT_CLUSTER__MAIN__WAL__SLOT", "true"),
            ]),
        )
        .unwrap();
        let (_, cluster) = config.cluster(None).unwrap();
        assert_eq!(secrecy::ExposeSecret::expose_secret(config.vault.passphrase.as_ref().unwrap()), "12345");
        assert_eq!(config.vault.recipients, ["age1x"]);
        assert_eq!((cluster.workers, cluster.wal.slot.as_str()), (Some(3), "true"));
        let error = load_text(TEXT, env(&[("PGVAULT_CLUSTER__MAIN__WORKERS", "many")])).unwrap_err();
        assert!(error.to_string().contains("cluster.main.workers"), "{error}");
    }

    #[test]
    fn unknown_keys_and_bad_values_are_errors_that_name_the_place() {
        for (text, place) in [
            ("[vault]\nurl = 'x'\nurll = 'y'", "urll"),
            ("[vault]\nurl = 'x'\n[cluster.a.wal]\nflush_interval = 'soon'", "cluster.a.wal.flush_interval"),
            ("[vault]\nurl = 'x'\n[cluster.a.wal]\nflush_interval = '50ms'", "between 100ms and 1h"),
            ("[vault]\nurl = 'x'\n[cluster.a.wal]\nreceive_timeout = '0s'", "at least 1s"),
            ("[vault]\nurl = 'x'\n[cluster.a.wal]\nspool_limit = 'much'", "cluster.a.wal.spool_limit"),
            ("[vault]\nurl = 'x'\n[cluster.a.wal]\ndurability = 'disk'", "cluster.a.wal.durability"),
            ("[cluster.a]", "[vault]"),
            ("[vault", ""),
        ] {
            let error = load_text(text, env(&[])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(place), "{error}");
        }
    }
}
