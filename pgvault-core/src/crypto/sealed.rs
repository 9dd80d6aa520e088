//! Building and opening encrypted objects.
//!
//! A [`SealedWriter`] grows one object in memory: compress, digest, seal, append. An [`ObjectReader`] holds an opened
//! frame table and turns sealed frames back into bytes, checking each before it hands it out.

use std::fmt;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::digest::DigestKey;
use super::keys::{ClusterKeys, ObjectKey};
use crate::env::Env;
use crate::format::map::PackId;
use crate::format::object::{Codec, Footer, FrameEntry, HEADER_LEN, Header, Kind, TAG_LEN, TAIL_LEN, Tail};
use crate::format::pack_table::{PackKind, PackRef};
use crate::format::{FormatError, MAX_FRAME};
use crate::{Error, ErrorKind, Result};

/// Nonce domains inside one object's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Domain {
    Frame = 1,
    Footer = 2,
}

fn nonce(domain: Domain, counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    let (head, tail) = nonce.split_at_mut(4);
    head.copy_from_slice(&(domain as u32).to_le_bytes());
    tail.copy_from_slice(&counter.to_le_bytes());
    nonce
}

/// Header, place, encoding and length: flipping any of them breaks the seal.
fn associated_data(header: &[u8; HEADER_LEN], number: u64, codec: Codec, raw_len: u64) -> [u8; HEADER_LEN + 17] {
    let mut aad = [0; HEADER_LEN + 17];
    let (head, rest) = aad.split_at_mut(HEADER_LEN);
    head.copy_from_slice(header);
    let (count, rest) = rest.split_at_mut(8);
    count.copy_from_slice(&number.to_le_bytes());
    let (code, len) = rest.split_at_mut(1);
    code.copy_from_slice(&[codec as u8]);
    len.copy_from_slice(&raw_len.to_le_bytes());
    aad
}

/// zstd's own 14 for level 1 is made for caches of twenty years ago. 64 Ki entries remember all positions of a 256 KiB
/// frame: 2 % smaller at the same speed (docs/benchmarks.md).
const FAST_HASH_LOG: u32 = 16;

/// Compresses frames; one per worker, because its zstd context and scratch space are reused.
pub struct FrameEncoder {
    zstd: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameEncoder")
    }
}

impl FrameEncoder {
    /// An encoder at a zstd level (1 is the measured default).
    ///
    /// # Errors
    /// When zstd refuses the level.
    pub fn new(level: i32) -> Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(level).map_err(|e| zstd_failed(&e))?;
        if level == 1 {
            zstd.set_parameter(zstd::zstd_safe::CParameter::HashLog(FAST_HASH_LOG)).map_err(|e| zstd_failed(&e))?;
        }
        Ok(Self { zstd, scratch: Vec::new() })
    }

    /// Encodes a frame whose digest is already known: compressed when that gains at least 3 %.
    ///
    /// # Errors
    /// When `raw` exceeds the largest frame, or zstd fails.
    pub fn encode<'a>(&'a mut self, raw: &'a [u8], digest: [u8; 16]) -> Result<EncodedFrame<'a>> {
        let raw_len = u32::try_from(raw.len()).ok().filter(|&len| len as usize <= MAX_FRAME).ok_or_else(|| {
            Error::new(ErrorKind::Failed, "frame.too_large", format!("a frame of {} bytes is above the limit", raw.len()))
        })?;
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(raw.len()));
        let _ = self.zstd.compress_to_buffer(raw, &mut self.scratch).map_err(|e| zstd_failed(&e))?;
        let gains = self.scratch.len() < raw.len() - raw.len() / 32;
        let (codec, bytes) = if gains { (Codec::Zstd, &self.scratch[..]) } else { (Codec::None, raw) };
        Ok(EncodedFrame { codec, bytes, raw_len, digest })
    }
}

/// A frame between compression and sealing.
#[derive(Debug, Clone, Copy)]
pub struct EncodedFrame<'a> {
    codec: Codec,
    bytes: &'a [u8],
    raw_len: u32,
    digest: [u8; 16],
}

fn zstd_failed(error: &std::io::Error) -> Error {
    Error::new(ErrorKind::Failed, "zstd", format!("compress: {error}"))
}

/// A finished object, ready for one PUT.
#[derive(Debug, Clone)]
pub struct SealedObject {
    /// The name it is bound to, relative to the cluster's prefix.
    pub name: String,
    /// All its bytes.
    pub bytes: Bytes,
    /// Length of its sealed footer.
    pub footer_len: u32,
    /// How many frames it has.
    pub frames: u32,
    /// The hash in its tail.
    pub sha256: [u8; 32],
}

