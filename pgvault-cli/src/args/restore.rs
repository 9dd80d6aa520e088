//! Arguments of `pgvault restore`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{ClusterArgs, FromArgs, key_value};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    /// Stay open for reading
    Pause,
    /// Become a primary
    Promote,
    /// Shut down
    Shutdown,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// RFC 3339 time with zone, lsn:X/Y, xid:N, name:NAME, latest, immediate or last-verified
    #[arg(long, value_name = "TARGET", required_unless_present = "to_name")]
    pub(crate) to: Option<String>,

    /// The restore point of this name; the same as --to name:NAME
    #[arg(long, value_name = "NAME", conflicts_with = "to")]
    pub(crate) to_name: Option<String>,

    /// The data directory to write: empty or missing, unless --delta. With --database a folder for the work, a temporary one when not given
    #[arg(long, value_name = "DIR", required_unless_present = "database")]
    pub(crate) pgdata: Option<PathBuf>,

    /// Rewrite only what differs in an existing data directory, and delete what does not belong
    #[arg(long)]
    pub(crate) delta: bool,

    /// Print what would be done, and why
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Where a tablespace goes; needed for each
    #[arg(long = "tablespace-mapping", value_name = "OLD=NEW", value_parser = key_value)]
    pub(crate) tablespace_mapping: Vec<(String, String)>,

    /// Start from this backup instead of the newest that fits
    #[arg(long, value_name = "ID")]
    pub(crate) backup: Option<String>,

    /// Follow this timeline instead of the newest
    #[arg(long, value_name = "N")]
    pub(crate) timeline: Option<u32>,

    /// What the server does when it reaches the target
    #[arg(long, value_enum, default_value_t = Action::Pause)]
    pub(crate) target_action: Action,

    /// Set `archive_mode` = off in the restored cluster, so that a copy does not archive beside the original
    #[arg(long)]
    pub(crate) archive_off: bool,

    #[command(flatten)]
    pub(crate) odoo: OdooArgs,

    #[command(flatten)]
    pub(crate) one: OneDatabaseArgs,
}

/// Documents, and whether the result is production or a copy.
#[derive(Debug, Args)]
pub(crate) struct OdooArgs {
    /// Write the documents that the restored databases of Odoo refer to below this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) filestore: Option<PathBuf>,

    /// Restore production itself: identity, mail servers, jobs and keys stay. Without it, the databases of Odoo become harmless copies
    #[arg(long)]
    pub(crate) as_production: bool,

    /// Go on when documents are missing, and list them
    #[arg(long, requires = "filestore")]
    pub(crate) allow_missing_files: bool,

    /// What `odoo-bin neutralize --stdout` has printed for the database, to be run in the copy as well; DATABASE= when there are several
    #[arg(long, visible_alias = "neutralize-sql", value_name = "[DATABASE=]FILE", conflicts_with = "as_production")]
    pub(crate) neutralise_sql: Vec<String>,
}

/// One database of the cluster, into another server.
#[derive(Debug, Args)]
pub(crate) struct OneDatabaseArgs {
    /// Restore only this database, into the server that --into names; whatever runs there is not touched
    #[arg(long, value_name = "NAME", requires = "into", conflicts_with_all = ["delta", "target_action"])]
    pub(crate) database: Option<String>,

    /// The server to make it in: libpq keywords or a URI, of a role that may create databases and will own it
    #[arg(long, value_name = "CONNINFO", requires = "database")]
    pub(crate) into: Option<String>,

    /// What it is called there, if not the same
    #[arg(long = "as", value_name = "NEWNAME", requires = "database")]
    pub(crate) new_name: Option<String>,
}
