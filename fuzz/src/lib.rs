//! The bodies of the fuzz targets, shared with `pgvault-core/tests/fuzz_corpus.rs`.

#[path = "../../pgvault-core/tests/corpus/targets.rs"]
mod targets;

pub use targets::*;
