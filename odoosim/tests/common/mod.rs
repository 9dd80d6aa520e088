//! A server per test, and shorthands.

#![allow(dead_code, reason = "not every test binary uses all of it")]
#![allow(clippy::needless_pass_by_value, reason = "closures are written where they are passed")]

use odoosim::{Attachment, Content, Odoo, Series, Site};

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs a test for every series on one server; what it leaves is removed after each.
pub(crate) fn run(test: impl AsyncFn(&Site, Series)) {
    let site = Site::start().unwrap();
    for series in Series::ALL {
        runtime().block_on(async { Box::pin(test(&site, series)).await });
        let databases =
            "select datname from pg_database where not datistemplate and datname <> 'postgres' and datname not like 'odoosim%'";
        for name in site.server().unwrap().psql(databases).unwrap().lines() {
            site.server().unwrap().psql(&format!("drop database \"{name}\" with (force)")).unwrap();
        }
        let _ = std::fs::remove_dir_all(site.data_dir().join("filestore"));
    }
}

/// Creates an attachment in a transaction of its own.
pub(crate) async fn attached(odoo: &Odoo, content: &Content) -> Attachment {
    let mut worker = odoo.worker().await.unwrap();
    worker.begin().await.unwrap();
    let id = worker.attach(content).await.unwrap();
    worker.commit().await.unwrap();
    let name = odoo.ask(&format!("select store_fname from ir_attachment where id = {id}")).await.unwrap();
    Attachment { id, store_fname: name }
}

/// Deletes an attachment in a transaction of its own.
pub(crate) async fn deleted(odoo: &Odoo, attachment: &Attachment) {
    let mut worker = odoo.worker().await.unwrap();
    worker.begin().await.unwrap();
    worker.unlink(attachment).await.unwrap();
    worker.commit().await.unwrap();
}

/// The first column of all rows.
pub(crate) async fn column(odoo: &Odoo, sql: &str) -> Vec<String> {
    let sets = odoo.connect().await.unwrap().simple_query(sql).await.unwrap();
    sets[0].rows.iter().map(|row| row.text(0).unwrap().unwrap_or_default().to_owned()).collect()
}
