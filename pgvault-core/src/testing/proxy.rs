//! A proxy that does to a connection what only a network can: cut it, hold it, slow it, answer in the server's place.
//!
//! A [`FaultyStore`](super::FaultyStore) fails above HTTP. What a client library makes of a reset in the middle of a body, of half
//! a header, of a 200 that is an error document, is decided below, and differs between libraries and their versions. So this
//! stands between pgvault and a real server:
//!
//! ```no_run
//! # use pgvault_core::testing::proxy::{Proxy, Rule, Wire};
//! # async fn example() -> std::io::Result<()> {
//! let proxy = Proxy::start("127.0.0.1:9000".parse().unwrap()).await?;
//! proxy.rule(Rule::new(Wire::CutAnswer { after: 100 }).method("GET").times(1));
//! // Open the store with the endpoint `http://{proxy.address()}`: the next GET breaks off after 100 bytes of its body.
//! # Ok(())
//! # }
//! ```
//!
//! Requests are forwarded byte for byte, `Host` included: a signature covers the host that the client connected to, which is the
//! proxy's, and servers of S3 check the signature against the `Host` they are sent. With TLS the proxy sees no requests: a
//! [`Proxy::start_opaque`] only knows connections.
//!
//! What happens is given by [`Rule`]s, the first that fits, or by a [`Dice`] ([`Proxy::random`]). Everything is counted.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::Dice;

mod http;
mod relay;

/// What goes wrong on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wire {
    /// The connection is reset before anything is read.
    Reset,
    /// Something that is neither HTTP nor TLS comes instead of an answer, and the connection ends.
    Garbage,
    /// The request is read and never answered, and never reaches the server.
    Blackhole,
    /// The connection is reset after so many bytes of the request's body. The server sees half a request.
    ResetRequest {
        /// Bytes of the body that reach the server.
        after: usize,
    },
    /// The request is carried out, and the connection is reset before the answer.
    LoseAnswer,
    /// The connection is reset after so many bytes of the answer's body.
    ResetAnswer {
        /// Bytes of the body that reach the client.
        after: usize,
    },
    /// The answer ends, as if it were whole, after so many bytes of its body, and the connection is closed.
    CutAnswer {
        /// Bytes of the body that reach the client.
        after: usize,
    },
    /// The answer ends in the middle of its headers.
    HalfHeaders,
    /// The answer stops after so many bytes of its body and never goes on.
    StallAnswer {
        /// Bytes of the body that reach the client.
        after: usize,
    },
    /// The headers of the answer never come.
    StallHeaders,
    /// The request is carried out twice; the second answer is the one that the client sees.
    Duplicate,
    /// The server never sees the request; this is the answer.
    Answer(Canned),
    /// The request is carried out; this is the answer all the same.
    AnswerAfter(Canned),
}

/// An answer that the proxy makes up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canned {
    /// Its status.
    pub status: u16,
    /// Headers besides the length.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: String,
}

impl Canned {
    /// A refusal as S3 words it.
    pub fn s3(status: u16, code: &str) -> Self {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>made up by a proxy</Message>\
             <RequestId>made-up</RequestId></Error>"
        );
        Self { status, headers: vec![("content-type".into(), "application/xml".into())], body }
    }

    /// An answer without a body.
    pub fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: String::new() }
    }

    /// With another header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// The first line of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub target: String,
    /// Which request of the proxy's it is; the first is 1.
    pub number: usize,
}

/// When something goes wrong.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Wire,
    method: Option<String>,
    target: Option<String>,
    skip: usize,
    times: usize,
}

impl Rule {
    /// For every request.
    pub fn new(fault: Wire) -> Self {
        Self { fault, method: None, target: None, skip: 0, times: usize::MAX }
    }

    /// Only for this method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Only for requests with this in their path or query.
    #[must_use]
    pub fn target(mut self, part: &str) -> Self {
        self.target = Some(part.to_owned());
        self
    }

    /// Not for the first so many of them.
    #[must_use]
    pub fn skip(mut self, requests: usize) -> Self {
        self.skip = requests;
        self
    }

    /// For so many of them.
    #[must_use]
    pub fn times(mut self, requests: usize) -> Self {
        self.times = requests;
        self
    }

    fn fits(&self, seen: &Seen) -> bool {
        self.method.as_ref().is_none_or(|method| *method == seen.method)
            && self.target.as_ref().is_none_or(|part| seen.target.contains(part))
    }

    fn apply(&mut self, seen: &Seen) -> Option<Wire> {
        if self.times == 0 || !self.fits(seen) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times = self.times.saturating_sub(1);
        Some(self.fault.clone())
    }
}

