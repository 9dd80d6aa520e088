//! Setting a restore point, and waiting until a restore leads to it.
//!
//! ```text
//! installed modules -> pg_create_restore_point, committed -> the mark in the vault -> WAL up to it in the vault -> a plan
//! ```
//!
//! A restore point alone reaches the server's disk when the WAL writer gets to it, and a crash before that takes it away, while
//! the vault says that it was set. So a transaction is committed with it, which waits for the disk.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::filestore::database::Odoo;
use crate::filestore::find::Finder;
use crate::postgres::{
    ConnInfo, Connection, Lsn, Mode, SegmentSize, ServerError, SystemId, TimelineHistory, TimelineId, WalSegNo, quote_literal,
    sqlstate,
};
use crate::restore::plan::{PlanOptions, plan};
use crate::restore::target::Target;
use crate::vault::mark::{self, Mark, Modules};
use crate::vault::{Cluster, audit};
use crate::wal::catalog::Catalog;
use crate::{Error, ErrorKind, Result};

/// Bytes that PostgreSQL lets the name of a restore point have.
pub const MAX_NAME: usize = 63;

/// Bytes of all labels together: a mark is one frame.
const MAX_LABELS: usize = 64 << 10;

/// Time between two looks at the vault.
const POLL: Duration = Duration::from_millis(500);

/// How to mark.
#[derive(Debug, Clone)]
pub struct MarkOptions {
    /// The primary.
    pub connection: ConnInfo,
    /// The name: 1 to [`MAX_NAME`] bytes without control characters.
    pub name: String,
    /// What is attached to it.
    pub labels: BTreeMap<String, String>,
    /// Accept a name that another mark has. A restore to the name then leads to this one.
    pub again: bool,
    /// End the open segment, so that `archive_command` gets it at once.
    pub switch: bool,
    /// Where databases of Odoo are looked for; none are when not given.
    pub odoo: Option<Finder>,
}

/// A mark that was set.
#[derive(Debug)]
pub struct SetMark {
    /// The mark, as the vault has it.
    pub mark: Mark,
    /// What could not be read, and what else somebody should know.
    pub warnings: Vec<String>,
    segment_size: SegmentSize,
}

