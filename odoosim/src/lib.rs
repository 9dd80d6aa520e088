//! Odoo's side of a filestore backup, without Odoo: who writes, marks, commits and collects what, and in which order.
//!
//! A backup of a database and its files is right when, for every moment that it claims, each file that a row refers to can be had. Whether
//! it is depends on the order in which Odoo, its garbage collection and the backup do things, and on where one of them is interrupted.
//! So this crate plays them step by step, on a real PostgreSQL and in a real directory, and knows afterwards what was true:
//!
//! - [`Site`] has a server and a data directory, and is the manager that creates, renames, duplicates and drops databases;
//! - [`Odoo`] is one database with its files; [`Worker`] does requests in it, [`gc`] collects its garbage, in the order of its [`Series`];
//! - [`Actor`] makes anything of that, or a backup, stop between its steps ([`Pause`]), wait for locks, or be killed;
//! - [`History`] lets them all run, interleaved by a seed;
//! - [`Truth`] says which files were referred to at each position of the WAL, [`Ledger`] from when to when each lay on the disk.
//!
//! ```no_run
//! # use odoosim::*;
//! # async fn example() -> pgvault_core::Result<()> {
//! let site = Site::start()?;
//! let odoo = site.create("shop", Series::V18, Rules::default()).await?;
//! let mut worker = odoo.worker().await?;
//! worker.begin().await?;
//! let content = Content::new(*b"an invoice");
//! let id = worker.attach(&content).await?;
//! worker.commit().await?;
//! assert!(odoo.ledger().is_on_disk(&content.store_fname()));
//! # Ok(())
//! # }
//! ```
//!
//! What Odoo does was read in its own source (14.0, 18.0, 19, and the line of 19.5 and 20). Not played: `fsync`, which Odoo never calls, so
//! a host that loses power; several hosts on one network file system; the modules that keep contents in object stores.

pub mod content;
pub mod filestore;
pub mod gc;
pub mod history;
pub mod ledger;
pub mod odoo;
pub mod pause;
pub mod schema;
pub mod series;
pub mod site;
pub mod truth;
pub mod worker;

pub use content::Content;
pub use filestore::{Damage, Filestore};
pub use gc::Collection;
pub use history::{History, Missing, Options, Outcome, Participant, Participation};
pub use ledger::{Interval, Ledger, Step};
pub use odoo::{Odoo, Rules};
pub use pause::{Actor, Monitor, Pause, Progress};
pub use series::{Series, is_local};
pub use site::Site;
pub use truth::{Recording, Row, Rows, Truth};
pub use worker::{Attachment, AttachmentId, Worker};