impl SealedObject {
    /// What a snapshot says about this object, as the pack `id` of which nothing is used yet.
    pub fn as_pack(&self, id: PackId, kind: PackKind) -> PackRef {
        let size = self.bytes.len() as u64;
        PackRef { id, kind, size, footer_len: self.footer_len, frames: self.frames, live: 0, sha256: self.sha256 }
    }
}

/// Grows one object in memory.
pub struct SealedWriter {
    name: String,
    header: [u8; HEADER_LEN],
    key: ObjectKey,
    bytes: Vec<u8>,
    footer: Footer,
}

impl fmt::Debug for SealedWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedWriter").field("name", &self.name).field("len", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl SealedWriter {
    /// Starts an object; its key is bound to `kind` and `name`.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new(env: &Env, keys: &ClusterKeys, kind: Kind, name: impl Into<String>, capacity: usize) -> Result<Self> {
        let name = name.into();
        let (header, key) = keys.new_object(env, kind, &name)?;
        let header = header.encode();
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend_from_slice(&header);
        Ok(Self { name, header, key, bytes, footer: Footer::default() })
    }

    /// The object's size so far, without footer and tail.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True before the first frame.
    pub fn is_empty(&self) -> bool {
        self.footer.frames.is_empty()
    }

    /// Compresses, seals and appends a frame whose digest is already known; returns its number.
    ///
    /// # Errors
    /// When `raw` exceeds the largest frame, or zstd fails.
    pub fn push(&mut self, encoder: &mut FrameEncoder, raw: &[u8], digest: [u8; 16]) -> Result<u32> {
        Ok(self.append(&encoder.encode(raw, digest)?))
    }

    /// Seals and appends a frame that was encoded before; returns its number.
    ///
    /// Encoding is the expensive part: workers do it in parallel and share one writer for this.
    pub fn append(&mut self, frame: &EncodedFrame<'_>) -> u32 {
        let number = self.footer.frames.len();
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(frame.bytes);
        let aad = associated_data(&self.header, number as u64, frame.codec, u64::from(frame.raw_len));
        let tag =
            self.key.cipher().seal(nonce(Domain::Frame, number as u64), &aad, self.bytes.get_mut(offset..).unwrap_or(&mut []));
        self.bytes.extend_from_slice(&tag);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.footer.frames.push(FrameEntry {
            offset: offset as u64,
            sealed_len: narrow(self.bytes.len() - offset),
            raw_len: frame.raw_len,
            codec: frame.codec,
            digest: frame.digest,
        });
        narrow(number)
    }

    /// Seals the footer, appends the tail.
    pub fn finish(mut self, extra: Vec<u8>) -> SealedObject {
        self.footer.extra = extra;
        let mut footer = self.footer.encode();
        let aad = associated_data(&self.header, 0, Codec::None, footer.len() as u64);
        let tag = self.key.cipher().seal(nonce(Domain::Footer, 0), &aad, &mut footer);
        footer.extend_from_slice(&tag);
        let footer_offset = self.bytes.len() as u64;
        let footer_len = u32::try_from(footer.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&footer);
        self.bytes.extend_from_slice(&Tail::encode_prefix(footer_offset, footer_len));
        let sha256: [u8; 32] = Sha256::digest(&self.bytes).into();
        self.bytes.extend_from_slice(&sha256);
        let frames = u32::try_from(self.footer.frames.len()).unwrap_or(u32::MAX);
        SealedObject { name: self.name, bytes: self.bytes.into(), footer_len, frames, sha256 }
    }
}

/// Checks an object's framing and hash without any key (verification level V1).
///
/// # Errors
/// When the bytes are not what was written.
pub fn verify_keyless(bytes: &[u8]) -> Result<(Header, [u8; 32]), FormatError> {
    let header = Header::parse(bytes)?;
    let tail = Tail::parse(bytes.get(bytes.len().saturating_sub(TAIL_LEN)..).unwrap_or(&[]), bytes.len() as u64)?;
    let hashed = bytes.get(..bytes.len().saturating_sub(32)).unwrap_or(&[]);
    if <[u8; 32]>::from(Sha256::digest(hashed)) != tail.sha256 {
        return Err(FormatError::new("object", "its bytes do not match the SHA-256 in its tail"));
    }
    Ok((header, tail.sha256))
}

fn bad_frame(number: u32, why: &str) -> FormatError {
    FormatError::new("frame", format!("number {number}: {why}"))
}

