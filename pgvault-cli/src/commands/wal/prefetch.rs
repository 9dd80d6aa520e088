//! `wal fetch` out of the cache, and the background process that fills it.
//!
//! That process is started by a `wal fetch` that had to go to the vault, and detaches itself. PostgreSQL must neither wait for
//! it nor be hurt by its end, and nothing that it does or fails to do decides what `wal fetch` answers.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgvault_core::config::VaultConfig;
use pgvault_core::copy::either::{Answer, ask};
use pgvault_core::postgres::{SegmentName, WalFileName};
use pgvault_core::wal::prefetch::cache::{Cache, Owner, Recovering, default_base, sweep};
use pgvault_core::wal::prefetch::{PrefetchOptions, follow, has_next};
use pgvault_core::{Error, ErrorKind, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, FetchArgs, PrefetchArgs};
use crate::context::Context;
use crate::exit::Status;

/// How long `wal fetch` waits for a segment that is on its way, before it gets it itself.
const ON_ITS_WAY: Duration = Duration::from_secs(5);

/// How often it looks.
const LOOK: Duration = Duration::from_millis(2);

/// How long nothing is prefetched after a failure.
const REST: Duration = Duration::from_secs(60);

/// How long the prefetcher before this one may take to end.
const HANDOVER: Duration = Duration::from_secs(3);

/// Segments that are fetched and decoded at the same time; each takes about two and a half times its size in memory.
const PARALLEL: usize = 4;

/// Variable that marks the process below the one that PostgreSQL may get to wait for.
const SHIELDED: &str = "PGVAULT_PREFETCH_SHIELDED";

/// What a fetch and its prefetcher agree on.
struct Place {
    base: PathBuf,
    vault: String,
    cluster: String,
    server: Recovering,
    ahead: u64,
}

impl Place {
    /// Where the cache for this fetch is; `None` when there is to be none.
    fn find(context: &Context, args: &FetchArgs) -> Option<Self> {
        let (name, config) = context.cluster(&args.cluster).ok()?;
        if config.wal.prefetch == 0 {
            return None;
        }
        let server = Recovering::of_destination(&args.destination)?;
        let ahead = PrefetchOptions::ahead_of(config.wal.prefetch, server.segment_size);
        // A server that is not the one that is asked for is a matter for the vault.
        let right = args.cluster.system_id.is_none_or(|id| id == server.system_id);
        let vault = context.vault_config(context.place()).ok()?.url.clone();
        (right && ahead > 0).then(|| Self {
            base: config.wal.prefetch_dir.clone().unwrap_or_else(default_base),
            vault,
            cluster: name.to_owned(),
            server,
            ahead,
        })
    }

    fn open(&self) -> std::io::Result<Cache> {
        Cache::open(&self.base, self.server.clone(), &self.vault, &self.cluster)
    }

    fn create(&self) -> std::io::Result<Cache> {
        Cache::create(&self.base, self.server.clone(), &self.vault, &self.cluster)
    }
}

/// Answers a fetch without the vault, when its segment was prefetched.
pub(crate) fn cached(cli: &Cli, args: &FetchArgs) -> Option<Status> {
    let Ok(WalFileName::Segment(segment)) = args.name.parse() else { return None };
    let place_of_cache = Place::find(&Context::load(cli).ok()?, args)?;
    let cache = place_of_cache.open().ok()?;
    let mut handed = cache.hand_out(segment, &args.destination);
    // Also when it is not there: then those behind it are wanted.
    let _ = cache.ask(segment);
    let began = Instant::now();
    while handed.is_none() && cache.is_pending(segment) && began.elapsed() < ON_ITS_WAY && cache.kept_for().is_some() {
        std::thread::sleep(LOOK);
        handed = cache.hand_out(segment, &args.destination);
    }
    match handed.or_else(|| cache.hand_out(segment, &args.destination))? {
        Ok(()) => {
            tracing::info!(%segment, "taken from the cache");
            Some(Status::Done)
        }
        Err(error) => {
            tracing::warn!(%segment, %error, "a cached segment cannot be written");
            None
        }
    }
}

/// Starts a prefetcher behind a segment that came out of the vault, unless there is one.
pub(crate) fn start(context: &Context, args: &FetchArgs) {
    let Some(place) = Place::find(context, args) else { return };
    if place.open().is_ok_and(|cache| cache.kept_for().is_some() || cache.rests(REST)) {
        return;
    }
    if let Err(error) = spawn(context, args) {
        tracing::warn!(%error, "nothing is fetched ahead");
    }
}

