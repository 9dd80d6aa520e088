-- What Odoo 14 has of it: payment acquirers instead of providers, no webhooks, no way to log in to a mail server but one.
create table ir_module_module(id serial primary key, name varchar not null unique, state varchar, latest_version varchar);
insert into ir_module_module(name, state, latest_version) values ('base', 'installed', '14.0.1.3');
create table ir_config_parameter(id serial primary key, key varchar not null unique, value text not null);
insert into ir_config_parameter(key, value) values ('database.uuid', '11111111-2222-4333-8444-555555555555'), ('database.secret', 'old secret');
create table ir_model_data(id serial primary key, module varchar not null, name varchar not null, model varchar not null, res_id int);
insert into ir_model_data(module, name, model, res_id) values ('base', 'autovacuum_job', 'ir.cron', 2);
create table ir_cron(id serial primary key, cron_name varchar, active bool);
insert into ir_cron(cron_name, active) values ('Mail', true), ('Base: Auto-vacuum internal data', true);
create table ir_mail_server(id serial primary key, name varchar not null, smtp_host varchar not null, smtp_port int not null, smtp_pass varchar,
    smtp_encryption varchar not null, active bool);
insert into ir_mail_server(name, smtp_host, smtp_port, smtp_encryption, active) values ('Orders', 'smtp.example.com', 25, 'none', true);
create table ir_act_server(id serial primary key, name varchar, state varchar);
create table payment_acquirer(id serial primary key, provider varchar, state varchar not null);
insert into payment_acquirer(provider, state) values ('ogone', 'enabled');
create table iap_account(id serial primary key, account_token varchar);
insert into iap_account(account_token) values ('token');
create table ir_attachment(id serial primary key, name varchar not null, type varchar not null, store_fname varchar, checksum varchar(40),
    file_size int, db_datas bytea);
insert into ir_attachment(name, type, store_fname) values ('a', 'binary', 's3://bucket/0123456789012345678901234567890123456789');
