//! Archives of Odoo's database manager: made of a moment, loaded elsewhere, and refused when their maker meant no good.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use common::files_below;
use common::odoo::{Shop, UUID, assert_same_dump, databases, dump, in_database};
use odoosim::Content;
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// A shop whose Odoo keeps documents.
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

    /// What Odoo 18 does: the file, the mark, the row.
    fn attach(&self, bytes: Vec<u8>) -> Content {
        let content = Content::new(bytes);
        let name = content.store_fname();
        let filestore = self.data_dir.join("filestore/shop");
        for (path, bytes) in [(filestore.join(&name), content.bytes()), (filestore.join("checklist").join(&name), &[][..])] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        self.shop.sql(&format!(
            "insert into ir_attachment(name, type, store_fname, checksum, file_size) values ('a', 'binary', '{name}', '{}', {})",
            content.sha1(),
            content.bytes().len()
        ));
        content
    }

    fn sync(&self) {
        self.shop.json(&["filestore", "sync"]).ok();
    }

    /// The server's time, with nothing else in its second.
    fn now(&self) -> String {
        let _ = self.shop.sql("select pg_sleep(0.05)");
        let now = self.shop.sql("select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
        let _ = self.shop.sql("select pg_sleep(0.05)");
        now
    }

    fn export(&self, to: &str, more: &[&str]) -> (common::Ran, PathBuf) {
        let out = self.shop.fresh("shop.zip");
        let ran = self.shop.json(&[&["export", "--odoo-zip", out.to_str().unwrap(), "--to", to], more].concat());
        (ran, out)
    }
}

/// Imports into the other server of a shop.
fn import(shop: &Shop, archive: &Path, name: &str, filestore: &Path) -> common::Ran {
    let into = shop.other.conninfo();
    let (archive, filestore) = (archive.to_str().unwrap(), filestore.to_str().unwrap());
    shop.json(&["import", archive, "--database", name, "--into", &into, "--filestore", filestore])
}

fn documents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let name = |path: &PathBuf| path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
    files_below(folder).iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

fn expected(contents: &[&Content]) -> BTreeMap<String, Vec<u8>> {
    contents.iter().map(|content| (content.store_fname(), content.bytes().to_vec())).collect()
}

/// Bytes that do not compress, more than one frame holds.
fn large() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).take((9 << 20) / 8 + 1).flatten().collect()
}

/// The members of an archive, in its order, with what is in them.
fn members(archive: &Path) -> Vec<(String, Vec<u8>)> {
    let mut zip = ZipArchive::new(File::open(archive).unwrap()).unwrap();
    let numbers = 0..zip.len();
    let mut read = |number| {
        let mut member = zip.by_index(number).unwrap();
        let mut bytes = Vec::new();
        let _ = member.read_to_end(&mut bytes).unwrap();
        (member.name().unwrap().into_owned(), bytes)
    };
    numbers.map(&mut read).collect()
}

