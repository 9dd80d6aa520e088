//! Packs: many frames in one object of about 32 MiB, made by many threads and stored by a few requests at a time.
//!
//! ```text
//! workers --frames--> packer (one open pack) --packs--> uploader --> store
//! ```
//!
//! What is in them is their makers' business: pages of base backups, maps, documents of a filestore.

mod names;
mod packer;
mod upload;

pub(crate) use names::{FreshNames, PackNames, SessionNames};
pub(crate) use packer::{PackPlace, Packer};
pub(crate) use upload::{Failure, UPLOADS, upload};

/// Bytes after which a pack of data is closed.
pub(crate) const PACK_TARGET: usize = 31 << 20;

/// Bytes after which a pack of maps or catalogs is closed.
pub(crate) const META_TARGET: usize = 16 << 20;
