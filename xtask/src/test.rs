//! `cargo xtask test`: what CI runs, in the same order. The tests come last, so that their summary ends the output.

use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::packages;
use crate::postgres;
use crate::run::{cargo, program, run, run_quietly, succeeds};
use crate::stores::{Servers, Store};

/// Crates that `pgvault-core` must not bring into a program that embeds it, and why.
const NOT_IN_CORE: [(&str, &str); 6] = [
    ("clap", "the engine has no command line"),
    ("anyhow", "the engine's errors are its API"),
    ("openssl", "one TLS stack: rustls"),
    ("openssl-sys", "one TLS stack: rustls"),
    ("native-tls", "one TLS stack: rustls"),
    ("async-std", "one async runtime: tokio"),
];

/// The version besides 15 that all of CI sees: slots and walsenders changed most between the
/// two (a lost slot is refused, invalidation has other reasons).
const SECOND: u32 = 17;

/// What talks to a server for longer than a backup does, and so feels the difference between versions.
const SECOND_TESTS: [&str; 6] = ["pg_promotion", "pg_push", "pg_rpo", "pg_slot", "pg_stream", "pg_wal"];

/// Servers that every run needs for the tests of what is special about them, those included that pgvault refuses.
const SERVERS: [&str; 5] = ["azurite", "rgw", "localstack", "gcs", "s3rver"];

/// Servers that have to be built, one of them for a quarter of an hour, and what the names of their tests have in them: those are
/// ignored unless they are asked for.
const BUILT_SERVERS: [(&str, &str); 2] = [("s3s-fs", "s3s"), ("garage", "garage")];

/// The stores that every run has vaults in, beside a directory, and the tests of the command that run there.
const STORES: [Store; 2] = [Store::Azurite, Store::Rgw];
const STORE_TESTS: [&str; 3] = ["pg_backup", "pg_restore", "pg_wal"];

/// Tests on a server wait more than they compute.
const THREADS: &str = "4";

/// The whole suite has tests that compute, too.
const WHOLE_THREADS: &str = "3";

/// What is tested of crashes in one of them; the rest runs in memory and in the whole suite of a store.
const STORE_CRASHES: (Store, [&str; 3]) =
    (Store::Azurite, ["a_fault_at_every_request", "h1_what_24_writers", "t30_every_change_of_every_kind"]);

#[derive(Args)]
pub(crate) struct Test {
    /// PostgreSQL to test against: a major version, or `all`
    ///
    /// The whole of CI runs against 15 (`all` included), and its WAL tests against 17 as well; for any other version only the tests
    /// that talk to PostgreSQL (`tests/pg_*.rs`) run.
    #[arg(long, default_value = "15")]
    pg: Versions,
    /// Only tests whose name contains this, and no other step
    #[arg(long)]
    filter: Option<String>,
    /// Stores to test on, `all` for every one: the whole suite runs on a directory and on each of these
    ///
    /// Without it a part of the suite runs on Azurite and on Ceph's gateway beside the whole on a directory, as in CI. With `local`
    /// only the tests of what is special about a store need servers.
    #[arg(long, value_delimiter = ',')]
    stores: Vec<Store>,
}

/// A list of PostgreSQL major versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Versions {
    One(u32),
    All,
}

impl Versions {
    pub(crate) fn list(self) -> Vec<u32> {
        match self {
            Self::One(version) => vec![version],
            Self::All => postgres::VERSIONS.to_vec(),
        }
    }
}

impl FromStr for Versions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("all", _) => Ok(Self::All),
            (_, Ok(version)) if postgres::VERSIONS.contains(&version) => Ok(Self::One(version)),
            _ => Err(format!("expected one of {:?} or `all`", postgres::VERSIONS)),
        }
    }
}

impl Test {
    pub(crate) fn run(&self) -> Result<()> {
        packages::ensure_programs(&[("cc", "gcc")], "some dependencies compile C code")?;
        let mut steps = Steps::default();
        let whole = matches!(self.pg, Versions::All | Versions::One(15));
        let servers = if whole { self.servers()? } else { None };
        if whole {
            self.everything(&mut steps, servers.as_ref())?;
        }
        if self.pg == Versions::One(15) && self.filter.is_none() {
            self.wal_against_the_second(&mut steps)?;
        }
        if let Some(servers) = &servers {
            self.on_stores(&mut steps, servers)?;
        }
        drop(servers);
        for version in self.pg.list().into_iter().filter(|version| *version != 15) {
            self.against(version, &mut steps)?;
        }
        steps.finish()
    }

