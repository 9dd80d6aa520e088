//! The XML of S3 and of Google's XML API, which follows it.

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::store::guard::{BucketRules, Version, VersionsPage};
use crate::store::retention::{Lock, LockMode};

/// A document that is not what was asked for.
pub(super) fn unreadable(store: &'static str, what: &str, error: impl std::fmt::Display) -> object_store::Error {
    object_store::Error::Generic { store, source: format!("the store's answer ({what}) cannot be read: {error}").into() }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename = "Retention", rename_all = "PascalCase")]
struct Retention {
    mode: String,
    retain_until_date: String,
}

pub(super) fn retention(lock: &Lock) -> String {
    format!(
        "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{}</Mode><RetainUntilDate>{}</RetainUntilDate></Retention>",
        lock.mode.s3(),
        lock.until
    )
}

pub(super) fn parse_retention(store: &'static str, body: &[u8]) -> object_store::Result<Lock> {
    let read: Retention = quick_xml::de::from_reader(body).map_err(|e| unreadable(store, "retention", e))?;
    let until: Result<Timestamp, _> = read.retain_until_date.parse();
    match (LockMode::parse(&read.mode), until) {
        (Some(mode), Ok(until)) => Ok(Lock { mode, until }),
        _ => Err(unreadable(store, "retention", format!("{} until {}", read.mode, read.retain_until_date))),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LegalHold {
    status: String,
}

pub(super) fn legal_hold(held: bool) -> String {
    let status = if held { "ON" } else { "OFF" };
    format!("<LegalHold xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Status>{status}</Status></LegalHold>")
}

pub(super) fn parse_legal_hold(store: &'static str, body: &[u8]) -> object_store::Result<bool> {
    let read: LegalHold = quick_xml::de::from_reader(body).map_err(|e| unreadable(store, "legal hold", e))?;
    Ok(read.status.eq_ignore_ascii_case("on"))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versions {
    #[serde(default)]
    is_truncated: bool,
    next_key_marker: Option<String>,
    /// Google's.
    next_marker: Option<String>,
    next_version_id_marker: Option<String>,
    next_generation_marker: Option<String>,
    #[serde(default)]
    version: Vec<Entry>,
    #[serde(default)]
    delete_marker: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    key: String,
    version_id: Option<String>,
    generation: Option<String>,
    #[serde(default)]
    is_latest: bool,
    last_modified: String,
    #[serde(default)]
    size: u64,
    #[serde(rename = "ETag", default)]
    etag: String,
}

/// A page of versions; names as the store has them.
pub(super) fn parse_versions(store: &'static str, body: &Bytes) -> object_store::Result<(Vec<Version>, Option<VersionsPage>)> {
    let read: Versions = quick_xml::de::from_reader(body.as_ref()).map_err(|e| unreadable(store, "versions", e))?;
    let entries = read.version.into_iter().map(|v| (v, false)).chain(read.delete_marker.into_iter().map(|m| (m, true)));
    let mut versions = Vec::new();
    for (entry, is_delete_marker) in entries {
        versions.push(Version {
            written: entry.last_modified.parse().map_err(|e| unreadable(store, "versions", e))?,
            id: entry.version_id.or(entry.generation).unwrap_or_default(),
            name: entry.key,
            is_latest: entry.is_latest,
            is_delete_marker,
            size: entry.size,
            etag: entry.etag,
        });
    }
    let version = read.next_version_id_marker.or(read.next_generation_marker).unwrap_or_default();
    let next = read.next_key_marker.or(read.next_marker).filter(|_| read.is_truncated).map(|key| VersionsPage { key, version });
    Ok((versions, next))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versioning {
    status: Option<String>,
}

pub(super) fn parse_versioning(store: &'static str, body: &[u8]) -> object_store::Result<bool> {
    let read: Versioning = quick_xml::de::from_reader(body).map_err(|e| unreadable(store, "versioning", e))?;
    Ok(read.status.is_some_and(|status| status == "Enabled"))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ObjectLock {
    object_lock_enabled: Option<String>,
    rule: Option<LockRule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LockRule {
    default_retention: Option<DefaultRetention>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DefaultRetention {
    mode: String,
    days: Option<u32>,
    years: Option<u32>,
}

pub(super) fn parse_object_lock(store: &'static str, body: &[u8], rules: &mut BucketRules) -> object_store::Result<()> {
    let read: ObjectLock = quick_xml::de::from_reader(body).map_err(|e| unreadable(store, "object lock", e))?;
    rules.object_lock = Some(read.object_lock_enabled.is_some_and(|on| on == "Enabled"));
    let default = read.rule.and_then(|rule| rule.default_retention);
    rules.default_lock = default.and_then(|default| {
        let days = default.days.or(default.years.map(|years| years.saturating_mul(365)))?;
        Some((LockMode::parse(&default.mode)?, days))
    });
    Ok(())
}

#[derive(Debug, Deserialize)]
struct Lifecycle {
    #[serde(rename = "Rule", default)]
    rules: Vec<LifecycleRule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LifecycleRule {
    #[serde(rename = "ID")]
    id: Option<String>,
    status: String,
    prefix: Option<String>,
    filter: Option<LifecycleFilter>,
    expiration: Option<Expiration>,
    noncurrent_version_expiration: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LifecycleFilter {
    prefix: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Expiration {
    days: Option<u32>,
    date: Option<String>,
}

/// Which rules touch what lies below `prefix`.
pub(super) fn parse_lifecycle(store: &'static str, body: &[u8], prefix: &str, rules: &mut BucketRules) -> object_store::Result<()> {
    let read: Lifecycle = quick_xml::de::from_reader(body).map_err(|e| unreadable(store, "lifecycle", e))?;
    let (mut old, mut current) = (false, false);
    for rule in read.rules.iter().filter(|rule| rule.status == "Enabled") {
        let on = rule.prefix.as_deref().or(rule.filter.as_ref().and_then(|f| f.prefix.as_deref())).unwrap_or_default();
        old |= prefix.starts_with(on) && rule.noncurrent_version_expiration.is_some();
        // A rule for a part of the vault hurts as much as one for all of it.
        let touches = prefix.starts_with(on) || on.starts_with(prefix);
        if touches && rule.expiration.as_ref().is_some_and(|e| e.days.is_some() || e.date.is_some()) {
            tracing::debug!(rule = rule.id.as_deref().unwrap_or_default(), "a lifecycle rule deletes objects");
            current = true;
        }
    }
    rules.expires_old_versions = Some(old);
    rules.expires_objects = Some(current);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_delete_markers_come_mixed() {
        let page = Bytes::from_static(
            b"<ListVersionsResult><Name>b</Name><IsTruncated>true</IsTruncated><NextKeyMarker>k2</NextKeyMarker><NextVersionIdMarker>v9</NextVersionIdMarker>\
              <Version><Key>a</Key><VersionId>1</VersionId><IsLatest>false</IsLatest><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>3</Size></Version>\
              <DeleteMarker><Key>a</Key><VersionId>2</VersionId><IsLatest>true</IsLatest><LastModified>2026-01-02T00:00:00.000Z</LastModified></DeleteMarker>\
              <Version><Key>b</Key><VersionId>3</VersionId><IsLatest>true</IsLatest><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>4</Size></Version>\
              </ListVersionsResult>",
        );
        let (versions, next) = parse_versions("S3", &page).unwrap();
        assert_eq!(next, Some(VersionsPage { key: "k2".into(), version: "v9".into() }));
        let short: Vec<_> = versions.iter().map(|v| (v.name.as_str(), v.id.as_str(), v.is_latest, v.is_delete_marker)).collect();
        assert_eq!(short, [("a", "1", false, false), ("b", "3", true, false), ("a", "2", true, true)]);
    }

    #[test]
    fn rules_that_touch_the_vault_are_told_from_others() {
        let rules_of = |text: &str| {
            let mut rules = BucketRules::default();
            let body = format!("<LifecycleConfiguration>{text}</LifecycleConfiguration>");
            parse_lifecycle("S3", body.as_bytes(), "pg/vault/", &mut rules).unwrap();
            (rules.expires_old_versions, rules.expires_objects)
        };
        let rule = |prefix: &str, what: &str| {
            format!("<Rule><ID>r</ID><Status>Enabled</Status><Filter><Prefix>{prefix}</Prefix></Filter>{what}</Rule>")
        };
        let old = "<NoncurrentVersionExpiration><NoncurrentDays>7</NoncurrentDays></NoncurrentVersionExpiration>";
        let all = "<Expiration><Days>30</Days></Expiration>";
        assert_eq!(rules_of(""), (Some(false), Some(false)));
        assert_eq!(rules_of(&rule("pg/", old)), (Some(true), Some(false)));
        assert_eq!(rules_of(&rule("logs/", &format!("{old}{all}"))), (Some(false), Some(false)));
        assert_eq!(rules_of(&rule("pg/vault/c/", all)), (Some(false), Some(true)));
        let marker = "<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>";
        assert_eq!(rules_of(&rule("", marker)), (Some(false), Some(false)));
    }

    #[test]
    fn a_retention_is_written_and_read() {
        let lock = Lock { mode: LockMode::Compliance, until: "2027-01-02T03:04:05Z".parse().unwrap() };
        assert_eq!(parse_retention("S3", retention(&lock).as_bytes()).unwrap(), lock);
        assert!(parse_retention("S3", b"<Retention><Mode>X</Mode><RetainUntilDate>y</RetainUntilDate></Retention>").is_err());
        assert!(parse_legal_hold("S3", legal_hold(true).as_bytes()).unwrap());
    }

    #[test]
    fn a_default_lock_is_read() {
        let mut rules = BucketRules::default();
        let body = b"<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention><Mode>GOVERNANCE</Mode><Years>1</Years></DefaultRetention></Rule></ObjectLockConfiguration>";
        parse_object_lock("S3", body, &mut rules).unwrap();
        assert_eq!((rules.object_lock, rules.default_lock), (Some(true), Some((LockMode::Governance, 365))));
    }
}
