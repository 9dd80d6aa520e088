//! Marks on real servers: a restore to one gives what was there before the change, and what cannot be restored yet is said to be so.

#![allow(clippy::unwrap_used)]

mod common;

use common::odoo::Shop;
use common::{Site, run, sql, switch_and_archive};
use pgvault_verify::process::{Outcome, Server};
use serde_json::Value;

fn json(site: &Site, arguments: &[&str]) -> common::Ran {
    run(site.pgvault(&[&["--output", "json"], arguments].concat()))
}

fn marks(site: &Site) -> Vec<Value> {
    site.summary(&["list"])["marks"].as_array().unwrap().clone()
}

#[test]
fn a_restore_to_a_mark_gives_what_was_there_before_the_change() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(&server, "create table t(n int); insert into t select generate_series(1, 100)");
    let _ = site.backup("local");
    let _ = sql(&server, "insert into t values (101)");
    let set = json(&site, &["mark", "before 18.0.2", "--label", "git=3f2a", "--label", "who=ops", "--switch"]).ok().json();
    assert_eq!((&set["safe"], &set["mark"]["name"]), (&Value::Bool(true), &Value::from("before 18.0.2")), "{set}");
    let _ = sql(&server, "update t set n = 0; insert into t values (7)");
    let _ = switch_and_archive(&server);

    let listed = marks(&site);
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["labels"], serde_json::json!({ "git": "3f2a", "who": "ops" }));
    assert_eq!((&listed[0]["restorable"], &listed[0]["target"]), (&Value::Bool(true), &Value::from("name:before 18.0.2")));
    site.pgv(&["list"]).ok().says("mark `before 18.0.2`").says("git=3f2a");

    let pgdata = site.fresh("restored");
    site.pgv(&["restore", "--archive-off", "--to-name", "before 18.0.2", "--pgdata", pgdata.to_str().unwrap()]).ok();
    let (restored, outcome) = site.recover(&pgdata);
    assert_eq!(outcome, Outcome::Paused);
    assert_eq!(sql(&restored, "select count(*), sum(n) from t"), "101|5151");
    drop(restored);

    // The name leads to one point: a second one is refused unless that is what is wanted.
    json(&site, &["mark", "before 18.0.2"]).expect(2).says("[mark.used]").says("--again");
    assert_eq!(marks(&site).len(), 1);
    json(&site, &["mark", "before 18.0.2", "--again", "--switch"]).ok();
    let listed = marks(&site);
    assert_eq!((&listed[0]["target"], &listed[1]["target"]), (&Value::Null, &Value::from("name:before 18.0.2")));
    site.pgv(&["list"]).ok().says("its name was used again later");
    let restored = site.restore_to("name:before 18.0.2", &["--archive-off"]).0;
    assert_eq!(sql(&restored, "select count(*), sum(n) from t"), "102|7");

    let long = "x".repeat(64);
    json(&site, &["mark", &long]).expect(2).says("[mark.name]");
    json(&site, &["mark", "a\u{1b}b"]).expect(2).says("[mark.name]");
}

#[test]
fn a_mark_that_is_not_in_the_vault_yet_ends_with_3() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    // Without a backup nothing leads to it, whatever WAL there is.
    let none = json(&site, &["mark", "too early", "--switch", "--wait", "20s"]).expect(3).json();
    assert_eq!(none["safe"], false);
    assert_ne!(none["unsafe_because"]["code"], "mark.not_archived", "{none}");
    let _ = site.backup("local");

    let open = json(&site, &["mark", "in the open segment", "--wait", "1s"]).expect(3).says("--switch").json();
    assert_eq!(open["unsafe_because"]["code"], "mark.not_archived", "{open}");
    let restorable = || marks(&site).iter().map(|mark| mark["restorable"].as_bool().unwrap()).collect::<Vec<_>>();
    assert_eq!(restorable(), [false, false]);
    site.pgv(&["list"]).ok().says("cannot be restored");
    let _ = switch_and_archive(&server);
    assert_eq!(restorable(), [false, true]);
    let restored = site.restore_to("name:in the open segment", &["--archive-off"]).0;
    assert_eq!(sql(&restored, "select pg_is_in_recovery()"), "t");
}

