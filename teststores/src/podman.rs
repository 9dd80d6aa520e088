//! Podman's service, which speaks the Docker API, and images of the PostgreSQL that is installed here, made without any registry. It is no
//! store, so it is no [`Kind`](crate::Kind).
//!
//! Images and containers are kept below `target/containers`, apart from those of whoever works on this machine; the service has a socket of
//! its own. An image holds the programs of one PostgreSQL with the libraries that they are linked with, a shell, and the few programs
//! that a `restore_command` wants: unpacking a Debian would take a minute and half a gigabyte.

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pgvault_provision::packages::ensure_programs;
use pgvault_provision::run::{program, run_quietly, succeeds, target};
use pgvault_provision::{fresh, lock, once};

use crate::guard::{Process, Work};

/// The default runtime, crun, refuses control groups in hybrid mode; systemd and its journal may not run at all where tests do. A program that
/// was run in a container leaves a process for as long as the delay says.
const CONFIGURATION: &str = r#"[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
exit_command_delay = 10
"#;

/// Fills `$1` with the folders `$2...` and what the programs in them need. A relocated PostgreSQL has its libraries in one of them.
const FILL: &str = r#"
root=$1; shift
mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/usr/lib64" "$root/usr/share" "$root/etc"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
for name in proc sys dev run tmp; do mkdir "$root/$name"; done
# Compiling queries takes a library as large as all of this.
tar -C / --exclude='llvmjit*' --exclude=bitcode --exclude=man -cf - "$@" | tar -C "$root" -xf -
for name in sh cp mv rm ln ls cat cmp dd env id head kill mkdir sleep tail test touch true false getconf; do
  cp -L "$(command -v "/usr/bin/$name" || command -v "/bin/$name")" "$root/usr/bin/$name"
