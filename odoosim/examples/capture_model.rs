//! Which ways of copying a filestore lose files: naive copies of four kinds, in many random histories each.
//!
//! `cargo run --example capture_model -- 100` prints, for each series, kind and interval, in how many of 100 histories there was a reference
//! at some moment at or below the claimed watermark whose file had been whole on the disk and is not in the copy. Files that
//! never were whole are the source's loss; names that nothing puts on the checklist (imports, paths of three digits) are left out.

#![allow(clippy::print_stdout, reason = "its purpose")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use async_trait::async_trait;
use odoosim::content::sha1_hex;
use odoosim::filestore::{GC_SUFFIX, WRITE_SUFFIX};
use odoosim::{History, Missing, Odoo, Options, Participant, Participation, Pause, Rules, Series, Site};
use pgvault_core::postgres::{Connection, Lsn};
use pgvault_core::{Error, Result};
use walkdir::WalkDir;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The whole filestore in every pass.
    Full,
    /// The names of the checklist.
    Checklist,
    /// As before, and the whole filestore when the garbage collection has run since.
    Tripwire,
    /// As before, and a guard that copies the checklist before each garbage collection.
    Guarded,
}

/// What two participants share: the copy.
#[derive(Default)]
struct Copied {
    names: BTreeSet<String>,
    partial: BTreeMap<String, u32>,
}

struct Passes<'a> {
    odoo: Odoo,
    kind: Kind,
    connection: Connection,
    copied: &'a tokio::sync::Mutex<Copied>,
    watermark: Option<Lsn>,
    tripwire: PathBuf,
}

fn listed(odoo: &Odoo, whole: bool) -> Result<Vec<String>> {
    if !whole {
        return Ok(odoo.filestore().marks()?.into_iter().map(|mark| mark.store_fname).collect());
    }
    let root = odoo.filestore().root();
    let files = WalkDir::new(root).into_iter().filter_map(std::result::Result::ok).filter(|entry| entry.file_type().is_file());
    let names = files.filter_map(|entry| Some(entry.path().strip_prefix(root).ok()?.to_string_lossy().into_owned()));
    Ok(names.filter(|name| !name.starts_with("checklist/")).collect())
}

/// Copies a file; false when it is not whole, and was not so fewer than three times.
fn copy(odoo: &Odoo, copied: &mut Copied, name: &str) -> bool {
    if copied.names.contains(name) || name.ends_with(WRITE_SUFFIX) || name.ends_with(GC_SUFFIX) {
        return true;
    }
    let Ok(bytes) = fs::read(odoo.filestore().path(name)) else { return true };
    if name.rsplit('/').next() == Some(&sha1_hex(&bytes)) {
        return copied.names.insert(name.to_owned());
    }
    let seen = copied.partial.entry(name.to_owned()).or_default();
    *seen += 1;
    *seen >= 3
}

#[async_trait]
impl Participant for Passes<'_> {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        pause.here("copy: read the position").await;
        let lsn = self.connection.query_one("select pg_current_wal_flush_lsn()").await?;
        let lsn: Lsn = lsn.required(0)?.parse().unwrap_or_default();
        pause.here("copy: list").await;
        let mut whole = self.kind == Kind::Full || self.watermark.is_none();
        let trips = matches!(self.kind, Kind::Tripwire | Kind::Guarded) && self.odoo.series().locks_for_gc();
        if trips && !self.tripwire.exists() {
            whole = true;
            drop(self.odoo.filestore().create(&self.tripwire)?);
        }
        let mut complete = true;
        loop {
            for name in listed(&self.odoo, whole)? {
                if !name.ends_with("tripwire") && !self.copied.lock().await.names.contains(&name) {
                    pause.here("copy: read").await;
                    complete &= copy(&self.odoo, &mut *self.copied.lock().await, &name);
                }
            }
            // It ran in the middle of this pass: what was listed may have been cut short.
            if whole || !trips || self.tripwire.exists() {
                break;
            }
            whole = true;
            drop(self.odoo.filestore().create(&self.tripwire)?);
        }
        if complete {
            self.watermark = Some(lsn);
        }
        Ok(())
    }
}

/// Holds a lock that writers do not mind, sees the garbage collection wait for it, copies, and lets it go.
struct Guard<'a> {
    odoo: Odoo,
    connection: Connection,
    copied: &'a tokio::sync::Mutex<Copied>,
    armed: bool,
}

#[async_trait]
impl Participant for Guard<'_> {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        pause.here("guard").await;
        if !self.armed {
            let _ = self.connection.simple_query("begin; lock table ir_attachment in row exclusive mode").await?;
            self.armed = true;
        }
        let waiter =
            "select count(*) from pg_locks where relation = 'ir_attachment'::regclass and mode = 'ShareLock' and not granted";
        if self.connection.query_one(waiter).await?.required(0)? != "0" {
            for name in listed(&self.odoo, false)? {
                copy(&self.odoo, &mut *self.copied.lock().await, &name);
            }
            let _ = self.connection.simple_query("commit").await?;
            self.armed = false;
        }
        Ok(())
    }
}

async fn loses(odoo: &Odoo, seed: u64, kind: Kind, every: u32) -> Result<bool> {
    let copied = tokio::sync::Mutex::default();
    let tripwire = odoo.filestore().root().join("checklist/00/tripwire");
    let connection = odoo.connect().await?;
    let mut passes = Passes { odoo: odoo.clone(), kind, connection, copied: &copied, watermark: None, tripwire };
    let mut guard = Guard { odoo: odoo.clone(), connection: odoo.connect().await?, copied: &copied, armed: false };
    let mut participants = vec![Participation::new("copy", every, &mut passes)];
    if kind == Kind::Guarded {
        participants.push(Participation::new("guard", 1, &mut guard));
    }
    let outcome = Box::pin(History::new(seed, Options::default()).run(odoo, participants)).await?;
    guard.connection.close().await;
    let Some(watermark) = passes.watermark else { return Ok(false) };
    passes.connection.close().await;
    let copied = copied.into_inner().names;
    let is_lost = |missing: &Missing| {
        let name = missing.store_fname.split_once('/');
        let of_scheme = name.is_some_and(|(folder, sha1)| folder.len() == 2 && sha1.len() == 40 && sha1.starts_with(folder));
        of_scheme && !missing.whole.is_empty()
    };
    Ok(outcome.missing(watermark, |name| copied.contains(name)).iter().any(is_lost))
}

fn main() -> Result<()> {
    let number: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(100);
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Error::io("start", "the runtime".as_ref(), error))?;
    let site = Site::start()?;
    println!("histories of {number} with a loss at or below the watermark, passes every 3 and every 9 turns");
    for series in Series::ALL {
        for kind in [Kind::Full, Kind::Checklist, Kind::Tripwire, Kind::Guarded] {
            if kind == Kind::Guarded && !series.locks_for_gc() {
                continue;
            }
            let mut losses = Vec::new();
            for every in [3, 9] {
                losses.push(runtime.block_on(Box::pin(cell(&site, series, kind, every, number)))?);
            }
            println!("{series:?} {kind:?}: {losses:?}");
        }
    }
    Ok(())
}

async fn cell(site: &Site, series: Series, kind: Kind, every: u32, number: u64) -> Result<u64> {
    let name = format!("{series:?}_{kind:?}_{every}").to_lowercase();
    let mut odoo = site.create(&name, series, Rules::default()).await?;
    let mut losses = 0;
    for seed in 0..number {
        odoo = odoo.cleared().await?;
        losses += u64::from(Box::pin(loses(&odoo, seed, kind, every)).await?);
    }
    Ok(losses)
}
