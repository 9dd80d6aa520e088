//! Bringing back what somebody deleted or overwrote in a store that keeps versions.
//!
//! pgvault creates each name once. So the first version of an object is the one that pgvault wrote, and whatever came after it
//! (another version, a delete marker) is somebody else's doing, or a key that was revoked. The first version is written again,
//! under the same name; nothing is deleted, so the evidence stays.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::layout;
use crate::store::guard::Version;
use crate::store::{Put, Store};
use crate::{Error, ErrorKind, Result};

/// What was done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Harm {
    /// A plain read finds nothing.
    Deleted,
    /// A plain read finds other bytes.
    Overwritten,
}

/// An object whose first version is hidden.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hidden {
    /// Its name.
    pub name: String,
    /// Its first version.
    pub version: String,
    /// Bytes of that.
    pub size: u64,
    /// What was done to it.
    pub harm: Harm,
    /// When, by the store's clock; `None` when the store does not tell.
    pub since: Option<Timestamp>,
}

impl Hidden {
    /// True for a slot of a key. Revoking a key deletes its slot, so that bringing one back may let a revoked key in again.
    pub fn is_key_slot(&self) -> bool {
        self.name.contains(&format!("/{}", layout::dir::KEYS))
    }
}

/// Finds what is hidden below a prefix of the vault.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the store keeps no versions.
pub async fn find(store: &Store, prefix: &str) -> Result<Vec<Hidden>> {
    let mut by_name: BTreeMap<String, Vec<Version>> = BTreeMap::new();
    for version in store.versions(prefix).await? {
        by_name.entry(version.name.clone()).or_default().push(version);
    }
    let mut hidden = Vec::new();
    for (name, mut versions) in by_name {
        // Nothing depends on what is not locked, sessions and probes; their deletion is an everyday thing.
        if layout::class_of(&name) == crate::store::Class::Transient {
            continue;
        }
        // Listed newest first; the sort keeps the order of those of the same moment.
        versions.reverse();
        versions.sort_by_key(|version| version.written);
        let Some(first) = versions.iter().find(|version| !version.is_delete_marker) else { continue };
        let latest = versions.iter().find(|version| version.is_latest);
        let (harm, since) = match latest {
            Some(latest) if latest.is_delete_marker => (Harm::Deleted, Some(latest.written)),
            None => (Harm::Deleted, None),
            Some(latest) if latest.id == first.id || (!first.etag.is_empty() && latest.etag == first.etag) => continue,
            Some(latest) if latest.size == first.size => {
                let same = store.get_version(&name, &latest.id).await? == store.get_version(&name, &first.id).await?;
                if same {
                    continue;
                }
                (Harm::Overwritten, Some(latest.written))
            }
            Some(latest) => (Harm::Overwritten, Some(latest.written)),
        };
        hidden.push(Hidden { name, version: first.id.clone(), size: first.size, harm, since });
    }
    Ok(hidden)
}

/// Writes the first version of an object again.
///
/// # Errors
/// When the store fails, or the name is taken by something that was not there before.
pub async fn bring_back(store: &Store, hidden: &Hidden) -> Result<()> {
    let bytes = store.get_version(&hidden.name, &hidden.version).await?;
    match hidden.harm {
        Harm::Overwritten => store.overwrite(&hidden.name, bytes).await,
        Harm::Deleted => match store.put_new(&hidden.name, bytes).await? {
            Put::Created | Put::Same => Ok(()),
            Put::Different(_) => {
                let why = format!("{} was written again with other content meanwhile", hidden.name);
                Err(Error::new(ErrorKind::Conflict, "store.taken", why).with_hint("somebody is still at work there; look again"))
            }
        },
    }
}
