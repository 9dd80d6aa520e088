//! The XML API: what `object_store` sends, and retention in Google's spelling of Amazon's.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::objects::{Buckets, Conditions, Object, Retention};
use super::{Answer, Asked, Problem, respond};

const KIND: &str = "application/xml; charset=UTF-8";

pub(super) fn problem(problem: Problem) -> Response<Full<Bytes>> {
    let text = format!(
        "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>the stand-in</Message></Error>",
        problem.code()
    );
    respond(problem.status(), KIND, text)
}

pub(super) fn answer(buckets: &mut Buckets, asked: &Asked) -> Answer {
    let (bucket, name) = match &asked.path[..] {
        [bucket] if !bucket.is_empty() => (bucket.as_str(), String::new()),
        // A client that does not encode the slashes of a name means the same.
        [bucket, name @ ..] if !bucket.is_empty() => (bucket.as_str(), name.join("/")),
        _ => return Err(Problem::NotImplemented),
    };
    let retention = asked.query.contains_key("retention");
    let known = [
        "retention",
        "generation",
        "list-type",
        "prefix",
        "delimiter",
        "start-after",
        "continuation-token",
        "max-keys",
        "versioning",
        "versions",
        "marker",
        "generation-marker",
    ];
    if asked.query.keys().any(|key| !known.contains(&key.as_str())) {
        return Err(Problem::NotImplemented);
    }
    match (asked.method.clone(), name.as_str()) {
        (Method::GET, "") if asked.query.contains_key("versioning") => show_versioning(buckets, bucket),
        (Method::GET, "") if asked.query.contains_key("versions") => list_versions(buckets, asked, bucket),
        (Method::GET, "") => list(buckets, asked, bucket),
        (Method::GET, name) if retention => show_retention(buckets, bucket, name),
        (Method::PUT, name) if retention && !name.is_empty() => set_retention(buckets, asked, bucket, name),
        (Method::GET | Method::HEAD, name) if !name.is_empty() => get(buckets, asked, bucket, name),
        (Method::PUT, name) if !name.is_empty() => put(buckets, asked, bucket, name),
        (Method::DELETE, name) if !name.is_empty() => {
            buckets.delete(bucket, name, queried(asked, "generation")?, conditions(asked)?)?;
            Ok(respond(StatusCode::NO_CONTENT, KIND, ""))
        }
        _ => Err(Problem::NotImplemented),
    }
}

fn queried(asked: &Asked, name: &str) -> Result<Option<u64>, Problem> {
    number(asked.query.get(name).map(String::as_str))
}

fn number(text: Option<&str>) -> Result<Option<u64>, Problem> {
    text.map(|text| text.parse().map_err(|_| Problem::Malformed)).transpose()
}

fn conditions(asked: &Asked) -> Result<Conditions, Problem> {
    Ok(Conditions {
        generation: number(asked.header("x-goog-if-generation-match"))?,
        metageneration: number(asked.header("x-goog-if-metageneration-match"))?,
    })
}

fn put(buckets: &mut Buckets, asked: &Asked, bucket: &str, name: &str) -> Answer {
    let conditions = conditions(asked)?;
    let kept = |name: &str| name == "content-type" || name.starts_with("x-goog-meta-");
    let mut headers: BTreeMap<String, String> = asked
        .headers
        .iter()
        .filter(|(name, _)| kept(name.as_str()))
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
        .collect();
    let retention = match (asked.header("x-goog-object-lock-mode"), asked.header("x-goog-object-lock-retain-until-date")) {
        (None, None) => None,
        (Some(mode), Some(until)) => Some(parse_retention(mode, until)?),
        _ => return Err(Problem::Malformed),
    };
    let bytes = match asked.header("x-goog-copy-source") {
        None => asked.body.clone(),
        Some(source) => {
            let source = percent_encoding::percent_decode_str(source).decode_utf8_lossy().into_owned();
            let (bucket, name) = source.trim_start_matches('/').split_once('/').ok_or(Problem::Malformed)?;
            let source = buckets.object(bucket, name)?;
            headers.clone_from(&source.headers);
            source.bytes.clone()
        }
    };
    let object = buckets.put(bucket, name, bytes, headers, retention, conditions)?;
    Ok(described(respond(StatusCode::OK, KIND, ""), &object))
}