/// Exported at a moment and loaded elsewhere: the database of that moment, line by line, and its documents, byte by byte.
#[test]
fn an_export_is_what_was_there_and_is_loaded_elsewhere() {
    let it = Documents::new();
    let shop = &it.shop;
    let (invoice, order, film) = (it.attach(b"an invoice".to_vec()), it.attach(b"an order".to_vec()), it.attach(large()));
    it.sync();
    let production = dump(shop.production(), "shop");
    let then = it.now();
    let later = it.attach(b"a later one".to_vec());
    let _ = shop.sql("delete from sale_order");
    it.sync();
    shop.archive();

    let (ran, out) = it.export(&then, &["--as-production"]);
    let json = ran.ok().json();
    assert_eq!((&json["as_production"], &json["complete"]), (&Value::Bool(true), &Value::Bool(true)), "{json:#}");
    assert_eq!(json["zip_bytes"].as_u64().unwrap(), fs::metadata(&out).unwrap().len());
    let inside = members(&out);
    let names: Vec<&str> = inside.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(&names[..2], ["dump.sql", "manifest.json"]);
    let files = inside.iter().skip(2).map(|(name, bytes)| (name.strip_prefix("filestore/").unwrap().to_owned(), bytes.clone()));
    assert_eq!(files.collect::<BTreeMap<_, _>>(), expected(&[&invoice, &order, &film]));
    let script = String::from_utf8(inside[0].1.clone()).unwrap();
    assert_eq!(script.len() as u64, json["dump_bytes"].as_u64().unwrap());
    for unwanted in ["\\connect", "CREATE DATABASE", "OWNER TO", "GRANT "] {
        assert!(!script.contains(unwanted), "{unwanted}");
    }
    let manifest: Value = serde_json::from_slice(&inside[1].1).unwrap();
    let major = shop.site().install.version().major();
    assert_eq!(
        manifest,
        json!({
            "odoo_dump": "1", "db_name": "shop", "version": "18.0", "version_info": [18, 0, 0, "final", 0, ""], "major_version": "18.0",
            "pg_version": format!("{major}.0"), "modules": { "base": "18.0.1.3", "sale": "18.0.1.2", "custom_shop": "18.0.0.1" },
        })
    );
    // Nothing is overwritten, and nothing is left of the work.
    let before = fs::read(&out).unwrap();
    let again = ["export", "--to", &then, "--odoo-zip", out.to_str().unwrap()];
    shop.json(&again).expect(2).says("export.exists");
    assert_eq!(fs::read(&out).unwrap(), before);
    shop.assert_nothing_left();
    assert!(fs::read_dir(out.parent().unwrap()).unwrap().flatten().all(|e| !e.file_name().to_str().unwrap().contains(".zip.part")));

    let filestore = shop.fresh("data").join("filestore");
    let json = import(shop, &out, "bought", &filestore).ok().json();
    assert_eq!(
        (json["files"].as_u64(), json["missing"].as_u64(), json["unnamed"].as_u64()),
        (Some(3), Some(0), Some(0)),
        "{json:#}"
    );
    assert_same_dump(&dump(&shop.other, "bought"), &production);
    let folder = filestore.join("bought");
    assert_eq!(documents(&folder), expected(&[&invoice, &order, &film]));
    assert_eq!(fs::read_dir(folder.join("checklist")).unwrap().count(), 0);
    let made = "select pg_encoding_to_char(encoding) || ' ' || datcollate from pg_database where datname = 'bought'";
    assert_eq!(in_database(&shop.other, "postgres", made), "UTF8 C");
    // A second one finds both taken.
    import(shop, &out, "bought", &filestore).expect(2).says("import.folder_exists");
    import(shop, &out, "bought", &shop.fresh("data")).expect(2).says("import.database_exists");
    assert_eq!(in_database(&shop.other, "bought", "select count(*) from sale_order"), "500");
    assert_eq!(documents(&folder), expected(&[&invoice, &order, &film]));

    // Without --as-production it is harmless, and of another moment it has other documents.
    let (ran, out) = it.export("latest", &[]);
    let json = ran.ok().json();
    assert_eq!((&json["odoo"][0]["neutralised"], &json["odoo"][0]["uuid_before"]), (&Value::Bool(true), &Value::from(UUID)));
    import(shop, &out, "copy", &filestore).ok();
    let copy = |text: &str| in_database(&shop.other, "copy", text);
    assert_eq!(copy("select value from ir_config_parameter where key = 'database.is_neutralized'"), "true");
    assert_ne!(copy("select value from ir_config_parameter where key = 'database.uuid'"), UUID);
    assert_eq!(copy("select count(*) from ir_mail_server where active and smtp_host <> 'invalid'"), "0");
    assert_eq!(documents(&filestore.join("copy")), expected(&[&invoice, &order, &film, &later]));
    shop.assert_nothing_left();
}

/// What no pass has seen is named, and the exit code says so, on both sides.
#[test]
fn missing_documents_end_with_3_unless_they_are_allowed() {
    let it = Documents::new();
    let kept = it.attach(b"kept".to_vec());
    it.sync();
    let unseen = it.attach(b"after the last pass".to_vec());
    it.shop.archive();
    let (ran, out) = it.export("latest", &[]);
    let json = ran.expect(3).json();
    assert_eq!(json["files"]["missing"][0]["name"], unseen.store_fname(), "{json:#}");
    assert_eq!((&json["complete"], json["files"]["unknown"].as_u64()), (&Value::Bool(false), Some(1)), "{json:#}");
    it.export("latest", &["--allow-missing-files"]).0.ok();

    let filestore = it.shop.fresh("filestore");
    let json = import(&it.shop, &out, "copy", &filestore).expect(3).json();
    assert_eq!((json["missing"].as_u64(), &json["missing_names"][0]), (Some(1), &Value::from(unseen.store_fname())), "{json:#}");
    assert_eq!(documents(&filestore.join("copy")), expected(&[&kept]));
    // What cannot be exported says what there is.
    it.export("latest", &["--database", "ship"]).0.expect(1).says("export.no_database").says("it has: shop");
    it.shop.assert_nothing_left();
}

