//! `[cluster.NAME.odoo]`: the Odoo whose databases the cluster holds.

use std::path::PathBuf;

use serde::Deserialize;

/// `[cluster.NAME.odoo]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OdooConfig {
    /// Odoo's `data_dir`, when it is on this machine: its filestores lie below it, in `filestore`.
    pub data_dir: Option<PathBuf>,
}

impl OdooConfig {
    /// The folder with a filestore for each database.
    pub fn filestores(&self) -> Option<PathBuf> {
        self.data_dir.as_ref().map(|folder| folder.join("filestore"))
    }
}
