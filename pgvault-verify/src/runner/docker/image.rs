//! The image that a copy runs on: which one, whether it is fit, and how to make one.
//!
//! An image has to have the cluster's major version, and a C library that sorts text as the one does that the cluster's indexes were built
//! with: on an image with musl (Alpine) every text index of a glibc cluster is silently in the wrong order. What an image has is not read off
//! its name but found out in it. An image that is here is never asked of a registry, so one that exists only here works.

use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use bollard::models::ImageInspect;
use bollard::query_parameters::CreateImageOptions;
use futures::TryStreamExt;
use pgvault_core::{Error, ErrorKind, Result};

use super::SHORT;
use super::client::{Engine, is_absent};
use super::sandbox::Sandbox;

/// How long fetching an image may take.
const FETCHING: Duration = Duration::from_secs(30 * 60);

/// What to do without an image.
const BUILD: &str = "`pgvault verify build-image` writes a Containerfile with the cluster's extensions and says how to build it; \
                     an image that exists only on this machine works";

/// Says what is in the image. `$1` is the major version whose programs are wanted; those of several may lie side by side. A program names its
/// loader in its first bytes, and so its C library; only a script in its place leaves it to what lies in the file system.
const LOOK: &str = r#"
PATH=/usr/lib/postgresql/$1/bin:/usr/pgsql-$1/bin:$PATH
for other in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin; do PATH=$PATH:$other; done
echo "search=$PATH"
server=$(command -v postgres) || exit 0
echo "server=$server"
echo "version=$("$server" --version)"
libc=
case $(LC_ALL=C dd if="$server" bs=4096 count=1 2>/dev/null) in
*ld-musl*) libc=musl ;;
*ld-linux*|*/ld64.so*) libc=glibc ;;
esac
if [ -z "$libc" ]; then
  libc=glibc
  for loader in /lib/ld-musl-*; do if [ -e "$loader" ]; then libc=musl; fi; done
fi
echo "libc=$libc"
echo "release=$(getconf GNU_LIBC_VERSION 2>/dev/null)"
"#;

/// The official image of a major version. It is Debian's, with glibc.
pub fn official(major: u32) -> String {
    format!("docker.io/library/postgres:{major}")
}

/// The name of an image that was built for drills of a major version, as [`containerfile`] proposes it.
pub fn own(major: u32) -> String {
    format!("localhost/pgvault-drill:{major}")
}

/// The C library of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Libc {
    Glibc,
    Musl,
}

/// An image that is here.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// As it was asked for.
    name: String,
    /// Its digest: a name may mean another image a moment later.
    pub(super) id: String,
    pub(super) volumes: Vec<String>,
    /// The search path that finds the wanted programs.
    pub(super) search: String,
    /// `PostgreSQL 15.14`.
    version: String,
    /// As glibc says it; empty where it does not.
    libc: String,
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.id.strip_prefix("sha256:").unwrap_or(&self.id);
        write!(f, "{} ({}", self.name, id.get(..12).unwrap_or(id))?;
        for part in [&self.version, &self.libc].into_iter().filter(|part| !part.is_empty()) {
            write!(f, ", {part}")?;
        }
        f.write_str(")")
    }
}

impl Image {
    /// The image that was built here for this major version, else the official one.
    pub(super) async fn usual(engine: &Engine, major: u32) -> Result<Self> {
        match Self::here(engine, &own(major)).await? {
            Some(image) => Ok(image),
            None => Self::had(engine, &official(major)).await,
        }
    }

    /// The image of this name, fetched when it is not here.
    pub(super) async fn had(engine: &Engine, name: &str) -> Result<Self> {
        if let Some(image) = Self::here(engine, name).await? {
            return Ok(image);
        }
        tracing::warn!(image = name, service = %engine, "the image is not on this machine and is fetched from its registry");
        fetch(engine, name).await?;
        Self::here(engine, name).await?.ok_or_else(|| missing(engine, name, "it is not there after it was fetched"))
    }

    async fn here(engine: &Engine, name: &str) -> Result<Option<Self>> {
        match engine.docker.inspect_image(name).await {
            Ok(ImageInspect { id: Some(id), config, .. }) => Ok(Some(Self {
                name: name.to_owned(),
                id,
                volumes: config.and_then(|config| config.volumes).unwrap_or_default(),
                search: String::new(),
                version: String::new(),
                libc: String::new(),
            })),
            Ok(_) => Err(missing(engine, name, "it has no digest")),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(engine.error(&format!("look for the image {name}"), error)),
        }
    }

