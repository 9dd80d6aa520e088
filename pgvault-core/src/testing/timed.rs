//! A store whose clock is a test's: what is written carries the time that the clock shows.
//!
//! Retention and garbage collection go by the store's time alone. With this one a test lets a year pass in a line.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

use crate::clock::Clock;

/// See the [module documentation](self).
#[derive(Debug, Clone)]
pub struct TimedStore {
    inner: Arc<dyn ObjectStore>,
    clock: Arc<dyn Clock>,
    written: Arc<Mutex<HashMap<Path, SystemTime>>>,
}

impl fmt::Display for TimedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TimedStore({})", self.inner)
    }
}

impl TimedStore {
    /// A store that asks `clock` what time it is. What `inner` has already is as old as `inner` says.
    pub fn new(inner: Arc<dyn ObjectStore>, clock: Arc<dyn Clock>) -> Self {
        Self { inner, clock, written: Arc::default() }
    }

    fn written(&self) -> std::sync::MutexGuard<'_, HashMap<Path, SystemTime>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn date(&self, mut meta: ObjectMeta) -> ObjectMeta {
        if let Some(at) = self.written().get(&meta.location) {
            meta.last_modified = (*at).into();
        }
        meta
    }

    fn dated(&self, listed: BoxStream<'static, Result<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
        let this = self.clone();
        listed.map(move |meta| meta.map(|meta| this.date(meta))).boxed()
    }
}

#[async_trait]
impl ObjectStore for TimedStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = self.inner.put_opts(location, payload, options).await?;
        let _ = self.written().insert(location.clone(), self.clock.now().into());
        Ok(put)
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented { operation: format!("put_multipart {location}"), implementer: self.to_string() })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let mut got = self.inner.get_opts(location, options).await?;
        got.meta = self.date(got.meta);
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.dated(self.inner.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.dated(self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut listed = self.inner.list_with_delimiter(prefix).await?;
        listed.objects = listed.objects.into_iter().map(|meta| self.date(meta)).collect();
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
