//! Checking what is stored.