fn check(keys: &ClusterKeys, number: u32, entry: &FrameEntry, raw: &[u8]) -> Result<(), FormatError> {
    if raw.len() == entry.raw_len as usize && keys.digest().frame(raw) == entry.digest {
        Ok(())
    } else {
        Err(bad_frame(number, "its content does not match its digest"))
    }
}

/// Where decoded frames begin in memory: direct I/O wants it.
pub const ALIGNMENT: usize = 4096;

/// The part of `buffer` that begins at a multiple of [`ALIGNMENT`] and has `len` bytes.
fn aligned(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len + ALIGNMENT {
        buffer.resize(len + ALIGNMENT, 0);
    }
    let start = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    buffer.get_mut(start..start + len).unwrap_or_default()
}

/// Memory for [`ObjectReader::decode_with`]; one per thread.
pub struct FrameDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
    sealed: Vec<u8>,
    raw: Vec<u8>,
}

impl fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameDecoder")
    }
}

impl FrameDecoder {
    /// A decoder.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new() -> Result<Self> {
        let zstd =
            zstd::bulk::Decompressor::new().map_err(|e| Error::new(ErrorKind::Failed, "zstd", format!("decompress: {e}")))?;
        Ok(Self { zstd, sealed: Vec::new(), raw: Vec::new() })
    }
}

/// An opened object: its frame table, and the key for its frames.
#[derive(Debug)]
pub struct ObjectReader {
    header: [u8; HEADER_LEN],
    key: ObjectKey,
    footer: Footer,
    tail: Tail,
}

impl ObjectReader {
    /// Opens an object from its first [`HEADER_LEN`] bytes (more is fine) and its footer with the tail behind it.
    ///
    /// # Errors
    /// When it is not an untouched object of `kind`, written under `name` with one of these keys.
    pub fn open(
        keys: &ClusterKeys,
        kind: Kind,
        name: &str,
        object_len: u64,
        head: &[u8],
        footer_and_tail: &[u8],
    ) -> Result<Self, FormatError> {
        let parsed = Header::parse(head)?;
        if parsed.kind != kind {
            return Err(FormatError::new("object header", format!("holds {:?}, not {kind:?}", parsed.kind)));
        }
        // As stored: a newer minor version differs in a byte that only the seals cover.
        let header = *head.first_chunk::<HEADER_LEN>().ok_or_else(|| FormatError::new("object header", "ends too early"))?;
        let key = keys.stored_object(&parsed, name)?;
        let tail = Tail::parse(footer_and_tail.get(footer_and_tail.len().saturating_sub(TAIL_LEN)..).unwrap_or(&[]), object_len)?;
        let body = footer_and_tail.len().checked_sub(TAIL_LEN + tail.footer_len as usize);
        let sealed = body.and_then(|start| footer_and_tail.get(start..footer_and_tail.len() - TAIL_LEN));
        let (sealed, tag) = sealed
            .and_then(<[u8]>::split_last_chunk::<TAG_LEN>)
            .ok_or_else(|| FormatError::new("object footer", "lies outside what was read"))?;
        let mut plain = sealed.to_vec();

        let opened = Self::open_footer(&key, &header, &mut plain, *tag, tail.footer_offset)?;
        Ok(Self { header, key, footer: opened, tail })
    }

    fn open_footer(
        key: &ObjectKey,
        header: &[u8; HEADER_LEN],
        bytes: &mut [u8],
        tag: [u8; TAG_LEN],
        frames_end: u64,
    ) -> Result<Footer, FormatError> {
        let aad = associated_data(header, 0, Codec::None, bytes.len() as u64);
        key.cipher()
            .open(nonce(Domain::Footer, 0), &aad, bytes, tag)
            .map_err(|_| FormatError::new("object footer", "its seal is broken; the object was changed after it was written"))?;
        Footer::parse(bytes, frames_end)
    }

    /// Opens an object that is wholly in memory.
    ///
    /// # Errors
    /// As [`ObjectReader::open`].
    pub fn open_whole(keys: &ClusterKeys, kind: Kind, name: &str, bytes: &[u8]) -> Result<Self, FormatError> {
        let tail = Tail::parse(bytes.get(bytes.len().saturating_sub(TAIL_LEN)..).unwrap_or(&[]), bytes.len() as u64)?;
        let footer = usize::try_from(tail.footer_offset).ok().and_then(|at| bytes.get(at..)).unwrap_or(&[]);
        Self::open(keys, kind, name, bytes.len() as u64, bytes, footer)
    }

    /// The frame table.
    pub fn frames(&self) -> &[FrameEntry] {
        &self.footer.frames
    }

    /// The clear tail, as it is stored. Its hash is not compared with anything here.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// The object's own metadata.
    pub fn extra(&self) -> &[u8] {
        &self.footer.extra
    }

