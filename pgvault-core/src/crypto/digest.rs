//! Keyed digests of content.
//!
//! A frame's digest is a two-level hash: one keyed BLAKE3 per 8 KiB block, then one over those. The block digests fall out
//! on the way and, cut to 8 bytes, are what the next backup compares to find changed pages. The key is the cluster's own,
//! so the digests in a leaked map say nothing about content, and nobody without it can construct a collision.

use zeroize::Zeroizing;

use crate::format::BLOCK;
use crate::format::map::BLOCK_DIGEST;

/// The key of a cluster's content digests.
#[derive(Clone)]
pub struct DigestKey(Zeroizing<[u8; 32]>);

impl std::fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DigestKey")
    }
}

impl DigestKey {
    /// A digest key of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The digest of a frame; `blocks` receives the digest of each 8 KiB block.
    pub fn frame_with_blocks(&self, raw: &[u8], mut blocks: impl FnMut([u8; BLOCK_DIGEST])) -> [u8; 16] {
        let mut root = blake3::Hasher::new_keyed(&self.0);
        for block in raw.chunks(BLOCK) {
            let leaf = blake3::keyed_hash(&self.0, block);
            let _ = root.update(leaf.as_bytes());
            blocks(truncate(leaf.as_bytes()));
        }
        let _ = root.update(&(raw.len() as u64).to_le_bytes());
        truncate(root.finalize().as_bytes())
    }

    /// The digest of a frame.
    pub fn frame(&self, raw: &[u8]) -> [u8; 16] {
        self.frame_with_blocks(raw, |_| ())
    }

    /// The digest of one block, as kept in file maps.
    pub fn block(&self, block: &[u8]) -> [u8; BLOCK_DIGEST] {
        truncate(blake3::keyed_hash(&self.0, block).as_bytes())
    }
}

fn truncate<const N: usize>(hash: &[u8; 32]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(hash.get(..N).unwrap_or(&[]));
    out
}
