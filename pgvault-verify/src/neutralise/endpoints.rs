//! What of Odoo reaches somebody outside, and how it is switched off.
//!
//! One table for three uses: what is live is counted, switched off by its own columns, and must not be there any more at the end. Sources:
//! the models of these names in Odoo 14 to 20, and what its modules' `neutralize.sql` leave behind, which must not count as live.

use pgvault_core::postgres::Connection;
use pgvault_core::{Error, ErrorKind, Result};

use super::{Count, columns, count};

/// One kind.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// What reports call it.
    pub(super) kind: &'static str,
    table: &'static str,
    /// Columns that `live` is about.
    needs: &'static [&'static str],
    /// Not every version has them; a table without is harmless.
    is_newer: bool,
    /// What reaches outside.
    live: &'static str,
    /// What is changed: also what is not live now and could be used by name.
    change: &'static str,
    /// Columns and what they become, those of them that there are.
    set: &'static [(&'static str, &'static str)],
}

/// Every cron but this one: it is Odoo's housekeeping, without which a copy grows.
const NOT_AUTOVACUUM: &str = "active AND NOT EXISTS (SELECT FROM public.ir_model_data d WHERE d.model = 'ir.cron' AND d.res_id = ir_cron.id \
                              AND d.module = 'base' AND d.name = 'autovacuum_job')";

/// Providers in test mode charge nobody.
const TAKES_MONEY: &str = "coalesce(state, '') NOT IN ('disabled', 'test')";

/// Addresses that are none any more are text without a scheme.
const HAS_ADDRESS: &str = "webhook_url LIKE '%://%'";

const REAL_TOKEN: &str = "account_token <> '' AND account_token NOT LIKE '%+disabled'";

pub(super) const ENDPOINTS: [Endpoint; 10] = [
    Endpoint {
        kind: "crons",
        table: "ir_cron",
        needs: &["active"],
        is_newer: false,
        live: NOT_AUTOVACUUM,
        change: NOT_AUTOVACUUM,
        set: &[("active", "false")],
    },
    Endpoint {
        kind: "mail_servers",
        table: "ir_mail_server",
        needs: &["active", "smtp_host"],
        is_newer: false,
        live: "active AND smtp_host IS DISTINCT FROM 'invalid'",
        // A template or a message that names its server uses one that is not active as well.
        change: "smtp_host IS DISTINCT FROM 'invalid'",
        set: &[("active", "false"), ("smtp_host", "'invalid'"), ("smtp_pass", "NULL")],
    },
    Endpoint {
        kind: "fetchmail_servers",
        table: "fetchmail_server",
        needs: &["active", "server"],
        is_newer: false,
        live: "active AND server IS DISTINCT FROM 'invalid'",
        change: "active OR server IS DISTINCT FROM 'invalid'",
        set: &[("active", "false"), ("server", "'invalid'"), ("password", "NULL"), ("state", "'draft'")],
    },
    Endpoint {
        kind: "webhooks",
        table: "ir_act_server",
        needs: &["webhook_url"],
        is_newer: true,
        live: HAS_ADDRESS,
        change: HAS_ADDRESS,
        set: &[("webhook_url", "NULL")],
    },
    Endpoint {
        kind: "payment_providers",
        table: "payment_provider",
        needs: &["state"],
        is_newer: false,
        live: TAKES_MONEY,
        change: TAKES_MONEY,
        set: &[("state", "'disabled'")],
    },
    // Before Odoo 16.
    Endpoint {
        kind: "payment_acquirers",
        table: "payment_acquirer",
        needs: &["state"],
        is_newer: false,
        live: TAKES_MONEY,
        change: TAKES_MONEY,
        set: &[("state", "'disabled'")],
    },
    Endpoint {
        kind: "delivery_carriers",
        table: "delivery_carrier",
        needs: &["prod_environment"],
        is_newer: true,
        live: "prod_environment",
        change: "prod_environment",
        set: &[("prod_environment", "false")],
    },
    Endpoint {
        kind: "iap_accounts",
        table: "iap_account",
        needs: &["account_token"],
        is_newer: true,
        live: REAL_TOKEN,
        change: REAL_TOKEN,
        // A token pays for services; each stays different, because it may have to be.
        set: &[("account_token", "'pgvault-' || id || '+disabled'")],
    },
    Endpoint {
        kind: "pos_terminals",
        table: "pos_payment_method",
        needs: &["use_payment_terminal"],
        is_newer: true,
        live: "use_payment_terminal <> ''",
        change: "use_payment_terminal <> ''",
        set: &[("use_payment_terminal", "NULL"), ("adyen_test_mode", "true")],
    },
    Endpoint {
        kind: "oauth_providers",
        table: "auth_oauth_provider",
        needs: &["enabled"],
        is_newer: false,
        live: "enabled",
        change: "enabled",
        set: &[("enabled", "false")],
    },
];

