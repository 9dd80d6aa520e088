//! Installing Debian packages: announced before it happens, skipped when nothing is missing, never attempted where this
//! program may not or cannot do it.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{program, run, run_quietly, succeeds, which};

/// Installs `packages` with apt-get, or says what is needed.
///
/// Call it only when something is known to be missing: an installed package is not looked for here.
pub fn install(packages: &[&str], why: &str) -> Result<()> {
    let list = packages.join(" ");
    let Some(mut update) = apt_get(&["update", "-qq"]) else {
        bail!(
            "missing: {list} ({why})\n\
             Nothing was installed: that is done only on Debian or Ubuntu, as root or with sudo that asks no password.\n\
             Install it (Debian, Ubuntu: `apt-get install {list}`) and repeat the command."
        );
    };
    if !packages.iter().all(|package| is_known(package)) {
        println!("reading package lists with apt-get update");
        run(&mut update)?;
    }
    println!("installing {list} with apt-get: {why}");
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(packages);
    if let Some(mut install) = apt_get(&arguments) {
        run_quietly(&mut install)?;
    }
    Ok(())
}

/// Makes sure that every program in `(program, package)` can be started.
pub fn ensure_programs(wanted: &[(&str, &str)], why: &str) -> Result<()> {
    let mut missing: Vec<&str> = wanted.iter().filter(|(name, _)| which(name).is_none()).map(|(_, package)| *package).collect();
    missing.dedup();
    if missing.is_empty() { Ok(()) } else { install(&missing, why) }
}

/// True when apt has a candidate of this package, after reading the lists once if there are none.
pub fn is_available(package: &str) -> bool {
    if is_known(package) {
        return true;
    }
    let lists_are_empty = Path::new("/var/lib/apt/lists")
        .read_dir()
        .is_ok_and(|entries| !entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages")));
    if lists_are_empty && let Some(mut update) = apt_get(&["update", "-qq"]) {
        println!("reading package lists with apt-get update");
        return run(&mut update).is_ok() && is_known(package);
    }
    false
}

/// True when this process is root.
pub fn is_root() -> bool {
    run_quietly(&mut program("id", ["-u"])).is_ok_and(|id| id.trim() == "0")
}

fn is_known(package: &str) -> bool {
    run_quietly(&mut program("apt-cache", ["policy", package]))
        .is_ok_and(|policy| policy.lines().any(|line| line.trim_start().starts_with("Candidate:") && !line.contains("(none)")))
}

fn apt_get(arguments: &[&str]) -> Option<Command> {
    which("apt-get")?;
    let mut command = if is_root() {
        program("env", ["DEBIAN_FRONTEND=noninteractive", "apt-get"])
    } else if which("sudo").is_some() && succeeds(&mut program("sudo", ["-n", "true"])) {
        program("sudo", ["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"])
    } else {
        return None;
    };
    command.args(arguments).stdin(std::process::Stdio::null());
    Some(command)
}
