//! A filestore that is filled from outside the vault, such as from an archive that Odoo made.
//!
//! It obeys the rules of a restored one: a mark lies in it until it is complete, names lead nowhere else, the content of each file is what
//! its name promises, and the checklist is empty.

use std::io::{Read, Write};
use std::path::Path;

use sha1::{Digest, Sha1};

use super::folder::{Folder, ensure_inside};
use crate::filestore::names::is_content;
use crate::format::file_run::promised_sha1;
use crate::{Error, ErrorKind, Result};

/// Bytes that are read at once.
const BUFFER: usize = 128 << 10;

/// Permissions of files, as Odoo gives them under the usual umask.
const MODE: u32 = 0o644;

/// A filestore that is being filled.
#[derive(Debug)]
pub struct Loading(Folder);

impl Loading {
    /// Makes the directory, which must not be there, and those above it. Run by root, everything belongs to the owner of the directory
    /// above that is there.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] with the code `filestore.not_empty` when it is there; otherwise when it cannot be made.
    pub fn create(root: &Path) -> Result<Self> {
        Folder::create(root).map(Self)
    }

    /// Takes a file of `size` bytes, and gives whether its name promised its content. No more than `size` bytes and one are read.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the name leads out of the filestore or is no name of content (`filestore.name`), when the size is another
    /// (`filestore.size`), or the content is not what the name promises (`filestore.content`); otherwise when it cannot be read or written.
    pub fn take(&self, name: &str, size: u64, content: &mut dyn Read) -> Result<bool> {
        ensure_inside(name)?;
        let refuse = |code, why: &str| Err(Error::new(ErrorKind::Corrupt, code, format!("`{name}` {why}")));
        if !is_content(name) || name.contains(['\\', '\0']) {
            return refuse("filestore.name", "is no name of a document");
        }
        let writer = self.0.writer();
        let mut file = writer.create(name)?;
        let (mut hash, mut buffer, mut length) = (Sha1::new(), vec![0; BUFFER], 0_u64);
        // One byte more shows that there are more, without writing them all.
        let mut content = content.take(size.saturating_add(1));
        loop {
            let read = content
                .read(&mut buffer)
                .map_err(|e| Error::new(ErrorKind::Corrupt, "filestore.content", format!("read `{name}`: {e}")).with_source(e))?;
            if read == 0 {
                break;
            }
            length += read as u64;
            if length > size {
                return refuse("filestore.size", &format!("is larger than the {size} bytes that were announced"));
            }
            let bytes = buffer.get(..read).unwrap_or_default();
            hash.update(bytes);
            file.write_all(bytes).map_err(|e| Error::io("write", Path::new(name), e))?;
        }
        if length < size {
            return refuse("filestore.size", &format!("has {length} bytes of the {size} that were announced"));
        }
        writer.finish(&file, name, MODE)?;
        match promised_sha1(name) {
            Some(promised) if promised != <[u8; 20]>::from(hash.finalize()) => {
                refuse("filestore.content", "has other content than its name promises")
            }
            promised => Ok(promised.is_some()),
        }
    }

    /// Makes the empty checklist, makes everything durable, and takes the mark away.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn finish(self) -> Result<()> {
        self.0.finish().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_when_it_is_what_its_name_promises() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("shop");
        let loading = Loading::create(&root).unwrap();
        // `printf abc | sha1sum`
        let name = "a9/a9993e364706816aba3e25717850c26c9cd0d89d";
        assert!(loading.take(name, 3, &mut &b"abc"[..]).unwrap());
        assert!(!loading.take("web/logo", 3, &mut &b"png"[..]).unwrap());
        for (name, size, content, code) in [
            (name, 3, "abd", "filestore.content"),
            (name, 3, "abcd", "filestore.size"),
            (name, 4, "abc", "filestore.size"),
            ("../x", 1, "x", "filestore.name"),
            ("/etc/x", 1, "x", "filestore.name"),
            ("a/./x", 1, "x", "filestore.name"),
            ("a\\..\\x", 1, "x", "filestore.name"),
            ("checklist/a9/x", 1, "x", "filestore.name"),
        ] {
            let error = loading.take(name, size, &mut content.as_bytes()).unwrap_err();
            assert_eq!(error.code(), code, "{name}: {error}");
        }
        // What was refused last was being written under a name that is right; the caller removes the directory.
        loading.take(name, 3, &mut &b"abc"[..]).unwrap();
        loading.finish().unwrap();
        assert_eq!(std::fs::read(root.join(name)).unwrap(), b"abc");
        assert_eq!(std::fs::read_dir(root.join("checklist")).unwrap().count(), 0);
        assert_eq!(Loading::create(&root).unwrap_err().code(), "filestore.not_empty");
    }
}
