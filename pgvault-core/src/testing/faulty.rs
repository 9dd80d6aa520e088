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
//! Or it follows a [`Schedule`] ([`FaultyStore::follow`]). It can also stop at its k-th call until it is told to go on
//! ([`FaultyStore::hold`]), so that a test can run another program in between: every interleaving of two programs with one
//! change of hands each way.
//!
//! Two things are no faults, but what some stores are like all the time: a [`Pace`], and a [`Lag`] until others see what was
//! written. pgvault needs a store where a listing that begins after a PUT has ended shows its object, and a GET finds it: it
//! decides by listings what was never stored. So one with a lag is not survived but refused, by `init` and by
//! [`conformance`](super::conformance).
//!
//! What a `FaultyStore` never does is leave half an object behind: a PUT of one object is atomic in every store that pgvault
//! supports.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::Notify;

use super::Schedule;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// A GET gives half of its body and says that this is all, although it has announced the whole; any other request is a
    /// [`Fault::Fail`].
    Short,
    /// The request is carried out twice, as by somebody in between who repeats what was not answered soon enough. The second
    /// answer is the one that is seen.
    Duplicate,
    /// The answer takes as long as [`FaultyStore::with_slowness`] says.
    Slow,
    /// The store asks for fewer requests, as S3 with 503 and `SlowDown`; no effect.
    Throttle,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::Fail, Self::Deny, Self::Hang, Self::Lie, Self::Tear, Self::Short, Self::Duplicate, Self::Slow, Self::Throttle];

    /// True when an operation succeeds however many of its requests this happens to.
    pub fn is_harmless(self) -> bool {
        matches!(self, Self::Duplicate | Self::Slow)
    }
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

/// For how many calls a new object is not seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lag {
    /// Everybody sees it at once.
    #[default]
    None,
    /// Listings do not show it for so many calls.
    Listings(usize),
    /// Listings do not show it and reads do not find it for so many calls.
    Everything(usize),
}

/// How fast every request is, without any fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pace {
    /// Added to every request.
    pub latency: Duration,
    /// Bytes of objects that one request moves in a second.
    pub bytes_per_second: Option<u64>,
}

