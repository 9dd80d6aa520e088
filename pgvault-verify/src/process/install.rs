//! Where the programs of PostgreSQL are.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, Result, run, without_libpq_environment};

/// The programs of one PostgreSQL version on this machine.
#[derive(Debug, Clone)]
pub struct Install {
    bin: PathBuf,
    version: Version,
    /// Other folders with programs: a server-only package has no `psql`, that of any other version does.
    others: Vec<PathBuf>,
}

/// A PostgreSQL version as its programs print it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    major: u32,
    text: String,
}

impl Version {
    /// The major version, which decides about the data directory's format.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Reads `postgres (PostgreSQL) 15.14 (Debian 15.14-1)`, and pre-releases such as `19rc1`.
    fn parse(line: &str) -> Option<Self> {
        let text = line.split("(PostgreSQL)").nth(1)?.split_whitespace().next()?;
        let digits = text.split(|character: char| !character.is_ascii_digit()).next()?;
        Some(Self { major: digits.parse().ok()?, text: text.to_owned() })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Install {
    /// Finds the programs of `major`, or of the newest version there is.
    ///
    /// Looks, in this order, at the folder in `PGVAULT_PG_BIN_<major>`, in `extra` (a folder of programs, or one that
    /// holds `<major>/bin` or `<major>/usr/lib/postgresql/<major>/bin`), where Debian and Red Hat put their packages,
    /// where `pg_config --bindir` points, and in the search path.
    ///
    /// # Errors
    ///
    /// [`Error::NotInstalled`] says what to install and where it was looked for.
    pub fn find(major: Option<u32>, extra: &[PathBuf]) -> Result<Self> {
        let candidates = candidates(major, extra);
        let mut best: Option<Self> = None;
        for bin in &candidates {
            if !is_server(bin) {
                continue;
            }
            let Ok(found) = Self::at(bin) else { continue };
            match major {
                Some(major) if found.version.major == major => return Ok(found.with_others(&candidates)),
                None if best.as_ref().is_none_or(|best| best.version.major < found.version.major) => best = Some(found),
                _ => {}
            }
        }
        best.map(|found| found.with_others(&candidates)).ok_or(Error::NotInstalled { major, looked_in: candidates })
    }

    /// The installation for a test-suite: the version in `PGVAULT_TEST_PG`, or the newest.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn for_tests() -> Result<Self> {
        Self::find(std::env::var("PGVAULT_TEST_PG").ok().and_then(|version| version.parse().ok()), &[])
    }

    /// The programs in exactly this folder.
    ///
    /// # Errors
    ///
    /// When there is no `postgres`, or it does not tell its version.
    pub fn at(bin: &Path) -> Result<Self> {
        let mut command = Command::new(bin.join("postgres"));
        let line = run(without_libpq_environment(&mut command).arg("--version"))?;
        let version =
            Version::parse(&line).ok_or_else(|| Error::NoProgram { program: "postgres".to_owned(), folder: bin.to_path_buf() })?;
        Ok(Self { bin: bin.to_path_buf(), version, others: Vec::new() })
    }

    /// The version of its server.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The folder with the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The path of a program, from another installation when this one lacks it.
    ///
    /// Fit for clients such as `psql`, which talk to older and newer servers; not for what reads the data directory.
    ///
    /// # Errors
    ///
    /// [`Error::NoProgram`] when no installation has it.
    pub fn client(&self, program: &str) -> Result<PathBuf> {
        std::iter::once(&self.bin)
            .chain(&self.others)
            .map(|folder| folder.join(program))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::NoProgram { program: program.to_owned(), folder: self.bin.clone() })
    }

    /// The path of a program of exactly this version.
    ///
    /// # Errors
    ///
    /// [`Error::NoProgram`] when this installation lacks it.
    pub fn program(&self, program: &str) -> Result<PathBuf> {
        let path = self.bin.join(program);
        if path.is_file() { Ok(path) } else { Err(Error::NoProgram { program: program.to_owned(), folder: self.bin.clone() }) }
    }

