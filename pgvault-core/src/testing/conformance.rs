//! Everything that pgvault relies on in a store, asked of a store.
//!
//! Whoever wants to keep a vault in a store that was not tested with pgvault can ask it first. Ten lines do it:
//!
//! ```no_run
//! use pgvault_core::env::Env;
//! use pgvault_core::store::{Settings, Store};
//! use pgvault_core::testing::conformance::Suite;
//!
//! #[tokio::test]
//! async fn my_store_holds_vaults() {
//!     let store = Store::open("s3://my-bucket/conformance", Settings::default()).unwrap();
//!     let report = Suite::new(store).run(&Env::default()).await.unwrap();
//!     assert!(report.is_ok(), "{report}");
//! }
//! ```
//!
//! The suite begins with [`probe`](crate::store::probe), which is what `pgvault init` asks, and goes on to what takes longer: many
//! racers, many keys, large objects, hostile names, a second client. Each [`Check`] has a name; a report is printed with
//! `{}` and serialises. Whatever it makes lies below `conformance/` and a name that nobody else has, and is deleted at the end.
//!
//! What is required, in short: a PUT of a name that exists is refused, atomically; what a PUT acknowledged is found by every GET
//! and every listing that begins later, from any client; ranges are exact; names are bytes; a missing object is said to be
//! missing, and nothing else is.

use std::fmt;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};

use crate::Result;
use crate::env::Env;
use crate::store::Store;
use crate::store::probe::{CREATE_ONLY, DELETION, LISTING, Question, RACE, RANGES, Seen, probe, race};
pub use crate::store::probe::{Check, Outcome, ProbeReport as Report};

mod listings;
mod names;
mod objects;

/// Makes a store with credentials that are wrong or expired, for the same place.
type Stranger = Box<dyn Fn() -> Result<Store> + Send + Sync>;

/// What to ask, and of which store.
pub struct Suite {
    store: Store,
    second: Option<Store>,
    denied: Option<Stranger>,
    keys: usize,
    concurrency: usize,
    racers: usize,
    rounds: usize,
    large: usize,
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suite").field("store", &self.store).field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// Where a check works and with what.
pub(super) struct Room<'a> {
    suite: &'a Suite,
    /// A prefix of the check's own, without a slash at its end.
    folder: String,
}

impl Room<'_> {
    fn store(&self) -> &Store {
        &self.suite.store
    }

    /// Another client of the same store.
    fn second(&self) -> &Store {
        self.suite.second.as_ref().unwrap_or(&self.suite.store)
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn prefix(&self) -> String {
        format!("{}/", self.folder)
    }
}

const REPEATED: Question = Question {
    name: "repeated_put",
    code: "store.repeated_put",
    fix: "a PUT that is repeated after a lost answer must find its own bytes",
};
const DELETE_CREATE: Question = Question { name: "delete_create", ..DELETION };
const EMPTY: Question =
    Question { name: "empty_object", code: "store.empty", fix: "objects without bytes must be objects like any other" };
const LARGE: Question = Question {
    name: "large_object",
    code: "store.large",
    fix: "one PUT must take an object of 64 MiB: raise the limits of proxies in front of the store (nginx: client_max_body_size)",
};
const EDGES: Question = Question { name: "range_edges", ..RANGES };
const FRESH: Question = Question { name: "list_after_write", ..LISTING };
const PREFIXES: Question = Question {
    name: "list_prefix",
    code: "store.listing",
    fix: "a listing of a folder must show all that is in it and nothing else",
};
const OFFSETS: Question = Question {
    name: "list_offset",
    code: "store.listing",
    fix: "a listing after a name must begin with the first name behind it, whether or not that name exists",
};
const LEVELS: Question =
    Question { name: "list_levels", code: "store.listing", fix: "a listing with a delimiter must name each folder once" };
const MANY: Question = Question {
    name: "many_keys",
    code: "store.listing",
    fix: "listings of more than a page must be complete; look for proxies that cut them",
};
const NAMES: Question = Question {
    name: "names",
    code: "store.names",
    fix: "names are bytes: look for a proxy that decodes, folds or normalises paths, or a file system that does not tell upper from lower case",
};
const SECOND: Question = Question { name: "second_client", ..LISTING };
const TIMES: Question = Question {
    name: "server_times",
    code: "store.times",
    fix: "retention goes by the times that the store gives its objects: set the clocks of its machines, and keep them set",
};
const DENIED: Question = Question {
    name: "denied",
    code: "store.absence",
    fix: "wrong credentials must be answered with 401 or 403: to a server in recovery, a missing object means the end of its WAL",
};
const CLEANUP: Question = Question { name: "cleanup", ..DELETION };

impl Suite {
    /// The suite for this store, with a few thousand keys: a minute against a server on the same machine.
    pub fn new(store: Store) -> Self {
        Self { store, second: None, denied: None, keys: 2500, concurrency: 32, racers: 32, rounds: 8, large: 64 << 20 }
    }

