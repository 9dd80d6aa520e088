//! A network with latency, on this machine: bytes pass as fast as they come, each of them later.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes that may be on their way in one direction: more than any latency of these tests needs.
const CHUNKS: usize = 256;

/// Forwards connections to `server`; a request and its answer take `latency` longer. Ends with this process.
pub(super) fn start(server: SocketAddr, latency: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen for clients")?;
    let address = listener.local_addr()?;
    let _ = thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let _ = thread::spawn(move || forward(&client, server, latency / 2));
        }
    });
    Ok(address)
}

fn forward(client: &TcpStream, server: SocketAddr, latency: Duration) {
    let Ok(server) = TcpStream::connect(server) else { return };
    for (from, to) in [(client, &server), (&server, client)] {
        let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
        let _ = to.set_nodelay(true);
        let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(CHUNKS);
        let _ = thread::spawn(move || read(from, &sender, latency));
        let _ = thread::spawn(move || write(to, &receiver));
    }
}

fn read(mut from: TcpStream, to: &mpsc::SyncSender<(Instant, Vec<u8>)>, latency: Duration) {
    loop {
        let mut chunk = vec![0; 128 << 10];
        match from.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(read) => chunk.truncate(read),
        }
        // A server that does not switch Nagle's algorithm off waits 40 ms for this before it sends a body behind its header. The kernel
        // forgets it, so it is said again and again.
        let _ = rustix::net::sockopt::set_tcp_quickack(&from, true);
        if to.send((Instant::now() + latency, chunk)).is_err() {
            return;
        }
    }
}

fn write(mut to: TcpStream, from: &mpsc::Receiver<(Instant, Vec<u8>)>) {
    for (due, chunk) in from {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&chunk).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
