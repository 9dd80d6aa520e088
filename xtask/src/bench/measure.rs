//! What a command cost.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, WaitId, WaitIdOptions};

/// Time and memory of a command with all its children.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    pub(super) wall: Duration,
    /// User and system time of the command and the children it waited for.
    pub(super) cpu: Duration,
    /// The largest sum of resident memory over the process tree that was seen.
    pub(super) peak_rss: u64,
}

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(20);

/// Runs a command that must succeed.
pub(super) fn measure(command: &mut Command) -> Result<Measured> {
    let program = command.get_program().to_string_lossy().into_owned();
    let log = std::env::temp_dir().join(format!("pgvault-bench-{}.log", std::process::id()));
    let output = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let began = Instant::now();
    let mut child = command.spawn().with_context(|| format!("start {program}"))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the child has no process id")?;
    let ended = AtomicBool::new(false);
    let (wall, cpu, peak_rss) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = 0;
            while !ended.load(Ordering::Relaxed) {
                peak = peak.max(resident(pid.as_raw_nonzero().get()));
                std::thread::sleep(SAMPLE);
            }
            peak
        });
        // Its times are in /proc until it is waited for.
        let waited = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let wall = began.elapsed();
        let cpu = cpu_time(pid.as_raw_nonzero().get());
        ended.store(true, Ordering::Relaxed);
        (waited.map(|_| wall), cpu, sampler.join().unwrap_or(0))
    });
    let status = child.wait()?;
    let text = fs::read_to_string(&log).unwrap_or_default();
    fs::remove_file(&log)?;
    if !status.success() {
        bail!("{program} ended with {status}\n{text}");
    }
    Ok(Measured { wall: wall?, cpu: cpu?, peak_rss })
}

/// User and system time of a process that was not waited for, and of the children that it waited for.
pub(super) fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in brackets may hold spaces; utime, stime, cutime and cstime are the 14th to the 17th field.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
    let ticks: u64 = fields.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// Resident bytes of a process and its descendants.
fn resident(pid: i32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    let mut sum = pages * rustix::param::page_size() as u64;
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        sum += children.split_whitespace().filter_map(|child| child.parse().ok()).map(resident).sum::<u64>();
    }
    sum
}
