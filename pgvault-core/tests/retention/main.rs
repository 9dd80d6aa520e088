//! Expiry and garbage collection on a vault in memory whose clock is the test's.
//!
//! Neither needs a lease that a stalled program could lose (H12): what protects a writer is that it announced itself before it looked
//! around, and that whoever deletes waits for longer than any writer lasts.

#![allow(clippy::unwrap_used, reason = "a test, and its helpers panic like it")]

mod expiry;
mod garbage;
mod place;

use std::future::Future;

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}
