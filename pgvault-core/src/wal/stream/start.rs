//! Where streaming begins: the slot, and the oldest place that the vault lacks and the server can fill.

use std::collections::BTreeSet;

use super::{Setting, StreamEvent};
use crate::postgres::{
    Connection, Lsn, SegmentName, SegmentSize, SlotState, SystemIdentity, TimelineHistory, TimelineId, WalSegNo,
};
use crate::wal::catalog::{Catalog, Gap};
use crate::wal::{fetch, gap, take};
use crate::{Error, ErrorKind, Result};

/// The largest segments of which the stored start is compared with what the server sends.
const COMPARED: u64 = 64 << 20;

/// Holes in the vault's WAL that the server is asked to fill, the newest; older ones are of less and less use.
const HOLES: usize = 8;

/// What a server has said about the WAL that it still has. Another server may have other WAL.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    /// Where streaming was asked for last.
    pub(super) asked: Lsn,
    /// The last place for which it said that it has removed the WAL.
    lost: Option<Lsn>,
}

/// Where to begin.
#[derive(Debug)]
pub(super) struct Begin {
    pub(super) timeline: TimelineId,
    /// The vault has everything before.
    pub(super) from: Lsn,
    /// What it has of the segment of `from`: the server must have the same.
    pub(super) stored: Vec<u8>,
}

impl Learnt {
    /// The server says that it has removed what it was asked for; true when that is news, and asking again makes sense.
    pub(super) fn refused(&mut self) -> bool {
        let news = self.lost.is_none_or(|lost| self.asked > lost);
        if news {
            self.lost = Some(self.asked);
        }
        news
    }
}

/// Makes sure that there is a slot that keeps WAL; gives the position it keeps.
///
/// A slot that was never used, or that the server gave up because it kept too much, keeps nothing; newer servers refuse to
/// stream from the latter. So does a slot that points at WAL of which the server has just said (`lost`) that it is removed.
/// Such a slot is replaced by one that keeps WAL from the last checkpoint on.
pub(super) async fn slot(
    Setting { options, monitor, .. }: Setting<'_>,
    connection: &mut Connection,
    size: SegmentSize,
    server: &Learnt,
) -> Result<Option<Lsn>> {
    let mut state = connection.read_replication_slot(&options.slot).await?;
    let lost = server.lost;
    let holds = match state {
        SlotState::Missing | SlotState::Unreserved => false,
        SlotState::Reserved { restart_lsn, .. } => {
            lost.is_none_or(|lost| WalSegNo::containing(restart_lsn, size) > WalSegNo::containing(lost, size))
        }
    };
    if !holds {
        if state != SlotState::Missing {
            connection.drop_slot(&options.slot).await?;
        }
        connection.create_physical_slot(&options.slot, false, true).await?;
        monitor.tell(StreamEvent::SlotCreated { slot: options.slot.clone() });
        state = connection.read_replication_slot(&options.slot).await?;
    }
    Ok(match state {
        SlotState::Reserved { restart_lsn, .. } => {
            if holds {
                monitor.tell(StreamEvent::SlotFound { slot: options.slot.clone(), restart_lsn });
            }
            Some(restart_lsn)
        }
        SlotState::Missing | SlotState::Unreserved => None,
    })
}

/// Where to go on: at the oldest hole in the vault's WAL that the server can fill, else where that WAL ends, else where the slot begins.
///
/// What the vault has behind a hole (a backup's own WAL, a segment whose upload overtook another's) is not taken for everything before
/// it. Only the server knows what it still has, so it is asked, and asked again behind the place for which it said no.
///
/// # Errors
/// `wal.left_timeline` when another server has taken over, `wal.server_behind` when this one lacks WAL that it has sent before; when the
/// server or the store fails.
pub(super) async fn start_point(
    Setting { cluster, options, monitor }: Setting<'_>,
    connection: &mut Connection,
    size: SegmentSize,
    identity: &SystemIdentity,
    begin: Lsn,
    server: &mut Learnt,
) -> Result<Begin> {
    let history = take::ensure_histories(cluster, connection, identity.timeline).await?;
    // Everything up to here was found, or told to be missing, by an earlier connection of this process.
    let known = monitor.state.borrow().durable;
    let mut catalog = Catalog::load(cluster, size, Lsn(known.0.saturating_sub(1))).await?;
    if !known.is_invalid() && catalog.histories.values().any(|heir| heir.switch_point_of(identity.timeline).is_some()) {
        catalog = Catalog::load(cluster, size, Lsn::INVALID).await?;
    }
    if !options.any_timeline {
        ensure_not_left(&catalog, identity.timeline, identity.flush_lsn)?;
    }
    let segment_start = |lsn: Lsn| WalSegNo::containing(lsn, size).start(size);
    let ends = ends(&catalog, &history);
    let recent = ends.get(ends.len().saturating_sub(HOLES)..).unwrap_or_default();
    let open = recent.iter().find(|end| server.lost.is_none_or(|lost| segment_start(end.at) > lost));
    let from = open.map_or(segment_start(begin), |end| end.at);
    let gone = server.lost.and_then(|lost| recent.iter().rfind(|end| segment_start(end.at) <= lost));
    if let Some(gone) = gone {
        let gap = Gap { timeline: history.timeline_at(gone.at), from: gone.at, to: gone.next.unwrap_or(from) };
        // A hole at the end of the archive shows in no listing until something is behind it. One that is known is not told again.
        if gap.from < gap.to && gap::record(cluster, gap).await? {
            monitor.update(|state| state.gaps += 1);
            monitor.tell(StreamEvent::Gap { timeline: gap.timeline, from: gap.from, to: gap.to });
        }
    }
    let timeline = history.timeline_at(from);
    if timeline == identity.timeline && from > identity.flush_lsn {
        ensure_not_behind(connection, from).await?;
    }
    // Inside a segment only where the timeline's own objects reach: an ancestor's may end in the same segment.
    let start = segment_start(from);
    let own = SegmentName::new(timeline, WalSegNo::containing(from, size), size);
    let objects = catalog.timelines.get(&timeline).cloned().unwrap_or_default();
    if start == from || start.advance(objects.covered(own, size)) < from {
        return Ok(Begin { timeline, from: start, stored: Vec::new() });
    }
    let stored = if size.bytes() <= COMPARED { fetch::stored_start(cluster, &objects, own).await? } else { Vec::new() };
    Ok(Begin { timeline, from, stored })
}

