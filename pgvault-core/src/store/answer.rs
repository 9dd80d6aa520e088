//! What a cloud's store says when it refuses, kept until somebody has to decide what to do about it.
//!
//! `object_store` turns most refusals into text. The layer that sends requests ([`super::http`]) sees them before that: it
//! keeps status, code and message as an [`Answer`], and hands that on as the cause of the error.

use std::error::Error as StdError;
use std::fmt;

use quick_xml::events::Event;

/// Most of a refusal's body that is read.
pub(super) const MAX_BODY: usize = 64 << 10;

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// The provider's own name for it, such as `SlowDown`; empty when it gave none.
    pub(super) code: String,
    pub(super) message: String,
    /// What the provider's support asks for.
    pub(super) request_id: String,
}

/// What can be done about a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may pass.
    Transient,
    /// This machine's clock and the store's differ too much; a request that waited too long looks the same.
    Skewed,
    /// The credentials are wrong or not enough.
    Denied,
    /// Retention or a hold protects the object.
    Immutable,
    /// There is no such object.
    Missing,
    /// There is no such bucket, container or account.
    NoBucket,
    /// The object lies in an archive tier and has to be brought back first.
    Archived,
    /// The object ends before the range begins.
    BehindEnd,
    /// The store cannot do this.
    Unsupported,
    /// The request was wrong in another way.
    Wrong,
}

impl Answer {
    /// What can be done.
    pub(super) fn verdict(&self) -> Verdict {
        match self.code.as_str() {
            "RequestTimeTooSkewed" => return Verdict::Skewed,
            // Both come with 400 from S3, although they pass.
            "RequestTimeout"
            | "SlowDown"
            | "InternalError"
            | "ServerBusy"
            | "OperationTimedOut"
            | "OperationAborted"
            | "ConditionalRequestConflict"
            | "ExpiredToken"
            | "TokenRefreshRequired" => return Verdict::Transient,
            "NoSuchBucket" | "ContainerNotFound" | "ContainerBeingDeleted" | "ResourceNotFound" | "InvalidBucketName" => {
                return Verdict::NoBucket;
            }
            "NoSuchKey" | "NoSuchVersion" | "BlobNotFound" | "notFound" => return Verdict::Missing,
            "InvalidObjectState" | "BlobArchived" | "BlobBeingRehydrated" => return Verdict::Archived,
            // With 400 as well, although it is about the credentials.
            "InvalidToken" => return Verdict::Denied,
            "NotImplemented" | "UnsupportedHeader" => return Verdict::Unsupported,
            code if code.starts_with("BlobImmutable") || code == "ObjectUnderActiveHold" || code == "ObjectLocked" => {
                return Verdict::Immutable;
            }
            _ => {}
        }
        match self.status {
            401 | 403 | 407 => Verdict::Denied,
            405 | 501 | 505 => Verdict::Unsupported,
            408 | 425 | 429 | 500..=599 => Verdict::Transient,
            416 => Verdict::BehindEnd,
            _ => Verdict::Wrong,
        }
    }

    /// True when the store asks to be left alone for a while.
    pub(super) fn is_throttling(&self) -> bool {
        matches!(self.status, 429 | 503) || matches!(self.code.as_str(), "SlowDown" | "ServerBusy")
    }

    /// Reads what came with a status: S3, GCS and Azure send an `<Error>` with a code and a message, some proxies a page.
    pub(super) fn parse(status: u16, code: Option<&str>, request_id: &str, body: &[u8]) -> Self {
        let mut answer =
            Self { status, code: code.unwrap_or_default().into(), message: String::new(), request_id: request_id.into() };
        if body.first() == Some(&b'{') {
            answer.read_json(body);
            return answer;
        }
        let mut reader = quick_xml::Reader::from_reader(body);
        let (mut element, mut depth) = (Vec::new(), 0_u32);
        loop {
            match reader.read_event() {
                Ok(Event::Start(start)) => {
                    depth += 1;
                    element = start.local_name().as_ref().to_vec();
                }
                Ok(Event::End(_)) => {
                    depth = depth.saturating_sub(1);
                    element.clear();
                }
                Ok(Event::Text(text)) if depth == 2 => {
                    let text = String::from_utf8_lossy(&text).trim().chars().take(300).collect::<String>();
                    match element.as_slice() {
                        b"Code" if answer.code.is_empty() => answer.code = text,
                        // Azure adds lines with ids and times of its own.
                        b"Message" => text.lines().next().unwrap_or_default().clone_into(&mut answer.message),
                        b"RequestId" if answer.request_id.is_empty() => answer.request_id = text,
                        _ => {}
                    }
                }
                Ok(Event::Eof) | Err(_) => return answer,
                Ok(_) => {}
            }
        }
    }