    fn with_others(mut self, candidates: &[PathBuf]) -> Self {
        self.others = candidates.iter().filter(|folder| **folder != self.bin).cloned().collect();
        self
    }
}

/// What to do about a missing installation.
pub(super) fn advice(major: Option<u32>) -> String {
    let debian = major.map_or_else(|| "postgresql".to_owned(), |major| format!("postgresql-{major}"));
    let red_hat = major.map_or_else(|| "postgresql-server".to_owned(), |major| format!("postgresql{major}-server"));
    let variable = major.map_or_else(|| "PGVAULT_PG_BIN_<major>".to_owned(), |major| format!("PGVAULT_PG_BIN_{major}"));
    format!("install {debian} (Debian, Ubuntu) or {red_hat} (Red Hat), or set {variable} to the folder of its programs")
}

fn is_server(bin: &Path) -> bool {
    bin.join("postgres").is_file() && bin.join("initdb").is_file()
}

fn candidates(major: Option<u32>, extra: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut add = |folder: PathBuf| {
        if !found.contains(&folder) {
            found.push(folder);
        }
    };
    // The wanted version first, then the others: they lend their client programs.
    let mut majors: Vec<u32> = (10..100).rev().collect();
    if let Some(major) = major {
        majors.insert(0, major);
    }
    for major in &majors {
        if let Some(folder) = std::env::var_os(format!("PGVAULT_PG_BIN_{major}")) {
            add(folder.into());
        }
    }
    for root in extra {
        if is_server(root) {
            add(root.clone());
        }
        for sub in majors_in(root, "") {
            let folder = root.join(sub.to_string());
            for bin in [folder.join("bin"), folder.join(format!("usr/lib/postgresql/{sub}/bin"))] {
                if is_server(&bin) {
                    add(bin);
                }
            }
        }
    }
    if let Some(major) = major {
        add(PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
        add(PathBuf::from(format!("/usr/pgsql-{major}/bin")));
    }
    for (root, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        for sub in majors_in(Path::new(root), prefix) {
            add(Path::new(root).join(format!("{prefix}{sub}/bin")));
        }
    }
    if let Ok(answer) = run(Command::new("pg_config").arg("--bindir")) {
        add(PathBuf::from(answer.trim()));
    }
    // Other entries of the search path need not be named in an error.
    let path = std::env::var_os("PATH").unwrap_or_default();
    for folder in std::env::split_paths(&path).filter(|folder| is_server(folder) || folder.join("psql").is_file()) {
        add(folder);
    }
    found
}

/// The numbers `n` for which `root` holds a folder `<prefix>n`, newest first.
fn majors_in(root: &Path, prefix: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut majors: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()).collect();
    majors.sort_unstable_by(|one, other| other.cmp(one));
    majors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases_and_pre_releases_are_read() {
        for (line, major, text) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", 15, "15.14"),
            ("postgres (PostgreSQL) 19rc1 (Debian 19~rc1-1)", 19, "19rc1"),
            ("postgres (PostgreSQL) 17beta2", 17, "17beta2"),
            ("postgres (PostgreSQL) 18devel", 18, "18devel"),
        ] {
            let version = Version::parse(line).unwrap();
            assert_eq!((version.major(), version.to_string().as_str()), (major, text));
        }
        assert_eq!(Version::parse("mysqld 8.0"), None);
        assert_eq!(Version::parse("postgres (PostgreSQL) "), None);
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let error = Install::find(Some(98), &[]).unwrap_err().to_string();
        assert!(error.contains("PostgreSQL 98 is not installed here"), "{error}");
        assert!(error.contains("install postgresql-98 (Debian"), "{error}");
        assert!(error.contains("/usr/lib/postgresql/98/bin"), "{error}");
    }
}
