//! The target's packs: which of those that a backup needs are there, and the rest shipped to it.
//!
//! The target is listed once, after this copy's session was announced there. A pack that one of its backups refers to is
//! known from that backup's table. One that nothing refers to was left by a copy that was interrupted: it is opened, which
//! proves that it was sealed for this name with the target's keys, and used.

use std::collections::{HashMap, HashSet};

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use ulid::Ulid;

use super::object::{Held, Route, is_damage, taken};
use crate::format::map::PackId;
use crate::format::object::Kind;
use crate::format::pack_table::{PackKind, PackRef};
use crate::store::ObjectInfo;
use crate::vault::session::{Purpose, RESUME_HOURS, Session};
use crate::vault::snapshot::{self, OpenSnapshot};
use crate::vault::{Cluster, layout, lost};
use crate::{Error, ErrorKind, Result};

/// Packs that are opened at once.
const PARALLEL: usize = 8;

/// Hours after which the target is listed anew, under a new session: long before [`crate::vault::session::MAX_HOURS`].
const FRESH_HOURS: i64 = 12;

/// What a round of copying has done.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shipped {
    pub(super) packs: u64,
    pub(super) bytes: u64,
}

/// The packs of the target, as they were listed under a session.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) session: Session,
    opened: Timestamp,
    listed: HashMap<PackId, ObjectInfo>,
    known: HashMap<PackId, Held>,
    /// Backups of the target whose tables were not read yet, the newest last.
    unread: Vec<OpenSnapshot>,
    /// A garbage collection has made its plan before the session began.
    collecting: bool,
}

impl Shelf {
    /// Announces a copy of the backup `commits`, and of those behind it; then lists what is there.
    pub(super) async fn open(target: &Cluster, commits: Ulid) -> Result<Self> {
        let opened = target.env().now();
        let session = Session::begin(target, Purpose::Copy, commits).await?;
        // Only now: what backups listed from here on refer to is safe until the session's deadline.
        let unread = snapshot::list(target).await?.snapshots;
        let listed = target.store().list(&target.path(layout::dir::PACK)).await?;
        let listed = listed.into_iter().filter_map(|object| Some((layout::id_of(&object.name)?.to_bytes(), object))).collect();
        let collecting = !target.store().list(&target.path(layout::dir::GC)).await?.is_empty();
        Ok(Self { session, opened, listed, known: HashMap::new(), unread, collecting })
    }

    /// True when another one should be opened.
    pub(super) fn is_old(&self, now: Timestamp) -> bool {
        now.duration_since(self.opened).as_hours() >= FRESH_HOURS
    }

    /// Makes sure that the target has these packs of the source, `workers` at a time; gives them as a table of the target has them.
    ///
    /// # Errors
    /// When a store fails, a pack of the source is missing or was changed, or the target has something else under its name.
    pub(super) async fn fill(
        &mut self,
        route: &Route,
        wanted: &[PackRef],
        workers: usize,
        shipped: &mut Shipped,
    ) -> Result<Vec<PackRef>> {
        self.read_tables(wanted).await?;
        self.adopt(&route.target, wanted).await?;
        let missing: Vec<PackRef> = wanted.iter().filter(|pack| !self.known.contains_key(&pack.id)).copied().collect();
        let mut shipping = stream::iter(missing)
            .map(|pack| async move {
                let (kind, name) = (kind_of(&pack), layout::pack(Ulid::from_bytes(pack.id)));
                let done = route.ship(kind, &name, Some(pack.sha256)).await;
                done.map(|(held, created)| (pack.id, held, created)).map_err(|e| lost(&route.source.path(&name), e))
            })
            .buffer_unordered(workers.max(1));
        while let Some((id, held, created)) = shipping.try_next().await? {
            let _ = self.known.insert(id, held);
            if created {
                shipped.packs += 1;
                shipped.bytes += held.size;
            }
        }
        drop(shipping);
        wanted
            .iter()
            .map(|pack| {
                let path = || route.target.path(&layout::pack(Ulid::from_bytes(pack.id)));
                let held = self.known.get(&pack.id).filter(|held| held.size == pack.size && held.frames == pack.frames);
                let held = held.ok_or_else(|| taken(&path()))?;
                Ok(PackRef { size: held.size, footer_len: held.footer_len, frames: held.frames, sha256: held.sha256, ..*pack })
            })
            .collect()
    }

