//! The `pgvault wal stream` under test, and how much memory it takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::place::{Place, quiet};

/// The running process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Stream {
    child: Child,
    log: PathBuf,
    watched: Arc<AtomicI32>,
}

impl Stream {
    pub(crate) fn start(place: &Place, sampler: &Sampler) -> Result<Self> {
        let log = place.path("stream.log");
        let file = fs::OpenOptions::new().create(true).append(true).open(&log).context("open the stream's log")?;
        let mut command = place.pgvault(&["wal", "stream"]);
        command.stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().context("start `wal stream`")?;
        sampler.pid.store(i32::try_from(child.id()).unwrap_or(0), Ordering::SeqCst);
        Ok(Self { child, log, watched: sampler.pid.clone() })
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Fails when it has ended although nobody asked it to.
    pub(crate) fn ensure_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("`wal stream` ended by itself with {status}; its log ends with\n{}", self.log_tail());
        }
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid(), signal).context("signal the stream")
    }

    pub(crate) fn kill9(mut self) {
        let _ = self.child.kill();
    }

    /// Asks it to end; gives its exit code.
    pub(crate) fn terminate(mut self, patience: Duration) -> Result<Option<i32>> {
        self.watched.store(0, Ordering::SeqCst);
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if Instant::now() >= deadline {
                bail!("`wal stream` did not end within {patience:?} of SIGTERM; its log ends with\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lets it open no more files and connections than it has, or as many as it likes.
    pub(crate) fn limit_descriptors(&self, place: &Place, on: bool) -> Result<()> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_or(16, Iterator::count);
        let soft = if on { open } else { 1024 };
        // By the account itself: root without all of its capabilities may not.
        let mut command = place.command(Path::new("prlimit"));
        quiet(command.arg("--pid").arg(self.child.id().to_string()).arg(format!("--nofile={soft}:"))).map(drop)
    }

    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.watched.store(0, Ordering::SeqCst);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One look at a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) pid: i32,
    pub(crate) at: Instant,
    pub(crate) rss: u64,
    pub(crate) descriptors: u64,
}

/// Looks at the stream's memory twice a second.
#[derive(Debug)]
pub(crate) struct Sampler {
    pid: Arc<AtomicI32>,
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    pub(crate) fn start() -> Self {
        let (pid, stop, samples) = (Arc::<AtomicI32>::default(), Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let thread = {
            let (pid, stop, samples) = (pid.clone(), stop.clone(), samples.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    if let Some(sample) = look(pid.load(Ordering::SeqCst)) {
                        samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                    }
                    std::thread::sleep(Duration::from_millis(500));
                }
            })
        };
        Self { pid, stop, samples, thread: Some(thread) }
    }

    pub(crate) fn samples(&self) -> Vec<Sample> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look(pid: i32) -> Option<Sample> {
    if pid == 0 {
        return None;
    }
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count() as u64);
    // Killed and not yet waited for, it has no memory.
    (pages > 0).then(|| Sample { pid, at: Instant::now(), rss: pages * rustix::param::page_size() as u64, descriptors })
}