/// A database of Odoo as a script, without what `pg_dump` adds.
const SCRIPT: &str = "
create table ir_module_module(id serial primary key, name varchar, state varchar, latest_version varchar);
insert into ir_module_module(name, state, latest_version) values ('base', 'installed', '16.0.1.3');
create table ir_attachment(id serial primary key, name varchar, store_fname varchar, checksum varchar, file_size int, db_datas bytea);
create table goods(name varchar primary key);
COPY goods (name) FROM stdin;
apples
pears
\\.
";

const MANIFEST: &str = r#"{"odoo_dump": "1", "db_name": "theirs", "version": "16.0", "version_info": [16, 0, 0, "final", 0, ""],
    "major_version": "16.0", "pg_version": "14.0", "modules": {"base": "16.0.1.3"}}"#;

/// An archive of these members, with these modes.
fn archive(path: &Path, members: &[(&str, &[u8], u32)]) {
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    for (name, bytes, mode) in members {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).unix_permissions(*mode);
        if mode & 0o170_000 == 0o120_000 {
            zip.add_symlink(*name, std::str::from_utf8(bytes).unwrap(), options).unwrap();
        } else {
            zip.start_file(*name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
    }
    let _ = zip.finish().unwrap();
}

/// Everything below a folder, also what is no file, without what servers and their clients do there.
fn listing(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// Odoo's own archives: files first, marks of the garbage collector among them, folders as members, and what a host adds.
#[test]
fn archives_in_odoos_own_order_are_loaded() {
    let shop = Shop::new();
    let document = Content::new(b"theirs".to_vec());
    let name = document.store_fname();
    let script = format!("{SCRIPT}insert into ir_attachment(name, store_fname) values ('a', '{name}'), ('b', 'web/logo');\n");
    let path = shop.site().write("theirs.zip", "");
    archive(
        &path,
        &[
            (&format!("filestore/checklist/{name}"), b"", 0o644),
            (&format!("filestore/{name}"), document.bytes(), 0o644),
            ("filestore/web/logo", b"png", 0o644),
            ("logs/odoo.log", b"noise", 0o644),
            ("manifest.json", MANIFEST.as_bytes(), 0o644),
            ("dump.sql", script.as_bytes(), 0o644),
        ],
    );
    let filestore = shop.site().directory("filestore");
    let ran = import(&shop, &path, "theirs", &filestore).ok().says("1 other members");
    let json = ran.json();
    assert_eq!(
        (json["files"].as_u64(), json["unnamed"].as_u64(), &json["manifest"]["version"]),
        (Some(2), Some(1), &"16.0".into())
    );
    assert_eq!(in_database(&shop.other, "theirs", "select string_agg(name, ' ' order by name) from goods"), "apples pears");
    let files = documents(&filestore.join("theirs"));
    assert_eq!(files.keys().map(String::as_str).collect::<Vec<_>>(), [name.as_str(), "web/logo"]);
    assert_eq!(fs::read_dir(filestore.join("theirs/checklist")).unwrap().count(), 0);
}

/// One statement that fails, or a script that is no Odoo's, and nothing stays: Odoo's own loading would go on.
#[test]
fn a_dump_that_does_not_load_whole_leaves_nothing() {
    let shop = Shop::new();
    let there = databases(&shop.other);
    let document = Content::new(b"theirs".to_vec());
    let stored = format!("filestore/{}", document.store_fname());
    let filestore = shop.site().directory("filestore");
    let path = shop.site().write("theirs.zip", "");
    let failing = format!("{SCRIPT}insert into goods values ('apples');\ninsert into goods values ('plums');\n");
    for (script, code, said) in [
        (failing.as_str(), 1, "duplicate key value"),
        ("select 1;\n", 4, "import.not_odoo"),
        ("\\! touch escaped\n", 1, "backslash commands are restricted"),
        ("select 1;\n\\unrestrict x\n\\i /nowhere/at/all\n", 1, "wrong key"),
    ] {
        archive(
            &path,
            &[
                ("dump.sql", script.as_bytes(), 0o644),
                ("manifest.json", MANIFEST.as_bytes(), 0o644),
                (&stored, document.bytes(), 0o644),
            ],
        );
        import(&shop, &path, "theirs", &filestore).expect(code).says(said);
        assert_eq!(databases(&shop.other), there);
        assert_eq!(listing(&filestore), Vec::<PathBuf>::new());
        assert!(!shop.site().path("escaped").exists());
        // A folder that was not there is not there afterwards.
        let fresh = shop.fresh("new");
        import(&shop, &path, "theirs", &fresh.join("filestore")).expect(code);
        assert!(!fresh.exists());
    }
}

/// Names that lead elsewhere, links, other content than promised, more bytes than announced, and what is no archive of Odoo.
#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    let shop = Shop::new();
    let there = databases(&shop.other);
    let document = Content::new(b"theirs".to_vec());
    let stored = format!("filestore/{}", document.store_fname());
    let filestore = shop.site().directory("filestore");
    let path = shop.site().write("hostile.zip", "");
    let before = listing(shop.site().folder());
    let refused = |code: i32, said: &str| {
        import(&shop, &path, "hostile", &filestore).expect(code).says(said);
        assert_eq!(databases(&shop.other), there, "{said}");
        assert_eq!(listing(&filestore), Vec::<PathBuf>::new(), "{said}");
        assert_eq!(listing(shop.site().folder()), before, "{said}");
    };
    let script: (&str, &[u8], u32) = ("dump.sql", SCRIPT.as_bytes(), 0o644);
    let manifest: (&str, &[u8], u32) = ("manifest.json", MANIFEST.as_bytes(), 0o644);
    for (name, bytes, mode, code, said) in [
        ("filestore/../../escaped", &b"x"[..], 0o644, 2, "leads out of its folder"),
        ("../escaped", b"x", 0o644, 2, "leads out of its folder"),
        ("/tmp/pgvault-escaped", b"x", 0o644, 2, "absolute"),
        ("filestore/a9", b"/etc", 0o120_777, 2, "neither a file nor a folder"),
        (&stored, b"other content", 0o644, 4, "filestore.content"),
    ] {
        archive(&path, &[script, manifest, (name, bytes, mode)]);
        refused(code, said);
    }
    archive(&path, &[manifest]);
    refused(2, "has no `dump.sql`");
    archive(&path, &[script]);
    refused(2, "has no `manifest.json`");
    archive(&path, &[script, ("manifest.json", br#"{"odoo_dump": "2"}"#, 0o644)]);
    refused(2, "only 1 is known");
    fs::write(&path, "no archive at all").unwrap();
    refused(2, "import.archive");

    // A bomb: a small file says that it becomes 64 MiB; then the directory lies, and says 16 bytes.
    let zeros = vec![0; 64 << 20];
    archive(&path, &[script, manifest, ("filestore/web/zeros", &zeros, 0o644)]);
    let mut bytes = fs::read(&path).unwrap();
    let size = u32::try_from(zeros.len()).unwrap().to_le_bytes();
    let at: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..*at + 4] == size).collect();
    assert!(!at.is_empty());
    for at in &at {
        bytes[*at..*at + 4].copy_from_slice(&16_u32.to_le_bytes());
    }
    fs::write(&path, &bytes).unwrap();
    refused(4, "filestore.");
    // And one that says it has more than any disk, in the long form of sizes.
    archive(&path, &[script, manifest, ("filestore/web/zeros", b"0123456789abcdefg", 0o644)]);
    let mut bytes = fs::read(&path).unwrap();
    let at: Vec<usize> = (0..bytes.len() - 4).filter(|at| bytes[*at..*at + 4] == 17_u32.to_le_bytes()).collect();
    for at in at {
        bytes[at..at + 4].copy_from_slice(&0xFFFF_FFF0_u32.to_le_bytes());
    }
    fs::write(&path, &bytes).unwrap();
    let ran = import(&shop, &path, "hostile", &filestore);
    // 4 GiB may find room; they are not there all the same.
    assert!(matches!(ran.code, Some(1 | 2 | 4)), "{ran:?}");
    assert_eq!(listing(&filestore), Vec::<PathBuf>::new());
    assert_eq!(databases(&shop.other), there);
}
