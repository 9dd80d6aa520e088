//! What may be forgotten, and forgetting it.
//!
//! ```text
//! policy -> plan: what each backup is kept for, which WAL that needs -> expire: record, manifests, WAL
//! ```
//!
//! A plan errs on one side only. What the window needs, a hold holds, a restore reads or a lock locks is kept whatever the counts
//! say, and so is what cannot be judged. Time is the store's throughout: a backup is as old as its manifest object, so that whoever
//! may write to the vault, and chooses what a manifest says, cannot make it older or push another out.
//!
//! Packs are not deleted here. What no manifest names any more is for [`gc`](crate::vault::gc).

pub mod expire;
pub mod holds;
pub mod lint;
pub mod plan;
pub mod policy;
mod wal;

pub use expire::{ExpireOptions, Expired, expire};
pub use plan::{Plan, Reason};
pub use policy::Policy;
