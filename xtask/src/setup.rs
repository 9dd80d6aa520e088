//! `cargo xtask setup`: everything the other commands would install on the way, at once.

use anyhow::Result;
use clap::Args;

use crate::stores::{self, Store};
use crate::{postgres, test::Versions};

#[derive(Args)]
pub(crate) struct Setup {
    /// PostgreSQL to install: a major version, or `all`
    #[arg(long, default_value = "15")]
    pg: Versions,
    /// Servers of object stores to install
    #[arg(long, value_delimiter = ',')]
    stores: Vec<Store>,
}

impl Setup {
    pub(crate) fn run(&self) -> Result<()> {
        for version in self.pg.list() {
            let folder = postgres::ensure(version)?;
            let answer = postgres::smoke_test(version, &folder)?;
            println!("{answer}: initdb, start, query and stop work; PGVAULT_PG_BIN_{version}={}", folder.display());
        }
        if !self.stores.is_empty() {
            stores::install(&self.stores)?;
        }
        Ok(())
    }
}
