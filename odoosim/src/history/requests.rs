//! What workers do in a random history: transactions of one to three operations on attachments of all kinds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pgvault_core::Result;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::content::Content;
use crate::odoo::Odoo;
use crate::pause::Pause;
use crate::worker::Worker;

/// What the workers share.
pub(super) struct Work {
    /// Of the contents: the seed, so that no two histories have the same.
    pub(super) family: u64,
    /// Operations that nobody has begun.
    pub(super) left: u32,
    pub(super) next_content: u64,
    pub(super) tally: BTreeMap<String, u64>,
}

pub(super) type Shared = Arc<Mutex<Work>>;

pub(super) fn locked<T>(shared: &Shared, with: impl FnOnce(&mut Work) -> T) -> T {
    with(&mut shared.lock().unwrap_or_else(PoisonError::into_inner))
}

pub(super) fn count(shared: &Shared, what: &str) {
    locked(shared, |work| *work.tally.entry(what.to_owned()).or_default() += 1);
}

/// A worker process: transactions, until there is nothing left to do.
pub(super) async fn work(odoo: &Odoo, pause: &Pause, shared: &Shared, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut worker = Worker::connect(odoo, pause).await?;
    loop {
        let wanted = random.random_range(1..=3);
        let operations = locked(shared, |work| {
            let operations = work.left.min(wanted);
            work.left -= operations;
            operations
        });
        if operations == 0 {
            worker.leave();
            return Ok(());
        }
        match Box::pin(transaction(&mut worker, &mut random, shared, operations)).await {
            Ok(()) if !random.random_ratio(1, 9) => match worker.commit().await {
                Ok(()) => count(shared, "commit"),
                Err(error) => count(shared, error.code()),
            },
            Ok(()) => {
                worker.rollback().await?;
                count(shared, "rollback");
            }
            Err(error) => {
                worker.rollback().await?;
                count(shared, error.code());
            }
        }
    }
}

async fn transaction(worker: &mut Worker, random: &mut StdRng, shared: &Shared, operations: u32) -> Result<()> {
    worker.begin().await?;
    // One row that exists, at most: two workers that want each other's would be ended by the deadlock detector, after real time.
    let mut touched = false;
    for _ in 0..operations {
        operation(worker, random, shared, &mut touched).await?;
    }
    Ok(())
}

async fn operation(worker: &mut Worker, random: &mut StdRng, shared: &Shared, touched: &mut bool) -> Result<()> {
    let content = choose(random, shared);
    match random.random_range(0..100) {
        0..18 if !*touched => {
            *touched = true;
            if let Some(attachment) = worker.nth(random.random()).await? {
                worker.overwrite(&attachment, &content).await?;
            }
        }
        18..40 if !*touched => {
            *touched = true;
            if let Some(attachment) = worker.nth(random.random()).await? {
                worker.unlink(&attachment).await?;
            }
        }
        40..43 => {
            let _ = worker.attach_in_database(&content).await?;
        }
        43..45 => {
            let _ = worker.attach_url("https://www.example.com/").await?;
        }
        45..47 => {
            let _ = worker.attach_empty().await?;
        }
        47..50 => {
            let places = ["s3://bucket", "azure://container", "code:/"];
            let place = places.get(random.random_range(0..places.len())).copied().unwrap_or_default();
            let _ = worker.attach_remote(place, &content).await?;
        }
        50..52 => {
            let _ = worker.attach_named(&content.retro_store_fname(), &content).await?;
        }
        52..54 => {
            let _ = worker.attach_named(&format!("import/{}.pdf", content.sha1()), &content).await?;
        }
        54..56 => {
            worker.fail_disk_after(content.bytes().len() / 3);
            let _ = worker.attach(&content).await?;
        }
        _ => {
            let _ = worker.attach(&content).await?;
        }
    }
    Ok(())
}

/// A new content, or one that somebody has had already.
fn choose(random: &mut StdRng, shared: &Shared) -> Content {
    let again = random.random_ratio(1, 3);
    let number = locked(shared, |work| {
        if again && work.next_content > 0 {
            return random.random_range(0..work.next_content);
        }
        work.next_content += 1;
        work.next_content - 1
    });
    Content::numbered(shared.lock().unwrap_or_else(PoisonError::into_inner).family, number)
}
