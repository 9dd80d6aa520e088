//! One connection: requests in, answers out, and what is to go wrong in between.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http::{Body, Head};
use super::{Canned, Shared, Speed, Wire, reset};

/// What is to become of a connection after a request.
enum Next {
    /// More requests may come.
    More,
    /// It ends.
    End,
    /// It ends with a reset.
    Reset,
    /// It stays, and nothing is said any more.
    Stall,
}

pub(super) async fn serve(client: TcpStream, shared: Shared) {
    let _ = client.set_nodelay(true);
    let done = if shared.opaque { opaque(client, &shared).await } else { requests(client, &shared).await };
    if let Err(error) = done {
        // Either side may go away at any time; the other one sees it.
        tracing::trace!(%error, "a connection ended");
    }
}

async fn requests(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut server = TcpStream::connect(shared.upstream).await?;
    server.set_nodelay(true)?;
    let (mut from_client, mut from_server) = (Vec::new(), Vec::new());
    loop {
        let head = tokio::select! {
            head = Head::read(&mut client, &mut from_client) => head?,
            // A server may close a connection that waits for the next request. The client is to see the same.
            ended = server.readable() => {
                ended?;
                return client.shutdown().await;
            }
        };
        let Some(head) = head else { return Ok(()) };
        let [method, target] = head.first_line();
        let (fault, speed) = shared.request(&method, &target);
        tokio::time::sleep(speed.latency).await;
        let mut exchange =
            Exchange { shared, speed, head: &head, method: &method, from_client: &mut from_client, from_server: &mut from_server };
        let next = exchange.run(&mut client, &mut server, fault).await;
        match next {
            Ok(Next::More) if !head.closes() => {}
            Ok(Next::More | Next::End) => return client.shutdown().await,
            Ok(Next::Reset) => {
                reset(client);
                return Ok(());
            }
            Ok(Next::Stall) => {
                // Until the client has had enough.
                let mut ignored = [0; 4096];
                while client.read(&mut ignored).await? > 0 {}
                return Ok(());
            }
            Err(error) => {
                reset(client);
                return Err(error);
            }
        }
    }
}

struct Exchange<'a> {
    shared: &'a Shared,
    speed: Speed,
    head: &'a Head,
    method: &'a str,
    from_client: &'a mut Vec<u8>,
    from_server: &'a mut Vec<u8>,
}

impl Exchange<'_> {
    async fn run(&mut self, client: &mut TcpStream, server: &mut TcpStream, fault: Option<Wire>) -> io::Result<Next> {
        match fault {
            Some(Wire::Reset) => return Ok(Next::Reset),
            Some(Wire::Garbage) => {
                client.write_all(GARBAGE).await?;
                return Ok(Next::End);
            }
            Some(Wire::Answer(canned)) => {
                let mut ignored = tokio::io::sink();
                self.send_body(client, &mut ignored, None).await?;
                return made_up(client, &canned, self.method).await;
            }
            Some(Wire::Blackhole) => return Ok(Next::Stall),
            Some(Wire::ResetRequest { after }) => {
                server.write_all(&self.head.bytes).await?;
                self.send_body(client, server, Some(after)).await?;
                server.flush().await?;
                // The server sees the end of the connection when this one is dropped.
                return Ok(Next::Reset);
            }
            _ => {}
        }
        if fault == Some(Wire::Duplicate) {
            return self.twice(client, server).await;
        }
        server.write_all(&self.head.bytes).await?;
        self.send_body(client, server, None).await?;
        let answer = self.answer_head(server).await?;
        let mut body = Body::new(answer.answer_length(self.method));
        match fault {
            Some(Wire::LoseAnswer) => return Ok(Next::Reset),
            Some(Wire::StallHeaders) => return Ok(Next::Stall),
            Some(Wire::HalfHeaders) => {
                client.write_all(answer.bytes.get(..answer.bytes.len() / 2).unwrap_or_default()).await?;
                return Ok(Next::End);
            }
            Some(Wire::AnswerAfter(canned)) => {
                while body.next(server, self.from_server).await?.is_some() {}
                return made_up(client, &canned, self.method).await;
            }
            _ => {}
        }
        client.write_all(&answer.bytes).await?;
        let limit = match &fault {
            Some(Wire::ResetAnswer { after } | Wire::CutAnswer { after } | Wire::StallAnswer { after }) => Some(*after),
            _ => None,
        };
        self.pass(&mut body, server, client, limit).await?;
        Ok(match fault {
            Some(Wire::ResetAnswer { .. }) => {
                // A reset overtakes what was sent: the client shall see that much of the body.
                tokio::time::sleep(Duration::from_millis(5)).await;
                Next::Reset
            }
            Some(Wire::CutAnswer { .. }) => Next::End,
            Some(Wire::StallAnswer { .. }) => Next::Stall,
            _ if answer.closes() => Next::End,
            _ => Next::More,
        })
    }

    /// Sends the same request over two connections, one after the other.
    async fn twice(&mut self, client: &mut TcpStream, server: &mut TcpStream) -> io::Result<Next> {
        let mut request = self.head.bytes.clone();
        let mut body = Body::new(self.head.request_length());
        while let Some(piece) = body.next(client, self.from_client).await? {
            request.extend_from_slice(&piece);
        }
        let mut first = TcpStream::connect(self.shared.upstream).await?;
        first.write_all(&request).await?;
        let mut rest = Vec::new();
        if let Some(answer) = Head::read(&mut first, &mut rest).await? {
            let mut body = Body::new(answer.answer_length(self.method));
            while body.next(&mut first, &mut rest).await?.is_some() {}
        }
        server.write_all(&request).await?;
        let answer = self.answer_head(server).await?;
        client.write_all(&answer.bytes).await?;
        let mut body = Body::new(answer.answer_length(self.method));
        self.pass(&mut body, server, client, None).await?;
        Ok(if answer.closes() { Next::End } else { Next::More })
    }

    /// The head of the answer; the server's permission to go on is not one.
    async fn answer_head(&mut self, server: &mut TcpStream) -> io::Result<Head> {
        loop {
            let head = Head::read(server, self.from_server).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if !head.first_line()[1].starts_with('1') {
                return Ok(head);
            }
        }
    }

    async fn send_body(
        &mut self,
        client: &mut TcpStream,
        to: &mut (impl AsyncWrite + Unpin),
        limit: Option<usize>,
    ) -> io::Result<()> {
        let mut body = Body::new(self.head.request_length());
        let mut left = limit.unwrap_or(usize::MAX);
        while left > 0
            && let Some(piece) = body.next(client, self.from_client).await?
        {
            let now = piece.get(..left.min(piece.len())).unwrap_or_default();
            crawl(self.speed, now.len()).await;
            to.write_all(now).await?;
            left -= now.len();
        }
        Ok(())
    }

    async fn pass(
        &mut self,
        body: &mut Body,
        server: &mut TcpStream,
        client: &mut TcpStream,
        limit: Option<usize>,
    ) -> io::Result<()> {
        let mut left = limit.unwrap_or(usize::MAX);
        while left > 0
            && let Some(piece) = body.next(server, self.from_server).await?
        {
            let now = piece.get(..left.min(piece.len())).unwrap_or_default();
            crawl(self.speed, now.len()).await;
            client.write_all(now).await?;
            left -= now.len();
        }
        client.flush().await
    }
}

