//! Installing what the tests and the development commands need: from the distribution, from npm, `PyPI` and crates.io, each with its
//! ordinary client and whatever registries this machine is configured with.
//!
//! Everything but packages of the distribution goes below `target`, so that removing that folder removes it all. An
//! installation is announced before it happens, done once, by one process at a time, and marked as complete last: what was
//! interrupted is done again.

#![expect(clippy::print_stdout, reason = "what is installed is said before it happens")]
#![expect(clippy::missing_errors_doc, reason = "every function fails when a program that it runs does, and says which")]

pub mod debian;
mod once;
pub mod packages;
pub mod registry;
pub mod run;

pub use once::{COMPLETE, fresh, lock, once};
