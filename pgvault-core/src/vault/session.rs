//! Sessions: what a writer intends, and until when.
//!
//! A session object is written before anything else. Its deadline bounds how long the packs of an unfinished backup may be
//! unreferenced, so that a garbage collector that waits longer never deletes what a live writer is about to commit.
//! Age is measured with the store's clock (the last-modified of session objects), never the client's.
//!
//! A restore and a drill announce themselves as well, where their credentials may write: what they read is not expired meanwhile.
//!
//! What a session is for and what it is going to commit stand in its name, `<ulid>.<purpose>.<commits>`, so that a backup need not read
//! those of all backups before it. The name is sealed with the record, and whoever acts on a session reads it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::postgres::{Lsn, TimelineId};
use crate::store::ObjectInfo;
use crate::vault::snapshot::Manifest;
use crate::{Error, ErrorKind, Result};

/// Hours after which an unfinished writer must give up. A garbage collector's grace must be longer.
pub const MAX_HOURS: i64 = 48;

/// Hours since its beginning within which an interrupted writer's packs may be used by another. That one ends [`MAX_HOURS`] later, and
/// all that while the packs are younger than a garbage collector's grace, which is at least the sum.
pub const RESUME_HOURS: i64 = 24;

/// Hours for which what a reader has named is not expired: a restore, and the replay after it. No session lasts longer, whatever it
/// says.
pub const READ_HOURS: i64 = 96;

/// Hours after which a session means nothing to anybody, whatever it says.
pub const OLDEST_HOURS: i64 = 7 * 24;

/// The longest time between a writer's look at its deadline and the commit that follows, with every repetition of the request.
const SLACK_HOURS: i64 = 1;

/// Interrupted writers that are looked at, the newest first.
const MAX_UNFINISHED: usize = 8;

/// What kind of writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// A base backup.
    Backup,
    /// A long-running WAL stream.
    WalStream,
    /// A copy of backups of another vault.
    Copy,
    /// Capture passes over filestores: many, one after the other.
    Filestore,
    /// A restore, which reads.
    Restore,
    /// A restore drill, which reads.
    Drill,
    /// Expiry, or the collection of garbage.
    Prune,
    /// What a newer version does: it may be anything.
    #[serde(other, skip_serializing)]
    Unknown,
}

impl Purpose {
    /// As names have it.
    fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::WalStream => "wal-stream",
            Self::Copy => "copy",
            Self::Filestore => "filestore",
            Self::Restore => "restore",
            Self::Drill => "drill",
            Self::Prune => "prune",
            Self::Unknown => "unknown",
        }
    }

    /// What follows the id in the name of a session.
    fn of(self, commits: Ulid) -> String {
        format!("{}.{commits}", self.name())
    }
}

/// What follows the id in the name of an object that only tells the store's time.
const WITNESS: &str = "witness";

/// What a reader reads: a backup, and the WAL from its start on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reads {
    /// The backup.
    pub backup_id: Ulid,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start_lsn: Lsn,
    /// Where it ends.
    pub stop_lsn: Lsn,
}

impl Reads {
    /// What a restore of a backup reads.
    pub fn of(backup: &Manifest) -> Self {
        let Manifest { id, timeline, start_lsn, stop_lsn, .. } = backup;
        Self { backup_id: *id, timeline: *timeline, start_lsn: *start_lsn, stop_lsn: *stop_lsn }
    }
}

/// A session as stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionRecord {
    /// What kind of writer.
    pub purpose: Purpose,
    /// When it started, by its own clock; information only.
    pub started_at: jiff::Timestamp,
    /// The name of what it is going to commit.
    pub commits: Ulid,
    /// Hours it may last.
    pub hours: i64,
    /// What it reads, when it is a reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<Reads>,
    /// The program's version.
    pub version: String,
}

/// Written right before a commit, to learn the store's time.
#[derive(Debug, Serialize)]
struct Committing {
    session: Ulid,
}

/// Sessions of a purpose that have committed nothing, and began so shortly before `own` that it may use what they left
/// ([`RESUME_HOURS`]); the newest first. Some of them may still be running, which does no harm.
///
/// # Errors
/// When the store fails.
pub async fn unfinished(cluster: &Cluster, own: &Session, purpose: Purpose) -> Result<Vec<Ulid>> {
    let committed: BTreeSet<Ulid> = {
        let listed = cluster.store().list(&cluster.path(layout::dir::SNAP)).await?;
        listed.iter().filter_map(|object| layout::id_of(&object.name)).collect()
    };
    let mut found = Vec::new();
    for object in cluster.store().list(&cluster.path(layout::dir::SESSION)).await?.into_iter().rev() {
        let Some(id) = layout::id_of(&object.name).filter(|id| *id != own.id) else { continue };
        if own.began.duration_since(object.last_modified).as_hours() >= RESUME_HOURS {
            continue;
        }
        let commits = layout::what_of(&object.name).and_then(|what| what.strip_prefix(purpose.name())?.strip_prefix('.'));
        let Some(commits) = commits.and_then(|id| Ulid::from_string(id).ok()) else { continue };
        if !committed.contains(&commits) {
            found.push(id);
        }
        if found.len() == MAX_UNFINISHED {
            break;
        }
    }
    Ok(found)
}

/// A session that is not over yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// Its name.
    pub id: Ulid,
    /// When the store says it began.
    pub began: jiff::Timestamp,
    /// What it is for.
    pub purpose: Purpose,
    /// What it is going to commit.
    pub commits: Option<Ulid>,
    /// What it reads.
    pub reads: Option<Reads>,
}

