//! Copies of a vault: what arrives is what was there, whatever happens on the way.

#![expect(clippy::unwrap_used, reason = "a test")]

mod crash;
mod shipped;
mod t1;
mod world;
