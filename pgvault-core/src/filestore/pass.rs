//! What a capture pass leaves in the vault: one object that holds what it found, or leads to it.
//!
//! A pass is the commit: what is in packs before it is stored counts for nothing. Each has the whole catalog, so the newest is all that
//! anybody needs, and the others may be deleted. Writers that do not know of each other make branches; a reader takes what all of them
//! have. A pass stands behind another when it is a later one of the same session, names it, or says that it has seen everything up to a
//! time by the store's clock.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::catalog::Catalog;
use super::instance::Database;
use crate::crypto::sealed::{FrameEncoder, SealedWriter};
use crate::format::object::Kind;
use crate::postgres::{Lsn, TimelineHistory, TimelineId};
use crate::store::ObjectInfo;
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Some stores date an object when its upload begins.
pub(crate) const SLACK: SignedDuration = SignedDuration::from_hours(1);

/// How much of a filestore a pass has looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassKind {
    /// All of it, compared with all rows.
    Full,
    /// The checklist.
    Checklist,
    /// Not all of it yet: what was stored is kept for the next one to go on with.
    Unfinished,
    /// The database is gone.
    Dropped,
    /// What a newer version does.
    #[serde(other)]
    Unknown,
}

/// A position on a timeline, and when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermark {
    /// What committed at or before it has its files in the vault.
    pub lsn: Lsn,
    /// The server's time then.
    pub at: Timestamp,
}

/// How many names there are of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Files that are at the source and in the vault.
    pub present: u64,
    /// Their bytes.
    pub bytes: u64,
    /// In the vault and gone from the source.
    pub gone: u64,
    /// In the vault and gone from the source, though rows refer to them.
    pub lost: u64,
    /// Rows refer to them, and they have never been seen.
    pub missing: u64,
    /// Their content at the source is not what their name says.
    pub damaged: u64,
}

impl Counts {
    /// Counts a file that is there.
    pub(crate) fn present(&mut self, bytes: u64) {
        self.present += 1;
        self.bytes += bytes;
    }
}

/// A capture pass.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pass {
    /// Its id.
    pub id: Ulid,
    /// The session that made it.
    pub session: Ulid,
    /// Whose filestore it is.
    pub database: Database,
    /// How much it looked at.
    pub kind: PassKind,
    /// Where the server was when it began.
    pub timeline: TimelineId,
    /// As above.
    pub lsn: Lsn,
    /// When it began and ended, by the server's clock.
    pub started_at: Timestamp,
    /// As above.
    pub ended_at: Timestamp,
    /// By timeline: where all files are in the vault.
    pub watermarks: BTreeMap<TimelineId, Watermark>,
    /// When the last one that looked at everything began.
    pub full_at: Option<Timestamp>,
    /// Counts, as of that one and what came since.
    pub counts: Counts,
    /// Attachments and their bytes by where they lie, as of the last one that looked at everything.
    pub census: BTreeMap<String, (u64, u64)>,
    /// Files that are looked at again, because their content was not what their name says, and how often they were.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub doubtful: BTreeMap<String, u32>,
    /// The tripwire that was set before the last full pass, while it was still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tripwire: Option<Ulid>,
    /// When Odoo said that its collector last began, in milliseconds of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collector: Option<i64>,
    /// The highest id of an attachment that was looked at.
    #[serde(default)]
    pub highest_id: i64,
    /// What this pass has stored.
    pub new_files: u64,
    /// Their bytes.
    pub new_bytes: u64,
    /// Bytes of all objects of this pass but itself.
    pub stored_bytes: u64,
    /// How it was guarded against Odoo's garbage collector: `poll`, `guard`, `grace`.
    pub mode: String,
    /// Passes that it stands behind, besides those of its session and those that were stored before `seen`.
    pub follows: Vec<Ulid>,
    /// See above.
    pub seen: Option<Timestamp>,
    /// Of the program.
    pub version: String,
}

impl Pass {
    /// Whether everything that committed at or before a position, on a timeline with this history, is in the vault.
    pub fn covers(&self, timeline: TimelineId, lsn: Lsn, history: Option<&TimelineHistory>) -> bool {
        let mut seen = self.watermarks.iter();
        seen.any(|(on, mark)| {
            if *on == timeline {
                return lsn <= mark.lsn;
            }
            // On an ancestor it counts up to where that was left.
            let left = history.and_then(|history| history.switch_point_of(*on));
            left.is_some_and(|left| lsn <= mark.lsn && lsn <= left)
        })
    }

    /// The watermark of a timeline, or the latest of any.
    pub fn watermark(&self) -> Option<(TimelineId, Watermark)> {
        self.watermarks.iter().max_by_key(|(_, mark)| mark.at).map(|(timeline, mark)| (*timeline, *mark))
    }

    /// Takes what another branch knows.
    fn absorb(&mut self, other: &Self) {
        for (timeline, mark) in &other.watermarks {
            let known = self.watermarks.entry(*timeline).or_insert(*mark);
            if known.lsn < mark.lsn {
                *known = *mark;
            }
        }
        self.full_at = self.full_at.max(other.full_at);
        for (name, tries) in &other.doubtful {
            let known = self.doubtful.entry(name.clone()).or_default();
            *known = (*known).max(*tries);
        }
    }
}

