//! A store in front of which every request waits until it is let through: one at a time, in the order that the test chooses.

use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use jiff::{SignedDuration, Timestamp};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};
use pgvault_core::clock::{Clock, FixedClock};
use tokio::sync::oneshot;

type Waiting = Arc<Mutex<Vec<(usize, Option<Timestamp>, oneshot::Sender<()>)>>>;
type Sleeping = Arc<Mutex<Vec<(Timestamp, usize, oneshot::Sender<()>)>>>;

/// What a writer has between its look at its deadline and its commit, two requests, is an hour in all: the length of a request and of
/// its repetitions is bounded, while a program may stand still anywhere else for as long as it likes.
const URGENT: SignedDuration = SignedDuration::from_mins(25);

/// See the [module documentation](self). Clones of one program share its number.
#[derive(Clone)]
pub(crate) struct Turnstile {
    inner: Arc<dyn ObjectStore>,
    waiting: Waiting,
    sleeping: Sleeping,
    clock: Arc<FixedClock>,
    program: usize,
}

impl fmt::Debug for Turnstile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turnstile")
    }
}

impl fmt::Display for Turnstile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Turnstile({})", self.inner)
    }
}

impl Turnstile {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, clock: Arc<FixedClock>) -> Self {
        Self { inner, waiting: Arc::default(), sleeping: Arc::default(), clock, program: 0 }
    }

    /// The same turnstile for another program, with another store behind it.
    pub(crate) fn of(&self, program: usize, inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, waiting: self.waiting.clone(), sleeping: self.sleeping.clone(), clock: self.clock.clone(), program }
    }

    /// The programs of the requests that wait.
    pub(crate) fn waiting(&self) -> Vec<usize> {
        let mut waiting = self.waiting.lock().unwrap();
        // A program that died waits no longer.
        waiting.retain(|(.., sender)| !sender.is_closed());
        waiting.iter().map(|(program, ..)| *program).collect()
    }

    /// The number of one that must not wait until `then`.
    pub(crate) fn overdue(&self, then: Timestamp) -> Option<usize> {
        self.waiting.lock().unwrap().iter().position(|(_, latest, _)| latest.is_some_and(|latest| latest < then))
    }

    /// Lets one through.
    pub(crate) fn release(&self, number: usize) {
        let (.., sender) = self.waiting.lock().unwrap().remove(number);
        let _ = sender.send(());
    }

    /// Returns when the test's clock shows `until`.
    pub(crate) async fn sleep(&self, until: Timestamp) {
        let (sender, receiver) = oneshot::channel();
        self.sleeping.lock().unwrap().push((until, self.program, sender));
        let _ = receiver.await;
    }

    /// Wakes whoever slept until `now`; tells when the next one wakes.
    pub(crate) fn wake(&self, now: Timestamp) -> Option<Timestamp> {
        let mut sleeping = self.sleeping.lock().unwrap();
        sleeping.retain(|(.., sender)| !sender.is_closed());
        sleeping.sort_by_key(|(until, ..)| *until);
        let due = sleeping.iter().take_while(|(until, ..)| *until <= now).count();
        for (.., sender) in sleeping.drain(..due) {
            let _ = sender.send(());
        }
        sleeping.first().map(|(until, ..)| *until)
    }

    /// The programs that sleep.
    pub(crate) fn sleeping(&self) -> Vec<usize> {
        self.sleeping.lock().unwrap().iter().filter(|(.., sender)| !sender.is_closed()).map(|(_, program, _)| *program).collect()
    }

    /// A collector asks for 256 shards, most of them empty: of these a few wait.
    fn is_free(prefix: Option<&Path>) -> bool {
        let parts: Vec<_> = prefix.into_iter().flat_map(Path::parts).collect();
        parts.len() == 4 && parts[2].as_ref() == "pack" && !parts[3].as_ref().ends_with('7')
    }

    async fn pass(&self) {
        self.pass_until(None).await;
    }

    async fn pass_soon(&self) {
        self.pass_until(Some(self.clock.now() + URGENT)).await;
    }

    async fn pass_until(&self, latest: Option<Timestamp>) {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().push((self.program, latest, sender));
        let _ = receiver.await;
    }
}

#[async_trait]
impl ObjectStore for Turnstile {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if location.as_ref().contains("/snap/") {
            self.pass_soon().await;
        } else {
            self.pass().await;
        }
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented { operation: format!("put_multipart {location}"), implementer: self.to_string() })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if options.head && location.as_ref().contains("/session/") {
            self.pass_soon().await;
        } else {
            self.pass().await;
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        async move {
            this.pass().await;
            this.inner.delete_stream(locations)
        }
        .flatten_stream()
        .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        async move {
            if !Self::is_free(prefix.as_ref()) {
                this.pass().await;
            }
            this.inner.list(prefix.as_ref())
        }
        .flatten_stream()
        .boxed()
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix, offset) = (self.clone(), prefix.cloned(), offset.clone());
        async move {
            this.pass().await;
            this.inner.list_with_offset(prefix.as_ref(), &offset)
        }
        .flatten_stream()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.pass().await;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.pass().await;
        self.inner.copy_opts(from, to, options).await
    }
}
