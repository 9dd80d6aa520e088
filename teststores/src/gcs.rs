//! A stand-in for Google Cloud Storage, of our own.
//!
//! **It is not Google's server, and passing a test against it says nothing about that one.** No emulator that can be had from
//! the usual registries speaks the XML API, which `object_store` uses. So this one speaks as much of it as pgvault sends, from Google's
//! documentation: objects with a create-only condition on their generation, ranges, listings, retention; and of the JSON API
//! buckets, metadata, retention and holds. What is proven is the client's side of the wire: that what pgvault sends is
//! understood by a reader of that documentation, and that pgvault understands such answers.
//!
//! Objects are in memory. A request is decided under one lock, so that of many writers of a name exactly one is first. What
//! is not there is answered with 501, never with a guess. Any token is accepted, and none as well; the metadata
//! server's tokens can be had here, too (`GCE_METADATA_HOST`).

mod json;
mod objects;
mod xml;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::client::Key;
use crate::runtime::{handle, wait};
use crate::server::{Info, Kind, Running};
use objects::Buckets;

/// A request, taken apart.
struct Asked {
    method: Method,
    /// The parts of the path, decoded.
    path: Vec<String>,
    query: BTreeMap<String, String>,
    headers: HeaderMap,
    body: Bytes,
}

/// An answer. [`Problem`] is the other kind.
type Answer = Result<Response<Full<Bytes>>, Problem>;

/// Why a request is not carried out: what both APIs say in their own way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Problem {
    NoBucket,
    NoObject,
    BucketExists,
    /// A condition on the generation does not hold.
    Condition,
    /// `If-None-Match` names the object.
    NotModified,
    Range,
    /// Under retention, or held.
    Retained,
    /// A lock that may not be changed like this.
    Locked,
    Malformed,
    NotImplemented,
}

impl Problem {
    fn status(self) -> StatusCode {
        match self {
            Self::NoBucket | Self::NoObject => StatusCode::NOT_FOUND,
            Self::BucketExists => StatusCode::CONFLICT,
            Self::Condition => StatusCode::PRECONDITION_FAILED,
            Self::NotModified => StatusCode::NOT_MODIFIED,
            Self::Range => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Retained | Self::Locked => StatusCode::FORBIDDEN,
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::NotImplemented => StatusCode::NOT_IMPLEMENTED,
        }
    }

    /// The name in the XML API.
    fn code(self) -> &'static str {
        match self {
            Self::NoBucket => "NoSuchBucket",
            Self::NoObject => "NoSuchKey",
            Self::BucketExists => "BucketAlreadyOwnedByYou",
            Self::Condition => "PreconditionFailed",
            Self::NotModified => "NotModified",
            Self::Range => "InvalidRange",
            Self::Retained => "ObjectUnderActiveRetention",
            Self::Locked => "AccessDenied",
            Self::Malformed => "InvalidArgument",
            Self::NotImplemented => "NotImplemented",
        }
    }
}

impl Asked {
    async fn read(request: Request<Incoming>) -> Result<Self> {
        let (head, body) = request.into_parts();
        let decode = |text: &str| Ok(percent_encoding::percent_decode_str(text).decode_utf8()?.into_owned());
        // A slash inside of a name comes encoded: the parts are taken apart first.
        let path = head.uri.path().trim_start_matches('/').splitn(7, '/').map(decode).collect::<Result<_>>()?;
        let query = url::form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
        Ok(Self { method: head.method, path, query, headers: head.headers, body: body.collect().await?.to_bytes() })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Starts the stand-in on threads of this process.
pub(crate) fn start() -> Result<(Info, Running)> {
    let listener = wait(async { TcpListener::bind("127.0.0.1:0").await.context("listen") })?;
    let address = listener.local_addr()?;
    let buckets = Arc::new(Mutex::new(Buckets::default()));
    // Ends with the process: there is nothing outside of it to clean up.
    drop(handle()?.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            let buckets = Arc::clone(&buckets);
            let service = service_fn(move |request| {
                let buckets = Arc::clone(&buckets);
                async move { Ok::<_, Infallible>(answer(&buckets, request).await) }
            });
            drop(tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service)));
        }
    }));
    let owner = Key { id: "stand-in".to_owned(), secret: String::new() };
    let info = Info::new(Kind::Gcs, format!("http://{address}"), owner);
    Ok((info, Running { processes: Vec::new(), work: None }))
}

async fn answer(buckets: &Mutex<Buckets>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let Ok(asked) = Asked::read(request).await else { return respond(StatusCode::BAD_REQUEST, "text/plain", "cannot be read") };
    let mut buckets = buckets.lock().unwrap_or_else(PoisonError::into_inner);
    let parts: Vec<&str> = asked.path.iter().map(String::as_str).collect();
    match parts[..] {
        ["computeMetadata", "v1", ..] => metadata_server(),
        ["storage", "v1", ..] => json::answer(&mut buckets, &asked).unwrap_or_else(json::problem),
        _ => xml::answer(&mut buckets, &asked).unwrap_or_else(xml::problem),
    }
}

fn metadata_server() -> Response<Full<Bytes>> {
    respond(StatusCode::OK, "application/json", r#"{"access_token":"stand-in","expires_in":3600,"token_type":"Bearer"}"#)
}

fn respond(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let _ = response.headers_mut().insert("content-type", http::HeaderValue::from_static(kind));
    response
}
