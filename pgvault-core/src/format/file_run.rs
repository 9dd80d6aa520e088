//! A run of the catalog of a filestore: names of files, sorted, and where the content of each lies.
//!
//! A run is never changed. What is newer lies in a newer run, and of a name that stands in several the newest counts. Runs are merged as
//! they become many, as in a log-structured merge tree (O'Neil et al., 1996).
//!
//! A run is cut into chunks of whole entries, so that one name is found by reading one chunk. Its head says which chunk begins with which
//! name, and which packs of contents its entries refer to.

use super::map::PackId;
use super::pack_table::{self, PackKind, PackRef};
use super::{Cursor, FormatError, MAX_FRAME, put_string, put_varint};

/// Bytes after which a chunk ends: what is fetched and opened to look one name up.
pub const CHUNK: usize = 64 << 10;

/// The longest name that is stored. Linux allows paths of 4096 bytes.
pub const MAX_NAME: usize = 4096;

/// A part of a file: bytes of a frame of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The pack; in a stored run an index into the packs of its head.
    pub pack: PackId,
    /// The frame.
    pub frame: u32,
    /// Where in the frame it begins.
    pub offset: u32,
    /// Bytes; at least 1.
    pub len: u64,
}

/// A content that is in the vault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Bytes of the file.
    pub size: u64,
    /// Unix permission bits of the file at the source.
    pub mode: u32,
    /// SHA-1 of the content.
    pub sha1: [u8; 20],
    /// Where it lies, in order. None for an empty file.
    pub pieces: Vec<Piece>,
}

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It is in the vault, and was at the source when it was last looked for.
    Present(Content),
    /// It is in the vault; at the source it was missing at a time, in milliseconds of Unix time, and since.
    Gone(Content, i64),
    /// It is in the vault; at the source it was missing at a time, and since, though rows refer to it.
    Lost(Content, i64),
    /// Rows refer to it, and there has been no such file since a time.
    Missing(i64),
    /// Since a time there is a file of that name whose content is not what its name says.
    Damaged(i64),
    /// Nothing is known any more; what older runs say does not count.
    Forgotten,
}

impl State {
    /// The content, when there is one.
    pub fn content(&self) -> Option<&Content> {
        match self {
            Self::Present(content) | Self::Gone(content, _) | Self::Lost(content, _) => Some(content),
            Self::Missing(_) | Self::Damaged(_) | Self::Forgotten => None,
        }
    }
}

/// An entry of the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file's path below the filestore of its database, as `ir_attachment.store_fname` has it.
    pub name: String,
    /// When it was first seen by a pass, in milliseconds of Unix time.
    pub since: i64,
    /// What is known of it.
    pub state: State,
}

/// The SHA-1 that a name promises: its last part, when that is 40 hexadecimal digits.
pub fn promised_sha1(name: &str) -> Option<[u8; 20]> {
    let digits = name.rsplit('/').next()?.as_bytes();
    if digits.len() != 40 {
        return None;
    }
    let mut sha1 = [0; 20];
    for (byte, pair) in sha1.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| match pair.get(at) {
            Some(digit @ b'0'..=b'9') => Some(digit - b'0'),
            // Odoo writes small letters only.
            Some(digit @ b'a'..=b'f') => Some(digit - b'a' + 10),
            _ => None,
        };
        *byte = digit(0)? << 4 | digit(1)?;
    }
    Some(sha1)
}

const PRESENT: u8 = 0;
const GONE: u8 = 1;
const LOST: u8 = 2;
const MISSING: u8 = 3;
const DAMAGED: u8 = 4;
const FORGOTTEN: u8 = 5;
/// The SHA-1 is not the one that the name promises, and is written down.
const OWN_SHA1: u8 = 8;

/// Writes entries as chunks.
#[derive(Debug, Default)]
pub struct RunEncoder {
    chunk: Vec<u8>,
    first: String,
    entries: u64,
    packs: Vec<PackId>,
    index: std::collections::HashMap<PackId, u64>,
}

