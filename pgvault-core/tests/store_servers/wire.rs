//! A proxy between pgvault and a server: each way in which a connection goes wrong, for each kind of request.
//!
//! What must hold for all of them: what happens once is survived; what goes on ends with an error of the right kind, after a
//! bounded number of requests and within a bounded time, and never with "there is no such object" (T1); and what was
//! acknowledged is there, byte for byte.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use pgvault_core::store::{Put, Settings, Store, StoreOptions};
use pgvault_core::testing::proxy::{Canned, Proxy, Rule, Wire};
use pgvault_core::{ErrorKind, Result};
use pgvault_teststores::{Kind, Place, Server};

use crate::{runtime, settings};

/// Where everything fails, it shall fail soon.
pub(crate) fn impatient() -> StoreOptions {
    StoreOptions {
        attempts: 3,
        request_timeout: Duration::from_secs(4),
        backoff: Duration::from_millis(5),
        patience: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(2),
        first_byte_timeout: Duration::from_millis(700),
        idle_timeout: Duration::from_millis(700),
    }
}

/// Where one thing fails, a busy machine shall not make it two.
fn patient() -> StoreOptions {
    StoreOptions {
        attempts: 4,
        request_timeout: Duration::from_secs(20),
        first_byte_timeout: Duration::from_secs(3),
        idle_timeout: Duration::from_secs(3),
        ..impatient()
    }
}

/// A place in a server, directly and through a proxy.
pub(crate) struct Behind {
    pub(crate) proxy: Proxy,
    pub(crate) direct: Store,
    pub(crate) through: Store,
    place: Place,
}

impl Behind {
    pub(crate) async fn new(kind: Kind) -> Self {
        Self::with(kind, impatient()).await
    }

    pub(crate) async fn with(kind: Kind, options: StoreOptions) -> Self {
        let server = Server::shared(kind).unwrap();
        let place = server.place().unwrap();
        let proxy = Proxy::start(address(&server.info().endpoint)).await.unwrap();
        let endpoint = server.info().endpoint.replace(&authority(&server.info().endpoint), &proxy.address().to_string());
        let through = Settings { options, ..settings(&server, Some(&endpoint)) };
        let through = Store::open(&place.url(), through).unwrap();
        Self { direct: crate::open(&server, &place), through, proxy, place }
    }

    /// Removes what it holds.
    pub(crate) fn clear(&self) {
        self.place.clear().unwrap();
    }

    /// A place of its own and a client of its own, so that nothing is left over from another case.
    async fn fresh(kind: Kind, options: StoreOptions) -> Self {
        let behind = Self::with(kind, options).await;
        behind.direct.put_once("a/there", body()).await.unwrap();
        behind.direct.put_once("a/b/deeper", Bytes::from_static(b"x")).await.unwrap();
        behind
    }
}

fn authority(endpoint: &str) -> String {
    let url = url::Url::parse(endpoint).unwrap();
    format!("{}:{}", url.host_str().unwrap(), url.port().unwrap())
}

pub(crate) fn address(endpoint: &str) -> std::net::SocketAddr {
    std::net::ToSocketAddrs::to_socket_addrs(&authority(endpoint)).unwrap().find(std::net::SocketAddr::is_ipv4).unwrap()
}

fn body() -> Bytes {
    (0..200_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()
}

/// One request of each kind, and whether its answer is the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Put,
    PutTaken,
    Get,
    GetMissing,
    Range,
    Head,
    HeadMissing,
    List,
    Levels,
    Delete,
}

const ASKS: [Ask; 10] = [
    Ask::Put,
    Ask::PutTaken,
    Ask::Get,
    Ask::GetMissing,
    Ask::Range,
    Ask::Head,
    Ask::HeadMissing,
    Ask::List,
    Ask::Levels,
    Ask::Delete,
];

impl Ask {
    /// A HEAD's answer has no body, and so says nothing about why.
    fn is_head(self) -> bool {
        matches!(self, Self::Head | Self::HeadMissing)
    }

    /// Asks, and gives whether the answer is right.
    async fn of(self, store: &Store) -> Result<bool> {
        let missing = |error: pgvault_core::Error| if error.kind() == ErrorKind::NotFound { Ok(true) } else { Err(error) };
        Ok(match self {
            Self::Put => matches!(store.put_new("a/new", body()).await?, Put::Created | Put::Same),
            Self::PutTaken => {
                matches!(store.put_new("a/there", Bytes::from_static(b"other")).await?, Put::Different(kept) if kept == body())
            }
            Self::Get => store.get("a/there").await? == body(),
            Self::GetMissing => match store.get("a/missing").await {
                Ok(_) => false,
                Err(error) => return missing(error),
            },
            Self::Range => store.get_range("a/there", 1000..150_000).await? == body().slice(1000..150_000),
            Self::Head => store.head("a/there").await?.size == body().len() as u64,
            Self::HeadMissing => match store.head("a/missing").await {
                Ok(_) => false,
                Err(error) => return missing(error),
            },
            Self::List => {
                let listed = store.list("a/").await?;
                listed.iter().map(|object| object.name.as_str()).eq(["a/b/deeper", "a/there"])
            }
            Self::Levels => store.list_directories("a/").await? == ["b"],
            Self::Delete => {
                store.delete("a/b/deeper").await?;
                true
            }
        })
    }
}

fn status_of(fault: &Wire) -> Option<u16> {
    match fault {
        Wire::Answer(canned) | Wire::AnswerAfter(canned) => Some(canned.status),
        _ => None,
    }
}