impl Live {
    /// True when it may yet commit a backup; one that cannot be read is taken for such a one.
    pub fn may_commit(&self) -> bool {
        matches!(self.purpose, Purpose::Backup | Purpose::Copy | Purpose::Unknown)
    }
}

/// Looks for live sessions, again and again, and reads each object once.
#[derive(Debug, Default)]
pub struct Watch {
    read: BTreeMap<Ulid, Found>,
}

#[derive(Debug)]
enum Found {
    Session(SessionRecord),
    /// Nobody knows; it may be of a newer version.
    Unreadable,
}

impl Watch {
    /// The sessions that may still do something at `now`, which is the store's time. One that has committed is over.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn live(&mut self, cluster: &Cluster, now: jiff::Timestamp) -> Result<Vec<Live>> {
        let age = |object: &ObjectInfo| now.duration_since(object.last_modified).as_hours();
        let mut young = BTreeMap::new();
        cluster
            .store()
            .each_page(&cluster.path(layout::dir::SESSION), async |page| {
                let page = page.into_iter().filter(|object| age(object) < READ_HOURS + SLACK_HOURS);
                // A witness begins nothing.
                let page = page.filter(|object| layout::what_of(&object.name) != Some(WITNESS));
                young.extend(page.filter_map(|object| Some((layout::id_of(&object.name)?, object))));
                Ok(())
            })
            .await?;
        let mut live = Vec::new();
        for (id, object) in young {
            let Some(found) = self.read(cluster, id, &object.name).await? else { continue };
            let (age, began) = (age(&object), object.last_modified);
            match found {
                Found::Session(record) if age < record.hours.clamp(0, READ_HOURS) + SLACK_HOURS => {
                    let SessionRecord { purpose, commits, reads, .. } = *record;
                    live.push(Live { id, began, purpose, commits: Some(commits), reads });
                }
                Found::Unreadable if age < MAX_HOURS + SLACK_HOURS => {
                    live.push(Live { id, began, purpose: Purpose::Unknown, commits: None, reads: None });
                }
                _ => {}
            }
        }
        // Looked at after the sessions: what was not committed by then is not over.
        let mut committed = BTreeSet::new();
        if live.iter().any(Live::may_commit) {
            let listed = cluster.store().list(&cluster.path(layout::dir::SNAP)).await?;
            committed.extend(listed.iter().filter_map(|object| layout::id_of(&object.name)));
        }
        // A copy commits one backup after the other.
        let goes_on = |live: &Live| live.purpose == Purpose::Copy || !live.may_commit();
        live.retain(|live| goes_on(live) || live.commits.is_none_or(|id| !committed.contains(&id)));
        Ok(live)
    }

    async fn read(&mut self, cluster: &Cluster, id: Ulid, path: &str) -> Result<Option<&Found>> {
        if let Entry::Vacant(unread) = self.read.entry(id) {
            let name = layout::session(id, layout::what_of(path).unwrap_or_default());
            let found = match cluster.get_json::<SessionRecord>(Kind::Session, &name).await {
                Ok(record) => Found::Session(record),
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => Found::Unreadable,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let _ = unread.insert(found);
        }
        Ok(self.read.get(&id))
    }
}

/// An open session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its name.
    pub id: Ulid,
    /// When the store says it began.
    pub began: jiff::Timestamp,
}

impl Session {
    /// Announces a writer that is going to commit `commits`.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn begin(cluster: &Cluster, purpose: Purpose, commits: Ulid) -> Result<Self> {
        Self::announce(cluster, purpose, commits, MAX_HOURS, None).await
    }

    /// Announces a reader: from here on what it reads is not expired for [`READ_HOURS`]. Whether the backup is still there has to be
    /// looked at afterwards.
    ///
    /// # Errors
    /// When the store fails, or does not let the reader write.
    pub async fn read(cluster: &Cluster, purpose: Purpose, reads: Reads) -> Result<Self> {
        Self::announce(cluster, purpose, reads.backup_id, READ_HOURS, Some(reads)).await
    }

    async fn announce(cluster: &Cluster, purpose: Purpose, commits: Ulid, hours: i64, reads: Option<Reads>) -> Result<Self> {
        let id = cluster.env().new_id()?;
        let name = layout::session(id, &purpose.of(commits));
        let record = SessionRecord {
            purpose,
            started_at: cluster.env().now(),
            commits,
            hours,
            reads,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        cluster.put_json(Kind::Session, &name, &record).await?;
        let began = cluster.store().head(&cluster.path(&name)).await?.last_modified;
        Ok(Self { id, began })
    }

    /// Checks, by the store's clock, that the session may still commit.
    ///
    /// # Errors
    /// When the deadline has passed: its packs may already be collected.
    pub async fn ensure_live(&self, cluster: &Cluster) -> Result<()> {
        // The only way to read the store's clock is to write something.
        let witness = layout::session(cluster.env().new_id()?, WITNESS);
        cluster.put_json(Kind::Session, &witness, &Committing { session: self.id }).await?;
        let now = cluster.store().head(&cluster.path(&witness)).await?.last_modified;
        let hours = now.duration_since(self.began).as_hours();
        if hours < MAX_HOURS {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Failed, "session.expired", format!("this took {hours} hours; sessions end after {MAX_HOURS}"))
            .with_hint("a backup was not committed: make it faster (local source, more workers) and run it again"))
    }
}