/// A chunk that is full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The first name in it.
    pub first: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl RunEncoder {
    /// Appends an entry. Entries come sorted by name, none twice. Gives the chunk before when it is full.
    pub fn push(&mut self, entry: &Entry) -> Option<Chunk> {
        let full = if self.chunk.len() >= CHUNK { self.take() } else { None };
        if self.chunk.is_empty() {
            self.first.clone_from(&entry.name);
        }
        self.entries += 1;
        put_string(&mut self.chunk, entry.name.as_bytes());
        put_varint(&mut self.chunk, entry.since.max(0).unsigned_abs());
        let (kind, at) = match entry.state {
            State::Present(_) => (PRESENT, None),
            State::Gone(_, at) => (GONE, Some(at)),
            State::Lost(_, at) => (LOST, Some(at)),
            State::Missing(at) => (MISSING, Some(at)),
            State::Damaged(at) => (DAMAGED, Some(at)),
            State::Forgotten => (FORGOTTEN, None),
        };
        let content = entry.state.content();
        let own = content.is_some_and(|content| promised_sha1(&entry.name) != Some(content.sha1));
        self.chunk.push(if own { kind | OWN_SHA1 } else { kind });
        if let Some(at) = at {
            put_varint(&mut self.chunk, at.max(0).unsigned_abs());
        }
        if let Some(content) = content {
            if own {
                self.chunk.extend_from_slice(&content.sha1);
            }
            put_varint(&mut self.chunk, content.size);
            put_varint(&mut self.chunk, u64::from(content.mode));
            put_varint(&mut self.chunk, content.pieces.len() as u64);
            for piece in &content.pieces {
                let known = self.packs.len() as u64;
                let pack = *self.index.entry(piece.pack).or_insert_with(|| {
                    self.packs.push(piece.pack);
                    known
                });
                put_varint(&mut self.chunk, pack);
                put_varint(&mut self.chunk, u64::from(piece.frame));
                put_varint(&mut self.chunk, u64::from(piece.offset));
                put_varint(&mut self.chunk, piece.len);
            }
        }
        full
    }

    /// The last chunk.
    pub fn take(&mut self) -> Option<Chunk> {
        if self.chunk.is_empty() {
            return None;
        }
        Some(Chunk { first: std::mem::take(&mut self.first), bytes: std::mem::take(&mut self.chunk) })
    }

    /// How many entries were appended, and the packs that they refer to, in the order of their indices.
    pub fn finish(self) -> (u64, Vec<PackId>) {
        (self.entries, self.packs)
    }
}

