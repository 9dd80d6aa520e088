//! Single objects: created once, of any size, read in parts, deleted, by other clients and by those who may not.

use std::ops::Range;

use bytes::Bytes;
use futures::future::join_all;

use super::{AT_ONCE, Room, Stranger};
use crate::env::Env;
use crate::format::MAX_OBJECT;
use crate::store::probe::{Miss, Seen, create_only, pattern};
use crate::store::{Put, Store};
use crate::{Error, ErrorKind, Result};

fn wrong<T>(what: impl Into<String>) -> Result<T, Miss> {
    Err(Miss::Wrong(what.into()))
}

/// A name is taken whatever it was created with, and whatever comes second.
pub(super) async fn create_edges(room: &Room<'_>) -> Seen {
    let bodies = [Bytes::new(), Bytes::from_static(b"x"), pattern(4096), pattern(4097), pattern(1 << 20)];
    for (n, first) in bodies.iter().enumerate() {
        for (m, second) in bodies.iter().enumerate().filter(|(m, _)| *m != n) {
            let name = room.name(&format!("{n}-{m}"));
            if matches!(room.store().put_new(&name, first.clone()).await?, Put::Different(_)) {
                return wrong(format!("{name} is said to be taken"));
            }
            match room.store().put_new(&name, second.clone()).await? {
                Put::Different(kept) if kept == *first => {}
                _ => return wrong(format!("{} bytes were overwritten with {}", first.len(), second.len())),
            }
        }
    }
    Ok(format!("a name is taken whatever it was created with: {} pairs of 0 B to 1 MiB", bodies.len() * (bodies.len() - 1)))
}

/// Who repeats a PUT finds its own bytes, also when several repeat it at once; others find that the name is taken.
pub(super) async fn repeated(room: &Room<'_>) -> Seen {
    let (body, other) = (pattern(100_000), pattern(100_001));
    let name = room.name("object");
    let puts = join_all((0..8).map(|n| {
        let body = if n % 4 == 3 { other.clone() } else { body.clone() };
        async { room.store().put_new(&name, body).await }
    }));
    let mut outcomes = Vec::new();
    for put in puts.await {
        outcomes.push(put?);
    }
    let kept = room.store().get(&name).await?;
    if kept != body && kept != other {
        return wrong("the object has bytes that nobody wrote");
    }
    for (n, put) in outcomes.iter().enumerate() {
        let own = if n % 4 == 3 { &other } else { &body };
        match put {
            Put::Created | Put::Same if *own == kept => {}
            Put::Different(found) if *own != kept && *found == kept => {}
            _ => return wrong(format!("writer {n} was told wrongly what became of its PUT")),
        }
    }
    if let Put::Different(_) = room.store().put_new(&name, kept.clone()).await? {
        return wrong("a repeated PUT of the same bytes finds others");
    }
    Ok("repeated PUTs find their own bytes, and others find that the name is taken".into())
}

/// An object without bytes is an object.
pub(super) async fn empty(room: &Room<'_>) -> Seen {
    let (store, name) = (room.store(), room.name("object"));
    let _ = create_only(store, &name, &Bytes::new()).await?;
    if store.head(&name).await?.size != 0 {
        return wrong("an object of 0 bytes is said to have some");
    }
    let listed = store.list(&room.prefix()).await?;
    if !matches!(listed.as_slice(), [object] if object.name == name && object.size == 0) {
        return wrong(format!("an object of 0 bytes is listed as {listed:?}"));
    }
    behind_the_end(store, &name, 0..1).await?;
    Ok("objects of 0 bytes are created once, found and listed".into())
}

/// The largest object that pgvault makes, in one PUT.
pub(super) async fn large(room: &Room<'_>, len: usize) -> Seen {
    let (store, name, body) = (room.store(), room.name("object"), pattern(len));
    let began = tokio::time::Instant::now();
    let _ = create_only(store, &name, &body).await?;
    let size = store.head(&name).await?.size;
    if size != len as u64 {
        return wrong(format!("an object of {len} bytes is said to have {size}"));
    }
    let end = len as u64;
    for range in [0..1, end / 2 - 8..end / 2 + 8, end - 16..end] {
        same(store, &name, &body, range).await?;
    }
    debug_assert!(end <= MAX_OBJECT);
    Ok(format!("an object of {len} bytes was stored and read twice in {} ms", began.elapsed().as_millis()))
}

