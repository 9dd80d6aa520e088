//! What an interrupted backup has left in the vault: whole packs that nothing refers to.
//!
//! The packs of a backup are named after its session, so they are found by asking for one after the other, without any listing.
//! They are read whole and every frame is opened and compared with its digest before one is used; and a frame is used only for a
//! region whose content, read from the source now, has the same keyed digest (T5): what changed since is stored anew.

use std::collections::HashMap;

use futures::{StreamExt, TryStreamExt, stream};
use ulid::Ulid;

use super::file::REGION;
use crate::crypto::sealed::{ObjectReader, SealedObject, verify_keyless};
use crate::format::map::PackId;
use crate::format::object::{Kind, TAIL_LEN, Tail};
use crate::format::pack_table::{PackKind, PackRef};
use crate::pack::PackNames;
use crate::vault::session::{self, Purpose};
use crate::vault::{Cluster, layout};
use crate::{Error, ErrorKind, Result};

/// Packs read at once.
const PARALLEL: usize = 4;

/// Names without a pack before it is believed that there are no more: more than can be on their way at once.
const MISSING: u32 = 16;

/// Frames of interrupted backups, by their digest.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    packs: Vec<PackRef>,
    frames: HashMap<[u8; 16], (u32, u32)>,
}

impl Leftovers {
    /// Looks for the packs of interrupted backups that are young enough to be used by one that begins with `session`.
    pub(super) async fn find(cluster: &Cluster, session: &session::Session) -> Result<Self> {
        let mut leftovers = Self::default();
        for id in session::unfinished(cluster, session, Purpose::Backup).await? {
            leftovers.take(cluster, PackNames(id)).await?;
        }
        if !leftovers.packs.is_empty() {
            tracing::info!(packs = leftovers.packs.len(), "an interrupted backup is gone on with");
        }
        Ok(leftovers)
    }

    async fn take(&mut self, cluster: &Cluster, names: PackNames) -> Result<()> {
        let mut found = stream::iter(0..u32::MAX).map(|number| read(cluster, names.name(number))).buffered(PARALLEL);
        let mut missing = 0;
        while missing < MISSING {
            match found.try_next().await? {
                Some(Some(pack)) => {
                    missing = 0;
                    self.add(pack);
                }
                _ => missing += 1,
            }
        }
        Ok(())
    }

    fn add(&mut self, (pack, digests): (PackRef, Vec<(u32, [u8; 16])>)) {
        let number = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        self.packs.push(pack);
        self.frames.extend(digests.into_iter().map(|(frame, digest)| (digest, (number, frame))));
    }

    /// The pack and the frame of a whole region with this digest.
    pub(super) fn region(&self, digest: &[u8; 16]) -> Option<(PackId, u32)> {
        let (pack, frame) = self.frames.get(digest)?;
        Some((self.packs.get(*pack as usize)?.id, *frame))
    }

    pub(super) fn into_packs(self) -> Vec<PackRef> {
        self.packs
    }
}

/// Reads a pack and checks all of it; gives the digests of its frames that are whole regions. Nothing for one that is not there, is
/// no pack of data, or is damaged.
async fn read(cluster: &Cluster, id: Ulid) -> Result<Option<(PackRef, Vec<(u32, [u8; 16])>)>> {
    let name = layout::pack(id);
    let Some(bytes) = cluster.store().get_if_exists(&cluster.path(&name)).await? else { return Ok(None) };
    let keys = cluster.keys().clone();
    let checked = tokio::task::spawn_blocking(move || -> Result<_, crate::format::FormatError> {
        // Also what a scrub without a key will compare: the manifest is going to vouch for it.
        let _ = verify_keyless(&bytes)?;
        let reader = ObjectReader::open_whole(&keys, Kind::Data, &name, &bytes)?;
        let tail = Tail::parse(bytes.get(bytes.len().saturating_sub(TAIL_LEN)..).unwrap_or(&[]), bytes.len() as u64)?;
        let mut digests = Vec::new();
        for (entry, number) in reader.frames().iter().zip(0..) {
            let raw = reader.decode_from(&keys, number, &bytes)?;
            if raw.len() == REGION {
                digests.push((number, entry.digest));
            }
        }
        let frames = u32::try_from(reader.frames().len()).unwrap_or(u32::MAX);
        let object =
            SealedObject { name: String::new(), footer_len: tail.footer_len, frames, sha256: tail.sha256, bytes: bytes.clone() };
        Ok((object.as_pack(id.to_bytes(), PackKind::Data), digests))
    });
    match checked.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))? {
        Ok(pack) => Ok(Some(pack)),
        Err(error) => {
            tracing::debug!(pack = %id, %error, "is not used again");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_packs_of_a_session_have_names_of_their_own_that_sort_by_its_time() {
        let sessions = [Ulid::from_parts(1000, 5), Ulid::from_parts(1000, 6), Ulid::from_parts(2000, 5)];
        let names: BTreeSet<Ulid> = sessions.iter().flat_map(|id| (0..500).map(|n| PackNames(*id).name(n))).collect();
        assert_eq!(names.len(), 1500);
        assert_eq!(PackNames(sessions[0]).name(7), PackNames(sessions[0]).name(7));
        assert_eq!(names.iter().next_back().unwrap().timestamp_ms(), 2000);
    }
}
