//! Odoo's filestore: the documents beside the database.

pub mod separate;
