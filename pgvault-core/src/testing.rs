//! A store that fails on purpose: how the promises about crashes are kept.
//!
//! An object store fails in few ways, each at the worst moment. The request is refused. The answer never comes. The
//! answer is an error although the request was carried out. The body of a GET breaks off. The process dies, which looks
//! to the store as if every request from then on were never made. [`FaultyStore`] does each of these at its k-th call, so
//! that a test can run an operation once for every k there is and look at what is left:
//!
//! ```
//! # use std::sync::Arc;
//! # use pgvault_core::testing::{Fault, FaultyStore, Objects, from_objects, objects_of};
//! # use pgvault_core::store::{Store, StoreOptions};
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let options = StoreOptions { attempts: 2, ..StoreOptions::default() };
//! let healthy = from_objects(&Objects::new()).await;
//! let faulty = Arc::new(FaultyStore::new(healthy.clone()));
//! // The answer to the first request is lost; the object is there all the same, and the store finds out.
//! faulty.inject(Fault::Lie, 1, false);
//! let store = Store::new(faulty, "memory:///", options);
//! assert!(store.put_once("c/x", bytes::Bytes::from_static(b"x")).await.is_ok());
//! assert_eq!(objects_of(&*healthy).await["c/x"], "x");
//! # });
//! ```
//!
//! It can also stop at its k-th call until it is told to go on ([`FaultyStore::hold`]), so that a test can run another program
//! in between: every interleaving of two programs with one change of hands each way.
//!
//! What it never does is leave half an object behind: a PUT of one object is atomic in every store that pgvault supports.
//!
//! Nothing here is part of a release: the module exists with the feature `testing` only.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::Notify;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The request fails in a way that may pass, and has no effect.
    Fail,
    /// The request is refused for good, and has no effect.
    Deny,
    /// The answer never comes, and the request has no effect.
    Hang,
    /// The request is carried out, and reported as failed.
    Lie,
    /// A GET breaks off in the middle of its body; any other request is a [`Fault::Fail`].
    Tear,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fail, Self::Deny, Self::Hang, Self::Lie, Self::Tear];
}

/// In which order a listing comes. Stores promise none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ListOrder {
    /// As the store underneath gives it.
    #[default]
    Natural,
    /// Last name first.
    Reversed,
    /// Any, but the same one for the same seed.
    Shuffled(u64),
}

#[derive(Debug, Clone, Copy)]
struct Injection {
    fault: Fault,
    at: usize,
    onwards: bool,
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<String>,
    injection: Option<Injection>,
    hold: Option<usize>,
}

/// Where a held call waits.
#[derive(Debug, Default)]
struct Gate {
    reached: Notify,
    released: Notify,
}

/// What is to happen to a call.
#[derive(Debug, Clone, Copy)]
struct Order {
    fault: Option<Fault>,
    held: bool,
}

/// An object store that fails at its k-th call; see the [module documentation](self).
#[derive(Debug, Clone)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    order: ListOrder,
    state: Arc<Mutex<State>>,
    gate: Arc<Gate>,
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

impl FaultyStore {
    /// A store that works, and counts.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, order: ListOrder::Natural, state: Arc::default(), gate: Arc::default() }
    }

    /// The same store with another order of its listings.
    #[must_use]
    pub fn with_order(mut self, order: ListOrder) -> Self {
        self.order = order;
        self
    }

    /// Counts from here on: the `at`-th call (the first is 1) fails, and with `onwards` every one after it.
    pub fn inject(&self, fault: Fault, at: usize, onwards: bool) {
        let mut state = self.state();
        state.calls.clear();
        state.injection = Some(Injection { fault, at, onwards });
    }

    /// The `at`-th call from the last [`FaultyStore::inject`] or [`FaultyStore::heal`] on waits, before it has any effect,
    /// until [`FaultyStore::release`].
    pub fn hold(&self, at: usize) {
        self.state().hold = Some(at);
    }

    /// Returns when the held call has been reached.
    pub async fn held(&self) {
        self.gate.reached.notified().await;
    }

    /// Lets the held call go on.
    pub fn release(&self) {
        self.gate.released.notify_one();
    }

    /// Works again from here on, and counts from zero.
    pub fn heal(&self) {
        *self.state() = State::default();
    }

    /// The calls since the last [`FaultyStore::inject`] or [`FaultyStore::heal`], as `put c/x`.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a call; tells what is to happen to it.
    fn call(&self, what: &str, on: &str) -> Order {
        let mut state = self.state();
        state.calls.push(format!("{what} {on}"));
        let number = state.calls.len();
        let fault = state.injection.filter(|i| number == i.at || (i.onwards && number > i.at)).map(|i| i.fault);
        Order { fault, held: state.hold == Some(number) }
    }

    /// Waits where the call is held.
    async fn pass(&self, order: Order) {
        if order.held {
            self.gate.reached.notify_one();
            self.gate.released.notified().await;
        }
    }

    /// Carries out a request, or what is to happen instead.
    async fn run<T>(&self, order: Order, path: &str, request: impl Future<Output = Result<T>>) -> Result<T> {
        self.pass(order).await;
        match order.fault {
            None => request.await,
            Some(Fault::Lie) => {
                let _ = request.await;
                Err(error(Fault::Lie, path))
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, path)),
        }
    }

    fn listing(&self, order: Order, prefix: &str, list: impl FnOnce() -> Listing + Send + 'static) -> Listing {
        let (this, prefix) = (self.clone(), prefix.to_owned());
        let passed = async move {
            this.pass(order).await;
            this.listed(order.fault, &prefix, list())
        };
        passed.flatten_stream().boxed()
    }

    fn listed(&self, fault: Option<Fault>, prefix: &str, listed: Listing) -> Listing {
        match fault {
            None if self.order == ListOrder::Natural => listed,
            None => {
                let order = self.order;
                let sorted = listed.try_collect::<Vec<_>>().map_ok(move |mut metas| {
                    metas.sort_by(|a, b| a.location.cmp(&b.location));
                    match order {
                        ListOrder::Natural => {}
                        ListOrder::Reversed => metas.reverse(),
                        ListOrder::Shuffled(seed) => metas.sort_by_cached_key(|m| mix(seed, m.location.as_ref())),
                    }
                    stream::iter(metas.into_iter().map(Ok))
                });
                sorted.try_flatten_stream().boxed()
            }
            Some(Fault::Hang) => stream::pending().boxed(),
            // Half a listing is the worst: what was seen must not be taken for all there is.
            Some(fault @ (Fault::Tear | Fault::Lie)) => {
                let failure = error(fault, prefix);
                listed
                    .collect::<Vec<_>>()
                    .map(|mut metas| {
                        metas.truncate(metas.len() / 2);
                        metas.push(Err(failure));
                        stream::iter(metas)
                    })
                    .flatten_stream()
                    .boxed()
            }
            Some(fault) => stream::iter([Err(error(fault, prefix))]).boxed(),
        }
    }
}

