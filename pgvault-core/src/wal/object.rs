//! One archived file as one sealed object, with what a restore wants to know about it in the footer.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::crypto::sealed::{FrameEncoder, SealedObject, SealedWriter};
use crate::format::MAX_FRAME;
use crate::format::object::Kind;
use crate::postgres::{
    Lsn, SegmentHeader, SegmentName, SegmentScan, SegmentSize, TimelineId, WalFileName, WalSegNo, hex8, scan_segment,
};
use crate::vault::{Cluster, StoredObject, layout};
use crate::{Error, ErrorKind, Result};

/// The most raw WAL that one object holds. Larger segments are stored as parts of this size.
pub const MAX_RAW: u64 = 32 << 20;

/// A stored WAL file, as its object is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalName {
    /// A file as PostgreSQL names it.
    File(WalFileName),
    /// Bytes `from..to` of a segment.
    Part {
        /// The segment.
        segment: SegmentName,
        /// Offset of the first byte in the segment.
        from: u32,
        /// Offset behind the last byte.
        to: u32,
    },
}

impl WalName {
    /// The timeline it belongs to.
    pub fn timeline(self) -> TimelineId {
        match self {
            Self::File(file) => file.timeline(),
            Self::Part { segment, .. } => segment.timeline,
        }
    }

    /// The object's name, relative to the cluster.
    pub fn object(self) -> String {
        let dir = layout::wal_timeline(self.timeline());
        match self {
            Self::File(WalFileName::Segment(segment)) => format!("{dir}{segment}.wal"),
            Self::File(file) => format!("{dir}{file}"),
            Self::Part { segment, from, to } => format!("{dir}{segment}.{from:08X}-{to:08X}.part"),
        }
    }

    /// Reads the last part of an object's name; `None` for names that no pgvault wrote.
    pub fn parse(object: &str) -> Option<Self> {
        let file = object.rsplit('/').next()?;
        if let Some(segment) = file.strip_suffix(".wal") {
            return Some(Self::File(WalFileName::Segment(segment.parse().ok()?)));
        }
        if let Some(part) = file.strip_suffix(".part") {
            let (segment, range) = part.split_once('.')?;
            let (from, to) = range.split_once('-')?;
            let (from, to) = (hex8(from)?, hex8(to)?);
            return (from < to).then_some(Self::Part { segment: segment.parse().ok()?, from, to });
        }
        match file.parse().ok()? {
            WalFileName::Segment(_) => None,
            other => Some(Self::File(other)),
        }
    }
}

/// A point that a restore can name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPoint {
    /// Its name.
    pub name: String,
    /// Where its record begins.
    pub lsn: Lsn,
    /// When it was set.
    pub time: Timestamp,
}

/// The transactions that end in a stretch of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transactions {
    /// The earliest end.
    pub first_time: Timestamp,
    /// The latest end.
    pub last_time: Timestamp,
    /// Where the record of the latest end begins.
    pub last_lsn: Lsn,
    /// Smallest transaction number.
    pub min_xid: u32,
    /// Largest transaction number.
    pub max_xid: u32,
}

/// What a WAL object says about its contents, sealed in its footer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalInfo {
    /// The file it came from.
    pub file: String,
    /// Segment size of the cluster; absent for history files.
    pub segment_size: Option<SegmentSize>,
    /// Position of the first byte of the segment.
    pub start: Option<Lsn>,
    /// End of valid WAL in the segment, as far as it was known when this object was written.
    pub end: Option<Lsn>,
    /// Where the last record begins that was whole when this object was written: the last that recovery can stop at while
    /// nothing follows.
    pub last_record: Option<Lsn>,
    /// Transactions that end in the segment up to [`WalInfo::end`].
    pub transactions: Option<Transactions>,
    /// Restore points in the segment up to [`WalInfo::end`].
    pub restore_points: Vec<NamedPoint>,
}

impl WalInfo {
    fn of_file(file: String) -> Self {
        Self { file, segment_size: None, start: None, end: None, last_record: None, transactions: None, restore_points: Vec::new() }
    }

