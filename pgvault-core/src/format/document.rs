//! Clear JSON documents: `vault.json`, key slots and epochs.
//!
//! They hold nothing secret in the clear, but a flipped bit in one must not pass unseen. So a document has exactly one
//! spelling (keys sorted, two-space indentation, a final newline) and carries the SHA-256 of itself without that field;
//! anything that is not byte for byte that spelling is refused.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::FormatError;

/// The longest document that is read.
pub const MAX_DOCUMENT: usize = 64 << 10;

/// Sorts keys at every level. `serde_json`'s map does so by itself, unless a crate somewhere in the tree that embeds us turns on its
/// `preserve_order`; the format must not depend on that.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let by_key: BTreeMap<&String, &Value> = map.iter().collect();
            Value::Object(by_key.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

fn spell(map: &Map<String, Value>) -> Result<Vec<u8>, FormatError> {
    let map: BTreeMap<&String, Value> = map.iter().map(|(key, value)| (key, sorted(value))).collect();
    let mut text = serde_json::to_vec_pretty(&map).map_err(|e| FormatError::new("document", e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

fn hash(map: &Map<String, Value>) -> Result<String, FormatError> {
    Ok(Sha256::digest(spell(map)?).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

/// The one spelling of `value`.
///
/// # Errors
/// When `value` does not serialise to a JSON object.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, FormatError> {
    let Ok(Value::Object(mut map)) = serde_json::to_value(value) else {
        return Err(FormatError::new("document", "does not serialise to a JSON object"));
    };
    let digest = hash(&map)?;
    map.insert("sha256".into(), Value::String(digest));
    spell(&map)
}

/// Checks a document's spelling and hash, without knowing what it is.
///
/// # Errors
/// When a single byte differs from what [`encode`] wrote.
pub fn verify(what: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, FormatError> {
    let bad = |why: &str| FormatError::new(what, why);
    if bytes.len() > MAX_DOCUMENT {
        return Err(bad("is longer than any document"));
    }
    let mut map: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| FormatError::new(what, format!("is not JSON: {e}")))?;
    if spell(&map)? != bytes {
        return Err(bad("is not in its one spelling; it was changed after it was written"));
    }
    let Some(Value::String(digest)) = map.remove("sha256") else { return Err(bad("has no sha256")) };
    if hash(&map)? != digest {
        return Err(bad("does not match its own sha256; it was changed after it was written"));
    }
    Ok(map)
}

/// Reads a document.
///
/// # Errors
/// As [`verify`], and when it is of a newer version, or a field is unknown, missing or of the wrong type.
pub fn parse<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, FormatError> {
    let map = verify(what, bytes)?;
    // Before the fields are judged: a newer version has others.
    let newer = ["major", "version"].iter().filter_map(|key| map.get(*key)?.as_u64()).any(|version| version > 1);
    if newer {
        return Err(FormatError::unsupported(what, "is of a newer version"));
    }
    serde_json::from_value(Value::Object(map)).map_err(|e| FormatError::new(what, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_document_is_unsupported_whatever_its_fields() {
        for key in ["major", "version"] {
            let bytes = encode(&serde_json::json!({ key: 2, "new": true })).unwrap();
            assert!(parse::<()>("test", &bytes).unwrap_err().unsupported);
        }
        let bytes = encode(&serde_json::json!({ "version": 1 })).unwrap();
        assert!(!parse::<()>("test", &bytes).unwrap_err().unsupported);
    }

    #[test]
    fn every_flipped_bit_of_a_document_is_refused() {
        let bytes = encode(&serde_json::json!({ "b": 1, "a": "x y", "list": [1, 2] })).unwrap();
        assert!(verify("test", &bytes).is_ok());
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(verify("test", &flipped).is_err(), "byte {at} bit {bit}");
            }
        }
    }
}