/// A pass in a listing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listed {
    pub(crate) id: Ulid,
    pub(crate) session: Ulid,
    pub(crate) stored_at: Timestamp,
    pub(crate) size: u64,
}

impl Listed {
    fn of(object: &ObjectInfo) -> Option<Self> {
        let session = layout::what_of(&object.name)?.parse().ok()?;
        Some(Self { id: layout::id_of(&object.name)?, session, stored_at: object.last_modified, size: object.size })
    }
}

/// What the vault has of one filestore.
#[derive(Debug)]
pub struct Known {
    /// The newest pass, with what other branches know of watermarks.
    pub pass: Pass,
    /// The catalog of all branches.
    pub catalog: Catalog,
    /// The passes that count, the newest first.
    pub(crate) heads: Vec<Listed>,
    /// Those that others stand behind.
    pub(crate) superseded: Vec<Listed>,
}

/// The folders of filestores that the vault has.
///
/// # Errors
/// When the store fails.
pub async fn instances(cluster: &Cluster) -> Result<Vec<String>> {
    cluster.store().list_directories(&cluster.path(layout::dir::PASS)).await
}

/// What the vault has of the filestore in `folder`; nothing when there is no pass.
///
/// # Errors
/// When the store fails, or a pass was changed.
pub async fn load(cluster: &Cluster, folder: &str) -> Result<Option<Known>> {
    let listed = cluster.store().list(&cluster.path(&layout::passes(folder))).await?;
    // Of each session only the last counts.
    let mut last: BTreeMap<Ulid, Listed> = BTreeMap::new();
    let mut superseded = Vec::new();
    for pass in listed.iter().filter_map(Listed::of) {
        match last.get_mut(&pass.session) {
            Some(known) if known.id < pass.id => superseded.push(std::mem::replace(known, pass)),
            Some(_) => superseded.push(pass),
            None => drop(last.insert(pass.session, pass)),
        }
    }
    let mut candidates: Vec<Listed> = last.into_values().collect();
    candidates.sort_by_key(|pass| std::cmp::Reverse((pass.stored_at, pass.id)));
    let mut known: Option<Known> = None;
    let mut heads: Vec<Listed> = Vec::new();
    let mut behind: BTreeSet<Ulid> = BTreeSet::new();
    let mut seen: Option<Timestamp> = None;
    for candidate in candidates {
        if behind.contains(&candidate.id) || seen.is_some_and(|seen| candidate.stored_at < seen - SLACK) {
            superseded.push(candidate);
            continue;
        }
        let (pass, catalog) = match read(cluster, folder, candidate).await {
            Ok(read) => read,
            // Deleted since it was listed: others stand behind it.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        behind.extend(&pass.follows);
        seen = seen.max(pass.seen);
        heads.push(candidate);
        match &mut known {
            None => known = Some(Known { pass, catalog, heads: Vec::new(), superseded: Vec::new() }),
            Some(known) => {
                known.pass.absorb(&pass);
                known.catalog.absorb(catalog);
            }
        }
    }
    Ok(known.map(|known| Known { heads, superseded, ..known }))
}

async fn read(cluster: &Cluster, folder: &str, listed: Listed) -> Result<(Pass, Catalog)> {
    let name = layout::pass(folder, listed.id, listed.session);
    let object = cluster.open(Kind::Pass, &name, Some(listed.size)).await?;
    let json = object.frame(0).await?;
    let path = cluster.path(&name);
    let corrupt = |why: String| Error::new(ErrorKind::Corrupt, "filestore.pass", format!("{path}: {why}"));
    let pass: Pass = serde_json::from_slice(&json).map_err(|e| corrupt(e.to_string()))?;
    if (pass.id, pass.session) != (listed.id, listed.session) || pass.database.folder(cluster.keys().digest()) != folder {
        return Err(corrupt("is not what its name says".into()));
    }
    let mut bytes = Vec::new();
    for frame in 1..object.frame_count() {
        bytes.extend_from_slice(&object.frame(frame).await?);
    }
    let catalog = Catalog::parse(cluster, &bytes).map_err(|e| Error::from(e).context(&path))?;
    Ok((pass, catalog))
}

/// Stores a pass.
///
/// # Errors
/// When the store fails.
pub(crate) async fn commit(cluster: &Cluster, pass: &Pass, catalog: &Catalog) -> Result<()> {
    let name = layout::pass(&pass.database.folder(cluster.keys().digest()), pass.id, pass.session);
    let json = serde_json::to_vec(pass).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
    let catalog = catalog.encode();
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Pass, name, json.len() + catalog.len() + 1024)?;
    let mut encoder = FrameEncoder::new(1)?;
    for frame in std::iter::once(json.as_slice()).chain(catalog.chunks(crate::format::MAX_FRAME)) {
        let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame))?;
    }
    cluster.put_once(&writer.finish(Vec::new())).await
}
