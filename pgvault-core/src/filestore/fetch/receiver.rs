//! Where files go that come out of packs: into a folder, to a receiver, nowhere.
//!
//! Packs are opened by several threads; a receiver is behind a lock and gets one file at a time. A file that lies in one frame is compared
//! with its SHA-1 before it is handed over; one of several frames is handed over piece by piece, because none has to fit into memory, and is
//! compared when the last piece was: when it is not what it should be, the whole fetch fails, and with it whatever was made of the files.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::folder::Writer;
use crate::Result;

/// Takes files one after the other. What it took counts only when the whole [fetch](super::fetch) has succeeded.
pub trait Receiver: Send {
    /// A file begins: its path below the filestore, with `/` between folders and none that leads out of it, and its size in bytes.
    ///
    /// # Errors
    /// When it cannot be taken; the fetch ends with this error.
    fn begin(&mut self, name: &str, size: u64) -> Result<()>;

    /// The next bytes of the file that has begun.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// The file that has begun is whole.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    fn end(&mut self) -> Result<()>;
}

/// A receiver that the threads of a fetch share with its owner.
#[derive(Clone)]
pub struct SharedReceiver(Arc<Mutex<dyn Receiver>>);

impl SharedReceiver {
    /// Shares one; the owner keeps the other end.
    pub fn new<R: Receiver + 'static>(receiver: Arc<Mutex<R>>) -> Self {
        Self(receiver)
    }

    fn lock(&self) -> MutexGuard<'_, dyn Receiver + 'static> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SharedReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedReceiver").finish_non_exhaustive()
    }
}

/// A sink that is ready to take files, from any thread.
#[derive(Debug, Clone)]
pub(super) enum Exit {
    Folder(Arc<Writer>),
    Receiver(SharedReceiver),
    Nowhere,
}

impl Exit {
    /// Takes a whole file.
    pub(super) fn write(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Folder(writer) => writer.write(name, mode, bytes),
            Self::Receiver(receiver) => {
                // Locked over all three: others' files do not come in between.
                let mut receiver = receiver.lock();
                receiver.begin(name, bytes.len() as u64)?;
                receiver.write(bytes)?;
                receiver.end()
            }
            Self::Nowhere => Ok(()),
        }
    }

    /// Takes a file in pieces, while no other is on its way.
    pub(super) fn begin(&self, name: &str, size: u64) -> Result<Pieces<'_>> {
        match self {
            Self::Folder(writer) => Ok(Pieces::File { writer, file: writer.create(name)?, name: name.to_owned() }),
            Self::Receiver(receiver) => {
                receiver.lock().begin(name, size)?;
                Ok(Pieces::Receiver(receiver))
            }
            Self::Nowhere => Ok(Pieces::Nowhere),
        }
    }
}

/// A file on its way in pieces.
pub(super) enum Pieces<'a> {
    File { writer: &'a Writer, file: File, name: String },
    Receiver(&'a SharedReceiver),
    Nowhere,
}

impl Pieces<'_> {
    /// The file is whole, and what it should be.
    pub(super) fn end(self, mode: u32) -> Result<()> {
        match self {
            Self::File { writer, file, name } => writer.finish(&file, &name, mode),
            Self::Receiver(receiver) => receiver.lock().end(),
            Self::Nowhere => Ok(()),
        }
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File { file, .. } => file.write(bytes),
            Self::Receiver(receiver) => receiver.lock().write(bytes).map(|()| bytes.len()).map_err(io::Error::other),
            Self::Nowhere => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