    /// What this run needs; nothing when a test was chosen and no store.
    fn servers(&self) -> Result<Option<Servers>> {
        if self.filter.is_some() && self.stores.is_empty() {
            return Ok(None);
        }
        let mut names = SERVERS.to_vec();
        if self.filter.is_some() {
            names = Store::expand(&self.stores).into_iter().map(Store::name).filter(|name| SERVERS.contains(name)).collect();
        }
        if self.stores.contains(&Store::All) {
            names.extend(BUILT_SERVERS.map(|(server, _)| server));
        }
        if !packages::is_root() {
            println!("tests on Ceph's object gateway will fail: it is unpacked and run in a root of its own, which needs root");
            names.retain(|name| *name != Store::Rgw.name());
        }
        Servers::start(&names).map(Some)
    }

    fn everything(&self, steps: &mut Steps, servers: Option<&Servers>) -> Result<()> {
        let (version, folder) = Self::first()?;
        println!("testing against {}", postgres::version_line(&folder)?);
        if self.filter.is_none() {
            if succeeds(cargo().args(["fmt", "--version"])) {
                steps.step("formatting", || run(cargo().args(["fmt", "--all", "--check"])));
            } else {
                Steps::skip("formatting", "rustfmt is not installed");
            }
            if succeeds(cargo().args(["clippy", "--version"])) {
                steps.step("clippy", || {
                    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
                });
            } else {
                Steps::skip("clippy", "clippy is not installed");
            }
            if succeeds(&mut program("rustdoc", ["--version"])) {
                steps.step("documentation", || {
                    run(cargo().args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings"))
                });
            } else {
                Steps::skip("documentation", "rustdoc is not installed");
            }
            steps.step("dependencies", check_dependencies);
            // Nothing may need them: another build, of the program alone. It runs when all versions are tested.
            steps.step("without key services", || {
                let what = if self.pg == Versions::All { ["test", "--test", "without_kms"] } else { ["check", "--bin", "pgvault"] };
                let [command, of, name] = what;
                run(cargo().args([command, "--quiet", "-p", "pgvault-cli", "--no-default-features", of, name]))
            });
            if succeeds(cargo().args(["deny", "--version"])) {
                // Advisories change without a commit; a scheduled job reads them.
                steps.step("licences", || {
                    run(cargo().args(["deny", "--log-level", "error", "check", "bans", "licenses", "sources"]))
                });
            } else {
                Steps::skip("licences", "cargo-deny is not installed");
            }
        }
        steps.step(&format!("tests, PostgreSQL {version}"), || {
            let mut tests = cargo();
            tests.args(["test", "--workspace", "--no-fail-fast"]);
            let tests = self.with_server(&mut tests, version, &folder);
            // A test starts the servers that it is not told of.
            let tests = match servers {
                Some(servers) => servers.tell(tests),
                None => tests,
            };
            run(tests.env("RUST_TEST_THREADS", WHOLE_THREADS))
        });
        Ok(())
    }

    /// Where there is no 15 (a newer Debian), the version of the distribution takes its place.
    fn first() -> Result<(u32, PathBuf)> {
        if packages::is_available("postgresql-15") || std::env::var_os("PGVAULT_PG_BIN_15").is_some() {
            Ok((15, postgres::ensure(15)?))
        } else {
            postgres::ensure_any()
        }
    }

    /// The suite, or a part of it, with its vaults in stores.
    fn on_stores(&self, steps: &mut Steps, servers: &Servers) -> Result<()> {
        let (version, folder) = Self::first()?;
        let whole = !self.stores.is_empty();
        let stores = if whole { Store::expand(&self.stores) } else { STORES.to_vec() };
        for store in stores.into_iter().filter(|store| *store != Store::Local) {
            let name = store.name();
            let tests = |binaries: &[&str], filters: &[&str]| {
                let mut tests = cargo();
                // Of one package alone, the features of others would differ, and much of it would be compiled again.
                tests.args(["test", "--workspace", "--no-fail-fast"]).args(binaries.iter().flat_map(|name| ["--test", name]));
                servers.tell(&mut tests).env("PGVAULT_TEST_STORE", name);
                run(self.with_server(&mut tests, version, &folder).args(["--", "--test-threads", THREADS]).args(filters))
            };
            if whole {
                steps.step(&format!("tests on {name}"), || tests(&["pg_*"], &[]));
            } else {
                steps.step(&format!("tests on {name}"), || tests(&STORE_TESTS, &[]));
                if store == STORE_CRASHES.0 {
                    steps.step(&format!("crashes on {name}"), || tests(&["pg_crash"], &STORE_CRASHES.1));
                }
            }
        }
        if self.stores.contains(&Store::All) {
            steps.step("tests of servers that are built", || {
                let mut tests = cargo();
                tests.args(["test", "--workspace", "--no-fail-fast"]);
                let tests = servers.tell(&mut tests);
                run(self.with_server(tests, version, &folder).args(["--", "--ignored"]).args(BUILT_SERVERS.map(|(_, name)| name)))
            });
        }
        Ok(())
    }

    fn wal_against_the_second(&self, steps: &mut Steps) -> Result<()> {
        let folder = match postgres::ensure(SECOND) {
            Ok(folder) => folder,
            // CI must have it. Elsewhere it needs root to be unpacked.
            Err(error) if std::env::var_os("CI").is_some() => return Err(error),
            Err(error) => {
                Steps::skip(&format!("WAL tests, PostgreSQL {SECOND}"), &format!("{error:#}"));
                return Ok(());
            }
        };
        println!("testing against {}", postgres::version_line(&folder)?);
        steps.step(&format!("WAL tests, PostgreSQL {SECOND}"), || {
            let mut tests = cargo();
            tests.args(["test", "--workspace", "--no-fail-fast"]);
            tests.args(SECOND_TESTS.iter().flat_map(|name| ["--test", name]));
            run(self.with_server(&mut tests, SECOND, &folder))
        });
        Ok(())
    }

    fn against(&self, version: u32, steps: &mut Steps) -> Result<()> {
        let folder = postgres::ensure(version)?;
        println!("testing against {}", postgres::version_line(&folder)?);
        steps.step(&format!("tests, PostgreSQL {version}"), || {
            let mut tests = cargo();
            tests.args(["test", "--workspace", "--no-fail-fast", "--test", "pg_*"]);
            run(self.with_server(&mut tests, version, &folder))
        });
        Ok(())
    }

    fn with_server<'a>(&self, tests: &'a mut Command, version: u32, folder: &std::path::Path) -> &'a mut Command {
        if let Some(filter) = &self.filter {
            tests.arg(filter);
        }
        tests.env("PGVAULT_TEST_PG", version.to_string()).env(format!("PGVAULT_PG_BIN_{version}"), folder)
    }
}

