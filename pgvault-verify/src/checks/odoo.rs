//! What Odoo depends on in its database.
//!
//! Every statement asks for what is there before it uses it: the models differ between versions and installations. Sources: Odoo's
//! `ir_module_module`, `ir_config_parameter`, `ir_sequence`, `ir_attachment`, `account_move`.

use pgvault_core::Result;
use pgvault_core::postgres::Connection;
use serde_json::{Value, json};

use super::{Found, Restored, ask, listed};

/// Databases that are Odoo's.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn databases(restored: &Restored<'_>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for database in super::databases(restored).await? {
        let mut sql = restored.connect(&database).await?;
        if exists(&mut sql, "ir_module_module").await? && exists(&mut sql, "ir_config_parameter").await? {
            found.push(database.clone());
        }
        sql.close().await;
    }
    Ok(found)
}

async fn exists(sql: &mut Connection, table: &str) -> Result<bool> {
    Ok(sql.query_one(&format!("SELECT to_regclass('public.{table}') IS NOT NULL")).await?.required(0)? == "t")
}

/// Examines one of them.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn examine(restored: &Restored<'_>, database: &str) -> Result<Vec<(&'static str, Found)>> {
    let mut sql = restored.connect(database).await?;
    let mut found = vec![("odoo-identity", identity(&mut sql).await?), ("odoo-modules", modules(&mut sql).await?)];
    if exists(&mut sql, "ir_sequence").await? {
        found.push(("odoo-sequences", sequences(&mut sql).await?));
    }
    if exists(&mut sql, "ir_attachment").await? {
        found.push(("odoo-attachments", attachments(&mut sql).await?));
    }
    if exists(&mut sql, "account_move").await? && exists(&mut sql, "account_move_line").await? {
        found.push(("odoo-books", books(&mut sql).await?));
    }
    sql.close().await;
    Ok(found)
}

/// The database says which one it is, and that it is no copy.
async fn identity(sql: &mut Connection) -> Result<Found> {
    let rows = ask(
        sql,
        "SELECT key, value FROM public.ir_config_parameter WHERE key IN ('database.uuid', 'database.create_date', 'database.is_neutralized')",
    )
    .await?
    .rows;
    let mut evidence = serde_json::Map::new();
    for row in &rows {
        let _ = evidence.insert(row.required(0)?.to_owned(), row.text(1)?.map_or(Value::Null, Value::from));
    }
    let value = |key: &str| evidence.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (uuid, neutralized) = (value("database.uuid"), value("database.is_neutralized"));
    Ok(if uuid.is_empty() {
        Found::failed("the database has no uuid: Odoo would take it for a new one", Value::Object(evidence))
    } else if neutralized.eq_ignore_ascii_case("true") {
        Found::warned(
            format!("the database {uuid} is a neutralised copy: it sends no mail and takes no payments"),
            Value::Object(evidence),
        )
    } else {
        Found::passed(format!("the database is {uuid}"), Value::Object(evidence))
    })
}

/// No module is half installed.
async fn modules(sql: &mut Connection) -> Result<Found> {
    let half = crate::odoo::half_upgraded(sql).await?;
    let half: Vec<String> = half.iter().map(|module| format!("{} ({})", module.name, module.state)).collect();
    let count = sql
        .query_one("SELECT count(*), max(latest_version) FILTER (WHERE name = 'base') FROM public.ir_module_module WHERE state = 'installed'")
        .await?;
    let (installed, base) = (count.required(0)?.to_owned(), count.text(1)?.unwrap_or("unknown").to_owned());
    let evidence = json!({ "installed": installed, "base": base, "half": listed(&half) });
    Ok(match half.first() {
        Some(first) => Found::warned(
            format!("the moment lies within a module upgrade: {first}; restore to a moment before it began"),
            evidence,
        ),
        None => Found::passed(format!("{installed} modules are installed, none half; base is {base}"), evidence),
    })
}

