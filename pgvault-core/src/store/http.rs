//! The layer between a cloud's client and the wire: what `object_store` has no place for.
//!
//! - A PUT that carries a [`Lock`] gets the provider's retention headers, and is signed anew where they must be signed.
//! - Every wait has an end: for the first byte of an answer, and for each further piece of it. (The connection has one of its
//!   own, and [`Store`](super::Store) bounds the whole.)
//! - A refusal becomes an [`Answer`], which keeps the provider's code; one that asks for patience reaches the [`Gate`].
//! - An answer that says 200 and is an error document is an error (T7), and a 404 that a proxy made up is not an absence (T1).
//! - Requests are counted, and the store's clock is compared with ours.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, RETRY_AFTER};
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService, ReqwestConnector,
};

use tokio::time::{Instant, Sleep};

use super::answer::{Answer, MAX_BODY, Verdict, is_error_document};
use super::gate::{Gate, Verb};
use super::retention::Lock;
use crate::clock::Clock;

/// Slowest upload that is not taken for one that hangs, in bytes a second.
pub(super) const SLOWEST_UPLOAD: u64 = 128 << 10;

/// Adds a provider's retention headers to a PUT.
#[async_trait]
pub(super) trait Dress: std::fmt::Debug + Send + Sync {
    async fn dress(&self, request: &mut HttpRequest, lock: &Lock) -> object_store::Result<()>;
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waits {
    /// From the end of a request to the first byte of its answer.
    pub(super) first_byte: Duration,
    /// From one piece of an answer to the next.
    pub(super) idle: Duration,
}

/// Makes the clients of one store; see the [module documentation](self).
#[derive(Debug, Clone)]
pub(super) struct Connector {
    pub(super) gate: Arc<Gate>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) waits: Waits,
    pub(super) dress: Option<Arc<dyn Dress>>,
    /// Hosts that are the store; others give credentials, and their clients read their refusals themselves.
    pub(super) hosts: Arc<[String]>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Service { inner, connector: self.clone() }))
    }
}

#[derive(Debug)]
struct Service {
    inner: HttpClient,
    connector: Connector,
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let Connector { gate, waits, dress, .. } = &self.connector;
        let is_store = self.connector.is_store(request.uri());
        if let Some(lock) = request.extensions().get::<Lock>().copied() {
            // Nothing is stored unlocked that was to be locked.
            let Some(dress) = dress else { return Err(refused("this store has no retention headers")) };
            dress.dress(&mut request, &lock).await.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        }
        let verb = verb_of(request.method(), request.uri());
        let method = request.method().clone();
        let sent = request.body().content_length() as u64;
        if is_store {
            gate.count(verb);
        }
        let allowance = Duration::from_secs(sent / SLOWEST_UPLOAD);
        let response = tokio::time::timeout(waits.first_byte + allowance, self.inner.execute(request));
        let response = response.await.unwrap_or_else(|_| Err(timed_out("no answer within", waits.first_byte + allowance)))?;
        let (parts, body) = response.into_parts();
        let body = Bounded::wrap(body, waits.idle);
        if !is_store {
            return Ok(HttpResponse::from_parts(parts, body));
        }
        self.connector.note_clock(&parts.headers);
        if parts.status.is_success() {
            gate.succeeded();
            // An object of a vault is never said to be XML; one that is may be an error that came after the 200.
            let suspicious = match method {
                Method::HEAD => false,
                Method::GET => kind_of(&parts.headers).contains("xml"),
                _ => is_xml(&parts.headers),
            };
            if !suspicious {
                return Ok(HttpResponse::from_parts(parts, body));
            }
            let bytes = collect(body, usize::MAX).await?;
            if !is_error_document(&bytes) {
                return Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(bytes)));
            }
            let mut answer = answer_of(parts.status, &parts.headers, &bytes);
            // What is not said to be for good is an internal error of the store.
            if answer.verdict() == Verdict::Wrong {
                answer.status = 500;
            }
            return Err(self.connector.refuse(answer, &parts.headers));
        }
        // Redirects and preconditions: the client above knows what they mean.
        if matches!(parts.status.as_u16(), 300..=399 | 412) {
            return Ok(HttpResponse::from_parts(parts, body));
        }
        let bytes = collect(body, MAX_BODY).await?;
        let answer = answer_of(parts.status, &parts.headers, &bytes);
        let passes_on = match parts.status {
            StatusCode::CONFLICT => answer.verdict() != Verdict::Immutable,
            StatusCode::NOT_FOUND if method == Method::HEAD => answer.verdict() != Verdict::NoBucket,
            // The store itself says which name it does not have; a balancer in front of it does not know.
            StatusCode::NOT_FOUND => !answer.code.is_empty() && answer.verdict() != Verdict::NoBucket,
            _ => false,
        };
        if passes_on {
            return Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(bytes)));
        }
        let answer = match (parts.status, answer.code.as_str()) {
            (StatusCode::NOT_FOUND, "") => {
                Answer { status: 502, message: "a 404 that names no code: not the store's own".into(), ..answer }
            }
            _ => answer,
        };
        Err(self.connector.refuse(answer, &parts.headers))
    }
}

