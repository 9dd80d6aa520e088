//! What the clients of the key services share: one request with limits on everything, and its outcome as a decision.
//!
//! An attempt has 10 s, an operation with its logins and repetitions has `vault.kms_options.timeout`. Repeated is what may pass by
//! itself (no connection, a timeout, 408, 429, 5xx, and what a service calls throttling), with growing, jittered waits that are at
//! least as long as `Retry-After`. An answer is read to 64 KiB at most. Redirects are refused: a token would go where they lead.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use http::header::{HeaderValue, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::Provider;
use crate::config::KmsOptions;
use crate::{Error, ErrorKind, Result};

const CONNECT: Duration = Duration::from_secs(5);
const ATTEMPT: Duration = Duration::from_secs(10);
const MAX_ANSWER: usize = 64 << 10;

/// What an answer that is no success means for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may pass.
    Again,
    /// The credential is not accepted, or may not do this.
    Denied,
    /// There is no such key.
    NoKey,
    /// The key is disabled, expired, deleted, or not for this.
    Unusable,
    /// These bytes are not of this key and binding.
    Refused,
    /// The request was wrong in some other way.
    Request,
}

/// A service's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) verdict: Verdict,
    /// Its code, when it gives one.
    pub(super) code: String,
    pub(super) message: String,
}

/// Reads the body of an answer that is no success.
pub(super) type Judge = fn(StatusCode, &[u8]) -> Problem;

/// A body or a part of one that is wiped when it is dropped.
pub(super) type Secret = Zeroizing<Vec<u8>>;

/// A request, made anew for each attempt because a signature has a time.
pub(super) type Request = http::Request<Bytes>;

/// Sends requests to one service.
pub(super) struct Client {
    http: reqwest::Client,
    provider: Provider,
    budget: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("provider", &self.provider).finish_non_exhaustive()
    }
}

impl Client {
    /// A client with the limits and certificates of `options`.
    pub(super) fn new(provider: Provider, options: &KmsOptions, ca_file: Option<&std::path::Path>) -> Result<Self> {
        let usage = |why: String| Error::new(ErrorKind::Usage, "config.kms", why);
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .https_only(!options.allow_http)
            .connect_timeout(CONNECT)
            .user_agent(concat!("pgvault/", env!("CARGO_PKG_VERSION")));
        if let Some(file) = ca_file {
            let pem = std::fs::read(file).map_err(|e| usage(format!("read {}: {e}", file.display())))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|e| usage(format!("{} holds no certificates: {e}", file.display())))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let http = builder.build().map_err(|e| usage(format!("prepare HTTPS: {e}")))?;
        Ok(Self { http, provider, budget: options.timeout })
    }

    /// The same limits for an address on this machine or beside it, which speaks plain HTTP and has no proxy before it.
    #[cfg(feature = "kms-azure")]
    pub(super) fn metadata(provider: Provider, options: &KmsOptions) -> Result<Self> {
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .build()
            .map_err(|e| Error::new(ErrorKind::Usage, "config.kms", format!("prepare HTTP: {e}")))?;
        Ok(Self { http, provider, budget: options.timeout })
    }

