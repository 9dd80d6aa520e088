//! The tables of Odoo that pgvault reads, as small as they may be, with the columns that its checks and its neutralisation touch.
//!
//! Names and types are those of Odoo's own tables; columns that nothing here looks at are left out. A module table exists only in
//! series that have it: `payment_acquirer` until 15, `payment_provider` since.

use std::fmt::Write as _;

use crate::series::Series;

/// What every series has.
const TABLES: &str = "
create table res_company (id serial primary key, name varchar not null);
create table res_partner (id serial primary key, name varchar, email varchar, phone varchar, active bool default true,
    create_date timestamp, write_date timestamp);
create table res_users (id serial primary key, login varchar not null unique, password varchar, active bool default true,
    partner_id int references res_partner, company_id int references res_company, create_date timestamp, write_date timestamp);
create table ir_config_parameter (id serial primary key, key varchar not null unique, value text not null,
    create_uid int, create_date timestamp, write_uid int, write_date timestamp);
create table ir_module_module (id serial primary key, name varchar not null unique, state varchar, latest_version varchar,
    author varchar, write_date timestamp);
create table ir_model_data (id serial primary key, module varchar not null, name varchar not null, model varchar not null, res_id int,
    noupdate bool default false, unique (module, name));
create table ir_act_server (id serial primary key, name varchar, type varchar default 'ir.actions.server', state varchar default 'code',
    code text, model_id int, usage varchar);
create table ir_cron (id serial primary key, ir_actions_server_id int not null references ir_act_server, cron_name varchar,
    user_id int references res_users, active bool default true, interval_number int, interval_type varchar,
    priority int default 5, nextcall timestamp not null, lastcall timestamp);
create table ir_mail_server (id serial primary key, name varchar not null, smtp_host varchar, smtp_port int, smtp_user varchar,
    smtp_pass varchar, smtp_encryption varchar default 'none', active bool default true, sequence int default 10);