impl Connector {
    fn is_store(&self, uri: &Uri) -> bool {
        let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        self.hosts
            .iter()
            .any(|host| authority.strip_suffix(host.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.')))
    }

    fn refuse(&self, answer: Answer, headers: &HeaderMap) -> HttpError {
        let pause = retry_after(headers);
        if answer.is_throttling() {
            self.gate.throttled(pause);
        }
        HttpError::new(HttpErrorKind::Unknown, answer)
    }

    fn note_clock(&self, headers: &HeaderMap) {
        let said = headers.get(DATE).and_then(|value| value.to_str().ok());
        if let Some(theirs) = said.and_then(|text| jiff::fmt::rfc2822::parse(text).ok()) {
            self.gate.note_clock(theirs.timestamp().as_millisecond() - self.clock.now().as_millisecond());
        }
    }
}

/// The pause that an answer asks for. A date is not understood: no store sends one.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

fn verb_of(method: &Method, uri: &Uri) -> Verb {
    let query = uri.query().unwrap_or_default();
    let has = |name: &str| query.split('&').any(|pair| pair == name || pair.strip_prefix(name).is_some_and(|v| v.starts_with('=')));
    let special =
        ["retention", "legal-hold", "versions", "versioning", "object-lock", "lifecycle", "tagging"].iter().any(|n| has(n));
    match *method {
        _ if special => Verb::Other,
        Method::PUT if has("comp") => Verb::Other,
        Method::PUT => Verb::Put,
        Method::GET if has("list-type") || query.contains("comp=list") => Verb::List,
        Method::GET => Verb::Get,
        Method::HEAD => Verb::Head,
        Method::DELETE => Verb::Delete,
        Method::POST if has("delete") || query.contains("comp=batch") => Verb::Delete,
        _ => Verb::Other,
    }
}

fn answer_of(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Answer {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let id = ["x-amz-request-id", "x-ms-request-id", "x-guploader-uploadid"].into_iter().find_map(text).unwrap_or_default();
    Answer::parse(status.as_u16(), text("x-ms-error-code"), id, body)
}

fn kind_of(headers: &HeaderMap) -> &str {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn is_xml(headers: &HeaderMap) -> bool {
    let kind = kind_of(headers);
    let empty = headers.get(CONTENT_LENGTH).is_some_and(|length| length.as_bytes() == b"0");
    !empty && (kind.is_empty() || kind.contains("xml"))
}

/// A body that breaks off with an error when nothing comes for a while.
struct Bounded {
    inner: HttpResponseBody,
    idle: Duration,
    alarm: Pin<Box<Sleep>>,
}

impl Bounded {
    fn wrap(inner: HttpResponseBody, idle: Duration) -> HttpResponseBody {
        HttpResponseBody::new(Self { inner, idle, alarm: Box::pin(tokio::time::sleep(idle)) })
    }
}

impl Body for Bounded {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.inner).poll_frame(context);
        if polled.is_ready() {
            this.alarm.as_mut().reset(Instant::now() + this.idle);
            return polled;
        }
        std::task::ready!(this.alarm.as_mut().poll(context));
        Poll::Ready(Some(Err(timed_out("the answer stopped for", this.idle))))
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}

async fn collect(body: HttpResponseBody, most: usize) -> Result<Bytes, HttpError> {
    let mut pieces = body.bytes_stream();
    let mut all = BytesMut::new();
    while let Some(piece) = pieces.try_next().await? {
        let room = most.saturating_sub(all.len());
        all.extend_from_slice(piece.get(..room.min(piece.len())).unwrap_or_default());
        if all.len() >= most {
            break;
        }
    }
    Ok(all.freeze())
}

fn timed_out(what: &str, after: Duration) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, std::io::Error::new(std::io::ErrorKind::TimedOut, format!("{what} {after:?}")))
}

fn refused(why: &str) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, std::io::Error::new(std::io::ErrorKind::Unsupported, why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_what_they_are() {
        let verb = |method: Method, uri: &str| verb_of(&method, &uri.parse().unwrap());
        assert_eq!(verb(Method::PUT, "https://b.s3/a/b"), Verb::Put);
        assert_eq!(verb(Method::PUT, "https://b.s3/a/b?retention&versionId=1"), Verb::Other);
        assert_eq!(verb(Method::PUT, "https://a.blob/c/b?comp=immutabilityPolicies"), Verb::Other);
        assert_eq!(verb(Method::GET, "https://b.s3/?list-type=2&prefix=versions"), Verb::List);
        assert_eq!(verb(Method::GET, "https://a.blob/c?restype=container&comp=list"), Verb::List);
        assert_eq!(verb(Method::GET, "https://b.s3/?versions"), Verb::Other);
        assert_eq!(verb(Method::POST, "https://b.s3/?delete"), Verb::Delete);
        assert_eq!(verb(Method::POST, "https://sts/"), Verb::Other);
    }

    #[test]
    fn hosts_of_the_store_are_known_with_their_buckets_and_ports() {
        let connector = Connector {
            gate: Arc::new(Gate::new(super::super::gate::Limits::default())),
            clock: Arc::new(crate::clock::SystemClock),
            waits: Waits { first_byte: Duration::ZERO, idle: Duration::ZERO },
            dress: None,
            hosts: ["amazonaws.com".to_owned(), "127.0.0.1:9000".to_owned()].into(),
        };
        let is = |uri: &str| connector.is_store(&uri.parse().unwrap());
        assert!(is("https://b.s3.eu-west-1.amazonaws.com/x") && is("http://127.0.0.1:9000/x"));
        assert!(!is("http://169.254.169.254/latest") && !is("https://evilamazonaws.com/") && !is("http://127.0.0.1:90001/"));
    }
}
