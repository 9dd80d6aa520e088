//! `manifest.json`, as far as a database can tell what it says.
//!
//! Odoo writes it from its own program: its release and the modules that are installed. A database knows the release by the version of the
//! module `base`, which Odoo begins with the series: `18.0.1.3` is of `18.0`, `saas~17.4.1.3` of `saas~17.4`. It does not know whether that
//! was a final release, which correction of it, and which edition; the manifest says what a final release of the community edition says.

use std::collections::BTreeMap;

use pgvault_core::postgres::Connection;
use pgvault_core::{Error, ErrorKind, Result};
use pgvault_verify::side::OdooDatabase;
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Debug, Serialize)]
pub(super) struct Manifest {
    odoo_dump: &'static str,
    db_name: String,
    version: String,
    version_info: Value,
    major_version: String,
    pg_version: String,
    modules: BTreeMap<String, Option<String>>,
}

impl Manifest {
    /// Asks the database of this session.
    ///
    /// # Errors
    /// [`ErrorKind::Unfit`] with the code `export.version` when the version of `base` is not one of Odoo's; when the server cannot be asked.
    pub(super) async fn read(sql: &mut Connection, database: &OdooDatabase) -> Result<Self> {
        let statement = "SELECT name, latest_version FROM public.ir_module_module WHERE state = 'installed' ORDER BY name";
        let rows = sql.simple_query(statement).await?.pop().unwrap_or_default().rows;
        let modules = rows.iter().map(|row| Ok((row.required(0)?.to_owned(), row.text(1)?.map(ToOwned::to_owned))));
        let modules = modules.collect::<Result<_>>()?;
        let base = database.version.as_deref().unwrap_or_default();
        let (version_info, series) = series(base).ok_or_else(|| {
            let why = format!("the module `base` of `{}` has the version `{base}`, which names no release of Odoo", database.name);
            Error::new(ErrorKind::Unfit, "export.version", why)
        })?;
        Ok(Self {
            odoo_dump: "1",
            db_name: database.name.clone(),
            version: series.clone(),
            version_info,
            major_version: series,
            // What Odoo makes of the server's version, whose second part has been the correction since PostgreSQL 10.
            pg_version: format!("{}.0", sql.server_major()?),
            modules,
        })
    }
}

/// The release that a version of `base` begins with: as `version_info`, and as text.
fn series(base: &str) -> Option<(Value, String)> {
    let mut parts = base.split('.');
    let (major, minor) = (parts.next()?, parts.next()?.parse::<u32>().ok()?);
    // A module has a version of its own behind it.
    let _ = parts.next()?;
    let number = match major.strip_prefix("saas~") {
        Some(number) => number.parse::<u32>().ok().map(|_| json!(major))?,
        None => json!(major.parse::<u32>().ok()?),
    };
    Some((json!([number, minor, 0, "final", 0, ""]), format!("{major}.{minor}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_known_by_the_version_of_base() {
        for (base, info, text) in [
            ("18.0.1.3", json!([18, 0, 0, "final", 0, ""]), "18.0"),
            ("14.0.1.3", json!([14, 0, 0, "final", 0, ""]), "14.0"),
            ("saas~17.4.1.3", json!(["saas~17", 4, 0, "final", 0, ""]), "saas~17.4"),
        ] {
            assert_eq!(series(base), Some((info, text.to_owned())), "{base}");
        }
        for base in ["", "18", "18.0", "1.x.3", "x.0.1", "saas~x.1.3", "saas~.1.3"] {
            assert_eq!(series(base), None, "{base}");
        }
    }
}
