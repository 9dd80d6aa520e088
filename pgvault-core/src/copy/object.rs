//! One object, sealed anew for another vault.

use std::sync::Arc;

use bytes::Bytes;

use crate::crypto::sealed::{FrameDecoder, ObjectReader, SealedObject, SealedWriter, verify_keyless};
use crate::format::object::{Kind, Tail};
use crate::store::Put;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// What a table says about an object that is in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) size: u64,
    pub(super) footer_len: u32,
    pub(super) frames: u32,
    pub(super) sha256: [u8; 32],
}

impl Held {
    /// What there is to know of an object of `size` bytes.
    pub(super) fn of(size: u64, frames: usize, tail: &Tail) -> Self {
        Self { size, footer_len: tail.footer_len, frames: u32::try_from(frames).unwrap_or(u32::MAX), sha256: tail.sha256 }
    }
}

/// Where an object goes from and to.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) source: Cluster,
    pub(super) target: Cluster,
}

impl Route {
    /// Reads an object, seals it anew and stores it under the same name; tells what is there now, and whether this call wrote
    /// it. With `expected` the object must be the one with that hash.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the source's object was changed: nothing of it is stored then. [`ErrorKind::NotFound`] when it is
    /// not there. [`ErrorKind::Conflict`] when the target has other contents under its name.
    pub(super) async fn ship(&self, kind: Kind, name: &str, expected: Option<[u8; 32]>) -> Result<(Held, bool)> {
        let bytes = self.source.store().get(&self.source.path(name)).await?;
        let (route, owned) = (self.clone(), Arc::<str>::from(name));
        let sealed = blocking(move || route.reseal(kind, &owned, &bytes, expected)).await?;
        self.place(kind, sealed).await
    }

    /// The object with the same frames under the target's keys. Expensive: call it off the runtime's threads.
    fn reseal(&self, kind: Kind, name: &str, bytes: &[u8], expected: Option<[u8; 32]>) -> Result<SealedObject> {
        let path = self.source.path(name);
        let damaged = |e: crate::format::FormatError| Error::from(e).context(&path).with_hint("run `pgvault check` on the source");
        if let Some(expected) = expected {
            let (_, found) = verify_keyless(bytes).map_err(damaged)?;
            // Who has the keys can write another object that opens under this name.
            if found != expected {
                let why = format!("{path} is not the object that its backup was made with");
                return Err(Error::new(ErrorKind::Corrupt, "copy.substituted", why));
            }
        }
        let reader = ObjectReader::open_whole(self.source.keys(), kind, name, bytes).map_err(damaged)?;
        let mut writer = SealedWriter::new(self.target.env(), self.target.keys(), kind, name, bytes.len())?;
        let mut decoder = FrameDecoder::new()?;
        for number in 0..u32::try_from(reader.frames().len()).unwrap_or(u32::MAX) {
            let digests = self.target.keys().digest();
            let frame = reader.transcribe(self.source.keys(), number, bytes, digests, &mut decoder).map_err(damaged)?;
            let _ = writer.append(&frame);
        }
        Ok(writer.finish(reader.extra().to_vec()))
    }

    /// Stores an object that is sealed for the target; the same contents under its name are as good.
    async fn place(&self, kind: Kind, sealed: SealedObject) -> Result<(Held, bool)> {
        let own =
            Held { size: sealed.bytes.len() as u64, footer_len: sealed.footer_len, frames: sealed.frames, sha256: sealed.sha256 };
        match self.target.put(&sealed).await? {
            Put::Created => Ok((own, true)),
            Put::Same => Ok((own, false)),
            Put::Different(found) => {
                let target = self.target.clone();
                Ok((blocking(move || compare(&target, kind, &sealed, &found)).await?, false))
            }
        }
    }
}

/// What is there, when it holds what was to be stored. Sealing is randomised, so all of it is decoded.
fn compare(target: &Cluster, kind: Kind, sealed: &SealedObject, found: &Bytes) -> Result<Held> {
    let path = target.path(&sealed.name);
    let damaged = |e: crate::format::FormatError| Error::from(e).context(&path).with_hint("run `pgvault check` on the copy");
    let keys = target.keys();
    let own = ObjectReader::open_whole(keys, kind, &sealed.name, &sealed.bytes).map_err(damaged)?;
    let there = ObjectReader::open_whole(keys, kind, &sealed.name, found).map_err(damaged)?;
    let content = |reader: &ObjectReader| reader.frames().iter().map(|f| (f.raw_len, f.digest)).collect::<Vec<_>>();
    if content(&own) != content(&there) {
        return Err(taken(&path));
    }
    for number in 0..u32::try_from(there.frames().len()).unwrap_or(u32::MAX) {
        let _ = there.decode_from(keys, number, found).map_err(damaged)?;
    }
    Ok(Held::of(found.len() as u64, there.frames().len(), there.tail()))
}

/// Why a copy ends: its target has something else under a name that the source uses.
pub(super) fn taken(path: &str) -> Error {
    Error::new(ErrorKind::Conflict, "copy.different", format!("{path} is already in the copy with different contents")).with_hint(
        "only copies of one vault belong into a copy; find out who else writes there, and give this one a place of its own",
    )
}

/// Runs CPU work off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}

/// True for an error that is about one object of the source: others can still be copied.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound)
}
