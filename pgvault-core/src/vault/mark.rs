//! Marks: restore points that somebody named before a change, and what was there at that moment.
//!
//! The restore point itself is a record in WAL, and a restore finds it there without this. The mark beside it is what can be
//! found without reading WAL: which names were given, when, why (labels), and which modules of Odoo were installed then.
//!
//! A mark outlives nothing: when no backup is left that ended before it, it cannot be restored, and the pruner removes it.

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

use super::{Cluster, layout};
use crate::format::object::Kind;
use crate::postgres::{Lsn, TimelineId};
use crate::store::ObjectInfo;
use crate::{Error, ErrorKind, Result};

/// Marks read at once.
const PARALLEL: usize = 8;

/// What an Odoo database had installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modules {
    /// The database.
    pub database: String,
    /// Its `database.uuid`.
    pub uuid: String,
    /// Modules that are installed, and the version of each as the database has it; modules within an upgrade are among them.
    pub modules: BTreeMap<String, String>,
}

/// A named restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its id, also the object's name.
    pub id: Ulid,
    /// The name, as `pg_create_restore_point` got it.
    pub name: String,
    /// The timeline.
    pub timeline: TimelineId,
    /// Where its record in WAL ends: WAL up to here leads to it.
    pub lsn: Lsn,
    /// When it was set, by the server's clock.
    pub time: Timestamp,
    /// What somebody attached.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The cluster's databases of Odoo, as far as the role may read them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub odoo: Vec<Modules>,
    /// User and host, as far as the program could tell.
    pub by: String,
    /// Of the program.
    pub version: String,
}

/// The marks of a cluster.
#[derive(Debug, Default)]
pub struct Marks {
    /// Those that can be read, in the order of writing.
    pub marks: Vec<Mark>,
    /// The objects of the others, by their full names, and what is wrong.
    pub damaged: Vec<(String, Error)>,
    objects: BTreeMap<Ulid, ObjectInfo>,
}

impl Marks {
    /// The newest mark of a name.
    pub fn newest(&self, name: &str) -> Option<&Mark> {
        self.marks.iter().rev().find(|mark| mark.name == name)
    }

    /// True when a restore to its name leads to this mark, and not to one that was given the same name later.
    pub fn is_newest(&self, mark: &Mark) -> bool {
        self.newest(&mark.name).is_some_and(|newest| newest.id == mark.id)
    }

    /// The marks that nothing leads to any more, when `oldest_stop` is the end of the backup that ended first: positions only
    /// grow, so on no timeline does a backup lie before them.
    pub(crate) fn unreachable(&self, oldest_stop: Lsn) -> Vec<ObjectInfo> {
        let gone = self.marks.iter().filter(|mark| mark.lsn < oldest_stop);
        gone.filter_map(|mark| self.objects.get(&mark.id).cloned()).collect()
    }
}

/// Stores a mark.
///
/// # Errors
/// When the store fails.
pub async fn store(cluster: &Cluster, mark: &Mark) -> Result<()> {
    cluster.put_json(Kind::Mark, &layout::mark(mark.id), mark).await
}

/// Reads every mark.
///
/// # Errors
/// When the store fails. A mark that cannot be read is no error; it is in the list of those.
pub async fn list(cluster: &Cluster) -> Result<Marks> {
    let listed = cluster.store().list(&cluster.path(layout::dir::MARK)).await?;
    let named = listed.into_iter().filter_map(|object| {
        let id = layout::id_of(&object.name)?;
        (object.name == cluster.path(&layout::mark(id))).then_some((id, object))
    });
    let mut reading = stream::iter(named.collect::<Vec<_>>())
        .map(|(id, object)| async move { (id, object, read(cluster, id).await) })
        .buffered(PARALLEL);
    let mut marks = Marks::default();
    while let Some((id, object, mark)) = reading.next().await {
        match mark {
            Ok(mark) => {
                marks.marks.push(mark);
                let _ = marks.objects.insert(id, object);
            }
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                marks.damaged.push((object.name, error));
            }
            // Deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(marks)
}

async fn read(cluster: &Cluster, id: Ulid) -> Result<Mark> {
    let name = layout::mark(id);
    let mark: Mark = cluster.get_json(Kind::Mark, &name).await?;
    if mark.id == id {
        return Ok(mark);
    }
    Err(Error::new(ErrorKind::Corrupt, "mark.name", format!("{} holds the mark {}", cluster.path(&name), mark.id)))
}
