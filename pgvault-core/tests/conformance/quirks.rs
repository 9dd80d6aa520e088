//! Stores that almost work: each breaks one thing that pgvault relies on, as some server, cache or file system does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What is wrong with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quirk {
    /// Takes `If-None-Match` for nothing, as Garage and s3rver do.
    Overwrites,
    /// Looks whether the object is there, and then writes.
    ChecksThenWrites,
    /// Says that it is done, and is not.
    LosesPuts,
    /// Keeps the first MiB.
    CutsLargeObjects,
    /// Takes an object without bytes for none.
    ForgetsEmptyObjects,
    /// The last byte of a range is left out.
    RangeIsShort,
    /// Begins one byte too late, and is as long as it should be.
    RangeIsShifted,
    /// Takes the end of an object for the end of the range.
    RangeOverTheEndIsFilled,
    /// The first page of a listing is all there is.
    ListsOnePage,
    /// `start-after` includes the name.
    ListsFromInstead,
    /// A prefix is the beginning of a string, and not a folder.
    PrefixIsText,
    /// Upper and lower case are the same, as on some file systems.
    FoldsCase,
    /// `%41` is `A`.
    DecodesNames,
    /// A `+` is a space.
    PlusIsSpace,
    /// Says that it deleted, and did not.
    KeepsDeleted,
    /// What is missing is forbidden, as on S3 without the right to list.
    MissingIsDenied,
    /// What is forbidden is missing, as some gateways say.
    DeniedIsMissing,
    /// Has no battery.
    ClockStandsAt1980,
    /// Each object is older than the one before.
    ClockRunsBackwards,
}

#[derive(Debug)]
pub(crate) struct Quirky {
    quirk: Quirk,
    inner: Arc<InMemory>,
    written: AtomicI64,
}

impl fmt::Display for Quirky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.quirk)
    }
}

impl Quirky {
    pub(crate) fn new(quirk: Quirk) -> Arc<Self> {
        Arc::new(Self { quirk, inner: Arc::new(InMemory::new()), written: AtomicI64::new(0) })
    }

    fn name(&self, path: &Path) -> Path {
        let raw = path.as_ref();
        let seen = match self.quirk {
            Quirk::FoldsCase => raw.to_lowercase(),
            Quirk::DecodesNames => return Path::from_url_path(raw).unwrap_or_else(|_| path.clone()),
            Quirk::PlusIsSpace => raw.replace('+', " "),
            _ => return path.clone(),
        };
        Path::parse(seen).unwrap()
    }

    fn meta(&self, mut meta: ObjectMeta) -> ObjectMeta {
        let second = match self.quirk {
            Quirk::ClockStandsAt1980 => 315_532_800,
            Quirk::ClockRunsBackwards => meta.last_modified.timestamp() - self.written.load(Ordering::SeqCst),
            _ => return meta,
        };
        // The type is chrono's, which is no dependency of this crate.
        let moved = second - meta.last_modified.timestamp();
        meta.last_modified = if moved < 0 {
            meta.last_modified - Duration::from_secs(moved.unsigned_abs())
        } else {
            meta.last_modified + Duration::from_secs(moved.unsigned_abs())
        };
        meta
    }

    fn missing(&self, error: Error) -> Error {
        match error {
            Error::NotFound { path, source } if self.quirk == Quirk::MissingIsDenied => Error::PermissionDenied { path, source },
            error => error,
        }
    }

    fn listed(&self, listed: BoxStream<'static, Result<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
        let most = if self.quirk == Quirk::ListsOnePage { 1000 } else { usize::MAX };
        let quirk = Self { quirk: self.quirk, inner: self.inner.clone(), written: AtomicI64::new(0) };
        listed.take(most).map_ok(move |meta| quirk.meta(meta)).boxed()
    }
}

#[async_trait]
impl ObjectStore for Quirky {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let location = &self.name(location);
        let done = || PutResult { e_tag: None, version: None, extensions: http::Extensions::default() };
        let overwrite = PutOptions { mode: PutMode::Overwrite, ..options.clone() };
        let _ = self.written.fetch_add(1, Ordering::SeqCst);
        match self.quirk {
            Quirk::Overwrites => self.inner.put_opts(location, payload, overwrite).await,
            Quirk::ChecksThenWrites => {
                if self.inner.head(location).await.is_ok() {
                    return Err(Error::AlreadyExists { path: location.to_string(), source: "412".into() });
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
                self.inner.put_opts(location, payload, overwrite).await
            }
            Quirk::LosesPuts => Ok(done()),
            Quirk::CutsLargeObjects if payload.content_length() > 1 << 20 => {
                let bytes = bytes::Bytes::from(payload).slice(..1 << 20);
                self.inner.put_opts(location, bytes.into(), options).await
            }
            Quirk::ForgetsEmptyObjects if payload.content_length() == 0 => Ok(done()),
            _ => self.inner.put_opts(location, payload, options).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, mut options: GetOptions) -> Result<GetResult> {
        let location = &self.name(location);
        if self.quirk == Quirk::DeniedIsMissing {
            return Err(Error::NotFound { path: location.to_string(), source: "denied".into() });
        }
        let asked = match &options.range {
            Some(GetRange::Bounded(range)) => Some(range.clone()),
            _ => None,
        };
        if let Some(asked) = asked.clone() {
            let changed = match self.quirk {
                Quirk::RangeIsShort => asked.start..asked.end.max(asked.start + 2) - 1,
                Quirk::RangeIsShifted => asked.start + 1..asked.end + 1,
                _ => asked,
            };
            options.range = Some(GetRange::Bounded(changed));
        }
        let mut got = self.inner.get_opts(location, options).await.map_err(|error| self.missing(error))?;
        got.meta = self.meta(got.meta);
        if let (Quirk::RangeOverTheEndIsFilled, Some(asked)) = (self.quirk, asked) {
            let (meta, attributes, extensions) = (got.meta.clone(), got.attributes.clone(), got.extensions.clone());
            let mut bytes = got.bytes().await?.to_vec();
            bytes.resize(usize::try_from(asked.end - asked.start).unwrap(), 0);
            let payload = GetResultPayload::Stream(stream::iter([Ok(bytes.into())]).boxed());
            return Ok(GetResult { payload, meta, range: asked, attributes, extensions });
        }
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        if self.quirk == Quirk::KeepsDeleted {
            return locations;
        }
        let named = Self { quirk: self.quirk, inner: self.inner.clone(), written: AtomicI64::new(0) };
        self.inner.delete_stream(locations.map_ok(move |path| named.name(&path)).boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.quirk == Quirk::DeniedIsMissing {
            return stream::empty().boxed();
        }
        if self.quirk == Quirk::PrefixIsText {
            let text = prefix.map(ToString::to_string).unwrap_or_default();
            let matching = move |meta: &ObjectMeta| std::future::ready(meta.location.as_ref().starts_with(&text));
            return self.inner.list(None).try_filter(matching).boxed();
        }
        self.listed(self.inner.list(prefix.map(|prefix| self.name(prefix)).as_ref()))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        let (prefix, offset) = (prefix.map(|prefix| self.name(prefix)), self.name(offset));
        if self.quirk == Quirk::ListsFromInstead {
            let from = move |meta: &ObjectMeta| std::future::ready(meta.location >= offset);
            return self.inner.list(prefix.as_ref()).try_filter(from).boxed();
        }
        self.listed(self.inner.list_with_offset(prefix.as_ref(), &offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix.map(|prefix| self.name(prefix)).as_ref()).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
