//! A cluster that is restored for the work alone: where it lies, and how its server is started.

use std::path::Path;

use pgvault_core::config::DrillConfig;
use pgvault_core::restore::RestoreOptions;
use pgvault_core::restore::plan::Plan;
use pgvault_core::{Error, Result};
use pgvault_verify::side::SideOptions;
use tempfile::TempDir;

/// A folder with room for it, below `drill.folder`, that is gone when nobody holds it any more.
///
/// # Errors
/// When it cannot be made.
pub(in crate::commands) fn temporary(config: &DrillConfig) -> Result<TempDir> {
    let base = config.folder.clone().unwrap_or_else(std::env::temp_dir);
    // The server's account passes through it to its own files.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    let made = tempfile::Builder::new().prefix("pgvault-side-").permissions(mode).tempdir_in(&base);
    made.map_err(|e| {
        Error::io("create a folder in", &base, e).with_hint("name one with room for the whole cluster in `drill.folder`")
    })
}

/// In a folder of its own, tablespaces find room without being told.
pub(in crate::commands) fn map_tablespaces(folder: &Path, plan: &Plan, options: &mut RestoreOptions) {
    for space in &plan.snapshot.manifest.tablespaces {
        let own = folder.join("ts").join(space.oid.to_string());
        let _ = options.tablespace_mapping.entry(space.location.clone()).or_insert(own);
    }
}

/// How a server beside production is started: as those of drills.
pub(in crate::commands) fn side_options(config: &DrillConfig) -> SideOptions {
    SideOptions {
        programs: config.programs.clone(),
        folder: config.folder.clone(),
        user: config.user.clone(),
        settings: config.settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        timeout: config.timeout,
    }
}