/// Reads a chunk. `packs` are those of the run's head.
///
/// # Errors
/// When it is not whole entries, sorted by name without repetition, that refer to packs that there are.
pub fn parse_chunk(bytes: &[u8], packs: &[PackRef]) -> Result<Vec<Entry>, FormatError> {
    let mut cursor = Cursor::new("filestore run", bytes);
    let mut entries: Vec<Entry> = Vec::new();
    while cursor.remaining() > 0 {
        let entry = parse_entry(&mut cursor, packs)?;
        if entries.last().is_some_and(|last| last.name >= entry.name) {
            return Err(cursor.error("is not sorted"));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn time(cursor: &mut Cursor<'_>) -> Result<i64, FormatError> {
    cursor.number()
}

fn parse_entry(cursor: &mut Cursor<'_>, packs: &[PackRef]) -> Result<Entry, FormatError> {
    let name = cursor.string()?.to_owned();
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(cursor.error("has a name of a length that none has"));
    }
    let since = time(cursor)?;
    let kind = cursor.u8()?;
    let own = kind & OWN_SHA1 != 0;
    let state = match kind & !OWN_SHA1 {
        MISSING if !own => State::Missing(time(cursor)?),
        DAMAGED if !own => State::Damaged(time(cursor)?),
        FORGOTTEN if !own => State::Forgotten,
        PRESENT => State::Present(parse_content(cursor, &name, own, packs)?),
        kind @ (GONE | LOST) => {
            let at = time(cursor)?;
            let content = parse_content(cursor, &name, own, packs)?;
            if kind == GONE { State::Gone(content, at) } else { State::Lost(content, at) }
        }
        _ => return Err(FormatError::unsupported("filestore run", format!("unknown state {kind} of a file"))),
    };
    Ok(Entry { name, since, state })
}

fn parse_content(cursor: &mut Cursor<'_>, name: &str, own: bool, packs: &[PackRef]) -> Result<Content, FormatError> {
    let sha1 = if own {
        cursor.array()?
    } else {
        promised_sha1(name).ok_or_else(|| cursor.error("has a name without a SHA-1 and no SHA-1 beside it"))?
    };
    let (size, mode) = (cursor.varint()?, cursor.number()?);
    let count = cursor.count(4)?;
    let mut pieces = Vec::with_capacity(count);
    let mut sum = Some(0u64);
    for _ in 0..count {
        let pack: usize = cursor.number()?;
        let (frame, offset, len): (u32, u32, u64) = (cursor.number()?, cursor.number()?, cursor.varint()?);
        let pack = packs.get(pack).ok_or_else(|| cursor.error("refers to a pack that is not there"))?;
        let end = u64::from(offset).checked_add(len);
        if frame >= pack.frames || len == 0 || end.is_none_or(|end| end > MAX_FRAME as u64) {
            return Err(cursor.error("refers to a place outside of its pack"));
        }
        sum = sum.and_then(|sum| sum.checked_add(len));
        pieces.push(Piece { pack: pack.id, frame, offset, len });
    }
    if sum != Some(size) {
        return Err(cursor.error("has a file whose pieces are not its size"));
    }
    Ok(Content { size, mode, sha1, pieces })
}

/// What a reader of a run begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunHead {
    /// Packs of chunks before the one that the head lies in, in order.
    pub before: Vec<PackRef>,
    /// The first name of each chunk, in order. Chunks are the frames of the packs, those of the last one up to the head.
    pub firsts: Vec<String>,
    /// The packs of contents that entries refer to, in the order of their indices.
    pub packs: Vec<PackRef>,
    /// Tells of most names that are not in the run that they are not.
    pub filter: Filter,
}

/// A Bloom filter (Bloom, 1970) over the names of a run: 10 bits a name, 7 of them set, so that 1 in 100 other names seems to be there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter(Vec<u8>);

impl Filter {
    const PROBES: u64 = 7;
    const BITS: u64 = 10;
    /// What 8 million names need.
    const MOST: u64 = 10 << 20;

    /// A filter for so many names.
    pub fn for_names(names: u64) -> Self {
        let bytes = names.saturating_mul(Self::BITS).div_ceil(8).clamp(8, Self::MOST);
        Self(vec![0; usize::try_from(bytes).unwrap_or(8)])
    }

    fn bits(&self, name: &str) -> impl Iterator<Item = (usize, u8)> + use<> {
        let hash = blake3::hash(name.as_bytes());
        let word =
            |at: usize| hash.as_bytes().get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
        let (start, step, bits) = (word(0), word(8) | 1, (self.0.len() as u64 * 8).max(1));
        (0..Self::PROBES).map(move |n| {
            let bit = start.wrapping_add(step.wrapping_mul(n)) % bits;
            (usize::try_from(bit / 8).unwrap_or(0), 1u8 << (bit % 8))
        })
    }

    /// Adds a name.
    pub fn add(&mut self, name: &str) {
        for (byte, bit) in self.bits(name) {
            if let Some(byte) = self.0.get_mut(byte) {
                *byte |= bit;
            }
        }
    }

    /// False when the name was not added.
    pub fn may_have(&self, name: &str) -> bool {
        self.bits(name).all(|(byte, bit)| self.0.get(byte).is_some_and(|byte| byte & bit != 0))
    }
}

impl RunHead {
    /// The bytes of the head; they may be longer than a frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.before.len() as u64);
        out.extend_from_slice(&pack_table::encode_chunk(&self.before));
        put_varint(&mut out, self.packs.len() as u64);
        out.extend_from_slice(&pack_table::encode_chunk(&self.packs));
        put_varint(&mut out, self.firsts.len() as u64);
        for first in &self.firsts {
            put_string(&mut out, first.as_bytes());
        }
        put_string(&mut out, &self.filter.0);
        out
    }

    /// Reads a head.
    ///
    /// # Errors
    /// When it is cut short, or its chunks are not sorted.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new("filestore run head", bytes);
        let before = pack_table::parse_list(&mut cursor)?;
        let packs = pack_table::parse_list(&mut cursor)?;
        let count = cursor.count(2)?;
        let mut firsts: Vec<String> = Vec::with_capacity(count);
        for _ in 0..count {
            let first = cursor.string()?;
            if firsts.last().is_some_and(|last| last.as_str() >= first) {
                return Err(cursor.error("is not sorted"));
            }
            firsts.push(first.to_owned());
        }
        let filter = Filter(cursor.bytes()?.to_vec());
        cursor.finish()?;
        if before.iter().any(|pack| pack.kind != PackKind::Meta) || packs.iter().any(|pack| pack.kind != PackKind::Data) {
            return Err(FormatError::new("filestore run head", "mixes kinds of packs"));
        }
        Ok(Self { before, firsts, packs, filter })
    }

    /// The chunk that would have `name`.
    pub fn chunk_of(&self, name: &str) -> Option<usize> {
        self.firsts.partition_point(|first| first.as_str() <= name).checked_sub(1)
    }
}

