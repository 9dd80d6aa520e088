-- Tables of Odoo 18 as far as a copy is concerned, with what a shop has in them: names, types and constraints of the columns are those of
-- the models, the rows are made up.
create table ir_module_module(id serial primary key, name varchar not null unique, state varchar, latest_version varchar);
insert into ir_module_module(name, state, latest_version) values
    ('base', 'installed', '18.0.1.3'), ('sale', 'installed', '18.0.1.2'), ('custom_shop', 'installed', '18.0.0.1'), ('hr', 'uninstalled', null);
create table ir_config_parameter(id serial primary key, key varchar not null unique, value text not null, create_date timestamp);
insert into ir_config_parameter(key, value) values
    ('database.uuid', '6e0b1a3c-1111-4222-8333-944445555666'), ('database.secret', 'a secret of production'),
    ('database.create_date', '2023-01-02 03:04:05'), ('database.enterprise_code', 'M123456'), ('database.expiration_date', '2030-01-01'),
    ('web.base.url', 'https://shop.example.com'), ('base.login_cooldown_after', '3'), ('mail.catchall.domain', 'example.com');
create table ir_model_data(id serial primary key, module varchar not null, name varchar not null, model varchar not null, res_id int);
create table ir_cron(id serial primary key, cron_name varchar, active bool, nextcall timestamp not null default now(), lastcall timestamp);
insert into ir_cron(cron_name, active) values
    ('Base: Auto-vacuum internal data', true), ('Mail: Email Queue Manager', true), ('Shop: send orders to the warehouse', true), ('Old job', false);
insert into ir_model_data(module, name, model, res_id) values
    ('base', 'autovacuum_job', 'ir.cron', 1), ('mail', 'ir_cron_mail_scheduler_action', 'ir.cron', 2), ('base', 'autovacuum_job', 'ir.rule', 3);
create table ir_mail_server(id serial primary key, name varchar not null, smtp_host varchar, smtp_port int, smtp_user varchar, smtp_pass varchar,
    smtp_encryption varchar not null, smtp_authentication varchar not null, active bool, sequence int);
insert into ir_mail_server(name, smtp_host, smtp_port, smtp_user, smtp_pass, smtp_encryption, smtp_authentication, active) values
    ('Orders', 'smtp.example.com', 587, 'orders', 'pass', 'starttls', 'login', true), ('Old', 'old.example.com', 25, null, null, 'none', 'login', false);
create table fetchmail_server(id serial primary key, name varchar, active bool, server varchar, state varchar, "user" varchar, password varchar);
insert into fetchmail_server(name, active, server, state, "user", password) values ('Help desk', true, 'imap.example.com', 'done', 'help', 'pass');
create table ir_act_server(id serial primary key, name varchar, state varchar, webhook_url varchar);
insert into ir_act_server(name, state, webhook_url) values
    ('Tell the warehouse', 'webhook', 'https://hooks.example.com/x'), ('Compute', 'code', null);
create table payment_provider(id serial primary key, code varchar, state varchar not null, is_published bool);
insert into payment_provider(code, state) values ('stripe', 'enabled'), ('demo', 'test'), ('paypal', 'disabled');
create table delivery_carrier(id serial primary key, delivery_type varchar, prod_environment bool, active bool);
insert into delivery_carrier(delivery_type, prod_environment, active) values ('dhl', true, true), ('fixed', false, true);
create table iap_account(id serial primary key, account_token varchar unique);
insert into iap_account(account_token) values ('0123456789abcdef'), ('fedcba9876543210'), (null);
create table pos_payment_method(id serial primary key, name varchar, use_payment_terminal varchar, adyen_test_mode bool);
insert into pos_payment_method(name, use_payment_terminal, adyen_test_mode) values ('Cash', null, null), ('Card', 'adyen', false);
create table auth_oauth_provider(id serial primary key, name varchar, enabled bool);
insert into auth_oauth_provider(name, enabled) values ('Google', true);
create table ir_attachment(id serial primary key, name varchar not null, type varchar not null, url varchar, store_fname varchar, checksum varchar(40),
    file_size int, db_datas bytea, res_model varchar, res_id int);
create table sale_order(id serial primary key, customer varchar, amount numeric, create_date timestamp);
insert into sale_order(customer, amount, create_date) select md5(g::text), g, '2026-01-01' from generate_series(1, 500) g;