    /// Looks into it and refuses what a copy of this major version cannot be judged on. `sandbox` is one of this image.
    pub(super) async fn judged(mut self, engine: &Engine, sandbox: Sandbox, major: u32, accept_musl: bool) -> Result<Self> {
        let script = ["-c", LOOK, "sh", &major.to_string()].map(str::to_owned);
        let said = sandbox.running("/bin/sh", &script).to_its_end(engine, SHORT).await;
        let said = said.map_err(|error| {
            error
                .context(format!("look into the image {}", self.name))
                .with_hint("it needs a shell, which PostgreSQL runs commands with")
        })?;
        if said.code != 0 {
            let message = format!("look into the image {}: exit code {}: {}", self.name, said.code, said.all);
            return Err(Error::new(ErrorKind::Failed, "drill.image", message));
        }
        let found = Found::read(&said.stdout);
        self.check(&found, major, accept_musl)?;
        let version = number_of(&found.version).unwrap_or_default();
        self.version = format!("PostgreSQL {version}");
        (self.search, self.libc) = (found.search, found.release);
        Ok(self)
    }

    fn check(&self, found: &Found, major: u32, accept_musl: bool) -> Result<()> {
        let refused = |why: String, hint: String| Err(Error::new(ErrorKind::Usage, "drill.image", why).with_hint(hint));
        let name = &self.name;
        let official = official(major);
        if found.server.is_empty() {
            return refused(format!("the image {name} has no `postgres`"), format!("take {official}, or build one: {BUILD}"));
        }
        match major_of(&found.version) {
            Some(has) if has == major => {}
            has => {
                let has = has.map_or_else(|| format!("`{}`", found.version), |has| format!("PostgreSQL {has}"));
                return refused(
                    format!("the image {name} has {has}, and the cluster is of PostgreSQL {major}"),
                    format!("take {official}, or build one: {BUILD}"),
                );
            }
        }
        if found.libc == Some(Libc::Musl) && !accept_musl {
            return refused(
                format!(
                    "the image {name} has musl (Alpine), which sorts text in another order than glibc: the cluster's indexes would seem damaged"
                ),
                format!("take an image of Debian such as {official}, or accept musl for a cluster that ran on it: {BUILD}"),
            );
        }
        Ok(())
    }
}

/// Fetches an image from its registry.
async fn fetch(engine: &Engine, name: &str) -> Result<()> {
    let (from_image, tag) = in_two(name);
    let options = CreateImageOptions { from_image: Some(from_image), tag, ..CreateImageOptions::default() };
    let fetching = engine.docker.create_image(Some(options), None, None).try_for_each(|step| async move {
        // Podman tells an error in the middle of an answer that began well.
        match step.error_detail.and_then(|detail| detail.message) {
            Some(error) => Err(bollard::errors::Error::DockerStreamError { error }),
            None => Ok(()),
        }
    });
    match tokio::time::timeout(FETCHING, fetching).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(missing(engine, name, &error.to_string()).with_source(error)),
        Err(_) => Err(missing(engine, name, &format!("it was not fetched within {} min", FETCHING.as_secs() / 60))),
    }
}

fn missing(engine: &Engine, name: &str, why: &str) -> Error {
    let message = format!("the image {name} is not on this machine ({engine}), and cannot be fetched: {why}");
    Error::new(ErrorKind::Failed, "drill.image", message).with_hint(BUILD)
}

/// Name and tag. Without a tag or a digest Docker would fetch every image of the name.
fn in_two(name: &str) -> (String, Option<String>) {
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains('@') {
        return (name.to_owned(), None);
    }
    match last.split_once(':') {
        Some((_, tag)) => (name.strip_suffix(&format!(":{tag}")).unwrap_or(name).to_owned(), Some(tag.to_owned())),
        None => (name.to_owned(), Some("latest".to_owned())),
    }
}

/// What [`LOOK`] has found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    search: String,
    server: String,
    version: String,
    libc: Option<Libc>,
    release: String,
}

impl Found {
    fn read(said: &str) -> Self {
        let mut found = Self::default();
        for (name, value) in said.lines().filter_map(|line| line.trim_end().split_once('=')) {
            match name {
                "search" => value.clone_into(&mut found.search),
                "server" => value.clone_into(&mut found.server),
                "version" => value.clone_into(&mut found.version),
                "release" => value.clone_into(&mut found.release),
                "libc" => found.libc = Some(if value == "musl" { Libc::Musl } else { Libc::Glibc }),
                _ => {}
            }
        }
        found
    }
}

/// Reads `postgres (PostgreSQL) 15.14 (Debian 15.14-1)`, and pre-releases such as `19rc1`.
fn major_of(version: &str) -> Option<u32> {
    number_of(version)?.split(|character: char| !character.is_ascii_digit()).next()?.parse().ok()
}