/// What may pass, with the number of bytes of an answer after which it happens.
fn passing() -> Vec<Wire> {
    let s3 = |status, code: &str| Wire::Answer(Canned::s3(status, code));
    let page =
        Canned { status: 502, headers: vec![("content-type".into(), "text/html".into())], body: "<html>Bad Gateway</html>".into() };
    vec![
        Wire::Reset,
        Wire::Garbage,
        Wire::Blackhole,
        Wire::ResetRequest { after: 100 },
        Wire::LoseAnswer,
        Wire::ResetAnswer { after: 7 },
        Wire::ResetAnswer { after: 100_000 },
        Wire::CutAnswer { after: 7 },
        Wire::CutAnswer { after: 100_000 },
        Wire::StallAnswer { after: 7 },
        Wire::StallHeaders,
        Wire::HalfHeaders,
        Wire::Duplicate,
        s3(503, "SlowDown"),
        s3(500, "InternalError"),
        s3(400, "RequestTimeout"),
        s3(403, "RequestTimeTooSkewed"),
        Wire::Answer(Canned::empty(429)),
        Wire::Answer(Canned::empty(408)),
        Wire::Answer(Canned::empty(503)),
        Wire::Answer(page),
        // Carried out, and answered by somebody in between.
        Wire::AnswerAfter(Canned::s3(500, "InternalError")),
        Wire::AnswerAfter(Canned::empty(504)),
        // T7.
        Wire::AnswerAfter(Canned::s3(200, "InternalError")),
        Wire::Answer(Canned::s3(200, "SlowDown")),
    ]
}

/// True where nothing goes wrong after all: the body is shorter than that, or there is none.
fn misses(fault: &Wire, ask: Ask) -> bool {
    match fault {
        Wire::Duplicate => true,
        Wire::ResetAnswer { after } | Wire::CutAnswer { after } | Wire::StallAnswer { after } => {
            // What is missing, created or deleted is answered with a few bytes or none; an end after the last byte is none too early.
            let large = matches!(ask, Ask::Get | Ask::Range | Ask::PutTaken);
            let none = matches!(ask, Ask::Put | Ask::Head | Ask::HeadMissing | Ask::Delete);
            none || (*after > 1000 && !large)
        }
        _ => false,
    }
}

async fn once_and_always(kind: Kind, ask: Ask, fault: Wire) {
    let why = format!("{ask:?} with {fault:?}");
    let behind = Behind::fresh(kind, patient()).await;
    // The connection is there already: what is tried again goes over a new one.
    assert!(Ask::Levels.of(&behind.through).await.unwrap());
    behind.proxy.heal();
    behind.proxy.rule(Rule::new(fault.clone()).times(1));
    let began = Instant::now();
    let said = ask.of(&behind.through).await;
    // A HEAD says nothing about why.
    let unclear =
        matches!(&fault, Wire::Answer(canned) if matches!(canned.status, 400 | 403)) && matches!(ask, Ask::Head | Ask::HeadMissing);
    match said {
        Ok(right) => assert!(right, "{why}, once: a wrong answer; {}", behind.proxy),
        Err(error) => assert!(unclear && error.kind() == ErrorKind::Failed, "{why}, once: {error:?}; {}", behind.proxy),
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{why}, once: took {:?}", began.elapsed());
    assert_eq!(behind.proxy.happened().values().sum::<usize>(), 1, "{why}: {}", behind.proxy);

    let behind = Behind::fresh(kind, impatient()).await;
    behind.proxy.rule(Rule::new(fault.clone()));
    let began = Instant::now();
    let said = tokio::time::timeout(Duration::from_secs(60), ask.of(&behind.through)).await;
    let said = said.unwrap_or_else(|_| panic!("{why}, always: did not end (H19); {}", behind.proxy));
    let requests = behind.proxy.requests().len();
    match said {
        Ok(right) => {
            // A PUT whose answers are all lost is found by looking, unless looking fails as well.
            let found = misses(&fault, ask) || (ask == Ask::PutTaken && matches!(fault, Wire::Duplicate));
            assert!(right && found, "{why}, always: {} requests cannot have succeeded; {}", requests, behind.proxy);
        }
        Err(error) => {
            let kinds: &[ErrorKind] = if unclear || matches!(&fault, Wire::Answer(canned) if canned.body.contains("Skewed")) {
                &[ErrorKind::Failed]
            } else {
                &[ErrorKind::Storage]
            };
            assert!(kinds.contains(&error.kind()), "{why}, always: {error:?}");
            assert!(error.hint().is_some() || unclear, "{why}, always: says not what to do: {error:?}");
        }
    }
    // T24: attempts, twice for a PUT and its look, one more to tell a short object from trouble; not the square of it.
    assert!(requests <= 2 * impatient().attempts as usize + 1, "{why}, always: {:?}", behind.proxy.requests());
    assert!(began.elapsed() < Duration::from_secs(30), "{why}, always: took {:?}", began.elapsed());
    assert_eq!(behind.direct.get("a/there").await.unwrap(), body(), "{why}: overwritten");
    if let Some(stored) = behind.direct.get_if_exists("a/new").await.unwrap() {
        assert_eq!(stored, body(), "{why}: half an object");
    }
    behind.clear();
}

/// T1, T7, T24, H19: each fault, for each kind of request, once and again and again.
#[test]
fn t24_what_goes_wrong_on_the_wire_once_is_survived_and_what_goes_on_ends_with_an_error() {
    let _ = Server::shared(Kind::Rgw).unwrap();
    runtime().block_on(async {
        let cases = passing().into_iter().flat_map(|fault| ASKS.into_iter().map(move |ask| (ask, fault.clone())));
        // Where there is no body, there is no error in it.
        let cases = cases.filter(|(ask, fault)| !(ask.is_head() && matches!(status_of(fault), Some(200))));
        // Nearly all of them wait.
        futures::stream::iter(cases).for_each_concurrent(24, |(ask, fault)| once_and_always(Kind::Rgw, ask, fault)).await;
    });
}