/// Reads the tree of normal dependencies: a feature of some crate can bring in what nobody asked for.
fn check_dependencies() -> Result<()> {
    let tree = run_quietly(cargo().args([
        "tree",
        "--locked",
        "-p",
        "pgvault-core",
        "-e",
        "normal",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]))
    .context("list the dependencies of pgvault-core")?;
    let present: Vec<String> = NOT_IN_CORE
        .iter()
        .filter(|(name, _)| tree.lines().any(|line| line.split_whitespace().next() == Some(name)))
        .map(|(name, why)| format!("{name} ({why})"))
        .collect();
    if !present.is_empty() {
        bail!("pgvault-core depends on {}; `cargo tree -p pgvault-core -e normal -i NAME` shows through what", present.join(", "));
    }
    Ok(())
}

/// Runs every step even after a failure: one round shows all there is to fix.
#[derive(Default)]
struct Steps {
    failed: Vec<String>,
}

impl Steps {
    fn step(&mut self, name: &str, action: impl FnOnce() -> Result<()>) {
        println!("==> {name}");
        let begun = Instant::now();
        match action() {
            Ok(()) => println!("    {name}: ok, {:.1} s", begun.elapsed().as_secs_f64()),
            Err(error) => {
                println!("    {name}: FAILED, {:.1} s: {error:#}", begun.elapsed().as_secs_f64());
                self.failed.push(name.to_owned());
            }
        }
    }

    fn skip(name: &str, why: &str) {
        println!("    {name}: SKIPPED, {why}");
    }

    fn finish(self) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        bail!("failed: {}", self.failed.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_supported_ones_or_all() {
        assert_eq!("17".parse(), Ok(Versions::One(17)));
        assert_eq!("all".parse(), Ok(Versions::All));
        assert_eq!(Versions::All.list(), [15, 16, 17, 18, 19]);
        assert!("14".parse::<Versions>().is_err());
        assert!("newest".parse::<Versions>().is_err());
    }
}
