//! As much of HTTP/1.1 as it takes to know where a message ends.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest head of a message.
const MAX_HEAD: usize = 64 << 10;

/// How long a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    /// So many bytes.
    Known(u64),
    /// In chunks, the last of which is empty.
    Chunked,
    /// Up to the end of the connection.
    ToTheEnd,
}

/// The head of a message, as it came.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) bytes: Vec<u8>,
}

impl Head {
    /// Reads a head; `None` when the connection ends before one begins. `rest` is what was read beyond it, here and before.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin), rest: &mut Vec<u8>) -> io::Result<Option<Self>> {
        loop {
            if let Some(end) = rest.windows(4).position(|four| four == b"\r\n\r\n") {
                let body = rest.split_off(end + 4);
                return Ok(Some(Self { bytes: std::mem::replace(rest, body) }));
            }
            if rest.len() > MAX_HEAD {
                return Err(io::Error::other("the head of a message has no end"));
            }
            if from.read_buf(rest).await? == 0 {
                return if rest.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// The words of the first line.
    pub(super) fn first_line(&self) -> [String; 2] {
        let text = self.text();
        let mut words = text.lines().next().unwrap_or_default().split(' ');
        [words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned()]
    }

    fn header(&self, name: &str) -> Option<String> {
        let text = self.text();
        let mut lines = text.lines().skip(1);
        lines.find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_ascii_lowercase())
        })
    }

    /// True when the sender closes the connection after this message.
    pub(super) fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.contains("close"))
    }

    fn stated(&self) -> Option<Length> {
        if self.header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
            return Some(Length::Chunked);
        }
        self.header("content-length").and_then(|value| value.parse().ok()).map(Length::Known)
    }

    /// How long a request's body is.
    pub(super) fn request_length(&self) -> Length {
        self.stated().unwrap_or(Length::Known(0))
    }

    /// How long an answer's body is.
    pub(super) fn answer_length(&self, method: &str) -> Length {
        let status = self.first_line()[1].parse().unwrap_or(0_u16);
        if method == "HEAD" || matches!(status, 100..=199 | 204 | 304) {
            return Length::Known(0);
        }
        self.stated().unwrap_or(Length::ToTheEnd)
    }
}

/// A body on its way.
#[derive(Debug)]
pub(super) struct Body {
    length: Length,
    left: u64,
    /// Of a chunked body: where in it the reader is.
    chunk: Chunk,
    line: Vec<u8>,
    done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size,
    Data,
    Trailer,
}

impl Body {
    pub(super) fn new(length: Length) -> Self {
        let left = if let Length::Known(bytes) = length { bytes } else { 0 };
        Self { length, left, chunk: Chunk::Size, line: Vec::new(), done: length == Length::Known(0) }
    }

    /// The next piece as it is on the wire; `None` behind the last.
    pub(super) async fn next(&mut self, from: &mut (impl AsyncRead + Unpin), rest: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
        if self.done {
            return Ok(None);
        }
        if rest.is_empty() {
            rest.reserve(64 << 10);
            if from.read_buf(rest).await? == 0 {
                self.done = true;
                return if self.length == Length::ToTheEnd { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
        let taken = self.take(rest);
        let later = rest.split_off(taken);
        Ok(Some(std::mem::replace(rest, later)))
    }

    /// How many of these bytes belong to the body.
    fn take(&mut self, bytes: &[u8]) -> usize {
        match self.length {
            Length::ToTheEnd => bytes.len(),
            Length::Known(_) => {
                let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= taken as u64;
                self.done = self.left == 0;
                taken
            }
            Length::Chunked => {
                let mut at = 0;
                while at < bytes.len() && !self.done {
                    at += self.take_chunked(bytes.get(at..).unwrap_or_default());
                }
                at
            }
        }
    }

    fn take_chunked(&mut self, bytes: &[u8]) -> usize {
        if self.chunk == Chunk::Data {
            // With the line break behind the data.
            let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            self.left -= taken as u64;
            if self.left == 0 {
                self.chunk = Chunk::Size;
            }
            return taken;
        }
        let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
        self.line.extend_from_slice(bytes.get(..end).unwrap_or_default());
        if self.line.ends_with(b"\n") {
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim().to_owned();
            if self.chunk == Chunk::Trailer {
                self.done = line.is_empty();
            } else {
                let size = u64::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16).unwrap_or(0);
                self.left = size + 2;
                self.chunk = if size == 0 { Chunk::Trailer } else { Chunk::Data };
            }
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn body(head: &[u8], wire: &[u8], piece: usize) -> (Vec<u8>, Vec<u8>) {
        let mut rest = head.to_vec();
        let head = Head::read(&mut tokio::io::empty(), &mut rest).await.unwrap().unwrap();
        assert!(rest.is_empty());
        let mut body = Body::new(head.answer_length("GET"));
        let (mut passed, mut wire) = (Vec::new(), wire.to_vec());
        while !wire.is_empty() && !body.done {
            let later = wire.split_off(piece.min(wire.len()));
            rest.append(&mut wire);
            wire = later;
            while !rest.is_empty()
                && let Some(more) = body.next(&mut tokio::io::empty(), &mut rest).await.unwrap()
            {
                passed.extend(more);
            }
        }
        rest.extend(wire);
        (passed, rest)
    }

    #[tokio::test]
    async fn a_body_ends_where_it_says_however_it_is_cut() {
        let chunked = b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nt: 1\r\n\r\n";
        for piece in 1..40 {
            let (passed, rest) = body(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"helloHTTP/1.1", piece).await;
            assert_eq!((&passed[..], &rest[..]), (&b"hello"[..], &b"HTTP/1.1"[..]), "{piece}");
            let wire = [&chunked[..], b"HTTP/1.1"].concat();
            let (passed, rest) = body(b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", &wire, piece).await;
            assert_eq!((&passed[..], &rest[..]), (&chunked[..], &b"HTTP/1.1"[..]), "{piece}");
        }
    }

    #[tokio::test]
    async fn answers_to_head_and_without_content_have_no_body() {
        let head = async |text: &str| Head::read(&mut tokio::io::empty(), &mut text.as_bytes().to_vec()).await.unwrap().unwrap();
        let long = head("HTTP/1.1 200 OK\r\ncontent-length: 7\r\nConnection: close\r\n\r\n").await;
        assert_eq!((long.answer_length("GET"), long.answer_length("HEAD")), (Length::Known(7), Length::Known(0)));
        assert!(long.closes());
        assert_eq!(head("HTTP/1.1 204 No Content\r\n\r\n").await.answer_length("DELETE"), Length::Known(0));
        assert_eq!(head("HTTP/1.1 200 OK\r\n\r\n").await.answer_length("GET"), Length::ToTheEnd);
        assert_eq!(head("GET /a HTTP/1.1\r\n\r\n").await.request_length(), Length::Known(0));
        assert!(Head::read(&mut &b"GET / HTTP/1.1\r\nHo"[..], &mut Vec::new()).await.is_err());
        assert!(Head::read(&mut tokio::io::empty(), &mut Vec::new()).await.unwrap().is_none());
    }
}
