//! Files out of packs.

use bytes::Bytes;

use crate::crypto::sealed::{FrameDecoder, ObjectReader};
use crate::format::file_run::Piece;
use crate::format::object::{HEADER_LEN, Kind, TAIL_LEN};
use crate::format::pack_table::PackRef;
use crate::vault::{Cluster, layout, lost};
use crate::{Error, ErrorKind, Result};

/// A pack of contents, of which frames are read.
#[derive(Debug)]
pub(crate) struct Frames {
    cluster: Cluster,
    path: String,
    reader: ObjectReader,
    body: Body,
}

/// How much of a pack is fetched at once.
#[derive(Debug)]
enum Body {
    /// All of it is in memory.
    Whole(Bytes),
    /// Frames are fetched one by one.
    ByFrame,
}

impl Frames {
    /// Opens a pack; `whole` fetches all of it with one request.
    pub(crate) async fn open(cluster: &Cluster, pack: &PackRef, whole: bool) -> Result<Self> {
        let name = layout::files_pack(ulid::Ulid::from_bytes(pack.id));
        let path = cluster.path(&name);
        let store = cluster.store();
        let footer = pack.size.checked_sub(TAIL_LEN as u64 + u64::from(pack.footer_len)).filter(|at| *at >= HEADER_LEN as u64);
        let footer =
            footer.ok_or_else(|| Error::new(ErrorKind::Corrupt, "pack.size", format!("{path}: its footer has no room")))?;
        let (head, tail, body) = if whole {
            let bytes = store.get(&path).await.map_err(|e| lost(&path, e))?;
            let begin = usize::try_from(footer).unwrap_or(usize::MAX).min(bytes.len());
            (bytes.clone(), bytes.slice(begin..), Body::Whole(bytes))
        } else {
            let head = store.get_range(&path, 0..HEADER_LEN as u64).await.map_err(|e| lost(&path, e))?;
            (head, store.get_range(&path, footer..pack.size).await.map_err(|e| lost(&path, e))?, Body::ByFrame)
        };
        let reader = ObjectReader::open(cluster.keys(), Kind::Contents, &name, pack.size, &head, &tail)
            .map_err(|e| Error::from(e).context(&path))?;
        if reader.tail().sha256 != pack.sha256 {
            return Err(Error::new(ErrorKind::Corrupt, "filestore.pack", format!("{path}: is not the pack that is meant")));
        }
        Ok(Self { cluster: cluster.clone(), path, reader, body })
    }

    /// Fetches the sealed bytes of a frame.
    pub(crate) async fn sealed(&self, number: u32) -> Result<Bytes> {
        let Some(entry) = self.reader.frames().get(number as usize) else {
            return Err(Error::new(ErrorKind::Corrupt, "object.frame", format!("{}: there is no frame {number}", self.path)));
        };
        let end = entry.offset + u64::from(entry.sealed_len);
        match &self.body {
            Body::ByFrame => self.cluster.store().get_range(&self.path, entry.offset..end).await.map_err(|e| lost(&self.path, e)),
            Body::Whole(bytes) => {
                let range = usize::try_from(entry.offset).ok().zip(usize::try_from(end).ok());
                let sealed = range.filter(|(_, end)| *end <= bytes.len()).map(|(start, end)| bytes.slice(start..end));
                sealed.ok_or_else(|| Error::new(ErrorKind::Corrupt, "object.frame", format!("{}: ends within a frame", self.path)))
            }
        }
    }

    /// Opens a frame and checks it.
    pub(crate) fn decode<'a>(&self, number: u32, sealed: &[u8], decoder: &'a mut FrameDecoder) -> Result<&'a [u8]> {
        self.reader.decode_with(self.cluster.keys(), number, sealed, decoder).map_err(|e| Error::from(e).context(&self.path))
    }

    /// The bytes of a piece within its frame.
    pub(crate) fn piece<'a>(&self, piece: &Piece, raw: &'a [u8]) -> Result<&'a [u8]> {
        let begin = piece.offset as usize;
        let end = usize::try_from(piece.len).ok().and_then(|len| begin.checked_add(len));
        end.and_then(|end| raw.get(begin..end)).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "object.frame", format!("{}: frame {} ends within a file", self.path, piece.frame))
        })
    }
}
