//! The archives of `BASE_BACKUP`, decoded while they arrive.
//!
//! A decoder for what PostgreSQL writes, not for tar at large. Source: `src/port/tar.c` and
//! `src/backend/backup/basebackup.c`: ustar headers, names and symlink targets of at most 99 bytes, sizes of 8 GiB and
//! more in base 256, directories and symlinks with a slash behind their name, no extended headers, and since version 15 no
//! zero blocks at the end.
//!
//! Names: a member's path must be relative, without `..`, and UTF-8. PostgreSQL itself names files in ASCII only; a file
//! that somebody else put into the data directory under a name that is not UTF-8 stops the backup with an error that shows
//! the name, because a backup that lost it would not be complete, and a manifest cannot name it. Targets of symlinks
//! (tablespace locations) may contain anything that is UTF-8.

use bytes::{Buf, Bytes};

use super::ParseError;

const BLOCK: usize = 512;

/// What an archive member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink {
        /// Where it points to.
        target: String,
    },
}

/// The header of an archive member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Path relative to the archive's root, without a slash at the end.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Bytes of content; 0 unless it is a file.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Modification time in seconds since 1970.
    pub mtime: u64,
}

/// What a [`TarDecoder`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent {
    /// A member begins.
    Entry(TarEntry),
    /// The next bytes of the current file.
    Data(Bytes),
    /// The current member is complete.
    EntryEnd,
}

#[derive(Debug)]
enum State {
    /// Collecting a header block.
    Header,
    /// Within a member's content.
    Data { left: u64, padding: usize },
    /// Within the padding behind a member's content.
    Padding { left: usize },
    /// Behind a zero block: only zeros may follow.
    Trailer,
}

/// Decodes an archive from chunks of any size.
///
/// Push a chunk, take events until there are none, push the next. File content is handed on as slices of the pushed
/// chunks, not copied. After an error the decoder must not be used further.
#[derive(Debug)]
pub struct TarDecoder {
    state: State,
    input: Bytes,
    header: [u8; BLOCK],
    filled: usize,
}

impl Default for TarDecoder {
    fn default() -> Self {
        Self { state: State::Header, input: Bytes::new(), header: [0; BLOCK], filled: 0 }
    }
}

fn bad(why: impl Into<String>) -> ParseError {
    ParseError::new("tar archive", why)
}

impl TarDecoder {
    /// A decoder at the start of an archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next chunk. Call [`TarDecoder::next_event`] until it returns `None` first: what is left of an earlier chunk
    /// would have to be copied otherwise.
    pub fn push(&mut self, chunk: Bytes) {
        if self.input.is_empty() {
            self.input = chunk;
        } else {
            let mut both = Vec::with_capacity(self.input.len() + chunk.len());
            both.extend_from_slice(&self.input);
            both.extend_from_slice(&chunk);
            self.input = both.into();
        }
    }

    /// The next event; `None` when another chunk is needed.
    ///
    /// # Errors
    /// When the bytes are not an archive as PostgreSQL writes it.
    pub fn next_event(&mut self) -> Result<Option<TarEvent>, ParseError> {
        loop {
            if let State::Data { left: 0, padding } = self.state {
                self.state = State::Padding { left: padding };
                return Ok(Some(TarEvent::EntryEnd));
            }
            if let State::Padding { left: 0 } = self.state {
                self.state = State::Header;
            }
            if self.input.is_empty() {
                return Ok(None);
            }
            match &mut self.state {
                State::Header => {
                    let count = self.input.len().min(BLOCK - self.filled);
                    if let Some(room) = self.header.get_mut(self.filled..self.filled + count) {
                        self.input.copy_to_slice(room);
                    }
                    self.filled += count;
                    if self.filled < BLOCK {
                        return Ok(None);
                    }
                    self.filled = 0;
                    if self.header.iter().all(|byte| *byte == 0) {
                        self.state = State::Trailer;
                        continue;
                    }
                    let entry = parse_header(&self.header)?;
                    let over = usize::try_from(entry.size % BLOCK as u64).unwrap_or_default();
                    self.state = State::Data { left: entry.size, padding: (BLOCK - over) % BLOCK };
                    return Ok(Some(TarEvent::Entry(entry)));
                }
                State::Data { left, .. } => {
                    let count = usize::try_from(*left).map_or(self.input.len(), |left| left.min(self.input.len()));
                    *left -= count as u64;
                    return Ok(Some(TarEvent::Data(self.input.split_to(count))));
                }
                State::Padding { left } => {
                    let count = self.input.len().min(*left);
                    self.input.advance(count);
                    *left -= count;
                }
                State::Trailer => {
                    if self.input.iter().any(|byte| *byte != 0) {
                        return Err(bad("there are bytes behind its end"));
                    }
                    self.input.clear();
                }
            }
        }
    }