done
find "$root" -type f \( -perm -100 -o -name '*.so*' \) -exec ldd {} + 2>/dev/null |
sed -n 's/^[^/]*\(\/[^ ]*\) (0x[0-9a-f]*)$/\1/p' | sort -u |
while read -r library; do
  case $library in "$root"/*) continue ;; esac
  mkdir -p "$root$(dirname "$library")"
  [ -e "$root$library" ] || cp -L "$library" "$root$library"
done
for folder in /usr/lib/locale /usr/share/zoneinfo; do [ ! -d "$folder" ] || cp -a "$folder" "$root$folder"; done
printf 'root:x:0:0:root:/:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
"#;

/// Changes with [`FILL`]: an image of an earlier one is made again.
const REVISION: u32 = 2;

/// A running service.
#[derive(Debug)]
pub struct Podman {
    socket: PathBuf,
    configuration: PathBuf,
    #[expect(dead_code, reason = "dropping it ends the service")]
    process: Process,
    #[expect(dead_code, reason = "dropping it removes the folder")]
    work: Work,
}

impl Podman {
    /// Installs it when it is missing, and starts its service. Containers go on when it ends; whoever made them removes them.
    pub fn start() -> Result<Self> {
        let why = "restore drills in containers are tested on Podman";
        ensure_programs(&[("podman", "podman"), ("runc", "runc")], why)?;
        let work = Work::new("podman")?;
        let configuration = work.write("containers.conf", CONFIGURATION)?;
        let socket = work.path().join("podman.sock");
        let mut service = podman(&configuration)?;
        service.args(["system", "service", "--time=0"]).arg(format!("unix://{}", socket.display()));
        // Its monitor of a container leaves a file called `oom` where the service was started.
        service.current_dir(work.path());
        let process = work.start("podman", &service)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(&socket).is_err() {
            process.ensure_running()?;
            ensure!(Instant::now() < deadline, "Podman's service does not answer:\n{}", process.said());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { socket, configuration, process, work })
    }

    /// The service that the whole process uses; it ends with the process.
    pub fn shared() -> Result<Arc<Self>> {
        static SHARED: Mutex<Option<Arc<Podman>>> = Mutex::new(None);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(service) = shared.as_ref() {
            return Ok(Arc::clone(service));
        }
        let service = Arc::new(Self::start().context("start Podman's service")?);
        *shared = Some(Arc::clone(&service));
        Ok(service)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The command line, on the same images and containers.
    pub fn command(&self) -> Result<Command> {
        podman(&self.configuration)
    }

    /// The name of an image with the PostgreSQL whose programs are in `bin`. It finds them, and runs anything as anybody.
    pub fn image(&self, bin: &Path) -> Result<String> {
        self.image_with(bin, &[])
    }

    /// As [`Podman::image`], with files of another content, or beside the others, each as a path without links from the root.
    pub fn image_with(&self, bin: &Path, files: &[(&str, &[u8])]) -> Result<String> {
        let version = run_quietly(program(bin.join("postgres"), ["--version"]).env("LC_ALL", "C"))?;
        let what = format!("{REVISION} {} {}", version.trim(), bin.display());
        let root = home().join("roots").join(name_of(&what));
        once(&root, &what, |root| run_quietly(program("sh", ["-euc", FILL, "sh"]).arg(root).args(trees(bin)?)).map(drop))?;
        let name = format!("localhost/pgvault-test:{}", name_of(&(&what, files)));
        let _lock = lock(&home().join("import"))?;
        if succeeds(self.command()?.args(["image", "exists", &name])) {
            return Ok(name);
        }
        let (extra, archive) = (home().join("extra"), home().join("import.tar"));
        fresh(&extra)?;
        for (path, bytes) in files {
            let path = extra.join(path);
            fs::create_dir_all(path.parent().context("a file has no folder")?)?;
            fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("set permissions")?;
        }
        // Podman refuses an archive that names a file twice.
        let mut tar = program("tar", ["--numeric-owner", "--owner=0", "--group=0", "--exclude=./.complete"]);
        tar.args(files.iter().map(|(path, _)| format!("--exclude=./{path}")));
        tar.arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".");
        for (path, _) in files {
            tar.arg("-C").arg(&extra).arg(path);
        }
        run_quietly(&mut tar)?;
        let path = format!("ENV PATH={}:/usr/bin:/bin", bin.display());
        run_quietly(self.command()?.args(["import", "--quiet", "--change", &path]).arg(&archive).arg(&name))?;
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
        Ok(name)
    }
}

/// Where all of it is kept.
fn home() -> PathBuf {
    target().join("containers")
}

fn podman(configuration: &Path) -> Result<Command> {
    let home = home();
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let mut podman = program("podman", Vec::<OsString>::new());
    podman.env("CONTAINERS_CONF", configuration).arg("--root").arg(home.join("storage")).arg("--runroot").arg(home.join("run"));
    // An overlay cannot lie on another: then every container is a copy of its image.
    let on_overlay = run_quietly(program("stat", ["-f", "-c", "%T"]).arg(&home)).is_ok_and(|kind| kind.trim() == "overlayfs");
    if on_overlay {
        podman.args(["--storage-driver", "vfs"]);
    }
    Ok(podman)
}

/// The folders of a PostgreSQL, without the leading slash.
fn trees(bin: &Path) -> Result<Vec<PathBuf>> {
    let home = bin.parent().context("the folder of programs has no parent")?;
    let version = home.file_name().unwrap_or_default().to_owned();
    let relative =
        |path: &Path| path.strip_prefix("/").map(Path::to_path_buf).with_context(|| format!("{} is not absolute", path.display()));
    // Debian's layout, of the system or of a copy elsewhere; otherwise all of it is in one folder.
    let Some(root) = home.to_str().and_then(|home| home.strip_suffix(&format!("usr/lib/postgresql/{}", version.to_string_lossy())))
    else {
        return Ok(vec![relative(home)?]);
    };
    let root = Path::new(root);
    let mut trees = vec![relative(home)?, relative(&root.join("usr/share/postgresql").join(&version))?];
    let libraries = root.join("so");
    if root != Path::new("/") && libraries.is_dir() {
        trees.push(relative(&libraries)?);
    }
    for tree in &trees {
        if !Path::new("/").join(tree).is_dir() {
            bail!("/{} is missing", tree.display());
        }
    }
    Ok(trees)
}

/// A short name for a long one, for a tag.
fn name_of(what: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
