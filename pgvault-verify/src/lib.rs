//! Starts restored PostgreSQL clusters and checks them.