    /// When an operation that begins now is given up.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.budget
    }

    /// Waits for something that is not one of our requests, such as a credential, no longer than until `deadline`.
    #[cfg(any(feature = "kms-aws", feature = "kms-gcp"))]
    pub(super) async fn within<T>(&self, deadline: Instant, doing: &str, action: impl Future<Output = T> + Send) -> Result<T> {
        timeout_at(deadline, action).await.map_err(|_| self.unavailable(doing, "no answer in time"))
    }

    /// Sends what `build` makes until it is answered for good; gives the body of a success.
    ///
    /// # Errors
    /// The kind is the decision, see [`Verdict`]; the message has the service's code and words.
    pub(super) async fn call(
        &self,
        deadline: Instant,
        doing: &str,
        build: impl Fn() -> Result<Request> + Send + Sync,
        judge: Judge,
    ) -> Result<Secret> {
        let mut delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(5))
            .without_max_times()
            .with_jitter()
            .build();
        loop {
            let (problem, pause) = match self.attempt(deadline.min(Instant::now() + ATTEMPT), build()?).await {
                Ok((status, _, body)) if status.is_success() => return Ok(body),
                Ok((status, headers, body)) => {
                    let problem = judge(status, &body);
                    if problem.verdict != Verdict::Again {
                        return Err(self.refusal(doing, status, &problem));
                    }
                    (said(status, &problem), retry_after(&headers))
                }
                Err(Trouble::Passing(why)) => (why, None),
                Err(Trouble::Lasting(why)) => return Err(self.lasting(doing, &why)),
            };
            let wait = delays.next().unwrap_or_default().max(pause.unwrap_or_default());
            // What comes after the deadline need not be waited for.
            if Instant::now() + wait >= deadline {
                let asked = pause.map_or(String::new(), |pause| format!("; it asks to wait {} s", pause.as_secs()));
                return Err(self.unavailable(doing, &format!("{problem}{asked}")));
            }
            tracing::debug!(service = self.provider.title(), %problem, ?wait, "trying again");
            tokio::time::sleep(wait).await;
        }
    }

    async fn attempt(&self, deadline: Instant, request: Request) -> Result<(StatusCode, HeaderMap, Secret), Trouble> {
        let request = reqwest::Request::try_from(request).map_err(Trouble::of)?;
        let exchange = async {
            let mut response = self.http.execute(request).await.map_err(Trouble::of)?;
            let (status, headers) = (response.status(), response.headers().clone());
            let mut body = Secret::default();
            while let Some(chunk) = response.chunk().await.map_err(Trouble::of)? {
                if body.len() + chunk.len() > MAX_ANSWER {
                    return Err(Trouble::Passing(format!("answers with more than {MAX_ANSWER} bytes (HTTP {})", status.as_u16())));
                }
                body.extend_from_slice(&chunk);
            }
            Ok((status, headers, body))
        };
        timeout_at(deadline, exchange).await.unwrap_or_else(|_| Err(Trouble::Passing("no answer in time".into())))
    }

    /// The answer to a request that succeeded is not what the service documents; something else may have given it.
    pub(super) fn bad_answer(&self, doing: &str) -> Error {
        self.unavailable(doing, "the answer is not one of this service")
    }

    pub(super) fn unavailable(&self, doing: &str, why: &str) -> Error {
        Error::new(ErrorKind::Storage, "kms.unavailable", format!("{doing} with {}: {why}", self.provider.title()))
            .with_hint("try again; while the key service is away, any other key of the cluster opens it")
    }

    fn lasting(&self, doing: &str, why: &str) -> Error {
        Error::new(ErrorKind::Usage, "kms.connection", format!("{doing} with {}: {why}", self.provider.title()))
            .with_hint("see vault.kms_options: `endpoint`, `ca_file`, and `allow_http = true` for an address without TLS")
    }

    /// What a service said for good.
    pub(super) fn refusal(&self, doing: &str, status: StatusCode, problem: &Problem) -> Error {
        let (kind, code, hint) = match problem.verdict {
            Verdict::Again => (ErrorKind::Storage, "kms.unavailable", "try again"),
            Verdict::Denied => (ErrorKind::Usage, "kms.denied", "docs/kms.md has the permissions that are needed"),
            Verdict::NoKey => {
                (ErrorKind::Usage, "kms.no_key", "check vault.kms; the key must be in the service before pgvault uses it")
            }
            Verdict::Unusable => {
                (ErrorKind::Usage, "kms.key_unusable", "enable the key, or open the cluster with another of its keys")
            }
            Verdict::Refused => (ErrorKind::WrongKey, "kms.refused", "`pgvault key list` shows the other keys of the cluster"),
            Verdict::Request => (ErrorKind::Usage, "kms.request", "check vault.kms and vault.kms_options"),
        };
        let more =
            if problem.verdict == Verdict::Refused { "; another key has that name now, or the slot was changed" } else { "" };
        Error::new(kind, code, format!("{doing} with {}: {}{more}", self.provider.title(), said(status, problem))).with_hint(hint)
    }
}

