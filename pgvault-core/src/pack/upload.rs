//! Finished packs on their way to the store.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use super::packer::FinishedPack;
use crate::format::pack_table::PackRef;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// PUTs in flight.
pub(crate) const UPLOADS: usize = 4;

/// The first error of any thread or task.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    happened: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Failure {
    /// Records the first error; everybody else stops at the next job.
    pub(crate) fn fail(&self, error: Error) {
        if !self.happened.swap(true, Ordering::SeqCst) {
            *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    }

    pub(crate) fn happened(&self) -> bool {
        self.happened.load(Ordering::SeqCst)
    }

    /// The error, once.
    pub(crate) fn take(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Puts packs into the store, a few at a time; ends when the packers are gone.
pub(crate) async fn upload(
    cluster: Cluster,
    failure: Arc<Failure>,
    mut finished: tokio::sync::mpsc::Receiver<FinishedPack>,
) -> Result<Vec<PackRef>> {
    let mut running: JoinSet<Result<PackRef>> = JoinSet::new();
    let mut packs = Vec::new();
    loop {
        while running.len() >= UPLOADS {
            collect(running.join_next().await, &mut packs, &failure);
        }
        let Some(pack) = finished.recv().await else { break };
        if failure.happened() {
            // Keep receiving, so that no worker stays blocked; what arrives now is not wanted any more.
            continue;
        }
        let cluster = cluster.clone();
        let _ = running.spawn(async move {
            let FinishedPack { pack, object, memory } = pack;
            cluster.put_once(&object).await?;
            drop((object.bytes, memory));
            Ok(pack)
        });
    }
    while !running.is_empty() {
        collect(running.join_next().await, &mut packs, &failure);
    }
    Ok(packs)
}

fn collect(joined: Option<Result<Result<PackRef>, tokio::task::JoinError>>, packs: &mut Vec<PackRef>, failure: &Failure) {
    match joined {
        Some(Ok(Ok(pack))) => packs.push(pack),
        Some(Ok(Err(error))) => failure.fail(error),
        Some(Err(error)) => failure.fail(Error::new(ErrorKind::Failed, "task", error.to_string())),
        None => {}
    }
}
