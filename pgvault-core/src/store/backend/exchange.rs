//! One request that `object_store` does not know, and what a store's refusal of it means: the same for every store.

use bytes::Bytes;
use http::{Response, StatusCode};
use object_store::client::{HttpClient, HttpError, HttpRequest};

use crate::store::answer::Answer;

/// Sends a request; the answer is read whole, whatever its status.
pub(super) async fn exchange(
    store: &'static str,
    http: &HttpClient,
    request: HttpRequest,
) -> object_store::Result<Response<Bytes>> {
    let failed = |e: HttpError| object_store::Error::Generic { store, source: Box::new(e) };
    let (parts, body) = http.execute(request).await.map_err(failed)?.into_parts();
    Ok(Response::from_parts(parts, body.bytes().await.map_err(failed)?))
}

/// The error that an answer without success is.
pub(super) fn refusal(store: &'static str, path: &str, answer: &Response<Bytes>) -> object_store::Error {
    let status = answer.status();
    // Azure has its code where it can be read of an answer without a body.
    let code = answer.headers().get("x-ms-error-code").and_then(|code| code.to_str().ok());
    let source = Box::new(Answer::parse(status.as_u16(), code, "", answer.body()));
    match status {
        StatusCode::NOT_FOUND => object_store::Error::NotFound { path: path.to_owned(), source },
        _ => object_store::Error::Generic { store, source },
    }
}
