//! Reading a long stretch of an object piece by piece: with one request, as long as the store answers it.
//!
//! A pack is read from end to end by a restore. Asking for each piece of it costs the store's latency every time, and a
//! request; one answer that is taken apart as it comes costs both once. When it breaks off, the rest is asked for.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, GetRange, ObjectStore};

use super::failure::Failure;
use super::gate::{Pass, Verb};
use super::{Store, path};
use crate::{Error, ErrorKind, Result};

/// An answer that is being read.
struct Answer {
    pieces: BoxStream<'static, object_store::Result<Bytes>>,
    /// It runs until it has been read.
    _pass: Pass,
}

/// A stretch of an object, read from its beginning on.
pub(crate) struct Reading {
    store: Store,
    name: String,
    /// What has not been handed out or taken into `ahead`.
    left: Range<u64>,
    /// What came with the last piece, and was not wanted yet.
    ahead: Bytes,
    answer: Option<Answer>,
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("name", &self.name).field("left", &self.left).finish_non_exhaustive()
    }
}

impl Store {
    /// Begins to read `range` of an object. Nothing is asked before the first piece is.
    pub(crate) fn read(&self, name: &str, range: Range<u64>) -> Reading {
        Reading { store: self.clone(), name: name.to_owned(), left: range, ahead: Bytes::new(), answer: None }
    }
}

impl Reading {
    /// The next `len` bytes.
    ///
    /// # Errors
    /// As [`Store::get_range`]; [`ErrorKind::Failed`] when the stretch does not have so many.
    pub(crate) async fn next(&mut self, len: u64) -> Result<Bytes> {
        let has = self.left.end.saturating_sub(self.left.start) + self.ahead.len() as u64;
        if len > has {
            return Err(Error::new(ErrorKind::Failed, "store.read", format!("{}: {len} bytes of {has} are wanted", self.name)));
        }
        // A directory has no latency to save, and is fastest when asked for large pieces.
        if !self.store.counts_itself {
            let range = self.left.start..self.left.start + len;
            self.left.start = range.end;
            return self.store.get_range(&self.name, range).await;
        }
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        if self.ahead.len() >= wanted {
            return Ok(self.ahead.split_to(wanted));
        }
        let mut piece = BytesMut::with_capacity(wanted);
        piece.extend_from_slice(&std::mem::take(&mut self.ahead));
        let mut delays = self.store.delays();
        while piece.len() < wanted {
            match self.more().await {
                Ok(bytes) => {
                    let taken = bytes.len().min(wanted - piece.len());
                    piece.extend_from_slice(bytes.get(..taken).unwrap_or_default());
                    self.ahead = bytes.slice(taken..);
                }
                Err(failure) => {
                    self.answer = None;
                    match delays.next() {
                        Some(delay) if !failure.is_permanent() => {
                            tracing::warn!(name = self.name, error = %failure, "an object's body broke off, asking for the rest");
                            self.store.back_off(delay).await;
                        }
                        // It also tells an object that was cut short from a store in trouble.
                        _ => {
                            let rest = self.left.start..self.left.start + (wanted - piece.len()) as u64;
                            piece.extend_from_slice(&self.store.get_range(&self.name, rest.clone()).await?);
                            self.left.start = rest.end;
                        }
                    }
                }
            }
        }
        let piece = piece.freeze();
        self.store.received(&piece).await;
        Ok(piece)
    }

    /// What comes next, of whatever length but 0.
    async fn more(&mut self) -> Result<Bytes, Failure> {
        let mut answer = match self.answer.take() {
            Some(answer) => answer,
            None => self.ask().await?,
        };
        let most = self.store.settings.options.request_timeout;
        let next = match tokio::time::timeout(most, answer.pieces.try_next()).await {
            Ok(next) => next.map_err(Failure::new)?,
            Err(_) => return Err(Failure::timeout(most)),
        };
        let room = usize::try_from(self.left.end - self.left.start).unwrap_or(usize::MAX);
        match next {
            Some(bytes) if bytes.len() <= room => {
                self.left.start += bytes.len() as u64;
                if self.left.start < self.left.end {
                    self.answer = Some(answer);
                }
                Ok(bytes)
            }
            Some(bytes) => Err(broken(format!("{} bytes came where {room} were left", bytes.len()))),
            None => Err(broken(format!("the body ended {room} bytes early"))),
        }
    }

