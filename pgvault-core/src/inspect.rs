//! Is what is stored still what was written?
//!
//! - [`scrub`] needs no key: it compares every object with the hash in its own tail (V1). A machine that only watches the
//!   bucket can run it.
//! - [`check`] has the keys: sizes against manifests (V0), then every frame decrypted and compared with its digest (V2), the
//!   maps against the packs, the WAL of every backup, and what should be there but is not.
//!
//! - [`doctor`] asks the store itself: whether it keeps what it is relied on for.
//! - [`source`] asks the databases of Odoo where their documents lie, and how far the vault has them.
//! - [`usage`] sums up what takes how much space.
//!
//! None starts a server; only a restore drill proves a backup.

mod check;
pub mod doctor;
pub mod source;
pub mod usage;

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use serde::Serialize;
use ulid::Ulid;

use crate::crypto::sealed;
use crate::format::document;
use crate::format::object::Header;
use crate::progress::SharedProgress;
use crate::store::ObjectInfo;
use crate::vault::layout::{self, CLUSTERS, ClusterName, VAULT_DOCUMENT};
use crate::vault::{Cluster, Vault};
use crate::{ErrorKind, Result};

pub use check::{CheckOptions, check};

/// Objects read at once.
const PARALLEL: usize = 4;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing is lost; somebody should know.
    Warning,
    /// Stored data is damaged or missing.
    Error,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The object, by its full name.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// The backups that cannot be restored, or not to every point, because of it.
    pub hurts: Vec<Ulid>,
}

/// The outcome of an inspection.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Objects that were read or compared.
    pub objects: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What was found.
    pub findings: Vec<Finding>,
}

impl Report {
    /// True when stored data is damaged or missing.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|f| f.severity == Severity::Error)
    }

    fn error(&mut self, object: impl Into<String>, problem: impl Into<String>, hurts: Vec<Ulid>) {
        self.findings.push(Finding { severity: Severity::Error, object: object.into(), problem: problem.into(), hurts });
    }

    fn warning(&mut self, object: impl Into<String>, problem: impl Into<String>) {
        self.findings.push(Finding {
            severity: Severity::Warning,
            object: object.into(),
            problem: problem.into(),
            hurts: Vec::new(),
        });
    }
}

/// Compares every object of the vault, or of one cluster, with its own hash. Needs no key.
///
/// # Errors
/// When the store fails. Damage is no error; it is in the report.
pub async fn scrub(vault: &Vault, only: Option<&ClusterName>, progress: &SharedProgress) -> Result<Report> {
    let mut report = Report::default();
    let listed = match only {
        Some(cluster) => vault.store().list(&cluster.prefix()).await?,
        None => vault.store().list("").await?,
    };
    progress.phase("scrub", Some(listed.iter().map(|o| o.size).sum()));
    let mut checks = stream::iter(listed)
        .map(|object| async move {
            let found = scrub_object(vault, &object).await;
            (object, found)
        })
        .buffer_unordered(PARALLEL);
    while let Some((object, found)) = checks.next().await {
        report.objects += 1;
        report.bytes += object.size;
        progress.advance(object.size);
        if let Some((severity, problem)) = found? {
            report.findings.push(Finding { severity, object: object.name, problem, hurts: Vec::new() });
        }
    }
    report.findings.sort_by(|a, b| a.object.cmp(&b.object));
    Ok(report)
}

async fn scrub_object(vault: &Vault, object: &ObjectInfo) -> Result<Option<(Severity, String)>> {
    let bytes = match vault.store().get(&object.name).await {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => {
            return Ok(Some((Severity::Warning, "was deleted while the scrub ran".into())));
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Some((Severity::Error, error.to_string()))),
        Err(error) => return Err(error),
    };
    if object.name.starts_with("probe/") {
        return Ok(None);
    }
    let relative = relative_name(&object.name);
    let is_document = object.name == VAULT_DOCUMENT || relative.is_some_and(layout::is_clear);
    if !is_document && relative.is_none() {
        return Ok(Some((Severity::Warning, "is not an object of a vault".into())));
    }
    let verified = tokio::task::spawn_blocking(move || {
        if is_document { document::verify("document", &bytes).map(drop) } else { sealed::verify_keyless(&bytes).map(drop) }
    });
    Ok(match verified.await {
        Ok(Ok(())) => None,
        Ok(Err(problem)) => Some((Severity::Error, problem.to_string())),
        Err(error) => Some((Severity::Error, error.to_string())),
    })
}

/// The part of a name behind the cluster's prefix.
fn relative_name(name: &str) -> Option<&str> {
    let (cluster, relative) = name.strip_prefix(CLUSTERS)?.split_once('/')?;
    ClusterName::parse(cluster).map(|_| relative)
}

/// Decodes every frame of an object that is wholly in memory; returns the frames' lengths.
fn decode_all(cluster: &Cluster, name: &str, bytes: &[u8]) -> Result<Vec<u32>, crate::format::FormatError> {
    let (header, _) = sealed::verify_keyless(bytes)?;
    let reader = sealed::ObjectReader::open_whole(cluster.keys(), header.kind, name, bytes)?;
    let mut lens = Vec::with_capacity(reader.frames().len());
    for number in 0..u32::try_from(reader.frames().len()).unwrap_or(u32::MAX) {
        lens.push(u32::try_from(reader.decode_from(cluster.keys(), number, bytes)?.len()).unwrap_or(u32::MAX));
    }
    debug_assert_eq!(Header::parse(bytes).map(|h| h.kind), Ok(header.kind));
    Ok(lens)
}

/// Ids without repetition.
fn sorted(ids: impl IntoIterator<Item = Ulid>) -> Vec<Ulid> {
    ids.into_iter().collect::<BTreeSet<_>>().into_iter().collect()
}
