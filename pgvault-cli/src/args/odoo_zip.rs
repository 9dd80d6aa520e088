//! Arguments of `pgvault export` and `pgvault import`.

use std::path::PathBuf;

use clap::Args;

use super::{ClusterArgs, FromArgs};

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// The archive to write: `dump.sql`, `manifest.json` and `filestore/`; nothing is overwritten
    #[arg(long, value_name = "OUT.zip")]
    pub(crate) odoo_zip: PathBuf,

    /// RFC 3339 time with zone, lsn:X/Y, xid:N, name:NAME, latest, immediate or last-verified
    #[arg(long, value_name = "TARGET")]
    pub(crate) to: String,

    /// The database; may be left out when the cluster has only one of Odoo
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,

    /// Export production itself: identity, mail servers, jobs and keys stay. Without it, the archive holds a harmless copy
    #[arg(long)]
    pub(crate) as_production: bool,

    /// Go on when documents are missing, and list them
    #[arg(long)]
    pub(crate) allow_missing_files: bool,

    /// What `odoo-bin neutralize --stdout` has printed for the database, to be run in the copy as well
    #[arg(long, visible_alias = "neutralize-sql", value_name = "[DATABASE=]FILE", conflicts_with = "as_production")]
    pub(crate) neutralise_sql: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The archive. Its `dump.sql` is run with all rights of the role of --into: for an archive that you do not trust, one that is no superuser
    #[arg(value_name = "ZIP")]
    pub(crate) archive: PathBuf,

    /// What the database is going to be called; there must be none of that name
    #[arg(long, value_name = "NAME")]
    pub(crate) database: String,

    /// The server to make it in: libpq keywords or a URI, of a role that may create databases and will own it
    #[arg(long, value_name = "CONNINFO")]
    pub(crate) into: String,

    /// Odoo's `filestore` folder; the documents go into a new folder in it, called as the database
    #[arg(long, value_name = "DIR")]
    pub(crate) filestore: PathBuf,

    /// End with 0 although documents are missing that rows refer to
    #[arg(long)]
    pub(crate) allow_missing_files: bool,
}