/// Each standard sequence has its sequence of PostgreSQL, named after its id.
async fn sequences(sql: &mut Connection) -> Result<Found> {
    let mut missing = Vec::new();
    let of_sequences = "SELECT format('ir_sequence_%s', lpad(id::text, greatest(3, length(id::text)), '0')), code FROM public.ir_sequence \
                        WHERE implementation = 'standard' AND coalesce(use_date_range, false) = false";
    let of_ranges = "SELECT format('ir_sequence_%s_%s', lpad(s.id::text, greatest(3, length(s.id::text)), '0'), lpad(r.id::text, greatest(3, length(r.id::text)), '0')), s.code \
                     FROM public.ir_sequence_date_range r JOIN public.ir_sequence s ON s.id = r.sequence_id WHERE s.implementation = 'standard'";
    let mut statements = vec![of_sequences];
    if exists(sql, "ir_sequence_date_range").await? {
        statements.push(of_ranges);
    }
    let mut count = 0_u64;
    for statement in statements {
        let wanted = format!(
            "SELECT w.name, w.code FROM ({statement}) AS w(name, code) WHERE to_regclass('public.' || quote_ident(w.name)) IS NULL ORDER BY 1"
        );
        for row in ask(sql, &wanted).await?.rows {
            missing.push(format!("{} ({})", row.required(0)?, row.text(1)?.unwrap_or("no code")));
        }
        count += sql.query_one(&format!("SELECT count(*) FROM ({statement}) AS w")).await?.required(0)?.parse().unwrap_or(0);
    }
    let evidence = json!({ "sequences": count, "missing": listed(&missing) });
    Ok(match missing.first() {
        Some(first) => Found::failed(format!("{} numberings of Odoo have no sequence: {first}", missing.len()), evidence),
        None => Found::passed(format!("each of {count} numberings of Odoo has its sequence"), evidence),
    })
}

/// Where attachments lie, and those that say nothing of where. `db_datas` is not measured: that would read it.
async fn attachments(sql: &mut Connection) -> Result<Found> {
    let census = ask(
        sql,
        "SELECT CASE WHEN store_fname ~ '^[0-9a-f]{2,3}/[0-9a-f]{40}$' THEN 'filestore' WHEN store_fname ~ '^[a-z0-9_]+://' THEN split_part(store_fname, '://', 1) \
         WHEN store_fname IS NOT NULL THEN 'other' WHEN db_datas IS NOT NULL THEN 'database' ELSE coalesce(type, 'none') END, count(*), sum(file_size) \
         FROM public.ir_attachment GROUP BY 1 ORDER BY 1",
    )
    .await?;
    let mut places = serde_json::Map::new();
    for row in &census.rows {
        let figures = json!({ "rows": row.text(1)?, "bytes": row.text(2)? });
        let _ = places.insert(row.required(0)?.to_owned(), figures);
    }
    let lost = sql
        .query_one("SELECT count(*) FROM public.ir_attachment WHERE store_fname IS NULL AND db_datas IS NULL AND coalesce(type, 'binary') = 'binary' AND file_size > 0")
        .await?;
    let two = sql
        .query_one(
            "SELECT count(*) FROM (SELECT FROM public.ir_attachment WHERE store_fname IS NOT NULL AND checksum IS NOT NULL GROUP BY store_fname HAVING count(DISTINCT checksum) > 1) AS d",
        )
        .await?;
    let number = |row: &pgvault_core::postgres::Row| row.required(0).map(|text| text.parse::<u64>().unwrap_or(0));
    let (lost, two) = (number(&lost)?, number(&two)?);
    let evidence = json!({ "places": places, "without_content": lost, "two_checksums": two });
    Ok(if two > 0 {
        Found::failed(format!("{two} files of the filestore are referred to with different checksums"), evidence)
    } else if lost > 0 {
        Found::warned(format!("{lost} attachments have a size and no content"), evidence)
    } else {
        Found::passed(format!("attachments lie in: {}", places.keys().cloned().collect::<Vec<_>>().join(", ")), evidence)
    })
}

/// Debit is credit in every entry that is posted.
async fn books(sql: &mut Connection) -> Result<Found> {
    let rows = ask(
        sql,
        "SELECT l.move_id FROM public.account_move_line l JOIN public.account_move m ON m.id = l.move_id WHERE m.state = 'posted' \
         GROUP BY 1 HAVING abs(sum(coalesce(l.debit, 0) - coalesce(l.credit, 0))) > 0.005 ORDER BY 1 LIMIT 20",
    )
    .await?
    .rows;
    let unbalanced: Vec<String> = rows.iter().map(|row| row.required(0).map(ToOwned::to_owned)).collect::<Result<_>>()?;
    let posted = sql.query_one("SELECT count(*) FROM public.account_move WHERE state = 'posted'").await?.required(0)?.to_owned();
    let evidence = json!({ "posted": posted, "unbalanced": unbalanced });
    Ok(match unbalanced.first() {
        Some(first) => Found::failed(format!("posted entries do not balance, the first is {first}"), evidence),
        None => Found::passed(format!("each of {posted} posted entries balances"), evidence),
    })
}
