//! The frame of every encrypted object: clear header, sealed frames, sealed footer, clear tail.
//!
//! ```text
//! header  112 B  clear   magic "PGV1", version, kind, suite, ids, salt, key commitment
//! frames         sealed  ciphertext and 16-byte tag each, back to back
//! footer         sealed  the frame table and the object's own metadata
//! tail     48 B  clear   where the footer is, and the SHA-256 of everything before that hash
//! ```
//!
//! The tail lets anyone without a key tell bit rot from a healthy object; the seals tell tampering from truth.

use super::{Cursor, FormatError, MAX_FRAME, MAX_OBJECT, put_string, put_varint};

/// First bytes of every sealed object.
pub const MAGIC: [u8; 4] = *b"PGV1";
/// The bytes before the tail's hash.
pub const END_MAGIC: [u8; 4] = *b"1VGP";
/// Length of the clear header.
pub const HEADER_LEN: usize = 112;
/// Length of the clear tail.
pub const TAIL_LEN: usize = 48;
/// Bytes that sealing adds to a frame.
pub const TAG_LEN: usize = 16;
/// Major version this build reads and writes.
pub const MAJOR: u8 = 1;
/// Minor version this build writes; any is read.
pub const MINOR: u8 = 0;

/// What an object holds. One kind per object, so that garbage collection, storage classes and locks are uniform.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Frames of data-directory blocks.
    Data = 1,
    /// File maps.
    Meta = 2,
    /// The manifest of a base backup: the commit point.
    Snapshot = 3,
    /// A WAL segment, a part of one, or a history file.
    Wal = 4,
    /// A writer's intent.
    Session = 5,
    /// What a first garbage-collection pass found.
    GcPlan = 6,
    /// Who did what.
    Audit = 7,
    /// A named restore point.
    Mark = 8,
    /// A legal hold.
    Hold = 9,
    /// The receipt of a restore drill.
    Drill = 10,
    /// Contents of files of a filestore.
    Contents = 11,
    /// A capture pass over a filestore: the commit point of what it found.
    Pass = 12,
    /// A small configuration file.
    Artifact = 13,
}

impl Kind {
    fn from_u8(byte: u8) -> Result<Self, FormatError> {
        Ok(match byte {
            1 => Self::Data,
            2 => Self::Meta,
            3 => Self::Snapshot,
            4 => Self::Wal,
            5 => Self::Session,
            6 => Self::GcPlan,
            7 => Self::Audit,
            8 => Self::Mark,
            9 => Self::Hold,
            10 => Self::Drill,
            11 => Self::Contents,
            12 => Self::Pass,
            13 => Self::Artifact,
            other => return Err(FormatError::unsupported("object header", format!("unknown kind {other}"))),
        })
    }
}

/// The cipher suite of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Suite {
    /// AES-256-GCM frames, HKDF-SHA256 keys, keyed BLAKE3 digests.
    Aes256GcmHkdfSha256Blake3 = 1,
}