fn spawn(context: &Context, args: &FetchArgs) -> std::io::Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(file) = &context.file {
        command.arg("--config").arg(file);
    }
    command.args(["wal", "prefetch"]);
    if let Some(cluster) = &args.cluster.cluster {
        command.args(["--cluster", cluster]);
    }
    if let Some(system_id) = args.cluster.system_id {
        command.args(["--system-id", &system_id.to_string()]);
    }
    if let Some(copy) = &args.place.from {
        command.args(["--from", copy]);
    }
    command.arg(&args.name).arg(&args.destination);
    // The server's log is closed when the last that can write to it ends.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(drop)
}

/// Lets go of everything that came from PostgreSQL. To be called before the process has opened anything itself.
///
/// True when this process has only waited for another one, which did the work.
pub(crate) fn detach() -> bool {
    // Out of the server's process group, which it signals as a whole.
    let _ = rustix::process::setsid();
    // Up to version 15 the server's own files are open here; as long as they are, removed ones keep their space.
    let inherited: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in inherited.into_iter().filter(|fd| *fd > 2) {
        let _ = nix::unistd::close(fd);
    }
    // Where PostgreSQL is the first process of a container, it inherits this one, takes it for a child of its own, and restarts
    // itself when that ends by a signal. So what may be killed for its memory is a child of something small.
    let first = std::fs::read_to_string("/proc/1/comm").unwrap_or_default();
    if !first.starts_with("postgres") || std::env::var_os(SHIELDED).is_some() {
        return false;
    }
    let worker = std::env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.args(std::env::args_os().skip(1)).env(SHIELDED, "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
    });
    drop(worker);
    true
}

/// Fills the cache until nothing is wanted any more.
pub(crate) async fn run(cli: &Cli, args: &PrefetchArgs) -> Result<Status> {
    let segment: SegmentName = args
        .fetch
        .name
        .parse()
        .map_err(|e: pgvault_core::postgres::ParseError| Error::new(ErrorKind::Usage, "wal.name", e.to_string()))?;
    let context = Context::load(cli)?;
    let Some(place) = Place::find(&context, &args.fetch) else { return Ok(Status::Done) };
    let failed = |error: std::io::Error| Error::io("use the cache in", &place.base, error);
    let stopped = |e: std::io::Error| Error::new(ErrorKind::Failed, "signal", format!("listen for signals: {e}"));
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate()).map_err(stopped)?, signal(SignalKind::interrupt()).map_err(stopped)?);

    // What needs no key comes first: at the end of the archive, that is all.
    let opened = ask(context.places(), async |from| {
        let opened = async {
            let vault = context.vault_at(from).await?;
            let cluster = vault.find_cluster(&place.cluster, Some(place.server.system_id)).await?;
            let more = has_next(&vault, &cluster, segment, place.server.segment_size).await?;
            Ok::<_, Error>(more.then_some((from, vault, cluster)))
        };
        Ok(match opened.await {
            Ok(Some(opened)) => Answer::Present(opened),
            Ok(None) => Answer::Absent,
            Err(error) => Answer::Trouble(error),
        })
    });
    let (from, vault, name) = match opened.await? {
        Answer::Absent => return Ok(Status::Done),
        Answer::Present(opened) => opened,
        Answer::Trouble(error) => {
            if let Some(owner) = own(&place, ulid::Ulid::nil()).await.map_err(failed)? {
                owner.finish(true);
            }
            return Err(error);
        }
    };
    let Some(owner) = own(&place, vault.document().vault_id).await.map_err(failed)? else { return Ok(Status::Done) };
    sweep(&place.base, REST);
    let unlocked = match context.vault_config(from).and_then(VaultConfig::unlock) {
        Ok(key) => vault.unlock(&name, &key).await,
        Err(error) => Err(error),
    };
    let cluster = match unlocked {
        Ok(cluster) => cluster,
        Err(error) => {
            owner.finish(true);
            return Err(error);
        }
    };
    // Everything that may be named relative to the server's folder has been read.
    let _ = std::env::set_current_dir("/");
    let options = PrefetchOptions { ahead: place.ahead, parallel: PARALLEL, idle: Duration::from_millis(args.idle_ms) };
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let ended = follow(&cluster, owner, segment, options, stop).await;
    tracing::info!(?ended, "nothing more is fetched ahead");
    Ok(Status::Done)
}

/// Becomes the prefetcher of this server; `None` when there is another.
async fn own(place: &Place, vault: ulid::Ulid) -> std::io::Result<Option<Owner>> {
    let began = Instant::now();
    loop {
        // The one before may have removed the folder between two steps of this.
        match place.create().and_then(|cache| cache.own(vault)) {
            Ok(Ok(owner)) => return Ok(Some(owner)),
            Ok(Err(_)) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if began.elapsed() > HANDOVER {
            return Ok(None);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
