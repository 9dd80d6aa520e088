//! Copies of a vault, each in a place of its own, in the store of the run.
//!
//! In memory without `PGVAULT_TEST_STORE`: thousands of copies cost nothing there. With it in that store (`local` is a
//! directory), and then only a part of the cases runs, another one each time; `PGVAULT_TEST_FULL=1` takes them all.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};
use pgvault_core::testing::Objects;
use pgvault_teststores::{Kind, Place, Server};
use tempfile::TempDir;

/// The store of this run; nothing for memory.
fn kind() -> Option<Kind> {
    std::env::var_os("PGVAULT_TEST_STORE").map(|_| Kind::of_this_run().unwrap())
}

/// A store that is removed when nobody uses it any more.
#[derive(Debug)]
pub(crate) struct Copy {
    inner: Arc<dyn ObjectStore>,
    /// What is in a server goes when it is told to, everything else by itself.
    place: Option<Place>,
    _directory: Option<TempDir>,
}

impl Copy {
    /// An empty one.
    pub(crate) fn new() -> Arc<Self> {
        let (inner, place, directory): (Arc<dyn ObjectStore>, _, _) = match kind() {
            None => (Arc::new(InMemory::new()), None, None),
            Some(Kind::Local) => {
                let directory = crate::source::folder();
                (Place::directory(&directory.path().join("vault")).object_store().unwrap(), None, Some(directory))
            }
            Some(kind) => {
                let place = Server::shared(kind).unwrap().place().unwrap();
                (place.object_store().unwrap(), Some(place), None)
            }
        };
        Arc::new(Self { inner, place, _directory: directory })
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let Some(place) = self.place.take() else { return };
        match tokio::runtime::Handle::try_current() {
            // It goes on meanwhile, and waits for it at its end.
            Ok(runtime) => drop(runtime.spawn_blocking(move || place.clear())),
            Err(_) => drop(place.clear()),
        }
    }
}

/// A store that holds these objects.
pub(crate) async fn from_objects(objects: &Objects) -> Arc<Copy> {
    let copy = Copy::new();
    let puts = stream::iter(objects.clone()).map(|(name, bytes)| {
        let copy = Arc::clone(&copy);
        async move {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            copy.put_opts(&Path::from(name.as_str()), PutPayload::from_bytes(bytes), options).await
        }
    });
    let _ = puts.buffer_unordered(8).try_collect::<Vec<_>>().await.unwrap();
    copy
}

/// What runs of so many cases: all of them in memory, elsewhere at most `most`, evenly spread.
pub(crate) fn sample<T>(cases: Vec<T>, most: usize) -> Vec<T> {
    if kind().is_none() || std::env::var_os("PGVAULT_TEST_FULL").is_some() || cases.len() <= most {
        return cases;
    }
    let step = cases.len().div_ceil(most);
    let mut first = [0; 8];
    getrandom::fill(&mut first).unwrap();
    let first = usize::try_from(u64::from_ne_bytes(first) % step as u64).unwrap();
    eprintln!("every {step}th of {} cases, from {first} on", cases.len());
    cases.into_iter().skip(first).step_by(step).collect()
}

impl fmt::Display for Copy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Copy {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(&self, location: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