/// The clear header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the object holds.
    pub kind: Kind,
    /// How it is sealed.
    pub suite: Suite,
    /// The vault it was written to.
    pub vault_id: [u8; 16],
    /// The cluster it belongs to.
    pub cluster_id: [u8; 16],
    /// The epoch whose data key its key derives from.
    pub epoch_id: [u8; 16],
    /// Random input of the object's key.
    pub salt: [u8; 32],
    /// Proves that the right key was derived before anything is decrypted (AES-GCM does not commit to its key).
    pub commitment: [u8; 16],
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[MAJOR, MINOR, self.kind as u8, self.suite as u8]);
        out.extend_from_slice(&0u64.to_le_bytes()); // mandatory feature flags: none yet
        for id in [&self.vault_id, &self.cluster_id, &self.epoch_id] {
            out.extend_from_slice(id);
        }
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.commitment);
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(&out);
        bytes
    }

    /// Reads a header off the front of an object.
    ///
    /// # Errors
    /// When it is not a PGV1 object, or one of a newer major version or with an unknown mandatory feature.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "object header";
        let mut cursor = Cursor::new(WHAT, bytes);
        if cursor.array()? != MAGIC {
            return Err(FormatError::new(WHAT, "does not start with the PGV1 magic"));
        }
        let major = cursor.u8()?;
        if major != MAJOR {
            return Err(FormatError::unsupported(WHAT, format!("format major version {major}; this build reads {MAJOR}")));
        }
        let _minor = cursor.u8()?;
        let kind = cursor.u8()?;
        let suite = cursor.u8()?;
        let features = cursor.u64()?;
        if features != 0 {
            return Err(FormatError::unsupported(WHAT, format!("mandatory features {features:#x} are unknown")));
        }
        if suite != Suite::Aes256GcmHkdfSha256Blake3 as u8 {
            return Err(FormatError::unsupported(WHAT, format!("unknown cipher suite {suite}")));
        }
        Ok(Self {
            kind: Kind::from_u8(kind)?,
            suite: Suite::Aes256GcmHkdfSha256Blake3,
            vault_id: cursor.array()?,
            cluster_id: cursor.array()?,
            epoch_id: cursor.array()?,
            salt: cursor.array()?,
            commitment: cursor.array()?,
        })
    }
}

/// The clear tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Offset of the sealed footer from the object's start.
    pub footer_offset: u64,
    /// Length of the sealed footer with its tag.
    pub footer_len: u32,
    /// SHA-256 of the object up to this field.
    pub sha256: [u8; 32],
}

impl Tail {
    /// The tail's first 16 bytes, which the hash still covers.
    pub fn encode_prefix(footer_offset: u64, footer_len: u32) -> [u8; TAIL_LEN - 32] {
        let mut out = [0; TAIL_LEN - 32];
        let (offset, rest) = out.split_at_mut(8);
        let (len, magic) = rest.split_at_mut(4);
        offset.copy_from_slice(&footer_offset.to_le_bytes());
        len.copy_from_slice(&footer_len.to_le_bytes());
        magic.copy_from_slice(&END_MAGIC);
        out
    }

    /// Reads the last [`TAIL_LEN`] bytes of an object of `object_len` bytes.
    ///
    /// # Errors
    /// When they are not a tail, or the footer it points to cannot lie in the object.
    pub fn parse(bytes: &[u8], object_len: u64) -> Result<Self, FormatError> {
        const WHAT: &str = "object tail";
        let mut cursor = Cursor::new(WHAT, bytes);
        let footer_offset = cursor.u64()?;
        let footer_len = cursor.u32()?;
        if cursor.array()? != END_MAGIC {
            return Err(FormatError::new(WHAT, "does not end a PGV1 object; it may be cut short"));
        }
        let sha256 = cursor.array()?;
        cursor.finish()?;
        let ends = footer_offset.checked_add(u64::from(footer_len)).and_then(|end| end.checked_add(TAIL_LEN as u64));
        if object_len > MAX_OBJECT
            || ends != Some(object_len)
            || footer_offset < HEADER_LEN as u64
            || (footer_len as usize) < TAG_LEN
        {
            return Err(FormatError::new(WHAT, "points to a footer outside the object"));
        }
        Ok(Self { footer_offset, footer_len, sha256 })
    }
}

/// How a frame's bytes were encoded before sealing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are; chosen when compression gains under 3 %.
    None = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    fn from_u64(value: u64) -> Result<Self, FormatError> {
        match value {
            0 => Ok(Self::None),
            1 => Ok(Self::Zstd),
            other => Err(FormatError::unsupported("object footer", format!("unknown codec {other}"))),
        }
    }
}

/// One line of the frame table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// Offset of the sealed frame from the object's start.
    pub offset: u64,
    /// Length of the sealed frame with its tag.
    pub sealed_len: u32,
    /// Length of the bytes it decodes to.
    pub raw_len: u32,
    /// How it is encoded.
    pub codec: Codec,
    /// Keyed digest of the decoded bytes.
    pub digest: [u8; 16],
}

