//! What `pgvault doctor` says of databases of Odoo.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::odoo::{Shop, UUID};
use serde_json::Value;

/// The check of this name, of a database.
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap_or(&Value::Null)
}

fn database<'a>(summary: &'a Value, name: &str) -> &'a Value {
    summary["odoo"]["main"].as_array().unwrap().iter().find(|report| report["database"] == name).unwrap_or(&Value::Null)
}

#[test]
fn doctor_says_where_documents_lie_and_how_far_they_are_safe() {
    let shop = Shop::new();
    assert_eq!(shop.site().summary(&["doctor"])["odoo"], serde_json::json!({}), "nothing is configured");
    let data = shop.site().directory("odoo");
    let name = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
    let _ = shop.site().directory("odoo/filestore");
    let _ = shop.site().directory("odoo/filestore/shop");
    let folder = shop.site().directory("odoo/filestore/shop/da");
    let _ = shop.site().write(format!("odoo/filestore/shop/da/{name}").as_str(), "");
    let _ = shop.sql(&format!(
        "delete from ir_attachment; insert into ir_attachment(name, type, store_fname, checksum, file_size) values \
         ('a', 'binary', 'da/{name}', '{name}', 0), ('b', 'binary', 's3://bucket/{name}', '{name}', 7), \
         ('c', 'binary', 'minio_prod://x-1-0.pdf', null, 5), ('d', 'binary', 'minio_prod://y-2-0.pdf', null, 6); \
         insert into ir_attachment(name, type, db_datas) values ('e', 'binary', 'x'); \
         insert into ir_attachment(name, type, url) values ('f', 'url', 'https://x')"
    ));
    shop.data_dir(&data);
    let _ = shop.production().psql("create database copy template shop").unwrap();
    let neutral = "insert into ir_config_parameter(key, value) values ('database.is_neutralized', 'True')";
    let _ = shop.production().psql_in("copy", neutral).unwrap();

    let summary = shop.site().summary(&["doctor"]);
    let report = database(&summary, "shop");
    assert_eq!((&report["uuid"], &report["neutralised"]), (&Value::from(UUID), &Value::Bool(false)), "{summary}");
    let rows = |place: &str| report["attachments"][place]["rows"].as_u64().unwrap();
    assert_eq!(["local", "s3", "minio_prod", "db", "url"].map(rows), [1, 1, 2, 1, 1], "{report}");
    let remote: Vec<&Value> = report["checks"].as_array().unwrap().iter().filter(|check| check["name"] == "odoo_remote").collect();
    assert_eq!(remote.len(), 2, "{report}");
    assert!(remote[0]["evidence"].as_str().unwrap().starts_with("2 attachments lie in minio_prod://"), "{report}");
    assert!(remote[0]["fix"].as_str().unwrap().contains("fs_file_gc"));
    assert!(remote[1]["fix"].as_str().unwrap().contains("versions"));
    assert_eq!(check(report, "odoo_filestore")["outcome"], "passed");
    assert_eq!((&check(report, "odoo_watermark")["outcome"], &report["behind_seconds"]), (&Value::from("warned"), &Value::Null));
    let copy = database(&summary, "copy");
    assert_eq!((&copy["neutralised"], &check(copy, "odoo_neutralised")["outcome"]), (&Value::Bool(true), &Value::from("passed")));
    assert_eq!(database(&summary, "postgres"), &Value::Null);
    shop.site().pgv(&["doctor"]).ok().says("Odoo of main, `shop`").says("odoo_remote").says("run `pgvault filestore sync");

    shop.site().pgv(&["filestore", "sync", "--database", "shop"]).ok();
    let summary = shop.site().summary(&["doctor", "--read-only"]);
    let report = database(&summary, "shop");
    assert_eq!(check(report, "odoo_watermark")["outcome"], "passed", "{report}");
    assert!(report["behind_seconds"].as_i64().is_some_and(|seconds| seconds < 3600), "{report}");

    // A folder that cannot be read is a failure, and so is one that is not there.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o000)).unwrap();
    let failed = shop.json(&["doctor"]).expect(4).json();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(
        (&failed["result"], &check(database(&failed, "shop"), "odoo_filestore")["outcome"]),
        (&Value::from("failed"), &Value::from("failed"))
    );
    fs::rename(data.join("filestore/shop"), data.join("filestore/elsewhere")).unwrap();
    shop.json(&["doctor"]).expect(4).says("odoo_filestore");
    fs::rename(data.join("filestore/elsewhere"), data.join("filestore/shop")).unwrap();

    // A server that is away keeps nobody from looking at the store.
    let text = fs::read_to_string(shop.site().path("pgvault.toml")).unwrap();
    let _ = shop.site().write("pgvault.toml", text.replace(&shop.production().conninfo(), "host=/nowhere dbname=postgres user=x"));
    let away = shop.site().summary(&["doctor"]);
    assert_eq!(
        (&away["result"], &check(database(&away, ""), "odoo_server")["outcome"]),
        (&Value::from("passed"), &Value::from("skipped"))
    );
    assert!(!away["checks"].as_array().unwrap().is_empty());
}