impl Endpoint {
    /// True when the database has such things; those of a schema that nobody knows cannot be switched off.
    async fn is_there(&self, sql: &mut Connection) -> Result<Option<Vec<String>>> {
        let columns = columns(sql, self.table).await?;
        if columns.is_empty() {
            return Ok(None);
        }
        match self.needs.iter().find(|name| !columns.iter().any(|column| column == *name)) {
            None => Ok(Some(columns)),
            Some(_) if self.is_newer => Ok(None),
            Some(name) => Err(Error::new(
                ErrorKind::Failed,
                "neutralise.schema",
                format!("the table `{}` has no column `{name}`, so its rows cannot be made harmless", self.table),
            )
            .with_hint("this is not a version of Odoo that is known here; do not start the copy")),
        }
    }

    /// Switches everything of this kind off; nothing when the database knows none.
    pub(super) async fn disable(&self, sql: &mut Connection) -> Result<Option<Count>> {
        let Some(columns) = self.is_there(sql).await? else { return Ok(None) };
        let table = self.table;
        let all = count(sql, &format!("SELECT count(*) FROM public.{table}")).await?;
        let live = count(sql, &format!("SELECT count(*) FROM public.{table} WHERE {}", self.live)).await?;
        let set: Vec<String> = self
            .set
            .iter()
            .filter(|(column, _)| columns.iter().any(|there| there == column))
            .map(|(column, value)| format!("{column} = {value}"))
            .collect();
        let disabled = count(
            sql,
            &format!(
                "WITH changed AS (UPDATE public.{table} SET {} WHERE {} RETURNING 1) SELECT count(*) FROM changed",
                set.join(", "),
                self.change
            ),
        )
        .await?;
        Ok(Some(Count { all, live, disabled }))
    }
}

impl Endpoint {
    /// What of this kind is live, in words.
    pub(super) async fn what_is_live(&self, sql: &mut Connection) -> Result<Option<String>> {
        if self.is_there(sql).await?.is_none() {
            return Ok(None);
        }
        let statement = format!(
            "SELECT count(*), string_agg(id::text, ', ' ORDER BY id) FILTER (WHERE n <= 5) \
             FROM (SELECT id, row_number() OVER (ORDER BY id) AS n FROM public.{} WHERE {}) AS live",
            self.table, self.live
        );
        let row = sql.query_one(&statement).await?;
        Ok(match row.required(0)? {
            "0" => None,
            many => {
                Some(format!("{many} of {} are live (`{}` with id {})", self.kind, self.table, row.text(1)?.unwrap_or_default()))
            }
        })
    }
}

/// A server that takes mail and leads nowhere. Without an active one Odoo takes that of its command line.
const SINK: [(&str, &str); 6] = [
    ("name", "'neutralised by pgvault: mail goes nowhere'"),
    ("smtp_host", "'invalid'"),
    ("smtp_port", "1025"),
    ("smtp_encryption", "'none'"),
    ("smtp_authentication", "'login'"),
    ("active", "true"),
];

/// Adds the server that leads nowhere, where there are mail servers at all and none such yet.
pub(super) async fn add_sink(sql: &mut Connection) -> Result<()> {
    let columns = columns(sql, "ir_mail_server").await?;
    if columns.is_empty() || has_sink(sql).await? {
        return Ok(());
    }
    let (names, values): (Vec<&str>, Vec<&str>) =
        SINK.into_iter().filter(|(name, _)| columns.iter().any(|column| column == name)).unzip();
    let statement = format!("INSERT INTO public.ir_mail_server ({}) VALUES ({})", names.join(", "), values.join(", "));
    let _ = sql.simple_query(&statement).await?;
    Ok(())
}

/// True when mail that names no server goes nowhere.
pub(super) async fn has_sink(sql: &mut Connection) -> Result<bool> {
    Ok(count(sql, "SELECT count(*) FROM public.ir_mail_server WHERE active AND smtp_host = 'invalid'").await? > 0)
}
