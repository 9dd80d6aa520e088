//! Copies of databases of Odoo become harmless, or stay as they were and this is said. On a real PostgreSQL, of the version in
//! `PGVAULT_TEST_PG`.

#![expect(clippy::unwrap_used, reason = "also in the helpers of a test, a failure is a panic")]

use pgvault_core::env::Env;
use pgvault_core::postgres::{ConnInfo, Connection, Mode};
use pgvault_core::{ErrorKind, Result};
use pgvault_verify::neutralise::{Count, Neutralised, neutralise};
use pgvault_verify::process::{Install, Server};

const ODOO_18: &str = include_str!("odoo/18.sql");
const ODOO_14: &str = include_str!("odoo/14.sql");

/// A server with a database of its own.
struct Place {
    server: Server,
    runtime: tokio::runtime::Runtime,
}

impl Place {
    fn new(schema: &str) -> Self {
        let server = Server::builder(&Install::for_tests().unwrap()).config("fsync = off").start().unwrap();
        let _ = server.psql("create database shop").unwrap();
        let _ = server.psql_in("shop", schema).unwrap();
        Self { server, runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    #[track_caller]
    fn sql(&self, text: &str) -> String {
        self.server.psql_in("shop", text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn neutralise(&self, module_sql: Option<&str>) -> Result<Neutralised> {
        self.runtime.block_on(async {
            let connection = ConnInfo::parse(&self.server.conninfo(), &|_| None)?;
            let connection = ConnInfo { dbname: Some("shop".into()), ..connection };
            let mut sql = Connection::connect(&connection, Mode::Sql).await?;
            let done = neutralise(&mut sql, &Env::default(), module_sql).await;
            sql.close().await;
            done
        })
    }

    fn parameter(&self, key: &str) -> String {
        self.sql(&format!("select value from ir_config_parameter where key = '{key}'"))
    }

    /// Everything that the database says, to compare.
    fn contents(&self) -> String {
        let tables = self.sql("select string_agg(relname, ' ' order by relname) from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace");
        let rows = tables.split(' ').map(|table| self.sql(&format!("select '{table}', t.* from {table} t order by id")));
        rows.collect::<Vec<_>>().join("\n")
    }
}

/// Every kind of what reaches outside is found, switched off and counted, and the copy is nobody else.
#[test]
fn a_copy_of_odoo_18_reaches_nobody_and_is_nobody_else() {
    let place = Place::new(ODOO_18);
    let orders = place.sql("select md5(string_agg(s::text, '' order by id)) from sale_order s");
    let done = place.neutralise(None).unwrap();
    let counted = |kind: &str| done.found[kind];
    assert_eq!(counted("crons"), Count { all: 4, live: 2, disabled: 2 });
    assert_eq!(counted("mail_servers"), Count { all: 2, live: 1, disabled: 2 });
    assert_eq!(counted("fetchmail_servers"), Count { all: 1, live: 1, disabled: 1 });
    assert_eq!(counted("webhooks"), Count { all: 2, live: 1, disabled: 1 });
    assert_eq!(counted("payment_providers"), Count { all: 3, live: 1, disabled: 1 });
    assert_eq!(counted("delivery_carriers"), Count { all: 2, live: 1, disabled: 1 });
    assert_eq!(counted("iap_accounts"), Count { all: 3, live: 2, disabled: 2 });
    assert_eq!(counted("pos_terminals"), Count { all: 2, live: 1, disabled: 1 });
    assert_eq!(counted("oauth_providers"), Count { all: 1, live: 1, disabled: 1 });
    assert!(!done.found.contains_key("payment_acquirers"), "{done:?}");

    assert_eq!(place.sql("select cron_name from ir_cron where active"), "Base: Auto-vacuum internal data");
    assert_eq!(place.sql("select distinct smtp_host, count(smtp_pass) from ir_mail_server group by 1"), "invalid|0");
    assert_eq!(place.sql("select count(*) from ir_mail_server where active"), "1");
    assert_eq!(place.sql("select active, server, password is null, state from fetchmail_server"), "f|invalid|t|draft");
    assert_eq!(place.sql("select count(webhook_url) from ir_act_server"), "0");
    assert_eq!(place.sql("select code, state from payment_provider order by 1"), "demo|test\npaypal|disabled\nstripe|disabled");
    assert_eq!(
        place.sql("select use_payment_terminal is null, adyen_test_mode from pos_payment_method where name = 'Card'"),
        "t|t"
    );
    assert_eq!(place.sql("select count(*) from iap_account where account_token in ('0123456789abcdef', 'fedcba9876543210')"), "0");
    assert_eq!(place.sql("select md5(string_agg(s::text, '' order by id)) from sale_order s"), orders);

    assert_eq!(done.uuid_before.as_deref(), Some("6e0b1a3c-1111-4222-8333-944445555666"));
    assert_eq!(place.parameter("database.uuid"), done.uuid);
    assert_ne!(Some(&done.uuid), done.uuid_before.as_ref());
    let secret = place.parameter("database.secret");
    assert!(secret.len() == 36 && secret != done.uuid, "{secret}");
    assert_ne!(place.parameter("database.create_date"), "2023-01-02 03:04:05");
    assert_eq!(place.parameter("web.base.url"), "http://localhost:8069");
    assert_eq!(place.parameter("base.login_cooldown_after"), "10");
    assert_eq!(place.parameter("base.login_cooldown_duration"), "60");
    assert_eq!(place.parameter("database.is_neutralized"), "true");
    assert_eq!(place.sql("select count(*) from ir_config_parameter where key ~ 'enterprise|expiration'"), "0");
    assert_eq!(place.parameter("mail.catchall.domain"), "example.com");

    // A second time finds nothing, and is again somebody else.
    let again = place.neutralise(None).unwrap();
    assert_eq!(again.found.values().map(|count| count.live + count.disabled).sum::<u64>(), 0, "{again:?}");
    assert_eq!((again.uuid_before.as_ref(), again.uuid == done.uuid), (Some(&done.uuid), false));
    assert_ne!(place.parameter("database.secret"), secret);
    assert_eq!(place.sql("select count(*) from ir_mail_server where active"), "1");
}

#[test]
fn a_copy_of_odoo_14_too_and_what_lies_in_an_object_store_is_told() {
    let place = Place::new(ODOO_14);
    // What a database may have as its default.
    let _ = place.sql("alter database shop set default_transaction_read_only = on");
    let done = place.neutralise(None).unwrap();
    assert_eq!(done.found["payment_acquirers"], Count { all: 1, live: 1, disabled: 1 });
    let kinds: Vec<&str> = done.found.keys().copied().collect();
    assert_eq!(kinds, ["crons", "iap_accounts", "mail_servers", "payment_acquirers"]);
    assert_eq!(place.sql("select id from ir_cron where active"), "2");
    assert_eq!(place.sql("select smtp_host, smtp_port from ir_mail_server where active"), "invalid|1025");
    assert!(done.warnings.len() == 1 && done.warnings[0].contains("s3://"), "{:?}", done.warnings);
}

/// Newest versions say of each parameter what its value is, and insist on it.
#[test]
fn parameters_with_a_type_are_set_with_one() {
    let place = Place::new(ODOO_14);
    let _ = place.sql("alter table ir_config_parameter add type varchar; update ir_config_parameter set type = 'str'; alter table ir_config_parameter alter type set not null");
    let _ = place.neutralise(None).unwrap();
    assert_eq!(place.sql("select value, type from ir_config_parameter where key = 'database.is_neutralized'"), "true|str");
}

/// What `odoo-bin neutralize --stdout` prints is run as it is, and what it leaves behind is not taken for live.
#[test]
fn statements_of_modules_are_run_in_the_same_transaction() {
    let place = Place::new(ODOO_18);
    let printed = "BEGIN;
-- what base leaves behind: a second server that leads nowhere; addresses and tokens that are none
UPDATE ir_mail_server SET active = (smtp_host = 'invalid');
INSERT INTO ir_mail_server(name, smtp_host, smtp_encryption, smtp_authentication, active) VALUES ('a module''s', 'invalid', 'none', 'login', true);
UPDATE ir_config_parameter SET value = true WHERE key = 'database.is_neutralized';
UPDATE ir_act_server SET webhook_url = 'neutralization - disable webhook' WHERE state = 'webhook';
UPDATE iap_account SET account_token = account_token || '+disabled';
DO $$ BEGIN UPDATE sale_order SET customer = 'x;y' WHERE id = 1; END $$;
COMMIT;";
    let done = place.neutralise(Some(printed)).unwrap();
    assert_eq!(done.module_statements, 6);
    assert_eq!(place.sql("select customer from sale_order where id = 1"), "x;y");
    assert_eq!(place.parameter("database.is_neutralized"), "true");

    let before = place.contents();
    let error = place
        .neutralise(Some("BEGIN;\nUPDATE sale_order SET customer = 'z';\n\nUPDATE no_such_table SET a = 1;\nCOMMIT;"))
        .unwrap_err();
    assert_eq!((error.code(), error.kind()), ("neutralise.module_sql", ErrorKind::Failed));
    assert!(error.to_string().contains("line 4") && error.to_string().contains("`UPDATE no_such_table SET a = 1`"), "{error}");
    let error = place.neutralise(Some("UPDATE sale_order SET customer = 'z'; ROLLBACK")).unwrap_err();
    assert_eq!(error.code(), "neutralise.statements");
    assert_eq!(place.contents(), before, "neither has changed anything");
}

/// A module switches on again what was switched off: by its own statements, or by a trigger that nobody sees.
#[test]
fn what_is_live_at_the_end_is_named_and_nothing_is_changed() {
    let place = Place::new(ODOO_18);
    let _ = place.sql(
        "create function keep() returns trigger language plpgsql as $$ begin update ir_cron set active = true where id = 3; return null; end $$",
    );
    let mail = "INSERT INTO ir_mail_server(name, smtp_host, smtp_port, smtp_encryption, smtp_authentication, active) VALUES ('Custom', 'smtp.custom.example', 25, 'none', 'login', true)";
    let cases: [(&str, &str, &str); 6] = [
        ("", mail, "mail_servers are live"),
        ("", "UPDATE payment_provider SET state = 'enabled' WHERE code = 'stripe'", "payment_providers are live"),
        ("", "UPDATE ir_mail_server SET active = false", "no mail server that leads nowhere"),
        ("", "UPDATE ir_config_parameter SET value = 'false' WHERE key = 'database.is_neutralized'", "is_neutralized"),
        (
            "",
            "UPDATE ir_config_parameter SET value = '6e0b1a3c-1111-4222-8333-944445555666' WHERE key = 'database.uuid'",
            "production's",
        ),
        (
            "create constraint trigger late after update on ir_cron deferrable initially deferred for each row when (new.id = 3 and not new.active) execute function keep()",
            "SELECT 1",
            "crons are live (`ir_cron` with id 3)",
        ),
    ];
    for (setup, module_sql, said) in cases {
        let _ = place.sql(setup);
        let before = place.contents();
        let error = place.neutralise(Some(module_sql)).unwrap_err();
        assert_eq!((error.code(), error.kind()), ("neutralise.live", ErrorKind::Unfit), "{module_sql}: {error}");
        assert!(error.to_string().contains(said), "{module_sql}: {error}");
        assert_eq!(place.contents(), before, "{module_sql}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    let place = Place::new("create table t(id int)");
    assert_eq!(place.neutralise(None).unwrap_err().code(), "neutralise.not_odoo");
    let place = Place::new(ODOO_18);
    let _ = place.sql("alter table ir_cron rename active to is_active");
    let before = place.contents();
    let error = place.neutralise(None).unwrap_err();
    assert_eq!(error.code(), "neutralise.schema");
    assert!(error.to_string().contains("`ir_cron` has no column `active`"), "{error}");
    assert_eq!(place.contents(), before);
}
