//! Copies of a vault: backups and WAL shipped to another vault, with keys of its own, without touching PostgreSQL.
//!
//! ```text
//! source vault -> pack -> frames: open, decompress, compare with the digest -> seal under the other keys -> target vault
//!                                  \-- the compressed bytes are kept, nothing is compressed again --/
//! ```
//!
//! Packs keep their ids, and frames their numbers, so every file map means in the target what it meant in the source and is copied
//! as it is. The order is that of a backup: session, packs, WAL through the stop position, tables, and the manifest last. A
//! copy that dies anywhere leaves orphans, never a broken backup; the next one uses them.
//!
//! What a map says of blocks for the comparison with the next backup is keyed with the *source's* digest key. A backup that is made
//! straight into a copy finds everything changed, and stores everything: dear, and safe.
//!
//! [`either`](mod@either) has the rule for whoever may read from both.

pub mod either;
mod object;
mod packs;
mod records;
mod run;
mod wal;

pub use run::{Copied, CopyOptions, Failed, copy};
