//! Clients that insert one row after the other and write down what was acknowledged.
//!
//! They are `psql` processes: nothing of pgvault decides what counts as acknowledged.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::ledger::Ledger;

/// Shared by the clients.
#[derive(Debug)]
struct Shared {
    ledger: Arc<Ledger>,
    psql: PathBuf,
    /// The folder of the socket that leads to whatever server is the primary.
    address: PathBuf,
    stop: AtomicBool,
    paused: AtomicBool,
    /// Pause after each transaction, in milliseconds.
    think: AtomicU64,
    children: Vec<Mutex<Option<Child>>>,
}

/// The clients; they end with this.
#[derive(Debug)]
pub(crate) struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The pause between two transactions of a client in milliseconds, as usual and in a hurry: what is written has to be compared, often.
const THINK: u64 = 60;
const HURRY: u64 = 2;

impl Writers {
    pub(crate) fn start(count: usize, ledger: &Arc<Ledger>, psql: &Path, address: &Path) -> Self {
        let shared = Arc::new(Shared {
            ledger: ledger.clone(),
            psql: psql.to_path_buf(),
            address: address.to_path_buf(),
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            think: AtomicU64::new(THINK),
            children: (0..count).map(|_| Mutex::default()).collect(),
        });
        let threads = (0..count)
            .map(|writer| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.write(writer))
            })
            .collect();
        Self { shared, threads }
    }

    pub(crate) fn pause(&self, on: bool) {
        self.shared.paused.store(on, Ordering::SeqCst);
    }

    /// Fast, or as usual.
    pub(crate) fn hurry(&self, on: bool) {
        self.shared.think.store(if on { HURRY } else { THINK }, Ordering::SeqCst);
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for child in &self.shared.children {
            if let Some(child) = child.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                let _ = child.kill();
            }
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn write(&self, writer: usize) {
        let mut number = 0;
        while !self.stopped() {
            if let Some((input, output)) = self.connect(writer) {
                self.insert(writer, &mut number, input, output);
            }
            let child = self.children[writer].lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
            std::thread::sleep(Duration::from_millis(150));
        }
    }

    fn connect(&self, writer: usize) -> Option<(ChildStdin, BufReader<ChildStdout>)> {
        let mut command = Command::new(&self.psql);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-p", "5432", "-d", "postgres", "-h"]).arg(&self.address);
        command.env("PGCONNECT_TIMEOUT", "5").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().ok()?;
        let pipes = (child.stdin.take()?, BufReader::new(child.stdout.take()?));
        let mut slot = self.children[writer].lock().unwrap_or_else(PoisonError::into_inner);
        if self.stopped() {
            let _ = child.kill();
        }
        *slot = Some(child);
        Some(pipes)
    }

    /// Until the connection is lost.
    fn insert(&self, writer: usize, number: &mut u32, mut input: ChildStdin, mut output: BufReader<ChildStdout>) {
        let mut line = String::new();
        while !self.stopped() {
            if self.paused.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            *number += 1;
            let mode = self.ledger.mode();
            let sql = format!("insert into ledger (w, n, pad) values ({writer}, {number}, md5(random()::text)) returning n;\n");
            if input.write_all(sql.as_bytes()).and_then(|()| input.flush()).is_err() {
                return;
            }
            line.clear();
            if output.read_line(&mut line).is_err() || line != format!("{number}\n") {
                return;
            }
            self.ledger.acknowledged(writer, *number, mode);
            std::thread::sleep(Duration::from_millis(self.think.load(Ordering::SeqCst)));
        }
    }
}