/// Nothing else happens on the server that would bring the record to its disk.
#[test]
fn a_stream_has_the_mark_of_an_idle_server_without_a_switch() {
    let site = Site::new();
    let server = site.start(site.cluster("main"));
    let stream = site.stream();
    common::wait_until("the stream is connected", std::time::Duration::from_secs(60), || {
        sql(&server, "select count(*) from pg_stat_replication") == "1"
    });
    let _ = site.backup("remote");
    let _ = sql(&server, "checkpoint");
    for name in ["first", "second"] {
        assert_eq!(json(&site, &["mark", name]).ok().json()["safe"], true);
    }
    assert_eq!(stream.terminate(), Some(0));
    let _ = sql(&server, "create table later()");
    let restored = site.restore_to("name:first", &["--archive-off"]).0;
    assert_eq!(sql(&restored, "select to_regclass('later') is null"), "t");
}

#[test]
fn a_role_needs_one_function_and_is_told_which() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = site.backup("local");
    let _ = sql(&server, "create role minimal login replication");
    let connection = format!("{} user=minimal dbname=postgres", server.conninfo());
    site.configure_text(common::VAULT, &connection, None);
    let refused = json(&site, &["mark", "one"]).expect(6).says("42501");
    assert!(refused.json()["error"]["hint"].as_str().unwrap().contains("GRANT EXECUTE ON FUNCTION pg_create_restore_point(text)"));
    assert!(marks(&site).is_empty());
    let _ = sql(&server, "grant execute on function pg_create_restore_point(text) to minimal");
    // Set all the same, when only the switch is refused.
    json(&site, &["mark", "one", "--switch", "--wait", "0s"]).expect(3).says("pg_switch_wal()").says("mark.not_archived");
    let _ = sql(&server, "grant execute on function pg_switch_wal() to minimal");
    json(&site, &["mark", "two", "--switch"]).ok();
    assert_eq!(marks(&site).len(), 2);
}

#[test]
fn a_standby_is_refused() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = site.backup("local");
    let _ = switch_and_archive(&server);
    let pgdata = site.restore("latest", &["--archive-off", "--target-action", "pause"]);
    std::fs::write(pgdata.join("standby.signal"), "").unwrap();
    let standby = Server::adopt(&site.install, &pgdata).option("fsync", "off").option("shared_buffers", "16MB").launch().unwrap();
    common::wait_until("the standby answers", std::time::Duration::from_secs(60), || {
        standby.psql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "t")
    });
    let main = server.conninfo();
    site.configure_text(common::VAULT, &standby.conninfo(), None);
    json(&site, &["mark", "x"]).expect(6).says("mark.standby").says("primary");
    site.configure_text(common::VAULT, &main, None);
    assert!(marks(&site).is_empty());
}

#[test]
fn a_mark_keeps_what_odoo_had_installed() {
    let shop = Shop::new();
    let site = shop.site();
    let installed = shop.sql("select count(*) from ir_module_module where state = 'installed'");
    let sale = shop.sql("select latest_version from ir_module_module where name = 'sale'");
    // Not configured: nobody is asked.
    let plain = json(site, &["mark", "plain", "--switch"]).ok().json();
    assert_eq!(plain["mark"]["odoo"], serde_json::json!([]));
    shop.data_dir(&site.directory("odoo"));
    let set = json(site, &["mark", "before the upgrade", "--switch"]).ok().json();
    let odoo = &set["mark"]["odoo"][0];
    assert_eq!((&odoo["database"], &odoo["uuid"]), (&Value::from("shop"), &Value::from(common::odoo::UUID)), "{set}");
    assert_eq!(odoo["modules"].as_object().unwrap().len().to_string(), installed);
    assert_eq!(odoo["modules"]["sale"], Value::from(sale));
    assert_eq!(marks(site)[1]["odoo"], set["mark"]["odoo"]);
    // A database that the role may not read keeps nobody from marking.
    let _ = shop.sql("create role reader login replication; grant connect on database shop to reader");
    let _ = sql(shop.production(), "grant execute on function pg_create_restore_point(text), pg_switch_wal() to reader");
    let text = std::fs::read_to_string(site.path("pgvault.toml")).unwrap();
    let own = shop.production().conninfo();
    let _ = site.write("pgvault.toml", text.replace(&own, &format!("{own} user=reader")));
    let blind = json(site, &["mark", "blind", "--switch"]).ok().says("the modules of `shop` were not recorded").json();
    assert_eq!(blind["mark"]["odoo"], serde_json::json!([]));
}
