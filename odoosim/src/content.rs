//! Contents of attachments, made from a number: the same number is the same bytes in every run.

use std::fmt::Write as _;

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use sha1::{Digest as _, Sha1};

/// The bytes of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    bytes: Vec<u8>,
    sha1: String,
}

impl Content {
    /// These bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        let sha1 = sha1_hex(&bytes);
        Self { bytes, sha1 }
    }

    /// Content number `number` of a family: most have up to 3 KiB, one in forty up to 100 KiB, none is empty.
    pub fn numbered(family: u64, number: u64) -> Self {
        let mut random = StdRng::seed_from_u64(family.rotate_left(32) ^ number);
        let size =
            if random.random_ratio(1, 40) { random.random_range(8 << 10..=100 << 10) } else { random.random_range(1..=3 << 10) };
        // Begins with its number, so that no two are the same.
        let mut bytes = vec![0; size + 16];
        random.fill_bytes(&mut bytes);
        bytes.splice(..16, family.to_le_bytes().into_iter().chain(number.to_le_bytes()));
        // A single byte has no room for that; every family has the same 256.
        if random.random_ratio(1, 20) {
            bytes = vec![number.to_le_bytes().first().copied().unwrap_or_default()];
        }
        Self::new(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What `checksum` says of it: 40 lower-case hexadecimal digits.
    pub fn sha1(&self) -> &str {
        &self.sha1
    }

    /// The `store_fname` of every series: below two digits.
    pub fn store_fname(&self) -> String {
        format!("{}/{}", self.sha1.get(..2).unwrap_or_default(), self.sha1)
    }

    /// The `store_fname` of Odoo 7: below three digits.
    pub fn retro_store_fname(&self) -> String {
        format!("{}/{}", self.sha1.get(..3).unwrap_or_default(), self.sha1)
    }
}

/// SHA-1 in hexadecimal, as Odoo names files.
pub fn sha1_hex(bytes: &[u8]) -> String {
    Sha1::digest(bytes).iter().fold(String::with_capacity(40), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_always_the_same_content() {
        assert_eq!(Content::new([]).sha1(), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        assert_eq!(Content::numbered(7, 3), Content::numbered(7, 3));
        assert_ne!(Content::numbered(7, 300).sha1(), Content::numbered(8, 300).sha1());
        assert_eq!(Content::new(*b"x").store_fname(), "11/11f6ad8ec52a2984abaafd7c3b516503785c2072");
    }

    #[test]
    fn sizes_are_small_and_never_zero() {
        let sizes: Vec<usize> = (0..400).map(|number| Content::numbered(1, number).bytes().len()).collect();
        assert!(sizes.iter().all(|size| (1..=(100 << 10) + 16).contains(size)));
        assert!(sizes.contains(&1) && sizes.iter().any(|size| *size > 8 << 10));
    }
}