    /// What a scan of the file `file` found.
    pub(crate) fn of_scan(file: String, scan: &SegmentScan) -> Self {
        Self {
            file,
            segment_size: Some(scan.header.segment_size),
            start: Some(scan.header.start),
            end: Some(scan.end_of_valid),
            last_record: scan.last_whole_record,
            transactions: scan.transactions.map(|t| Transactions {
                first_time: t.first_time,
                last_time: t.last_time,
                last_lsn: t.last_lsn,
                min_xid: t.min_xid,
                max_xid: t.max_xid,
            }),
            restore_points: scan
                .restore_points
                .iter()
                .map(|p| NamedPoint { name: p.name.clone(), lsn: p.lsn, time: p.time })
                .collect(),
        }
    }
}

/// The start of a segment, checked to belong to this cluster and to the place its name says.
///
/// # Errors
/// [`ErrorKind::Conflict`] when another cluster wrote it, [`ErrorKind::Corrupt`] when it is not that segment.
pub fn check_segment(cluster: &Cluster, segment: SegmentName, bytes: &[u8]) -> Result<(Lsn, SegmentSize)> {
    let header =
        SegmentHeader::parse(bytes).map_err(|e| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", format!("{segment}: {e}")))?;
    check_header(cluster, segment, &header)?;
    Ok((header.start, header.segment_size))
}

fn check_header(cluster: &Cluster, segment: SegmentName, header: &SegmentHeader) -> Result<()> {
    let corrupt = |why: String| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", format!("{segment}: {why}"));
    let own = cluster.name().system_id;
    if header.system_identifier != own {
        return Err(Error::new(
            ErrorKind::Conflict,
            "wal.foreign",
            format!("{segment} was written by the cluster with system identifier {}, not {own}", header.system_identifier),
        )
        .with_hint("this archive belongs to another cluster; give each cluster a configuration and a `pgvault init` of its own"));
    }
    let number = segment.segment_number(header.segment_size).map_err(|e| corrupt(e.to_string()))?;
    if number.start(header.segment_size) != header.start {
        return Err(corrupt(format!("its first page is the one of position {}", header.start)));
    }
    if header.timeline > segment.timeline {
        return Err(corrupt(format!("its first page is of timeline {}", header.timeline)));
    }
    Ok(())
}

/// Seals a whole file. Expensive: call it off the runtime's threads.
///
/// # Errors
/// As [`check_segment`].
pub fn seal_file(cluster: &Cluster, file: WalFileName, bytes: &[u8]) -> Result<Vec<SealedObject>> {
    match file {
        WalFileName::Segment(segment) | WalFileName::Partial(segment) => {
            let (start, size) = check_segment(cluster, segment, bytes)?;
            if bytes.len() as u64 != size.bytes() {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "wal.size",
                    format!("{file} has {} bytes; a segment of this cluster has {}", bytes.len(), size.bytes()),
                )
                .with_hint("the file may still be written, or its disk may be full"));
            }
            let scan = scan_segment(bytes, start, size)
                .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.not_a_segment", format!("{file}: {e}")))?;
            let info = WalInfo::of_scan(file.to_string(), &scan);
            if size.bytes() <= MAX_RAW || matches!(file, WalFileName::Partial(_)) {
                return Ok(vec![seal(cluster, WalName::File(file), &info, bytes)?]);
            }
            let mut parts = Vec::new();
            let mut from = 0u32;
            for chunk in bytes.chunks(usize::try_from(MAX_RAW).unwrap_or(usize::MAX)) {
                let to = from.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
                parts.push(seal(cluster, WalName::Part { segment, from, to }, &info, chunk)?);
                from = to;
            }
            Ok(parts)
        }
        WalFileName::History(_) | WalFileName::BackupHistory(..) => {
            if let WalFileName::History(timeline) = file {
                // Nothing stored can be corrected later, and every plan reads this.
                crate::postgres::TimelineHistory::parse(timeline, &String::from_utf8_lossy(bytes))
                    .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.history", format!("{file}: {e}")))?;
            }
            Ok(vec![seal(cluster, WalName::File(file), &WalInfo::of_file(file.to_string()), bytes)?])
        }
    }
}