    /// Packs that are there, and of which it is not known yet what a table says about them.
    fn unknown<'a>(&self, wanted: &'a [PackRef]) -> Vec<&'a PackRef> {
        wanted.iter().filter(|pack| self.listed.contains_key(&pack.id) && !self.known.contains_key(&pack.id)).collect()
    }

    /// Reads the tables of the target's backups, from the newest on, until they have told all they can about these packs.
    async fn read_tables(&mut self, wanted: &[PackRef]) -> Result<()> {
        let mut open: HashSet<PackId> = self.unknown(wanted).iter().map(|pack| pack.id).collect();
        while !open.is_empty()
            && let Some(snapshot) = self.unread.pop()
        {
            let packs = match snapshot.packs().await {
                Ok(packs) => packs,
                // `check` tells of it. Its packs are opened one by one.
                Err(error) if is_damage(&error) => continue,
                Err(error) => return Err(error),
            };
            for pack in packs {
                if self.listed.get(&pack.id).is_some_and(|object| object.size == pack.size) {
                    let PackRef { size, footer_len, frames, sha256, .. } = pack;
                    let _ = self.known.insert(pack.id, Held { size, footer_len, frames, sha256 });
                    let _ = open.remove(&pack.id);
                }
            }
        }
        Ok(())
    }

    /// Opens what no backup of the target refers to.
    async fn adopt(&mut self, target: &Cluster, wanted: &[PackRef]) -> Result<()> {
        let orphans: Vec<PackRef> = self.unknown(wanted).into_iter().copied().collect();
        for pack in &orphans {
            self.ensure_stays(target, pack)?;
        }
        let mut opening = stream::iter(orphans)
            .map(|pack| async move {
                let name = layout::pack(Ulid::from_bytes(pack.id));
                let object = match target.open(kind_of(&pack), &name, Some(pack.size)).await {
                    Ok(object) => object,
                    // Collected since it was listed: it is shipped anew. When that took days, the deadline is over before the commit.
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                };
                Ok::<_, Error>(Some((pack.id, Held::of(pack.size, object.reader().frames().len(), object.reader().tail()))))
            })
            .buffer_unordered(PARALLEL);
        while let Some(found) = opening.try_next().await? {
            self.known.extend(found);
        }
        Ok(())
    }

    /// An orphan must not be collected before this session ends. A collector deletes what a plan named days before: one that is made
    /// from now on comes too late for this session, and what is young was in none (docs/format.md, sessions).
    fn ensure_stays(&self, target: &Cluster, pack: &PackRef) -> Result<()> {
        let path = target.path(&layout::pack(Ulid::from_bytes(pack.id)));
        let Some(object) = self.listed.get(&pack.id) else { return Ok(()) };
        if object.size != pack.size {
            return Err(taken(&path));
        }
        let hours = self.session.began.duration_since(object.last_modified).as_hours();
        if !self.collecting || hours < RESUME_HOURS {
            return Ok(());
        }
        let why =
            format!("{path} was left by an interrupted copy {hours} hours ago, and a garbage collection may be about to delete it");
        Err(Error::new(ErrorKind::Locked, "copy.collecting", why)
            .with_hint("let the garbage collection of the copy finish, then run `pgvault copy` again"))
    }
}

fn kind_of(pack: &PackRef) -> Kind {
    if pack.kind == PackKind::Data { Kind::Data } else { Kind::Meta }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::crypto::slot::{Unlock, Wrap};
    use crate::env::Env;
    use crate::postgres::SystemId;
    use crate::store::Store;
    use crate::vault::Vault;
    use crate::vault::layout::ClusterName;

    /// H9: a collector's plan of days ago may name what an interrupted copy left before it.
    #[tokio::test]
    async fn h9_old_leftovers_are_not_relied_on_while_a_collection_has_a_plan() {
        let (vault, _) = Vault::create(Store::in_memory(), Env::default()).await.unwrap();
        let name = ClusterName::new("main", SystemId(7)).unwrap();
        assert!(vault.create_cluster(&name, &[Wrap::Passphrase("test".into())]).await.unwrap());
        let target = vault.unlock(&name, &Unlock::Passphrase("test".into())).await.unwrap();
        let mut shelf = Shelf::open(&target, Ulid(9)).await.unwrap();
        assert!(!shelf.collecting, "there is no plan");
        let pack = PackRef { id: [1; 16], kind: PackKind::Data, size: 500, footer_len: 40, frames: 1, live: 1, sha256: [0; 32] };
        for (hours, collecting, size, code) in [
            (23, true, 500, None),
            (25, true, 500, Some("copy.collecting")),
            (25, false, 500, None),
            (1, false, 501, Some("copy.different")),
        ] {
            let last_modified = shelf.session.began.checked_sub(SignedDuration::from_hours(hours)).unwrap();
            let info = ObjectInfo { name: "x".into(), size, last_modified };
            let _ = shelf.listed.insert(pack.id, info);
            shelf.collecting = collecting;
            let said = shelf.ensure_stays(&target, &pack).map_err(|e| e.code());
            assert_eq!(said.err(), code, "{hours} hours, {collecting}, {size} bytes");
        }
        // What makes it so: a plan that is there when the session begins.
        target.store().put_once(&target.path("gc/01M7YQ0CJRQERHS1KZH3PBAPVP.plan"), vec![0; 9].into()).await.unwrap();
        assert!(Shelf::open(&target, Ulid(9)).await.unwrap().collecting);
        assert!(!shelf.is_old(target.env().now()));
        shelf.opened = shelf.opened.checked_sub(SignedDuration::from_hours(FRESH_HOURS)).unwrap();
        assert!(shelf.is_old(target.env().now()), "a long copy lists anew");
    }
}
