//! The JSON API: buckets, and of an object's metadata what locks it.

use bytes::Bytes;
use http::{Method, Response, StatusCode};
use http_body_util::Full;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::objects::{Buckets, Conditions, Object, Retention};
use super::{Answer, Asked, Problem, respond};

const KIND: &str = "application/json; charset=UTF-8";

pub(super) fn problem(problem: Problem) -> Response<Full<Bytes>> {
    let status = problem.status();
    let reason = if status == StatusCode::NOT_FOUND { "notFound" } else { problem.code() };
    let error = json!({ "error": { "code": status.as_u16(), "message": "the stand-in", "errors": [{ "reason": reason }] } });
    respond(status, KIND, error.to_string())
}

pub(super) fn answer(buckets: &mut Buckets, asked: &Asked) -> Answer {
    let parts: Vec<&str> = asked.path.iter().skip(2).map(String::as_str).collect();
    match (asked.method.clone(), &parts[..]) {
        (Method::POST, ["b"]) => {
            let body = document(asked)?;
            let name = body["name"].as_str().ok_or(Problem::Malformed)?;
            let retention = asked.query.get("enableObjectRetention").is_some_and(|value| value == "true");
            buckets.create(name, retention, body["versioning"]["enabled"] == true)?;
            bucket(buckets, name)
        }
        (Method::GET, ["b", name]) => bucket(buckets, name),
        (Method::GET, ["b", bucket, "o", name]) => {
            let object = buckets.object(bucket, name)?;
            Ok(said(&describe(bucket, name, object)))
        }
        (Method::PATCH, ["b", bucket, "o", name]) => patch(buckets, asked, bucket, name),
        (Method::DELETE, ["b", bucket, "o", name]) => {
            let generation = asked.query.get("generation").map(|text| text.parse().map_err(|_| Problem::Malformed)).transpose()?;
            buckets.delete(bucket, name, generation, conditions(asked)?)?;
            Ok(respond(StatusCode::NO_CONTENT, KIND, ""))
        }
        _ => Err(Problem::NotImplemented),
    }
}

fn document(asked: &Asked) -> Result<Value, Problem> {
    serde_json::from_slice(&asked.body).map_err(|_| Problem::Malformed)
}

fn conditions(asked: &Asked) -> Result<Conditions, Problem> {
    let number = |name: &str| asked.query.get(name).map(|text| text.parse().map_err(|_| Problem::Malformed)).transpose();
    Ok(Conditions { generation: number("ifGenerationMatch")?, metageneration: number("ifMetagenerationMatch")? })
}

fn said(value: &Value) -> Response<Full<Bytes>> {
    respond(StatusCode::OK, KIND, value.to_string())
}

fn bucket(buckets: &mut Buckets, name: &str) -> Answer {
    let found = buckets.bucket(name)?;
    let mut value = json!({ "kind": "storage#bucket", "id": name, "name": name, "versioning": { "enabled": found.versioning } });
    if found.retention {
        value["objectRetention"] = json!({ "mode": "Enabled" });
    }
    Ok(said(&value))
}

/// `fields` only makes an answer shorter; all of it is always given.
fn describe(bucket: &str, name: &str, object: &Object) -> Value {
    let mut value = json!({
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "generation": object.generation.to_string(),
        "metageneration": object.metageneration.to_string(),
        "size": object.bytes.len().to_string(),
        "updated": object.modified.to_string(),
        "temporaryHold": object.temporary_hold,
        "eventBasedHold": object.event_based_hold,
    });
    if let Some(Retention { locked, until }) = object.retention {
        value["retention"] = json!({ "mode": if locked { "Locked" } else { "Unlocked" }, "retainUntilTime": until.to_string() });
    }
    value
}

fn patch(buckets: &mut Buckets, asked: &Asked, bucket: &str, name: &str) -> Answer {
    let wanted = document(asked)?;
    let wanted = wanted.as_object().ok_or(Problem::Malformed)?;
    let can_retain = buckets.bucket(bucket)?.retention;
    let bypass = asked.query.get("overrideUnlockedRetention").is_some_and(|value| value == "true");
    conditions(asked)?.ensure(buckets.bucket(bucket)?.objects.get(name))?;
    let object = buckets.object(bucket, name)?;
    // All of it or nothing.
    let mut changed = object.clone();
    for (key, value) in wanted {
        match (key.as_str(), value) {
            ("temporaryHold", Value::Bool(on)) => changed.temporary_hold = *on,
            ("eventBasedHold", Value::Bool(on)) => changed.event_based_hold = *on,
            ("retention", _) if !can_retain => return Err(Problem::Malformed),
            ("retention", Value::Null) => changed.retain(None, bypass, Timestamp::now())?,
            ("retention", Value::Object(retention)) => {
                let text = |name: &str| retention.get(name).and_then(Value::as_str).ok_or(Problem::Malformed);
                let locked = match text("mode")? {
                    "Locked" => true,
                    "Unlocked" => false,
                    _ => return Err(Problem::Malformed),
                };
                let until = text("retainUntilTime")?.parse().map_err(|_| Problem::Malformed)?;
                changed.retain(Some(Retention { locked, until }), bypass, Timestamp::now())?;
            }
            _ => return Err(Problem::NotImplemented),
        }
    }
    changed.metageneration = object.metageneration + 1;
    *object = changed;
    Ok(said(&describe(bucket, name, object)))
}