/// Seals a part of an open segment: `bytes` begin at offset `from`, and `scan` is of everything up to their end.
///
/// # Errors
/// As [`check_segment`].
pub fn seal_part(cluster: &Cluster, segment: SegmentName, from: u32, bytes: &[u8], scan: &SegmentScan) -> Result<SealedObject> {
    check_header(cluster, segment, &scan.header)?;
    let to = from.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    let mut info = WalInfo::of_scan(segment.to_string(), scan);
    // A record that the part cuts in two is not valid yet; what lies before it is.
    info.end = info.end.map(|end| end.min(scan.header.start.advance(to.into())));
    seal(cluster, WalName::Part { segment, from, to }, &info, bytes)
}

fn seal(cluster: &Cluster, name: WalName, info: &WalInfo, bytes: &[u8]) -> Result<SealedObject> {
    let keys = cluster.keys();
    let mut writer = SealedWriter::new(cluster.env(), keys, Kind::Wal, name.object(), bytes.len() / 3 + 4096)?;
    let mut encoder = FrameEncoder::new(1)?;
    for chunk in bytes.chunks(MAX_FRAME) {
        let _ = writer.push(&mut encoder, chunk, keys.digest().frame(chunk))?;
    }
    let info = serde_json::to_vec(info).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
    let object = writer.finish(info);
    if object.bytes.len() as u64 > crate::format::MAX_OBJECT {
        // Readers would refuse it. Only a `.partial` of large segments that hardly compresses can be so large.
        return Err(Error::new(
            ErrorKind::Unsupported,
            "wal.too_large",
            format!("{} would be {} bytes; the format allows {}", object.name, object.bytes.len(), crate::format::MAX_OBJECT),
        ));
    }
    Ok(object)
}

/// A stored WAL object, opened.
#[derive(Debug, Clone)]
pub struct StoredWal {
    /// What it says about its contents.
    pub info: WalInfo,
    name: WalName,
    object: StoredObject,
}

/// Opens a stored WAL object without fetching its contents.
///
/// # Errors
/// [`ErrorKind::NotFound`] when it does not exist, [`ErrorKind::Corrupt`] when it was changed.
pub async fn open(cluster: &Cluster, name: WalName, size: Option<u64>) -> Result<StoredWal> {
    let object = cluster.open(Kind::Wal, &name.object(), size).await?;
    let info = serde_json::from_slice(object.reader().extra())
        .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.info", format!("{}: {e}", name.object())))?;
    Ok(StoredWal { info, name, object })
}

/// Fetches and decodes a stored WAL object.
///
/// # Errors
/// As [`open`].
pub async fn read(cluster: &Cluster, name: WalName) -> Result<(WalInfo, Vec<u8>)> {
    let path = cluster.path(&name.object());
    let bytes = cluster.store().get(&path).await?;
    decode(cluster, name, &bytes).map_err(|e| e.context(path))
}

/// Decodes a WAL object that is wholly in memory.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it was changed.
pub fn decode(cluster: &Cluster, name: WalName, object: &[u8]) -> Result<(WalInfo, Vec<u8>)> {
    let reader = crate::crypto::sealed::ObjectReader::open_whole(cluster.keys(), Kind::Wal, &name.object(), object)?;
    let info: WalInfo = serde_json::from_slice(reader.extra())
        .map_err(|e| Error::new(ErrorKind::Corrupt, "wal.info", format!("{}: {e}", name.object())))?;
    let raw_len: u64 = reader.frames().iter().map(|f| u64::from(f.raw_len)).sum();
    // A part of another length than its name says would shift what follows it; no file of WAL is larger than a segment can be.
    let fits = match name {
        WalName::Part { from, to, .. } => Some(raw_len) == to.checked_sub(from).map(u64::from),
        WalName::File(_) => raw_len <= 1 << 30,
    };
    if !fits {
        return Err(Error::new(ErrorKind::Corrupt, "wal.length", format!("{}: holds {raw_len} bytes", name.object())));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(raw_len).unwrap_or(0));
    for number in 0..u32::try_from(reader.frames().len()).unwrap_or(u32::MAX) {
        bytes.extend_from_slice(&reader.decode_from(cluster.keys(), number, object)?);
    }
    Ok((info, bytes))
}

impl StoredWal {
    /// True when its first byte is the first of its file.
    pub fn is_from_start(&self) -> bool {
        !matches!(self.name, WalName::Part { from: 1.., .. })
    }

    /// Number of frames.
    pub fn frame_count(&self) -> u32 {
        self.object.frame_count()
    }