fn get(buckets: &mut Buckets, asked: &Asked, bucket: &str, name: &str) -> Answer {
    let object = buckets.version(bucket, name, queried(asked, "generation")?)?;
    let etag = object.etag();
    let names = |header: &str| asked.header(header).map(|value| value == "*" || value.split(',').any(|tag| tag.trim() == etag));
    if names("if-match") == Some(false) {
        return Err(Problem::Condition);
    }
    if names("if-none-match") == Some(true) {
        return Err(Problem::NotModified);
    }
    let size = object.bytes.len() as u64;
    let head = asked.method == Method::HEAD;
    let whole = if head { Bytes::new() } else { object.bytes.clone() };
    let mut response = match asked.header("range").map(|range| parse_range(range, size)).transpose()? {
        None => respond(StatusCode::OK, KIND, whole),
        Some((from, to)) => {
            let (first, end) = (usize::try_from(from).unwrap_or(usize::MAX), usize::try_from(to + 1).unwrap_or(usize::MAX));
            let part = if head { whole } else { object.bytes.slice(first..end) };
            let mut response = respond(StatusCode::PARTIAL_CONTENT, KIND, part);
            set(&mut response, "content-range", &format!("bytes {from}-{to}/{size}"));
            response
        }
    };
    if head {
        set(&mut response, "content-length", &size.to_string());
    }
    for (name, value) in &object.headers {
        if let Ok(name) = http::HeaderName::try_from(name.as_str()) {
            let _ = HeaderValue::from_str(value).map(|value| response.headers_mut().insert(name, value));
        }
    }
    if let Some(retention) = object.retention {
        set(&mut response, "x-goog-object-lock-mode", mode(retention));
        set(&mut response, "x-goog-object-lock-retain-until-date", &retention.until.to_string());
    }
    Ok(described(response, object))
}

/// The first and the last byte that a `Range` header means.
fn parse_range(text: &str, size: u64) -> Result<(u64, u64), Problem> {
    let (from, to) = text.strip_prefix("bytes=").and_then(|range| range.split_once('-')).ok_or(Problem::Malformed)?;
    let (from, to) = match (number(Some(from).filter(|text| !text.is_empty()))?, number(Some(to).filter(|text| !text.is_empty()))?)
    {
        (Some(from), Some(to)) => (from, to.min(size.saturating_sub(1))),
        (Some(from), None) => (from, size.saturating_sub(1)),
        (None, Some(last)) if last > 0 => (size.saturating_sub(last), size.saturating_sub(1)),
        _ => return Err(Problem::Malformed),
    };
    if from < size && from <= to { Ok((from, to)) } else { Err(Problem::Range) }
}

fn described(mut response: Response<Full<Bytes>>, object: &Object) -> Response<Full<Bytes>> {
    set(&mut response, "etag", &object.etag());
    set(&mut response, "x-goog-generation", &object.generation.to_string());
    set(&mut response, "x-goog-metageneration", &object.metageneration.to_string());
    let modified = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&object.modified);
    set(&mut response, "last-modified", &modified.unwrap_or_default());
    response
}

fn set(response: &mut Response<Full<Bytes>>, name: &'static str, value: &str) {
    let _ = HeaderValue::from_str(value).map(|value| response.headers_mut().insert(name, value));
}

fn mode(retention: Retention) -> &'static str {
    if retention.locked { "COMPLIANCE" } else { "GOVERNANCE" }
}

fn parse_retention(mode: &str, until: &str) -> Result<Retention, Problem> {
    let locked = match mode {
        "COMPLIANCE" => true,
        "GOVERNANCE" => false,
        _ => return Err(Problem::Malformed),
    };
    Ok(Retention { locked, until: until.parse().map_err(|_| Problem::Malformed)? })
}

#[derive(Serialize, Deserialize)]
#[serde(rename = "Retention", rename_all = "PascalCase")]
struct RetentionDocument {
    mode: String,
    retain_until_date: String,
}

fn show_retention(buckets: &mut Buckets, bucket: &str, name: &str) -> Answer {
    let retention = buckets.object(bucket, name)?.retention.ok_or(Problem::NoObject)?;
    let document = RetentionDocument { mode: mode(retention).to_owned(), retain_until_date: retention.until.to_string() };
    written(&document)
}

fn set_retention(buckets: &mut Buckets, asked: &Asked, bucket: &str, name: &str) -> Answer {
    if !buckets.bucket(bucket)?.retention {
        return Err(Problem::Malformed);
    }
    let text = std::str::from_utf8(&asked.body).map_err(|_| Problem::Malformed)?;
    let document: RetentionDocument = quick_xml::de::from_str(text).map_err(|_| Problem::Malformed)?;
    let wanted = parse_retention(&document.mode, &document.retain_until_date)?;
    let bypass = asked.header("x-goog-bypass-governance-retention") == Some("true");
    buckets.object(bucket, name)?.retain(Some(wanted), bypass, Timestamp::now())?;
    Ok(respond(StatusCode::OK, KIND, ""))
}

