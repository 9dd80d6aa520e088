//! Databases of Odoo for tests: one with everything that reaches outside, in a cluster that archives.

use std::fs;
use std::path::PathBuf;

use pgvault_verify::process::Server;

use super::drills::Drills;
use super::{Ran, Site, run, switch_and_archive};

/// Tables of Odoo 18 with what a shop has in them.
pub const SHOP: &str = include_str!("../../../pgvault-verify/tests/odoo/18.sql");

/// Tables of Odoo 14.
pub const OLD_SHOP: &str = include_str!("../../../pgvault-verify/tests/odoo/14.sql");

/// The uuid of the database that [`SHOP`] makes.
pub const UUID: &str = "6e0b1a3c-1111-4222-8333-944445555666";

/// A cluster with a shop in it, and another server that databases are restored into.
pub struct Shop {
    pub drills: Drills,
    pub other: Server,
}

impl std::fmt::Debug for Shop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shop").finish_non_exhaustive()
    }
}

impl Shop {
    /// The shop, with a backup of it and all its WAL in the vault.
    pub fn new() -> Self {
        let drills = Drills::new("");
        let other = Server::builder(&drills.site.install).config("fsync = off").start().expect("another server");
        let _ = drills.server.psql("create database shop").expect("a database");
        let shop = Self { drills, other };
        shop.sql(SHOP);
        let _ = shop.site().backup("local");
        shop.archive();
        shop
    }

    pub fn site(&self) -> &Site {
        &self.drills.site
    }

    pub fn production(&self) -> &Server {
        &self.drills.server
    }

    /// In production's database.
    #[track_caller]
    pub fn sql(&self, text: &str) -> String {
        in_database(self.production(), "shop", text)
    }

    pub fn archive(&self) {
        let _ = switch_and_archive(self.production());
    }

    /// Says where Odoo has its files.
    pub fn data_dir(&self, folder: &std::path::Path) {
        let path = self.site().path("pgvault.toml");
        let text = fs::read_to_string(&path).expect("the configuration");
        let odoo = format!("[cluster.main.odoo]\ndata_dir = \"{}\"\n", folder.display());
        let _ = self.site().write("pgvault.toml", format!("{text}\n{odoo}"));
    }

    /// Restores one database to the latest moment, into the other server.
    pub fn restore_database(&self, name: &str, more: &[&str]) -> Ran {
        let into = self.other.conninfo();
        let mut arguments = vec!["restore", "--database", name, "--into", &into];
        if !more.iter().any(|argument| argument.starts_with("--to")) {
            arguments.extend(["--to", "latest"]);
        }
        arguments.extend(more);
        self.json(&arguments)
    }

    pub fn json(&self, arguments: &[&str]) -> Ran {
        run(self.site().pgvault(&[&["--output", "json"], arguments].concat()))
    }

    /// As whoever runs the tests; root hands what it restores to the account that runs the server.
    pub fn json_as_tester(&self, arguments: &[&str]) -> Ran {
        let mut command = std::process::Command::new(self.site().path("pgvault"));
        let _ = command.arg("--config").arg(self.site().path("pgvault.toml")).args(["--output", "json"]).args(arguments);
        let _ = command.current_dir(self.site().folder());
        run(command)
    }

    /// A folder of the server's account that does not exist yet.
    pub fn fresh(&self, name: &str) -> PathBuf {
        self.site().fresh(name)
    }

    /// Nothing is left of what was restored for the work.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.drills.assert_nothing_left();
    }
}

#[track_caller]
pub fn in_database(server: &Server, database: &str, text: &str) -> String {
    server.psql_in(database, text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Everything that a database is, as `pg_dump` says it, line by line. But for where sequences are: PostgreSQL writes that ahead into WAL, and
/// every recovery skips some numbers.
#[track_caller]
pub fn dump(server: &Server, database: &str) -> Vec<String> {
    let mut command = server.client("pg_dump").expect("pg_dump");
    let _ = command.args(["--no-owner", "--no-privileges"]).env("PGDATABASE", database);
    let ran = run(command).ok();
    // Each run has a word of its own to keep psql from taking data for commands.
    let left_out = ["\\restrict", "\\unrestrict", "SELECT pg_catalog.setval("];
    ran.stdout.lines().filter(|line| !left_out.iter().any(|start| line.starts_with(start))).map(ToOwned::to_owned).collect()
}

/// Fails the test with the lines that one has and the other has not.
#[track_caller]
pub fn assert_same_dump(one: &[String], other: &[String]) {
    let less = |all: &[String], without: &[String]| all.iter().filter(|line| !without.contains(line)).cloned().collect::<Vec<_>>();
    let (gone, new) = (less(one, other), less(other, one));
    assert!(gone.is_empty() && new.is_empty(), "only in the first: {gone:#?}\nonly in the second: {new:#?}");
    assert!(one == other, "the same lines in another order");
}

/// Databases of a server.
#[track_caller]
pub fn databases(server: &Server) -> String {
    in_database(server, "postgres", "select string_agg(datname, ' ' order by datname) from pg_database")
}
