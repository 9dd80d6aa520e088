//! Names that are hard on servers, proxies and file systems.
//!
//! pgvault's own names are letters, digits, `.`, `_`, `-` and `/`. Whoever puts other objects into a vault must not be able to
//! confuse it: a name that is listed is the name that reads, and no two names are the same object.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::Room;
use crate::ErrorKind;
use crate::store::probe::{Miss, Seen};

/// Names that pgvault makes: all of them must work.
const OWN: [&str; 8] = [
    "c/main-7441234567890123456/wal/00000001/000000010000000000000008.wal",
    "c/main-7441234567890123456/wal/00000001/000000010000000000000008.00001000-00002000.part",
    "c/x.tmp.y-1/snap/01M7YQ0CJRX8K616JTDRS0JDVC.snap",
    "c/A_b.c--1/cluster.json",
    "C/a_b.c--1/cluster.json",
    "c/trailing.-1/x.",
    "c/1-1/-",
    "c/...-1/.hidden",
];

/// Names that others may make, and that a vault may meet.
const HOSTILE: [&str; 26] = [
    "space in the middle",
    " space before",
    "plus+and+more",
    "plus and more",
    "percent%41",
    "percentA",
    "percent%25",
    "percent%",
    "%2e%2e/up",
    "%2F",
    "hash#tag",
    "question?mark=1&x",
    "question",
    "tilde~star*",
    "quotes'\"`",
    "brackets[]{}()<>",
    "comma,semi;colon:at@",
    "equals=dollar$bang!caret^pipe|",
    "back\\slash",
    "dots...",
    "...",
    "..x",
    "\u{fc}ml\u{e4}ut",
    // The same to the eye, and other bytes.
    "u\u{308}ml\u{e4}ut",
    "\u{1f418}\u{6570}\u{636e}",
    "UPPER/lower",
];

/// Each name is one object, is listed as it was written, and reads as it is listed. What a store does to names that pgvault never
/// makes is told, and no reason to refuse it.
pub(super) async fn hostile(room: &Room<'_>) -> Seen {
    let long = format!("long/{}", "0123456789abcdefghijklmnopqrstuv".repeat(7)) + "/" + &"x".repeat(200);
    let longer = format!("longer/{}/{}/{}", "x".repeat(240), "y".repeat(240), "z".repeat(240));
    let own: Vec<String> = OWN.iter().map(|name| (*name).to_owned()).chain([long, longer]).collect();
    let hostile: Vec<String> = HOSTILE.iter().map(|name| (*name).to_owned()).chain(["upper/LOWER".to_owned()]).collect();
    let _ = round_trip(room, "own", &own, true).await?;
    match round_trip(room, "hostile", &hostile, false).await {
        Ok(refused) if refused.is_empty() => {
            Ok(format!("{} names are listed and read as they were written", own.len() + hostile.len()))
        }
        Ok(refused) => Ok(format!("names are listed and read as they were written; refused, as they may be: {refused:?}")),
        Err(Miss::Wrong(what)) => Err(Miss::Warn(format!("of names that pgvault never makes: {what}"))),
        Err(other) => Err(other),
    }
}

/// Gives the names that were refused.
async fn round_trip(room: &Room<'_>, folder: &str, names: &[String], must: bool) -> Result<Vec<String>, Miss> {
    let store = room.store();
    let mut stored: BTreeMap<String, Bytes> = BTreeMap::new();
    let mut refused = Vec::new();
    for name in names {
        let full = room.name(&format!("{folder}/{name}"));
        let body = Bytes::from(format!("this is {name}"));
        match store.put_once(&full, body.clone()).await {
            Ok(()) => drop(stored.insert(full, body)),
            Err(error) if error.kind() == ErrorKind::Conflict => {
                return Err(Miss::Wrong(format!("{name} is the same object as another name")));
            }
            // That nothing was stored under another name instead is seen below. Some file systems refuse as if it were there.
            Err(error) if !must && (!error.is_transient() || error.code() == "store.conflict") => refused.push(name.clone()),
            Err(error) => return Err(error.into()),
        }
    }
    for (name, body) in &stored {
        match store.get(name).await {
            Ok(found) if found == *body => {}
            Ok(_) => return Err(Miss::Wrong(format!("{name} reads as another name's object"))),
            Err(error) => return Err(Miss::Wrong(format!("{name} was stored, and does not read: {error}"))),
        }
        let size = store.head(name).await?.size;
        if size != body.len() as u64 {
            return Err(Miss::Wrong(format!("{name} is said to have {size} bytes")));
        }
    }
    let listed = store.list(&room.name(folder)).await?;
    for object in &listed {
        if !stored.contains_key(&object.name) {
            return Err(Miss::Wrong(format!("{} is listed, and was not stored under that name", object.name)));
        }
        // What a listing says is what reads.
        if store.get(&object.name).await.ok() != stored.get(&object.name).cloned() {
            return Err(Miss::Wrong(format!("{} is listed, and does not read", object.name)));
        }
    }
    match stored.keys().find(|name| !listed.iter().any(|object| object.name == **name)) {
        Some(missing) => Err(Miss::Wrong(format!("{missing} was stored, and is not listed"))),
        None => Ok(refused),
    }
}
