//! AES-256-GCM behind two methods, so that a faster implementation can take its place against the same vectors.

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Key, Nonce, Tag};

/// Length of a key in bytes.
pub const KEY_LEN: usize = 32;

/// The seal did not match: other bytes, other associated data or another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealBroken;

/// An authenticated cipher with one key.
pub trait Aead: Send + Sync {
    /// Encrypts in place and returns the tag. A (key, nonce) pair must never be used twice.
    fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut [u8]) -> [u8; 16];

    /// Decrypts in place after checking the tag; on failure `bytes` is unusable.
    ///
    /// # Errors
    /// When anything differs from what was sealed.
    fn open(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut [u8], tag: [u8; 16]) -> Result<(), SealBroken>;
}

/// The `aes-gcm` crate's cipher.
pub struct AesGcm(Aes256Gcm);

impl std::fmt::Debug for AesGcm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AesGcm")
    }
}

impl AesGcm {
    /// A cipher with `key`.
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        Self(Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key)))
    }
}

impl Aead for AesGcm {
    fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut [u8]) -> [u8; 16] {
        // GCM fails only above 64 GiB a message; frames end at 4 MiB. An all-zero tag would never verify.
        self.0.encrypt_inout_detached(&Nonce::from(nonce), aad, bytes.into()).map_or([0; 16], Into::into)
    }

    fn open(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut [u8], tag: [u8; 16]) -> Result<(), SealBroken> {
        self.0.decrypt_inout_detached(&Nonce::from(nonce), aad, bytes.into(), &Tag::from(tag)).map_err(|_| SealBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test case 16 of the GCM submission (`McGrew` and Viega): 256-bit key, 60-byte text, 20-byte associated data.
    #[test]
    fn matches_the_published_vector() {
        let hex = |s: &str| (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect::<Vec<_>>();
        let key = hex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308");
        let mut text = hex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let plain = text.clone();
        let aad = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let nonce: [u8; 12] = hex("cafebabefacedbaddecaf888").try_into().unwrap();
        let cipher = AesGcm::new(&key.try_into().unwrap());
        let tag = cipher.seal(nonce, &aad, &mut text);
        assert_eq!(tag.to_vec(), hex("76fc6ece0f4e1768cddf8853bb2d551b"));
        let mut wrong = text.clone();
        assert_eq!(cipher.open(nonce, b"other", &mut wrong, tag), Err(SealBroken));
        cipher.open(nonce, &aad, &mut text, tag).unwrap();
        assert_eq!(text, plain);
    }
}
