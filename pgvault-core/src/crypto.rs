//! Keys and seals.
//!
//! ```text
//! passphrase (argon2id), X25519 identity or KMS   a key slot, one small document each
//!   wraps the cluster's master key                 never leaves memory in the clear
//!     wraps the data key of each epoch             one small document each
//!       HKDF with the object's salt and name       one key per object, counter nonces
//! ```
//!
//! A stolen bucket shows sizes and times, nothing else. Changing a passphrase rewrites one slot and no data.

pub mod aead;
pub mod digest;
pub mod keys;
pub mod kms;
pub mod sealed;
pub mod signature;
pub mod slot;