    /// Turns the sealed bytes of frame `number` into what was pushed, checking seal, length and digest.
    ///
    /// # Errors
    /// When anything differs; nothing unchecked is ever returned.
    pub fn decode(&self, keys: &ClusterKeys, number: u32, sealed: &[u8]) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::new();
        let entry = self.unseal(number, sealed, &mut bytes)?;
        let raw = match entry.codec {
            Codec::None => bytes,
            Codec::Zstd => zstd::bulk::decompress(&bytes, entry.raw_len as usize)
                .map_err(|e| bad_frame(number, &format!("does not decompress: {e}")))?,
        };
        check(keys, number, entry, &raw)?;
        Ok(raw)
    }

    /// [`ObjectReader::decode`] with reused memory. What it gives begins at a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// As [`ObjectReader::decode`].
    pub fn decode_with<'a>(
        &self,
        keys: &ClusterKeys,
        number: u32,
        sealed: &[u8],
        decoder: &'a mut FrameDecoder,
    ) -> Result<&'a [u8], FormatError> {
        let FrameDecoder { zstd, sealed: bytes, raw } = decoder;
        let entry = self.unseal(number, sealed, bytes)?;
        let out = aligned(raw, entry.raw_len as usize);
        let len = match entry.codec {
            Codec::None if bytes.len() == out.len() => {
                out.copy_from_slice(bytes);
                out.len()
            }
            Codec::None => return Err(bad_frame(number, "has the wrong length")),
            Codec::Zstd => {
                zstd.decompress_to_buffer(bytes, out).map_err(|e| bad_frame(number, &format!("does not decompress: {e}")))?
            }
        };
        let raw = out.get(..len).unwrap_or(&[]);
        check(keys, number, entry, raw)?;
        Ok(raw)
    }

    /// Takes frame `number` out of the whole object's bytes as it was encoded, still compressed, for a [`SealedWriter`] with other
    /// keys. It is decoded and checked all the same; its digest is the one under `digests`.
    ///
    /// # Errors
    /// As [`ObjectReader::decode`].
    pub fn transcribe<'a>(
        &self,
        keys: &ClusterKeys,
        number: u32,
        object: &[u8],
        digests: &DigestKey,
        decoder: &'a mut FrameDecoder,
    ) -> Result<EncodedFrame<'a>, FormatError> {
        let sealed = self.sealed(number, object)?;
        let digest = digests.frame(self.decode_with(keys, number, sealed, decoder)?);
        let entry = self.footer.frames.get(number as usize).ok_or_else(|| bad_frame(number, "does not exist in this object"))?;
        Ok(EncodedFrame { codec: entry.codec, bytes: &decoder.sealed, raw_len: entry.raw_len, digest })
    }

    /// Opens the seal of a frame into `bytes`; they are still compressed.
    fn unseal(&self, number: u32, sealed: &[u8], bytes: &mut Vec<u8>) -> Result<&FrameEntry, FormatError> {
        let entry = self.footer.frames.get(number as usize).ok_or_else(|| bad_frame(number, "does not exist in this object"))?;
        let (body, tag) = sealed
            .split_last_chunk::<TAG_LEN>()
            .filter(|_| sealed.len() == entry.sealed_len as usize)
            .ok_or_else(|| bad_frame(number, "has the wrong length"))?;
        bytes.clear();
        bytes.extend_from_slice(body);
        let aad = associated_data(&self.header, u64::from(number), entry.codec, u64::from(entry.raw_len));
        self.key
            .cipher()
            .open(nonce(Domain::Frame, u64::from(number)), &aad, bytes, *tag)
            .map_err(|_| bad_frame(number, "its seal is broken; the object was changed after it was written"))?;
        Ok(entry)
    }

    /// Decodes frame `number` out of the whole object's bytes.
    ///
    /// # Errors
    /// As [`ObjectReader::decode`].
    pub fn decode_from(&self, keys: &ClusterKeys, number: u32, object: &[u8]) -> Result<Vec<u8>, FormatError> {
        self.decode(keys, number, self.sealed(number, object)?)
    }

    /// The sealed bytes of a frame of an object that is wholly in memory.
    fn sealed<'a>(&self, number: u32, object: &'a [u8]) -> Result<&'a [u8], FormatError> {
        let sealed = self.footer.frames.get(number as usize).and_then(|entry| {
            let start = usize::try_from(entry.offset).ok()?;
            object.get(start..start.checked_add(entry.sealed_len as usize)?)
        });
        sealed.ok_or_else(|| FormatError::new("frame", "lies outside its object"))
    }
}