/// Ranges that begin and end wherever they can.
pub(super) async fn edges(room: &Room<'_>) -> Seen {
    let (store, name, body) = (room.store(), room.name("object"), pattern(70_001));
    let _ = store.put_new(&name, body.clone()).await?;
    let len = body.len() as u64;
    let mut ranges: Vec<Range<u64>> = vec![0..1, 0..len, 0..len - 1, 1..len, len - 1..len, len - 2..len - 1, len / 2..len / 2 + 1];
    for edge in [255, 256, 4095, 4096, 4097, 65_535, 65_536] {
        ranges.extend([edge..edge + 1, edge - 1..edge + 1, 0..edge, edge..len]);
    }
    for range in &ranges {
        same(store, &name, &body, range.clone()).await?;
    }
    // More than there is: an error, and not what there is.
    for range in [len - 1..len + 1, 0..len + 1, len..len + 1, len + 10..len + 20] {
        behind_the_end(store, &name, range).await?;
    }
    // Nothing at all may be refused; it may not be something.
    if let Ok(bytes) = store.get_range(&name, 5..5).await
        && !bytes.is_empty()
    {
        return wrong(format!("an empty range has {} bytes", bytes.len()));
    }
    match store.get_range(&room.name("missing"), 0..1).await {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(bytes) => return wrong(format!("a range of a missing object has {} bytes", bytes.len())),
    }
    Ok(format!("{} ranges are exact, those over the end are refused", ranges.len()))
}

async fn same(store: &Store, name: &str, body: &Bytes, range: Range<u64>) -> Result<(), Miss> {
    let got = match store.get_range(name, range.clone()).await {
        Err(error) if error.kind() == ErrorKind::Corrupt => return wrong(error.to_string()),
        got => got?,
    };
    let wanted = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
    if wanted.and_then(|(start, end)| body.get(start..end)) == Some(&got[..]) {
        return Ok(());
    }
    wrong(format!("bytes {} to {} of {} are not what was stored", range.start, range.end, body.len()))
}

async fn behind_the_end(store: &Store, name: &str, range: Range<u64>) -> Result<(), Miss> {
    match store.get_range(name, range.clone()).await {
        Err(error) if error.kind() == ErrorKind::Corrupt => Ok(()),
        Err(error) if error.is_transient() || error.code() == "store.denied" => Err(error.into()),
        Err(error) => wrong(format!("bytes {} to {}, over the end: {error} ({:?})", range.start, range.end, error.kind())),
        Ok(bytes) => wrong(format!("bytes {} to {}, over the end, are {} bytes", range.start, range.end, bytes.len())),
    }
}

/// What one client wrote, another finds at once.
pub(super) async fn second_client(room: &Room<'_>) -> Seen {
    let (first, second) = (room.store(), room.second());
    for n in 0..10 {
        let (name, body) = (room.name(&format!("{n}")), pattern(1000 + n));
        let (writer, reader) = if n % 2 == 0 { (first, second) } else { (second, first) };
        let _ = writer.put_new(&name, body.clone()).await?;
        if reader.get(&name).await.map_err(|error| unseen(&name, error))? != body {
            return wrong(format!("{name} has other bytes for the other client"));
        }
        if !reader.list(&room.prefix()).await?.iter().any(|object| object.name == name) {
            return wrong(format!("{name} is not listed for the other client"));
        }
        if !matches!(reader.put_new(&name, Bytes::from_static(b"other")).await?, Put::Different(kept) if kept == body) {
            return wrong(format!("{name} was overwritten by the other client"));
        }
    }
    let same = if room.suite.second.is_some() { "" } else { " (the same one: give the suite a second)" };
    Ok(format!("what one client wrote, the other{same} reads, lists and cannot overwrite"))
}

fn unseen(name: &str, error: Error) -> Miss {
    if error.kind() == ErrorKind::NotFound {
        Miss::Wrong(format!("{name} was stored, and is missing for the other client"))
    } else {
        error.into()
    }
}