    /// How many bytes each frame decodes to.
    pub fn frame_lengths(&self) -> impl Iterator<Item = u32> {
        self.object.reader().frames().iter().map(|frame| frame.raw_len)
    }

    /// Fetches and decodes one frame of the contents.
    ///
    /// # Errors
    /// When the store fails or the object was changed.
    pub async fn frame(&self, number: u32) -> Result<Vec<u8>> {
        self.object.frame(number).await
    }

    /// Fetches and decodes the contents.
    ///
    /// # Errors
    /// When the store fails or the object was changed.
    pub async fn contents(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for number in 0..self.object.frame_count() {
            bytes.extend_from_slice(&self.object.frame(number).await?);
        }
        Ok(bytes)
    }
}

/// Stores a sealed WAL object; the same contents under the same name are a success.
///
/// Sealing is randomised, so "the same" is decided by decoding what is there.
///
/// # Errors
/// [`ErrorKind::Conflict`] when the name holds other contents: two servers believe to be this timeline's primary.
pub async fn put(cluster: &Cluster, sealed: &SealedObject, raw: &[u8]) -> Result<bool> {
    let crate::store::Put::Different(existing) = cluster.put(sealed).await? else { return Ok(true) };
    let name = WalName::parse(&sealed.name)
        .ok_or_else(|| Error::new(ErrorKind::Failed, "wal.name", format!("{} is not a WAL object's name", sealed.name)))?;
    let (_, stored) =
        decode(cluster, name, &existing).map_err(|e| e.context(format!("compare with the stored {}", sealed.name)))?;
    if stored == raw { Ok(false) } else { Err(diverged(&sealed.name)) }
}

fn diverged(name: &str) -> Error {
    Error::new(ErrorKind::Conflict, "wal.diverged", format!("{name} is already in the vault with different contents"))
        .with_hint("two servers write the same timeline (split brain), or an old server was started again; find out which one is right before archiving goes on")
}

/// True when the vault has these contents under this name, durably; false when it has none. Reads only the footer: what it says
/// about the contents is sealed, and its digests are keyed.
///
/// # Errors
/// [`ErrorKind::Conflict`] when the name holds other contents, and as [`open`].
pub async fn is_stored(cluster: &Cluster, name: WalName, raw: &std::sync::Arc<Vec<u8>>) -> Result<bool> {
    let stored = match open(cluster, name, None).await {
        Ok(stored) => stored,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.context(format!("compare with the stored {}", name.object()))),
    };
    let (keys, raw) = (cluster.keys().clone(), raw.clone());
    let compared = tokio::task::spawn_blocking(move || {
        let mut rest = raw.as_slice();
        let frames = stored.object.reader().frames();
        frames.iter().all(|frame| {
            let Some((chunk, behind)) = rest.split_at_checked(frame.raw_len as usize) else { return false };
            rest = behind;
            keys.digest().frame(chunk) == frame.digest
        }) && rest.is_empty()
    });
    if !compared.await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))? {
        return Err(diverged(&name.object()));
    }
    cluster.store().settle(&cluster.path(&name.object())).await?;
    Ok(true)
}

/// The position of a segment's first byte.
///
/// # Errors
/// When the name is impossible with that segment size.
pub fn segment_start(segment: SegmentName, size: SegmentSize) -> Result<Lsn> {
    let number: WalSegNo = segment.segment_number(size).map_err(|e| Error::new(ErrorKind::Corrupt, "wal.name", e.to_string()))?;
    Ok(number.start(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_names_round_trip() {
        for name in [
            "wal/00000001/000000010000000000000005.wal",
            "wal/00000001/000000010000000000000005.00000000-00000A00.part",
            "wal/00000001/000000010000000000000005.partial",
            "wal/00000001/000000010000000000000005.00000028.backup",
            "wal/0000000A/0000000A.history",
        ] {
            assert_eq!(WalName::parse(name).unwrap().object(), name);
        }
        for name in [
            "x",
            "000000010000000000000005",
            "000000010000000000000005.wal.tmp",
            "000000010000000000000005.00000A00-00000A00.part",
            "000000010000000000000005.+0000000-00000A00.part",
            "00000001000000000000000a.wal",
        ] {
            assert_eq!(WalName::parse(name), None, "{name}");
        }
    }
}