    /// Checks that the archive may end here: between two members.
    ///
    /// # Errors
    /// When it ends within a member or a header.
    pub fn finish(&self) -> Result<(), ParseError> {
        let complete = match self.state {
            State::Header => self.filled == 0,
            State::Padding { left } => left == 0,
            State::Data { .. } => false,
            State::Trailer => true,
        };
        if complete && self.input.is_empty() { Ok(()) } else { Err(bad("it ends within a member")) }
    }
}

/// A field of the header up to its first zero byte.
fn field(header: &[u8; BLOCK], at: usize, length: usize) -> &[u8] {
    let bytes = header.get(at..at + length).unwrap_or_default();
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// `read_tar_number`: base 256 when the top bit is set, else octal.
fn number(header: &[u8; BLOCK], at: usize, length: usize, what: &str) -> Result<u64, ParseError> {
    let bytes = header.get(at..at + length).unwrap_or_default();
    let wrong = || bad(format!("the {what} `{}` is not a number", bytes.escape_ascii()));
    let (&first, rest) = bytes.split_first().ok_or_else(wrong)?;
    if first & 0x80 != 0 {
        if first != 0x80 {
            return Err(wrong());
        }
        return rest.iter().try_fold(0_u64, |value, byte| {
            let shifted = value.checked_mul(256).ok_or_else(wrong)?;
            Ok(shifted | u64::from(*byte))
        });
    }
    let digits = bytes.trim_ascii_start().split(|byte| matches!(byte, 0 | b' ')).next().unwrap_or_default();
    if digits.is_empty() {
        return Err(wrong());
    }
    digits.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8).map(|value| value | u64::from(digit - b'0')).ok_or_else(wrong),
        _ => Err(wrong()),
    })
}

/// `tarChecksum`: the sum of all bytes, those of the checksum itself counted as spaces.
fn checksum(header: &[u8; BLOCK]) -> u64 {
    header.iter().enumerate().map(|(at, byte)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte })).sum()
}

fn text(bytes: &[u8]) -> Result<&str, ParseError> {
    std::str::from_utf8(bytes).map_err(|_| bad(format!("the name `{}` is not UTF-8", bytes.escape_ascii())))
}

fn parse_header(header: &[u8; BLOCK]) -> Result<TarEntry, ParseError> {
    if number(header, 148, 8, "checksum")? != checksum(header) {
        return Err(bad("a header's checksum is wrong"));
    }
    if field(header, 257, 6) != b"ustar" {
        return Err(bad("a header is not of the ustar format"));
    }
    let name = text(field(header, 0, 100))?;
    let prefix = text(field(header, 345, 155))?;
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
    let path = path.strip_suffix('/').unwrap_or(&path);
    let path = path.strip_prefix("./").unwrap_or(path);
    if path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(bad(format!("`{}` is not a path below the archive's root", path.escape_debug())));
    }
    let size = number(header, 124, 12, "size")?;
    let kind = match header.get(156) {
        Some(b'0' | 0) => EntryKind::File,
        Some(b'5') => EntryKind::Dir,
        Some(b'2') => EntryKind::Symlink { target: text(field(header, 157, 100))?.to_owned() },
        other => {
            let kind = other.copied().unwrap_or_default().escape_ascii();
            return Err(bad(format!("`{}` is of the type '{kind}', which PostgreSQL does not write", path.escape_debug())));
        }
    };
    if kind != EntryKind::File && size != 0 {
        return Err(bad(format!("`{}` is not a file and has content", path.escape_debug())));
    }
    let mode = u32::try_from(number(header, 100, 8, "mode")? & 0o7777).unwrap_or_default();
    Ok(TarEntry { path: path.to_owned(), kind, size, mode, mtime: number(header, 136, 12, "modification time")? })
}

