//! Packs on their way to files: each is fetched once, opened by one thread, and each file compared with its SHA-1.

use std::io::Write;

use futures::{StreamExt, TryStreamExt, stream};
use sha1::{Digest, Sha1};

use super::receiver::Exit;
use super::{FetchOptions, Item};
use crate::crypto::sealed::FrameDecoder;
use crate::filestore::catalog::Catalog;
use crate::filestore::contents::Frames;
use crate::format::file_run::Content;
use crate::format::pack_table::PackRef;
use crate::progress::SharedProgress;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// When at least one frame in so many is wanted, one request for all of a pack is cheaper than one for each of them.
const FEW: u32 = 8;

/// The files that are wanted out of a pack, in the order in which they lie there.
pub(super) struct Job {
    pub(super) pack: PackRef,
    pub(super) items: Vec<Item>,
}

/// Carries out jobs, several at a time.
pub(super) async fn run(cluster: &Cluster, jobs: Vec<Job>, exit: &Exit, options: &FetchOptions) -> Result<()> {
    stream::iter(jobs)
        .map(|job| {
            let (cluster, exit, progress) = (cluster.clone(), exit.clone(), options.progress.clone());
            async move { one(&cluster, job, exit, progress).await }
        })
        .buffer_unordered(options.workers.max(1))
        .try_collect::<()>()
        .await
}

async fn one(cluster: &Cluster, job: Job, exit: Exit, progress: SharedProgress) -> Result<()> {
    let mut wanted: Vec<u32> = job.items.iter().map(|item| item.place.frame).collect();
    wanted.dedup();
    let whole = wanted.len() as u64 * u64::from(FEW) >= u64::from(job.pack.frames);
    let frames = Frames::open(cluster, &job.pack, whole).await?;
    let mut sealed = Vec::with_capacity(wanted.len());
    for frame in wanted {
        sealed.push((frame, frames.sealed(frame).await?));
    }
    let work = move || {
        let mut decoder = FrameDecoder::new()?;
        let mut items = job.items.into_iter().peekable();
        for (number, sealed) in sealed {
            let raw = frames.decode(number, &sealed, &mut decoder)?;
            while let Some(item) = items.next_if(|item| item.place.frame == number) {
                let bytes = frames.piece(&item.place, raw)?;
                ensure(&item.name, item.sha1, Sha1::digest(bytes).into())?;
                exit.write(&item.name, item.mode, bytes)?;
                progress.advance(bytes.len() as u64);
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}

/// Writes a file of any number of pieces.
pub(super) async fn write(catalog: &mut Catalog, name: &str, content: &Content, out: &mut (impl Write + Send)) -> Result<()> {
    let mut hash = Sha1::new();
    let mut decoder = FrameDecoder::new()?;
    let mut open: Option<([u8; 16], Frames)> = None;
    for piece in &content.pieces {
        let frames = match &mut open {
            Some((id, frames)) if *id == piece.pack => frames,
            open => {
                let unknown =
                    || Error::new(ErrorKind::Corrupt, "filestore.pack", format!("{name}: its pack is not in the catalog"));
                let pack = catalog.pack(&piece.pack).await?.ok_or_else(unknown)?;
                let frames = Frames::open(catalog.cluster(), &pack, false).await?;
                &mut open.insert((piece.pack, frames)).1
            }
        };
        let sealed = frames.sealed(piece.frame).await?;
        let bytes = frames.piece(piece, frames.decode(piece.frame, &sealed, &mut decoder)?)?;
        hash.update(bytes);
        out.write_all(bytes).map_err(|e| Error::new(ErrorKind::Failed, "io", format!("write {name}: {e}")).with_source(e))?;
    }
    ensure(name, content.sha1, hash.finalize().into())
}

fn ensure(name: &str, promised: [u8; 20], found: [u8; 20]) -> Result<()> {
    if promised == found {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Corrupt, "filestore.content", format!("{name}: what is stored is not its content")))
}
