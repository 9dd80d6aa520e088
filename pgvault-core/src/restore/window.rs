//! What can be restored: from which backup, along which timeline, how far.

use jiff::Timestamp;
use serde::Serialize;
use ulid::Ulid;

use crate::postgres::wal::{WalChecker, WalPageHeader};
use crate::postgres::{Lsn, TimelineHistory, TimelineId, WalSegNo, scan_segment};
use crate::vault::Cluster;
use crate::vault::snapshot::Manifest;
use crate::wal::catalog::Catalog;
use crate::wal::fetch;
use crate::wal::object::{NamedPoint, StoredWal, Transactions, WalInfo};
use crate::{Error, ErrorKind, Result};

/// Segments that are opened to find the last transaction; an idle server writes few records a segment, but some.
const LOOK_BACK: usize = 4096;

/// A stretch of history in which every moment can be restored.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    /// The timeline.
    pub timeline: TimelineId,
    /// The oldest backup that reaches into it.
    pub backup_id: Ulid,
    /// The first moment.
    pub first: Timestamp,
    /// The last moment: when the last transaction ended. The end of the backup when none did since.
    pub last: Timestamp,
    /// The first position.
    pub first_lsn: Lsn,
    /// The end of the WAL.
    pub last_lsn: Lsn,
}

/// How far WAL goes on from a backup, along a timeline.
#[derive(Debug, Clone)]
pub struct Reach {
    /// End of the contiguous WAL.
    pub end: Lsn,
    /// Where the last record begins, when any record begins after the backup's start.
    pub last_record: Option<Lsn>,
    /// The last transaction that ends in it, if one does after the backup's start.
    pub last_transaction: Option<(Timestamp, Lsn)>,
}

/// True when the backup lies on the history, so that it can be recovered along it (T16).
pub fn is_on(history: &TimelineHistory, backup: &Manifest) -> bool {
    history.contains(backup.timeline, backup.stop_lsn)
}

/// Follows the WAL from a backup's start.
///
/// # Errors
/// When the store fails or a WAL object's footer was changed.
pub async fn reach(cluster: &Cluster, catalog: &Catalog, history: &TimelineHistory, backup: &Manifest) -> Result<Reach> {
    let contiguous = catalog.contiguous_end(history, backup.start_lsn);
    let mut reach = Reach { end: contiguous, last_record: None, last_transaction: None };
    if contiguous <= backup.start_lsn {
        return Ok(reach);
    }
    let first = WalSegNo::containing(backup.start_lsn, catalog.segment_size);
    let last = WalSegNo::before(contiguous, catalog.segment_size);
    // The last of the segments, behind the one that is looked at, that its last record runs over.
    let mut rest: Option<WalSegNo> = None;
    for number in (first.0..=last.0).rev().map(WalSegNo).take(LOOK_BACK) {
        let Some(stored) = catalog.describe(cluster, history, number).await? else {
            rest = None;
            continue;
        };
        let mut info = stored.info.clone();
        if number == last {
            if info.end.is_some_and(|end| end > contiguous) {
                // Of this segment of a timeline that was left, what lies behind the fork is another branch's.
                cut(cluster, catalog, history, number, contiguous, &mut info).await?;
            }
            // Whole segments may end early: with a switch, or because this is the tail of a timeline.
            reach.end = info.end.map_or(contiguous, |end| end.min(contiguous)).max(backup.start_lsn);
        }
        if let Some(rest) = rest {
            // What an object says of itself does not count the record that it shares with the next.
            join(cluster, catalog, history, (number, rest), contiguous, &mut info).await?;
        }
        let behind = |lsn: &Lsn| *lsn < contiguous;
        reach.last_record = reach.last_record.or(info.last_record.filter(behind));
        // A record that the end of the WAL cuts in two is never replayed.
        let is_whole = |lsn: Lsn| number != last || info.last_record.is_some_and(|last| lsn <= last);
        let counts = |t: &Transactions| behind(&t.last_lsn) && t.last_lsn >= backup.start_lsn && is_whole(t.last_lsn);
        if let Some(transactions) = info.transactions.filter(counts) {
            reach.last_transaction = Some((transactions.last_time, transactions.last_lsn));
            break;
        }
        if number > first {
            // In the middle of a record that is longer than a segment, no record begins.
            let end = rest.filter(|_| info.last_record.is_none()).unwrap_or(number);
            rest = begins_with_a_rest(cluster, catalog, history, number, &stored).await?.then_some(end);
        }
    }
    Ok(reach)
}

/// True when the segment's first page continues a record.
async fn begins_with_a_rest(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    number: WalSegNo,
    stored: &StoredWal,
) -> Result<bool> {
    // The object at hand may be the last of several parts.
    let head =
        if stored.is_from_start() { Some(stored.frame(0).await?) } else { segment(cluster, catalog, history, number).await? };
    Ok(head.and_then(|bytes| WalPageHeader::parse(&bytes)).is_some_and(WalPageHeader::continues_record))
}

