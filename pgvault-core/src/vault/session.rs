//! Sessions: what a writer intends, and until when.
//!
//! A session object is written before anything else. Its deadline bounds how long the packs of an unfinished backup may be
//! unreferenced, so that a garbage collector that waits longer never deletes what a live writer is about to commit.
//! Age is measured with the store's clock (the last-modified of session objects), never the client's.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::{Error, ErrorKind, Result};

/// Hours after which an unfinished writer must give up. A garbage collector's grace must be longer.
pub const MAX_HOURS: i64 = 48;

/// Hours since its beginning within which an interrupted writer's packs may be used by another. That one ends [`MAX_HOURS`] later, and
/// all that while the packs are younger than a garbage collector's grace, which is at least the sum.
pub const RESUME_HOURS: i64 = 24;

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
    /// The program's version.
    pub version: String,
}

/// Written right before a commit, to learn the store's time.
#[derive(Debug, Serialize)]
struct Committing {
    session: Ulid,
}

/// Sessions that have committed nothing, and began so shortly before `own` that it may use what they left ([`RESUME_HOURS`]); the
/// newest first. Some of them may still be running, which does no harm.
///
/// # Errors
/// When the store fails.
pub async fn unfinished(cluster: &Cluster, own: &Session) -> Result<Vec<(Ulid, SessionRecord)>> {
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
        // Not every object here is a session: some are written to learn the store's time.
        let record: SessionRecord = match cluster.get_json(Kind::Session, &layout::session(id)).await {
            Ok(record) => record,
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported) => continue,
            Err(error) => return Err(error),
        };
        if !committed.contains(&record.commits) {
            found.push((id, record));
        }
        if found.len() == MAX_UNFINISHED {
            break;
        }
    }
    Ok(found)
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
        let id = cluster.env().new_id()?;
        let name = layout::session(id);
        let record = SessionRecord {
            purpose,
            started_at: cluster.env().now(),
            commits,
            hours: MAX_HOURS,
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
        let witness = layout::session(cluster.env().new_id()?);
        cluster.put_json(Kind::Session, &witness, &Committing { session: self.id }).await?;
        let now = cluster.store().head(&cluster.path(&witness)).await?.last_modified;
        let hours = now.duration_since(self.began).as_hours();
        if hours < MAX_HOURS {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Failed,
            "session.expired",
            format!("the backup took {hours} hours; sessions end after {MAX_HOURS}"),
        )
        .with_hint("nothing was committed; make the backup faster (local source, more workers) and run it again"))
    }
}