const GARBAGE: &[u8] = b"\x00\xffSSH-2.0-nobody\r\n\r\n\x16\x03\x01\x7f\xff this is not what you are looking for\r\n";

async fn made_up(client: &mut TcpStream, canned: &Canned, method: &str) -> io::Result<Next> {
    let headers: Vec<String> = canned.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("HTTP/1.1 {} Made Up\r\ncontent-length: {}\r\n{}\r\n", canned.status, canned.body.len(), headers.concat());
    let body = if method == "HEAD" { "" } else { &canned.body };
    client.write_all(format!("{head}{body}").as_bytes()).await?;
    Ok(Next::More)
}

/// Waits as long as these bytes take.
async fn crawl(speed: Speed, bytes: usize) {
    if let Some(rate) = speed.bytes_per_second {
        let micros = bytes as u128 * 1_000_000 / u128::from(rate.max(1));
        tokio::time::sleep(Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))).await;
    }
}

/// A connection that nobody here understands.
async fn opaque(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let (fault, speed) = shared.request("CONNECT", "");
    tokio::time::sleep(speed.latency).await;
    let limit = match fault {
        Some(Wire::Reset) => {
            reset(client);
            return Ok(());
        }
        Some(Wire::Garbage | Wire::Answer(_) | Wire::AnswerAfter(_)) => {
            client.write_all(GARBAGE).await?;
            return client.shutdown().await;
        }
        Some(Wire::Blackhole | Wire::StallHeaders) => Some(0),
        Some(
            Wire::ResetAnswer { after } | Wire::CutAnswer { after } | Wire::StallAnswer { after } | Wire::ResetRequest { after },
        ) => Some(after),
        Some(Wire::LoseAnswer | Wire::HalfHeaders) => Some(3),
        Some(Wire::Duplicate) | None => None,
    };
    let mut server = TcpStream::connect(shared.upstream).await?;
    server.set_nodelay(true)?;
    {
        let (mut client_reads, mut client_writes) = client.split();
        let (mut server_reads, mut server_writes) = server.split();
        let up = copy(&mut client_reads, &mut server_writes, speed, usize::MAX);
        let down = copy(&mut server_reads, &mut client_writes, speed, limit.unwrap_or(usize::MAX));
        // A side that has nothing more to say may still listen; a limit ends both.
        tokio::select! {
            done = down => done?,
            done = up => {
                done?;
            }
        }
    }
    match fault {
        Some(Wire::Blackhole | Wire::StallHeaders | Wire::StallAnswer { .. }) => {
            let mut ignored = [0; 4096];
            while client.read(&mut ignored).await? > 0 {}
            Ok(())
        }
        Some(Wire::ResetAnswer { .. } | Wire::ResetRequest { .. } | Wire::LoseAnswer) => {
            reset(client);
            Ok(())
        }
        _ => client.shutdown().await,
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    speed: Speed,
    limit: usize,
) -> io::Result<()> {
    let mut left = limit;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let read = from.read(&mut buffer).await?;
        let now = buffer.get(..read.min(left)).unwrap_or_default();
        if now.is_empty() {
            break;
        }
        crawl(speed, now.len()).await;
        to.write_all(now).await?;
        left -= now.len();
    }
    to.flush().await
}