type Listing = BoxStream<'static, Result<ObjectMeta>>;

fn error(fault: Fault, path: &str) -> Error {
    match fault {
        Fault::Deny => Error::PermissionDenied { path: path.to_owned(), source: "injected".into() },
        _ => Error::Generic { store: "faulty", source: format!("injected: {fault:?} at {path}").into() },
    }
}

/// FNV-1a, seeded: a stable shuffle without another dependency.
fn mix(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let order = self.call("put", location.as_ref());
        self.run(order, location.as_ref(), self.inner.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        // pgvault never uses it: a multipart upload cannot be create-only.
        Err(Error::NotImplemented { operation: format!("put_multipart {location}"), implementer: self.to_string() })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let what = if options.head { "head" } else { "get" };
        let order = self.call(what, location.as_ref());
        if order.fault != Some(Fault::Tear) || options.head {
            return self.run(order, location.as_ref(), self.inner.get_opts(location, options)).await;
        }
        self.pass(order).await;
        let got = self.inner.get_opts(location, options).await?;
        let (meta, range, attributes, extensions) =
            (got.meta.clone(), got.range.clone(), got.attributes.clone(), got.extensions.clone());
        let whole = got.bytes().await?;
        let half = whole.slice(..whole.len() / 2);
        let body = stream::iter([Ok(half), Err(error(Fault::Tear, location.as_ref()))]);
        Ok(GetResult { payload: GetResultPayload::Stream(body.boxed()), meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .then(move |location| {
                let this = this.clone();
                async move {
                    let location = location?;
                    let order = this.call("delete", location.as_ref());
                    this.run(order, location.as_ref(), this.inner.delete(&location)).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> Listing {
        let name = prefix.map(ToString::to_string).unwrap_or_default();
        let order = self.call("list", &name);
        let (inner, prefix) = (self.inner.clone(), prefix.cloned());
        self.listing(order, &name, move || inner.list(prefix.as_ref()))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> Listing {
        let name = prefix.map(ToString::to_string).unwrap_or_default();
        let order = self.call("list", &name);
        let (inner, prefix, offset) = (self.inner.clone(), prefix.cloned(), offset.clone());
        self.listing(order, &name, move || inner.list_with_offset(prefix.as_ref(), &offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let name = prefix.map(ToString::to_string).unwrap_or_default();
        let order = self.call("list", &name);
        self.run(order, &name, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let order = self.call("copy", to.as_ref());
        self.run(order, to.as_ref(), self.inner.copy_opts(from, to, options)).await
    }
}

/// Everything in a store, by name.
pub type Objects = BTreeMap<String, Bytes>;

/// A store in memory that holds these objects. The bytes are shared, so a copy of a vault costs nothing.
///
/// # Panics
/// Never: memory does not fail.
pub async fn from_objects(objects: &Objects) -> Arc<InMemory> {
    let store = Arc::new(InMemory::new());
    for (name, bytes) in objects {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let put = store.put_opts(&Path::from(name.as_str()), PutPayload::from_bytes(bytes.clone()), options).await;
        assert!(put.is_ok(), "{name}: {put:?}");
    }
    store
}

/// Everything that a store holds.
///
/// # Panics
/// When the store fails; ask the healthy one underneath.
pub async fn objects_of(store: &dyn ObjectStore) -> Objects {
    let mut objects = Objects::new();
    let listed: Result<Vec<ObjectMeta>> = store.list(None).try_collect().await;
    assert!(listed.is_ok(), "{listed:?}");
    for meta in listed.unwrap_or_default() {
        let bytes = match store.get(&meta.location).await {
            Ok(got) => got.bytes().await,
            Err(error) => Err(error),
        };
        assert!(bytes.is_ok(), "{bytes:?}");
        let _ = objects.insert(meta.location.to_string(), bytes.unwrap_or_default());
    }
    objects
}