fn said(status: StatusCode, problem: &Problem) -> String {
    let code = if problem.code.is_empty() { format!("HTTP {}", status.as_u16()) } else { problem.code.clone() };
    // From the network, for a terminal.
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
    if problem.message.is_empty() { clean(&code) } else { format!("{}: {}", clean(&code), clean(&problem.message)) }
}

/// A verdict from the status alone, for answers that say nothing else.
pub(super) fn by_status(status: StatusCode) -> Verdict {
    match status.as_u16() {
        408 | 425 | 429 | 500..=599 => Verdict::Again,
        401 | 403 => Verdict::Denied,
        404 => Verdict::NoKey,
        _ => Verdict::Request,
    }
}

/// Seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    // Of the same answer, so that no clock of ours matters.
    let now = jiff::fmt::rfc2822::parse(headers.get(http::header::DATE)?.to_str().ok()?).ok()?.timestamp();
    Duration::try_from(date.duration_since(now)).ok()
}

/// Why there was no answer.
enum Trouble {
    Passing(String),
    /// No repetition helps: an address that is none, a certificate that is not trusted.
    Lasting(String),
}

impl Trouble {
    fn of(error: reqwest::Error) -> Self {
        // The address may hold nothing secret, but it repeats what the message has.
        let error = error.without_url();
        let mut text = error.to_string();
        let mut lasting = error.is_builder();
        let mut source = error.source();
        while let Some(cause) = source {
            lasting |= is_untrusted(cause);
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        if lasting { Self::Lasting(text) } else { Self::Passing(text) }
    }
}

/// True for a certificate that is not trusted, in as many wrappings as it comes.
fn is_untrusted(cause: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = cause.downcast_ref::<rustls::Error>() {
        return matches!(error, rustls::Error::InvalidCertificate(_));
    }
    // These give what they wrap to nobody who only asks for their source.
    let wrapped = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|wrapped| is_untrusted(wrapped))
}

/// A header that no log shows.
pub(super) fn secret_header(value: &str) -> Result<HeaderValue> {
    let mut header = HeaderValue::from_str(value).map_err(|_| {
        Error::new(ErrorKind::Usage, "kms.credentials", "the credential has characters that no HTTP header can have")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

/// A JSON body that is wiped when it was sent.
pub(super) fn json(value: &impl serde::Serialize) -> Result<Bytes> {
    let text = serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
    Ok(Bytes::from_owner(Secret::new(text)))
}

/// A POST; what cannot be an address was checked when the client was made.
pub(super) fn post(url: &str, body: Bytes, headers: &[(http::HeaderName, HeaderValue)]) -> Result<Request> {
    let mut request = http::Request::post(url)
        .body(body)
        .map_err(|e| Error::new(ErrorKind::Usage, "config.kms", format!("`{url}` is not an address: {e}")))?;
    for (name, value) in headers {
        let _ = request.headers_mut().insert(name.clone(), value.clone());
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_seconds_or_a_date_after_the_answers_own() {
        let headers = |pairs: &[(http::HeaderName, &str)]| {
            pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect::<HeaderMap>()
        };
        assert_eq!(retry_after(&headers(&[(RETRY_AFTER, "7")])), Some(Duration::from_secs(7)));
        let date = [(http::header::DATE, "Wed, 21 Oct 2026 07:28:00 GMT"), (RETRY_AFTER, "Wed, 21 Oct 2026 07:29:30 GMT")];
        assert_eq!(retry_after(&headers(&date)), Some(Duration::from_secs(90)));
        for text in ["", "soon", "-5", "Wed, 21 Oct 2026 07:27:00 GMT"] {
            assert_eq!(retry_after(&headers(&[(RETRY_AFTER, text), date[0].clone()])), None, "{text}");
        }
    }

    #[test]
    fn words_from_the_network_are_shortened_and_cleaned() {
        let problem = Problem { verdict: Verdict::Request, code: "E\x1b[31m".into(), message: "x\n".repeat(5000) };
        let text = said(StatusCode::BAD_REQUEST, &problem);
        assert!(text.len() < 400 && text.starts_with("E[31m: xx") && !text.contains('\n'), "{text}");
    }
}
