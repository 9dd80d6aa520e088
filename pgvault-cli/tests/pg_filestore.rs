//! Odoo's documents through the command: captured beside a server, and restored together with the database at one second.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::odoo::{Shop, UUID, in_database};
use common::{files_below, wait_until};
use odoosim::Content;
use serde_json::Value;

/// A shop with documents.
struct Documents {
    shop: Shop,
    data_dir: PathBuf,
}

impl Documents {
    fn new() -> Self {
        let shop = Shop::new();
        let data_dir = shop.site().directory("odoo");
        shop.data_dir(&data_dir);
        Self { shop, data_dir }
    }

    fn filestore(&self) -> PathBuf {
        self.data_dir.join("filestore/shop")
    }

    /// What Odoo 18 does: the file, the mark, the row.
    fn attach(&self, text: &str) -> Content {
        let content = Content::new(text.as_bytes().to_vec());
        let name = content.store_fname();
        for (path, bytes) in
            [(self.filestore().join(&name), content.bytes()), (self.filestore().join("checklist").join(&name), &[][..])]
        {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        self.shop.sql(&format!(
            "insert into ir_attachment(name, type, store_fname, checksum, file_size) values ('{text}', 'binary', '{name}', '{}', {})",
            content.sha1(),
            content.bytes().len()
        ));
        content
    }

    /// Deletes the row, and what Odoo's collector does later.
    fn delete(&self, content: &Content) {
        self.shop.sql(&format!("delete from ir_attachment where store_fname = '{}'", content.store_fname()));
        for path in [content.store_fname(), format!("checklist/{}", content.store_fname())] {
            fs::remove_file(self.filestore().join(path)).unwrap();
        }
    }

    fn sync(&self) -> Value {
        self.shop.json(&["filestore", "sync"]).ok().json()["databases"][0].clone()
    }

    /// The server's time, with nothing else in its second.
    fn now(&self) -> String {
        let _ = self.shop.sql("select pg_sleep(0.05)");
        let now = self.shop.sql("select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
        let _ = self.shop.sql("select pg_sleep(0.05)");
        now
    }

    fn restore(&self, to: &str, more: &[&str]) -> (common::Ran, PathBuf, PathBuf) {
        let (pgdata, files) = (self.shop.fresh("restored"), self.shop.fresh("documents"));
        let arguments = ["restore", "--to", to, "--pgdata", pgdata.to_str().unwrap(), "--filestore", files.to_str().unwrap()];
        let ran = self.shop.json(&[&arguments, more].concat());
        (ran, pgdata, files)
    }
}

fn documents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let name = |path: &PathBuf| path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
    files_below(folder).iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

fn expected(contents: &[&Content]) -> BTreeMap<String, Vec<u8>> {
    contents.iter().map(|content| (content.store_fname(), content.bytes().to_vec())).collect()
}

/// The database at a second, and exactly the documents that it refers to at that second, whatever became of them since.
#[test]
fn documents_match_the_database_at_the_same_second() {
    let it = Documents::new();
    let (invoice, order) = (it.attach("an invoice"), it.attach("an order"));
    let synced = it.sync();
    assert_eq!((synced["kind"].as_str(), synced["new_files"].as_u64()), (Some("full"), Some(2)), "{synced:#}");
    assert_eq!((synced["database"].as_str(), synced["uuid"].as_str()), (Some("shop"), Some(UUID)), "{synced:#}");
    let then = it.now();
    let status = it.shop.json(&["status"]).ok().json();
    let documents_of = &status["filestores"][0];
    assert_eq!(
        (documents_of["database"].as_str(), documents_of["counts"]["present"].as_u64()),
        (Some("shop"), Some(2)),
        "{status:#}"
    );
    assert!(documents_of["watermark_at"].as_str().unwrap() < then.as_str(), "{status:#}");
    it.delete(&invoice);
    let later = it.attach("a later one");
    let _ = it.sync();
    it.shop.archive();

    let (ran, _, files) = it.restore(&then, &[]);
    let json = ran.ok().json();
    assert_eq!(documents(&files.join("shop")), expected(&[&invoice, &order]));
    assert_eq!((json["files"][0]["complete"].as_bool(), json["files"][0]["unknown"].as_u64()), (Some(true), Some(0)), "{json:#}");
    assert_eq!(json["odoo"][0]["neutralised"], true, "{json:#}");
    assert!(files.join("shop/checklist").is_dir());

    let (ran, pgdata, files) = it.restore("latest", &["--as-production"]);
    ran.ok();
    assert_eq!(documents(&files.join("shop")), expected(&[&order, &later]));
    assert!(pgdata.join("recovery.signal").exists());
    it.shop.assert_nothing_left();
}

/// Behind the watermark what lacks is named, and the exit code says so; what the source had lost before is no loss of the backup.
#[test]
fn what_was_never_captured_is_named_and_ends_with_3() {
    let it = Documents::new();
    let (kept, lost) = (it.attach("kept"), it.attach("lost before"));
    fs::remove_file(it.filestore().join(lost.store_fname())).unwrap();
    let synced = it.sync();
    assert_eq!((synced["counts"]["present"].as_u64(), synced["counts"]["missing"].as_u64()), (Some(1), Some(1)), "{synced:#}");
    let then = it.now();
    let unseen = it.attach("written after the last pass");
    it.shop.archive();
    // At or below the watermark only the loss of the source is told.
    let (ran, _, files) = it.restore(&then, &[]);
    let json = ran.ok().json();
    assert_eq!((json["files"][0]["unknown"].as_u64(), json["files"][0]["bad_at_source"].as_u64()), (Some(0), Some(1)), "{json:#}");
    assert_eq!(documents(&files.join("shop")), expected(&[&kept]));

    let (ran, _, files) = it.restore("latest", &[]);
    let json = ran.expect(3).json();
    let missing: Vec<&str> = json["files"][0]["missing"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert!(missing.contains(&unseen.store_fname().as_str()) && missing.contains(&lost.store_fname().as_str()), "{json:#}");
    assert_eq!(json["files"][0]["complete"], false);
    assert_eq!(documents(&files.join("shop")), expected(&[&kept]));
    let (ran, _, _) = it.restore("latest", &["--allow-missing-files"]);
    ran.ok();
    // The next pass has it.
    let _ = it.sync();
    it.shop.archive();
    let (ran, _, files) = it.restore("latest", &[]);
    ran.ok();
    assert_eq!(documents(&files.join("shop")), expected(&[&kept, &unseen]));
}

/// A4: dropped through the manager, files and all; both come back, elsewhere, as of a moment before.
#[test]
fn a4_a_database_that_was_dropped_with_its_files_comes_back() {
    let it = Documents::new();
    let contents = [it.attach("one"), it.attach("two"), it.attach("three")];
    let _ = it.sync();
    let then = it.now();
    // A shop is never quiet. Recovery to a time replays all up to the next commit behind it, and a drop marks the database before its own.
    in_database(it.shop.production(), "postgres", "create table busy()");
    in_database(it.shop.production(), "postgres", "drop database shop");
    fs::remove_dir_all(it.filestore()).unwrap();
    it.shop.archive();
    let files = it.shop.fresh("documents");
    let ran = it.shop.restore_database("shop", &["--to", &then, "--as", "back", "--filestore", files.to_str().unwrap()]);
    ran.ok();
    assert_eq!(in_database(&it.shop.other, "back", "select count(*) from ir_attachment"), "3");
    assert_eq!(documents(&files.join("back")), expected(&contents.iter().collect::<Vec<_>>()));
    it.shop.assert_nothing_left();
}

/// A9: exit code 6, and what the vault has stays what it was.
#[test]
fn a9_an_empty_or_missing_filestore_ends_with_6() {
    let it = Documents::new();
    let content = it.attach("a document");
    let _ = it.sync();
    let aside = it.data_dir.join("aside");
    fs::rename(it.filestore(), &aside).unwrap();
    it.shop.json(&["filestore", "sync"]).expect(6).says("is its volume mounted?");
    fs::create_dir(it.filestore()).unwrap();
    it.shop.json(&["filestore", "sync", "--full"]).expect(6).says("is its volume mounted");
    let listed = it.shop.json(&["filestore", "list"]).ok().json();
    assert_eq!(listed["filestores"][0]["counts"]["present"], 1, "{listed:#}");
    let out = it.shop.fresh("out");
    it.shop.json(&["filestore", "get", &content.store_fname(), "--out", out.to_str().unwrap()]).ok();
    assert_eq!(fs::read(&out).unwrap(), content.bytes());
    it.shop.json(&["filestore", "get", "00/nothing", "--out", "-"]).expect(1).says("no file 00/nothing");
}

/// A watching capture sees what is new within its interval, ends on a signal, and is gone on with.
#[test]
fn a_watch_captures_what_is_new_and_stops_when_it_is_told() {
    let it = Documents::new();
    let first = it.attach("before the watch");
    let config = fs::read_to_string(it.shop.site().path("pgvault.toml")).unwrap();
    let _ = it.shop.site().write("pgvault.toml", format!("{config}interval = \"200ms\"\n"));
    let watch = common::Running::new(it.shop.site().pgvault(&["filestore", "sync", "--watch"]).spawn().unwrap());
    let known = |content: &Content| {
        let out = it.shop.fresh("out");
        let ran = it.shop.json(&["filestore", "get", &content.store_fname(), "--out", out.to_str().unwrap()]);
        ran.code == Some(0) && fs::read(out).unwrap() == content.bytes()
    };
    wait_until("the first document", Duration::from_secs(30), || known(&first));
    let second = it.attach("during the watch");
    wait_until("the second document", Duration::from_secs(30), || known(&second));
    assert_eq!(watch.terminate(), Some(0));
    let synced = it.sync();
    assert_eq!((synced["new_files"].as_u64(), synced["counts"]["present"].as_u64()), (Some(0), Some(2)), "{synced:#}");
}

/// A drill looks for the documents of the copy in the vault, and a lost one fails it.
#[test]
fn a_drill_proves_the_documents_too() {
    let it = Documents::new();
    let _ = it.attach("an invoice");
    let _ = it.attach("an order");
    let _ = it.sync();
    it.shop.archive();
    let verify = || it.shop.drills.verify(&["--to", "latest", "--deep"]);
    let json = verify().ok().json();
    let check = |json: &Value| {
        let mut checks = json["checks"].as_array().unwrap().iter();
        checks.find(|check| check["name"] == "documents:shop").cloned().unwrap_or_else(|| panic!("{json:#}"))
    };
    let found = check(&json);
    assert_eq!((found["verdict"].as_str(), found["evidence"]["contents_read"].as_u64()), (Some("passed"), Some(2)), "{found:#}");
    let pack = files_below(it.shop.site().folder())
        .into_iter()
        .find(|path| path.to_string_lossy().contains("/files/pack/"))
        .expect("a pack of documents");
    let bytes = fs::read(&pack).unwrap();
    let mut bad = bytes.clone();
    bad[130] ^= 1;
    fs::write(&pack, &bad).unwrap();
    let found = check(&verify().expect(4).json());
    assert_eq!(found["verdict"], "failed", "{found:#}");
    fs::write(&pack, &bytes).unwrap();
    it.shop.assert_nothing_left();
}