#[derive(Serialize)]
#[serde(rename = "ListBucketResult", rename_all = "PascalCase")]
struct Listing {
    name: String,
    prefix: String,
    is_truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_continuation_token: Option<String>,
    contents: Vec<Listed>,
    common_prefixes: Vec<Folder>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    key: String,
    generation: u64,
    meta_generation: u64,
    last_modified: String,
    #[serde(rename = "ETag")]
    etag: String,
    size: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Folder {
    prefix: String,
}

fn list(buckets: &mut Buckets, asked: &Asked, bucket: &str) -> Answer {
    let bucket_name = bucket;
    let bucket = buckets.bucket(bucket)?;
    let text = |name: &str| asked.query.get(name).map_or("", String::as_str);
    let (prefix, delimiter) = (text("prefix"), text("delimiter"));
    let limit = queried(asked, "max-keys")?.unwrap_or(1000).clamp(1, 1000);
    // The token of this stand-in is the last name of the page before: of an object, or of what a delimiter has folded.
    let after = text("start-after").max(text("continuation-token"));
    let mut listing = Listing {
        name: bucket_name.to_owned(),
        prefix: prefix.to_owned(),
        is_truncated: false,
        next_continuation_token: None,
        contents: Vec::new(),
        common_prefixes: Vec::new(),
    };
    let mut last = String::new();
    for (name, object) in bucket.objects.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix)) {
        let rest = &name[prefix.len()..];
        let folder = Some(delimiter).filter(|d| !d.is_empty()).and_then(|d| Some(&name[..prefix.len() + rest.find(d)? + d.len()]));
        let shown = folder.unwrap_or(name);
        if shown <= after || shown == last {
            continue;
        }
        if (listing.contents.len() + listing.common_prefixes.len()) as u64 == limit {
            listing.is_truncated = true;
            listing.next_continuation_token = Some(last);
            break;
        }
        shown.clone_into(&mut last);
        match folder {
            Some(folder) => listing.common_prefixes.push(Folder { prefix: folder.to_owned() }),
            None => listing.contents.push(Listed {
                key: name.clone(),
                generation: object.generation,
                meta_generation: object.metageneration,
                last_modified: object.modified.to_string(),
                etag: object.etag(),
                size: object.bytes.len() as u64,
            }),
        }
    }
    written(&listing)
}

#[derive(Serialize)]
#[serde(rename = "VersioningConfiguration", rename_all = "PascalCase")]
struct Versioning {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
}

fn show_versioning(buckets: &mut Buckets, bucket: &str) -> Answer {
    written(&Versioning { status: buckets.bucket(bucket)?.versioning.then_some("Enabled") })
}

#[derive(Serialize)]
#[serde(rename = "ListBucketResult", rename_all = "PascalCase")]
struct Versions {
    name: String,
    prefix: String,
    is_truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_marker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_generation_marker: Option<u64>,
    version: Vec<ListedVersion>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ListedVersion {
    key: String,
    generation: u64,
    meta_generation: u64,
    is_latest: bool,
    last_modified: String,
    #[serde(rename = "ETag")]
    etag: String,
    size: u64,
}

/// Every generation by name and age. There are no delete markers: of a deleted object no generation is the latest.
fn list_versions(buckets: &mut Buckets, asked: &Asked, bucket: &str) -> Answer {
    let text = |name: &str| asked.query.get(name).map_or("", String::as_str);
    let (name, prefix) = (bucket.to_owned(), text("prefix").to_owned());
    let limit = usize::try_from(queried(asked, "max-keys")?.unwrap_or(1000).clamp(1, 1000)).unwrap_or(1000);
    let after = (text("marker").to_owned(), queried(asked, "generation-marker")?.unwrap_or(u64::MAX));
    let bucket = buckets.bucket(bucket)?;
    let current = bucket.objects.iter().map(|(name, object)| (name, object, true));
    let noncurrent = bucket.noncurrent.iter().map(|((name, _), object)| (name, object, false));
    let mut all: Vec<_> = current.chain(noncurrent).filter(|(name, ..)| name.starts_with(&prefix)).collect();
    all.retain(|(name, object, _)| (name.as_str(), object.generation) > (after.0.as_str(), after.1));
    all.sort_by_key(|(name, object, _)| ((*name).clone(), object.generation));
    let next = all.get(limit).and(limit.checked_sub(1)).and_then(|last| all.get(last));
    let (next_marker, next_generation_marker) = next.map(|(name, object, _)| ((*name).clone(), object.generation)).unzip();
    let version = all.iter().take(limit).map(|(name, object, is_latest)| ListedVersion {
        key: (*name).clone(),
        generation: object.generation,
        meta_generation: object.metageneration,
        is_latest: *is_latest,
        last_modified: object.modified.to_string(),
        etag: object.etag(),
        size: object.bytes.len() as u64,
    });
    let version = version.collect();
    written(&Versions { name, prefix, is_truncated: next_marker.is_some(), next_marker, next_generation_marker, version })
}

fn written(document: &impl Serialize) -> Answer {
    let text = quick_xml::se::to_string(document).map_err(|_| Problem::Malformed)?;
    Ok(respond(StatusCode::OK, KIND, format!("<?xml version='1.0' encoding='UTF-8'?>{text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_the_header_says_and_never_behind_the_end() {
        assert_eq!(parse_range("bytes=0-3", 10), Ok((0, 3)));
        assert_eq!(parse_range("bytes=8-20", 10), Ok((8, 9)));
        assert_eq!(parse_range("bytes=4-", 10), Ok((4, 9)));
        assert_eq!(parse_range("bytes=-3", 10), Ok((7, 9)));
        assert_eq!(parse_range("bytes=-30", 10), Ok((0, 9)));
        assert_eq!(parse_range("bytes=10-11", 10), Err(Problem::Range));
        assert_eq!(parse_range("bytes=0-0", 0), Err(Problem::Range));
        for bad in ["bytes=-", "bytes=-0", "bytes=a-b", "0-3"] {
            assert_eq!(parse_range(bad, 10), Err(Problem::Malformed), "{bad}");
        }
    }
}