    /// With another client of the same place: another connection, another process, another machine.
    #[must_use]
    pub fn second(mut self, store: Store) -> Self {
        self.second = Some(store);
        self
    }

    /// With what makes a store of the same place whose credentials are wrong or have expired.
    #[must_use]
    pub fn denied(mut self, store: impl Fn() -> Result<Store> + Send + Sync + 'static) -> Self {
        self.denied = Some(Box::new(store));
        self
    }

    /// With so many objects in one folder; 100,000 is what a year of WAL makes.
    #[must_use]
    pub fn keys(mut self, keys: usize) -> Self {
        self.keys = keys;
        self
    }

    /// With so many requests at once, where many are made.
    #[must_use]
    pub fn concurrency(mut self, requests: usize) -> Self {
        self.concurrency = requests.max(1);
        self
    }

    /// With so many writers of one name at once, so many times.
    #[must_use]
    pub fn racers(mut self, racers: usize, rounds: usize) -> Self {
        (self.racers, self.rounds) = (racers.max(2), rounds.max(1));
        self
    }

    /// With a large object of so many bytes; pgvault's own are 64 MiB at most.
    #[must_use]
    pub fn large(mut self, bytes: usize) -> Self {
        self.large = bytes.max(32);
        self
    }

    /// Asks.
    ///
    /// # Errors
    /// When the store could not be asked: it cannot be reached, or fails in a way that may pass.
    pub async fn run(&self, env: &Env) -> Result<Report> {
        let began = tokio::time::Instant::now();
        let mut report = probe(&self.store, env).await?;
        let home = format!("conformance/{}", env.new_id()?);
        let asked = self.ask(env, &home, &mut report).await;
        // Whatever was found out: what the suite made is removed again.
        let cleaned = self.clean(&home).await;
        asked?;
        CLEANUP.note(&mut report, cleaned)?;
        report.milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(report)
    }

    async fn ask(&self, env: &Env, home: &str, report: &mut Report) -> Result<()> {
        let room = |question: Question| Room { suite: self, folder: format!("{home}/{}", question.name) };
        let racing = Question { name: "create_only_32", ..RACE };
        racing.note(report, self.races(&room(racing)).await)?;
        let settled = Question { name: "create_only_edges", ..CREATE_ONLY };
        settled.note(report, objects::create_edges(&room(settled)).await)?;
        REPEATED.note(report, objects::repeated(&room(REPEATED)).await)?;
        EMPTY.note(report, objects::empty(&room(EMPTY)).await)?;
        LARGE.note(report, objects::large(&room(LARGE), self.large).await)?;
        EDGES.note(report, objects::edges(&room(EDGES)).await)?;
        FRESH.note(report, listings::fresh(&room(FRESH)).await)?;
        PREFIXES.note(report, listings::prefixes(&room(PREFIXES)).await)?;
        OFFSETS.note(report, listings::offsets(&room(OFFSETS)).await)?;
        LEVELS.note(report, listings::levels(&room(LEVELS)).await)?;
        MANY.note(report, listings::many(&room(MANY), self.keys, self.concurrency).await)?;
        NAMES.note(report, names::hostile(&room(NAMES)).await)?;
        SECOND.note(report, objects::second_client(&room(SECOND)).await)?;
        TIMES.note(report, objects::times(&room(TIMES), env).await)?;
        DELETE_CREATE.note(report, objects::delete_create(&room(DELETE_CREATE), report.may_delete).await)?;
        DENIED.note(report, objects::denied(&room(DENIED), self.denied.as_ref()).await)
    }

    async fn races(&self, room: &Room<'_>) -> Seen {
        let names: Vec<String> = (0..self.rounds).map(|round| room.name(&format!("{round}"))).collect();
        race(room.store(), &names, self.racers).await
    }

    /// Deletes what the suite made, where that is allowed.
    async fn clean(&self, home: &str) -> Seen {
        use crate::ErrorKind;
        use crate::store::probe::Miss;
        let made = self.store.list(&format!("{home}/")).await?;
        let count = made.len();
        let deleted = stream::iter(made)
            .map(|object| async move { self.store.delete(&object.name).await })
            .buffer_unordered(self.concurrency)
            .try_collect::<Vec<()>>();
        match deleted.await {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Immutable | ErrorKind::Failed) => {
                return Err(Miss::Skip(format!("these credentials may not delete: {count} objects stay below {home}/")));
            }
            Err(error) => return Err(error.into()),
        }
        let left = self.store.list(&format!("{home}/")).await?.len();
        if left == 0 {
            Ok(format!("{count} objects were deleted"))
        } else {
            Err(Miss::Wrong(format!("{left} of {count} deleted objects are still listed")))
        }
    }
}

/// How long a refusal may take: one that is for good is not asked for again.
const AT_ONCE: Duration = Duration::from_secs(2);