    async fn ask(&mut self) -> Result<Answer, Failure> {
        let path = path(&self.name).map_err(Failure::new)?;
        let range = Some(GetRange::Bounded(self.left.clone()));
        self.store.count(Verb::Get);
        let pass = self.store.gate.enter().await;
        let most = self.store.settings.options.request_timeout;
        let asked = self.store.inner.get_opts(&path, GetOptions { range, ..GetOptions::default() });
        let got = match tokio::time::timeout(most, asked).await {
            Ok(got) => got.map_err(Failure::new)?,
            Err(_) => return Err(Failure::timeout(most)),
        };
        Ok(Answer {
            pieces: got.into_stream().filter(|piece| std::future::ready(!matches!(piece, Ok(b) if b.is_empty()))).boxed(),
            _pass: pass,
        })
    }
}

fn broken(why: String) -> Failure {
    Failure::new(object_store::Error::Generic { store: "pgvault", source: why.into() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::store::StoreOptions;
    use crate::testing::{Fault, FaultyStore};

    fn bytes(len: usize) -> Bytes {
        (0..len).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect()
    }

    /// A store that streams, as one in a cloud does.
    async fn streaming(object: &Bytes) -> (Store, FaultyStore) {
        let memory = crate::testing::from_objects(&[("a".to_owned(), object.clone())].into()).await;
        let faulty = FaultyStore::new(memory);
        let options = StoreOptions { backoff: Duration::from_millis(1), ..StoreOptions::default() };
        let store = Store::new(Arc::new(faulty.clone()), "test", options);
        (Store { counts_itself: true, ..store }, faulty)
    }

    #[tokio::test]
    async fn a_stretch_is_read_with_one_request() {
        let object = bytes(100_000);
        let (store, faulty) = streaming(&object).await;
        let mut reading = store.read("a", 1000..90_000);
        let mut all = Vec::new();
        for len in [1, 5000, 0, 70_000, 13_999] {
            all.extend_from_slice(&reading.next(len).await.unwrap());
        }
        assert_eq!(all, object[1000..90_000]);
        assert_eq!(faulty.calls().len(), 1, "{:?}", faulty.calls());
        assert!(reading.next(1).await.is_err(), "there is no more");
    }

    /// Whatever happens to the first answers: the bytes are right, or there is an error.
    #[tokio::test(start_paused = true)]
    async fn what_breaks_off_is_continued_where_it_ended() {
        let object = bytes(50_000);
        for fault in Fault::ALL {
            for at in 1..=3 {
                let (store, faulty) = streaming(&object).await;
                faulty.inject(fault, at, false);
                let mut reading = store.read("a", 10..49_000);
                let first = reading.next(20_000).await;
                let why = format!("{fault:?} at {at}");
                match first {
                    Ok(first) => {
                        assert_eq!(first, object[10..20_010], "{why}");
                        assert_eq!(reading.next(28_990).await.unwrap(), object[20_010..49_000], "{why}");
                    }
                    Err(error) => assert!(fault == Fault::Deny && error.code() == "store.denied", "{why}: {error:?}"),
                }
            }
        }
    }

    #[tokio::test]
    async fn an_object_that_is_too_short_is_damaged() {
        let (store, _) = streaming(&bytes(1000)).await;
        let mut reading = store.read("a", 500..2000);
        assert_eq!(reading.next(1500).await.unwrap_err().kind(), ErrorKind::Corrupt);
        let mut reading = store.read("b", 0..10);
        assert_eq!(reading.next(10).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