create table fetchmail_server (id serial primary key, name varchar not null, active bool default true, state varchar default 'draft',
    server varchar, server_type varchar, port int, \"user\" varchar, password varchar);
create table ir_sequence (id serial primary key, name varchar not null, code varchar, implementation varchar not null default 'standard',
    prefix varchar, padding int not null default 0, number_next int not null default 1, number_increment int not null default 1,
    use_date_range bool default false, active bool default true, company_id int);
create table ir_sequence_date_range (id serial primary key, date_from date not null, date_to date not null,
    sequence_id int not null references ir_sequence on delete cascade, number_next int not null default 1);
create table account_move (id serial primary key, name varchar, state varchar not null default 'draft', move_type varchar not null,
    date date not null, partner_id int references res_partner, amount_total numeric, create_date timestamp, write_date timestamp);
create table account_move_line (id serial primary key, move_id int not null references account_move on delete cascade,
    name varchar, debit numeric not null default 0, credit numeric not null default 0, balance numeric, date date);
create table sale_order (id serial primary key, name varchar not null, state varchar, partner_id int references res_partner,
    amount_total numeric, create_date timestamp, write_date timestamp);
create table pos_order (id serial primary key, name varchar not null, state varchar, amount_total numeric not null,
    create_date timestamp, write_date timestamp);
create table stock_move (id serial primary key, name varchar, state varchar, product_uom_qty numeric, create_date timestamp,
    write_date timestamp);
create table mail_message (id serial primary key, model varchar, res_id int, body text, message_type varchar, author_id int,
    create_date timestamp, write_date timestamp);
create table ir_attachment (id serial primary key, name varchar not null, description text, res_model varchar, res_field varchar,
    res_id int, company_id int, type varchar not null default 'binary', url varchar(1024), public bool, access_token varchar,
    db_datas bytea, store_fname varchar, file_size int, checksum varchar(40), mimetype varchar, index_content text,
    create_uid int, create_date timestamp, write_uid int, write_date timestamp);
create index ir_attachment__res_idx on ir_attachment (res_model, res_id);
create index ir_attachment__checksum_index on ir_attachment (checksum);
";

/// Rows that a database in use has.
const ROWS: &str = "
insert into res_company (name) values ('Example');
insert into res_partner (name, email, create_date, write_date) values
    ('Administrator', 'admin@example.com', now() at time zone 'utc', now() at time zone 'utc'),
    ('Deco Addict', 'deco@example.com', now() at time zone 'utc', now() at time zone 'utc');
insert into res_users (login, password, partner_id, company_id) values ('__system__', null, 1, 1),
    ('admin', '$pbkdf2-sha512$600000$c2FsdA$aGFzaA', 1, 1);
insert into ir_config_parameter (key, value, create_date, write_date)
    select key, value, now() at time zone 'utc', now() at time zone 'utc' from (values
        ('database.uuid', gen_random_uuid()::text), ('database.secret', gen_random_uuid()::text),
        ('database.create_date', to_char(now() at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS')),
        ('database.enterprise_code', 'M00000000000000'), ('database.expiration_date', '2030-01-01 00:00:00'),
        ('web.base.url', 'https://erp.example.com'), ('ir_attachment.location', 'file'),
        ('base.login_cooldown_after', '10'), ('base.login_cooldown_duration', '60')) v (key, value);
insert into ir_act_server (name, code, usage) values ('Base: Auto-vacuum internal data', 'model._run_vacuum_cleaner()', 'ir_cron'),
    ('Mail: Email Queue Manager', 'model.process_email_queue()', 'ir_cron'),
    ('Mail: Fetchmail Service', 'model._fetch_mails()', 'ir_cron'), ('Publisher: Update Notification', 'model.update_notification(None)', 'ir_cron');
insert into ir_cron (ir_actions_server_id, cron_name, user_id, interval_number, interval_type, nextcall)
    select id, name, 1, case id when 1 then 1 else 5 end, case id when 1 then 'days' else 'minutes' end,
        timestamp '2026-01-01 00:00:00' from ir_act_server order by id;
insert into ir_model_data (module, name, model, res_id, noupdate) values ('base', 'autovacuum_job', 'ir.cron', 1, true),
    ('mail', 'ir_cron_mail_scheduler_action', 'ir.cron', 2, true), ('mail', 'ir_cron_mail_gateway_action', 'ir.cron', 3, true),
    ('mail', 'ir_cron_module_update_notification', 'ir.cron', 4, true);
insert into ir_mail_server (name, smtp_host, smtp_port, smtp_user, smtp_pass) values
    ('Outgoing', 'smtp.example.com', 587, 'erp@example.com', 'secret');
insert into fetchmail_server (name, state, server, server_type, port, \"user\", password) values
    ('Incoming', 'done', 'imap.example.com', 'imap', 993, 'erp@example.com', 'secret');
insert into ir_sequence (name, code, prefix, padding, number_next) values ('Sales Order', 'sale.order', 'S', 5, 1),
    ('Journal Entries', 'account.move', 'MISC/', 4, 1);
insert into ir_sequence (name, code, implementation, prefix, padding, number_next) values
    ('No gaps', 'account.no.gap', 'no_gap', 'INV/', 4, 7);
update ir_sequence set use_date_range = true where code = 'account.move';
insert into ir_sequence_date_range (date_from, date_to, sequence_id) values ('2026-01-01', '2026-12-31', 2);
create sequence ir_sequence_001 increment by 1 start with 1; create sequence ir_sequence_002 increment by 1 start with 1;
create sequence ir_sequence_002_001 increment by 1 start with 1;
insert into account_move (name, state, move_type, date, partner_id, amount_total, create_date, write_date)
    select 'INV/' || n, case when n < 4 then 'posted' else 'draft' end, 'out_invoice', date '2026-03-01' + n, 2, n * 100,
        timestamp '2026-03-01' + n * interval '1 day', timestamp '2026-03-01' + n * interval '1 day' from generate_series(1, 4) n;
insert into account_move_line (move_id, name, debit, credit, balance, date)
    select id, 'receivable', amount_total, 0, amount_total, date from account_move
    union all select id, 'income', 0, amount_total, -amount_total, date from account_move;
insert into sale_order (name, state, partner_id, amount_total, create_date, write_date)
    select 'S0000' || nextval('ir_sequence_001'), 'sale', 2, n * 10, timestamp '2026-03-02' + n * interval '1 hour',
        timestamp '2026-03-02' + n * interval '1 hour' from generate_series(1, 3) n;
insert into pos_order (name, state, amount_total, create_date, write_date)
    values ('Shop/0001', 'done', 12.5, '2026-03-03 10:00', '2026-03-03 10:05');
insert into stock_move (name, state, product_uom_qty, create_date, write_date)
    values ('Desk', 'done', 2, '2026-03-03 11:00', '2026-03-03 11:00');
insert into mail_message (model, res_id, body, message_type, author_id, create_date, write_date)
    values ('sale.order', 1, '<p>Quotation sent</p>', 'comment', 1, '2026-03-03 12:00', '2026-03-03 12:00');
";

/// The SQL that makes an empty database one of Odoo, with some modules installed and some rows in each table.
///
/// Run it as several statements at once. Two databases made by it differ in their `database.uuid` and `database.secret`.
pub fn create(series: Series) -> String {
    let mut sql = format!("{TABLES}{ROWS}");
    let major = series.major();
    if major >= 18 {
        sql += "create index ir_attachment__store_fname_index on ir_attachment (store_fname);";
    }
    if major < 16 {
        sql += "alter table ir_cron add numbercall int default -1, add doall bool default false;
            create table payment_acquirer (id serial primary key, name varchar not null, provider varchar, state varchar not null,
                company_id int);
            insert into payment_acquirer (name, provider, state, company_id) values ('Card', 'stripe', 'enabled', 1),
                ('Wire', 'transfer', 'disabled', 1);";
    } else {
        sql += "create table payment_provider (id serial primary key, name jsonb not null, code varchar, state varchar not null,
                company_id int);
            insert into payment_provider (name, code, state, company_id) values ('{\"en_US\": \"Card\"}', 'stripe', 'enabled', 1),
                ('{\"en_US\": \"Wire\"}', 'custom', 'disabled', 1);";
    }
    for (module, version) in modules(series) {
        let _ = write!(
            sql,
            "insert into ir_module_module (name, state, latest_version, author) values ('{module}', 'installed', '{version}', 'Odoo S.A.');"
        );
    }
    sql += "insert into ir_module_module (name, state) values ('website', 'uninstalled');";
    sql
}

/// The installed modules and what `latest_version` says of them.
pub fn modules(series: Series) -> [(&'static str, String); 8] {
    let of = |version: &str| format!("{}.0.{version}", series.major());
    [
        ("base", of("1.3")),
        ("web", of("1.0")),
        ("mail", of("1.19")),
        ("account", of("1.3")),
        ("sale", of("1.2")),
        ("stock", of("1.1")),
        ("point_of_sale", of("1.0.2")),
        ("payment", of("2.0")),
    ]
}

/// What the manager runs in a copy: the parameters that make a database itself are given anew.
pub(crate) const NEW_IDENTITY: &str = "
update ir_config_parameter set value = gen_random_uuid()::text where key in ('database.uuid', 'database.secret');
update ir_config_parameter set value = to_char(now() at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS') where key = 'database.create_date';
update ir_config_parameter set value = 'http://localhost:8069' where key = 'web.base.url';
update ir_config_parameter set value = '10' where key = 'base.login_cooldown_after';
update ir_config_parameter set value = '60' where key = 'base.login_cooldown_duration';
";

/// What the modules' own neutralisation does to a copy: nothing is sent, fetched or charged, and every job but the autovacuum is off.
pub fn neutralize(series: Series) -> String {
    let payment = if series.major() < 16 { "payment_acquirer" } else { "payment_provider" };
    format!(
        "update ir_mail_server set active = false;
        insert into ir_mail_server (name, smtp_host, smtp_port, active) values ('neutralization - disable emails', 'invalid', 1025, true);
        update ir_cron set active = false where id not in
            (select res_id from ir_model_data where model = 'ir.cron' and module = 'base' and name = 'autovacuum_job');
        update fetchmail_server set active = false;
        update {payment} set state = 'test' where state not in ('test', 'disabled');
        insert into ir_config_parameter (key, value) values ('database.is_neutralized', 'true')
            on conflict (key) do update set value = excluded.value;"
    )
}
