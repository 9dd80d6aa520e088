//! Figures that a shop owner recognises: the newest sale, how many invoices there are.

use pgvault_core::Result;
use pgvault_core::postgres::{Connection, Mode};
use pgvault_core::vault::drill::Fact;

use crate::checks::{Restored, in_database};

/// Tables of Odoo, what they are called, and the column that says when a row was made. Source: the models `pos.order`, `sale.order`,
/// `stock.move`, `account.move` and `mail.message`.
const ODOO: [(&str, &str); 5] = [
    ("pos_order", "point of sale orders"),
    ("sale_order", "sales orders"),
    ("account_move", "invoices and journal entries"),
    ("stock_move", "stock moves"),
    ("mail_message", "messages"),
];

/// Reads them from every database; one that cannot be asked has none.
pub(super) async fn read(restored: &Restored<'_>) -> Vec<Fact> {
    let mut facts = Vec::new();
    let databases = crate::checks::databases(restored).await.unwrap_or_default();
    for database in databases {
        match of(restored, &database).await {
            Ok(found) => facts.extend(found),
            Err(error) => tracing::debug!(%database, %error, "no figures for the report"),
        }
    }
    facts
}

async fn of(restored: &Restored<'_>, database: &str) -> Result<Vec<Fact>> {
    let mut sql = Connection::connect(&in_database(&restored.connection, database), Mode::Sql).await?;
    let mut facts = Vec::new();
    let mut fact = |label: &str, value: &str| {
        facts.push(Fact { database: database.into(), label: label.into(), value: value.into() });
    };
    let row = sql
        .query_one(
            "SELECT (SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace NOT IN \
             (SELECT oid FROM pg_namespace WHERE nspname LIKE 'pg\\_%' OR nspname = 'information_schema')), \
             pg_size_pretty(pg_database_size(current_database()))",
        )
        .await?;
    fact("tables", row.required(0)?);
    fact("size", row.required(1)?);
    for (table, name) in ODOO {
        let found = sql.query_one(&format!("SELECT to_regclass('public.{table}') IS NOT NULL AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.{table}') AND attname = 'create_date' AND NOT attisdropped)")).await?;
        if found.required(0)? != "t" {
            continue;
        }
        let row = sql.query_one(&format!("SELECT count(*), max(create_date) FROM public.{table}")).await?;
        fact(name, row.required(0)?);
        if let Some(newest) = row.text(1)? {
            fact(&format!("newest of the {name}"), newest);
        }
    }
    sql.close().await;
    Ok(facts)
}
