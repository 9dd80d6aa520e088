//! A piece of WAL into the vault: sealed off the runtime's threads, then stored.

use bytes::Bytes;

use super::assemble::{Piece, Share};
use super::object;
use crate::crypto::sealed::SealedObject;
use crate::postgres::WalFileName;
use crate::vault::Cluster;
use crate::{Error, ErrorKind, Result};

/// A piece as the objects that it becomes. Storing it can be tried as often as it takes.
#[derive(Debug)]
pub struct Deposit {
    /// Each object, and what is in it.
    objects: Vec<(SealedObject, Bytes)>,
}

impl Deposit {
    /// Compresses and seals a piece.
    ///
    /// # Errors
    /// As [`object::check_segment`].
    pub async fn seal(cluster: &Cluster, piece: Piece) -> Result<Self> {
        let owner = cluster.clone();
        let sealed = tokio::task::spawn_blocking(move || -> Result<Vec<(SealedObject, Bytes)>> {
            match &piece.share {
                Share::Chunk { scan, .. } | Share::Part { scan } => {
                    Ok(vec![(object::seal_part(&owner, piece.segment, piece.from, &piece.bytes, scan)?, piece.bytes)])
                }
                Share::Whole => {
                    let sealed = object::seal_file(&owner, WalFileName::Segment(piece.segment), &piece.bytes)?;
                    let step =
                        if sealed.len() > 1 { usize::try_from(object::MAX_RAW).unwrap_or(usize::MAX) } else { piece.bytes.len() };
                    let raw = (0..sealed.len()).map(|n| piece.bytes.slice(n * step..((n + 1) * step).min(piece.bytes.len())));
                    let raw = raw.collect::<Vec<_>>();
                    Ok(sealed.into_iter().zip(raw).collect())
                }
            }
        });
        let objects = sealed.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))??;
        Ok(Self { objects })
    }

    /// Stores it; the same contents already stored are fine.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when the vault holds other contents for that stretch.
    pub async fn put(&self, cluster: &Cluster) -> Result<()> {
        for (sealed, raw) in &self.objects {
            let _ = object::put(cluster, sealed, raw).await?;
        }
        Ok(())
    }
}

/// Seals and stores a piece.
///
/// # Errors
/// As [`Deposit::seal`] and [`Deposit::put`].
pub async fn store(cluster: &Cluster, piece: Piece) -> Result<()> {
    Deposit::seal(cluster, piece).await?.put(cluster).await
}
