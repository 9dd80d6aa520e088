//! The object stores that the tests run on: where their servers come from, how they are started, and a place in each of them.
//!
//! A [`Server`] is installed when it is missing (from apt, npm, `PyPI`, crates.io, each with its ordinary client), started on free ports of
//! the loopback interface, and ended with the process that started it, however that ends. A [`Place`] is a prefix in one of
//! its buckets that nobody else uses, and how pgvault reaches it.
//!
//! | | what it is | what it is good for |
//! |---|---|---|
//! | [`Kind::Local`] | a directory | no server |
//! | [`Kind::Azurite`] | Microsoft's emulator of Azure Blob | the wire; no immutability, no versions |
//! | [`Kind::Rgw`] | Ceph's object gateway | S3 for real: signatures, users and policies, versions, Object Lock, TLS. Needs root |
//! | [`Kind::Localstack`] | an emulator of Amazon's services | S3 with Object Lock; believes every signature |
//! | [`Kind::Gcs`] | our own [stand-in](mod@gcs) for Google's | what a client sends; says nothing about Google's servers |
//! | [`Kind::S3rver`] | an S3 server for tests | a store that answers 200 and overwrites: pgvault must refuse it |
//! | [`Kind::Garage`] | a real S3 server | the same; takes a quarter of an hour to build |
//! | [`Kind::S3sFs`] | an S3 server over a directory | quick to start; lets several writers win at once, drops the headers of locks without a word |
//! | [`OpenBao`] | a key service | Vault's transit engine; no store |
//! | [`Podman`] | a service that runs containers | the Docker API; images of the PostgreSQL that is here. No store |
//!
//! `cargo xtask test` starts each server once and tells the tests in variables like `PGVAULT_TEST_STORE_RGW`; a test that
//! finds none starts its own. A server that cannot be had fails the test.

#![expect(clippy::missing_errors_doc, reason = "every function fails when a server or an installation does, and says which")]

pub mod client;
pub mod gate;
pub mod gcs;
mod guard;
mod kinds;
mod openbao;
mod place;
mod podman;
mod runtime;
mod server;
mod tls;

pub use client::{Answer, Client, Key};
pub use gate::Gate;
pub use kinds::localstack::python as localstack_python;
pub use openbao::{OpenBao, ROOT_TOKEN};
pub use place::Place;
pub use podman::Podman;
pub use server::{Info, Kind, Role, Server, Tls};