/// Makes a segment say what it holds together with those that its last record runs over.
async fn join(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    (number, rest): (WalSegNo, WalSegNo),
    end: Lsn,
    info: &mut WalInfo,
) -> Result<()> {
    let (size, system) = (catalog.segment_size, cluster.name().system_id);
    let mut checker = WalChecker::new(system, size, history.timeline(), Some(history.clone()), number.start(size));
    for number in (number.0..=rest.0).map(WalSegNo) {
        let bytes = match segment(cluster, catalog, history, number).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(()),
            // Nothing can be joined with what cannot be read; what is known of the rest stays.
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => return Ok(()),
            Err(error) => return Err(error),
        };
        let until = usize::try_from(end.0.saturating_sub(number.start(size).0)).unwrap_or(usize::MAX).min(bytes.len());
        checker.feed(bytes.get(..until).unwrap_or(&bytes));
    }
    info.last_record = info.last_record.max(checker.last_record());
    if let Some(ends) = checker.take_ends() {
        let xids = info.transactions.map_or((0, 0), |t| (t.min_xid, t.max_xid));
        info.transactions = Some(Transactions {
            first_time: info.transactions.map_or(ends.first.time, |t| t.first_time.min(ends.first.time)),
            last_time: ends.latest.time,
            last_lsn: ends.latest.lsn,
            min_xid: xids.0,
            max_xid: xids.1,
        });
    }
    Ok(())
}

/// Makes a segment say what it holds up to a position only.
async fn cut(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    number: WalSegNo,
    end: Lsn,
    info: &mut WalInfo,
) -> Result<()> {
    let Some(mut bytes) = segment(cluster, catalog, history, number).await? else { return Ok(()) };
    let start = number.start(catalog.segment_size);
    bytes.truncate(usize::try_from(end.0.saturating_sub(start.0)).unwrap_or(usize::MAX));
    let corrupt = |e: crate::postgres::ParseError| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", e.to_string());
    *info = WalInfo::of_scan(std::mem::take(&mut info.file), &scan_segment(&bytes, start, catalog.segment_size).map_err(corrupt)?);
    Ok(())
}

/// The bytes of segment `number` on the way to `history`'s timeline, parts put together as recovery itself would see them.
///
/// # Errors
/// When the store fails or a WAL object was changed.
pub async fn segment(cluster: &Cluster, catalog: &Catalog, history: &TimelineHistory, number: WalSegNo) -> Result<Option<Vec<u8>>> {
    let Some(stored) = catalog.describe(cluster, history, number).await? else { return Ok(None) };
    let corrupt = |e: crate::postgres::ParseError| Error::new(ErrorKind::Corrupt, "wal.info", e.to_string());
    fetch::contents(cluster, stored.info.file.parse().map_err(corrupt)?).await
}

/// Every window, by timeline. Timelines whose history is missing have none; `gaps` of the catalog tell why.
///
/// # Errors
/// When the store fails or a WAL object's footer was changed.
pub async fn windows(cluster: &Cluster, catalog: &Catalog, backups: &[Manifest]) -> Result<Vec<Window>> {
    let mut windows: Vec<Window> = Vec::new();
    for timeline in catalog.timelines.keys().copied() {
        let history = match catalog.history(timeline) {
            Ok(history) => history,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for backup in backups.iter().filter(|b| is_on(&history, b)) {
            let contiguous = catalog.contiguous_end(&history, backup.start_lsn);
            if contiguous < backup.stop_lsn {
                continue;
            }
            // Backups that reach equally far share a window, which the oldest of them opens.
            if windows.iter().any(|w| w.timeline == timeline && w.first_lsn <= backup.stop_lsn && backup.stop_lsn <= w.last_lsn) {
                continue;
            }
            let reach = reach(cluster, catalog, &history, backup).await?;
            let last = reach.last_transaction.map_or(backup.finished_at, |(time, _)| time.max(backup.finished_at));
            windows.push(Window {
                timeline,
                backup_id: backup.id,
                first: backup.finished_at,
                last,
                first_lsn: backup.stop_lsn,
                last_lsn: reach.end.max(backup.stop_lsn),
            });
        }
    }
    Ok(windows)
}

/// Looks through the WAL between two positions, newest first, until `look` finds something.
///
/// # Errors
/// When the store fails or a WAL object's footer was changed.
pub async fn search<T>(
    cluster: &Cluster,
    catalog: &Catalog,
    history: &TimelineHistory,
    from: Lsn,
    to: Lsn,
    mut look: impl AsyncFnMut(WalSegNo, &WalInfo) -> Result<Option<T>>,
) -> Result<Option<T>> {
    let first = WalSegNo::containing(from, catalog.segment_size);
    let mut number = WalSegNo::before(to, catalog.segment_size);
    while number >= first {
        if let Some(stored) = catalog.describe(cluster, history, number).await?
            && let Some(found) = look(number, &stored.info).await?
        {
            return Ok(Some(found));
        }
        let Some(before) = number.0.checked_sub(1) else { break };
        number = WalSegNo(before);
    }
    Ok(None)
}

/// The restore point called `name` in a piece of WAL: the last one, if it was set twice.
pub fn named<'a>(info: &'a WalInfo, name: &str) -> Option<&'a NamedPoint> {
    info.restore_points.iter().rev().find(|point| point.name == name)
}

/// True when transaction `xid` may end in a piece of WAL.
pub fn may_hold(transactions: Option<Transactions>, xid: u32) -> bool {
    transactions.is_some_and(|t| (t.min_xid..=t.max_xid).contains(&xid))
}