impl Pace {
    fn of(self, bytes: u64) -> Duration {
        let moving = self.bytes_per_second.map(|rate| u128::from(bytes) * 1_000_000 / u128::from(rate.max(1)));
        self.latency + Duration::from_micros(moving.map_or(0, |micros| u64::try_from(micros).unwrap_or(u64::MAX)))
    }
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
    schedule: Option<Schedule>,
    hold: Option<usize>,
    happened: BTreeMap<Fault, usize>,
    /// Objects that are not seen yet, and until which call.
    hidden: HashMap<String, usize>,
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

/// An object store that fails when it is told to; see the [module documentation](self).
#[derive(Debug, Clone)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    order: ListOrder,
    lag: Lag,
    pace: Pace,
    slowness: Duration,
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
        Self {
            inner,
            order: ListOrder::Natural,
            lag: Lag::None,
            pace: Pace::default(),
            slowness: Duration::from_millis(5),
            state: Arc::default(),
            gate: Arc::default(),
        }
    }

    /// The same store with another order of its listings.
    #[must_use]
    pub fn with_order(mut self, order: ListOrder) -> Self {
        self.order = order;
        self
    }

    /// The same store, where new objects are seen later.
    #[must_use]
    pub fn with_lag(mut self, lag: Lag) -> Self {
        self.lag = lag;
        self
    }

    /// The same store at another speed.
    #[must_use]
    pub fn with_pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// The same store, with so much time for a [`Fault::Slow`].
    #[must_use]
    pub fn with_slowness(mut self, slowness: Duration) -> Self {
        self.slowness = slowness;
        self
    }

    /// Counts from here on: the `at`-th call (the first is 1) fails, and with `onwards` every one after it.
    pub fn inject(&self, fault: Fault, at: usize, onwards: bool) {
        let mut state = self.state();
        state.calls.clear();
        state.hidden.clear();
        state.injection = Some(Injection { fault, at, onwards });
    }

    /// Counts from here on, and fails as the schedule says.
    pub fn follow(&self, schedule: Schedule) {
        *self.state() = State { schedule: Some(schedule), ..State::default() };
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

    /// Works again from here on, counts from zero and hides nothing any more.
    pub fn heal(&self) {
        *self.state() = State::default();
    }

    /// The calls since the last [`FaultyStore::inject`], [`FaultyStore::follow`] or [`FaultyStore::heal`], as `put c/x`.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    /// How often each fault has happened since the last [`FaultyStore::follow`] or [`FaultyStore::heal`].
    pub fn happened(&self) -> BTreeMap<Fault, usize> {
        self.state().happened.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a call; tells what is to happen to it.
    fn call(&self, what: &str, on: &str) -> Order {
        let mut state = self.state();
        state.calls.push(format!("{what} {on}"));
        let number = state.calls.len();
        let injected = state.injection.filter(|i| number == i.at || (i.onwards && number > i.at)).map(|i| i.fault);
        let fault = injected.or_else(|| state.schedule.as_mut().and_then(|schedule| schedule.next(what)));
        if let Some(fault) = fault {
            *state.happened.entry(fault).or_default() += 1;
        }
        Order { fault, held: state.hold == Some(number) }
    }

    /// Waits where the call is held, and as long as the store is slow.
    async fn pass(&self, order: Order, bytes: u64) {
        if order.held {
            self.gate.reached.notify_one();
            self.gate.released.notified().await;
        }
        let slowness = if order.fault == Some(Fault::Slow) { self.slowness } else { Duration::ZERO };
        let pause = self.pace.of(bytes) + slowness;
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }

    /// Carries out a request, or what is to happen instead.
    async fn run<T, F>(&self, order: Order, path: &str, bytes: u64, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        self.pass(order, bytes).await;
        match order.fault {
            None | Some(Fault::Slow) => request().await,
            Some(Fault::Duplicate) => {
                let _ = request().await;
                request().await
            }
            Some(Fault::Lie) => {
                let _ = request().await;
                Err(error(Fault::Lie, path))
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(fault) => Err(error(fault, path)),
        }
    }

    fn hide(&self, location: &Path) {
        if let Lag::Listings(calls) | Lag::Everything(calls) = self.lag {
            let mut state = self.state();
            let until = state.calls.len() + calls;
            let _ = state.hidden.insert(location.to_string(), until);
        }
    }

    fn is_hidden(&self, location: &Path) -> bool {
        let state = self.state();
        state.hidden.get(location.as_ref()).is_some_and(|until| state.calls.len() <= *until)
    }

    fn find(&self, location: &Path) -> Result<()> {
        if matches!(self.lag, Lag::Everything(_)) && self.is_hidden(location) {
            return Err(Error::NotFound { path: location.to_string(), source: "not seen yet".into() });
        }
        Ok(())
    }

    fn listing(&self, order: Order, prefix: &str, list: impl FnOnce() -> Listing + Send + 'static) -> Listing {
        let (this, prefix) = (self.clone(), prefix.to_owned());
        let passed = async move {
            this.pass(order, 0).await;
            let seen = this.clone();
            let listed = list().try_filter(move |meta| std::future::ready(!seen.is_hidden(&meta.location)));
            this.listed(order.fault, &prefix, listed.boxed())
        };
        passed.flatten_stream().boxed()
    }

    fn listed(&self, fault: Option<Fault>, prefix: &str, listed: Listing) -> Listing {
        match fault.filter(|fault| !fault.is_harmless()) {
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
            Some(fault @ (Fault::Tear | Fault::Short | Fault::Lie)) => {
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

    /// A GET whose body ends in its middle, with an error or without.
    async fn half(&self, order: Order, fault: Fault, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.pass(order, 0).await;
        let got = self.inner.get_opts(location, options).await?;
        let (meta, range, attributes, extensions) =
            (got.meta.clone(), got.range.clone(), got.attributes.clone(), got.extensions.clone());
        let whole = got.bytes().await?;
        let mut body = vec![Ok(whole.slice(..whole.len() / 2))];
        if fault == Fault::Tear {
            body.push(Err(error(fault, location.as_ref())));
        }
        Ok(GetResult { payload: GetResultPayload::Stream(stream::iter(body).boxed()), meta, range, attributes, extensions })
    }
}

type Listing = BoxStream<'static, Result<ObjectMeta>>;

fn error(fault: Fault, path: &str) -> Error {
    match fault {
        Fault::Deny => Error::PermissionDenied { path: path.to_owned(), source: "injected".into() },
        Fault::Throttle => Error::Generic {
            store: "faulty",
            source: format!("injected: 503 Service Unavailable: SlowDown: Please reduce your request rate. ({path})").into(),
        },
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
        let request = || {
            let (payload, options) = (payload.clone(), options.clone());
            async move {
                let put = self.inner.put_opts(location, payload, options).await?;
                self.hide(location);
                Ok(put)
            }
        };
        self.run(order, location.as_ref(), payload.content_length() as u64, request).await
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        // pgvault never uses it: a multipart upload cannot be create-only.
        Err(Error::NotImplemented { operation: format!("put_multipart {location}"), implementer: self.to_string() })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let what = if options.head { "head" } else { "get" };
        let order = self.call(what, location.as_ref());
        if let (Some(fault @ (Fault::Tear | Fault::Short)), false) = (order.fault, options.head) {
            return self.half(order, fault, location, options).await;
        }
        let request = || {
            let options = options.clone();
            async move {
                self.find(location)?;
                self.inner.get_opts(location, options).await
            }
        };
        let got = self.run(order, location.as_ref(), 0, request).await?;
        if self.pace.bytes_per_second.is_some() && what == "get" {
            let moved = Pace { latency: Duration::ZERO, ..self.pace }.of(got.range.end.saturating_sub(got.range.start));
            tokio::time::sleep(moved).await;
        }
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .then(move |location| {
                let this = this.clone();
                async move {
                    let location = location?;
                    let order = this.call("delete", location.as_ref());
                    this.run(order, location.as_ref(), 0, || this.inner.delete(&location)).await?;
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
        let mut listed = self.run(order, &name, 0, || self.inner.list_with_delimiter(prefix)).await?;
        listed.objects.retain(|meta| !self.is_hidden(&meta.location));
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let order = self.call("copy", to.as_ref());
        self.run(order, to.as_ref(), 0, || self.inner.copy_opts(from, to, options.clone())).await
    }
}