fn number_of(version: &str) -> Option<&str> {
    version.split("(PostgreSQL)").nth(1)?.split_whitespace().next()
}

/// Extensions whose package is not called as they are.
const PACKAGES: [(&str, &str); 8] = [
    ("pg_cron", "cron"),
    ("pg_partman", "partman"),
    ("pg_repack", "repack"),
    ("postgis", "postgis-3"),
    ("postgis_raster", "postgis-3"),
    ("postgis_tiger_geocoder", "postgis-3"),
    ("postgis_topology", "postgis-3"),
    ("vector", "pgvector"),
];

/// Extensions that come with the server.
const CONTRIB: [&str; 46] = [
    "adminpack",
    "amcheck",
    "auth_delay",
    "auto_explain",
    "autoinc",
    "basebackup_to_shell",
    "basic_archive",
    "bloom",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dblink",
    "dict_int",
    "dict_xsyn",
    "earthdistance",
    "file_fdw",
    "fuzzystrmatch",
    "hstore",
    "insert_username",
    "intagg",
    "intarray",
    "isn",
    "lo",
    "ltree",
    "moddatetime",
    "old_snapshot",
    "pageinspect",
    "passwordcheck",
    "pg_buffercache",
    "pg_freespacemap",
    "pg_prewarm",
    "pg_stat_statements",
    "pg_surgery",
    "pg_trgm",
    "pg_visibility",
    "pg_walinspect",
    "pgcrypto",
    "pgrowlocks",
    "pgstattuple",
    "plpgsql",
    "postgres_fdw",
    "refint",
    "tablefunc",
    "unaccent",
    "uuid-ossp",
];

/// The text of a Containerfile for an image that can run a cluster of this major version with these extensions, each named as in
/// `pg_extension` or as the Debian package that holds it. Extensions that come with PostgreSQL need no package.
///
/// Written to a file called `Containerfile`, it is built with either of
///
/// ```text
/// docker build --tag localhost/pgvault-drill:15 --file Containerfile .
/// podman build --tag localhost/pgvault-drill:15 --file Containerfile .
/// ```
///
/// by the service that the drill will use, which takes an image of this name before the official one. Podman keeps images of root and of each user apart. `--build-arg DEBIAN=bookworm` takes an earlier
/// Debian; the best one is that of the server, because its glibc sorts as the cluster's does.
///
/// A machine without access to a registry of images, but with one to a mirror of Debian, makes the same from nothing:
///
/// ```text
/// debootstrap --variant=minbase --include=postgresql-15 bookworm ./root
/// tar -C ./root --numeric-owner -cf - . | podman import - localhost/pgvault-drill:15
/// tar -C ./root --numeric-owner -cf - . | docker import - localhost/pgvault-drill:15
/// ```
///
/// A machine without either gets an image as a file: `docker save` or `podman save` where it was built, `load` where it is wanted.
pub fn containerfile(major: u32, extensions: &[String]) -> String {
    let own = own(major);
    let mut text = format!(
        "\
# An image for restore drills of PostgreSQL {major}. Build it where the drills run, with one of
#   docker build --tag {own} --file Containerfile .
#   podman build --tag {own} --file Containerfile .
# Under this name drills take it before the official image. Best is the Debian that the server runs on, whose glibc sorts text as the
# cluster does: --build-arg DEBIAN=bookworm, for example.
#
# Without access to a registry of images, but with one to a mirror of Debian that has postgresql-{major}, as root:
#   debootstrap --variant=minbase --include=postgresql-{major} RELEASE ./root
#   tar -C ./root --numeric-owner -cf - . | docker import - {own}     (or podman)
# Without either: `docker save` (or podman) on another machine, `load` on this one.
ARG DEBIAN=trixie
FROM docker.io/library/postgres:{major}-${{DEBIAN}}
"
    );
    let mut packages = Vec::new();
    for extension in extensions {
        match package(major, extension) {
            Ok(Some(package)) if !packages.contains(&package) => packages.push(package),
            Ok(Some(_)) => {}
            Ok(None) => {
                let _ = writeln!(text, "# {extension} comes with PostgreSQL.");
            }
            // Never as it is: a line end in a name would begin an instruction.
            Err(()) => {
                let _ = writeln!(text, "# Left out, because no package is called so: {extension:?}");
            }
        }
    }
    if !packages.is_empty() {
        text.push_str("RUN apt-get update \\\n && apt-get install -y --no-install-recommends \\\n");
        for package in packages {
            let _ = writeln!(text, "      {package} \\");
        }
        text.push_str(" && rm -rf /var/lib/apt/lists/*\n");
    }
    text
}

