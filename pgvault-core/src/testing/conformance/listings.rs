//! Listings: complete, of exactly what is asked for, and of this moment.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::Room;
use crate::store::probe::{Miss, Seen, pattern};
use crate::store::{ObjectInfo, Store};
use crate::{Error, Result};

fn names(listed: &[ObjectInfo]) -> Vec<&str> {
    listed.iter().map(|object| object.name.as_str()).collect()
}

/// Some names of many, for a message.
fn some(names: &[impl AsRef<str>]) -> String {
    let shown: Vec<&str> = names.iter().take(3).map(AsRef::as_ref).collect();
    format!("{} ({}{})", names.len(), shown.join(", "), if names.len() > shown.len() { ", ..." } else { "" })
}

fn expect(what: &str, found: &[impl AsRef<str>], wanted: &[impl AsRef<str>]) -> Result<(), Miss> {
    if found.iter().map(AsRef::as_ref).eq(wanted.iter().map(AsRef::as_ref)) {
        return Ok(());
    }
    Err(Miss::Wrong(format!("{what} shows {} instead of {}", some(found), some(wanted))))
}

async fn put_all(store: &Store, names: &[String], concurrency: usize) -> Result<()> {
    stream::iter(names)
        .map(|name| store.put_once(name, Bytes::copy_from_slice(name.as_bytes())))
        .buffer_unordered(concurrency)
        .try_collect::<Vec<()>>()
        .await
        .map(drop)
}

/// Every listing that begins after a PUT has ended shows its object, also among many PUTs, and what was deleted not.
pub(super) async fn fresh(room: &Room<'_>) -> Seen {
    let looks = stream::iter(0..60_u32).map(|n| async move {
        let name = room.name(&format!("{:02x}/{n}", n % 7));
        room.store().put_once(&name, pattern(n as usize)).await?;
        let whole = room.store().list(&room.prefix()).await?;
        let part = room.store().list(&room.name(&format!("{:02x}/", n % 7))).await?;
        let shown = |listed: &[ObjectInfo]| listed.iter().any(|object| object.name == name && object.size == u64::from(n));
        Ok::<_, Error>((shown(&whole) && shown(&part)).then_some(()).ok_or(name))
    });
    let missed: Vec<Result<(), String>> = looks.buffer_unordered(8).try_collect().await?;
    match missed.into_iter().find_map(Result::err) {
        Some(name) => Err(Miss::Wrong(format!("{name} was stored, and a listing after that does not show it"))),
        None => Ok("60 objects, each listed right after its PUT".into()),
    }
}

/// A folder holds what is in it, and not what begins like it.
pub(super) async fn prefixes(room: &Room<'_>) -> Seen {
    let all: Vec<String> = ["a/b", "a/b-c", "a/c/d", "ab", "a-", "a.json", "b"].iter().map(|name| room.name(name)).collect();
    put_all(room.store(), &all, 4).await?;
    let mut sorted = all.clone();
    sorted.sort();
    expect("the folder", &names(&room.store().list(&room.prefix()).await?), &sorted)?;
    for (folder, wanted) in [
        ("a", &["a/b", "a/b-c", "a/c/d"][..]),
        ("a/c", &["a/c/d"]),
        ("none", &[]),
        // These are objects, or beginnings of names.
        ("b", &[]),
        ("ab", &[]),
        ("a/", &["a/b", "a/b-c", "a/c/d"]),
        ("a.js", &[]),
    ] {
        let wanted: Vec<String> = wanted.iter().map(|name| room.name(name)).collect();
        expect(folder, &names(&room.store().list(&room.name(folder)).await?), &wanted)?;
    }
    // A directory cannot have a file and a folder of the same name. pgvault makes none.
    let nested = room.name("a/b/below");
    let both = match room.store().put_once(&nested, pattern(1)).await {
        Ok(()) => {
            expect("an object's name as a folder", &names(&room.store().list(&room.name("a/b")).await?), &[&nested])?;
            let _ = room.store().get(&room.name("a/b")).await?;
            ""
        }
        Err(_) => "; a name that is an object cannot be a folder here",
    };
    Ok(format!("folders show what is in them and nothing else{both}"))
}

/// A listing after a name begins with the first name behind it.
pub(super) async fn offsets(room: &Room<'_>) -> Seen {
    let all: Vec<String> = ["b/a", "b0", "d", "d.part", "dd", "z/y"].iter().map(|name| room.name(name)).collect();
    put_all(room.store(), &all, 4).await?;
    let mut sorted = all.clone();
    sorted.sort();
    // At each name, right before and behind it, before the first and behind the last.
    let mut offsets: Vec<String> = sorted.iter().flat_map(|name| [name.clone(), format!("{name}!"), cut(name)]).collect();
    offsets.extend(["A", "c", "zz"].iter().map(|name| room.name(name)));
    for offset in &offsets {
        let wanted: Vec<&String> = sorted.iter().filter(|name| *name > offset).collect();
        let found = room.store().list_after(&room.prefix(), Some(offset)).await?;
        expect(&format!("a listing after {offset}"), &names(&found), &wanted)?;
    }
    Ok(format!("{} listings after a name begin right behind it", offsets.len()))
}

fn cut(name: &str) -> String {
    let mut cut = name.to_owned();
    let _ = cut.pop();
    cut.push('!');
    cut
}

/// By level, each folder is named once.
pub(super) async fn levels(room: &Room<'_>) -> Seen {
    let all: Vec<String> = (0..40).map(|n| room.name(&format!("{:02x}/{}/x", n % 10, n))).collect();
    put_all(room.store(), &all, 8).await?;
    room.store().put_once(&room.name("object"), pattern(3)).await?;
    let found = room.store().list_directories(&room.prefix()).await?;
    let wanted: Vec<String> = (0..10).map(|n| format!("{n:02x}")).collect();
    expect("a listing by level", &found, &wanted)?;
    expect("a listing of nothing by level", &room.store().list_directories(&room.name("none/")).await?, &[""; 0])?;
    Ok("listings by level name each folder once".into())
}

/// More keys than any page has.
pub(super) async fn many(room: &Room<'_>, keys: usize, concurrency: usize) -> Seen {
    // In another order than that of their names.
    let all: Vec<String> = (0..keys).map(|n| room.name(&format!("{:08X}", n.wrapping_mul(2_654_435_761) & 0xFFFF_FFFF))).collect();
    let began = tokio::time::Instant::now();
    put_all(room.store(), &all, concurrency).await?;
    let stored = began.elapsed();
    let mut sorted = all;
    sorted.sort();
    let began = tokio::time::Instant::now();
    let listed = room.store().list(&room.prefix()).await?;
    let took = began.elapsed();
    expect("a listing", &names(&listed), &sorted)?;
    if let Some(wrong) = listed.iter().find(|object| object.size != object.name.len() as u64) {
        return Err(Miss::Wrong(format!("{} is listed with {} bytes", wrong.name, wrong.size)));
    }
    for at in [0, keys / 3, keys.saturating_sub(2), keys.saturating_sub(1), 999, 1000, 1001] {
        let Some(after) = sorted.get(at) else { continue };
        let found = room.store().list_after(&room.prefix(), Some(after)).await?;
        expect(&format!("a listing after {after}"), &names(&found), sorted.get(at + 1..).unwrap_or_default())?;
    }
    Ok(format!("{keys} objects, stored in {} ms, listed in {} ms", stored.as_millis(), took.as_millis()))
}