/// The store gives its objects times that are those of now and do not go back.
pub(super) async fn times(room: &Room<'_>, env: &Env) -> Seen {
    // Whole seconds are what some stores keep, and clocks may differ: by more than a quarter of an hour S3 refuses signatures.
    let tolerance = jiff::SignedDuration::from_mins(15);
    let mut last: Option<jiff::Timestamp> = None;
    for n in 0..6 {
        let name = room.name(&format!("{n}"));
        let before = env.now();
        let _ = room.store().put_new(&name, pattern(10)).await?;
        let said = room.store().head(&name).await?.last_modified;
        if before.duration_since(said) > tolerance || said.duration_since(env.now()) > tolerance {
            return wrong(format!("an object written at {before} is said to be of {said}"));
        }
        if let Some(last) = last.filter(|last| said < *last) {
            return wrong(format!("an object of {said} was written after one of {last}"));
        }
        let listed = room.store().list(&room.prefix()).await?;
        let listed = listed.iter().find(|object| object.name == name).map(|object| object.last_modified);
        if listed.is_none_or(|listed| listed.as_second() != said.as_second()) {
            return wrong(format!("an object of {said} is listed as of {listed:?}"));
        }
        last = Some(said);
    }
    Ok("objects have the time at which they were written, and it does not go back".into())
}

/// A name that was deleted is free.
pub(super) async fn delete_create(room: &Room<'_>, may_delete: Option<bool>) -> Seen {
    let store = room.store();
    if may_delete == Some(false) {
        return Err(Miss::Skip("these credentials may not delete".into()));
    }
    // What was never there is deleted like what was.
    store.delete(&room.name("missing")).await?;
    let name = room.name("object");
    for n in 0..10 {
        let body = pattern(100 + n);
        if matches!(store.put_new(&name, body.clone()).await?, Put::Different(_)) {
            return wrong(format!("a name that was deleted {n} times is said to be taken"));
        }
        if store.get(&name).await.map_err(|error| unseen(&name, error))? != body {
            return wrong("an earlier object of the name is read");
        }
        store.delete(&name).await?;
        if store.get_if_exists(&name).await?.is_some() {
            return wrong("a deleted object is read");
        }
        if !store.list(&room.prefix()).await?.is_empty() {
            return wrong("a deleted object is listed");
        }
    }
    Ok("a deleted name is gone at once, and can be created again".into())
}

/// Who may not read is told so, at once, and never that there is nothing.
pub(super) async fn denied(room: &Room<'_>, stranger: Option<&Stranger>) -> Seen {
    let Some(stranger) = stranger else {
        return Err(Miss::Skip("the suite was given no store with wrong credentials".into()));
    };
    let (there, missing) = (room.name("there"), room.name("missing"));
    let _ = room.store().put_new(&there, pattern(100)).await?;
    let store = stranger()?;
    let mut asked = 0;
    for name in [&there, &missing] {
        let began = tokio::time::Instant::now();
        let answers = [
            ("GET", store.get(name).await.err()),
            ("GET of a range", store.get_range(name, 0..1).await.err()),
            ("HEAD", store.head(name).await.err()),
            ("LIST", store.list(&room.prefix()).await.err()),
            ("LIST by level", store.list_directories(&room.prefix()).await.err()),
            ("PUT", store.put_new(name, pattern(7)).await.err()),
            ("DELETE", store.delete(name).await.err()),
        ];
        asked += answers.len();
        let took = began.elapsed();
        for (what, error) in answers {
            match error {
                Some(error) if error.kind() == ErrorKind::Failed && error.code() == "store.denied" => {}
                // A writer's good credentials are refused here, too.
                Some(error) if error.kind() == ErrorKind::Immutable && what == "DELETE" => {}
                Some(error) => {
                    return wrong(format!("{what} with wrong credentials: {error} ({:?}, {})", error.kind(), error.code()));
                }
                None => return wrong(format!("{what} with wrong credentials is answered as if they were right")),
            }
        }
        if took > AT_ONCE * 7 {
            return wrong(format!("7 refusals took {} ms: refusals for good were tried again", took.as_millis()));
        }
    }
    if room.store().get(&there).await? != pattern(100) {
        return wrong("wrong credentials have changed an object");
    }
    Ok(format!("{asked} requests with wrong credentials were refused as such, at once"))
}