/// Packs of contents in the order of their indices.
pub fn encode_packs(packs: &[PackRef]) -> Vec<u8> {
    let mut out = Vec::new();
    put_varint(&mut out, packs.len() as u64);
    out.extend_from_slice(&pack_table::encode_chunk(packs));
    out
}

/// Reads what [`encode_packs`] wrote.
///
/// # Errors
/// When it is cut short, or a pack is of another kind.
pub fn parse_packs(bytes: &[u8]) -> Result<Vec<PackRef>, FormatError> {
    let mut cursor = Cursor::new("filestore packs", bytes);
    let packs = pack_table::parse_list(&mut cursor)?;
    cursor.finish()?;
    if packs.iter().any(|pack| pack.kind != PackKind::Data) {
        return Err(FormatError::new("filestore packs", "have a pack of another kind"));
    }
    Ok(packs)
}

/// A run, as a pass refers to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRef {
    /// The pack with the last chunks and the head.
    pub pack: PackRef,
    /// The frame in which the head begins; it goes on to the end of the pack.
    pub head: u32,
    /// How many entries it has.
    pub entries: u64,
}

/// The runs of a catalog, the newest first, as a pass has them.
pub fn encode_runs(runs: &[RunRef]) -> Vec<u8> {
    let mut out = Vec::new();
    put_varint(&mut out, runs.len() as u64);
    for run in runs {
        out.extend_from_slice(&pack_table::encode_chunk(std::slice::from_ref(&run.pack)));
        put_varint(&mut out, u64::from(run.head));
        put_varint(&mut out, run.entries);
    }
    out
}