/// Refuses a server that lacks WAL which it has sent before: it was set back (a disk's snapshot, `fsync = off`), and what it writes now
/// is not what follows in the vault. A standby may just not be there yet.
async fn ensure_not_behind(connection: &mut Connection, from: Lsn) -> Result<()> {
    // Asked anew: a slot that was made since the question before begins at a checkpoint that may be younger than it, and others may
    // have stored what the server wrote meanwhile.
    let identity = connection.identify_system().await?;
    if from <= identity.flush_lsn {
        return Ok(());
    }
    let at =
        format!("the server is at {} on timeline {}, but the vault has WAL up to {from}", identity.flush_lsn, identity.timeline);
    if connection.parameter("in_hot_standby") == Some("on") {
        return Err(Error::new(ErrorKind::Source, "source.behind", format!("{at}; waiting until this standby has it")));
    }
    Err(Error::new(ErrorKind::Conflict, "wal.server_behind", format!("{at}: it was set back")).with_hint(
        "a server that was set back to an earlier state must be restored and promoted, so that it gets a timeline of its own; archiving it \
         here would mix two histories",
    ))
}

/// Refuses a server that was promoted past: what it writes since is a branch that nobody follows, and archiving it would look as if all
/// were well (R6, H8).
fn ensure_not_left(catalog: &Catalog, timeline: TimelineId, end: Lsn) -> Result<()> {
    let mut heirs =
        catalog.histories.values().filter(|heir| catalog.timelines.get(&heir.timeline()).is_some_and(|o| o.last().is_some()));
    let left = |heir: &TimelineHistory| heir.switch_point_of(timeline).filter(|switch| *switch < end);
    let Some((heir, switch)) = heirs.find_map(|heir| Some((heir.timeline(), left(heir)?))) else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Conflict,
        "wal.left_timeline",
        format!("the server is at {end} on timeline {timeline}, but the vault holds WAL of timeline {heir}, which left it at {switch}"),
    )
    .with_hint(
        "if another server was promoted, stream from that one, and rebuild this one as its standby; if this is the right one and the \
         other was a copy that should not have archived here, say `--any-timeline`",
    ))
}

/// A place where WAL of a history ends in the vault.
struct End {
    at: Lsn,
    /// Where it goes on behind the hole.
    next: Option<Lsn>,
}

/// Where the vault's WAL ends on a history, oldest first: before each hole, and behind everything.
fn ends(catalog: &Catalog, history: &TimelineHistory) -> Vec<End> {
    let size = catalog.segment_size;
    let mut starts = BTreeSet::new();
    for timeline in history.ancestors().iter().map(|a| a.timeline).chain([history.timeline()]) {
        let Some(objects) = catalog.timelines.get(&timeline) else { continue };
        let here = objects.present().into_iter().filter_map(|segment| Some(segment.segment_number(size).ok()?.start(size)));
        let left = history.switch_point_of(timeline);
        starts.extend(here.filter(|start| left.is_none_or(|left| *start < left)));
    }
    let mut ends = Vec::new();
    let mut next = starts.first().copied();
    while let Some(from) = next {
        let at = catalog.contiguous_end(history, from);
        next = starts.range(Lsn(at.0.max(from.0 + 1))..).next().copied();
        ends.push(End { at, next });
    }
    ends
}
