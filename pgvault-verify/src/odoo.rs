//! Which databases are Odoo's, who they are, and what state they are in.

use pgvault_core::Result;
use pgvault_core::postgres::Connection;
use serde::Serialize;

/// A database of Odoo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OdooDatabase {
    /// Its name.
    pub name: String,
    /// `database.uuid`: who it is, whatever it is called.
    pub uuid: Option<String>,
    /// `database.is_neutralized`: it is a copy already.
    pub is_neutralised: bool,
    /// `latest_version` of the module `base`, such as `18.0.1.3`.
    pub version: Option<String>,
    /// Modules that an upgrade has not come to the end of.
    pub half_upgraded: Vec<HalfUpgraded>,
}

/// A module within an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HalfUpgraded {
    /// The module.
    pub name: String,
    /// `to install`, `to upgrade` or `to remove`.
    pub state: String,
}

/// What the database of this session is; nothing when it is not Odoo's.
///
/// # Errors
/// When the server cannot be asked.
pub(crate) async fn identify(sql: &mut Connection, name: &str) -> Result<Option<OdooDatabase>> {
    if sql.query_one("SELECT to_regclass('public.ir_module_module') IS NOT NULL").await?.required(0)? != "t" {
        return Ok(None);
    }
    let mut database =
        OdooDatabase { name: name.to_owned(), uuid: None, is_neutralised: false, version: None, half_upgraded: Vec::new() };
    let rows = async |sql: &mut Connection, statement: &str| {
        Ok::<_, pgvault_core::Error>(sql.simple_query(statement).await?.pop().unwrap_or_default().rows)
    };
    database.half_upgraded = half_upgraded(sql).await?;
    for row in rows(sql, "SELECT latest_version FROM public.ir_module_module WHERE name = 'base'").await? {
        database.version = row.text(0)?.map(ToOwned::to_owned);
    }
    if sql.query_one("SELECT to_regclass('public.ir_config_parameter') IS NOT NULL").await?.required(0)? == "t" {
        let statement =
            "SELECT key, value FROM public.ir_config_parameter WHERE key IN ('database.uuid', 'database.is_neutralized')";
        for row in rows(sql, statement).await? {
            let value = row.text(1)?.unwrap_or_default();
            match row.required(0)? {
                "database.uuid" => database.uuid = Some(value.to_owned()),
                _ => database.is_neutralised = matches!(value.to_ascii_lowercase().as_str(), "true" | "t" | "1"),
            }
        }
    }
    Ok(Some(database))
}

/// Modules that an upgrade has not come to the end of. Odoo commits after each, so a moment within an upgrade shows a mixture.
///
/// # Errors
/// When the server cannot be asked.
pub(crate) async fn half_upgraded(sql: &mut Connection) -> Result<Vec<HalfUpgraded>> {
    let statement =
        "SELECT name, state FROM public.ir_module_module WHERE state IN ('to install', 'to upgrade', 'to remove') ORDER BY 1";
    let rows = sql.simple_query(statement).await?.pop().unwrap_or_default().rows;
    rows.iter().map(|row| Ok(HalfUpgraded { name: row.required(0)?.to_owned(), state: row.required(1)?.to_owned() })).collect()
}
