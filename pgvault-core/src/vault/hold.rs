//! Holds: somebody's order that a backup, or a stretch of time, stays restorable until the order is taken back.
//!
//! A hold is a record, and its removal another one: nothing is overwritten, and what was held, by whom and until when can be read
//! afterwards. A hold adds to what retention keeps and stands in nothing's way: everything else expires as before (H20).

use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::audit::{self, Event};
use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::{Error, ErrorKind, Result};

/// What is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "scope", rename_all = "kebab-case")]
pub enum Scope {
    /// A backup, and the WAL that makes it consistent.
    Backup {
        /// The backup.
        backup_id: Ulid,
    },
    /// Every moment of a stretch of time: the backups and the WAL that restore it.
    Range {
        /// The first moment.
        from: jiff::Timestamp,
        /// The last moment.
        to: jiff::Timestamp,
    },
}

/// A hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Its id, also the object's name.
    pub id: Ulid,
    /// What is held.
    #[serde(flatten)]
    pub scope: Scope,
    /// Why, in the words of whoever placed it.
    pub reason: String,
    /// When it was placed, by that program's clock; information only.
    pub placed_at: jiff::Timestamp,
}

/// An object below `hold/`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Hold(Hold),
    Removal {
        /// The hold that is over.
        removes: Ulid,
    },
}

/// Places a hold.
///
/// # Errors
/// [`ErrorKind::Usage`] when the range ends before it begins; when the store fails.
pub async fn place(cluster: &Cluster, scope: Scope, reason: String) -> Result<Hold> {
    if let Scope::Range { from, to } = scope
        && from > to
    {
        return Err(Error::new(ErrorKind::Usage, "hold.range", format!("a hold from {from} to {to} ends before it begins")));
    }
    let hold = Hold { id: cluster.env().new_id()?, scope, reason, placed_at: cluster.env().now() };
    cluster.put_json(Kind::Hold, &layout::hold(hold.id), &Record::Hold(hold.clone())).await?;
    if let Err(error) = audit::record(cluster, Event::HoldPlaced { hold_id: hold.id }).await {
        // It holds all the same.
        tracing::warn!(%error, "the hold was not recorded in the vault's audit log");
    }
    Ok(hold)
}

/// Takes a hold back.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none of that id; when the store fails.
pub async fn remove(cluster: &Cluster, id: Ulid) -> Result<Hold> {
    let held = active(cluster).await?.into_iter().find(|hold| hold.id == id).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "hold.unknown", format!("there is no hold {id}"))
            .with_hint("`pgvault hold list` shows the holds")
    })?;
    audit::record(cluster, Event::HoldRemoved { hold_id: id }).await?;
    let name = layout::hold(cluster.env().new_id()?);
    cluster.put_json(Kind::Hold, &name, &Record::Removal { removes: id }).await?;
    Ok(held)
}

/// The holds in force, oldest first.
///
/// # Errors
/// When the store fails. [`ErrorKind::Corrupt`] when a record cannot be read: what it holds is not known, so nothing may be deleted.
pub async fn active(cluster: &Cluster) -> Result<Vec<Hold>> {
    let (mut holds, mut removed) = (Vec::new(), Vec::new());
    for (_, record) in records(cluster).await? {
        match record {
            Record::Hold(hold) => holds.push(hold),
            Record::Removal { removes } => removed.push(removes),
        }
    }
    holds.retain(|hold| !removed.contains(&hold.id));
    Ok(holds)
}

/// The records of holds that were taken back, each hold before its removal: what may be deleted, in this order. The other way round
/// the hold would be in force again in between.
///
/// # Errors
/// As [`active`].
pub async fn over(cluster: &Cluster) -> Result<Vec<(Ulid, jiff::Timestamp)>> {
    let all = records(cluster).await?;
    let mut over = Vec::new();
    for (object, record) in &all {
        let Record::Removal { removes } = record else { continue };
        if let Some((hold, _)) = all.iter().find(|(found, _)| found.id == *removes) {
            over.push((hold.id, object.since));
        }
        over.push((object.id, object.since));
    }
    Ok(over)
}

struct Stored {
    id: Ulid,
    since: jiff::Timestamp,
}

async fn records(cluster: &Cluster) -> Result<Vec<(Stored, Record)>> {
    let mut records = Vec::new();
    for object in cluster.store().list(&cluster.path(layout::dir::HOLD)).await? {
        let Some(id) = layout::id_of(&object.name) else { continue };
        match cluster.get_json(Kind::Hold, &layout::hold(id)).await {
            Ok(record) => records.push((Stored { id, since: object.last_modified }, record)),
            // Over and deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                return Err(Error::new(ErrorKind::Corrupt, "hold.unreadable", format!("{}: {error}", object.name))
                    .with_hint(
                        "what it holds cannot be known, so nothing is deleted: bring the object back, or use a newer pgvault",
                    )
                    .with_source(error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}
