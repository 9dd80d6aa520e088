//! Holds, as far as the store can help: legal holds on what a hold needs.
//!
//! The record alone keeps pgvault from deleting. Where the store has legal holds, it keeps everybody else from it, too.
