#![allow(clippy::all, clippy::pedantic, missing_docs, clippy::print_stdout, clippy::unwrap_used)]
use odoosim::*;
use std::time::Instant;
fn main() {
    let site = Site::start().unwrap();
    let rt = tokio::runtime::Runtime::new().unwrap();
    rt.block_on(async {
        let mut odoo = site.create("m", Series::V18, Rules::default()).await.unwrap();
        let t = Instant::now();
        for _ in 0..50 {
            odoo.connect().await.unwrap().close().await;
        }
        println!("connect {:?}", t.elapsed() / 50);
        let mut c = odoo.connect().await.unwrap();
        let t = Instant::now();
        for _ in 0..1000 {
            c.simple_query("select 1").await.unwrap();
        }
        println!("select 1 {:?}", t.elapsed() / 1000);
        let t = Instant::now();
        for _ in 0..300 {
            c.simple_query("begin").await.unwrap();
            c.simple_query("insert into ir_attachment (name) values ('x')").await.unwrap();
            c.simple_query("commit").await.unwrap();
        }
        println!("insert tx {:?}", t.elapsed() / 300);
        let t = Instant::now();
        for _ in 0..20 {
            let r = Recording::start(&odoo).await.unwrap();
            r.finish().await.unwrap();
        }
        println!("recording {:?}", t.elapsed() / 20);
        drop(c);
        let t = Instant::now();
        for _ in 0..20 {
            odoo = odoo.cleared().await.unwrap();
        }
        println!("cleared {:?}", t.elapsed() / 20);
        let t = Instant::now();
        for i in 0..10 {
            site.create(&format!("x{i}"), Series::V18, Rules::default()).await.unwrap();
        }
        println!("create {:?}", t.elapsed() / 10);
        let t = Instant::now();
        for _ in 0..200 {
            odoo.monitor().waiting().await.unwrap();
        }
        println!("waiting {:?}", t.elapsed() / 200);
        let p = std::path::Path::new("/dev/shm/odoosim-mm");
        std::fs::create_dir_all(p).unwrap();
        let t = Instant::now();
        for i in 0..1000 {
            std::fs::write(p.join(i.to_string()), b"x").unwrap();
        }
        println!("file {:?}", t.elapsed() / 1000);
        std::fs::remove_dir_all(p).unwrap();
        let t = Instant::now();
        for i in 0..1000 {
            Content::numbered(3, i);
        }
        println!("content {:?}", t.elapsed() / 1000);
    });
}
