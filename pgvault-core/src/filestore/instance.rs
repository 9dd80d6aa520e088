//! Which filestore it is.
//!
//! A database keeps its history when it is renamed, and a duplicate of it begins one of its own: a filestore is that of a database by
//! its object identifier in the cluster and Odoo's `database.uuid`, never by its name. The folder in the vault is a keyed hash of both,
//! so that its name tells nothing.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::crypto::digest::DigestKey;

/// An Odoo database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// What it is called at the moment.
    pub name: String,
    /// Its object identifier in `pg_database`.
    pub oid: u32,
    /// `database.uuid` of `ir_config_parameter`.
    pub uuid: String,
    /// Odoo's version, as the module `base` has it (`18.0.1.3`).
    pub series: Option<String>,
}

impl Database {
    /// The folder of its passes in the vault.
    pub fn folder(&self, key: &DigestKey) -> String {
        let mut identity = b"pgvault filestore\0".to_vec();
        identity.extend_from_slice(&self.oid.to_le_bytes());
        identity.extend_from_slice(self.uuid.as_bytes());
        key.frame(&identity).iter().fold(String::with_capacity(32), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// The major version of Odoo; none when it is not known. 19.5 and what follows behave as 20.
    pub fn major(&self) -> Option<u32> {
        let series = self.series.as_deref()?;
        // Releases between (`saas~19.5`) are named in front of or within the version.
        let series = series.strip_prefix("saas~").unwrap_or(series);
        let mut parts = series.split('.');
        let major: u32 = parts.next()?.parse().ok()?;
        let minor: u32 = parts.next().and_then(|minor| minor.parse().ok()).unwrap_or(0);
        Some(if major == 19 && minor >= 5 { 20 } else { major })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(name: &str, oid: u32, uuid: &str) -> Database {
        Database { name: name.into(), oid, uuid: uuid.into(), series: None }
    }

    /// A5: a renamed database is the same, a duplicate is another, and so is a copy that kept its uuid.
    #[test]
    fn a5_a_name_is_no_identity() {
        let key = DigestKey::new([7; 32]);
        let folder = |name: &str, oid, uuid: &str| database(name, oid, uuid).folder(&key);
        assert_eq!(folder("shop", 5, "u"), folder("store", 5, "u"));
        let others = [folder("shop", 6, "u"), folder("shop", 5, "v"), database("shop", 5, "u").folder(&DigestKey::new([8; 32]))];
        assert!(others.iter().all(|other| *other != folder("shop", 5, "u")));
        assert_eq!(folder("shop", 5, "u").len(), 32);
    }

    #[test]
    fn versions_are_read() {
        let major = |series: &str| Database { series: Some(series.into()), ..database("x", 1, "u") }.major();
        assert_eq!(
            [major("14.0.1.3"), major("18.0.1.3"), major("19.0.1.3"), major("19.5.1.3")],
            [Some(14), Some(18), Some(19), Some(20)]
        );
        assert_eq!([major("saas~18.3.1.3"), major("20.0.1"), major("x")], [Some(18), Some(20), None]);
    }
}