/// Writes headers as PostgreSQL does, for tests.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// `tarCreateHeader` of `src/port/tar.c`.
    pub(crate) fn header(name: &str, target: Option<&str>, dir: bool, size: u64) -> Vec<u8> {
        fn print(field: &mut [u8], value: u64) {
            let digits = field.len() - 1;
            if value < 1 << (digits * 3) {
                field.copy_from_slice(format!("{value:0digits$o} ").as_bytes());
            } else {
                field[0] = 0x80;
                field[1..].fill(0);
                let start = field.len() - 8;
                field[start..].copy_from_slice(&value.to_be_bytes());
            }
        }
        let mut header = [0_u8; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        if target.is_some() || dir {
            header[name.len()] = b'/';
        }
        print(&mut header[100..108], 0o600);
        print(&mut header[108..116], 70);
        print(&mut header[116..124], 70);
        print(&mut header[124..136], size);
        print(&mut header[136..148], 1_700_000_000);
        header[156] = if target.is_some() {
            b'2'
        } else if dir {
            b'5'
        } else {
            b'0'
        };
        if let Some(target) = target {
            header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        }
        header[257..263].copy_from_slice(b"ustar\0");
        header[263..265].copy_from_slice(b"00");
        header[265..273].copy_from_slice(b"postgres");
        header[297..305].copy_from_slice(b"postgres");
        print(&mut header[329..337], 0);
        print(&mut header[337..345], 0);
        let sum = checksum(&header);
        print(&mut header[148..156], sum);
        header.to_vec()
    }

    /// A file with its content and padding.
    pub(crate) fn file(name: &str, content: &[u8]) -> Vec<u8> {
        let mut all = header(name, None, false, content.len() as u64);
        all.extend_from_slice(content);
        all.resize(all.len().next_multiple_of(BLOCK), 0);
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::{file, header};
    use super::*;

    const HOSTILE: &str = r#"/srv/ta b'l"e\sp ácé"#;

    fn archive() -> Vec<u8> {
        let mut all = file("backup_label", b"START WAL LOCATION: 0/2000028\n");
        all.extend(header("pg_wal", None, true, 0));
        all.extend(header("pg_tblspc/16384", Some(HOSTILE), false, 0));
        all.extend(file("empty", b""));
        all.extend(file("block", &[7; 512]));
        all.extend(file("base/5/1249", &[9; 1025]));
        all
    }

    /// All events, with the content of a file joined.
    fn decode(chunks: &[&[u8]]) -> Result<Vec<TarEvent>, ParseError> {
        let mut decoder = TarDecoder::new();
        let mut events: Vec<TarEvent> = Vec::new();
        for chunk in chunks {
            decoder.push(Bytes::copy_from_slice(chunk));
            while let Some(event) = decoder.next_event()? {
                if let (TarEvent::Data(more), Some(TarEvent::Data(before))) = (&event, events.last_mut()) {
                    *before = [&before[..], &more[..]].concat().into();
                } else {
                    events.push(event);
                }
            }
        }
        decoder.finish()?;
        Ok(events)
    }

    #[test]
    fn every_split_gives_the_same_events() {
        let archive = archive();
        let whole = decode(&[&archive]).unwrap();
        let paths: Vec<_> = whole
            .iter()
            .filter_map(|event| match event {
                TarEvent::Entry(entry) => Some((entry.path.as_str(), &entry.kind, entry.size)),
                _ => None,
            })
            .collect();
        let link = EntryKind::Symlink { target: HOSTILE.to_owned() };
        let expected = [
            ("backup_label", &EntryKind::File, 30),
            ("pg_wal", &EntryKind::Dir, 0),
            ("pg_tblspc/16384", &link, 0),
            ("empty", &EntryKind::File, 0),
            ("block", &EntryKind::File, 512),
            ("base/5/1249", &EntryKind::File, 1025),
        ];
        assert_eq!(paths, expected);
        assert_eq!(whole.iter().filter(|event| **event == TarEvent::EntryEnd).count(), expected.len());
        for at in 0..=archive.len() {
            assert_eq!(decode(&[&archive[..at], &archive[at..]]).unwrap(), whole, "split at {at}");
        }
        for size in [1, 2, 3, 511, 512, 513] {
            assert_eq!(decode(&archive.chunks(size).collect::<Vec<_>>()).unwrap(), whole, "chunks of {size}");
        }
    }

    #[test]
    fn an_archive_ends_between_members_only() {
        let archive = archive();
        for at in (0..archive.len()).filter(|at| at % 100 == 99) {
            assert!(decode(&[&archive[..at]]).is_err(), "{at}");
        }
        let with = |tail: &[u8]| [&archive[..], tail].concat();
        assert!(decode(&[&with(&[0; 1024])]).is_ok());
        assert!(decode(&[&with(&[0; 100])]).is_err());
        let mut behind = with(&[0; 1024]);
        behind.push(1);
        assert!(decode(&[&behind]).is_err());
    }

    #[test]
    fn sizes_above_8_gib_are_in_base_256() {
        for size in [(8 << 30) - 1, 8 << 30, 1_u64 << 40] {
            let mut decoder = TarDecoder::new();
            decoder.push(header("x", None, false, size).into());
            let Some(TarEvent::Entry(entry)) = decoder.next_event().unwrap() else { panic!("no entry") };
            assert_eq!(entry.size, size);
        }
    }

    #[test]
    fn names_that_lead_outside_are_refused() {
        for name in ["/etc/passwd", "../x", "a/../../x", "a//b", "", "/"] {
            assert!(decode(&[&file(name, b"")]).is_err(), "{name}");
        }
        let mut damaged = file("fine", b"");
        damaged[0] = b'F';
        assert!(decode(&[&damaged]).unwrap_err().why.contains("checksum"));
        let mut latin = header("x", None, false, 0);
        latin[1] = 0xE9;
        let sum = checksum(latin[..].try_into().unwrap());
        latin[148..156].copy_from_slice(format!("{sum:07o} ").as_bytes());
        assert!(decode(&[&latin]).unwrap_err().why.contains(r"x\xe9"));
        let longest = "n".repeat(99);
        assert!(decode(&[&file(&longest, b"x")]).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..1500), valid in any::<bool>(), size in 1_usize..700,
        ) {
            if valid && bytes.len() >= BLOCK {
                let sum = checksum(bytes[..BLOCK].try_into().unwrap());
                bytes[148..156].copy_from_slice(format!("{sum:07o} ").as_bytes());
                bytes[257..263].copy_from_slice(b"ustar\0");
            }
            let _ = decode(&bytes.chunks(size).collect::<Vec<_>>());
        }

        #[test]
        fn any_chunking_gives_the_same_events(
            content in proptest::collection::vec(any::<u8>(), 0..2000), sizes in proptest::collection::vec(0_usize..900, 1..20),
        ) {
            let mut archive = file("a/b", &content);
            archive.extend(file("c", b"last"));
            let mut rest = &archive[..];
            let mut chunks = Vec::new();
            for size in sizes.iter().cycle().take(4000) {
                let (chunk, after) = rest.split_at((*size).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            chunks.push(rest);
            prop_assert_eq!(decode(&chunks).unwrap(), decode(&[&archive]).unwrap());
        }
    }
}