    /// Google's JSON API: `{"error": {"message": ..., "errors": [{"reason": ...}]}}`.
    fn read_json(&mut self, body: &[u8]) {
        let Ok(read) = serde_json::from_slice::<serde_json::Value>(body) else { return };
        let text = |at: &str| read.pointer(at).and_then(serde_json::Value::as_str).unwrap_or_default().chars().take(300).collect();
        if self.code.is_empty() {
            self.code = text("/error/errors/0/reason");
        }
        self.message = text("/error/message");
    }

    /// The refusal among the causes of an error.
    pub(super) fn of<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        causes(error).find_map(|cause| cause.downcast_ref())
    }
}

/// An error and what caused it, outermost first.
pub(super) fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// True for the beginning of a document whose root is `<Error>`.
pub(super) fn is_error_document(body: &[u8]) -> bool {
    let mut reader = quick_xml::Reader::from_reader(body);
    loop {
        match reader.read_event() {
            Ok(Event::Start(root)) => return root.local_name().as_ref() == b"Error",
            Ok(Event::Decl(_) | Event::Comment(_) | Event::Text(_) | Event::PI(_) | Event::DocType(_)) => {}
            _ => return false,
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.code.is_empty() {
            write!(f, "the store answered {}", self.status)?;
        } else {
            write!(f, "the store answered {} {}", self.status, self.code)?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if !self.request_id.is_empty() {
            write!(f, " (request {})", self.request_id)?;
        }
        Ok(())
    }
}

impl StdError for Answer {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_from_each_provider() {
        let s3 = b"<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message><RequestId>7</RequestId></Error>";
        let answer = Answer::parse(503, None, "", s3);
        assert_eq!((answer.code.as_str(), answer.request_id.as_str()), ("SlowDown", "7"));
        assert!(answer.is_throttling());
        assert_eq!(answer.to_string(), "the store answered 503 SlowDown: Reduce your request rate. (request 7)");
        let azure =
            b"\xef\xbb\xbf<?xml version=\"1.0\"?><Error><Code>BlobImmutableDueToPolicy</Code><Message>No.\nRequestId:x</Message></Error>";
        let answer = Answer::parse(409, None, "r", azure);
        assert_eq!((answer.verdict(), answer.message.as_str()), (Verdict::Immutable, "No."));
        let google =
            br#"{"error":{"code":404,"message":"No such object: b/o","errors":[{"reason":"notFound","domain":"global"}]}}"#;
        let answer = Answer::parse(404, None, "", google);
        assert_eq!((answer.verdict(), answer.message.as_str()), (Verdict::Missing, "No such object: b/o"));
        for page in [&b"{\"error\":"[..], b"<html><body><h1>Bad Gateway</h1></body></html>", b"", b"\xff\xfe<", b"<Error><Code>"] {
            let answer = Answer::parse(502, None, "", page);
            assert_eq!((answer.code.as_str(), answer.verdict()), ("", Verdict::Transient));
        }
    }

    #[test]
    fn what_may_pass_is_told_from_what_may_not() {
        let verdict = |status, code: &str| Answer::parse(status, Some(code), "", b"").verdict();
        for (status, code) in [(408, ""), (429, ""), (500, ""), (503, "SlowDown"), (400, "RequestTimeout"), (403, "ExpiredToken")] {
            assert_eq!(verdict(status, code), Verdict::Transient, "{status} {code}");
        }
        assert_eq!(verdict(403, "AccessDenied"), Verdict::Denied);
        assert_eq!(verdict(403, "RequestTimeTooSkewed"), Verdict::Skewed);
        assert_eq!(verdict(404, "NoSuchBucket"), Verdict::NoBucket);
        assert_eq!(verdict(400, "InvalidArgument"), Verdict::Wrong);
        assert_eq!(verdict(501, "NotImplemented"), Verdict::Unsupported);
    }

    /// T7: what says 200 and holds an error is an error; a listing that mentions one is not.
    #[test]
    fn t7_an_error_document_is_known_by_its_root() {
        assert!(is_error_document(b"<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code></Error>"));
        assert!(is_error_document(b"  <Error xmlns=\"x\">"));
        for other in [&b"<DeleteResult><Error><Key>a</Key></Error></DeleteResult>"[..], b"", b"Error", b"{}"] {
            assert!(!is_error_document(other));
        }
    }
}