/// The package of an extension; none when it comes with the server.
fn package(major: u32, extension: &str) -> Result<Option<String>, ()> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+.-_".contains(&byte);
    if !extension.starts_with(|first: char| first.is_ascii_lowercase()) || !extension.bytes().all(allowed) {
        return Err(());
    }
    if CONTRIB.contains(&extension) {
        return Ok(None);
    }
    if extension.starts_with("postgresql-") {
        return Ok(Some(extension.to_owned()));
    }
    // The untrusted language is in the package of the trusted one.
    let language = extension.trim_end_matches('u');
    if ["plperl", "plpython3", "pltcl"].contains(&language) {
        return Ok(Some(format!("postgresql-{language}-{major}")));
    }
    let name = PACKAGES
        .iter()
        .find(|(name, _)| *name == extension)
        .map_or_else(|| extension.replace('_', "-"), |(_, package)| (*package).to_owned());
    Ok(Some(format!("postgresql-{major}-{name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let text = |text: &str| text.to_owned();
        Image {
            name: text("local/pg"),
            id: text("sha256:0123456789abcdef"),
            volumes: Vec::new(),
            search: text(""),
            version: text("PostgreSQL 15.14"),
            libc: text("glibc 2.36"),
        }
    }

    #[test]
    fn an_image_is_judged_by_what_is_in_it() {
        let fit = "search=/a:/b\nserver=/a/postgres\nversion=postgres (PostgreSQL) 15.14 (Debian 15.14-1)\r\nlibc=glibc\nrelease=glibc 2.36\n";
        let found = Found::read(fit);
        assert_eq!((found.search.as_str(), found.release.as_str(), found.libc), ("/a:/b", "glibc 2.36", Some(Libc::Glibc)));
        image().check(&found, 15, false).unwrap();
        let refused = |said: &str, major| image().check(&Found::read(said), major, false).unwrap_err();
        let error = refused(fit, 17);
        assert_eq!(error.to_string(), "the image local/pg has PostgreSQL 15, and the cluster is of PostgreSQL 17");
        assert!(error.hint().unwrap().contains("docker.io/library/postgres:17"));
        assert!(error.hint().unwrap().contains("pgvault verify build-image"));
        assert!(refused("search=/bin\n", 15).to_string().contains("has no `postgres`"));
        assert!(refused("server=/a/postgres\nversion=\n", 15).to_string().contains("has ``, and the cluster"));
        let musl = fit.replace("libc=glibc", "libc=musl");
        assert!(refused(&musl, 15).to_string().contains("has musl"));
        image().check(&Found::read(&musl), 15, true).unwrap();
        assert_eq!(image().to_string(), "local/pg (0123456789ab, PostgreSQL 15.14, glibc 2.36)");
    }

    #[test]
    fn names_are_taken_apart() {
        let parts = |name: &str| in_two(name);
        assert_eq!(parts("docker.io/library/postgres:17"), ("docker.io/library/postgres".to_owned(), Some("17".to_owned())));
        assert_eq!(parts("host:5000/pg"), ("host:5000/pg".to_owned(), Some("latest".to_owned())));
        assert_eq!(parts("pg@sha256:1"), ("pg@sha256:1".to_owned(), None));
        assert_eq!(major_of("postgres (PostgreSQL) 19rc1 (Debian 19~rc1-1)"), Some(19));
        assert_eq!(major_of("mysqld 8.0"), None);
    }

    #[test]
    fn a_containerfile_names_the_packages_of_the_extensions() {
        let extensions =
            ["postgis", "vector", "pg_trgm", "pg_cron", "plpython3u", "hll", "vector", "postgresql-15-age", "x\nRUN rm"];
        let text = containerfile(15, &extensions.map(str::to_owned));
        let packages: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("      ")?.strip_suffix(" \\")).collect();
        assert_eq!(
            packages,
            [
                "postgresql-15-postgis-3",
                "postgresql-15-pgvector",
                "postgresql-15-cron",
                "postgresql-plpython3-15",
                "postgresql-15-hll",
                "postgresql-15-age"
            ]
        );
        assert!(text.contains("\nFROM docker.io/library/postgres:15-${DEBIAN}\n"), "{text}");
        assert!(text.contains("# pg_trgm comes with PostgreSQL.\n"), "{text}");
        assert!(text.contains(r#""x\nRUN rm""#) && !text.contains("\nRUN rm"), "{text}");
        assert!(text.ends_with(" && rm -rf /var/lib/apt/lists/*\n"), "{text}");
        assert!(!containerfile(17, &[]).contains("RUN "));
    }
}
