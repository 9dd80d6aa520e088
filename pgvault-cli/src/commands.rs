//! One file per command.

pub(crate) mod backup;
pub(crate) mod completions;
pub(crate) mod copy;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod du;
pub(crate) mod expire;
pub(crate) mod filestore;
pub(crate) mod gc;
pub(crate) mod hold;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod key;
pub(crate) mod list;
pub(crate) mod restore;
pub(crate) mod status;
pub(crate) mod undelete;
pub(crate) mod verify;
pub(crate) mod wal;