/// The sealed footer: where each frame is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footer {
    /// The frames in stored order.
    pub frames: Vec<FrameEntry>,
    /// Metadata of the object as a whole; what it is depends on the kind (JSON for WAL, empty for packs).
    pub extra: Vec<u8>,
}

impl Footer {
    /// The footer's bytes before sealing.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.frames.len() * 24 + self.extra.len());
        put_varint(&mut out, self.frames.len() as u64);
        for frame in &self.frames {
            put_varint(&mut out, u64::from(frame.sealed_len));
            put_varint(&mut out, u64::from(frame.raw_len));
            put_varint(&mut out, frame.codec as u64);
            out.extend_from_slice(&frame.digest);
        }
        put_string(&mut out, &self.extra);
        out
    }

    /// Reads a decrypted footer of an object whose frames end at `frames_end`.
    ///
    /// # Errors
    /// When the table does not tile exactly the bytes between header and footer, or a frame exceeds the format's limits.
    pub fn parse(bytes: &[u8], frames_end: u64) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new("object footer", bytes);
        let count = cursor.count(19)?;
        let mut frames = Vec::with_capacity(count);
        let mut offset = HEADER_LEN as u64;
        for _ in 0..count {
            let sealed_len: u32 = cursor.number()?;
            let raw_len: u32 = cursor.number()?;
            let codec = Codec::from_u64(cursor.varint()?)?;
            let digest = cursor.array()?;
            let plausible = raw_len as usize <= MAX_FRAME
                && (sealed_len as usize) >= TAG_LEN
                && sealed_len as usize <= MAX_FRAME + TAG_LEN
                && (codec == Codec::Zstd || sealed_len as usize == raw_len as usize + TAG_LEN);
            if !plausible {
                return Err(cursor.error("has a frame of impossible size"));
            }
            frames.push(FrameEntry { offset, sealed_len, raw_len, codec, digest });
            offset = offset.saturating_add(u64::from(sealed_len));
        }
        let extra = cursor.bytes()?.to_vec();
        if offset != frames_end {
            return Err(cursor.error("does not account for every byte of the object"));
        }
        cursor.finish()?;
        Ok(Self { frames, extra })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Data,
            suite: Suite::Aes256GcmHkdfSha256Blake3,
            vault_id: [1; 16],
            cluster_id: [2; 16],
            epoch_id: [3; 16],
            salt: [4; 32],
            commitment: [5; 16],
        }
    }

    #[test]
    fn header_round_trips_and_refuses_the_future() {
        let bytes = header().encode();
        assert_eq!(Header::parse(&bytes).unwrap(), header());
        for (at, value) in [(4, 2), (6, 99), (7, 9), (8, 1)] {
            let mut newer = bytes;
            newer[at] = value;
            assert!(Header::parse(&newer).unwrap_err().unsupported, "byte {at}");
        }
        assert!(!Header::parse(&bytes[..50]).unwrap_err().unsupported);
    }

    proptest! {
        #[test]
        fn footer_round_trips(lens in prop::collection::vec((16u32..100_000, 0u32..100_000), 0..50), extra: Vec<u8>) {
            let mut offset = HEADER_LEN as u64;
            let frames = lens.iter().map(|&(sealed_len, raw_len)| {
                let entry = FrameEntry { offset, sealed_len, raw_len, codec: Codec::Zstd, digest: [7; 16] };
                offset += u64::from(sealed_len);
                entry
            }).collect();
            let footer = Footer { frames, extra };
            prop_assert_eq!(Footer::parse(&footer.encode(), offset).unwrap(), footer);
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>, len: u64) {
            let _ = Header::parse(&bytes);
            let _ = Tail::parse(&bytes, len);
            let _ = Footer::parse(&bytes, len);
        }
    }
}
