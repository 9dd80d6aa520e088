//! Programs from npm, `PyPI` and crates.io.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::packages::{ensure_programs, install};
use crate::run::{cargo, program, run, run_quietly, target, which};
use crate::{lock, once};

/// The oldest Node.js that the servers of today run on, and the one to take where the distribution's is older.
const NODE: (u32, &str) = (20, "node@22");

/// Where packages of npm and `PyPI` are installed.
fn folder(name: &str) -> PathBuf {
    target().join("stores").join(name)
}

/// A package of npm, as `name@version`, in a folder of its own; gives its folder.
pub fn npm(package: &str) -> Result<PathBuf> {
    let name = package.split_once('@').map_or(package, |(name, _)| name);
    let folder = folder(name);
    once(&folder, package, |folder| {
        ensure_programs(&[("npm", "npm")], &format!("{package} comes from npm"))?;
        println!("installing {package} with npm");
        let mut npm = program("npm", ["install", "--silent", "--no-audit", "--no-fund", "--prefix"]);
        run_quietly(npm.arg(folder).arg(package).current_dir(folder)).map(drop)
    })?;
    Ok(folder.join("node_modules").join(name))
}

/// A Node.js that is new enough: this machine's, else one from npm.
pub fn node() -> Result<PathBuf> {
    ensure_programs(&[("node", "nodejs"), ("npm", "npm")], "some servers of the tests are written for Node.js")?;
    let own = which("node").context("there is no `node`")?;
    let version = run_quietly(program(&own, ["--version"]).env_remove("NODE_OPTIONS"))?;
    let major = version.trim().trim_start_matches('v').split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major >= NODE.0) { Ok(own) } else { Ok(npm(NODE.1)?.join("bin/node")) }
}

/// Packages of `PyPI` in a virtual environment called `name`; gives the folder of its programs.
pub fn python(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let folder = folder(name);
    once(&folder, &packages.join("\n"), |folder| {
        ensure_programs(&[("python3", "python3")], &format!("{name} comes from PyPI"))?;
        if run_quietly(&mut program("python3", ["-c", "import ensurepip, venv"])).is_err() {
            install(&["python3-venv"], &format!("{name} is installed in a virtual environment"))?;
        }
        println!("installing {} with pip", packages.join(" "));
        run_quietly(program("python3", ["-m", "venv"]).arg(folder))?;
        run_quietly(program(folder.join("bin/pip"), ["install", "-q", "--no-input"]).args(packages)).map(drop)
    })?;
    Ok(folder.join("bin"))
}

/// A program of crates.io: its crate, its version, features, and how long it takes to build where that is worth a warning.
#[derive(Debug, Clone, Copy)]
pub struct Crate {
    /// The crate, and the program in it.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Features beside the default ones.
    pub features: &'static [&'static str],
    /// Said before it is built.
    pub takes: &'static str,
}

/// The S3 server that needs nothing but a folder: the newest that Rust 1.95 builds.
pub const S3S_FS: Crate = Crate { name: "s3s-fs", version: "0.14.1", features: &["binary"], takes: "some minutes" };

impl Crate {
    /// Where the program is once it was built.
    pub fn path(&self) -> PathBuf {
        target().join("tools/bin").join(self.name)
    }

    /// Builds the program once, beside everything else that is built here.
    pub fn built(&self) -> Result<PathBuf> {
        let (path, tools) = (self.path(), target().join("tools"));
        if self.is_installed(&tools) {
            return Ok(path);
        }
        let _lock = lock(&path)?;
        if !self.is_installed(&tools) {
            println!("building {} {}, once; it takes {}", self.name, self.version, self.takes);
            // Kept when the build is interrupted, so that it goes on there.
            let build = tools.join(format!("build-{}", self.name));
            let mut install = cargo();
            install.args(["install", self.name, "--version", self.version, "--locked", "--quiet", "--root"]).arg(&tools);
            install.args(self.features.iter().flat_map(|feature| ["--features", feature]));
            run(install.env("CARGO_TARGET_DIR", &build).env("CARGO_PROFILE_RELEASE_DEBUG", "0"))?;
            fs::remove_dir_all(&build).with_context(|| format!("remove {}", build.display()))?;
        }
        Ok(path)
    }

    /// Cargo notes what it has installed; asking cargo itself would ask the registry.
    fn is_installed(&self, tools: &Path) -> bool {
        let noted = fs::read_to_string(tools.join(".crates.toml")).unwrap_or_default();
        noted.contains(&format!("\"{} {} ", self.name, self.version)) && self.path().is_file()
    }
}
