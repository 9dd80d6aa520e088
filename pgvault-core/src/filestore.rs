//! The filestore of an Odoo database: documents that match the database at the same second.
//!
//! Odoo keeps the content of attachments in files beside the database, named by their SHA-1, and rows of `ir_attachment` refer to
//! them. A file is written before the transaction that refers to it commits, is never changed afterwards, and is deleted by a garbage
//! collector once nothing refers to it. So the vault keeps every content it ever saw, and a restore asks the restored database which
//! it needs:
//!
//! ```text
//! capture  position in the WAL -> names in the filestore -> those that are unknown -> packs -> catalog -> pass (the commit)
//! restore  recovered database -> names it refers to -> catalog -> packs -> files
//! ```
//!
//! Any transaction that committed at or before the position that a complete pass read first has its files in the vault: that is the
//! **watermark**.
//!
//! | module | |
//! |---|---|
//! | [`names`] | names of files: which are content, which promise their SHA-1, which lie elsewhere |
//! | [`instance`] | which filestore it is: the database that it belongs to, whatever that is called today |
//! | [`find`] | which databases are Odoo's, and where their filestores are |
//! | [`tree`] | the directory: walks, the checklist, the wire that shows that Odoo's garbage collector ran |
//! | [`database`] | what Odoo's database says: identity, position, references |
//! | [`contents`] | files into packs, and out of them |
//! | [`catalog`] | which names are in the vault, as sorted runs that are merged |
//! | [`pass`] | what a pass leaves in the vault |
//! | [`capture`] | a pass |
//! | [`dropped`] | databases that are gone |
//! | [`guard`] | a lock that keeps Odoo's garbage collector waiting until its victims are open |
//! | [`separate`] | that a restored filestore shares nothing with the original |
//! | [`fetch`] | exactly the files that a database refers to, into a directory |

pub mod capture;
pub mod catalog;
pub mod contents;
pub mod database;
pub mod dropped;
pub mod fetch;
pub mod find;
pub mod guard;
pub mod instance;
pub mod names;
pub mod pass;
pub mod separate;
pub(crate) mod space;
pub mod tree;
