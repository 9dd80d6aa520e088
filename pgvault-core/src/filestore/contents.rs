//! Files into packs, and out of them.
//!
//! ```text
//! names --> workers: open below the root, read, SHA-1, compare with the name --> frames of many small files, or parts of a large one
//!       --> packer --> uploader --> store
//! ```
//!
//! A file whose content is not what its name says is never taken for good: before Odoo 19.5 a file can be seen while it is written, so it
//! is looked at again by the next passes, and after some of them it is damaged.

mod open;
mod read;
mod store;

pub(crate) use self::open::Root;
pub(crate) use self::read::Frames;
pub(crate) use self::store::{Outcome, Stow, Wanted, store};

use crate::format::object::Kind;
use crate::format::pack_table::PackKind;
use crate::pack::PackPlace;
use crate::vault::layout;

/// Small files share a frame of so many bytes: it compresses better than each alone, and one file of it is cheap to get.
const BUNDLE: usize = 1 << 20;

/// Packs of contents.
const PLACE: PackPlace = PackPlace { sealed: Kind::Contents, kind: PackKind::Data, path: layout::files_pack };
