//! Programs of a later Debian than the one this machine runs: a minimal system is unpacked by debootstrap into a folder of its
//! own, and apt installs in it what is wanted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::packages::{ensure_programs, is_root};
use crate::run::{program, run_quietly, workspace};
use crate::{COMPLETE, lock, once};

/// What runs before a command inside a root, in a mount namespace of its own: some programs need /proc and /dev, and no mount
/// may be left behind. `$1` is the root, `$2` a folder of this machine that is [`SHARED`] in there, or nothing.
const ENTER: &str = r#"root=$1 shared=$2; shift 2
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
if [ -n "$shared" ]; then mkdir -p "$root/srv/shared"; mount --bind "$shared" "$root/srv/shared"; fi
exec chroot "$root" "$@""#;

/// Where [`Root::command`] shows a folder of this machine.
pub const SHARED: &str = "/srv/shared";

/// Where servers are kept: `target/pg`, unless other accounts cannot read there. Servers refuse to run as root, so a
/// clone inside a private home cannot hold them.
pub fn home() -> PathBuf {
    if let Some(folder) = std::env::var_os("PGVAULT_PG_DIR") {
        return PathBuf::from(folder);
    }
    let workspace = workspace();
    let readable =
        workspace.ancestors().all(|folder| fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0));
    if readable { workspace.join("target/pg") } else { PathBuf::from("/var/cache/pgvault/pg") }
}

/// An unpacked Debian.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Root {
    /// The root of a release (`trixie`, `sid`), unpacked when it is missing. `why` says what it is needed for.
    pub fn unpacked(suite: &str, why: &str) -> Result<Self> {
        if !is_root() {
            bail!("this must be run as root: a part of Debian {suite} is unpacked and entered ({why})");
        }
        let root = home().join("roots").join(suite);
        // Asked first: the programs are needed once, the root again and again.
        if !root.join(COMPLETE).is_file() {
            ensure_programs(&[("debootstrap", "debootstrap")], why)?;
        }
        once(&root, "", |root| unpack(suite, root))?;
        Ok(Self(root))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Installs packages in it with apt; `from` is another suite than its own.
    pub fn install(&self, packages: &[&str], from: Option<&str>) -> Result<()> {
        let _lock = lock(&self.0)?;
        println!("installing {} inside {} with apt-get", packages.join(" "), self.0.display());
        let mut install = self.command("apt-get", None);
        install.args(["install", "-y", "-qq"]);
        install.args(from.iter().flat_map(|suite| ["-t", suite])).args(packages);
        if run_quietly(&mut install).is_ok() {
            return Ok(());
        }
        // The lists are as old as the root, and the mirror may have gone on.
        let _ = run_quietly(self.command("apt-get", None).args(["update", "-qq"]))?;
        run_quietly(&mut install).map(drop)
    }

    /// A program in it, which becomes a child of this process with the number of the command that was started. It sees `shared`
    /// as [`SHARED`], and the network of this machine.
    pub fn command(&self, name: &str, shared: Option<&Path>) -> Command {
        let mut command = program("unshare", ["-m", "--propagation", "private", "sh", "-ec", ENTER, "sh"]);
        command.arg(&self.0).arg(shared.unwrap_or(Path::new(""))).arg(name);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }
}

fn unpack(suite: &str, root: &Path) -> Result<()> {
    let mirror = mirror()?;
    println!("unpacking Debian {suite} into {} with debootstrap, about 300 MB", root.display());
    let root_text = root.to_string_lossy();
    run_quietly(&mut program(
        "debootstrap",
        ["--variant=minbase", "--include=ca-certificates,locales", suite, &root_text, &mirror],
    ))?;
    // A frozen mirror serves an unstable release whose signature says "valid until" a day long past.
    fs::write(
        root.join("etc/apt/apt.conf.d/99pgvault"),
        "Acquire::Check-Valid-Until \"false\";\nAPT::Install-Recommends \"false\";\n",
    )?;
    // No daemon is started in there.
    let policy = root.join("usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
    if suite == "sid" {
        fs::write(root.join("etc/apt/sources.list.d/experimental.list"), format!("deb {mirror} experimental main\n"))?;
    }
    run_quietly(Root(root.to_path_buf()).command("apt-get", None).args(["update", "-qq"])).map(drop)
}

/// The Debian mirror this machine is configured with.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("PGVAULT_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let is_debian = fs::read_to_string("/etc/os-release").is_ok_and(|text| text.lines().any(|line| line == "ID=debian"));
    if is_debian {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let found = mirror_in_deb822(&read("/etc/apt/sources.list.d/debian.sources"))
            .or_else(|| mirror_in_list(&read("/etc/apt/sources.list")));
        if let Some(mirror) = found {
            return Ok(mirror);
        }
    }
    bail!("no Debian mirror is configured on this machine; set PGVAULT_DEBIAN_MIRROR to one")
}

fn mirror_in_deb822(text: &str) -> Option<String> {
    text.lines().find_map(|line| line.strip_prefix("URIs:")?.split_whitespace().next().map(str::to_owned))
}

fn mirror_in_list(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        rest.split_whitespace().next().map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_both_formats() {
        let deb822 =
            "# comment\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n\nURIs: http://other.example/x\n";
        assert_eq!(mirror_in_deb822(deb822).as_deref(), Some("http://mirror.example/debian"));
        let list = "# deb http://no.example x main\ndeb-src http://no.example x main\ndeb [arch=amd64 trusted=yes] http://mirror.example/debian bookworm main\n";
        assert_eq!(mirror_in_list(list).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(mirror_in_list("deb http://plain.example/debian bookworm main").as_deref(), Some("http://plain.example/debian"));
        assert_eq!(mirror_in_list(""), None);
    }
}