/// Reads what [`encode_runs`] wrote.
///
/// # Errors
/// When it is cut short, or a head lies outside of its pack.
pub fn parse_runs(bytes: &[u8]) -> Result<Vec<RunRef>, FormatError> {
    let mut cursor = Cursor::new("filestore runs", bytes);
    let count = cursor.count(PackRef::MIN_LEN)?;
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        let pack = PackRef::parse(&mut cursor)?;
        let (head, entries) = (cursor.number()?, cursor.varint()?);
        if pack.kind != PackKind::Meta || head >= pack.frames {
            return Err(cursor.error("has a run whose head is not in its pack"));
        }
        runs.push(RunRef { pack, head, entries });
    }
    cursor.finish()?;
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(id: u8) -> PackRef {
        PackRef { id: [id; 16], kind: PackKind::Data, size: 1 << 20, footer_len: 90, frames: 5, live: 0, sha256: [id; 32] }
    }

    fn state() -> impl Strategy<Value = State> {
        let piece = (0u8..3, 0u32..5, 0u32..1000, 1u64..4_000_000);
        let content = (any::<[u8; 20]>(), 0u32..0o7777, prop::collection::vec(piece, 0..4)).prop_map(|(sha1, mode, pieces)| {
            let pieces: Vec<Piece> =
                pieces.into_iter().map(|(id, frame, offset, len)| Piece { pack: [id; 16], frame, offset, len }).collect();
            Content { size: pieces.iter().map(|piece| piece.len).sum(), mode, sha1, pieces }
        });
        (0u8..6, 0i64..1 << 50, content).prop_map(|(kind, at, content)| match kind {
            0 => State::Present(content),
            1 => State::Gone(content, at),
            2 => State::Lost(content, at),
            3 => State::Missing(at),
            4 => State::Forgotten,
            _ => State::Damaged(at),
        })
    }

    /// Entries as chunks, with the packs in the order of their indices.
    fn write(entries: &[Entry]) -> (Vec<Chunk>, Vec<PackRef>) {
        let mut encoder = RunEncoder::default();
        let mut chunks: Vec<Chunk> = entries.iter().filter_map(|entry| encoder.push(entry)).collect();
        chunks.extend(encoder.take());
        let (count, packs) = encoder.finish();
        assert_eq!(count, entries.len() as u64);
        (chunks, packs.iter().map(|id| pack(id[0])).collect())
    }

    proptest! {
        #[test]
        fn runs_round_trip(states in prop::collection::btree_map("[a-f0-9]{2}/([a-f0-9]{40}|[a-z]{1,9})", (0i64..1 << 50, state()), 0..60)) {
            let entries: Vec<Entry> =
                states.into_iter().map(|(name, (since, state))| Entry { name, since, state }).collect();
            let (chunks, packs) = write(&entries);
            let read: Vec<Entry> = chunks.iter().flat_map(|chunk| parse_chunk(&chunk.bytes, &packs).unwrap()).collect();
            prop_assert_eq!(read, entries);
            for chunk in &chunks {
                prop_assert!((1..chunk.bytes.len()).all(|len| parse_chunk(&chunk.bytes[..len], &packs).map_or(true, |e| !e.is_empty())));
            }
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = parse_chunk(&bytes, &[pack(1), pack(2)]);
            let _ = RunHead::parse(&bytes);
            let _ = parse_runs(&bytes);
        }

        #[test]
        fn heads_round_trip(firsts in prop::collection::btree_set("[a-f0-9/]{1,50}", 0..50), before in 0u8..4, packs in 0u8..9) {
            let meta = |id| PackRef { kind: PackKind::Meta, ..pack(id) };
            let head = RunHead { before: (0..before).map(meta).collect(), firsts: firsts.into_iter().collect(), packs: (0..packs).map(pack).collect(), filter: Filter::for_names(5) };
            let bytes = head.encode();
            prop_assert_eq!(RunHead::parse(&bytes).unwrap(), head.clone());
            prop_assert!((0..bytes.len()).all(|len| RunHead::parse(&bytes[..len]).is_err()));
            let runs: Vec<RunRef> = head.before.iter().map(|pack| RunRef { pack: *pack, head: 4, entries: 7 }).collect();
            prop_assert_eq!(parse_runs(&encode_runs(&runs)).unwrap(), runs);
        }
    }

    #[test]
    fn a_name_is_looked_for_in_the_chunk_that_would_have_it() {
        let head = RunHead { firsts: ["b", "d", "f"].map(str::to_owned).to_vec(), ..RunHead::default() };
        let chunks = ["a", "b", "c", "d", "e", "f", "z"].map(|name| head.chunk_of(name));
        assert_eq!(chunks, [None, Some(0), Some(0), Some(1), Some(1), Some(2), Some(2)]);
    }

    #[test]
    fn a_filter_has_what_was_added_and_little_else() {
        let mut filter = Filter::for_names(1000);
        (0..1000).for_each(|n| filter.add(&format!("{n}")));
        assert!((0..1000).all(|n| filter.may_have(&format!("{n}"))));
        let wrong = (1000..11_000).filter(|n| filter.may_have(&format!("{n}"))).count();
        assert!(wrong < 300, "{wrong} of 10000");
        assert!(!Filter::default().may_have("x"));
    }

    #[test]
    fn chunks_end_at_their_size() {
        let entry = |n: u32| Entry { name: format!("{n:08}"), since: 1, state: State::Missing(2) };
        let (chunks, _) = write(&(0..20_000).map(entry).collect::<Vec<_>>());
        assert!(chunks.len() > 2);
        assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= CHUNK + 64));
        assert_eq!(chunks[0].first, "00000000");
    }

    #[test]
    fn names_promise_a_sha1_or_not() {
        let digits = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
        assert_eq!(promised_sha1(&format!("da/{digits}")).unwrap()[..2], [0xda, 0x39]);
        assert_eq!(promised_sha1(&format!("da3/{digits}")), promised_sha1(digits));
        for name in ["da/x", "", "da/DA39A3EE5E6B4B0D3255BFEF95601890AFD80709", &format!("{digits}/x"), &format!("{digits}0")] {
            assert_eq!(promised_sha1(name), None, "{name}");
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let content =
            Content { size: 3, mode: 0o644, sha1: [1; 20], pieces: vec![Piece { pack: [1; 16], frame: 4, offset: 0, len: 3 }] };
        let entry = Entry { name: "x".into(), since: 1, state: State::Present(content) };
        let (chunks, packs) = write(std::slice::from_ref(&entry));
        assert_eq!(parse_chunk(&chunks[0].bytes, &packs).unwrap(), [entry]);
        assert!(parse_chunk(&chunks[0].bytes, &[]).is_err());
        assert!(parse_chunk(&chunks[0].bytes, &[PackRef { frames: 4, ..packs[0] }]).is_err());
        let twice = [&chunks[0].bytes[..], &chunks[0].bytes].concat();
        assert!(parse_chunk(&twice, &packs).is_err());
    }
}