/// How fast the way to the server is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    /// Added to each request, as a round trip to a store in another place would.
    pub latency: Duration,
    /// Bytes per second of one connection, in each direction.
    pub bytes_per_second: Option<u64>,
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    random: Option<(Dice, usize, Vec<Wire>)>,
    speed: Speed,
    requests: Vec<Seen>,
    connections: usize,
    happened: BTreeMap<String, usize>,
}

/// What the tasks of a proxy share.
#[derive(Debug, Clone)]
struct Shared {
    upstream: SocketAddr,
    opaque: bool,
    plan: Arc<Mutex<Plan>>,
}

impl Shared {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(plan: &mut Plan, fault: Option<&Wire>) {
        if let Some(fault) = fault {
            let name = format!("{fault:?}");
            let name = name.split([' ', '(']).next().unwrap_or_default().to_owned();
            *plan.happened.entry(name).or_default() += 1;
        }
    }

    /// Notes a request, and tells what is to happen to it.
    fn request(&self, method: &str, target: &str) -> (Option<Wire>, Speed) {
        let mut plan = self.plan();
        let seen = Seen { method: method.to_owned(), target: target.to_owned(), number: plan.requests.len() + 1 };
        let mut fault = plan.rules.iter_mut().find_map(|rule| rule.apply(&seen));
        if let (None, Some((dice, permille, kinds))) = (&fault, &mut plan.random)
            && dice.permille(*permille)
        {
            fault = dice.pick(kinds).cloned();
        }
        plan.requests.push(seen);
        Self::note(&mut plan, fault.as_ref());
        (fault, plan.speed)
    }
}

/// A proxy in this process; see the [module documentation](self). It ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Shared,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(task) = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.shared.plan();
        write!(f, "{} requests over {} connections, {:?}", plan.requests.len(), plan.connections, plan.happened)
    }
}

impl Proxy {
    /// In front of a server that speaks HTTP/1.1 without TLS.
    ///
    /// # Errors
    /// When there is no port to listen at.
    pub async fn start(upstream: SocketAddr) -> std::io::Result<Self> {
        Self::at("127.0.0.1:0", upstream, false).await
    }

    /// In front of a server that speaks anything. Only whole connections can be treated: each counts as a request with the method
    /// `CONNECT`, and what is said of bodies counts from the connection's first byte.
    ///
    /// # Errors
    /// When there is no port to listen at.
    pub async fn start_opaque(upstream: SocketAddr) -> std::io::Result<Self> {
        Self::at("127.0.0.1:0", upstream, true).await
    }

    async fn at(address: &str, upstream: SocketAddr, opaque: bool) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let shared = Shared { upstream, opaque, plan: Arc::default() };
        let task = tokio::spawn(accept(listener, shared.clone()));
        Ok(Self { address, shared, accepting: Mutex::new(Some(task)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Adds a rule behind those that there are.
    pub fn rule(&self, rule: Rule) {
        self.shared.plan().rules.push(rule);
    }

    /// From here on, to so many of a thousand requests that no rule is for, one of these happens.
    pub fn random(&self, seed: u64, permille: usize, kinds: &[Wire]) {
        self.shared.plan().random = Some((Dice::new(seed), permille, kinds.to_vec()));
    }

    /// From here on the way is this fast.
    pub fn speed(&self, speed: Speed) {
        self.shared.plan().speed = speed;
    }

    /// Nothing goes wrong any more, and counting begins anew. The speed stays.
    pub fn heal(&self) {
        let mut plan = self.shared.plan();
        *plan = Plan { speed: plan.speed, ..Plan::default() };
    }

    /// From here on connections are refused; those that there are go on. Ends with [`Proxy::listen`].
    pub async fn refuse(&self) {
        let task = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.abort();
            // The port is free when the task is gone.
            let _ = task.await;
        }
    }

    /// Listens again, at the same port.
    ///
    /// # Errors
    /// When somebody else took it meanwhile.
    pub async fn listen(&self) -> std::io::Result<()> {
        let listener = TcpListener::bind(self.address).await?;
        let task = tokio::spawn(accept(listener, self.shared.clone()));
        let old = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).replace(task);
        if let Some(old) = old {
            old.abort();
        }
        Ok(())
    }

    /// The requests since the start or [`Proxy::heal`].
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.plan().requests.clone()
    }

    /// The connections since the start or [`Proxy::heal`].
    pub fn connections(&self) -> usize {
        self.shared.plan().connections
    }

    /// How often what went wrong since the start or [`Proxy::heal`].
    pub fn happened(&self) -> BTreeMap<String, usize> {
        self.shared.plan().happened.clone()
    }
}

async fn accept(listener: TcpListener, shared: Shared) {
    // Connections end with the proxy.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else { return };
        shared.plan().connections += 1;
        while connections.try_join_next().is_some() {}
        let _ = connections.spawn(relay::serve(client, shared.clone()));
    }
}

/// Ends a connection so that the other side sees a reset and not an end.
fn reset(stream: TcpStream) {
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}
