//! The command line.

mod artifact;
mod odoo_zip;
mod restore;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pgvault_core::postgres::{Lsn, SystemId};

pub(crate) use artifact::{ArtifactCommand, ArtifactGetArgs, ArtifactPutArgs};
pub(crate) use odoo_zip::{ExportArgs, ImportArgs};
pub(crate) use restore::{Action, RestoreArgs};

use crate::exit;

/// PostgreSQL backup and point-in-time recovery into immutable, encrypted object storage.
#[derive(Debug, Parser)]
#[command(name = "pgvault", version, after_help = exit::HELP, propagate_version = true)]
pub(crate) struct Cli {
    /// Configuration file [default: ./pgvault.toml, then /etc/pgvault/pgvault.toml]
    #[arg(long, global = true, value_name = "FILE", env = "PGVAULT_CONFIG")]
    pub(crate) config: Option<PathBuf>,

    /// What standard output is for
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Human)]
    pub(crate) output: OutputFormat,

    /// Format of the log on standard error; `PGVAULT_LOG` sets the level (warn, info, debug)
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    #[command(subcommand)]
    pub(crate) command: Command,

    /// What the command asks of the store
    #[arg(skip)]
    pub(crate) meter: crate::output::Meter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Human,
    /// One JSON object on the last line
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create the vault and the cluster's keys in it
    Init(InitArgs),
    /// Take a base backup
    Backup(BackupArgs),
    /// Archive and fetch write-ahead log
    #[command(subcommand)]
    Wal(WalCommand),
    /// Restore a cluster to a point in time
    Restore(RestoreArgs),
    /// Capture the documents of Odoo databases, and get single ones back
    #[command(subcommand)]
    Filestore(FilestoreCommand),
    /// Write a database of Odoo at a point in time, with its documents, as an archive that Odoo's database manager loads
    Export(ExportArgs),
    /// Load an archive that Odoo's database manager, or `export`, has made
    Import(ImportArgs),
    /// Ship backups and WAL to another vault, with keys of its own: only what is new, and without touching PostgreSQL
    Copy(CopyArgs),
    /// Show backups, the recoverable window and gaps
    List(ReadArgs),
    /// Show at a glance whether the cluster could be restored now
    Status(ReadArgs),
    /// Prove a backup: restore it into a throwaway server, cut off from the world, and examine that
    Verify(Box<VerifyArgs>),
    /// Verify everything that is stored, with the key
    Check(CheckArgs),
    /// Verify every object's hash, without a key
    Scrub(ScrubArgs),
    /// Delete the backups and the WAL that the retention policy does not keep; only the pruner's credentials can
    Expire(ExpireArgs),
    /// Delete what no backup refers to, days after it was found; only the pruner's credentials can
    Gc(GcArgs),
    /// Keep a backup, or a stretch of time, whatever the retention policy says
    #[command(subcommand)]
    Hold(HoldCommand),
    /// Set a named restore point, before a module update or another change that may have to be undone
    Mark(MarkArgs),
    /// Keep small configuration files, such as odoo.conf, in the vault, and get their versions back
    #[command(subcommand)]
    Artifact(ArtifactCommand),
    /// Show what takes how much space
    Du(DuArgs),
    /// Look whether the store keeps its promises: create-only writes, locks, versions, rights, clock
    Doctor(DoctorArgs),
    /// Bring objects back that were deleted or overwritten in a store that keeps versions
    Undelete(UndeleteArgs),
    /// Manage the keys that open the vault
    #[command(subcommand)]
    Key(KeyCommand),
    /// Lose a table of a throwaway PostgreSQL and get it back, to see that it works here
    Demo(DemoArgs),
    /// Print a completion script
    Completions(CompletionArgs),
}

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterArgs {
    /// Cluster, as named in the configuration; may be left out when there is only one
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<String>,

    /// System identifier, when the vault holds several clusters of that name
    #[arg(long, value_name = "N")]
    pub(crate) system_id: Option<SystemId>,
}