/// Sets a restore point and records it.
///
/// # Errors
/// [`ErrorKind::Usage`] for a name that PostgreSQL would not take, or that another mark has. [`ErrorKind::Source`] when the
/// server cannot be used: it is a standby, or the role may not. When the store fails; the message says so when the restore point
/// was set by then.
pub async fn set(cluster: &Cluster, options: &MarkOptions) -> Result<SetMark> {
    ensure_name(&options.name)?;
    ensure_labels(&options.labels)?;
    let known = mark::list(cluster).await?;
    let mut warnings: Vec<String> =
        known.damaged.iter().map(|(name, error)| format!("{name} cannot be read, so its name is not known: {error}")).collect();
    if let Some(before) = known.newest(&options.name).filter(|_| !options.again) {
        let why = format!("there is a mark `{}` already, of {:.0} at {}", before.name, before.time, before.lsn);
        return Err(Error::new(ErrorKind::Usage, "mark.used", why)
            .with_hint("a restore to a name leads to the last mark of it: choose another name, or say --again"));
    }
    let mut server = Server::connect(&options.connection, cluster.name().system_id).await?;
    server.ensure_can_spell(&options.name).await?;
    let odoo = match &options.odoo {
        Some(finder) => modules(finder, &options.connection, cluster.name().system_id, &mut warnings).await,
        None => Vec::new(),
    };
    let point = server.set(&options.name).await?;
    let mark = Mark {
        id: cluster.env().new_id()?,
        name: options.name.clone(),
        timeline: point.timeline,
        lsn: point.lsn,
        time: point.time,
        labels: options.labels.clone(),
        odoo,
        by: audit::who(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    mark::store(cluster, &mark).await.map_err(|error| {
        error.context(format!("restore point `{}` was set at {} and could not be recorded", mark.name, mark.lsn))
    })?;
    if options.switch
        && let Err(error) = server.switch().await
    {
        warnings
            .push(format!("the segment was not ended: {error}{}", error.hint().map_or(String::new(), |hint| format!("; {hint}"))));
    }
    let segment_size = server.segment_size;
    server.sql.close().await;
    Ok(SetMark { mark, warnings, segment_size })
}

impl SetMark {
    /// Waits until the vault has the WAL up to the mark, and a restore to it can be planned.
    ///
    /// # Errors
    /// Why it cannot be restored yet, when `limit` is over. The mark is set all the same.
    pub async fn until_safe(&self, cluster: &Cluster, limit: Duration) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let covered = self.is_covered(cluster).await;
            match covered {
                Ok(true) => break,
                _ if tokio::time::Instant::now() < deadline => tokio::time::sleep(POLL).await,
                Ok(false) => {
                    let why = format!("the vault does not have the WAL up to {} yet", self.mark.lsn);
                    return Err(Error::new(ErrorKind::OutsideWindow, "mark.not_archived", why).with_hint(
                        "`wal stream` stores it within seconds, `archive_command` when the segment ends: --switch ends it; `pgvault list` \
                         shows when it is there",
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        // WAL alone is no restore: only a backup before it, and all that lies between, is.
        let choice = PlanOptions { backup: None, timeline: Some(self.mark.timeline) };
        Box::pin(plan(cluster, &Target::Name(self.mark.name.clone()), choice)).await.map(drop)
    }

    async fn is_covered(&self, cluster: &Cluster) -> Result<bool> {
        let last = Lsn(self.mark.lsn.0.saturating_sub(1));
        let start = WalSegNo::containing(last, self.segment_size).start(self.segment_size);
        let catalog = Catalog::load(cluster, self.segment_size, start).await?;
        // Without a history, what the timeline has of its own has to do.
        let history = catalog.history(self.mark.timeline).unwrap_or_else(|_| TimelineHistory::root(self.mark.timeline));
        Ok(catalog.contiguous_end(&history, last) >= self.mark.lsn)
    }
}

fn ensure_name(name: &str) -> Result<()> {
    let why = if name.is_empty() || name.len() > MAX_NAME {
        format!("`{name}` cannot name a restore point: names have 1 to {MAX_NAME} bytes")
    } else if name.chars().any(char::is_control) {
        format!("{name:?} cannot name a restore point: it holds a control character")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Usage, "mark.name", why))
}

fn ensure_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    let bytes: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes <= MAX_LABELS {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, "mark.labels", format!("the labels have {bytes} bytes, and at most {MAX_LABELS} are kept")))
}

/// What the databases have installed. One that cannot be read keeps nobody from marking.
async fn modules(finder: &Finder, connection: &ConnInfo, system: SystemId, warnings: &mut Vec<String>) -> Vec<Modules> {
    let mut found = Vec::new();
    let databases = match finder.databases(connection).await {
        Ok(databases) => databases,
        Err(error) => {
            warnings.push(format!("the modules of Odoo were not recorded: {error}"));
            return found;
        }
    };
    for database in databases {
        let asked = async {
            let Some(mut odoo) = Odoo::connect(connection, &database, system).await? else { return Ok(None) };
            let modules = odoo.modules().await?;
            Ok::<_, Error>(Some(Modules { database: odoo.database.name, uuid: odoo.database.uuid, modules }))
        };
        match asked.await {
            Ok(modules) => found.extend(modules),
            Err(error) => warnings.push(format!("the modules of `{database}` were not recorded: {error}")),
        }
    }
    found
}

struct Server {
    sql: Connection,
    segment_size: SegmentSize,
}

/// A restore point.
struct Point {
    timeline: TimelineId,
    lsn: Lsn,
    time: Timestamp,
}

fn strange(what: &str) -> Error {
    Error::new(ErrorKind::Source, "mark.answer", format!("the server does not say {what}"))
}

impl Server {
    /// Connects to the primary of the cluster.
    async fn connect(connection: &ConnInfo, system: SystemId) -> Result<Self> {
        let mut sql = Connection::connect(connection, Mode::Sql).await?;
        // A commit waits for this server's disk, and for no standby: it must end also while the stream is down.
        let _ = sql.simple_query("SET search_path = pg_catalog; SET synchronous_commit = local").await?;
        let row = sql
            .query_one(
                "SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()), \
                 (SELECT setting FROM pg_settings WHERE name = 'wal_segment_size')",
            )
            .await?;
        let found = row.required(1)?;
        if found != system.to_string() {
            let why = format!("the server has system identifier {found}, and the vault's cluster {system}");
            return Err(Error::new(ErrorKind::Conflict, "source.foreign", why).with_hint("check the connection settings"));
        }
        if row.required(0)? == "t" {
            return Err(Error::new(
                ErrorKind::Source,
                "mark.standby",
                "the server is a standby: restore points are set on the primary",
            )
            .with_hint("name all hosts, and `target_session_attrs=read-write`, in the cluster's `connection`"));
        }
        let size: u32 = row.required(2)?.parse().map_err(|_| strange("the size of its WAL segments"))?;
        let segment_size = size.try_into().map_err(|_| strange("the size of its WAL segments"))?;
        Ok(Self { sql, segment_size })
    }

    /// Makes sure that the name is the same bytes in WAL as here, where restores look for it.
    async fn ensure_can_spell(&mut self, name: &str) -> Result<()> {
        if name.is_ascii() {
            return Ok(());
        }
        let row = self.sql.query_one("SHOW server_encoding").await?;
        let encoding = row.required(0)?;
        if encoding == "UTF8" {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Usage,
            "mark.encoding",
            format!("`{name}` is written differently in a database of encoding {encoding}"),
        )
        .with_hint("use letters, digits and signs of ASCII, or connect to a database of encoding UTF8"))
    }

    async fn set(&mut self, name: &str) -> Result<Point> {
        // One transaction: with a number of its own its commit is written, and with it everything before.
        let statements = format!(
            "BEGIN; SELECT pg_create_restore_point({}), (extract(epoch FROM clock_timestamp()) * 1000000)::bigint; \
             SELECT pg_current_xact_id(); COMMIT",
            quote_literal(name)
        );
        let set = self.sql.simple_query(&statements).await;
        let sets = match set {
            Ok(sets) => sets,
            Err(error) => {
                let _ = self.sql.simple_query("ROLLBACK").await;
                return Err(explain(error, "pg_create_restore_point(text)"));
            }
        };
        let row = sets.get(1).and_then(|set| set.rows.first()).ok_or_else(|| strange("where the restore point is"))?;
        let lsn: Lsn = row.required(0)?.parse().map_err(|_| strange("where the restore point is"))?;
        let time =
            row.required(1)?.parse().ok().and_then(|us| Timestamp::from_microsecond(us).ok()).ok_or_else(|| strange("the time"))?;
        let row = self.sql.query_one(&format!("SELECT substr(pg_walfile_name('{lsn}'), 1, 8)")).await?;
        let timeline = TimelineId::from_hex(row.required(0)?).map_err(|_| strange("its timeline"))?;
        Ok(Point { timeline, lsn, time })
    }

    async fn switch(&mut self) -> Result<()> {
        self.sql.simple_query("SELECT pg_switch_wal()").await.map(drop).map_err(|error| explain(error, "pg_switch_wal()"))
    }
}

/// Says what the role lacks, when that is it.
fn explain(error: Error, function: &str) -> Error {
    if ServerError::of(&error).is_none_or(|error| error.sqlstate != sqlstate::INSUFFICIENT_PRIVILEGE) {
        return error;
    }
    error.with_hint(format!(
        "a superuser lets the role: GRANT EXECUTE ON FUNCTION {function} TO <role>, in the database that `connection` names"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_postgresql_takes_and_people_can_read() {
        let umlauts = "ü".repeat(31);
        for name in ["before 18.0.2", "a", &"x".repeat(63), &umlauts] {
            ensure_name(name).unwrap();
        }
        let (long, umlauts) = ("x".repeat(64), "ü".repeat(32));
        for name in ["", "a\nb", "a\u{7f}", "a\u{1b}[2J", &long, &umlauts] {
            let error = ensure_name(name).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "mark.name"), "{name:?}");
        }
    }
}
