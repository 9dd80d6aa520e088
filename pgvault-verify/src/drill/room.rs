//! What there is to hold a drill with, and what is done when it is too little.
//!
//! Without room for the whole copy no server can be started. What can be proven all the same is proven of a sample: files that the seed
//! chooses, written and their pages read, and the WAL behind the backup followed. Such a drill is called partial, and proves no backup.

use std::time::Instant;

use pgvault_core::format::file_table::Node;
use pgvault_core::restore::plan::Plan;
use pgvault_core::restore::restore_some;
use pgvault_core::wal::verify::{VerifyOptions, verify};
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use super::folder::{self, Folder};
use super::{Run, is_verdict};
use crate::checks::{self, Found};
use crate::seed::scatter;

/// Room for WAL on its way, and for what a server writes beside its data.
const BESIDE: u64 = 512 << 20;

/// The least that is worth a sample.
const LEAST: u64 = 16 << 20;

/// Memory that a small server needs.
const MEMORY: u64 = 256 << 20;

/// How much of the backup fits.
pub(super) enum Room {
    Whole,
    /// So many bytes of it.
    Sample(u64),
}

impl Run<'_> {
    /// Looks whether a copy of so many bytes fits.
    pub(super) fn room(&mut self, bytes: u64) -> Result<Room> {
        let memory = available_memory();
        if memory.is_some_and(|memory| memory < MEMORY) {
            let why = format!(
                "{} MiB of memory are left on this machine, and a server needs {}",
                memory.unwrap_or(0) >> 20,
                MEMORY >> 20
            );
            return Err(
                Error::new(ErrorKind::Failed, "drill.memory", why).with_hint("hold the drill at another time, or elsewhere")
            );
        }
        // WAL is recycled as it is replayed; a checkpoint or two of it lies about.
        let needed = bytes.saturating_add(bytes / 10).saturating_add(BESIDE);
        let free = folder::free_bytes(&self.options.base)?;
        let free = self.options.room.map_or(free, |room| room.min(free));
        let evidence = json!({ "free_bytes": free, "needed_bytes": needed, "memory_bytes": memory });
        let message = format!("{} MiB free in {}, about {} MiB needed", free >> 20, self.options.base.display(), needed >> 20);
        if free >= needed {
            self.note("resources", Found::passed(message, evidence));
            return Ok(Room::Whole);
        }
        if free / 2 < LEAST {
            return Err(Error::new(ErrorKind::Failed, "drill.disk", message).with_hint(
                "name a folder with more room (--folder, `drill.folder`); `pgvault check` reads everything without writing it",
            ));
        }
        self.note("resources", Found::warned(format!("{message}: a sample is restored, and no server started"), evidence));
        Ok(Room::Sample(free / 2))
    }

    /// Restores some files and examines them.
    pub(super) async fn sample(&mut self, plan: &Plan, folder: &Folder, bytes: u64) -> Result<()> {
        let began = Instant::now();
        let chosen = self.choose(plan, bytes).await?;
        let options = self.restore_options(plan, folder);
        let manifest = &plan.snapshot.manifest;
        let restored = restore_some(self.cluster, plan, &options, |entry| chosen.binary_search(&entry.path).is_ok()).await;
        self.phase("fetch", began);
        match restored {
            Ok(written) => {
                self.receipt.restored_bytes = written;
                let message =
                    format!("{} of {} files, {} MiB, every frame of them authentic", chosen.len(), manifest.files, written >> 20);
                self.add(
                    "restore",
                    began.elapsed(),
                    Found::passed(message, json!({ "files": chosen.len(), "of": manifest.files, "bytes": written })),
                );
                let pages = Instant::now();
                let found = checks::page_checksums_of(&plan.snapshot, folder.pgdata()).await;
                self.add("page-checksums", pages.elapsed(), found);
            }
            Err(error) if is_verdict(&error) => {
                self.add("restore", began.elapsed(), Found::failed(error.to_string(), json!({ "code": error.code() })));
            }
            Err(error) => return Err(error),
        }
        let wal = Instant::now();
        let options = VerifyOptions {
            from: Some(manifest.start_lsn),
            timeline: Some(plan.timeline),
            deep: true,
            progress: self.options.progress.clone(),
        };
        let report = verify(self.cluster, &options).await?;
        let problems: Vec<String> = report
            .gaps
            .iter()
            .map(ToString::to_string)
            .chain(report.damage.iter().map(|damage| format!("{}: {}", damage.object, damage.what)))
            .collect();
        let found = match problems.first() {
            None => Found::passed(
                format!("{} MiB of WAL from {} on, record by record", report.bytes >> 20, manifest.start_lsn),
                json!({ "bytes": report.bytes }),
            ),
            Some(first) => Found::failed(format!("the WAL cannot be replayed: {first}"), json!(problems)),
        };
        self.add("wal", wal.elapsed(), found);
        self.add(
            "recovery",
            std::time::Duration::ZERO,
            Found::missing("no server was started: there is no room for the whole copy"),
        );
        Ok(())
    }

    /// Files by the drill's seed, as many as fit; sorted.
    async fn choose(&self, plan: &Plan, bytes: u64) -> Result<Vec<String>> {
        let mut files = Vec::new();
        let mut table = plan.snapshot.files();
        let mut number = 0_u64;
        while let Some(entries) = table.next_chunk().await? {
            for entry in entries {
                if let Node::File { len, .. } = entry.node {
                    files.push((scatter(self.options.seed ^ number), len, entry.path));
                    number += 1;
                }
            }
        }
        files.sort_unstable();
        let mut left = bytes;
        let mut chosen: Vec<String> = files
            .into_iter()
            .filter_map(|(_, len, path)| {
                // A file takes a block at least.
                let rest = left.checked_sub(len.max(4096))?;
                left = rest;
                Some(path)
            })
            .collect();
        chosen.sort_unstable();
        Ok(chosen)
    }
}

/// Memory that programs could still get, in bytes; Linux tells it.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}