/// Which vault is read.
#[derive(Debug, Clone, Args)]
pub(crate) struct FromArgs {
    /// Read from this copy, as named in `[copies.NAME]`, instead of the vault
    #[arg(long, value_name = "COPY")]
    pub(crate) from: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) place: FromArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FilestoreCommand {
    /// Store what is new in the filestores, and how far documents are safe
    Sync(SyncArgs),
    /// Show the filestores that the vault has, and how far each is safe
    List(ReadArgs),
    /// Get one document by its name, or a whole filestore without its database
    Get(FileGetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Only this database; may be given several times
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Vec<String>,

    /// Go on until stopped, with a pass every `odoo.interval`
    #[arg(long)]
    pub(crate) watch: bool,

    /// Look at every file and every row, whatever the checklist says
    #[arg(long)]
    pub(crate) full: bool,

    /// Record that most files are gone, instead of taking the volume for unmounted
    #[arg(long)]
    pub(crate) accept_losses: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FileGetArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// The database, by its name or `database.uuid`; may be left out when there is only one
    #[arg(long, value_name = "NAME")]
    pub(crate) database: Option<String>,

    /// The file, as `ir_attachment.store_fname` has it
    #[arg(value_name = "STORE_FNAME", required_unless_present = "all", conflicts_with = "all")]
    pub(crate) name: Option<String>,

    /// All files that were there at this time (RFC 3339, with zone), as far as passes saw them
    #[arg(long, value_name = "TIME")]
    pub(crate) all: Option<jiff::Timestamp>,

    /// Where to: a file that does not exist yet (`-` for standard output), or with --all a directory
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,

    /// With --all: keep what is right in the directory, and remove what does not belong there
    #[arg(long, requires = "all")]
    pub(crate) delta: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// The copy, as named in `[copies.NAME]`; `pgvault init --copy NAME` creates it
    #[arg(long, value_name = "COPY")]
    pub(crate) to: String,

    /// Objects that are on their way at once; each takes up to 128 MiB of memory
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) workers: u8,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Create the cluster in this copy of the vault, as named in `[copies.NAME]`; PostgreSQL is not asked
    #[arg(long, value_name = "COPY")]
    pub(crate) copy: Option<String>,

    /// Use a store that overwrites: only one pgvault may write to the vault at any time, or both lose data unnoticed
    #[arg(long)]
    pub(crate) single_writer: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Only read: for credentials that may not write
    #[arg(long)]
    pub(crate) read_only: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UndeleteArgs {
    /// Only below this prefix of the vault
    #[arg(long, default_value = "")]
    pub(crate) prefix: String,

    /// Only what was deleted or overwritten from this time on (RFC 3339)
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<jiff::Timestamp>,

    /// Deleted key slots too, which may be keys that were revoked
    #[arg(long)]
    pub(crate) with_keys: bool,

    /// Say what would be brought back
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// Read the data directory
    Local,
    /// Ask the server for it (`BASE_BACKUP`)
    Remote,
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Where to read from [default: local when pgdata is configured]
    #[arg(long, value_enum)]
    pub(crate) source: Option<Source>,

    /// Store everything again, whatever the backups before have of it
    #[arg(long)]
    pub(crate) full: bool,

    /// Attach a label
    #[arg(long = "label", value_name = "K=V", value_parser = key_value)]
    pub(crate) labels: Vec<(String, String)>,

    /// Fail when a damaged page is found, instead of listing it and ending with 3
    #[arg(long)]
    pub(crate) strict: bool,

    /// Wait for a spread checkpoint instead of asking for one at once
    #[arg(long)]
    pub(crate) spread_checkpoint: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WalCommand {
    /// `archive_command` = 'pgvault --config FILE wal push "%p"'
    Push(PushArgs),
    /// `restore_command` = 'pgvault --config FILE wal fetch "%f" "%p"'
    Fetch(FetchArgs),
    /// Fetch ahead of a recovering server; started by `wal fetch`
    #[command(hide = true)]
    Prefetch(PrefetchArgs),
    /// Stream WAL from a replication slot into the vault until stopped
    Stream(StreamArgs),
    /// Read the whole archive and check that it is contiguous and right: every page, every record, every joint
    Check(WalCheckArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The file to archive
    pub(crate) path: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) place: FromArgs,
    /// Recovery ends here at the latest: a gap behind it is the end of the archive, and no error
    #[arg(long, value_name = "LSN")]
    pub(crate) until: Option<Lsn>,
    /// Name of the file that PostgreSQL wants
    pub(crate) name: String,
    /// Where PostgreSQL wants it
    pub(crate) destination: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PrefetchArgs {
    #[command(flatten)]
    pub(crate) fetch: FetchArgs,
    /// Ends when the server has asked for nothing for so long
    #[arg(long, default_value_t = 15_000, env = "PGVAULT_PREFETCH_IDLE_MS", hide = true)]
    pub(crate) idle_ms: u64,
}

#[derive(Debug, Args)]
pub(crate) struct StreamArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Stream although the vault holds WAL of a server that took over from this one
    #[arg(long)]
    pub(crate) any_timeline: bool,
    /// Serve /metrics, /status, /healthz and /readyz here, without protection: 127.0.0.1:9187
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics_listen: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct WalCheckArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Read from this copy, as named in `[copies.NAME]`, instead of the vault
    #[arg(long, value_name = "COPY")]
    pub(crate) copy: Option<String>,

    /// Begin at this position, or where this backup begins
    #[arg(long, value_name = "LSN|BACKUP-ID")]
    pub(crate) from: Option<String>,

    /// Only this timeline
    #[arg(long, value_name = "N")]
    pub(crate) timeline: Option<u32>,

    /// Also compare what is stored twice: parts with the segment that followed them
    #[arg(long)]
    pub(crate) deep: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct VerifyArgs {
    #[command(subcommand)]
    pub(crate) command: Option<VerifyCommand>,

    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// Start from this backup, `latest` for the newest
    #[arg(long, value_name = "ID")]
    pub(crate) backup: Option<String>,

    /// What to restore, as for `restore`, or `random` for some moment of the recoverable window
    #[arg(long, value_name = "TARGET", default_value = "latest")]
    pub(crate) to: String,

    /// Follow this timeline instead of the newest
    #[arg(long, value_name = "N")]
    pub(crate) timeline: Option<u32>,

    /// What runs the copy [default: `drill.runner` of the configuration, or process]
    #[arg(long, value_enum)]
    pub(crate) runner: Option<RunnerName>,

    /// Image of the container
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,

    /// Folder to make the copy in
    #[arg(long, value_name = "DIR")]
    pub(crate) folder: Option<PathBuf>,

    /// Use no more than this of the folder's space (`20GiB`); a drill without room for the whole copy restores a sample, which proves no
    /// backup
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) room: Option<u64>,

    /// Read and compare everything instead of a sample: every row, every index entry
    #[arg(long)]
    pub(crate) deep: bool,

    /// Compare this filestore with the attachments of a database of Odoo
    #[arg(long = "filestore", value_name = "DATABASE=DIR", value_parser = key_value)]
    pub(crate) filestores: Vec<(String, String)>,

    /// Make a base backup of the copy when it has passed, without asking production for anything
    #[arg(long)]
    pub(crate) promote_to_backup: bool,

    /// Seed of what is chosen at random, to repeat a drill
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    #[command(flatten)]
    pub(crate) reports: ReportArgs,
}

/// Where reports of a drill are written.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Write the report for people to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,

    /// Write the signed receipt to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Write the checks as test results to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VerifyCommand {
    /// Show an earlier drill
    Report(DrillReportArgs),
    /// Write a Containerfile for the image that drills by `--runner docker` run in
    BuildImage(BuildImageArgs),
    /// Verify the signature of a receipt that was written by --json; needs no vault
    Receipt(ReceiptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DrillReportArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// The drill; the last one when not given
    #[arg(value_name = "ID")]
    pub(crate) drill: Option<String>,

    #[command(flatten)]
    pub(crate) reports: ReportArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BuildImageArgs {
    /// Major version of PostgreSQL
    #[arg(long, value_name = "N")]
    pub(crate) major: u32,

    /// An extension that the cluster has, as in `CREATE EXTENSION`; may be repeated. Those of PostgreSQL itself are always there
    #[arg(long = "extension", value_name = "NAME")]
    pub(crate) extensions: Vec<String>,

    /// Write it here instead of to standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiptArgs {
    /// The receipt
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// The public key that it must be signed by, base64, as an earlier report or `--output json` shows it
    #[arg(long, value_name = "KEY")]
    pub(crate) public_key: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunnerName {
    /// A PostgreSQL that is installed on this machine
    Process,
    /// A container, by the Docker API (Docker Engine, Podman)
    Docker,
    /// The pod that this runs in; its copy goes into the pod's own volume (`--folder`)
    Kubernetes,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// Compare names, sizes and manifests only; do not read data and WAL
    #[arg(long)]
    pub(crate) sizes_only: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExpireArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Delete nothing; list each object that would go, and why each backup is kept
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Delete nothing and write no plan
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Time between finding something and deleting it; at least 72h
    #[arg(long, value_name = "DURATION", default_value = "72h")]
    pub(crate) grace: jiff::SignedDuration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HoldCommand {
    /// Hold a backup, or every moment of a stretch of time
    Add(HoldAddArgs),
    /// Show the holds in force
    List(ClusterArgs),
    /// Take a hold back
    Remove(HoldRemoveArgs),
}

#[derive(Debug, Args)]
pub(crate) struct HoldAddArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// The backup to hold
    #[arg(long, value_name = "ID", required_unless_present = "from", conflicts_with_all = ["from", "to"])]
    pub(crate) backup: Option<String>,

    /// The first moment to hold (RFC 3339 time with zone)
    #[arg(long, value_name = "TIME", requires = "to")]
    pub(crate) from: Option<jiff::Timestamp>,

    /// The last moment to hold (RFC 3339 time with zone)
    #[arg(long, value_name = "TIME", requires = "from")]
    pub(crate) to: Option<jiff::Timestamp>,

    /// Why
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct HoldRemoveArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The hold's id, as `hold list` shows it
    pub(crate) hold_id: String,
}

#[derive(Debug, Args)]
pub(crate) struct MarkArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// Its name, 1 to 63 bytes; `restore --to-name` takes it
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// Attach a label
    #[arg(long = "label", value_name = "K=V", value_parser = key_value)]
    pub(crate) labels: Vec<(String, String)>,

    /// Use a name again: a restore to it then leads to the new mark
    #[arg(long)]
    pub(crate) again: bool,

    /// End the open WAL segment, so that `archive_command` stores the mark at once; `wal stream` does not need it
    #[arg(long)]
    pub(crate) switch: bool,

    /// How long to wait until the vault has the mark; when it has not, the exit code is 3
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    pub(crate) wait: jiff::SignedDuration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum DuBy {
    /// By cluster
    Cluster,
    /// By kind of object
    Kind,
    /// By age
    Age,
}

#[derive(Debug, Args)]
pub(crate) struct DuArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,

    /// What to sum by
    #[arg(long, value_enum, value_delimiter = ',', default_value = "cluster,kind")]
    pub(crate) by: Vec<DuBy>,
}

#[derive(Debug, Args)]
pub(crate) struct ScrubArgs {
    #[command(flatten)]
    pub(crate) place: FromArgs,

    /// Only this cluster, as the vault names it (NAME-SYSTEMID)
    #[arg(long, value_name = "NAME-SYSTEMID")]
    pub(crate) prefix: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Show the keys that open a cluster; needs none
    List(ClusterArgs),
    /// Add a passphrase, an age recipient or a key in a key service
    Add(KeyAddArgs),
    /// Remove a key
    Revoke(KeyRevokeArgs),
    /// Replace a key by another; no data is touched
    Rotate(KeyRotateArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct NewKey {
    /// File with the new passphrase
    #[arg(long, value_name = "FILE", required_unless_present_any = ["recipient", "kms"], conflicts_with_all = ["recipient", "kms"])]
    pub(crate) new_passphrase_file: Option<PathBuf>,

    /// age recipient (age1...)
    #[arg(long, value_name = "RECIPIENT", conflicts_with = "kms")]
    pub(crate) recipient: Option<String>,

    /// Key in a key service, as in `vault.kms` (aws-kms:..., azure-kv:..., gcp-kms:..., vault-transit:...)
    #[arg(long, value_name = "KEY")]
    pub(crate) kms: Option<String>,

    /// What to call the key
    #[arg(long, default_value = "")]
    pub(crate) label: String,
}

#[derive(Debug, Args)]
pub(crate) struct KeyAddArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) key: NewKey,
}

#[derive(Debug, Args)]
pub(crate) struct KeyRevokeArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The key's id, as `key list` shows it
    pub(crate) key_id: String,
}

#[derive(Debug, Args)]
pub(crate) struct KeyRotateArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The key to replace
    pub(crate) key_id: String,
    #[command(flatten)]
    pub(crate) key: NewKey,
    /// Also start a new data key for what is written from now on
    #[arg(long)]
    pub(crate) new_data_key: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How long the database is under load
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,

    /// Keep the files, and say where they are
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

fn size(text: &str) -> Result<u64, String> {
    text.parse::<bytesize::ByteSize>().map(|size| size.as_u64())
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
