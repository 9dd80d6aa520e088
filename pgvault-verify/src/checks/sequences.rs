//! No sequence is behind the column that it numbers: the next row would be refused as a duplicate.
//!
//! It is a warning in general, because rows may have been given numbers by hand at the source. In a database of Odoo, which numbers
//! every row by its sequence, it is a fault.

use pgvault_core::Result;
use pgvault_core::postgres::quote_identifier;
use serde_json::json;

use super::{Found, Restored, ask, databases, listed, odoo};

/// Sequences that belong to a column of an ordinary table, and count up.
const OWNED: &str = "SELECT sn.nspname, s.relname, tn.nspname, t.relname, a.attname FROM pg_depend d \
    JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace sn ON sn.oid = s.relnamespace \
    JOIN pg_sequence q ON q.seqrelid = s.oid AND q.seqincrement > 0 AND NOT q.seqcycle \
    JOIN pg_class t ON t.oid = d.refobjid AND t.relkind IN ('r', 'p') JOIN pg_namespace tn ON tn.oid = t.relnamespace \
    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) \
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND s.relpersistence = 'p' \
    AND EXISTS (SELECT FROM pg_index x WHERE x.indrelid = t.oid AND x.indisvalid AND x.indkey[0] = a.attnum) ORDER BY 1, 2";

/// Compares each sequence with the largest number in use. Only columns that an index begins with are looked at: the others would take
/// a scan.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn compare(restored: &Restored<'_>) -> Result<Found> {
    let odoo = odoo::databases(restored).await?;
    let (mut looked_at, mut behind, mut fatal) = (0_u64, Vec::new(), false);
    for database in databases(restored).await? {
        let mut sql = restored.connect(&database).await?;
        for row in ask(&mut sql, OWNED).await?.rows {
            let quoted = |column| row.required(column).map(quote_identifier);
            let (sequence, table) = (format!("{}.{}", quoted(0)?, quoted(1)?), format!("{}.{}", quoted(2)?, quoted(3)?));
            let statement = format!("SELECT s.last_value, (SELECT max({}) FROM {table}) FROM {sequence} s", quoted(4)?);
            let found = sql.query_one(&statement).await?;
            let number = |column| Ok::<_, pgvault_core::Error>(found.text(column)?.and_then(|text| text.parse::<i64>().ok()));
            looked_at += 1;
            if let (Some(last), Some(largest)) = (number(0)?, number(1)?)
                && largest > last
            {
                behind.push(format!("{database}: {sequence} is at {last}, and {table} has {largest}"));
                fatal |= odoo.contains(&database);
            }
        }
        sql.close().await;
    }
    let evidence = json!({ "sequences": looked_at, "behind": listed(&behind) });
    Ok(match behind.first() {
        None => Found::passed(format!("none of {looked_at} sequences is behind its table"), evidence),
        Some(first) if fatal => Found::failed(format!("{} sequences are behind their tables: {first}", behind.len()), evidence),
        Some(first) => Found::warned(format!("{} sequences are behind their tables: {first}", behind.len()), evidence),
    })
}
