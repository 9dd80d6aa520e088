//! A gate in front of a server lets requests through unchanged, and keeps out what it is told to.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use pgvault_teststores::gate::Pass;
use pgvault_teststores::{Client, Gate, Kind, Server};

/// A server that closes what is idle: a client behind a gate must not be left with connections that lead nowhere.
#[test]
fn a_gate_passes_on_that_the_server_has_closed_a_connection() {
    use std::io::{Read, Write};
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gate = Gate::open(&format!("http://{}", server.local_addr().unwrap())).unwrap();
    let address = gate.address_of("http://x:1").unwrap();
    let mut client = std::net::TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let (mut behind, _) = server.accept().unwrap();
    let _ = behind.read(&mut [0; 1000]).unwrap();
    behind.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
    let mut answer = String::new();
    while !answer.ends_with("ok") {
        let mut piece = [0; 1000];
        let read = client.read(&mut piece).unwrap();
        answer.push_str(std::str::from_utf8(&piece[..read]).unwrap());
    }
    drop(behind);
    assert_eq!(client.read(&mut [0; 10]).unwrap(), 0, "the connection is still open");
}

#[test]
fn a_gate_lets_pass_refuses_closes_and_keeps_silent() {
    let server = Server::shared(Kind::Gcs).unwrap();
    let place = server.place().unwrap();
    let gate = Gate::open(place.endpoint().unwrap()).unwrap();
    let gated = place.through(&gate).unwrap();
    assert_ne!(gated.endpoint(), place.endpoint());
    let large = vec![7; 20 << 20];
    gated.replace("wal/large", large.clone()).unwrap();
    assert_eq!(gated.read("wal/large").unwrap(), large);
    assert!(gate.requests() >= 2);

    let client = gated.client().unwrap();
    // In one piece, as this protocol has it: what the gate looks for is found all the same.
    let target = |name: &str| format!("/{}/{}%2F{}", place.bucket(), place.prefix(), name.replace('/', "%2F"));
    let put = |name: &str, bytes: Vec<u8>| client.send("PUT", &target(name), &[], bytes).unwrap().status;
    gate.set(Pass::NoWritesOf("/wal/".to_owned()));
    assert_eq!((put("wal/x", large.clone()), put("other", vec![1])), (503, 200));
    assert_eq!(gated.read("wal/large").unwrap().len(), large.len());
    gate.set(Pass::DeniedWritesOf("/wal/".to_owned()));
    assert_eq!((put("wal/x", vec![1]), client.send("DELETE", &target("wal/large"), &[], "").unwrap().status), (403, 403));

    gate.set(Pass::None);
    assert!(client.send("GET", &target("other"), &[], "").is_err(), "nobody is there");
    gate.set(Pass::All);
    assert_eq!(client.send("GET", &target("other"), &[], "").unwrap().status, 200);

    gate.set(Pass::Silence);
    let (sender, receiver) = std::sync::mpsc::channel();
    let (waiting, name) = (client.clone(), target("other"));
    let waiter = std::thread::spawn(move || sender.send(waiting.send("GET", &name, &[], "").unwrap().status).unwrap());
    assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err(), "an answer all the same");
    gate.set(Pass::All);
    assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).unwrap(), 200, "and then it passes");
    waiter.join().unwrap();

    let address = gated.endpoint().unwrap().to_owned();
    drop(gate);
    assert!(Client::anonymous(&address).unwrap().send("GET", "/", &[], "").is_err());
}
