//! What the tests of restore drills share: a cluster with something in it, and a folder that copies are made in.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgvault_core::postgres::page;
use pgvault_verify::process::Server;
use serde_json::Value;

use super::{Ran, Site, run, sql};

/// Tables as Odoo has them, as far as a drill looks at them.
pub const ODOO: &str = "
create table ir_module_module(id serial primary key, name text, state text, latest_version text);
insert into ir_module_module(name, state, latest_version) values ('base', 'installed', '18.0.1.3'), ('sale', 'installed', '18.0.1.2');
create table ir_config_parameter(id serial primary key, key text unique, value text);
insert into ir_config_parameter(key, value) values ('database.uuid', '6e0b1a3c-1111-4222-8333-944445555666');
create table ir_sequence(id serial primary key, code text, implementation text, use_date_range bool);
insert into ir_sequence(code, implementation, use_date_range) values ('sale.order', 'standard', false);
create sequence ir_sequence_001;
create table ir_attachment(id serial primary key, name text, type text, store_fname text, checksum text, file_size bigint, db_datas bytea);
create table account_move(id serial primary key, state text, create_date timestamp default now());
create table account_move_line(id serial primary key, move_id int, debit numeric, credit numeric);
insert into account_move(state) select 'posted' from generate_series(1, 500);
insert into account_move_line(move_id, debit, credit) select g, 10, 0 from generate_series(1, 500) g;
insert into account_move_line(move_id, debit, credit) select g, 0, 10 from generate_series(1, 500) g;
create table sale_order(id serial primary key, customer text, create_date timestamp default now());
insert into sale_order(customer) select md5(g::text) from generate_series(1, 3000) g;
create index on sale_order(customer)";

/// A site with a cluster, its configuration, and a folder for copies.
#[derive(Debug)]
pub struct Drills {
    pub site: Site,
    pub server: Server,
    /// Lines of every configuration.
    always: String,
    /// What runs containers talks to a service of root's.
    as_root: bool,
}

impl Drills {
    /// Drills by processes.
    pub fn new(more: &str) -> Self {
        Self::with(more, "", false)
    }

    /// Drills in containers; `lines` of the configuration name the service and the image.
    pub fn in_containers(more: &str, lines: &str) -> Self {
        Self::with(more, &format!("runner = \"docker\"\n{lines}\n"), true)
    }

    fn with(more: &str, always: &str, as_root: bool) -> Self {
        let site = Site::new();
        let server = site.start(site.cluster("main").config(site.archiving()).config(more));
        let _ = site.directory("drills");
        // The version under test need not lie where packages put it.
        let always = format!("programs = [\"{}\"]\n{always}", site.install.bin().display());
        let drills = Self { site, server, always, as_root };
        drills.configure("");
        drills
    }

    /// Gives `[cluster.main.drill]` these lines.
    pub fn configure(&self, lines: &str) {
        let text = fs::read_to_string(self.site.path("pgvault.toml")).unwrap();
        let before = text.split("\n[cluster.main.drill]").next().unwrap();
        let folder = self.site.path("drills");
        let own = format!("[cluster.main.drill]\nfolder = \"{}\"\n{}{lines}\n", folder.display(), self.always);
        let _ = self.site.write("pgvault.toml", format!("{before}\n{own}"));
    }

    pub fn verify(&self, more: &[&str]) -> Ran {
        run(self.command(&[&["--output", "json", "verify"], more].concat()))
    }

    /// pgvault as whoever holds the drills.
    pub fn command(&self, arguments: &[&str]) -> Command {
        if !self.as_root {
            return self.site.pgvault(arguments);
        }
        let mut command = Command::new(self.site.path("pgvault"));
        let _ = command.arg("--config").arg(self.site.path("pgvault.toml")).args(arguments).current_dir(self.site.folder());
        command
    }

    /// Nothing is left of any copy.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let left: Vec<_> = fs::read_dir(self.site.path("drills")).unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        assert_eq!(servers_below(&self.site.path("drills")), Vec::<u32>::new());
    }

    /// The drill fails, and exactly these checks do; gives their messages.
    #[track_caller]
    pub fn fails(&self, more: &[&str], checks: &[&str]) -> String {
        let ran = self.verify(more).expect(4);
        let json = ran.json();
        assert_eq!(json["result"], "failed");
        let failed = named(&json, "failed");
        let names: Vec<&str> = failed.keys().map(String::as_str).collect();
        let mut wanted = checks.to_vec();
        wanted.sort_unstable();
        assert_eq!(names, wanted, "{json:#}");
        self.assert_nothing_left();
        failed.into_values().collect::<Vec<_>>().join("\n")
    }
}

/// The checks with a verdict, and what they say.
pub fn named(json: &Value, verdict: &str) -> BTreeMap<String, String> {
    let checks = json["checks"].as_array().unwrap();
    let with = checks.iter().filter(|check| check["verdict"] == verdict);
    with.map(|check| (check["name"].as_str().unwrap().to_owned(), check["message"].as_str().unwrap().to_owned())).collect()
}

/// Processes whose command line names something below a folder.
pub fn servers_below(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_below = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&line);
        text.contains("postgres") && text.contains(folder.to_str().unwrap())
    };
    numbers.filter(is_below).collect()
}

pub fn relation(server: &Server, name: &str) -> PathBuf {
    server.pgdata().join(sql(server, &format!("select pg_relation_filepath('{name}')")))
}

/// Changes a page as a bad disk, or a bad program, would, while no server runs on it.
pub fn change_page(file: &Path, block: u32, with_checksum: bool, change: impl FnOnce(&mut [u8])) {
    let open = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut bytes = vec![0; 8192];
    open.read_exact_at(&mut bytes, u64::from(block) * 8192).unwrap();
    change(&mut bytes);
    if with_checksum {
        let sum = page::checksum(&bytes, block).to_le_bytes();
        bytes[8..10].copy_from_slice(&sum);
    }
    open.write_all_at(&bytes, u64::from(block) * 8192).unwrap();
}
