//! A gate in front of a server: requests pass unchanged, or are refused, or find nobody there.
//!
//! What a test does to a vault in a directory by moving it away or taking rights from it, a gate does to any store. It
//! forwards a request as it came, its `Host` header included, so that signatures stay valid.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::runtime::{handle, wait};

/// What becomes of requests.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Pass {
    /// They pass.
    #[default]
    All,
    /// Connections are closed as soon as they are made: the server is away.
    None,
    /// Whatever would write an object with this text in its name is answered with 503; everything else passes.
    NoWritesOf(String),
    /// Whatever would write an object with this text in its name is answered with 403; everything else passes.
    DeniedWritesOf(String),
    /// Requests are taken, and never answered.
    Silence,
}

#[derive(Debug, Default)]
struct State {
    pass: Mutex<Pass>,
    /// Wakes what waits for another rule.
    changed: Notify,
    requests: AtomicU64,
}

impl State {
    fn pass(&self) -> Pass {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A gate; it is closed for good when it is dropped.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    state: Arc<State>,
    task: AbortHandle,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.set(Pass::None);
        self.task.abort();
    }
}

impl Gate {
    /// A gate to the server with this address, which must be plain HTTP.
    pub fn open(endpoint: &str) -> Result<Self> {
        let url = url::Url::parse(endpoint).with_context(|| format!("the address {endpoint}"))?;
        let host = url.host_str().context("an address without a host")?.to_owned();
        let port = url.port_or_known_default().context("an address without a port")?;
        let state = Arc::new(State::default());
        let listener = wait(async { TcpListener::bind("127.0.0.1:0").await.context("listen") })?;
        let address = listener.local_addr()?;
        let shared = Arc::clone(&state);
        let task = handle()?.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                if shared.pass() == Pass::None {
                    continue;
                }
                let (state, target) = (Arc::clone(&shared), (host.clone(), port));
                drop(tokio::spawn(async move { connection(socket, target, state).await }));
            }
        });
        Ok(Self { address, state, task: task.abort_handle() })
    }

    /// From now on; what is on its way already is not taken back, but for [`Pass::None`], which closes its connections.
    pub fn set(&self, pass: Pass) {
        *self.state.pass.lock().unwrap_or_else(PoisonError::into_inner) = pass;
        self.state.changed.notify_waiters();
    }

    /// How many requests have come so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// The address that leads through the gate to where `endpoint` leads without it.
    pub fn address_of(&self, endpoint: &str) -> Result<String> {
        let mut url = url::Url::parse(endpoint).with_context(|| format!("the address {endpoint}"))?;
        url.set_ip_host(self.address.ip()).ok().context("an address that cannot have a host")?;
        url.set_port(Some(self.address.port())).ok().context("an address that cannot have a port")?;
        Ok(url.to_string().trim_end_matches('/').to_owned())
    }
}

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves one client with one connection to the server.
async fn connection(socket: TcpStream, (host, port): (String, u16), state: Arc<State>) {
    let _ = socket.set_nodelay(true);
    let Ok(upstream) = TcpStream::connect((host.as_str(), port)).await else { return };
    let _ = upstream.set_nodelay(true);
    let Ok((sender, upstream)) = client::handshake::<_, Incoming>(TokioIo::new(upstream)).await else { return };
    let mut upstream = tokio::spawn(upstream);
    let sender = Arc::new(tokio::sync::Mutex::new(sender));
    let rules = Arc::clone(&state);
    let service = service_fn(move |request: Request<Incoming>| {
        let (sender, state) = (Arc::clone(&sender), Arc::clone(&state));
        async move {
            let _ = state.requests.fetch_add(1, Ordering::Relaxed);
            if let Some((status, code)) = verdict(&state, &request).await {
                // A client that is still sending would see a broken connection, and not the answer.
                let _ = request.into_body().collect().await;
                return Ok::<_, hyper::Error>(refusal(status, code));
            }
            let answer = sender.lock().await.send_request(request).await?;
            Ok(answer.map(BodyExt::boxed))
        }
    });
    let mut serving = pin!(server::Builder::new().half_close(false).serve_connection(TokioIo::new(socket), service));
    let closed = async {
        loop {
            let changed = rules.changed.notified();
            if rules.pass() == Pass::None {
                break;
            }
            changed.await;
        }
    };
    tokio::select! {
        _ = &mut serving => {}
        () = closed => {}
        // A server closes connections that nobody uses. The client must see that, or it would use them.
        _ = &mut upstream => {
            serving.as_mut().graceful_shutdown();
            let _ = serving.await;
        }
    }
    upstream.abort();
}

/// What is answered instead of by the server; nothing when the request passes.
async fn verdict(state: &State, request: &Request<Incoming>) -> Option<(StatusCode, &'static str)> {
    loop {
        let changed = state.changed.notified();
        let (part, verdict) = match state.pass() {
            Pass::All | Pass::None => return None,
            Pass::NoWritesOf(part) => (part, (StatusCode::SERVICE_UNAVAILABLE, "SlowDown")),
            Pass::DeniedWritesOf(part) => (part, (StatusCode::FORBIDDEN, "AccessDenied")),
            Pass::Silence => {
                changed.await;
                continue;
            }
        };
        let writes = [Method::PUT, Method::POST, Method::DELETE].contains(request.method());
        let name = percent_encoding::percent_decode_str(request.uri().path()).decode_utf8_lossy();
        return (writes && name.contains(&part)).then_some(verdict);
    }
}

fn refusal(status: StatusCode, code: &str) -> Response<Body> {
    let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>the gate is closed</Message></Error>");
    let mut answer = Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed());
    *answer.status_mut() = status;
    let _ = answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/xml"));
    answer
}
