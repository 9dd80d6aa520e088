//! The arguments of `pgvault artifact`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClusterArgs, FromArgs, ReadArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum ArtifactCommand {
    /// Store a file, or each file in a directory, unless it has not changed
    Put(ArtifactPutArgs),
    /// Get a version back
    #[command(disable_version_flag = true)]
    Get(ArtifactGetArgs),
    /// Show every version
    List(ReadArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ArtifactPutArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// A file, a directory (each file in it becomes NAME/PATH), or `-` for standard input; 16 MiB at most
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// What to call it [default: the name of the file]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// Store it though it has not changed
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ArtifactGetArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// The artifact
    #[arg(value_name = "NAME", required_unless_present = "id")]
    pub(crate) name: Option<String>,

    /// As it was at this time (RFC 3339, with zone)
    #[arg(long, value_name = "TIME", conflicts_with = "id")]
    pub(crate) at: Option<jiff::Timestamp>,

    /// This version, as `artifact list` shows it
    #[arg(long = "version", value_name = "ID", id = "id")]
    pub(crate) version: Option<String>,

    /// Where to: a file that does not exist yet, written with mode 0600, or `-` for standard output
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,

    /// Replace the file
    #[arg(long)]
    pub(crate) force: bool,
}
