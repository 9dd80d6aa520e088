//! A small HTTP server before or instead of a key service: it remembers what was asked, and answers what a test told it to before
//! anything else. One thread for each connection, one request for each.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

/// A request as it came.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub method: String,
    /// With the query.
    pub path: String,
    /// By lower-case names.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn form(&self) -> BTreeMap<String, String> {
        url::form_urlencoded::parse(&self.body).into_owned().collect()
    }

    pub fn bearer(&self) -> &str {
        self.headers.get("authorization").and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default()
    }
}

/// What is done with a request.
#[derive(Debug, Clone)]
pub enum Reply {
    Answer(u16, Vec<(String, String)>, Vec<u8>),
    /// No answer, and no end of the connection.
    Hang,
    /// The connection ends before an answer.
    Cut,
    /// The connection ends in the middle of the answer.
    Half,
    /// An answer that goes on and on.
    Endless,
}

impl Reply {
    pub fn json(status: u16, value: &Value) -> Self {
        Self::Answer(status, vec![("content-type".into(), "application/json".into())], value.to_string().into_bytes())
    }

    pub fn plain(status: u16) -> Self {
        Self::Answer(status, Vec::new(), Vec::new())
    }

    pub fn with_header(self, name: &str, value: &str) -> Self {
        match self {
            Self::Answer(status, mut headers, body) => {
                headers.push((name.into(), value.into()));
                Self::Answer(status, headers, body)
            }
            other => other,
        }
    }
}

type Handler = Box<dyn Fn(&Seen) -> Reply + Send + Sync>;

struct Shared {
    handler: Handler,
    script: Mutex<VecDeque<Reply>>,
    always: Mutex<Option<Reply>>,
    seen: Mutex<Vec<Seen>>,
}

/// The server; it lives as long as the process.
#[derive(Clone)]
pub struct Mini {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Mini {
    pub fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            script: Mutex::default(),
            always: Mutex::default(),
            seen: Mutex::default(),
        });
        let served = shared.clone();
        let _ = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = served.clone();
                let _ = std::thread::spawn(move || serve(stream, &shared));
            }
        });
        Self { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next requests are answered so, in this order.
    pub fn next(&self, replies: impl IntoIterator<Item = Reply>) {
        self.shared.script.lock().unwrap().extend(replies);
    }

    /// Every request is answered so, until `None` is given.
    pub fn always(&self, reply: Option<Reply>) {
        *self.shared.always.lock().unwrap() = reply;
    }

    /// What was asked since the last time.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.seen.lock().unwrap())
    }
}

fn serve(mut stream: TcpStream, shared: &Shared) {
    let Some(seen) = read_request(&stream) else { return };
    shared.seen.lock().unwrap().push(seen.clone());
    let scripted = shared.script.lock().unwrap().pop_front();
    let always = shared.always.lock().unwrap().clone();
    match scripted.or(always).unwrap_or_else(|| (shared.handler)(&seen)) {
        Reply::Answer(status, headers, body) => {
            let mut head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            let _ = stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(&body));
        }
        Reply::Hang => std::thread::sleep(Duration::from_secs(120)),
        Reply::Cut => {}
        Reply::Half => drop(stream.write_all(b"HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n{\"data\":")),
        Reply::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 X\r\nconnection: close\r\n\r\n");
            while stream.write_all(&[b' '; 4096]).is_ok() {}
        }
    }
}

fn read_request(stream: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let _ = reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let mut seen = Seen { method: words.next()?.into(), path: words.next()?.into(), ..Seen::default() };
    loop {
        let mut line = String::new();
        let _ = reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let _ = seen.headers.insert(name.to_ascii_lowercase(), value.trim().into());
    }
    seen.body = vec![0; seen.headers.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0)];
    reader.read_exact(&mut seen.body).ok()?;
    Some(seen)
}

/// Sends a request as it came to a real server, and gives its answer back.
pub fn forward(to: SocketAddr, seen: &Seen) -> Reply {
    let exchange = || -> std::io::Result<Reply> {
        let mut stream = TcpStream::connect(to)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut head = format!("{} {} HTTP/1.1\r\n", seen.method, seen.path);
        for (name, value) in seen.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "connection" | "content-length")) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("connection: close\r\ncontent-length: {}\r\n\r\n", seen.body.len()));
        stream.write_all(head.as_bytes())?;
        stream.write_all(&seen.body)?;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
        let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).ok_or(std::io::ErrorKind::InvalidData)?;
        let headers = head.lines().skip(1).filter_map(|line| line.split_once(": "));
        let headers = headers.filter(|(name, _)| !matches!(name.to_ascii_lowercase().as_str(), "connection" | "content-length"));
        Ok(Reply::Answer(status, headers.map(|(n, v)| (n.to_owned(), v.to_owned())).collect(), answer[end + 4..].to_vec()))
    };
    exchange().unwrap_or_else(|error| panic!("the server at {to}: {error}"))
}

/// Asks a server something for a test's own purposes; gives status and body.
pub fn ask(to: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let mut headers: BTreeMap<String, String> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let _ = headers.insert("host".into(), to.to_string());
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    match forward(to, &Seen { method: method.into(), path: path.into(), headers, body }) {
        Reply::Answer(status, _, body) => (status, serde_json::from_slice(&body).unwrap_or(Value::Null)),
        other => panic!("{other:?}"),
    }
}
